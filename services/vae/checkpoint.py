"""VAE and vocoder weight files: what they must hold, their key maps, and how they get onto the device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.vae.model.audio_vae import RELEASED_AUDIO_VAE, AudioVae, AudioVaeConfig, normalised_weight
from services.vae.model.video_decoder import VideoDecoder
from services.vae.model.video_layers import Ops, ReferenceOps
from services.vae.model.video_vae import (
    LATENT_MEAN,
    LATENT_STD,
    RELEASED_VIDEO_VAE,
    VideoVae,
    VideoVaeConfig,
    wan_network,
)
from services.vae.model.vocoder import RELEASED_VOCODER, Vocoder, VocoderConfig, anti_alias_filter
from shared.checkpoints import Layout, assign_weights, layout_of, read_pth, require_layout
from shared.errors import CheckpointError
from shared.shapes import AUDIO_LATENT_CHANNELS, AUDIO_SAMPLES_PER_LATENT, VIDEO_LATENT_CHANNELS, VideoLatentShape

__all__ = [
    "RELEASED_AUDIO_VAE",
    "RELEASED_VIDEO_VAE",
    "RELEASED_VOCODER",
    "AudioVaeConfig",
    "VideoVaeConfig",
    "VocoderConfig",
    "anti_alias_filter",
    "assemble_video_vae",
    "audio_vae_layout",
    "canonical_vocoder_layout",
    "infer_audio_config",
    "infer_video_config",
    "infer_vocoder_config",
    "load_audio_vae",
    "load_video_vae",
    "load_vocoder",
    "video_vae_layout",
    "vocoder_layout",
]

_VOCODER_PREFIX = "generator."
_GAIN = "parametrizations.weight.original0"
_DIRECTION = "parametrizations.weight.original1"


# --- Video VAE -------------------------------------------------------------------------------------------------------


def _released_video_key(key: str, config: VideoVaeConfig) -> str:
    """The released file's name of a parameter of diffusers' network."""
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
        (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.(\d+)\.", lambda match: f".middle.{2 * int(match[1])}."),
        (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
        (r"\.down_blocks\.(\d+)\.downsampler\.", rf".downsamples.\1.downsamples.{config.num_res_blocks}."),
        (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
        (r"\.up_blocks\.(\d+)\.upsampler\.", rf".upsamples.\1.upsamples.{config.num_res_blocks + 1}."),
        (r"\.norm1\.", ".residual.0."),
        (r"(samples\.\d+|middle\.\d+)\.conv1\.", r"\1.residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"(samples\.\d+|middle\.\d+)\.conv2\.", r"\1.residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def video_vae_layout(config: VideoVaeConfig) -> Layout:
    """Every key of a video VAE file of these widths, by its released name; float32.

    Raises:
        ValueError: widths that do not divide as the shortcuts need.
    """
    with torch.device("meta"):
        state = wan_network(config).state_dict()
    return {_released_video_key(key, config): (torch.float32, tuple(value.shape)) for key, value in state.items()}


def infer_video_config(found: Layout, path: Path) -> VideoVaeConfig:
    """The widths of a video VAE file.

    Raises:
        CheckpointError: it is none, or its strides or latent channels are not those of the model.
    """
    shape = _shapes(found, path)
    levels = _count(found, r"encoder\.downsamples\.(\d{1,4})\.")
    num_res_blocks = _count(found, r"encoder\.downsamples\.0\.downsamples\.(\d{1,4})\.residual\.")
    base_dim, in_channels = shape("encoder.conv1.weight")[:2]
    widths = [shape(f"encoder.downsamples.{i}.downsamples.0.residual.2.weight")[0] for i in range(levels)]
    config = VideoVaeConfig(
        base_dim=base_dim,
        decoder_base_dim=shape("decoder.head.0.gamma")[0],
        z_dim=shape("conv2.weight")[0],
        dim_mult=_multiples(widths, base_dim, path),
        num_res_blocks=num_res_blocks,
        temporal_downsample=tuple(
            f"encoder.downsamples.{i}.downsamples.{num_res_blocks}.time_conv.weight" in found for i in range(levels - 1)
        ),
        patch_size=math.isqrt(in_channels // 3),
    )
    one = VideoLatentShape(frames=2, height=1, width=1)
    expected = (one.pixel_height, one.num_frames - 1, VIDEO_LATENT_CHANNELS)
    if (config.spatial_stride, config.temporal_stride, config.z_dim) != expected:
        raise CheckpointError(
            f"{path}: strides {config.spatial_stride} (space) and {config.temporal_stride} (time) with {config.z_dim}"
            f" channels; must be {expected[0]}, {expected[1]} and {expected[2]}: is this the Wan2.2 VAE?"
        )
    return config


def load_video_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ops: Ops | None = None,
    latent_mean: Sequence[float] = LATENT_MEAN,
    latent_std: Sequence[float] = LATENT_STD,
) -> VideoVae:
    """The video VAE of a released .pth file.

    Args:
        path: `Wan2.2_VAE.pth`.
        device: where it shall run.
        dtype: of its arithmetic.
        ops: the decoder's operations; None: plain PyTorch.
        latent_mean: of each latent channel, if not the released.
        latent_std: of each latent channel, if not the released.

    Raises:
        CheckpointError: missing, damaged, or not this model; names the file.
    """
    tensors = read_pth(path)
    config = infer_video_config(layout_of(tensors), path)
    try:
        with torch.device("meta"):
            network = wan_network(config)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the widths {config} make no network ({error})") from None
    released = {key: _released_video_key(key, config) for key in network.state_dict()}
    expected = {released[key]: (torch.float32, tuple(value.shape)) for key, value in network.state_dict().items()}
    require_layout(path, layout_of(tensors), expected)
    assign_weights(network, {key: tensors[name] for key, name in released.items()})
    return assemble_video_vae(config, network, device, dtype, ops, latent_mean=latent_mean, latent_std=latent_std)


def assemble_video_vae(
    config: VideoVaeConfig,
    network: Any,
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops | None = None,
    *,
    latent_mean: Sequence[float] = LATENT_MEAN,
    latent_std: Sequence[float] = LATENT_STD,
) -> VideoVae:
    """The VAE of a network with float32 weights; see `load_video_vae`. The network is used up."""
    # From the float32 weights: the decoder adds some of them up before it rounds.
    decoder = VideoDecoder(network, ops or ReferenceOps(), device, dtype)
    for part in network.children():
        part.to(device, dtype)
    if device.type == "cuda":
        for part in (network.decoder, network.post_quant_conv):
            part.to("meta")
        for part in (network.encoder, network.quant_conv):
            for parameter in part.parameters():
                parameter.data = _channels_last(parameter.data)
    return VideoVae(config, network, decoder, latent_mean=latent_mean, latent_std=latent_std)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    """cuDNN's fast bfloat16 convolutions want channels innermost; activations follow the weights."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.contiguous(memory_format=formats.get(weight.dim(), torch.contiguous_format))


# --- Audio VAE -------------------------------------------------------------------------------------------------------


def audio_vae_layout(config: AudioVaeConfig) -> Layout:
    """Every key of an audio VAE file of these widths; float32."""
    return _module_layout(lambda: AudioVae(config))


def infer_audio_config(found: Layout, path: Path) -> AudioVaeConfig:
    """The widths of an audio VAE file.

    Raises:
        CheckpointError: it is none.
    """
    shape = _shapes(found, path)
    hidden_dim, mel_bins = shape("encoder.conv_in.weight")[:2]
    levels = _count(found, r"encoder\.down\.(\d{1,4})\.")
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    latent_dim = shape("decoder.conv_in.weight")[1]
    if latent_dim != AUDIO_LATENT_CHANNELS or levels < 2:
        raise CheckpointError(
            f"{path}: {latent_dim} latent channels and {levels} levels; must be {AUDIO_LATENT_CHANNELS} and 2 or more"
        )
    return AudioVaeConfig(
        hidden_dim=hidden_dim,
        channel_mult=_multiples(widths, hidden_dim, path),
        num_res_blocks=_count(found, r"encoder\.down\.0\.block\.(\d{1,4})\."),
        mel_bins=mel_bins,
        latent_dim=latent_dim,
    )


def load_audio_vae(path: Path, device: torch.device) -> AudioVae:
    """The audio VAE of a released .pth file, float32, its convolutions' weights normalised.

    Raises:
        CheckpointError: missing, damaged, or not this model; names the file.
    """
    tensors = read_pth(path)
    config = infer_audio_config(layout_of(tensors), path)
    require_layout(path, layout_of(tensors), audio_vae_layout(config))
    with torch.device("meta"):
        model = AudioVae(config)
    weights = {key: tensor.to(device, torch.float32) for key, tensor in tensors.items()}
    convolutions = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    assign_weights(model, {key: normalised_weight(w) if key in convolutions else w for key, w in weights.items()})
    return model


# --- Vocoder ---------------------------------------------------------------------------------------------------------


def vocoder_layout(config: VocoderConfig) -> Layout:
    """Every key of a vocoder file of these widths, weight norm as parametrizations; float32."""
    layout: Layout = {}
    for key, (dtype, shape) in _module_layout(lambda: Vocoder(config)).items():
        name = _VOCODER_PREFIX + key
        if not key.endswith(".weight"):
            layout[name] = (dtype, shape)
            continue
        layer = name.removesuffix("weight")
        layout[layer + _GAIN] = (dtype, (shape[0], 1, 1))
        layout[layer + _DIRECTION] = (dtype, shape)
    return layout


def infer_vocoder_config(found: Layout, path: Path) -> VocoderConfig:
    """The widths of a vocoder file whose keys are spelt as in `vocoder_layout`.

    Raises:
        CheckpointError: it is none, or its rate is not that of the model.
    """
    shape = _shapes(found, path)
    initial, mel_bins = shape(f"{_VOCODER_PREFIX}conv_pre.{_DIRECTION}")[:2]
    ups = _count(found, r"generator\.ups\.(\d{1,4})\.")
    blocks = _count(found, r"generator\.resblocks\.(\d{1,4})\.")
    config = VocoderConfig(
        mel_bins=mel_bins,
        initial_channels=initial,
        upsample_kernel_sizes=tuple(shape(f"{_VOCODER_PREFIX}ups.{i}.0.{_DIRECTION}")[2] for i in range(ups)),
        resblock_kernel_sizes=tuple(
            shape(f"{_VOCODER_PREFIX}resblocks.{i}.convs1.0.{_DIRECTION}")[2] for i in range(blocks // max(ups, 1))
        ),
    )
    expected = AUDIO_SAMPLES_PER_LATENT // 2
    if config.samples_per_frame != expected or not config.resblock_kernel_sizes:
        raise CheckpointError(f"{path}: makes {config.samples_per_frame} samples a mel frame; must make {expected}")
    return config


def load_vocoder(path: Path, device: torch.device) -> Vocoder:
    """The vocoder of a released .pt file, float32, weight norm folded.

    The keys may be flat (`generator.conv_pre.bias`) or nested one level; weight norm may be spelt
    `parametrizations.weight.original0/1` or `weight_g/weight_v`.

    Raises:
        CheckpointError: missing, damaged, or not this model; names the file.
    """
    tensors = {_canonical_vocoder_key(key): tensor for key, tensor in read_pth(path).items()}
    config = infer_vocoder_config(layout_of(tensors), path)
    require_layout(path, layout_of(tensors), vocoder_layout(config))
    with torch.device("meta"):
        model = Vocoder(config)
    tensors = {key: tensor.to(device, torch.float32) for key, tensor in tensors.items()}
    assign_weights(model, {key: _folded(tensors, _VOCODER_PREFIX + key) for key in model.state_dict()})
    return model


def canonical_vocoder_layout(found: Layout) -> Layout:
    """A vocoder file's layout with weight norm spelt as in `vocoder_layout`, whichever way the file spells it."""
    return {_canonical_vocoder_key(key): entry for key, entry in found.items()}


def _canonical_vocoder_key(key: str) -> str:
    for suffix, canonical in ((".weight_g", _GAIN), (".weight_v", _DIRECTION)):
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix)}.{canonical}"
    return key


def _folded(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """A tensor of the plain model: stored as it is, or gain * direction / ||direction|| per output row."""
    if key in tensors:
        return tensors[key]
    layer = key.removesuffix("weight")
    gain, direction = tensors[layer + _GAIN], tensors[layer + _DIRECTION]
    return gain * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1)


# --- Reading widths --------------------------------------------------------------------------------------------------


def _module_layout(make: Callable[[], nn.Module]) -> Layout:
    with torch.device("meta"):
        state = make().state_dict()
    return {key: (torch.float32, tuple(value.shape)) for key, value in state.items()}


def _shapes(found: Layout, path: Path) -> Callable[[str], tuple[int, ...]]:
    def shape(key: str) -> tuple[int, ...]:
        if key not in found:
            raise CheckpointError(f"{path}: does not fit the model: {key} is missing")
        sizes = found[key][1]
        if not sizes or min(sizes) < 1:
            raise CheckpointError(f"{path}: does not fit the model: {key} has shape {list(sizes)}")
        return (*sizes, 1, 1, 1)

    return shape


def _count(found: Layout, pattern: str) -> int:
    """1 more than the largest index that `pattern` captures at the beginning of a key; 0 if none does."""
    matches = (re.match(pattern, key) for key in found)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _multiples(widths: Sequence[int], base: int, path: Path) -> tuple[int, ...]:
    if any(width % base for width in widths):
        raise CheckpointError(f"{path}: does not fit the model: widths {list(widths)} are no multiples of {base}")
    return tuple(width // base for width in widths)
