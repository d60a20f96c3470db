"""Calls of the three stages. Every failure becomes one of `shared.errors`; `patience` decides what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
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
from services.gateway.config import StageAddresses
from services.gateway.models import ModelInfo
from services.gateway.replicas import Replicas
from shared.errors import DeadlineExceeded, Internal, Unavailable
from shared.generation_proto import prompt_format_from_proto, prompt_format_to_proto
from shared.grpc_client import REQUEST_ID_KEY, error_of
from shared.memory.device_state import DeviceState
from shared.system_proto import device_from_proto, vram_mode_from_proto
from shared.tensors.framing import CHUNK_BYTES
from shared.tls import PLAIN, Tls, open_channel
from shared.variants import PromptFormat

T = TypeVar("T")

_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
_DESCRIBE_TIMEOUT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
_SYSTEM_TIMEOUT_S = 2.0
_CUT_CODES = frozenset({"UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN"})


class WorkerCut(Unavailable):
    """The connection to a worker broke during a call, or could not be made: the worker crashed or is not started."""


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


class TextEncoderClient:
    """The text encoder stage."""

    name = "text_encoder"

    def __init__(self, address: str, tls: Tls = PLAIN) -> None:
        self.address = address
        self.channel = open_channel(address, tls, _CHANNEL_OPTIONS)
        self._stub = text_encoder_pb2_grpc.TextEncoderServiceStub(self.channel)
        self.system = SystemClient(self.name, address, self.channel)

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


class FusionClient:
    """The fusion stage."""

    name = "fusion"

    def __init__(self, address: str, tls: Tls = PLAIN) -> None:
        self.address = address
        self.channel = open_channel(address, tls, _CHANNEL_OPTIONS)
        self._stub = fusion_pb2_grpc.FusionServiceStub(self.channel)
        self.system = SystemClient(self.name, address, self.channel)

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


class VaeClient:
    """The VAE stage."""

    name = "vae"

    def __init__(self, address: str, tls: Tls = PLAIN) -> None:
        self.address = address
        self.channel = open_channel(address, tls, _CHANNEL_OPTIONS)
        self._stub = vae_pb2_grpc.VaeServiceStub(self.channel)
        self.system = SystemClient(self.name, address, self.channel)

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
    """All three stages, those that may have several workers with all of them."""

    text_encoder: TextEncoderClient
    fusion: Replicas[FusionClient]
    vae: Replicas[VaeClient]

    @classmethod
    def connect(cls, addresses: StageAddresses, tls: Tls = PLAIN) -> StageClients:
        """Clients of these addresses, with TLS where it names an authority; connected at the first calls."""
        fusion = Replicas([FusionClient(address, tls) for address in addresses.fusion])
        vae = Replicas([VaeClient(address, tls) for address in addresses.vae])
        return cls(TextEncoderClient(addresses.text_encoder, tls), fusion, vae)

    async def models(self) -> tuple[ModelInfo, ...]:
        """The variants of the first fusion service that answers.

        Raises:
            OviError: none answers.
        """
        return await self.fusion.of_any(FusionClient.describe)

    async def fusion_plan(self, request: system_pb2.GetPlanRequest) -> system_pb2.MemoryPlan:
        """What something would take on a fusion service, on one where it fits if there is any.

        Raises:
            OviError: none answers.
        """
        plans = await self.fusion.of_all(lambda worker: worker.system.plan(request))
        return max(plans, key=lambda plan: plan.fits)

    async def health(self) -> dict[str, str]:
        """What each stage's health service says: SERVING, NOT_SERVING or UNREACHABLE; one that serves is enough."""
        names = [client.name for client in self.all]
        answers = await asyncio.gather(*(_health(client.channel) for client in self.all))
        told: dict[str, str] = {}
        for name, answer in zip(names, answers, strict=True):
            if told.get(name) != "SERVING":
                told[name] = answer
        return told

    async def close(self) -> None:
        """Close the connections."""
        closing: list[Awaitable[None]] = [client.channel.close() for client in self.all]
        await asyncio.gather(*closing)

    @property
    def all(self) -> tuple[TextEncoderClient | FusionClient | VaeClient, ...]:
        """Every worker."""
        return (self.text_encoder, *self.fusion.workers, *self.vae.workers)


async def _health(channel: grpc.aio.Channel) -> str:
    try:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return "UNREACHABLE"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
