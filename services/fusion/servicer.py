"""FusionService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

import grpc
import torch

from ovi.common.v1 import tensor_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.config import FusionOptions
from services.fusion.engine import FusionEngine
from services.fusion.request import RunInputs, RunSpec, ServedVariant, TensorShape, check_finite, check_run
from services.fusion.sampling.denoise import Latents, StepDone
from shared.device_worker import DeviceWorker
from shared.errors import InvalidRequest
from shared.generation_proto import prompt_format_to_proto, sampling_options_from_proto, size_to_proto
from shared.service_main import device_name
from shared.shapes import FPS, common_sizes
from shared.tensors.framing import spec_from_proto
from shared.tensors.service import TensorServer
from shared.tensors.transport import TensorResolver

_REFERENCES: tuple[Literal["prompt", "video_negative", "audio_negative", "first_frame_latent"], ...] = (
    "prompt",
    "video_negative",
    "audio_negative",
    "first_frame_latent",
)
_FETCH_TIMEOUT_S = 60.0
_MAX_INPUT_BYTES = 64 << 20
"""Far above the largest legal input: 512 rows of 4096 float32 are 8 MiB."""


class FusionServicer(pb_grpc.FusionServiceServicer):
    """Denoise and DescribeModel over one engine."""

    def __init__(
        self,
        engine: FusionEngine,
        worker: DeviceWorker,
        resolver: TensorResolver,
        tensors: TensorServer,
        options: FusionOptions,
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._resolver = resolver
        self._tensors = tensors
        self._options = options

    async def Denoise(
        self, request: pb.DenoiseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DenoiseResponse]:
        spec, references = self._checked(request)
        names = list(references)
        remaining_s = context.time_remaining()
        timeout_s = _FETCH_TIMEOUT_S if remaining_s is None else min(_FETCH_TIMEOUT_S, remaining_s)
        tensors = await asyncio.gather(*(self._fetch(name, references[name], timeout_s) for name in names))
        fetched = dict(zip(names, tensors, strict=True))
        inputs = RunInputs(
            prompt_LC=fetched["prompt"],
            video_negative_LC=fetched.get("video_negative"),
            audio_negative_LC=fetched.get("audio_negative"),
            first_frame_C1HW=fetched.get("first_frame_latent"),
        )
        if violations := check_finite(inputs):
            raise InvalidRequest(violations)
        async with contextlib.aclosing(self._worker.stream(lambda: self._engine.denoise(spec, inputs))) as events:
            async for event in events:
                yield pb.DenoiseResponse(step=_step(event)) if isinstance(event, StepDone) else self._result(event)

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        variants = [self._variant(served) for served in self._engine.served.values()]
        variants += [pb.Variant(id=model, problem=reason) for model, reason in self._engine.problems.items()]
        return pb.DescribeModelResponse(
            variants=variants,
            device=device_name(self._options.stage.device),
            kernels=self._engine.ops.name,
            num_pending=self._worker.num_pending,
            plan=self._options.plan.describe(),
        )

    def _checked(self, request: pb.DenoiseRequest) -> tuple[RunSpec, dict[str, tensor_pb2.TensorRef]]:
        served = self._engine.variant(request.model)
        options = sampling_options_from_proto(request.options, prefix="options.")
        spec = RunSpec(request.model, request.height, request.width, options)
        references: dict[str, tensor_pb2.TensorRef] = {
            name: getattr(request, name) for name in _REFERENCES if request.HasField(name)
        }
        shapes = {}
        for name, reference in references.items():
            tensor = spec_from_proto(reference.spec, field=f"{name}.spec", max_bytes=_MAX_INPUT_BYTES)
            shapes[name] = TensorShape(tensor.dtype, tensor.shape)
        if violations := check_run(spec, shapes, served):
            raise InvalidRequest(violations)
        return spec, references

    async def _fetch(self, name: str, reference: tensor_pb2.TensorRef, timeout_s: float) -> torch.Tensor:
        return await asyncio.to_thread(
            self._resolver.fetch, reference, field=name, max_bytes=_MAX_INPUT_BYTES, timeout_s=timeout_s
        )

    def _result(self, latents: Latents) -> pb.DenoiseResponse:
        video, audio = (
            self._tensors.publish(self._tensors.store.put(tensor)) for tensor in (latents.video_CFHW, latents.audio_SC)
        )
        return pb.DenoiseResponse(result=pb.Result(video_latent=video, audio_latent=audio))

    def _variant(self, served: ServedVariant) -> pb.Variant:
        variant, file = served.variant, served.file
        return pb.Variant(
            id=variant.id,
            loaded=self._engine.loaded_id == variant.id,
            video_area=served.video_area,
            sizes=[size_to_proto(*size) for size in common_sizes(served.video_area)],
            num_frames=variant.num_frames,
            fps=FPS,
            audio_latent_length=served.audio_shape.length,
            num_layers=file.config.num_layers,
            text_dim=file.config.text_dim,
            prompt_format=prompt_format_to_proto(variant.prompt_format),
            precision=f"{file.precision} weights, {self._engine.arithmetic}",
            fingerprint=served.fingerprint,
        )


def _step(event: StepDone) -> pb.Step:
    return pb.Step(index=event.index, total=event.total, sigma=event.sigma, seconds=event.seconds, reused=event.reused)
