"""What the stages take of a device, by component. Pure arithmetic, from counts of tensors that live at the same time.

T video tokens of a rank, D model width; a "tensor" is one (T, D) in the arithmetic's precision unless said otherwise.
Counts are read off services/fusion/model/block.py and parallel/sequence.py; together with the constants they were
compared with measured peaks on H200s, see tests/unit/test_memory_estimate.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shared.memory.modes import TextEncoderPlace, WeightFormat
from shared.memory.sizes import AUDIO_STEM_LAYERS, ClipTokens, FusionSizes, TextEncoderSizes, VaeSizes

RING_BLOCKS = 3
"""Device buffers that streamed blocks, or layers of the text encoder, pass through: one in use, two on their way."""
FUSION_CONTEXT_BYTES = 1024 << 20
VAE_CONTEXT_BYTES = 832 << 20
TEXT_ENCODER_CONTEXT_BYTES = 768 << 20
"""Of a process that uses a GPU: CUDA's context with the kernels that it has loaded, and what the driver keeps to reach
locked host memory. Measured, H200."""
WORKSPACE_BYTES = 72 << 20
"""cuBLAS's, of two streams; from the measured peaks."""
PICTURE_SIDE = 16
"""Pixels of a latent pixel's side."""

CONTEXT = "CUDA context"
ALLOCATOR_PART = 0.01
"""Of what stays: torch's allocator rounds."""
FUSION_FRAGMENTS_PART = 0.12
VAE_FRAGMENTS_PART = 0.20
"""Of what comes and goes: pieces that the allocator keeps and that fit nothing. With less it gives memory back and
takes it again all the time, for which the device has to stand still. Measured, H200, with segments that can grow."""

_SCALE_BYTES = 4
"""Of a quantized row's scale."""
_FP8_BYTES = 1
_FEED_FORWARD_TENSORS = 7
"""Beside the hidden values, as the second product ends: the block's input, its state after self-attention and both
norms of it, its state after cross attention, the normed input and the result."""
_ATTENTION_TENSORS = 7
"""Input, norm, q, k, v, and q and k normed and rotated: the most where the feed-forward is cut in pieces."""
_SPREAD_ATTENTION_TENSORS = 15
"""With the sequence over several ranks: input, norm, v as part of 3, q, k, 3 sent, 3 received, 1 made, 1 returned and 1
put together."""
_WHOLE_TENSORS = 1
"""Then each rank embeds all tokens, and keeps them through the first block."""
_SECOND_PASS_TENSORS = 1
"""Of the other pass, which goes through each block right before or after."""
_LATENT_COPIES = 5
"""Float32 latents at once: the step's, its predictions, what the solver remembers."""
_LATENT_VALUES = 192
"""Of a video token: 48 channels of 4 latent pixels."""
_ROPE_BYTES = 8
"""Of the rotation of two values of a head."""
_GATHERED_BLOCKS = 2
"""Of sharded weights, whole at a time: the one in use and the next one."""

TILE_REACH = 7
"""Latent pixels around a tile that its pictures depend on; they are decoded with it. See VideoDecoder.reach."""
_WHOLE_BYTES_PER_PIXEL = 250
"""Of the decoder, per pixel of the whole picture: past frames of the attention and the first level."""
_CARRIED_BYTES_PER_PIXEL = 3465
"""Of the decoder, per pixel of a picture or a tile: past frames of the other levels."""
_BYTES_PER_PIXEL_AND_LATENT_FRAME = 4700
"""The same and per latent frame of a step: before the last level's first convolution, four frames of 256 channels for
what the upsampler left (2), what goes around both levels (1 and 2) and what the convolution takes (4); a little more
for pixels."""
_DECODER_DIM = 256
_DECODER_ITEMSIZE = 2
"""Width and precision at which the three above were counted; tests/unit/test_vae_memory.py counts again."""
_SOUND_BYTES = 256 << 20
"""Activations of audio VAE and vocoder."""


@dataclass(frozen=True)
class Components:
    """Bytes of a device by what they are for. They are there at the same time."""

    by_name: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", MappingProxyType(dict(self.by_name)))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_name.values())

    @property
    def context(self) -> int:
        """What the process takes of the device before its allocator takes anything; 0 if it does not use one."""
        return self.by_name.get(CONTEXT, 0)

    @property
    def reserved(self) -> int:
        """What the process's allocator has of them: all but the context, which no limit of the allocator counts."""
        return self.total - self.context

    def without(self, *names: str) -> Components:
        """The others."""
        return Components({name: size for name, size in self.by_name.items() if name not in names})


@dataclass(frozen=True)
class FusionLayout:
    """Where the fusion model's weights are, and how its work is cut."""

    weights: WeightFormat
    num_resident: int
    """Fused blocks that stay on the device; the others pass through a ring."""
    token_chunk: int | None
    """Video tokens that go through a feed-forward at once; None: all."""
    keep_ends: bool
    """First and last block, which fp8 leaves in their precision, are among the resident ones."""

    def resident_blocks(self, num_layers: int) -> frozenset[int]:
        """Which blocks stay: spread evenly, so that copies of the others are spread over the step.

        Raises:
            ValueError: not that many blocks, or too few for both ends.
        """
        ends = {0, num_layers - 1} if self.keep_ends else set()
        if not len(ends) <= self.num_resident <= num_layers:
            raise ValueError(f"num_resident must be {len(ends)} to {num_layers}, got {self.num_resident}")
        others = [index for index in range(num_layers) if index not in ends]
        wanted = self.num_resident - len(ends)
        return frozenset(ends | {others[(2 * turn + 1) * len(others) // (2 * wanted)] for turn in range(wanted)})


@dataclass(frozen=True)
class VaeLayout:
    """How the video decoder's work is cut."""

    latent_frames_per_step: int
    tile_latent_side: int | None
    """Latent rows and columns of a tile; None: whole pictures."""


def block_bytes(sizes: FusionSizes, weights: WeightFormat, index: int) -> int:
    """Of one fused block of both towers."""
    in_fp8 = weights is WeightFormat.FP8 and 0 < index < sizes.num_layers - 1
    if in_fp8 or weights is WeightFormat.INT8:
        wide = sizes.wide_params_per_block + _SCALE_BYTES * sizes.wide_rows_per_block
    else:
        wide = sizes.wide_params_per_block * sizes.itemsize
    return wide + sizes.block_bytes_rest


def fusion_weight_bytes(sizes: FusionSizes, weights: WeightFormat) -> int:
    """Of the whole model."""
    return sum(block_bytes(sizes, weights, index) for index in range(sizes.num_layers)) + sizes.other_bytes


def estimate_fusion(
    sizes: FusionSizes,
    clip: ClipTokens,
    layout: FusionLayout,
    sequence_degree: int = 1,
    guidance_degree: int = 1,
    weights_degree: int = 1,
    *,
    hosted: bool = False,
) -> Components:
    """What a rank's process takes while it makes a step.

    Args:
        sizes: of the model.
        clip: what is made.
        layout: of weights and work.
        sequence_degree: ranks that share the video tokens.
        guidance_degree: 2: the passes are made by different ranks.
        weights_degree: ranks that share one copy of the weights; above 1 nothing may be streamed or quantized.
        hosted: the weights are in host memory, and those of prompts pass through the ring even if all blocks stay;
            so it is wherever blocks are streamed.

    Raises:
        ValueError: see FusionLayout.resident_blocks; or shared weights that are streamed or quantized.
    """
    prompt_bytes = 4 * sizes.num_layers * sizes.text_len * sizes.dim * sizes.itemsize
    own_passes = max(1, clip.passes // guidance_degree)
    streams = hosted or layout.num_resident < sizes.num_layers
    if weights_degree > 1:
        components = _shared_weights(sizes, layout, weights_degree, streams)
    else:
        components = _streamed_weights(sizes, layout) if streams else _whole_weights(sizes, layout)
    components["text keys and values"] = clip.passes * prompt_bytes
    if sequence_degree > 1 and weights_degree == 1 and not streams:
        components["recorded steps"] = own_passes * prompt_bytes
    components["activations"] = _activations(sizes, clip, layout, sequence_degree, own_passes)
    components["workspaces"] = WORKSPACE_BYTES
    return _with_context(components, FUSION_FRAGMENTS_PART, FUSION_CONTEXT_BYTES)


def _with_context(components: dict[str, int], fragments_part: float, context_bytes: int) -> Components:
    fragments = fragments_part * components["activations"]
    rounding = ALLOCATOR_PART * (sum(components.values()) - components["activations"])
    return Components({**components, "allocator": int(fragments + rounding), CONTEXT: context_bytes})


def _whole_weights(sizes: FusionSizes, layout: FusionLayout) -> dict[str, int]:
    return {"weights": fusion_weight_bytes(sizes, layout.weights)}


def _shared_weights(sizes: FusionSizes, layout: FusionLayout, weights_degree: int, streams: bool) -> dict[str, int]:
    if streams or layout.weights is not WeightFormat.NATIVE:
        raise ValueError("shared weights can be neither streamed nor quantized")
    share = -(-fusion_weight_bytes(sizes, layout.weights) // weights_degree)
    return {"weights": share, "gathered blocks": _GATHERED_BLOCKS * block_bytes(sizes, layout.weights, 0)}


def _streamed_weights(sizes: FusionSizes, layout: FusionLayout) -> dict[str, int]:
    """See services.fusion.memory: a block has a part for prompts, which passes through the ring apart from the rest;
    where not all blocks stay, the audio stem passes through it, too.
    """
    layers, resident = range(sizes.num_layers), layout.resident_blocks(sizes.num_layers)
    steps = [block_bytes(sizes, layout.weights, index) - sizes.text_bytes_per_block for index in layers]
    through = [size for index, size in enumerate(steps) if index not in resident]
    kept = sizes.other_bytes - sizes.text_bytes + sum(steps[index] for index in resident)
    if through:
        kept -= sizes.audio_stem_bytes
        through += [sizes.audio_stem_bytes // AUDIO_STEM_LAYERS] * AUDIO_STEM_LAYERS
    largest = max(sizes.text_bytes, sizes.text_bytes_per_block, *through)
    return {"weights": kept, "ring": min(RING_BLOCKS, 1 + sizes.num_layers + len(through)) * largest}


def _activations(
    sizes: FusionSizes, clip: ClipTokens, layout: FusionLayout, sequence_degree: int, own_passes: int
) -> int:
    row = sizes.dim * sizes.itemsize
    own = -(-clip.video // sequence_degree) + clip.audio
    whole = clip.video + clip.audio
    chunk = own if layout.token_chunk is None else min(layout.token_chunk, own)
    hidden = chunk * sizes.ffn_dim * sizes.itemsize
    if layout.weights is WeightFormat.FP8:
        hidden += chunk * sizes.ffn_dim * _FP8_BYTES
    if layout.weights is not WeightFormat.NATIVE:
        hidden = max(hidden, chunk * sizes.ffn_dim * sizes.itemsize + _widened(sizes, layout.weights))
    if chunk < own:
        hidden += chunk * row  # the result of a chunk, before it is put among the others
    inside = max(_FEED_FORWARD_TENSORS * own * row + hidden, _ATTENTION_TENSORS * own * row)
    if sequence_degree > 1:
        inside = max(inside, _SPREAD_ATTENTION_TENSORS * own * row + _WHOLE_TENSORS * whole * row)
    beside = _SECOND_PASS_TENSORS * (own_passes - 1) * own * row
    latents = whole * (_LATENT_COPIES * _LATENT_VALUES * 4 + sizes.dim // sizes.num_heads // 2 * _ROPE_BYTES)
    return inside + beside + latents


def _widened(sizes: FusionSizes, weights: WeightFormat) -> int:
    """The largest weight in the arithmetic's precision, where products need it so; for fp8 twice for a moment."""
    return sizes.ffn_dim * sizes.dim * sizes.itemsize * (2 if weights is WeightFormat.FP8 else 1)


def estimate_vae(
    sizes: VaeSizes, height: int, width: int, layout: VaeLayout, ranks: int = 1, *, hosted: bool = False
) -> Components:
    """What a rank's process takes while it decodes pictures of height x width pixels and their sound.

    Args:
        sizes: of the networks.
        height: of a picture, a multiple of 32.
        width: of a picture.
        layout: of the work.
        ranks: that share a picture in stripes of full latent rows.
        hosted: weights are on the device only where they are needed: first those of sound, then the decoder's.
    """
    rows, columns = -(-(height // PICTURE_SIDE) // ranks), width // PICTURE_SIDE
    whole = rows * columns * PICTURE_SIDE**2
    if layout.tile_latent_side is not None:
        rows, columns = (_tile_side(side, layout.tile_latent_side) for side in (rows, columns))
    pixels = rows * columns * PICTURE_SIDE**2
    per_pixel = _CARRIED_BYTES_PER_PIXEL + _BYTES_PER_PIXEL_AND_LATENT_FRAME * layout.latent_frames_per_step
    wider = sizes.decoder_dim * sizes.itemsize / (_DECODER_DIM * _DECODER_ITEMSIZE)
    pictures = int((pixels * per_pixel + whole * _WHOLE_BYTES_PER_PIXEL) * wider)
    sound = sizes.sound_bytes + _SOUND_BYTES
    if hosted:
        weights, activations = sizes.decoder_bytes, max(pictures, sound - sizes.decoder_bytes)
    else:
        weights = sizes.decoder_bytes + sizes.encoder_bytes + sizes.sound_bytes
        activations = pictures + _SOUND_BYTES
    components = {"weights": weights, "activations": activations, "workspaces": WORKSPACE_BYTES}
    return _with_context(components, VAE_FRAGMENTS_PART, VAE_CONTEXT_BYTES)


def _tile_side(side: int, tile_side: int) -> int:
    """What is decoded of a picture's side for the largest of equal tiles of at most `tile_side`."""
    count = -(-side // tile_side)
    return min(side, -(-side // count) + min(count - 1, 2) * TILE_REACH)


def estimate_text_encoder(sizes: TextEncoderSizes, place: TextEncoderPlace) -> Components:
    """What the process takes of the device while it encodes a prompt of the greatest length; nothing on a CPU."""
    if place is TextEncoderPlace.CPU:
        return Components()
    # Scores and their softmax in float32 for every head; rows are small beside them.
    activations = 2 * 4 * sizes.num_heads * sizes.max_tokens**2 + 16 * 4 * sizes.max_tokens * sizes.dim
    components = {"activations": activations, "workspaces": WORKSPACE_BYTES}
    if place is TextEncoderPlace.RESIDENT:
        components["weights"] = sizes.total_bytes
    else:
        ring = min(RING_BLOCKS, sizes.num_layers) * sizes.layer_bytes
        components |= {"ring": ring, "weights": sizes.other_bytes}
    return _with_context(components, FUSION_FRAGMENTS_PART, TEXT_ENCODER_CONTEXT_BYTES)
