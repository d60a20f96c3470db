"""A job's denoise, from its first attempt to its result: checkpoints are kept beside it, and it can be set aside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import torch

from ovi.fusion.v1 import fusion_pb2
from services.gateway.artifacts import Artifacts
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.objects import ArtifactsAway
from services.gateway.patience import Patience
from services.gateway.stages import FusionClient
from services.gateway.writing import write_unbroken
from shared.errors import CorruptTensor, OviError, Unavailable
from shared.logging import get_logger
from shared.system_proto import vram_mode_from_proto
from shared.tensors.service import TensorServer
from shared.tensors.transport import TensorResolver

log = get_logger(__name__)

_MAX_CHECKPOINT_BYTES = 256 << 20
"""Far above the largest: four tensors of 48 x 61 x 60 x 60 float32 are 169 MB."""
_STOP_WAIT_S = 60.0
"""How long a paused denoise waits to be stopped."""

BeginAgain = Callable[[str, int], Awaitable[None]]
"""A new attempt: why, and how many steps it does not make again. Only then may progress go back."""


class Denoising:
    """One job's denoise in this gateway."""

    def __init__(
        self,
        job_id: str,
        request: fusion_pb2.DenoiseRequest,
        artifacts: Artifacts,
        resolver: TensorResolver,
        tensors: TensorServer,
        tracker: JobTracker,
        metrics: GatewayMetrics,
        begin_again: BeginAgain,
        kept: int,
    ) -> None:
        """
        Args:
            job_id: of the job.
            request: without a checkpoint.
            artifacts: where checkpoints are kept.
            resolver: fetches them from the worker.
            tensors: offers the kept one to the next worker.
            tracker: is told of every step.
            metrics: count steps.
            begin_again: called before progress goes back.
            kept: steps of the kept checkpoint, 0 if there is none.
        """
        self._job_id = job_id
        self._request = request
        self._artifacts = artifacts
        self._resolver = resolver
        self._tensors = tensors
        self._tracker = tracker
        self._metrics = metrics
        self._begin_again = begin_again
        self.kept = kept
        """Steps of the kept checkpoint."""
        self._replaces_any = False
        """Whether what is kept is of no use, however many steps it has."""
        self._furthest = 0
        """Most steps that any attempt has finished."""
        self._worker: FusionClient | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._on_device = False
        self._offered = ""
        """Id of the lease of the checkpoint in the present request."""
        self._setting_aside: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        """Set while no attempt goes on that could still be set aside."""

    async def attempt(self, worker: FusionClient, patience: Patience) -> tuple[fusion_pb2.Result, int]:
        """One call of a worker: the result, and how many steps were reused.

        Raises:
            OviError: by the table.
        """
        self._worker = worker
        self._on_device = False
        self._stopped.clear()
        request = fusion_pb2.DenoiseRequest()
        request.CopyFrom(self._request)
        self._offered = await self._offer(request)
        try:
            return await self._follow(worker, request, patience)
        except OviError:
            await self._kept_what_came()  # of a worker that was lost as well as of one that is out of reach
            raise
        finally:
            self._tensors.store.release(self._offered)
            self._worker = None
            self._stopped.set()
            if self._keeping is not None:
                self._keeping.cancel()
                await asyncio.wait({self._keeping})

    @property
    def on_device(self) -> bool:
        """Whether a worker has turned to it."""
        return self._on_device and self._worker is not None

    async def set_aside(self, timeout_s: float) -> None:
        """Let the worker stop after its present step, and keep where it is.

        Returns when that is kept, when the denoise has ended, or when it cannot be done; the caller then stops the job.
        """
        if self._setting_aside is None or self._setting_aside.done():
            self._setting_aside = asyncio.create_task(self._set_aside(timeout_s))
        await asyncio.shield(self._setting_aside)

    async def _set_aside(self, timeout_s: float) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            if await worker.pause_run(self._job_id):
                await asyncio.wait_for(self._stopped.wait(), timeout_s)
        except (OviError, TimeoutError) as error:
            log.warning("the denoise is cut without a new checkpoint", job_id=self._job_id, reason=str(error))

    async def _offer(self, request: fusion_pb2.DenoiseRequest) -> str:
        """Put the kept checkpoint into a request, if there is one; the id of its lease."""
        file = await asyncio.to_thread(self._artifacts.read_checkpoint, self._job_id)
        if file is None:
            return ""
        lease = self._tensors.store.put(file)
        request.checkpoint.CopyFrom(self._tensors.publish(lease))
        return lease.tensor_id

    async def _follow(
        self, worker: FusionClient, request: fusion_pb2.DenoiseRequest, patience: Patience
    ) -> tuple[fusion_pb2.Result, int]:
        steps_reused = 0
        async with contextlib.aclosing(worker.denoise(request, job_id=self._job_id)) as events:
            async for event in events:
                patience.alive()
                kind = event.WhichOneof("event")
                if kind == "result":
                    return event.result, steps_reused
                if kind == "begun":
                    steps_reused = event.begun.steps_reused
                    await self._begun(event.begun)
                elif kind == "step":
                    steps_reused += event.step.reused
                    self._metrics.steps_repeated(event.step.index <= self._furthest)
                    self._furthest = max(self._furthest, event.step.index)
                    self._metrics.step_finished(event.step.seconds)
                    await self._tracker.advance(self._job_id, event.step.index, event.step.total)
                elif kind == "mode_lowered":
                    steps_reused = 0
                    await self._lowered(event.mode_lowered)
                elif kind == "checkpoint":
                    self._keeping = asyncio.create_task(self._keep(event.checkpoint, self._keeping))
                elif kind == "paused":
                    await self._paused()
        raise CorruptTensor("the fusion service ended the stream without a result")

    async def _begun(self, begun: fusion_pb2.Begun) -> None:
        self._on_device = True
        self._tensors.store.release(self._offered)
        if begun.checkpoint_refused:
            log.warning("the kept checkpoint is of no use", job_id=self._job_id, reason=begun.checkpoint_refused)
            await self._forget()
        elif begun.steps_done:
            log.info("the denoise goes on", job_id=self._job_id, steps_done=begun.steps_done)
        if (await self._tracker.get(self._job_id)).progress.done > begun.steps_done:
            await self._begin_again(begun.checkpoint_refused or "the denoise was cut", begun.steps_done)
        self._furthest = max(self._furthest, begun.steps_done)
        await self._tracker.advance(self._job_id, begun.steps_done, self._request.options.num_inference_steps)

    async def _lowered(self, lowered: fusion_pb2.ModeLowered) -> None:
        mode = vram_mode_from_proto(lowered.vram_mode, field="mode_lowered.vram_mode")
        log.warning("memory ran out; the denoise begins again", vram_mode=mode.value, reason=lowered.reason)
        self._metrics.mode_was_lowered()
        # What is kept is of the mode before.
        await self._kept_what_came()
        await self._forget()
        await self._begin_again(lowered.reason, 0)

    async def _paused(self) -> None:
        """Keep what came last, and wait for the end that `set_aside` has announced."""
        await self._kept_what_came()
        self._stopped.set()
        if self._setting_aside is not None:
            await asyncio.sleep(_STOP_WAIT_S)
        raise Unavailable("the fusion service paused this run, and it was not stopped here")

    async def _forget(self) -> None:
        """Delete the kept checkpoint. Where the store is away the next one takes its place, or it is refused again."""
        self._replaces_any = True
        try:
            await asyncio.to_thread(self._artifacts.delete_checkpoint, self._job_id)
        except ArtifactsAway as error:
            log.warning("a checkpoint was left", job_id=self._job_id, reason=error.message)
        self.kept = 0

    async def _kept_what_came(self) -> None:
        if self._keeping is not None:
            await asyncio.wait({self._keeping})

    async def _keep(self, checkpoint: fusion_pb2.Checkpoint, earlier: asyncio.Task[None] | None) -> None:
        """Fetch a checkpoint, keep it, and only then give it back: until then the worker goes no further.

        One that cannot be kept is given back, too. That of a job that another gateway has taken meanwhile is not: the
        call is about to be stopped.
        """
        if earlier is not None:
            await asyncio.wait({earlier})
        state = checkpoint.state
        try:
            fetch = self._resolver.fetch
            file = await asyncio.to_thread(fetch, state, field="checkpoint.state", max_bytes=_MAX_CHECKPOINT_BYTES)
            await write_unbroken(self._write, file, checkpoint.steps_done)
            self.kept = checkpoint.steps_done
        except (OviError, OSError) as error:
            log.warning("a checkpoint was not kept", job_id=self._job_id, reason=str(error))
        try:
            if await self._tracker.is_ours(self._job_id):
                await asyncio.to_thread(self._resolver.release, state)
        except OviError as error:
            log.warning("a checkpoint was not given back", job_id=self._job_id, reason=error.message)

    def _write(self, file: torch.Tensor, steps_done: int) -> None:
        # If there is more, this gateway was held to be gone, and its job's next owner has come further.
        if self._replaces_any or self._artifacts.checkpoint_steps(self._job_id) < steps_done:
            self._artifacts.write_checkpoint(self._job_id, file)
            self._replaces_any = False
