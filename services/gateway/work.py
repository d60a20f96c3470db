"""The stages of a job. Each may be cut anywhere and run again: what it leaves behind is either whole or not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict

from ovi.common.v1 import tensor_pb2
from ovi.fusion.v1 import fusion_pb2
from ovi.vae.v1 import vae_pb2
from services.gateway.artifacts import VIDEO, Artifacts, ClipCollector, Latents
from services.gateway.config import PipelineOptions
from services.gateway.denoising import Denoising
from services.gateway.images import ImageStore
from services.gateway.jobs.domain import Job, JobStage, Setback, VideoInfo
from services.gateway.jobs.giving_way import Denoise
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelCatalog
from services.gateway.patience import Patience
from services.gateway.stages import FusionClient, StageClients, VaeClient
from services.gateway.workers.choosing import Wish
from services.gateway.workers.trying import LongCall, carry_out
from services.gateway.writing import write_unbroken
from shared.errors import CorruptTensor, OviError
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
_STORE = "artifact store"
"""As waits and their metric name it."""
_STEPS_REUSED = "steps_reused"
_VRAM_MODE = "vram_mode"
"""Keys in the metadata of kept latents and in a clip's provenance."""


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
    denoising: dict[str, Denoising] = field(default_factory=dict)
    """Denoises under way, by job id."""

    async def encode_prompt(self, job_id: str) -> list[TensorRefJson]:
        """Encode the prompt and both negative prompts; their references, in this order.

        Raises:
            OviError: the text encoder refused or stayed away.
        """
        async with self._stage(job_id, JobStage.ENCODE_PROMPT) as job:
            model_patience = self._patience(self.clients.fusion.name)
            model = await model_patience.until(lambda: self.catalog.get(job.parameters.model))
            negatives = (job.parameters.video_negative_prompt, job.parameters.audio_negative_prompt)
            encoders = self.clients.text_encoder
            refs = await self._patience(encoders.name).until(
                lambda: encoders.on_one(
                    lambda worker: worker.encode(job.parameters.prompt, negatives, model.prompt_format, job_id=job_id),
                    job_id=job_id,
                )
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
            picture = await self._from_store(self.images.read, wanted.image_id)
            vae = self.clients.vae
            ref = await self._patience(vae.name).until(
                lambda: vae.on_one(
                    lambda worker: worker.encode_image(picture, wanted.height, wanted.width, job_id=job_id),
                    job_id=job_id,
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
        if await self._from_store(self.artifacts.has_latents, job_id):
            return
        job = await self.tracker.get(job_id)
        total = job.parameters.options.num_inference_steps
        kept = await self._from_store(self.artifacts.checkpoint_steps, job_id)
        async with self._stage(job_id, JobStage.DENOISE, total=total, done=kept):
            refs = [ParseDict(ref, tensor_pb2.TensorRef()) for ref in embeddings]
            if first_frame is not None:
                refs.append(ParseDict(first_frame, tensor_pb2.TensorRef()))
            metadata = await self._latents_metadata(job)
            result, steps_reused = await self._denoised(job, refs, kept)
            outcome = [result.video_latent, result.audio_latent]
            video, audio = await asyncio.gather(*(self._fetch(ref) for ref in outcome))
            latents = Latents(video, audio)
            mode = vram_mode_from_proto(result.vram_mode, field="result.vram_mode")
            metadata |= {_STEPS_REUSED: str(steps_reused), _VRAM_MODE: mode.value}
            await self._into_store(self.artifacts.write_latents, job_id, latents, metadata)
            await self._into_store(self.artifacts.delete_checkpoint, job_id)
            await self._release([*refs, *outcome])

    async def set_aside(self, job_id: str) -> None:
        """Before a job is stopped for a while: let a denoise finish its present step, and keep where it is."""
        denoising = self.denoising.get(job_id)
        if denoising is not None:
            await denoising.set_aside(self.options.worker_wait_s)

    @property
    def num_workers(self) -> int:
        """Denoises that are made at the same time; 0 while no worker is known."""
        return self.clients.fusion.num_up

    async def denoises(self) -> list[Denoise]:
        """Jobs at their denoise."""
        made = []
        for job_id, denoising in list(self.denoising.items()):
            job = await self.tracker.get(job_id)
            made.append(Denoise(job, denoising.on_device, job.progress.total - job.progress.done))
        return made

    async def _denoised(
        self, job: Job, refs: Sequence[tensor_pb2.TensorRef], kept: int
    ) -> tuple[fusion_pb2.Result, int]:
        """The result, and how many steps were reused."""
        total = job.parameters.options.num_inference_steps

        at = ""

        async def begin_again(reason: str, done: int) -> None:
            await self._begin_again(job.id, JobStage.DENOISE, total, reason, at, done)

        request = _denoise_request(job, refs, self.options.checkpoint_steps)
        given = (self.artifacts, self.resolver, self.tensors, self.tracker, self.metrics)
        denoising = self.denoising[job.id] = Denoising(job.id, request, *given, begin_again, kept)

        async def attempt(worker: FusionClient, patience: Patience) -> tuple[fusion_pb2.Result, int]:
            nonlocal at
            at = worker.address
            return await denoising.attempt(worker, patience)

        async def after(reason: str, address: str) -> None:
            await self._begin_again(job.id, JobStage.DENOISE, total, reason, address, denoising.kept)

        call = LongCall(job.id, _wish(job), attempt, after, lambda: denoising.kept)
        try:
            return await carry_out(call, self.clients.fusion, self._patience(self.clients.fusion.name))
        finally:
            if self.denoising.get(job.id) is denoising:
                del self.denoising[job.id]

    async def decode(self, job_id: str) -> VideoInfo:
        """Decode the kept latents into the clip.

        Raises:
            OviError: the VAE refused or stayed away, or what came was not whole.
        """
        async with self._stage(job_id, JobStage.DECODE) as job:
            latents, metadata = await self._from_store(self.artifacts.read_latents, job_id)
            provenance = _provenance(job, metadata)

            async def attempt(worker: VaeClient, patience: Patience) -> tuple[VideoInfo, bytes]:
                return await self._decode_once(worker, job, latents, provenance, patience)

            async def after(reason: str, address: str) -> None:
                total = (await self.tracker.get(job_id)).progress.total
                await self._begin_again(job_id, JobStage.DECODE, total, reason, address, 0)

            vae, size = self.clients.vae, (job.parameters.height, job.parameters.width)
            call = LongCall(job_id, Wish(mode=job.parameters.vram_mode, size=size), attempt, after)
            video, clip = await carry_out(call, vae, self._patience(vae.name))
            await self._into_store(self.artifacts.write, job_id, VIDEO, clip)
            mode = VramMode(provenance[_VRAM_MODE])
            return replace(video, steps_reused=int(provenance[_STEPS_REUSED]), vram_mode=mode)

    async def _begin_again(self, job_id: str, stage: JobStage, total: int, reason: str, worker: str, done: int) -> None:
        """A new attempt after one at that worker: only then may progress go back."""
        await self.tracker.begin(job_id, Setback(time.time(), reason, stage, worker))
        await self.tracker.enter(job_id, stage, total=total, done=done)

    async def _decode_once(
        self, worker: VaeClient, job: Job, latents: Latents, provenance: dict[str, str], patience: Patience
    ) -> tuple[VideoInfo, bytes]:
        """What was decoded, and the mp4."""
        job_id, mode = job.id, vram_mode_to_proto(job.parameters.vram_mode)
        leases = [self.tensors.store.put(tensor) for tensor in (latents.video_CFHW, latents.audio_SC)]
        try:
            video, audio = (self.tensors.publish(lease) for lease in leases)
            request = vae_pb2.DecodeClipRequest(
                video_latent=video, audio_latent=audio, provenance=provenance, vram_mode=mode
            )
            clip = ClipCollector()
            async with contextlib.aclosing(worker.decode_clip(request, job_id=job_id)) as events:
                async for event in events:
                    patience.alive()
                    kind = event.WhichOneof("event")
                    if kind == "progress":
                        await self.tracker.advance(job_id, event.progress.frames_done, event.progress.frames_total)
                    elif kind == "chunk":
                        clip.add(event.chunk)
                    else:
                        told = event.summary
                        content = clip.whole(num_bytes=told.num_bytes, crc32c=told.crc32c)
                        size = told.size
                        return VideoInfo(len(content), size.height, size.width, told.num_frames, FPS), content
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

    async def _fetch(self, ref: tensor_pb2.TensorRef) -> Any:
        return await asyncio.to_thread(self.resolver.fetch, ref, field="latent", max_bytes=_MAX_LATENT_BYTES)

    async def _release(self, refs: Sequence[tensor_pb2.TensorRef]) -> None:
        """Give leases back; one that cannot be given back ends by itself."""
        for ref in refs:
            try:
                await asyncio.to_thread(self.resolver.release, ref)
            except OviError as error:
                log.warning("a lease was not released", address=ref.address, reason=error.message)

    async def _from_store(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read in a thread; waits for an artifact store that is away."""
        return await self._patience(_STORE).until(lambda: asyncio.to_thread(read, *args, **kwargs))

    async def _into_store(self, write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Write in a thread, never half-way; waits for an artifact store that is away."""
        await self._patience(_STORE).until(lambda: write_unbroken(write, *args, **kwargs))

    def _patience(self, stage: str) -> Patience:
        return Patience(stage, self.options.worker_wait_s, self.metrics)

    @contextlib.asynccontextmanager
    async def _stage(self, job_id: str, stage: JobStage, *, total: int = 0, done: int = 0) -> AsyncIterator[Job]:
        """Around a stage: tells that it begins, and how long it took if it was finished."""
        job = await self.tracker.get(job_id)
        await self.tracker.enter(job_id, stage, total=total, done=done)
        begun_s = time.monotonic()
        yield job
        await self.tracker.leave(job_id, stage, time.monotonic() - begun_s)


def _wish(job: Job) -> Wish:
    """What a denoise wants of its worker."""
    wanted = job.parameters
    return Wish(wanted.model, wanted.vram_mode, (wanted.height, wanted.width))


def _denoise_request(
    job: Job, refs: Sequence[tensor_pb2.TensorRef], checkpoint_steps: int
) -> fusion_pb2.DenoiseRequest:
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
        run_id=job.id,
        checkpoint_steps=checkpoint_steps,
    )


def _provenance(job: Job, kept: Mapping[str, str]) -> dict[str, str]:
    """What a clip says of itself; `kept` is the metadata of its latents."""
    wanted = job.parameters
    settings = {key: str(value.value if key == "solver" else value) for key, value in asdict(wanted.options).items()}
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
