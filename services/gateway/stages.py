"""Calls of the three stages. Every failure becomes one of `shared.errors`; `patience` decides what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from ovi.common.v1 import system_pb2, system_pb2_grpc, tensor_pb2
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from services.gateway.models import ModelInfo, merged_models
from services.gateway.workers.choosing import Report
from services.gateway.workers.listing import report_from_proto
from services.gateway.workers.replicas import Replicas, WorkerCut, WorkerView
from shared.errors import DeadlineExceeded, Internal, Unavailable
from shared.generation_proto import prompt_format_from_proto, prompt_format_to_proto
from shared.grpc_client import REQUEST_ID_KEY, error_of
from shared.memory.device_state import DeviceState
from shared.places import Place
from shared.system_proto import device_from_proto, vram_mode_from_proto
from shared.tensors.framing import CHUNK_BYTES
from shared.tls import PLAIN, Tls, open_channel
from shared.variants import PromptFormat

T = TypeVar("T")

_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A worker that hangs, or whose machine is gone, says nothing: its calls are cut within about a minute. Ports take
    # such a question every 10 s (shared/grpc_server.py).
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_DESCRIBE_TIMEOUT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
_SYSTEM_TIMEOUT_S = 2.0
_CUT_CODES = frozenset({"UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN"})


class _Unknown(Internal):
    """The worker has no such call."""


@contextmanager
def _calls(stage: str, address: str) -> Iterator[None]:
    """Around a call: gRPC statuses become `shared.errors`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        # Our servers put details on every status they send; one without was made by the transport.
        if error.code().name in _CUT_CODES and rpc_status.from_call(error) is None:
            raise WorkerCut(f"the {stage} service at {address} cannot be reached ({error.details()})") from None
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise _Unknown(f"the {stage} service at {address} does not know this call; is the address right?") from None
        known = error_of(error)
        if isinstance(known, Unavailable):
            raise Unavailable(f"the {stage} service at {address} is not ready ({known.message})") from None
        raise known from None


def _metadata(job_id: str) -> tuple[tuple[str, str], ...]:
    return ((REQUEST_ID_KEY, job_id),)


async def _events(call: Any, stage: str, address: str) -> AsyncGenerator[Any, None]:
    """The messages of a stream; leaving early cancels the call at once."""
    try:
        with _calls(stage, address):
            async for event in call:
                yield event
    finally:
        call.cancel()


class SystemClient:
    """Devices and memory of one stage."""

    def __init__(self, name: str, address: str, channel: grpc.aio.Channel) -> None:
        self.name = name
        self.address = address
        self._stub = system_pb2_grpc.SystemServiceStub(channel)

    async def devices(self) -> tuple[DeviceState, ...]:
        """Its devices now.

        Raises:
            OviError: by the table.
        """
        with self._promptly():
            response = await self._stub.GetDevices(system_pb2.GetDevicesRequest(), timeout=_SYSTEM_TIMEOUT_S)
        return tuple(map(device_from_proto, response.devices))

    async def plan(self, request: system_pb2.GetPlanRequest, *, wait_for_ready: bool = False) -> system_pb2.MemoryPlan:
        """What something would take on it.

        Args:
            request: what.
            wait_for_ready: give a service that has just been restarted a moment.

        Raises:
            OviError: by the table.
        """
        with self._promptly():
            answer = await self._stub.GetPlan(request, timeout=_SYSTEM_TIMEOUT_S, wait_for_ready=wait_for_ready)
        return answer.plan

    async def set_mode(self, request: system_pb2.SetModeRequest) -> system_pb2.MemoryPlan:
        """Switch it; may take as long as loading a model.

        Raises:
            OviError: by the table.
        """
        with _calls(self.name, self.address):
            return (await self._stub.SetMode(request)).plan

    async def report(self) -> Report:
        """What it says of itself as a worker; of one of an older version no more than that it is there.

        Raises:
            OviError: by the table.
        """
        try:
            with _calls(self.name, self.address):
                call = self._stub.ListWorkers(system_pb2.ListWorkersRequest(), timeout=_SYSTEM_TIMEOUT_S)
                told = (await call).workers
        except _Unknown:
            return Report(self.name)
        return report_from_proto(told[0]) if told else Report(self.name)

    @contextmanager
    def _promptly(self) -> Iterator[None]:
        try:
            with _calls(self.name, self.address):
                yield
        except _Unknown:
            what = f"the {self.name} service at {self.address} does not tell of its memory; is it of an older version?"
            raise Unavailable(what) from None
        except DeadlineExceeded:
            what = f"the {self.name} service at {self.address} did not answer within {_SYSTEM_TIMEOUT_S:g} s"
            raise Unavailable(what) from None


class StageClient:
    """What the clients of all stages have."""

    name: str
    """Of the stage."""

    def __init__(self, place: Place, tls: Tls = PLAIN) -> None:
        """
        Args:
            place: of the worker.
            tls: how it is connected to.
        """
        self.address = place.address
        self.channel = open_channel(place.address, tls, _CHANNEL_OPTIONS, authority=place.authority)
        self.system = SystemClient(self.name, self.address, self.channel)

    async def report(self) -> Report:
        """What the worker says of itself.

        Raises:
            OviError: by the table.
        """
        return await self.system.report()

    async def close(self) -> None:
        """Close the connection; calls under way are cut."""
        await self.channel.close()


class TextEncoderClient(StageClient):
    """The text encoder stage."""

    name = "text_encoder"

    def __init__(self, place: Place, tls: Tls = PLAIN) -> None:
        super().__init__(place, tls)
        self._stub = text_encoder_pb2_grpc.TextEncoderServiceStub(self.channel)

    async def encode(
        self, prompt: str, negatives: Sequence[str], prompt_format: PromptFormat, *, job_id: str
    ) -> list[tensor_pb2.TensorRef]:
        """References of the prompt's rows and of each negative's.

        Raises:
            OviError: by the table.
        """
        request = text_encoder_pb2.EncodeRequest(
            prompts=[prompt, *negatives],
            prompt_format=prompt_format_to_proto(prompt_format),
            num_pinned=len(negatives),
        )
        with _calls(self.name, self.address):
            response = await self._stub.Encode(request, metadata=_metadata(job_id))
        return [embedding.tensor for embedding in response.embeddings]


class FusionClient(StageClient):
    """The fusion stage."""

    name = "fusion"

    def __init__(self, place: Place, tls: Tls = PLAIN) -> None:
        super().__init__(place, tls)
        self._stub = fusion_pb2_grpc.FusionServiceStub(self.channel)

    def denoise(
        self, request: fusion_pb2.DenoiseRequest, *, job_id: str
    ) -> AsyncGenerator[fusion_pb2.DenoiseResponse, None]:
        """Steps, then the result; closing it stops the work before its next step.

        Raises:
            OviError: by the table.
        """
        return _events(self._stub.Denoise(request, metadata=_metadata(job_id)), self.name, self.address)

    async def pause_run(self, run_id: str) -> bool:
        """Ask for a stop after the present step; False if there is nothing to stop.

        Raises:
            OviError: by the table.
        """
        with _calls(self.name, self.address):
            request = fusion_pb2.PauseRunRequest(run_id=run_id)
            return (await self._stub.PauseRun(request, timeout=_SYSTEM_TIMEOUT_S)).running

    async def describe(self) -> tuple[ModelInfo, ...]:
        """The variants whose files are there, those that can be run first.

        Raises:
            OviError: by the table.
        """
        try:
            with _calls(self.name, self.address):
                # Waiting bridges the moment in which a restarted worker is up and the channel does not know it yet.
                response = await self._stub.DescribeModel(
                    fusion_pb2.DescribeModelRequest(), timeout=_DESCRIBE_TIMEOUT_S, wait_for_ready=True
                )
        except DeadlineExceeded:
            what = f"the {self.name} service at {self.address} did not answer within {_DESCRIBE_TIMEOUT_S:g} s"
            raise Unavailable(f"{what}; is it running?") from None
        mode = vram_mode_from_proto(response.memory.vram_mode, field="memory.vram_mode")
        return tuple(
            ModelInfo(
                id=variant.id,
                sizes=tuple((size.height, size.width) for size in variant.sizes),
                video_area=variant.video_area,
                num_frames=variant.num_frames,
                fps=variant.fps,
                num_layers=variant.num_layers,
                prompt_format=prompt_format_from_proto(variant.prompt_format, field="prompt_format"),
                precision=variant.precision,
                device=response.device,
                fingerprint=variant.fingerprint,
                problem=variant.problem,
                vram_mode=mode,
            )
            for variant in response.variants
        )


class VaeClient(StageClient):
    """The VAE stage."""

    name = "vae"

    def __init__(self, place: Place, tls: Tls = PLAIN) -> None:
        super().__init__(place, tls)
        self._stub = vae_pb2_grpc.VaeServiceStub(self.channel)

    async def encode_image(self, picture: bytes, height: int, width: int, *, job_id: str) -> tensor_pb2.TensorRef:
        """The latent of a first picture, scaled and cropped to height x width.

        Raises:
            OviError: by the table.
        """

        async def parts() -> AsyncIterator[vae_pb2.EncodeImageRequest]:
            request = vae_pb2.EncodeImageRequest()
            request.size.height, request.size.width = height, width
            yield request
            for start in range(0, len(picture), CHUNK_BYTES):
                yield vae_pb2.EncodeImageRequest(chunk=picture[start : start + CHUNK_BYTES])

        with _calls(self.name, self.address):
            response = await self._stub.EncodeImage(parts(), metadata=_metadata(job_id))
        return response.latent

    def decode_clip(
        self, request: vae_pb2.DecodeClipRequest, *, job_id: str
    ) -> AsyncGenerator[vae_pb2.DecodeClipResponse, None]:
        """Progress, the mp4 in chunks, its summary.

        Raises:
            OviError: by the table.
        """
        return _events(self._stub.DecodeClip(request, metadata=_metadata(job_id)), self.name, self.address)


@dataclass(frozen=True)
class StageClients:
    """All three stages with their workers."""

    text_encoder: Replicas[TextEncoderClient]
    fusion: Replicas[FusionClient]
    vae: Replicas[VaeClient]

    @classmethod
    def connecting(cls, tls: Tls = PLAIN) -> StageClients:
        """No workers yet; those that come are connected to at the first calls, with TLS where it names an authority."""
        return cls(
            Replicas(TextEncoderClient.name, lambda place: TextEncoderClient(place, tls)),
            Replicas(FusionClient.name, lambda place: FusionClient(place, tls)),
            Replicas(VaeClient.name, lambda place: VaeClient(place, tls)),
        )

    @property
    def by_stage(self) -> dict[str, Replicas[Any]]:
        """The workers of each stage, by its name."""
        return {pool.name: pool for pool in (self.text_encoder, self.fusion, self.vae)}

    async def models(self) -> tuple[ModelInfo, ...]:
        """The variants that a fusion service has.

        Raises:
            OviError: none answers.
        """
        return merged_models(await self.fusion.of_all(FusionClient.describe))

    async def fusion_plan(self, request: system_pb2.GetPlanRequest) -> system_pb2.MemoryPlan:
        """What something would take on a fusion service, on one where it fits if there is any.

        Raises:
            OviError: none answers.
        """
        plans = await self.fusion.of_all(lambda worker: worker.system.plan(request))
        return max(plans, key=lambda plan: plan.fits)

    def views(self) -> list[WorkerView]:
        """Every worker as this gateway sees it, by stage and address."""
        return [view for pool in self.by_stage.values() for view in pool.views()]

    async def health(self) -> dict[str, str]:
        """What each stage's health service says: SERVING, NOT_SERVING or UNREACHABLE; one that serves is enough."""
        clients = self.all
        answers = await asyncio.gather(*(_health(client.channel) for client in clients))
        told = dict.fromkeys(self.by_stage, "UNREACHABLE")
        seen: set[str] = set()
        for client, answer in zip(clients, answers, strict=True):
            if client.name not in seen or answer == "SERVING":
                told[client.name] = answer
            seen.add(client.name)
        return told

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(pool.close() for pool in self.by_stage.values()))

    @property
    def all(self) -> tuple[StageClient, ...]:
        """Every worker."""
        return (*self.text_encoder.workers, *self.fusion.workers, *self.vae.workers)


async def _health(channel: grpc.aio.Channel) -> str:
    try:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return "UNREACHABLE"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
