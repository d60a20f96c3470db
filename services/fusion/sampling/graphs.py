"""Passes recorded once as CUDA graphs and replayed, so that the device never waits for launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.fusion.model.fusion import BlockLoop, TextCache, run_all
from services.fusion.model.operations import TextKV
from services.fusion.sampling.denoise import Forward, Latents


@dataclass
class _Recording:
    """A recorded pass with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: Latents
    timestep: torch.Tensor
    text: TextCache
    source: TextCache
    """What `text` was last copied from."""
    out: Latents


class GraphedForward:
    """A Forward of one shape; each kind of pass runs once as it is, is recorded the second time, then replayed.

    The first run chooses and compiles kernels, which cannot be recorded. Recordings share one pool of memory: they
    never run at the same time. A pass with a block loop of its own decides on the host which blocks it runs; it is
    never recorded.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recordings: dict[tuple[bool, int, int], _Recording | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        latents: Latents,
        timestep: torch.Tensor,
        text: TextCache,
        *,
        clean_first_frame: bool,
        skip_layer: int,
        run_blocks: BlockLoop = run_all,
    ) -> Latents:
        """See Forward."""
        if run_blocks is not run_all:
            return self._forward(
                latents,
                timestep,
                text,
                clean_first_frame=clean_first_frame,
                skip_layer=skip_layer,
                run_blocks=run_blocks,
            )
        kind = (clean_first_frame, skip_layer, text.video[0].bound)
        if kind not in self._recordings:
            self._recordings[kind] = None
            return self._forward(latents, timestep, text, clean_first_frame=clean_first_frame, skip_layer=skip_layer)
        recording = self._recordings[kind]
        if recording is None:
            recording = self._record(latents, timestep, text, clean_first_frame, skip_layer)
            self._recordings[kind] = recording
        recording.latents.video_CFHW.copy_(latents.video_CFHW)
        recording.latents.audio_SC.copy_(latents.audio_SC)
        recording.timestep.copy_(timestep)
        if recording.source is not text:
            _copy(recording.text, text)
            recording.source = text
        recording.graph.replay()
        return Latents(recording.out.video_CFHW.clone(), recording.out.audio_SC.clone())

    def _record(
        self, latents: Latents, timestep: torch.Tensor, text: TextCache, clean_first_frame: bool, skip_layer: int
    ) -> _Recording:
        own = Latents(latents.video_CFHW.clone(), latents.audio_SC.clone())
        own_timestep, own_text = timestep.clone(), _clone(text)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (NCCL's watchdog) may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._forward(own, own_timestep, own_text, clean_first_frame=clean_first_frame, skip_layer=skip_layer)
        return _Recording(graph, own, own_timestep, own_text, text, out)


def _clone(text: TextCache) -> TextCache:
    def own(kv: TextKV) -> TextKV:
        return TextKV(kv.k_LNK.clone(), kv.v_LNK.clone(), kv.num_rows.clone(), kv.bound)

    return TextCache(*(tuple(map(own, tower)) for tower in text))


def _copy(target: TextCache, source: TextCache) -> None:
    for target_tower, source_tower in zip(target, source, strict=True):
        for own, new in zip(target_tower, source_tower, strict=True):
            own.k_LNK.copy_(new.k_LNK)
            own.v_LNK.copy_(new.v_LNK)
            own.num_rows.copy_(new.num_rows)
