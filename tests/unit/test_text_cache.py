"""The embedding cache: bounds, order of leaving, pins."""

from __future__ import annotations

import torch

from services.text_encoder.cache import Embedding, EmbeddingCache
from shared.tensors.framing import spec_of

_ROW_BYTES = 4 * 10


def _embedding(rows: int, value: float = 0.0) -> Embedding:
    tensor = torch.full((rows, 10), value)
    return Embedding(tensor, spec_of(tensor), truncated=False)


def _kept(cache: EmbeddingCache, texts: str) -> str:
    return "".join(text for text in texts if cache.get("f", text) is not None)


def test_the_same_embedding_comes_back_for_its_encoder_and_text_only() -> None:
    cache = EmbeddingCache(max_bytes=1000)
    embedding = _embedding(2, 3.0)
    cache.put("f", "a", embedding)
    assert cache.get("f", "a") is embedding
    assert cache.get("g", "a") is None
    assert cache.get("f", "A") is None


def test_bytes_are_bounded_and_the_least_recently_used_leaves_first() -> None:
    cache = EmbeddingCache(max_bytes=3 * _ROW_BYTES)
    for text in "abc":
        cache.put("f", text, _embedding(1))
    assert cache.get("f", "a") is not None
    cache.put("f", "d", _embedding(1))
    assert _kept(cache, "abcd") == "acd"
    cache.put("f", "e", _embedding(3))
    assert _kept(cache, "abcde") == "e"
    assert cache.num_bytes == 3 * _ROW_BYTES


def test_an_embedding_larger_than_the_cache_is_not_kept() -> None:
    cache = EmbeddingCache(max_bytes=3 * _ROW_BYTES)
    cache.put("f", "x", _embedding(4))
    assert cache.num_bytes == 0


def test_no_bytes_keep_nothing() -> None:
    cache = EmbeddingCache(max_bytes=0)
    cache.put("f", "x", _embedding(1), pin=True)
    assert cache.get("f", "x") is None


def test_putting_a_text_again_replaces_it() -> None:
    cache = EmbeddingCache(max_bytes=1000)
    cache.put("f", "a", _embedding(3))
    cache.put("f", "a", _embedding(1))
    assert cache.num_bytes == _ROW_BYTES


def test_pins_outlast_others() -> None:
    cache = EmbeddingCache(max_bytes=8 * _ROW_BYTES)
    cache.put("f", "n", _embedding(1), pin=True)
    cache.put("f", "m", _embedding(1))
    assert cache.get("f", "m", pin=True) is not None
    for index in range(50):
        cache.put("f", f"text {index}", _embedding(1))
    assert _kept(cache, "nm") == "nm"
    assert cache.num_bytes == 8 * _ROW_BYTES


def test_pins_are_bounded_to_a_quarter_the_oldest_pin_becomes_ordinary() -> None:
    cache = EmbeddingCache(max_bytes=8 * _ROW_BYTES)
    for text in "nmop":
        cache.put("f", text, _embedding(1), pin=True)
    for index in range(6):
        cache.put("f", f"text {index}", _embedding(1))
    assert _kept(cache, "nmop") == "op"
