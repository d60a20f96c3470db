"""gRPC bootstrap of every service: errors, request ids, health, reflection, readiness, drain."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
import torch
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_status import rpc_status

from shared.errors import Internal, InvalidRequest, OutOfMemory, OviError, QuotaExceeded, Unavailable
from shared.grpc_client import REQUEST_ID_KEY
from shared.logging import get_logger
from shared.tls import PLAIN, Tls, add_secure_port

log = get_logger(__name__)

CONNECTION_OPTIONS = [
    ("grpc.max_allowed_incoming_connections", 4096),
    # Of one connection; a thousand watchers may share it.
    ("grpc.max_concurrent_streams", 2048),
    # For TLS and the client's first frames.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # A client whose machine is gone says nothing: it is asked once a minute.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ask, too, at most so often.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
"""Of every port: how many connections, and for how long one may say nothing."""
_SERVER_OPTIONS = [
    *CONNECTION_OPTIONS,
    ("grpc.max_receive_message_length", 4 << 20),
    # Of all headers of a call together: refused beyond this, where gRPC's own soft limit refuses at random.
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
]


def status_of(error: Exception) -> grpc.Status:
    """The gRPC status of any exception, by the table in `shared.errors`; unknown ones are logged under a new id."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        what = str(error).splitlines()[0]
        error = OutOfMemory(f"out of device memory: {what} Ask for a smaller size, or free the device")
    if not isinstance(error, OviError):
        error_id = secrets.token_hex(8)
        log.error("unexpected error", error_id=error_id, exc_info=error)
        error = Internal(f"internal error {error_id}; the service's log has the details under this id")
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="ovi-serve")]
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        details.append(bad)
    if isinstance(error, QuotaExceeded):
        failure = error_details_pb2.QuotaFailure()
        failure.violations.add(subject=error.subject, description=error.message[:1000])
        details.append(failure)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(retry)
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    code = code_pb2.Code.Value(error.code)
    return rpc_status.to_status(status_pb2.Status(code=code, message=error.message[:4000], details=packed))


class Phase(enum.Enum):
    """Life of a service."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Readiness:
    """The one place that knows a service's phase; keeps health in step with it."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self.phase = Phase.LOADING
        self.health = health.aio.HealthServicer()
        self._names = ("", *service_names)

    async def enter(self, phase: Phase) -> None:
        """Change the phase and tell health."""
        self.phase = phase
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if phase is Phase.SERVING else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.health.set(name, status)

    def check(self) -> None:
        """Refuse work outside SERVING.

        Raises:
            Unavailable: loading or draining.
        """
        if self.phase is not Phase.SERVING:
            raise Unavailable(f"the service is {self.phase.value}; try again soon")


@dataclass(frozen=True)
class _Malformed:
    """Bytes that are no message of the method's type; they go on to where the error table answers."""

    reason: str


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return read


def _well_formed(message: Any) -> Any:
    if isinstance(message, _Malformed):
        raise InvalidRequest.of("request", f"is malformed ({message.reason}); encode it by this service's protos")
    return message


async def _each_well_formed(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in messages:
        yield _well_formed(message)


def _request_fields(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> dict[str, str]:
    """What every log line of a call has."""
    given = dict(metadata).get(REQUEST_ID_KEY)
    return {"request_id": given[:128] if isinstance(given, str) else secrets.token_hex(8), "method": method}


Guard = Callable[[grpc.aio.ServicerContext], contextlib.AbstractAsyncContextManager[None]]


def around(
    handler: grpc.RpcMethodHandler,
    guard: Guard,
    *,
    check: Callable[[Any], Any] = lambda request: request,
    read: Callable[[bytes], Any] | None = None,
) -> grpc.RpcMethodHandler:
    """A handler of the same kind that does its work inside of `guard`.

    Args:
        handler: of any of the four kinds.
        guard: entered before the work and left after it.
        check: what the work is given of a request, or of the stream of them; called inside.
        read: bytes to a request; None: as the handler does.
    """
    read = read or handler.request_deserializer
    streamed = handler.request_streaming
    if handler.response_streaming:
        stream = handler.stream_stream or handler.unary_stream

        async def call_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with guard(context), contextlib.aclosing(stream(check(request), context)) as responses:
                async for response in responses:
                    yield response

        wrap = grpc.stream_stream_rpc_method_handler if streamed else grpc.unary_stream_rpc_method_handler
        return wrap(call_stream, read, handler.response_serializer)
    unary = handler.stream_unary or handler.unary_unary

    async def call_unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with guard(context):
            return await unary(check(request), context)

    wrap = grpc.stream_unary_rpc_method_handler if streamed else grpc.unary_unary_rpc_method_handler
    return wrap(call_unary, read, handler.response_serializer)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Around every RPC: readiness, request id in the log, and the error table. Health and reflection pass through."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        check = _each_well_formed if handler.request_streaming else _well_formed
        read = _lenient(handler.request_deserializer)
        return around(handler, lambda context: self._guard(method, context), check=check, read=read)

    @contextlib.asynccontextmanager
    async def _guard(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        # For the rest of the task, which is this call's own. A stream that its caller leaves is closed by another task,
        # where nothing could be taken back.
        structlog.contextvars.bind_contextvars(**_request_fields(method, context.invocation_metadata() or ()))
        try:
            self._readiness.check()
            yield
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            status = status_of(error)
            log.info("call refused", code=status.code.name, **_reason(error))
            await context.abort_with_status(status)


def _reason(error: Exception) -> dict[str, object]:
    """Of a refusal, for the log: of wrong fields only their names, since the rest holds what somebody wrote."""
    if isinstance(error, InvalidRequest):
        return {"fields": sorted({violation.field for violation in error.violations})}
    return {"message": error.message} if isinstance(error, OviError) else {}


class SyncErrorInterceptor(grpc.ServerInterceptor):
    """The error table for thread-pool servers (the data port)."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        read = _lenient(handler.request_deserializer)
        if handler.unary_stream:

            def call_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with _logged_as(method, context), _abort_on_error(context):
                    yield from handler.unary_stream(_well_formed(request), context)

            return grpc.unary_stream_rpc_method_handler(call_stream, read, handler.response_serializer)

        def call_unary(request: Any, context: grpc.ServicerContext) -> Any:
            with _logged_as(method, context), _abort_on_error(context):
                return handler.unary_unary(_well_formed(request), context)

        return grpc.unary_unary_rpc_method_handler(call_unary, read, handler.response_serializer)


@contextlib.contextmanager
def _logged_as(method: str, context: grpc.ServicerContext) -> Iterator[None]:
    with structlog.contextvars.bound_contextvars(**_request_fields(method, context.invocation_metadata())):
        yield


@contextlib.contextmanager
def _abort_on_error(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        context.abort_with_status(status_of(error))


@dataclass(frozen=True)
class GrpcService:
    """A servicer and the generated function that adds it."""

    full_name: str
    add: Callable[[grpc.aio.Server], None]


@dataclass(frozen=True)
class ListenConfig:
    """Where a service listens and how long it drains."""

    host: str
    """Interface; 127.0.0.1 unless told otherwise."""
    port: int
    """TCP port; 0 picks a free one."""
    grace_s: float
    """Seconds that calls under way have to end after SIGTERM."""
    tls: Tls = PLAIN
    """Certificates of the port."""


def _add_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    """Reflection v1alpha and v1; the two differ in the package name only."""
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    name = "grpc.reflection.v1.ServerReflection"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})])


async def serve(
    config: ListenConfig,
    services: Sequence[GrpcService],
    *,
    load: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
    drain: Callable[[], Awaitable[None]] | None = None,
    while_serving: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> None:
    """Serve until SIGTERM or SIGINT: NOT_SERVING while `load` runs, SERVING, NOT_SERVING while draining, then `close`.

    `drain` is called when draining begins; there a service ends calls that would otherwise outlast the grace period.
    `while_serving` runs beside while the service is SERVING, is given the port, and is cancelled when draining begins.
    `interceptors` stand inside of the error table.

    Raises:
        RuntimeError: the port is taken.
        Exception: whatever `load` or `while_serving` raises, after the server has stopped.
    """
    names = [service.full_name for service in services]
    readiness = Readiness(names)
    await readiness.enter(Phase.LOADING)
    server = grpc.aio.server(interceptors=[CallInterceptor(readiness), *interceptors], options=_SERVER_OPTIONS)
    for service in services:
        service.add(server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.health, server)
    reflected = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection"]
    _add_reflection(reflected, server)
    port = add_secure_port(server, config.host, config.port, config.tls)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stopping.set)
    await server.start()
    log.info("listening", address=f"{config.host}:{port}", tls=config.tls.serves)
    beside: asyncio.Task[None] | None = None
    try:
        await _load_or_stop(load, stopping)
        if not stopping.is_set():
            await readiness.enter(Phase.SERVING)
            log.info("serving", services=names)
            if while_serving is not None:
                beside = asyncio.create_task(while_serving(port))
            await _stop_or_fail(stopping, beside)
    finally:
        await readiness.enter(Phase.DRAINING)
        log.info("draining", grace_s=config.grace_s)
        if beside is not None:
            beside.cancel()
            await asyncio.wait({beside})
        if drain is not None:
            await drain()
        await server.stop(config.grace_s)
        await close()
        log.info("stopped")


async def _load_or_stop(load: Callable[[], Awaitable[None]], stopping: asyncio.Event) -> None:
    loading = asyncio.ensure_future(load())
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if loading.done():
        await loading
    else:
        loading.cancel()


async def _stop_or_fail(stopping: asyncio.Event, beside: asyncio.Task[None] | None) -> None:
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({stopped} if beside is None else {stopped, beside}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if beside is not None and beside.done():
        await beside
