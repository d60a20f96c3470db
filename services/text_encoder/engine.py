"""Prompts to rows: cleaning, tokenizing, the network, the cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import UMT5EncoderModel

from services.text_encoder.cache import Embedding, EmbeddingCache
from services.text_encoder.checkpoint import load_encoder
from services.text_encoder.config import TextEncoderConfig
from services.text_encoder.prompt import clean_prompt, format_prompt
from services.text_encoder.streaming import stream_layers
from services.text_encoder.tokenizer import PromptTokenizer
from shared.checkpoints import file_fingerprint
from shared.device_memory import freed, peak_gib, reset_peak
from shared.errors import CheckpointError, OutOfMemory
from shared.logging import get_logger
from shared.memory.modes import TextEncoderPlace
from shared.tensors.framing import spec_of
from shared.variants import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, PromptFormat

log = get_logger(__name__)


class TextEncoder:
    """The umT5 encoder on a device: token ids to rows."""

    def __init__(
        self, model: UMT5EncoderModel, config: TextEncoderConfig, device: torch.device, *, streamed: bool = False
    ) -> None:
        """
        Args:
            model: with its weights in place on `device`, or on the CPU if they are streamed.
            config: its widths.
            device: where it runs.
            streamed: weights are in host memory, and each layer is on the device while it is needed.

        Raises:
            OutOfMemory: the host's memory for that cannot be had or locked.
        """
        self.config = config
        self._model = model
        self.device = device
        self._stream = stream_layers(model, device) if streamed else None

    @classmethod
    def load(cls, path: Path, *, device: torch.device, precision: torch.dtype, place: TextEncoderPlace) -> TextEncoder:
        """Read a weight file. Weights that are streamed are never on the device together.

        Raises:
            CheckpointError: see `load_encoder`.
            OutOfMemory: the host's memory for streaming cannot be had or locked.
        """
        streamed = place is TextEncoderPlace.STREAMED
        on = torch.device("cpu") if streamed else device
        model, config = load_encoder(path, device=on, precision=precision)
        return cls(model, config, device, streamed=streamed)

    @torch.inference_mode()
    def encode(self, ids: Sequence[int]) -> torch.Tensor:
        """Ids (L,) of one prompt without padding -> rows (L, dim) on the CPU, in the precision of the weights.

        Prompts go through alone: the rows of a prompt then do not depend, to the bit, on what it is asked with, and no
        padding is computed. Padding would change nothing but rounding: umT5's positions are relative, and padding is
        masked.
        """
        embedding = self._model.get_input_embeddings()
        ids_1L = torch.tensor([list(ids)], dtype=torch.int64, device=embedding.weight.device)
        embedded_1LC = embedding(ids_1L).to(self.device)
        rows: torch.Tensor = self._model(inputs_embeds=embedded_1LC).last_hidden_state[0]
        return rows.to("cpu").contiguous()

    def release(self) -> None:
        """Give the device's memory back, if weights are in host memory."""
        if self._stream is not None:
            self._stream.release()
            freed(self.device)

    def close(self) -> None:
        """Give all memory back; it encodes nothing any more."""
        if self._stream is not None:
            self._stream.close()
        del self._model
        gc.collect()  # hooks and what they hold refer to each other
        freed(self.device)


@dataclass(frozen=True)
class Encoded:
    """The answer for one prompt of a request."""

    text: str
    """What was encoded, after cleaning and conversion."""
    embedding: Embedding
    cached: bool


class TextEngine:
    """A loaded encoder with its tokenizer and cache. `encode` belongs on the device's thread, the rest anywhere."""

    def __init__(
        self,
        load: Callable[[TextEncoderPlace], TextEncoder],
        place: TextEncoderPlace,
        tokenizer: PromptTokenizer,
        cache: EmbeddingCache,
        *,
        fingerprint: str,
    ) -> None:
        """
        Args:
            load: makes the network with its layers in a place.
            place: of the layers.
            tokenizer: the one beside it.
            cache: may outlive this engine; its keys hold the fingerprint.
            fingerprint: of weights and tokenizer.
        """
        self._load = load
        self._encoder = load(place)
        self.place = place
        """Where the layers are."""
        self._tokenizer = tokenizer
        self._cache = cache
        self.fingerprint = fingerprint
        self.num_encoded = 0
        """Prompts that went through the network."""

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        device: torch.device,
        precision: torch.dtype,
        cache_bytes: int,
        place: TextEncoderPlace = TextEncoderPlace.RESIDENT,
    ) -> TextEngine:
        """Load weights and tokenizer of a checkpoint folder.

        Args:
            folder: in the released layout.
            device: where the network runs.
            precision: float32 or bfloat16.
            cache_bytes: most bytes of embeddings kept.
            place: of the layers.

        Raises:
            CheckpointError: one is missing, damaged, or they do not fit together; names the file.
            OutOfMemory: the host's memory for streaming cannot be had or locked.
        """
        path, tokenizer_folder = folder / TEXT_ENCODER_FILE, folder / TOKENIZER_FOLDER
        tokenizer = PromptTokenizer.read(tokenizer_folder)

        def load(place: TextEncoderPlace) -> TextEncoder:
            return TextEncoder.load(path, device=device, precision=precision, place=place)

        cache = EmbeddingCache(max_bytes=cache_bytes)
        fingerprint = f"{file_fingerprint(path)}-{tokenizer.sha256[:16]}"
        engine = cls(load, place, tokenizer, cache, fingerprint=fingerprint)
        if tokenizer.max_id >= engine.config.vocab_size:
            raise CheckpointError(
                f"{tokenizer_folder}: gives ids up to {tokenizer.max_id}, {path} knows {engine.config.vocab_size}"
                " tokens; take tokenizer and weights from the same release"
            )
        return engine

    def move(self, place: TextEncoderPlace) -> None:
        """Put the layers elsewhere: read again, after those that were there are let go of.

        Raises:
            CheckpointError: the file cannot be read any more.
            OutOfMemory: the host's memory for streaming cannot be had or locked; they are where they were.
        """
        if place is self.place:
            return
        self._encoder.close()
        try:
            self._encoder = self._load(place)
        except OutOfMemory:
            self._encoder = self._load(self.place)
            raise
        self.place = place

    @property
    def config(self) -> TextEncoderConfig:
        """Widths of the network."""
        return self._encoder.config

    @staticmethod
    def prepare(prompts: Sequence[str], prompt_format: PromptFormat) -> list[str]:
        """The texts to encode: cleaned, then with their sound in the wanted form."""
        return [format_prompt(clean_prompt(prompt), prompt_format) for prompt in prompts]

    def cached(self, texts: Sequence[str], num_pinned: int) -> list[Encoded | None]:
        """What the cache has of prepared texts, in order; None for the rest. The last `num_pinned` are pinned."""
        return [self._lookup(text, pin) for text, pin in _with_pins(texts, num_pinned)]

    def encode(self, texts: Sequence[str], num_pinned: int) -> Iterator[Encoded]:
        """Every prepared text in order, from the cache or through the network."""
        try:
            for text, pin in _with_pins(texts, num_pinned):
                yield self._lookup(text, pin) or self._encode(text, pin)
        finally:
            self._encoder.release()

    def _lookup(self, text: str, pin: bool) -> Encoded | None:
        embedding = self._cache.get(self.fingerprint, text, pin=pin)
        return None if embedding is None else Encoded(text, embedding, cached=True)

    def _encode(self, text: str, pin: bool) -> Encoded:
        tokens = self._tokenizer(text)
        start = time.perf_counter()
        reset_peak(self._encoder.device)
        rows_LC = self._encoder.encode(tokens.ids)
        seconds = round(time.perf_counter() - start, 3)
        peak = peak_gib(self._encoder.device)
        log.info("prompt encoded", num_tokens=len(tokens.ids), seconds=seconds, peak_device_gib=peak)
        embedding = Embedding(rows_LC, spec_of(rows_LC), tokens.truncated)
        self.num_encoded += 1
        self._cache.put(self.fingerprint, text, embedding, pin=pin)
        return Encoded(text, embedding, cached=False)


def _with_pins(texts: Sequence[str], num_pinned: int) -> list[tuple[str, bool]]:
    first_pinned = len(texts) - num_pinned
    return [(text, index >= first_pinned) for index, text in enumerate(texts)]
