"""The gate on gRPC's side."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import unquote

import grpc
import grpc.aio

from services.gateway.auth.caller import act_as
from services.gateway.auth.gate import Gate, credentials_of
from services.gateway.auth.policy import WATCHES, action_of_rpc
from shared.grpc_server import around


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Around every RPC but health and reflection, inside of the error table."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        action = action_of_rpc(method)

        @contextlib.asynccontextmanager
        async def admitted(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
            metadata = context.invocation_metadata() or ()
            headers = {key: value for key, value in metadata if isinstance(value, str)}
            address = address_of(context.peer())
            caller = await self._gate.admit(credentials_of(headers), address)
            self._gate.check(caller, action, method, address)
            # The task is this call's own; see `CallInterceptor` for why nothing is taken back.
            act_as(caller)
            with self._gate.watching(caller) if method in WATCHES else contextlib.nullcontext():
                yield

        return around(handler, admitted)


def address_of(peer: str) -> str:
    """The address in gRPC's name of the other end: ipv4:127.0.0.1:1234, ipv6:%5B::1%5D:1234."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer
