"""The stages of a job. Each may be cut anywhere and run again: what it leaves behind is either whole or not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict

from ovi.common.v1 import tensor_pb2
from ovi.fusion.v1 import fusion_pb2
from ovi.vae.v1 import vae_pb2
from services.gateway.artifacts import Artifacts, Latents
from services.gateway.config import PipelineOptions
from services.gateway.images import ImageStore
from services.gateway.jobs.domain import Job, JobStage, VideoInfo
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelCatalog
from services.gateway.patience import Patience
from services.gateway.replicas import Replicas, W
from services.gateway.stages import FusionClient, StageClients, VaeClient, WorkerCut
from shared.errors import CorruptTensor, OutOfMemory, OviError, ResourceExhausted, Unavailable
from shared.generation_proto import sampling_options_to_proto
from shared.logging import get_logger
from shared.memory.modes import VramMode
from shared.shapes import FPS
from shared.system_proto import vram_mode_from_proto, vram_mode_to_proto
from shared.tensors.service import TensorServer
from shared.tensors.transport import TensorResolver

P = ParamSpec("P")
T = TypeVar("T")

log = get_logger(__name__)

TensorRefJson = dict[str, Any]
"""A TensorRef as JSON, the form in which a stage's result is remembered."""

_MAX_LATENT_BYTES = 256 << 20
"""Far above the largest legal latents: 48 x 61 x 60 x 60 float32 are 42 MB."""
_STEPS_REUSED = "steps_reused"
_VRAM_MODE = "vram_mode"
"""Keys in the metadata of kept latents and in a clip's provenance."""
_MAX_CUTS = 3
"""How often a worker may die under one stage of a job before the job is blamed."""


@dataclass(frozen=True)
class JobWork:
    """Everything the stages need."""

    tracker: JobTracker
    clients: StageClients
    catalog: ModelCatalog
    artifacts: Artifacts
    images: ImageStore
    resolver: TensorResolver
    tensors: TensorServer
    metrics: GatewayMetrics
    options: PipelineOptions

    async def encode_prompt(self, job_id: str) -> list[TensorRefJson]:
        """Encode the prompt and both negative prompts; their references, in this order.

        Raises:
            OviError: the text encoder refused or stayed away.
        """
        async with self._stage(job_id, JobStage.ENCODE_PROMPT) as job:
            model_patience = self._patience(self.clients.fusion.name)
            model = await model_patience.until(lambda: self.catalog.get(job.parameters.model))
            negatives = (job.parameters.video_negative_prompt, job.parameters.audio_negative_prompt)
            client = self.clients.text_encoder
            refs = await self._patience(client.name).until(
                lambda: client.encode(job.parameters.prompt, negatives, model.prompt_format, job_id=job_id)
            )
            if len(refs) != 1 + len(negatives):
                raise CorruptTensor(f"the text encoder gave {len(refs)} embeddings for {1 + len(negatives)} texts")
            return [MessageToDict(ref) for ref in refs]

    async def encode_image(self, job_id: str) -> TensorRefJson:
        """Encode the first picture; its reference.

        Raises:
            OviError: the VAE refused or stayed away.
        """
        async with self._stage(job_id, JobStage.ENCODE_IMAGE) as job:
            wanted = job.parameters
            picture = await asyncio.to_thread(self.images.read, wanted.image_id)
            vae = self.clients.vae
            ref = await self._patience(vae.name).until(
                lambda: vae.on_one(
                    lambda worker: worker.encode_image(picture, wanted.height, wanted.width, job_id=job_id)
                )
            )
            return MessageToDict(ref)

    async def denoise(
        self, job_id: str, embeddings: Sequence[TensorRefJson], first_frame: TensorRefJson | None
    ) -> None:
        """Denoise, then keep both latents. Latents that are kept already are not made again.

        Raises:
            ReferenceLost: an input is gone; the stages that made the inputs must run again.
            OviError: fusion refused or stayed away, or died too often under this job.
        """
        if self.artifacts.has_latents(job_id):
            return
        job = await self.tracker.get(job_id)
        total = job.parameters.options.num_inference_steps
        async with self._stage(job_id, JobStage.DENOISE, total=total):
            refs = [ParseDict(ref, tensor_pb2.TensorRef()) for ref in embeddings]
            if first_frame is not None:
                refs.append(ParseDict(first_frame, tensor_pb2.TensorRef()))
            metadata = await self._latents_metadata(job)
            request = _denoise_request(job, refs)
            result, steps_reused = await self._patiently(
                job_id,
                JobStage.DENOISE,
                self.clients.fusion,
                lambda worker, patience: self._denoise_once(worker, request, job_id, patience),
            )
            outcome = [result.video_latent, result.audio_latent]
            video, audio = await asyncio.gather(*(self._fetch(ref) for ref in outcome))
            latents = Latents(video, audio)
            mode = vram_mode_from_proto(result.vram_mode, field="result.vram_mode")
            metadata |= {_STEPS_REUSED: str(steps_reused), _VRAM_MODE: mode.value}
            await _write(self.artifacts.write_latents, job_id, latents, metadata)
            await self._release([*refs, *outcome])

    async def decode(self, job_id: str) -> VideoInfo:
        """Decode the kept latents into the clip.

        Raises:
            OviError: the VAE refused or stayed away, or what came was not whole.
        """
        async with self._stage(job_id, JobStage.DECODE) as job:
            latents = await asyncio.to_thread(self.artifacts.read_latents, job_id)
            provenance = await self._provenance(job)
            video = await self._patiently(
                job_id,
                JobStage.DECODE,
                self.clients.vae,
                lambda worker, patience: self._decode_once(worker, job, latents, provenance, patience),
            )
            mode = VramMode(provenance[_VRAM_MODE])
            return replace(video, steps_reused=int(provenance[_STEPS_REUSED]), vram_mode=mode)

    async def _patiently(
        self, job_id: str, stage: JobStage, replicas: Replicas[W], attempt: Callable[[W, Patience], Awaitable[T]]
    ) -> T:
        """The result of a long call: begun again while its worker is away, a few times if the worker dies under it.

        Where a worker has too little memory, another one is tried once.
        """
        patience = self._patience(replicas.name)
        cuts = 0
        too_small: W | None = None
        while True:
            worker = replicas.choose(avoid=too_small)
            try:
                with replicas.using(worker):
                    return await attempt(worker, patience)
            except OutOfMemory as error:
                if too_small is not None or len(replicas.workers) == 1:
                    raise
                log.warning("another worker is tried", stage=stage.value, reason=error.message)
                too_small = worker
                await self._begin_again(job_id, stage, (await self.tracker.get(job_id)).progress.total)
            except (Unavailable, ResourceExhausted) as error:
                job = await self.tracker.get(job_id)
                if isinstance(error, WorkerCut) and job.progress.done:
                    cuts += 1
                    log.warning("a worker was lost during its work", stage=stage.value, cuts=cuts, reason=error.message)
                    if cuts > _MAX_CUTS:
                        what = f"the {replicas.name} service stopped {cuts} times during this job"
                        raise Unavailable(f"{what}: {error.message}") from None
                    await self._begin_again(job_id, stage, job.progress.total)
                await patience.pause(error)

    async def _begin_again(self, job_id: str, stage: JobStage, total: int) -> None:
        """A new attempt: only then may progress go back."""
        await self.tracker.begin(job_id)
        await self.tracker.enter(job_id, stage, total=total)

    async def _denoise_once(
        self, worker: FusionClient, request: fusion_pb2.DenoiseRequest, job_id: str, patience: Patience
    ) -> tuple[fusion_pb2.Result, int]:
        """The result, and how many steps were reused."""
        steps_reused = 0
        async with contextlib.aclosing(worker.denoise(request, job_id=job_id)) as events:
            async for event in events:
                patience.alive()
                kind = event.WhichOneof("event")
                if kind == "result":
                    return event.result, steps_reused
                if kind == "mode_lowered":
                    lowered = event.mode_lowered
                    mode = vram_mode_from_proto(lowered.vram_mode, field="mode_lowered.vram_mode")
                    log.warning("memory ran out; the denoise begins again", vram_mode=mode.value, reason=lowered.reason)
                    self.metrics.mode_was_lowered()
                    await self._begin_again(job_id, JobStage.DENOISE, request.options.num_inference_steps)
                    steps_reused = 0
                    continue
                steps_reused += event.step.reused
                self.metrics.step_finished(event.step.seconds)
                await self.tracker.advance(job_id, event.step.index, event.step.total)
        raise CorruptTensor("the fusion service ended the stream without a result")

    async def _decode_once(
        self, worker: VaeClient, job: Job, latents: Latents, provenance: dict[str, str], patience: Patience
    ) -> VideoInfo:
        job_id, mode = job.id, vram_mode_to_proto(job.parameters.vram_mode)
        leases = [self.tensors.store.put(tensor) for tensor in (latents.video_CFHW, latents.audio_SC)]
        try:
            video, audio = (self.tensors.publish(lease) for lease in leases)
            request = vae_pb2.DecodeClipRequest(
                video_latent=video, audio_latent=audio, provenance=provenance, vram_mode=mode
            )
            with self.artifacts.video_writer(job_id) as writer:
                async with contextlib.aclosing(worker.decode_clip(request, job_id=job_id)) as events:
                    async for event in events:
                        patience.alive()
                        kind = event.WhichOneof("event")
                        if kind == "progress":
                            await self.tracker.advance(job_id, event.progress.frames_done, event.progress.frames_total)
                        elif kind == "chunk":
                            await _write(writer.write, event.chunk)
                        else:
                            clip = event.summary
                            await _write(writer.finish, num_bytes=clip.num_bytes, crc32c=clip.crc32c)
                            return VideoInfo(clip.num_bytes, clip.size.height, clip.size.width, clip.num_frames, FPS)
            raise CorruptTensor("the VAE service ended the stream without a summary")
        finally:
            for lease in leases:
                self.tensors.store.release(lease.tensor_id)

    async def _latents_metadata(self, job: Job) -> dict[str, str]:
        model = await self._patience(self.clients.fusion.name).until(lambda: self.catalog.get(job.parameters.model))
        return {
            "seed": str(job.parameters.options.seed),
            "model": model.id,
            "model_fingerprint": model.fingerprint,
            "precision": model.precision,
            "software_version": version("ovi-serve"),
        }

    async def _provenance(self, job: Job) -> dict[str, str]:
        wanted = job.parameters
        kept = await asyncio.to_thread(self.artifacts.read_latents_metadata, job.id)
        settings = {
            key: str(value.value if key == "solver" else value) for key, value in asdict(wanted.options).items()
        }
        settings |= {"height": str(wanted.height), "width": str(wanted.width), "image_id": wanted.image_id}
        return {
            "prompt": wanted.prompt,
            "video_negative_prompt": wanted.video_negative_prompt,
            "audio_negative_prompt": wanted.audio_negative_prompt,
            "seed": kept["seed"],
            "model": kept["model"],
            "model_fingerprint": kept["model_fingerprint"],
            "precision": kept.get("precision", ""),
            # Latents kept by a version without a step cache do not say it.
            _STEPS_REUSED: kept.get(_STEPS_REUSED, "0"),
            # Nor those of a version without modes.
            _VRAM_MODE: kept.get(_VRAM_MODE, VramMode.AUTO.value),
            "settings": json.dumps(settings, sort_keys=True),
            "software_version": version("ovi-serve"),
        }

    async def _fetch(self, ref: tensor_pb2.TensorRef) -> Any:
        return await asyncio.to_thread(self.resolver.fetch, ref, field="latent", max_bytes=_MAX_LATENT_BYTES)

    async def _release(self, refs: Sequence[tensor_pb2.TensorRef]) -> None:
        """Give leases back; one that cannot be given back ends by itself."""
        for ref in refs:
            try:
                await asyncio.to_thread(self.resolver.release, ref)
            except OviError as error:
                log.warning("a lease was not released", address=ref.address, reason=error.message)

    def _patience(self, stage: str) -> Patience:
        return Patience(stage, self.options.worker_wait_s, self.metrics)

    @contextlib.asynccontextmanager
    async def _stage(self, job_id: str, stage: JobStage, *, total: int = 0) -> AsyncIterator[Job]:
        """Around a stage: tells that it begins, and how long it took if it was finished."""
        job = await self.tracker.get(job_id)
        await self.tracker.enter(job_id, stage, total=total)
        begun_s = time.monotonic()
        yield job
        await self.tracker.leave(job_id, stage, time.monotonic() - begun_s)


async def _write(write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Write files in a thread. A cancel waits for it, so that no file appears after a job's folder was deleted."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *args, **kwargs))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        writing.exception()
        raise


def _denoise_request(job: Job, refs: Sequence[tensor_pb2.TensorRef]) -> fusion_pb2.DenoiseRequest:
    wanted = job.parameters
    return fusion_pb2.DenoiseRequest(
        model=wanted.model,
        height=wanted.height,
        width=wanted.width,
        options=sampling_options_to_proto(wanted.options),
        prompt=refs[0],
        video_negative=refs[1],
        audio_negative=refs[2],
        first_frame_latent=refs[3] if len(refs) > 3 else None,
        vram_mode=vram_mode_to_proto(wanted.vram_mode),
    )
