"""A picture cut into stripes of rows, one a rank: convolutions see across the cuts, so that the result is the same.

Shapes as in `model.video_layers`. Every rank makes the same calls in the same order, on the default process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from services.vae.model.video_layers import PIXEL_CHANNELS
from services.vae.model.video_vae import VideoVae


def stripe_heights(num_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Rows of each rank from the top, equal up to one; ranks beyond the number of rows have none.

    Rank 0 has the fewest: it also writes the clip.
    """
    active = min(num_rows, num_ranks)
    height, num_higher = divmod(num_rows, active)
    heights = [height + (rank >= active - num_higher) for rank in range(active)]
    return (*heights, *[0] * (num_ranks - active))


def connect_ranks(device: torch.device) -> None:
    """Make the connections between all pairs of ranks, so that no decode waits for them."""
    mine = torch.zeros(1, device=device)
    theirs = torch.zeros(dist.get_world_size(), device=device)
    _exchange(dict.fromkeys(_others(), mine), {rank: theirs[rank : rank + 1] for rank in _others()})


class RankStripe:
    """This rank's rows of a picture; see `video_layers.Stripe`."""

    def __init__(self, heights: Sequence[int]) -> None:
        """
        Args:
            heights: rows of each rank, from `stripe_heights`.
        """
        self._heights = [height for height in heights if height]
        self._rank = dist.get_rank()

    def fill_halo(self, x_NHWC: torch.Tensor) -> None:
        """See `video_layers.Stripe`."""
        edges = {self._rank - 1: (1, 0), self._rank + 1: (-2, -1)}
        sent, received = {}, {}
        for rank, (own, spare) in edges.items():
            if 0 <= rank < len(self._heights):
                sent[rank] = x_NHWC[:, own].contiguous()
                received[rank] = torch.empty_like(sent[rank])
            else:
                x_NHWC[:, spare] = 0
        _exchange(sent, received)
        for rank, row_NWC in received.items():
            x_NHWC[:, edges[rank][1]] = row_NWC

    def gather_rows(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """See `video_layers.Stripe`."""
        others = [rank for rank in range(len(self._heights)) if rank != self._rank]
        parts = self._buffers(x_NHWC)
        _exchange(dict.fromkeys(others, x_NHWC), {rank: parts[rank] for rank in others})
        return torch.cat(parts, dim=1)

    def collect(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """On rank 0 the rows of all stripes, from the top; on the others `x_NHWC`."""
        if self._rank > 0:
            _exchange({0: x_NHWC}, {})
            return x_NHWC
        parts = self._buffers(x_NHWC)
        _exchange({}, {rank: part for rank, part in enumerate(parts) if rank > 0})
        return torch.cat(parts, dim=1)

    def _buffers(self, x_NHWC: torch.Tensor) -> list[torch.Tensor]:
        """Room for every stripe's part of what `x_NHWC` is of this one, and that itself."""
        frames, rows, width, channels = x_NHWC.shape
        scale = rows // self._heights[self._rank]
        return [
            x_NHWC if rank == self._rank else x_NHWC.new_empty(frames, height * scale, width, channels)
            for rank, height in enumerate(self._heights)
        ]


def decode_striped(
    vae: VideoVae, latent_CFHW: torch.Tensor, latent_frames_per_step: int | None = None
) -> Iterator[torch.Tensor]:
    """Levels 0 to 255 of a whole latent that all ranks have, step by step: on rank 0 (f, 16H, 16W, 3).

    The other ranks get their own rows, those without any an empty tensor, as often as rank 0 gets pictures.

    Args:
        vae: on this rank's device.
        latent_CFHW: normalised.
        latent_frames_per_step: if not that of the operations.
    """
    heights = stripe_heights(latent_CFHW.shape[2], dist.get_world_size())
    rank = dist.get_rank()
    if not heights[rank]:
        per_step = latent_frames_per_step or vae.decoder.ops.latent_frames_per_step
        for _ in range(1 + -(-(latent_CFHW.shape[1] - 1) // per_step)):
            yield torch.empty(0, 0, 0, PIXEL_CHANNELS, dtype=torch.uint8)
        return
    stripe = RankStripe(heights)
    rows_CFHW = latent_CFHW.split([*heights], dim=2)[rank]
    for levels_FHWC in vae.decode(rows_CFHW, torch.uint8, stripe, latent_frames_per_step=latent_frames_per_step):
        yield stripe.collect(levels_FHWC)


def _others() -> list[int]:
    return [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]


def _exchange(sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor]) -> None:
    """Send to and fill from other ranks, by rank, as one operation of the device; the host does not wait on CUDA."""
    operations = [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in sent.items()]
    operations += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in received.items()]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
