"""FusionService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Literal

import grpc
import torch

from ovi.common.v1 import system_pb2, tensor_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.config import FusionOptions
from services.fusion.engine import FusionEngine
from services.fusion.planner import explain, largest_clip
from services.fusion.request import RunInputs, RunSpec, ServedVariant, TensorShape, check_finite, check_run
from services.fusion.run_stream import Event, RunStream
from services.fusion.sampling.control import RunControl
from services.fusion.sampling.denoise import RunState
from services.fusion.sampling.run_file import Identity, RunShape, UnusableState, mode_of, unpack
from shared.device_worker import DeviceWorker
from shared.errors import CorruptTensor, FieldViolation, InvalidRequest, OutOfMemory, ReferenceLost
from shared.generation_proto import prompt_format_to_proto, sampling_options_from_proto, size_to_proto
from shared.logging import get_logger
from shared.memory.modes import LOWER, RECIPES, VramMode, may_become
from shared.memory.turns import DeviceTurns, device_key
from shared.service_main import device_name
from shared.shapes import FPS, common_sizes
from shared.system_proto import memory_plan_to_proto, vram_mode_from_proto, vram_mode_to_proto
from shared.system_service import CallCount, PlanWish
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
_MAX_CHECKPOINT_BYTES = 256 << 20
"""Far above the largest: four tensors of 48 x 61 x 60 x 60 float32 are 169 MB."""
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = get_logger(__name__)


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
        self._calls = CallCount()
        self._runs: dict[str, RunControl] = {}
        """Those that have a name, by it."""

    def turn(self, *modes: VramMode) -> contextlib.AbstractAsyncContextManager[None]:
        """Around work on the device in these modes: one stage at a time, if one of them or the present one says so."""
        takes = any(RECIPES[mode].takes_turns for mode in (*modes, self._engine.mode) if mode is not VramMode.AUTO)
        return self._turns.turn() if takes else contextlib.nullcontext()

    async def Denoise(
        self, request: pb.DenoiseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DenoiseResponse]:
        spec, references = self._checked(request)
        with self._calls.counting():
            async with contextlib.aclosing(self._run(request, context, spec, references)) as messages:
                async for message in messages:
                    yield message

    async def _run(
        self,
        request: pb.DenoiseRequest,
        context: grpc.aio.ServicerContext,
        spec: RunSpec,
        references: dict[str, tensor_pb2.TensorRef],
    ) -> AsyncGenerator[pb.DenoiseResponse, None]:
        # What does not fit is refused before anything is fetched; from here on the mode has a name.
        mode = self._engine.plan(spec.model, spec.vram_mode).mode
        remaining_s = context.time_remaining()
        timeout_s = _FETCH_TIMEOUT_S if remaining_s is None else min(_FETCH_TIMEOUT_S, remaining_s)
        inputs = await self._inputs(references, timeout_s)
        identify = functools.cache(functools.partial(self._engine.identity, spec, inputs))
        start, refused = None, ""
        if request.HasField("checkpoint"):
            mode, start, refused = await self._start(request.checkpoint, timeout_s, spec, mode, identify)
        begun = pb.Begun(checkpoint_refused=refused)
        if start is not None:
            begun.steps_done, begun.steps_reused = start.steps_done, start.steps_reused
        control = RunControl(request.checkpoint_steps)

        def run() -> Iterator[Event]:
            return control.steer(self._engine.denoise(spec, inputs, mode, start), begun.steps_done)

        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._named(request.run_id, control))
            await stack.enter_async_context(self.turn(mode))
            events = await stack.enter_async_context(contextlib.aclosing(self._worker.stream(run)))
            messages = RunStream(self._tensors, control, mode, identify, begun).messages(events)
            async for message in await stack.enter_async_context(contextlib.aclosing(messages)):
                yield message

    async def PauseRun(self, request: pb.PauseRunRequest, context: grpc.aio.ServicerContext) -> pb.PauseRunResponse:
        if not _RUN_ID.fullmatch(request.run_id):
            raise InvalidRequest([_bad_run_id(request.run_id)])
        control = self._runs.get(request.run_id)
        return pb.PauseRunResponse(running=control is not None and control.pause())

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

    def describe(self) -> system_pb2.Worker:
        """This stage as a worker; for SystemService."""
        return system_pb2.Worker(
            stage="fusion",
            models=list(self._engine.served),
            loaded_model=self._engine.loaded_id or "",
            loaded_vram_mode=vram_mode_to_proto(self._engine.loaded_mode),
            vram_mode=vram_mode_to_proto(self._engine.mode),
            allocation=self._engine.planner.allocation,
            num_pending=self._calls.number,
            num_cut=self._worker.cuts.number,
            cut_s=self._worker.cuts.seconds,
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
        violations = check_run(spec, shapes, served)
        if request.run_id and not _RUN_ID.fullmatch(request.run_id):
            violations.append(_bad_run_id(request.run_id))
        if violations:
            raise InvalidRequest(violations)
        return spec, references

    async def _inputs(self, references: dict[str, tensor_pb2.TensorRef], timeout_s: float) -> RunInputs:
        tensors = await asyncio.gather(*(self._fetch(name, ref, timeout_s) for name, ref in references.items()))
        fetched = dict(zip(references, tensors, strict=True))
        inputs = RunInputs(
            prompt_LC=fetched["prompt"],
            video_negative_LC=fetched.get("video_negative"),
            audio_negative_LC=fetched.get("audio_negative"),
            first_frame_C1HW=fetched.get("first_frame_latent"),
        )
        if violations := check_finite(inputs):
            raise InvalidRequest(violations)
        return inputs

    async def _fetch(
        self, name: str, reference: tensor_pb2.TensorRef, timeout_s: float, *, max_bytes: int = _MAX_INPUT_BYTES
    ) -> torch.Tensor:
        return await asyncio.to_thread(
            self._resolver.fetch, reference, field=name, max_bytes=max_bytes, timeout_s=timeout_s
        )

    async def _start(
        self,
        reference: tensor_pb2.TensorRef,
        timeout_s: float,
        spec: RunSpec,
        mode: VramMode,
        identify: Callable[[VramMode], Identity],
    ) -> tuple[VramMode, RunState | None, str]:
        """In which mode the run goes on, and the state in a checkpoint; or None, and why it is not used."""
        try:
            file = await self._fetch("checkpoint", reference, timeout_s, max_bytes=_MAX_CHECKPOINT_BYTES)
        except (InvalidRequest, ReferenceLost, CorruptTensor) as error:
            log.warning("a checkpoint cannot be fetched; the run begins at its first step", reason=error.message)
            return mode, None, f"the checkpoint cannot be fetched: {error.message}"
        # A run whose mode was lowered goes on in that one: in the first one memory would run out again.
        made_in = mode_of(file)
        if made_in in LOWER[mode] and may_become(spec.vram_mode, made_in) and self._fits(spec.model, made_in):
            mode = made_in
        return mode, *await asyncio.to_thread(self._opened, file, spec, lambda: identify(mode))

    def _fits(self, model: str, mode: VramMode) -> bool:
        try:
            self._engine.plan(model, mode)
        except OutOfMemory:
            return False
        return True

    def _opened(
        self, file: torch.Tensor, spec: RunSpec, identify: Callable[[], Identity]
    ) -> tuple[RunState | None, str]:
        """The state in a checkpoint; or None, and why it is not used."""
        served = self._engine.served[spec.model]
        video = served.video_shape(spec.height, spec.width).as_tuple()
        try:
            return unpack(file, identify(), RunShape(video, served.audio_shape.as_tuple(), spec.options)), ""
        except UnusableState as error:
            log.warning("a checkpoint is not used; the run begins at its first step", reason=str(error))
            return None, str(error)

    @contextlib.contextmanager
    def _named(self, run_id: str, control: RunControl) -> Iterator[None]:
        """While a run can be paused by its name; a second run of one name takes it over."""
        if not run_id:
            yield
            return
        self._runs[run_id] = control
        try:
            yield
        finally:
            if self._runs.get(run_id) is control:
                del self._runs[run_id]

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


def _bad_run_id(run_id: str) -> FieldViolation:
    return FieldViolation("run_id", f"got {run_id[:80]!r}, allowed are 1 to 64 characters of [A-Za-z0-9._-]")
