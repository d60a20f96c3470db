"""Embeddings of prompts seen before: least recently used out first, negatives pinned."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from shared.tensors.framing import TensorSpec


@dataclass(frozen=True)
class Embedding:
    """An encoded prompt, with all that a reference to it needs."""

    rows_LC: torch.Tensor
    """(L, text_dim), contiguous, on the CPU; shared, never written."""
    spec: TensorSpec
    """Of the rows; kept so that a repeated prompt needs no second checksum."""
    truncated: bool
    """True if the text's end was cut off."""


@dataclass
class _Entry:
    embedding: Embedding
    pinned: bool

    @property
    def num_bytes(self) -> int:
        return self.embedding.spec.num_bytes


class EmbeddingCache:
    """Bounded by bytes. Thread-safe.

    Pinned entries outlast others. They too are bounded: beyond a quarter of the whole, the least recently used pin
    becomes an ordinary entry, so that a caller who pins everything gains nothing.
    """

    def __init__(self, *, max_bytes: int) -> None:
        """
        Args:
            max_bytes: of all rows together; 0 keeps nothing.
        """
        self._max_bytes = max_bytes
        self._max_pinned_bytes = max_bytes // 4
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, fingerprint: str, text: str, *, pin: bool = False) -> Embedding | None:
        """The embedding of this text by this encoder if it is kept; it counts as used now, and is pinned if asked."""
        with self._lock:
            entry = self._entries.get((fingerprint, text))
            if entry is None:
                return None
            self._entries.move_to_end((fingerprint, text))
            entry.pinned = entry.pinned or pin
            self._shrink()
            return entry.embedding

    def put(self, fingerprint: str, text: str, embedding: Embedding, *, pin: bool = False) -> None:
        """Keep an embedding; others leave to make room. One larger than the whole cache is not kept."""
        with self._lock:
            self._entries[(fingerprint, text)] = _Entry(embedding, pin)
            self._entries.move_to_end((fingerprint, text))
            self._shrink()

    @property
    def num_bytes(self) -> int:
        """Bytes of all kept rows."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    def _shrink(self) -> None:
        pinned = [entry for entry in self._entries.values() if entry.pinned]
        pinned_bytes = sum(entry.num_bytes for entry in pinned)
        for entry in pinned:
            if pinned_bytes <= self._max_pinned_bytes:
                break
            entry.pinned = False
            pinned_bytes -= entry.num_bytes
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if num_bytes <= self._max_bytes:
                break
            if not entry.pinned:
                del self._entries[key]
                num_bytes -= entry.num_bytes
