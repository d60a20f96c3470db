"""Widths of the umT5 encoder, and the options of its service."""

from __future__ import annotations

from dataclasses import dataclass

from shared.service_main import StageOptions

MAX_TOKENS = 512
"""Most tokens of a prompt, the end mark included; the fusion model pads every prompt to this length."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Widths of a umT5 encoder; every one of them can be read from the shapes of a weight file."""

    vocab_size: int
    """Rows of the token embedding."""
    dim: int
    """Width of a row of the result."""
    dim_attn: int
    """Width of queries, keys and values, all heads together."""
    dim_ffn: int
    """Width inside the gated feed-forward."""
    num_heads: int
    num_layers: int
    num_buckets: int
    """Buckets of the relative position bias; distances of 128 tokens and more share the last one."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError("num_layers must be at least 1")
        if self.num_heads < 1 or self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn {self.dim_attn} must be a multiple of num_heads {self.num_heads}")


RELEASED = TextEncoderConfig(
    vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32
)
"""umT5-XXL."""


@dataclass(frozen=True)
class TextEncoderOptions:
    """Flags of the text encoder service, resolved."""

    stage: StageOptions
    cache_bytes: int
    """Most bytes of embeddings kept for repeated prompts; 0 keeps none."""
