"""Steps recorded once as CUDA graphs and replayed, so that the device never waits for launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.fusion.model.fusion import BlockLoop, Branch, TextCache, run_all
from services.fusion.model.operations import TextKV
from services.fusion.sampling.denoise import Forward, Latents

Kind = tuple[bool, tuple[tuple[int, int], ...]]
"""What the kernels of a call depend on besides the latents' shape: a clean first frame; each branch's skipped block
and bound of its text."""


@dataclass
class _Recording:
    """A recorded call with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: Latents
    timestep: torch.Tensor
    texts: list[TextCache]
    sources: list[TextCache]
    """What `texts` were last copied from."""
    out: list[Latents]


class GraphedForward:
    """A Forward of one shape; each kind of call runs once as it is, is recorded the second time, then replayed.

    The first run chooses and compiles kernels, which cannot be recorded. Recordings share one pool of memory: they
    never run at the same time. A block loop other than the plain one decides on the host which blocks it runs; its
    calls are never recorded.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recordings: dict[Kind, _Recording | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        latents: Latents,
        timestep: torch.Tensor,
        branches: Sequence[Branch],
        *,
        clean_first_frame: bool,
        run_blocks: BlockLoop = run_all,
    ) -> list[Latents]:
        """See Forward."""
        if run_blocks is not run_all:
            given = (latents, timestep, branches)
            return self._forward(*given, clean_first_frame=clean_first_frame, run_blocks=run_blocks)
        kind = (clean_first_frame, tuple((branch.skip_layer, branch.text.video[0].bound) for branch in branches))
        if kind not in self._recordings:
            self._recordings[kind] = None
            return self._forward(latents, timestep, branches, clean_first_frame=clean_first_frame)
        recording = self._recordings[kind]
        if recording is None:
            recording = self._record(latents, timestep, branches, clean_first_frame)
            self._recordings[kind] = recording
        recording.latents.video_CFHW.copy_(latents.video_CFHW)
        recording.latents.audio_SC.copy_(latents.audio_SC)
        recording.timestep.copy_(timestep)
        for index, branch in enumerate(branches):
            if recording.sources[index] is not branch.text:
                _copy(recording.texts[index], branch.text)
                recording.sources[index] = branch.text
        recording.graph.replay()
        return [Latents(out.video_CFHW.clone(), out.audio_SC.clone()) for out in recording.out]

    def _record(
        self, latents: Latents, timestep: torch.Tensor, branches: Sequence[Branch], clean_first_frame: bool
    ) -> _Recording:
        own = Latents(latents.video_CFHW.clone(), latents.audio_SC.clone())
        own_timestep, sources = timestep.clone(), [branch.text for branch in branches]
        texts = [_clone(text) for text in sources]
        own_branches = [branch._replace(text=text) for branch, text in zip(branches, texts, strict=True)]
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (NCCL's watchdog) may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._forward(own, own_timestep, own_branches, clean_first_frame=clean_first_frame)
        return _Recording(graph, own, own_timestep, texts, sources, out)


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
