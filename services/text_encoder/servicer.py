"""TextEncoderService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import grpc

from ovi.common.v1 import system_pb2
from ovi.text_encoder.v1 import text_encoder_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2_grpc as pb_grpc
from services.text_encoder.config import MAX_TOKENS, TextEncoderOptions
from services.text_encoder.engine import Encoded, TextEngine
from services.text_encoder.memory import TextEncoderMemory
from shared.device_worker import DeviceWorker
from shared.errors import FieldViolation, InvalidRequest, OutOfMemory, ResourceExhausted
from shared.generation_proto import prompt_format_from_proto
from shared.logging import get_logger
from shared.memory.modes import VramMode
from shared.memory.turns import DeviceTurns, device_key
from shared.service_main import device_name
from shared.system_proto import memory_plan_to_proto, vram_mode_to_proto
from shared.system_service import CallCount, PlanWish
from shared.tensors.service import TensorServer
from shared.tensors.store import Lease
from shared.variants import PromptFormat

log = get_logger(__name__)

MAX_PROMPTS = 16
MAX_PROMPT_CHARACTERS = 5000


def checked_format(request: pb.EncodeRequest) -> PromptFormat:
    """Check a whole request; the prompt format it asks for.

    Raises:
        InvalidRequest: with every violation.
    """
    violations = []
    count = len(request.prompts)
    if not 1 <= count <= MAX_PROMPTS:
        violations.append(FieldViolation("prompts", f"got {count} prompts, allowed is 1 to {MAX_PROMPTS}"))
    for index, prompt in enumerate(request.prompts[:MAX_PROMPTS]):
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            what = f"got {len(prompt)} characters, allowed is at most {MAX_PROMPT_CHARACTERS}"
            violations.append(FieldViolation(f"prompts[{index}]", what))
    if request.num_pinned > count:
        what = f"got {request.num_pinned}, allowed is 0 to the number of prompts, {count}"
        violations.append(FieldViolation("num_pinned", what))
    prompt_format = PromptFormat.AS_IS
    try:
        prompt_format = prompt_format_from_proto(request.prompt_format, field="prompt_format")
    except InvalidRequest as error:
        violations.extend(error.violations)
    if violations:
        raise InvalidRequest(violations)
    return prompt_format


class TextEncoderServicer(pb_grpc.TextEncoderServiceServicer):
    """Encode and DescribeModel over one engine."""

    def __init__(
        self,
        options: TextEncoderOptions,
        worker: DeviceWorker,
        tensors: TensorServer,
        turns: DeviceTurns | None = None,
    ) -> None:
        """
        Args:
            options: of the service.
            worker: owns the device.
            tensors: holds and serves the results.
            turns: on the device; None: those of this host.
        """
        self._options = options
        self._worker = worker
        self._tensors = tensors
        self._turns = turns
        self._engine: TextEngine | None = None
        self._memory: TextEncoderMemory | None = None
        self._mode = options.stage.vram_mode
        self._calls = CallCount()

    def turn(self, *modes: VramMode) -> contextlib.AbstractAsyncContextManager[None]:
        """Have the device within, if it is used in turns in one of these modes."""
        if not any(self._planned().takes_turns(mode) for mode in modes):
            return contextlib.nullcontext()
        if self._turns is None:
            self._turns = DeviceTurns(device_key(self._options.stage.device))
        return self._turns.turn()

    async def load(self) -> None:
        """Load the engine on the device's thread; calls are refused until this has ended.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit.
            OutOfMemory: the mode takes more than there is, or every mode does.
        """
        stage = self._options.stage
        memory = await self._worker.run(lambda: TextEncoderMemory.of(self._options))
        self._memory, self._mode = memory, memory.settle(stage.vram_mode)
        log.info("memory mode", plan=memory.explain(self._mode))
        async with self.turn(self._mode):
            self._engine = await self._worker.run(
                lambda: TextEngine.read(
                    stage.checkpoints,
                    device=stage.device,
                    precision=stage.precision,
                    cache_bytes=self._options.cache_bytes,
                    place=memory.place(self._mode),
                )
            )

    async def Encode(self, request: pb.EncodeRequest, context: grpc.aio.ServicerContext) -> pb.EncodeResponse:
        prompt_format = checked_format(request)
        engine = self._loaded()
        texts = await asyncio.to_thread(engine.prepare, request.prompts, prompt_format)
        found = engine.cached(texts, request.num_pinned)
        encoded = [item for item in found if item is not None]
        if len(encoded) < len(texts):
            work = self._worker.stream(lambda: engine.encode(texts, request.num_pinned))
            with self._calls.counting():
                async with self.turn(self._mode), contextlib.aclosing(work):
                    encoded = [item async for item in work]
        return pb.EncodeResponse(embeddings=self._publish(encoded))

    def describe(self) -> system_pb2.Worker:
        """This stage as a worker; for SystemService."""
        mode = vram_mode_to_proto(self._mode)
        return system_pb2.Worker(
            stage="text_encoder",
            loaded_vram_mode=mode,
            vram_mode=mode,
            allocation="single",
            num_pending=self._calls.number,
            num_cut=self._worker.cuts.number,
            cut_s=self._worker.cuts.seconds,
        )

    def plan(self, wish: PlanWish) -> system_pb2.MemoryPlan:
        """What a wish would take; for SystemService. Neither variant nor size change it."""
        memory = self._planned()
        mode = self._mode if wish.mode is VramMode.AUTO else wish.mode
        lacking = None
        try:
            memory.plan(mode)
        except OutOfMemory as error:
            lacking = error.message
        return memory_plan_to_proto(
            mode,
            memory.components(mode),
            memory.budget_bytes,
            fits=lacking is None,
            explanation=lacking or memory.explain(mode),
        )

    async def set_mode(self, mode: VramMode, model: str) -> system_pb2.MemoryPlan:
        """Switch between two calls; for SystemService. Every variant has the same text encoder."""
        memory, engine = self._planned(), self._loaded()
        settled = memory.settle(mode)
        before, self._mode = self._mode, settled  # calls that come meanwhile follow the switch, and know its turns
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, self, "_mode", before)
            async with self.turn(before, settled):
                await self._worker.run(lambda: engine.move(memory.place(settled)))
            undo.pop_all()
        return self.plan(PlanWish(VramMode.AUTO, "", None))

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        engine = self._loaded()
        return pb.DescribeModelResponse(
            fingerprint=engine.fingerprint,
            text_dim=engine.config.dim,
            max_tokens=MAX_TOKENS,
            device=device_name(self._options.stage.device),
            precision=str(self._options.stage.precision).removeprefix("torch."),
            num_encoded=engine.num_encoded,
        )

    def _loaded(self) -> TextEngine:
        assert self._engine is not None, "calls come after loading only"
        return self._engine

    def _planned(self) -> TextEncoderMemory:
        assert self._memory is not None, "calls come after loading only"
        return self._memory

    def _publish(self, encoded: Sequence[Encoded]) -> list[pb.Embedding]:
        leases: list[Lease] = []
        try:
            for item in encoded:
                leases.append(self._tensors.store.put(item.embedding.rows_LC, spec=item.embedding.spec))
        except ResourceExhausted:
            for lease in leases:
                self._tensors.store.release(lease.tensor_id)
            raise
        return [
            pb.Embedding(
                tensor=self._tensors.publish(lease),
                cleaned_prompt=item.text,
                truncated=item.embedding.truncated,
                cached=item.cached,
            )
            for item, lease in zip(encoded, leases, strict=True)
        ]
