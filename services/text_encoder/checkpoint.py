"""Weights of the text encoder: the released key names, and their places in transformers' umT5 encoder.

Source: Wan2.2 (arXiv 2503.20314), umT5 (arXiv 2304.09151).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from services.text_encoder.config import TextEncoderConfig
from shared.checkpoints import Layout, assign_weights, layout_of, read_pth, require_layout
from shared.errors import CheckpointError

_MAX_DISTANCE = 128
_EPSILON = 1e-6

_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
}


def layout(config: TextEncoderConfig) -> Layout:
    """Every tensor of a weight file of these widths; bfloat16, as released."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (config.vocab_size, config.dim)}
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (config.dim,),
        "attn.q.weight": (config.dim_attn, config.dim),
        "attn.k.weight": (config.dim_attn, config.dim),
        "attn.v.weight": (config.dim_attn, config.dim),
        "attn.o.weight": (config.dim, config.dim_attn),
        "norm2.weight": (config.dim,),
        "ffn.gate.0.weight": (config.dim_ffn, config.dim),
        "ffn.fc1.weight": (config.dim_ffn, config.dim),
        "ffn.fc2.weight": (config.dim, config.dim_ffn),
        "pos_embedding.embedding.weight": (config.num_buckets, config.num_heads),
    }
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{key}": shape for key, shape in block.items()}
    shapes["norm.weight"] = (config.dim,)
    return {key: (torch.bfloat16, shape) for key, shape in shapes.items()}


def infer_config(path: Path, found: Layout) -> TextEncoderConfig:
    """The widths a file has, from the shapes of its first block.

    Raises:
        CheckpointError: keys or shapes are not those of a umT5 encoder; names the file and the differences.
    """

    def matrix(key: str) -> tuple[int, int]:
        if key not in found:
            raise CheckpointError(f"{path}: does not fit the model: {key} is missing; is this a umT5 encoder?")
        shape = found[key][1]
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{path}: does not fit the model: {key} has shape {list(shape)}, must be a matrix")
        return shape[0], shape[1]

    blocks = [int(match[1]) for key in found if (match := re.match(r"blocks\.(\d{1,4})\.", key))]
    vocab_size, dim = matrix("token_embedding.weight")
    num_buckets, num_heads = matrix("blocks.0.pos_embedding.embedding.weight")
    dim_attn, _ = matrix("blocks.0.attn.q.weight")
    dim_ffn, _ = matrix("blocks.0.ffn.fc1.weight")
    try:
        config = TextEncoderConfig(vocab_size, dim, dim_attn, dim_ffn, num_heads, max(blocks) + 1, num_buckets)
    except ValueError as error:
        raise CheckpointError(f"{path}: its widths contradict each other ({error})") from None
    require_layout(path, found, layout(config))
    return config


def to_transformers_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of `UMT5EncoderModel`; the token embedding has two names and one memory."""
    renamed = {
        "shared.weight": tensors["token_embedding.weight"],
        "encoder.embed_tokens.weight": tensors["token_embedding.weight"],
        "encoder.final_layer_norm.weight": tensors["norm.weight"],
    }
    for key, tensor in tensors.items():
        if key.startswith("blocks."):
            _, index, name = key.split(".", 2)
            renamed[f"encoder.block.{index}.{_BLOCK[name]}"] = tensor
    return renamed


def build_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """The network without memory (on the meta device), in evaluation mode."""
    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=_MAX_DISTANCE,
                layer_norm_epsilon=_EPSILON,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
    return model.eval()


def load_encoder(
    path: Path, *, device: torch.device, precision: torch.dtype
) -> tuple[UMT5EncoderModel, TextEncoderConfig]:
    """The network of a released or synthetic .pth file.

    All weights, feed-forward outputs included, take `precision`: the release runs wholly in bfloat16, and bfloat16 has
    float32's range, so transformers' habit of keeping `wo` in float32 (made for float16) is not followed. Layer norms
    and softmax keep float32 statistics. Where neither dtype nor device changes, tensors stay in the file's memory map;
    else they move one at a time.

    Args:
        path: of the file.
        device: where the network shall be.
        precision: float32 or bfloat16.

    Raises:
        CheckpointError: missing, damaged, holding more than tensors, or of another layout; names the file.
    """
    tensors = read_pth(path)
    config = infer_config(path, layout_of(tensors))
    moved = {key: tensor.to(device=device, dtype=precision) for key, tensor in tensors.items()}
    model = build_encoder(config)
    assign_weights(model, to_transformers_keys(moved))
    return model, config
