"""TextEncoderService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from ovi.text_encoder.v1 import text_encoder_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2_grpc as pb_grpc
from services.text_encoder.config import MAX_TOKENS, TextEncoderOptions
from services.text_encoder.engine import Encoded, TextEngine
from shared.device_worker import DeviceWorker
from shared.errors import FieldViolation, InvalidRequest, ResourceExhausted
from shared.generation_proto import prompt_format_from_proto
from shared.service_main import device_name
from shared.tensors.service import TensorServer
from shared.tensors.store import Lease
from shared.variants import PromptFormat

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

    def __init__(self, options: TextEncoderOptions, worker: DeviceWorker, tensors: TensorServer) -> None:
        """
        Args:
            options: of the service.
            worker: owns the device.
            tensors: holds and serves the results.
        """
        self._options = options
        self._worker = worker
        self._tensors = tensors
        self._engine: TextEngine | None = None

    async def load(self) -> None:
        """Load the engine on the device's thread; calls are refused until this has ended.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit.
        """
        options = self._options
        self._engine = await self._worker.run(
            lambda: TextEngine.read(
                options.stage.checkpoints,
                device=options.stage.device,
                precision=options.stage.precision,
                cache_bytes=options.cache_bytes,
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
            encoded = [item async for item in work]
        return pb.EncodeResponse(embeddings=self._publish(encoded))

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
