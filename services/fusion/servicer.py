"""FusionService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

import grpc
import torch

from ovi.common.v1 import system_pb2, tensor_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.config import FusionOptions
from services.fusion.engine import FusionEngine, ModeLowered
from services.fusion.planner import explain, largest_clip
from services.fusion.request import RunInputs, RunSpec, ServedVariant, TensorShape, check_finite, check_run
from services.fusion.sampling.denoise import Latents, StepDone
from shared.device_worker import DeviceWorker
from shared.errors import InvalidRequest, OutOfMemory
from shared.generation_proto import prompt_format_to_proto, sampling_options_from_proto, size_to_proto
from shared.memory.modes import RECIPES, VramMode
from shared.memory.turns import DeviceTurns, device_key
from shared.service_main import device_name
from shared.shapes import FPS, common_sizes
from shared.system_proto import memory_plan_to_proto, vram_mode_from_proto, vram_mode_to_proto
from shared.system_service import PlanWish
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
        self._turns = DeviceTurns(device_key(options.stage.device))

    def turn(self, *modes: VramMode) -> contextlib.AbstractAsyncContextManager[None]:
        """Around work on the device in these modes: one stage at a time, if one of them or the present one says so."""
        takes = any(RECIPES[mode].takes_turns for mode in (*modes, self._engine.mode) if mode is not VramMode.AUTO)
        return self._turns.turn() if takes else contextlib.nullcontext()

    async def Denoise(
        self, request: pb.DenoiseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DenoiseResponse]:
        spec, references = self._checked(request)
        # What does not fit is refused before anything is fetched; from here on the mode has a name.
        mode = self._engine.plan(spec.model, spec.vram_mode).mode
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
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.turn(mode))
            stream = self._worker.stream(lambda: self._engine.denoise(spec, inputs, mode))
            async for event in await stack.enter_async_context(contextlib.aclosing(stream)):
                if isinstance(event, StepDone):
                    yield pb.DenoiseResponse(step=_step(event))
                elif isinstance(event, ModeLowered):
                    mode = event.mode
                    yield pb.DenoiseResponse(mode_lowered=_lowered(event))
                else:
                    yield self._result(event, mode)

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
            memory=self.plan(PlanWish(VramMode.AUTO, "", None)),
        )

    def plan(self, wish: PlanWish) -> system_pb2.MemoryPlan:
        """What a wish would take; for SystemService."""
        planner, mode = self._engine.planner, self._engine.mode if wish.mode is VramMode.AUTO else wish.mode
        models = [self._engine.variant(wish.model)] if wish.model else list(self._engine.served.values())
        served = max(models, key=lambda each: largest_clip(each).video)
        try:
            plan, refused = planner.plan(served, mode), ""
        except OutOfMemory as error:
            plan, refused = planner.least(served, mode), error.message
        return memory_plan_to_proto(
            mode,
            plan.components,
            plan.budget_bytes,
            allocation=planner.allocation,
            fits=not refused,
            explanation=refused or explain(plan, served),
        )

    async def set_mode(self, mode: VramMode, model: str) -> system_pb2.MemoryPlan:
        """Switch between two runs; for SystemService."""
        if model:
            model = self._engine.variant(model).variant.id
        else:
            model = self._engine.loaded_id or next(iter(self._engine.served))
        async with self.turn(mode):
            await self._worker.run(lambda: self._engine.set_mode(mode, model))
        return self.plan(PlanWish(VramMode.AUTO, model, None))

    def _checked(self, request: pb.DenoiseRequest) -> tuple[RunSpec, dict[str, tensor_pb2.TensorRef]]:
        served = self._engine.variant(request.model)
        options = sampling_options_from_proto(request.options, prefix="options.")
        mode = vram_mode_from_proto(request.vram_mode, field="vram_mode")
        spec = RunSpec(request.model, request.height, request.width, options, mode)
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

    def _result(self, latents: Latents, mode: VramMode) -> pb.DenoiseResponse:
        video, audio = (
            self._tensors.publish(self._tensors.store.put(tensor)) for tensor in (latents.video_CFHW, latents.audio_SC)
        )
        result = pb.Result(video_latent=video, audio_latent=audio, vram_mode=vram_mode_to_proto(mode))
        return pb.DenoiseResponse(result=result)

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


def _lowered(event: ModeLowered) -> pb.ModeLowered:
    return pb.ModeLowered(vram_mode=vram_mode_to_proto(event.mode), reason=event.reason)


def _step(event: StepDone) -> pb.Step:
    return pb.Step(index=event.index, total=event.total, sigma=event.sigma, seconds=event.seconds, reused=event.reused)
