"""VaeService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import BinaryIO

import google_crc32c
import grpc
import torch

from ovi.common.v1 import system_pb2, tensor_pb2
from ovi.common.v1.generation_pb2 import Size
from ovi.vae.v1 import vae_pb2 as pb
from ovi.vae.v1 import vae_pb2_grpc as pb_grpc
from services.vae.config import VaeOptions
from services.vae.engine import ClipProgress, ClipWritten, VaeEngine, cover_frame
from services.vae.memory import explain, largest_picture
from services.vae.request import (
    MAX_AUDIO_LATENT_BYTES,
    MAX_VIDEO_LATENT_BYTES,
    check_audio_latent,
    check_finite,
    check_provenance,
    check_size,
    check_video_latent,
)
from services.vae.scratch import scratch_folder
from shared.device_worker import DeviceWorker
from shared.errors import FieldViolation, InvalidRequest, OutOfMemory
from shared.generation_proto import size_to_proto
from shared.logging import get_logger
from shared.memory.modes import RECIPES, VramMode
from shared.memory.turns import DeviceTurns, device_key
from shared.pictures import MAX_PICTURE_BYTES, open_picture
from shared.service_main import device_name
from shared.shapes import FPS, SAMPLE_RATE_HZ, VideoLatentShape
from shared.system_proto import memory_plan_to_proto, vram_mode_from_proto, vram_mode_to_proto
from shared.system_service import CallCount, PlanWish
from shared.tensors.framing import CHUNK_BYTES, TensorSpec, spec_from_proto
from shared.tensors.service import TensorServer
from shared.tensors.transport import TensorResolver

log = get_logger(__name__)

_MAX_BYTES = {"video_latent": MAX_VIDEO_LATENT_BYTES, "audio_latent": MAX_AUDIO_LATENT_BYTES}
_ANY_SIZE = 1 << 62
"""The checks of shapes bound sizes more tightly, and say so in terms of the shape."""


class VaeServicer(pb_grpc.VaeServiceServicer):
    """Encoding and decoding over one engine, which `engine` gives once it is loaded."""

    def __init__(
        self,
        engine: Callable[[], VaeEngine],
        worker: DeviceWorker,
        resolver: TensorResolver,
        tensors: TensorServer,
        options: VaeOptions,
        turns: DeviceTurns | None = None,
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._resolver = resolver
        self._tensors = tensors
        self._options = options
        self._turns = turns
        self._calls = CallCount()

    def turn(self, *modes: VramMode) -> contextlib.AbstractAsyncContextManager[None]:
        """Have the device within, if one of these modes takes turns."""
        if not _in_turns(*modes):
            return contextlib.nullcontext()
        if self._turns is None:
            self._turns = DeviceTurns(device_key(self._options.stage.device))
        return self._turns.turn()

    @contextlib.asynccontextmanager
    async def _work(self, *modes: VramMode) -> AsyncIterator[None]:
        """Around the part of a call that waits for the device or has it."""
        with self._calls.counting():
            async with self.turn(*modes):
                yield

    async def EncodeImage(
        self, request_iterator: AsyncIterator[pb.EncodeImageRequest], context: grpc.aio.ServicerContext
    ) -> pb.EncodeImageResponse:
        size, data = await _receive_picture(request_iterator)
        picture = await asyncio.to_thread(open_picture, data, field="image")
        frame_HWC = await asyncio.to_thread(cover_frame, picture, size.height, size.width)
        mode = self._engine().mode
        async with self._work(mode):
            latent_CFHW = await self._worker.run(lambda: self._engine().encode_image(frame_HWC, mode))
        return pb.EncodeImageResponse(latent=self._tensors.publish(self._tensors.store.put(latent_CFHW)))

    async def DecodeClip(
        self, request: pb.DecodeClipRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeClipResponse]:
        references = {"video_latent": request.video_latent, "audio_latent": request.audio_latent}
        provenance = dict(request.provenance)
        _check_references(references, check_provenance(provenance))
        mode = self._planned(request.video_latent, vram_mode_from_proto(request.vram_mode, field="vram_mode"))
        latents = await self._fetch(references)
        with scratch_folder() as folder:
            path = folder / "clip.mp4"
            given = (latents["video_latent"], latents["audio_latent"], provenance, path, mode)
            events = self._worker.stream(lambda: self._engine().decode_clip(*given))
            async with self._work(mode, self._engine().mode), contextlib.aclosing(events):
                begun_s = time.monotonic()
                async for event in events:
                    if isinstance(event, ClipProgress):
                        yield pb.DecodeClipResponse(progress=_progress(event))
                    else:
                        written = event
            seconds = round(time.monotonic() - begun_s, 3)
            log.info(
                "clip decoded",
                mode=mode.value,
                num_frames=written.num_frames,
                num_bytes=path.stat().st_size,
                seconds=seconds,
                peak_device_gib=self._engine().peak_device_gib,
            )
            checksum = google_crc32c.Checksum()
            with path.open("rb") as file:
                async for chunk in _chunks(file, 0, path.stat().st_size):
                    checksum.update(chunk)
                    yield pb.DecodeClipResponse(chunk=chunk)
                yield pb.DecodeClipResponse(summary=_summary(written, path.stat().st_size, checksum))

    async def DecodeVideo(
        self, request: pb.DecodeVideoRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeVideoResponse]:
        references = {"video_latent": request.video_latent}
        _check_references(references)
        mode = self._planned(request.video_latent, VramMode.AUTO)
        latent_CFHW = (await self._fetch(references))["video_latent"]
        shape = VideoLatentShape(*latent_CFHW.shape[1:])
        size = size_to_proto(shape.pixel_height, shape.pixel_width)
        yield pb.DecodeVideoResponse(header=pb.VideoHeader(num_frames=shape.num_frames, size=size, fps=FPS))
        with tempfile.TemporaryFile() as file:
            ends = self._worker.stream(lambda: self._engine().spool_video(latent_CFHW, file, mode))
            start = end = 0
            async with self._work(mode), contextlib.aclosing(ends):
                async for end in ends:
                    # Nobody else's turn shall wait for a slow client.
                    if not _in_turns(mode):
                        async for chunk in _chunks(file, start, end):
                            yield pb.DecodeVideoResponse(chunk=chunk)
                        start = end
            async for chunk in _chunks(file, start, end):
                yield pb.DecodeVideoResponse(chunk=chunk)

    async def DecodeAudio(
        self, request: pb.DecodeAudioRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeAudioResponse]:
        references = {"audio_latent": request.audio_latent}
        _check_references(references)
        latent_SC = (await self._fetch(references))["audio_latent"]
        mode = self._engine().mode
        async with self._work(mode):
            samples = await self._worker.run(lambda: self._engine().decode_audio(latent_SC, mode))
        header = pb.AudioHeader(num_samples=len(samples), sample_rate_hz=SAMPLE_RATE_HZ)
        yield pb.DecodeAudioResponse(header=header)
        values = samples.astype("<f4").data.cast("B")
        for start in range(0, len(values), CHUNK_BYTES):
            yield pb.DecodeAudioResponse(chunk=bytes(values[start : start + CHUNK_BYTES]))

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        stage = self._options.stage
        return pb.DescribeModelResponse(
            device=device_name(stage.device),
            precision=str(stage.precision).removeprefix("torch."),
            fingerprint=self._engine().fingerprint,
            chunk_latent_frames=self._options.chunk_latent_frames,
            num_ranks=self._options.ranks.world_size,
        )

    def describe(self) -> system_pb2.Worker:
        """This stage as a worker; for SystemService."""
        mode = vram_mode_to_proto(self._engine().mode)
        return system_pb2.Worker(
            stage="vae",
            loaded_vram_mode=mode,
            vram_mode=mode,
            allocation=self._allocation,
            num_pending=self._calls.number,
            num_cut=self._worker.cuts.number,
            cut_s=self._worker.cuts.seconds,
        )

    def plan(self, wish: PlanWish) -> system_pb2.MemoryPlan:
        """What a wish would take; for SystemService."""
        _check_model(wish.model)
        size = wish.size or largest_picture()
        if violations := check_size(*size, field="size"):
            raise InvalidRequest(violations)
        engine = self._engine()
        mode = engine.mode if wish.mode is VramMode.AUTO else wish.mode
        lacking = None
        try:
            plan = engine.plan(mode, *size)
        except OutOfMemory as error:
            plan, lacking = engine.memory.least(mode, *size), error.message
        return memory_plan_to_proto(
            plan.mode,
            plan.components,
            plan.budget_bytes,
            allocation=self._allocation,
            fits=lacking is None,
            explanation=lacking or explain(plan, *size),
        )

    async def set_mode(self, mode: VramMode, model: str) -> system_pb2.MemoryPlan:
        """Switch between two calls; for SystemService."""
        _check_model(model)
        settled = self._engine().memory.settle(mode)
        async with self.turn(self._engine().mode, settled):
            await self._worker.run(lambda: self._engine().set_mode(settled))
        return self.plan(PlanWish(VramMode.AUTO, "", None))

    @property
    def _allocation(self) -> str:
        num_ranks = self._options.ranks.world_size
        return "single" if num_ranks == 1 else f"pictures {num_ranks}"

    def _planned(self, video_latent: tensor_pb2.TensorRef, mode: VramMode) -> VramMode:
        """The mode in which a checked latent is decoded.

        Raises:
            OutOfMemory: it does not fit; nothing was done.
            InvalidRequest: the mode is not for this service.
        """
        shape = VideoLatentShape(*video_latent.spec.shape[1:])
        return self._engine().plan(mode, shape.pixel_height, shape.pixel_width).mode

    async def _fetch(self, references: Mapping[str, tensor_pb2.TensorRef]) -> dict[str, torch.Tensor]:
        """The latents behind checked references. Their leases stay: whoever asked may ask again."""
        fetches = (
            asyncio.to_thread(self._resolver.fetch, reference, field=name, max_bytes=_MAX_BYTES[name])
            for name, reference in references.items()
        )
        latents = dict(zip(references, await asyncio.gather(*fetches), strict=True))
        violations = [v for name, latent in latents.items() for v in check_finite(latent, field=name)]
        if violations:
            raise InvalidRequest(violations)
        return latents


def _in_turns(*modes: VramMode) -> bool:
    return any(RECIPES[mode].takes_turns for mode in modes)


def _check_model(model: str) -> None:
    if model:
        raise InvalidRequest.of("model", f"got {model[:100]!r}; this stage serves every variant, leave it empty")


async def _receive_picture(requests: AsyncIterator[pb.EncodeImageRequest]) -> tuple[Size, bytes]:
    """The size and the whole file of an upload.

    Raises:
        InvalidRequest: the size is missing, second or illegal, a part is empty or too large, or the file is.
    """
    size: Size | None = None
    data = bytearray()
    async for request in requests:
        part = request.WhichOneof("part")
        if part == "size":
            if size is not None:
                raise InvalidRequest.of("size", "came twice; it is sent once, in the first message")
            size = request.size
            if violations := check_size(size.height, size.width, field="size"):
                raise InvalidRequest(violations)
        elif size is None:
            raise InvalidRequest.of("size", f"the first message holds {part or 'nothing'}, it must hold the size")
        elif part is None:
            raise InvalidRequest.of("part", "a message is empty, allowed is a chunk")
        elif len(request.chunk) > CHUNK_BYTES:
            raise InvalidRequest.of("chunk", f"got {len(request.chunk)} bytes, allowed is at most {CHUNK_BYTES}")
        elif len(data) + len(request.chunk) > MAX_PICTURE_BYTES:
            raise InvalidRequest.of("image", f"is larger than {MAX_PICTURE_BYTES} bytes, the most allowed")
        else:
            data += request.chunk
    if size is None:
        raise InvalidRequest.of("size", "no message came, the first must hold the size")
    return size, bytes(data)


def _check_references(
    references: Mapping[str, tensor_pb2.TensorRef], violations: list[FieldViolation] | None = None
) -> None:
    """Check what the references announce, before anything is fetched.

    Raises:
        InvalidRequest: every violation, with those given.
    """
    violations = list(violations or ())
    for name, reference in references.items():
        if not reference.tensor_id:
            violations.append(FieldViolation(name, "is missing; a reference to a latent is needed"))
            continue
        try:
            spec = spec_from_proto(reference.spec, field=f"{name}.spec", max_bytes=_ANY_SIZE)
        except InvalidRequest as error:
            violations.extend(error.violations)
        else:
            violations.extend(_CHECKS[name](spec, name))
    if violations:
        raise InvalidRequest(violations)


_CHECKS: dict[str, Callable[[TensorSpec, str], list[FieldViolation]]] = {
    "video_latent": lambda spec, name: check_video_latent(spec, field=name),
    "audio_latent": lambda spec, name: check_audio_latent(spec, field=name),
}


async def _chunks(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    """Bytes `start` to `end` of a file, at most CHUNK_BYTES each, read off the event loop."""
    for offset in range(start, end, CHUNK_BYTES):
        yield await asyncio.to_thread(os.pread, file.fileno(), min(CHUNK_BYTES, end - offset), offset)


def _progress(event: ClipProgress) -> pb.DecodeProgress:
    return pb.DecodeProgress(frames_done=event.frames_done, frames_total=event.frames_total)


def _summary(written: ClipWritten, num_bytes: int, checksum: google_crc32c.Checksum) -> pb.ClipSummary:
    return pb.ClipSummary(
        num_bytes=num_bytes,
        crc32c=int.from_bytes(checksum.digest(), "big"),
        num_frames=written.num_frames,
        size=size_to_proto(written.height, written.width),
        num_samples=written.num_samples,
        sample_rate_hz=SAMPLE_RATE_HZ,
    )
