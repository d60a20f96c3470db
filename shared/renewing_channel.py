"""A gRPC channel whose credentials are renewed while it is in use."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import grpc.aio

from shared.renewal import Renewal

Open = Callable[[grpc.ChannelCredentials], grpc.aio.Channel]


class RenewingChannel(grpc.aio.Channel):
    """gRPC cannot change a channel's credentials, so with new ones another is opened, for all calls from there on.

    Calls that are under way end on the one that they began with.
    """

    def __init__(self, credentials: Renewal[grpc.ChannelCredentials], open_with: Open) -> None:
        """
        Args:
            credentials: looked at with every call.
            open_with: opens a channel.
        """
        self._credentials = credentials
        self._open = open_with
        self._channel = open_with(credentials.current)
        self._calls: WeakKeyDictionary[object, grpc.aio.Channel] = WeakKeyDictionary()
        """What their callers hold, and their channels. A channel that nobody holds any more closes itself."""

    def _current(self) -> grpc.aio.Channel:
        if self._credentials.look():
            self._channel = self._open(self._credentials.current)
        return self._channel

    def _callable(self, kind: str, method: str, options: dict[str, Any]) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:
            channel = self._current()
            call = getattr(channel, kind)(method, **options)(*args, **kwargs)
            self._calls[call] = channel
            return call

        return begin

    def unary_unary(self, method: str, **options: Any) -> Any:
        return self._callable("unary_unary", method, options)

    def unary_stream(self, method: str, **options: Any) -> Any:
        return self._callable("unary_stream", method, options)

    def stream_unary(self, method: str, **options: Any) -> Any:
        return self._callable("stream_unary", method, options)

    def stream_stream(self, method: str, **options: Any) -> Any:
        return self._callable("stream_stream", method, options)

    async def close(self, grace: float | None = None) -> None:
        for channel in {self._channel, *self._calls.values()}:
            await channel.close(grace)

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()
