"""Triton kernels of the video decoder: one pass over memory between two convolutions.

A pass takes what the convolution before left (`video_layers.Raw`), adds bias and shortcut, norms over channels, applies
SiLU and writes what the convolution after wants, with everything between in float32 on the chip.

To make two frames from four, d0 to d3, a convolution over three frames needs four products instead of six (Winograd's
F(2, 3), arXiv 1509.09308, in time only): those of d0 - d2, d1 + d2, d2 - d1 and d1 - d3 with g0, (g0 + g1 + g2)/2,
(g0 - g1 + g2)/2 and g2. The frames are then m0 + m1 + m2 and m1 - m2 - m3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.vae.model.video_layers import MIN_NORM, PIXEL_CHANNELS, TAPS, Form, Shortcut

_TILE = 1024
"""Elements that a program handles at a time: eight a thread, so that memory is touched 16 bytes at a time."""
_WIDE_CHANNELS = 512
"""From here on one pixel at a time measured better."""
_PIXELS_TILE = 128


@triton.jit  # type: ignore[untyped-decorator]
def _norm_silu(value, gamma, channels: tl.constexpr, min_norm: tl.constexpr):  # type: ignore[no-untyped-def]
    length = tl.sqrt(tl.sum(value * value, axis=1))
    normed = value * ((channels**0.5) / tl.maximum(length, min_norm))[:, None] * gamma
    return normed * tl.sigmoid(normed)


@triton.jit  # type: ignore[untyped-decorator]
def _repeated(  # type: ignore[no-untyped-def]
    cell_ptr,
    taken,
    in_picture,
    channels: tl.constexpr,
    spread: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """Of each output channel's `spread` neighbouring input channels the one `taken`; all are loaded in whole words."""
    beside = tl.arange(0, tile_channels * spread)
    mask = in_picture[:, None] & (beside < channels * spread)[None, :]
    inputs = tl.load(cell_ptr[:, None] + beside[None, :], mask=mask, other=0.0).to(tl.float32)
    if spread > 1:
        choices = tl.reshape(inputs, (tile_pixels, tile_channels, spread))
        mine = tl.arange(0, spread)[None, None, :] == taken[:, None, None]
        inputs = tl.sum(tl.where(mine, choices, 0.0), axis=2)
    return inputs


@triton.jit  # type: ignore[untyped-decorator]
def _join_kernel(  # type: ignore[no-untyped-def]
    part0_ptr,
    part1_ptr,
    part2_ptr,
    part3_ptr,
    bias_ptr,
    shortcut_ptr,
    gamma_ptr,
    sum_ptr,
    fed_ptr,
    past_ptr,
    num_pixels,
    width,
    sum_stride,
    fed_stride,
    part_stride,
    past_stride,
    frames: tl.constexpr,
    channels: tl.constexpr,
    form: tl.constexpr,
    shortcut_kind: tl.constexpr,
    time_factor: tl.constexpr,
    skipped_frames: tl.constexpr,
    spread: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    keep_sum: tl.constexpr,
    feed: tl.constexpr,
    min_norm: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """A tile of pixels, all channels, frame after frame."""
    pixel = tl.program_id(0).to(tl.int64) * tile_pixels + tl.arange(0, tile_pixels)
    channel = tl.arange(0, tile_channels)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    at = pixel[:, None] * channels + channel[None, :]
    # Running offsets are 64-bit as `pixel` is; a product of sizes might not fit 32.
    frame_at, pair_at, sum_at, fed_at = at, at, at, at
    frame_size = num_pixels * channels
    row, column = pixel // width, pixel % width
    below, right = row % 2, column % 2
    half_width = width // 2
    half_pixels = num_pixels // 4
    if has_bias:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if has_norm:
        gamma = tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if feed == 2:
        before2 = tl.load(past_ptr + at, mask=mask, other=0.0).to(tl.float32)
        before1 = tl.load(past_ptr + past_stride + at, mask=mask, other=0.0).to(tl.float32)
    for frame in tl.static_range(frames):
        if form == 0:
            value = tl.load(part0_ptr + frame_at, mask=mask, other=0.0).to(tl.float32)
        elif form == 1:
            if frame % 2 == 0:
                part0 = tl.load(part0_ptr + pair_at, mask=mask, other=0.0).to(tl.float32)
                part1 = tl.load(part1_ptr + pair_at, mask=mask, other=0.0).to(tl.float32)
                part2 = tl.load(part2_ptr + pair_at, mask=mask, other=0.0).to(tl.float32)
                part3 = tl.load(part3_ptr + pair_at, mask=mask, other=0.0).to(tl.float32)
                pair_at += frame_size
                value = part0 + part1 + part2
                odd_value = part1 - part2 - part3
            else:
                value = odd_value
        else:
            cell = frame * (half_pixels + half_width + num_pixels // width // 2 + 1)
            cell += (row // 2 + below) * (half_width + 1) + column // 2 + right
            phase = cell * (4 * channels) + (2 * below + right) * channels
            value = tl.load(part0_ptr + phase[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if has_bias:
            value += bias
        if shortcut_kind == 1:
            value += tl.load(shortcut_ptr + frame_at, mask=mask, other=0.0).to(tl.float32)
        if shortcut_kind == 2:
            copied = (frame + skipped_frames) // time_factor
            inside = ((frame + skipped_frames) % time_factor) * 4 + 2 * below + right
            cell = copied * half_pixels + (row // 2) * half_width + column // 2
            value += _repeated(
                shortcut_ptr + cell * (channels * spread),
                inside * spread // (4 * time_factor),
                pixel < num_pixels,
                channels,
                spread,
                tile_pixels,
                tile_channels,
            )
        if keep_sum:
            tl.store(sum_ptr + sum_at, value.to(sum_ptr.dtype.element_ty), mask=mask)
            sum_at += sum_stride
        frame_at += frame_size
        if feed != 0:
            if has_norm:
                value = _norm_silu(value, gamma, channels, min_norm)
            if feed == 1:
                tl.store(fed_ptr + fed_at, value.to(fed_ptr.dtype.element_ty), mask=mask)
                fed_at += fed_stride
            elif frame % 2 == 0:
                even_value = value
            else:
                dtype = fed_ptr.dtype.element_ty
                part_at = fed_at
                tl.store(fed_ptr + part_at, (before2 - even_value).to(dtype), mask=mask)
                part_at += part_stride
                tl.store(fed_ptr + part_at, (before1 + even_value).to(dtype), mask=mask)
                part_at += part_stride
                tl.store(fed_ptr + part_at, (even_value - before1).to(dtype), mask=mask)
                part_at += part_stride
                tl.store(fed_ptr + part_at, (before1 - value).to(dtype), mask=mask)
                fed_at += fed_stride
                before2 = even_value
                before1 = value
    if feed == 2:
        tl.store(past_ptr + at, before2.to(past_ptr.dtype.element_ty), mask=mask)
        tl.store(past_ptr + past_stride + at, before1.to(past_ptr.dtype.element_ty), mask=mask)


def join(
    parts: tuple[torch.Tensor, ...],
    form: Form,
    bias_C: torch.Tensor | None,
    shortcut: Shortcut | None,
    gamma_C: torch.Tensor | None,
    sum_FHWC: torch.Tensor | None,
    fed: torch.Tensor | None,
    past_2HWC: torch.Tensor | None,
    shape: tuple[int, int, int, int],
) -> None:
    """Add up, write the sum, norm, SiLU, and write what the next convolution takes.

    Args:
        parts: see `Form`; contiguous.
        form: of the parts.
        bias_C: added, if there is one.
        shortcut: added, if there is one; contiguous, with a power of two times as many channels.
        gamma_C: gain of the norm; None: neither norm nor SiLU.
        sum_FHWC: written with the sum, if given.
        fed: written with the activation, if given: (F, H, W, C), or with `past_2HWC` the four combinations
            (4, F/2, H, W, C). Rows are contiguous, frames may be apart.
        past_2HWC: activation of the two frames before; the last two are left in it.
        shape: F, H, W, C of the sum.
    """
    frames, height, width, channels = shape
    assert all(part.is_contiguous() for part in parts)
    assert shortcut is None or shortcut.x_FHWC.is_contiguous()
    first = parts[0]
    kind = 0 if shortcut is None else 1 if shortcut.space_factor == 1 else 2
    tile_channels = triton.next_power_of_2(channels)
    tile_pixels = 1 if tile_channels >= _WIDE_CHANNELS else _TILE // tile_channels
    combined = past_2HWC is not None
    _join_kernel[(triton.cdiv(height * width, tile_pixels),)](
        *parts,
        *(first,) * (4 - len(parts)),
        first if bias_C is None else bias_C,
        first if shortcut is None else shortcut.x_FHWC,
        first if gamma_C is None else gamma_C,
        first if sum_FHWC is None else sum_FHWC,
        first if fed is None else fed,
        first if past_2HWC is None else past_2HWC,
        height * width,
        width,
        0 if sum_FHWC is None else sum_FHWC.stride(0),
        0 if fed is None else fed.stride(1 if combined else 0),
        0 if fed is None else fed.stride(0),
        0 if past_2HWC is None else past_2HWC.stride(0),
        frames,
        channels,
        form.value,
        kind,
        1 if shortcut is None else shortcut.time_factor,
        0 if shortcut is None else shortcut.skipped_frames,
        1 if shortcut is None else shortcut.x_FHWC.shape[-1] // channels,
        bias_C is not None,
        gamma_C is not None,
        sum_FHWC is not None,
        0 if fed is None else 1 + combined,
        MIN_NORM,
        tile_pixels,
        tile_channels,
        num_warps=4,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _pixels_kernel(  # type: ignore[no-untyped-def]
    taps_ptr,
    before_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    frames,
    before_frames,
    patches: tl.constexpr,
    side: tl.constexpr,
    colours: tl.constexpr,
    time_taps: tl.constexpr,
    halo: tl.constexpr,
    as_levels: tl.constexpr,
    tile_patches: tl.constexpr,
    tile_pixels: tl.constexpr,
):
    """A tile of patches of one frame: the sum of every tap's product where that tap looks."""
    frame = tl.program_id(1)
    pixel = tl.program_id(0) * tile_pixels + tl.arange(0, tile_pixels)
    patch = tl.arange(0, tile_patches)
    row, column = pixel // width, pixel % width
    in_patch = patch < patches
    in_picture = pixel < height * width
    frame_size = (height + 2 * halo) * width
    value = tl.zeros((tile_patches, tile_pixels), tl.float32)
    value += tl.load(bias_ptr + patch, mask=in_patch, other=0.0).to(tl.float32)[:, None]
    for tap in tl.static_range(time_taps * time_taps * time_taps):
        seen_frame = frame + tl.zeros_like(row) + (tap // (time_taps * time_taps) - (time_taps - 1))
        seen_before = before_frames + seen_frame
        seen_row = row + ((tap // time_taps) % time_taps - 1)
        seen_column = column + (tap % time_taps - 1)
        seen = in_picture & (seen_column >= 0) & (seen_column < width)
        seen = seen & (seen_row >= -halo) & (seen_row < height + halo)
        at = (seen_row + halo) * width + seen_column
        plane = (tap * patches + patch).to(tl.int64)[:, None]
        now = (plane * frames + seen_frame[None, :]) * frame_size + at[None, :]
        now_mask = in_patch[:, None] & (seen & (seen_frame >= 0))[None, :]
        value += tl.load(taps_ptr + now, mask=now_mask, other=0.0).to(tl.float32)
        then = (plane * before_frames + seen_before[None, :]) * frame_size + at[None, :]
        then_mask = in_patch[:, None] & (seen & (seen_frame < 0) & (seen_before >= 0))[None, :]
        value += tl.load(before_ptr + then, mask=then_mask, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(value, -1.0), 1.0)
    if as_levels:
        value = tl.floor((value + 1.0) * 127.5 + 0.5)
    # Channels of a patch: colour, column, row.
    below, right, colour = patch % side, (patch // side) % side, patch // (side * side)
    out_row = (frame * height + row)[None, :] * side + below[:, None]
    out_column = column[None, :] * side + right[:, None]
    out = (out_row.to(tl.int64) * (width * side) + out_column) * colours + colour[:, None]
    tl.store(out_ptr + out, value.to(out_ptr.dtype.element_ty), mask=in_patch[:, None] & in_picture[None, :])


def pixels(
    taps_TFHW: torch.Tensor, before_TFHW: torch.Tensor | None, bias_O: torch.Tensor, halo: int, out_FHWC: torch.Tensor
) -> None:
    """Sum shifted products of the last convolution, unfold patches, clamp; levels if `out_FHWC` holds bytes.

    Args:
        taps_TFHW: (27 O, F, H + 2 halo, W): the product of each tap of the kernel (time, row, column) with every pixel;
            contiguous.
        before_TFHW: the same of the frames before; None at the beginning.
        bias_O: of each channel of a patch.
        halo: spare rows at both ends.
        out_FHWC: (F, sH, sW, 3), written; contiguous.
    """
    _, frames, rows, width = taps_TFHW.shape
    patches = len(bias_O)
    height = rows - 2 * halo
    _pixels_kernel[(triton.cdiv(height * width, _PIXELS_TILE), frames)](
        taps_TFHW,
        taps_TFHW if before_TFHW is None else before_TFHW,
        bias_O,
        out_FHWC,
        height,
        width,
        frames,
        0 if before_TFHW is None else before_TFHW.shape[1],
        patches,
        round((patches / PIXEL_CHANNELS) ** 0.5),
        PIXEL_CHANNELS,
        TAPS,
        halo,
        out_FHWC.dtype == torch.uint8,
        triton.next_power_of_2(patches),
        _PIXELS_TILE,
        num_warps=4,
    )
