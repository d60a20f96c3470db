"""The studio's Socket.IO events, over the same service as its REST calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import socketio
import structlog

from services.gateway.auth.caller import Action, Caller, acting_as
from services.gateway.auth.gate import Gate, credentials_of
from services.gateway.auth.http_gate import address_of
from services.gateway.http.errors import failure_of
from services.gateway.http.studio_api.objects import Update, studio_id, update_of
from services.gateway.http.studio_api.service import StudioService
from services.gateway.jobs.domain import Job
from shared.errors import InvalidRequest, OviError
from shared.logging import get_logger

log = get_logger(__name__)

_TOLD_ON_CONNECT = 200
"""Newest jobs whose state a client is told when it connects, since it may have missed their end."""
_EVERYBODY = "jobs"
"""Room of those who see all jobs; who sees but its own has a room of its key."""
_CALLER, _ADDRESS = "caller", "address"
"""Keys of a socket's session."""

Handler = Callable[[str, Any], Awaitable[None]]


class StudioSockets:
    """Socket.IO clients of the studio."""

    def __init__(
        self, studio: StudioService, gate: Gate, *, cors_origins: Sequence[str], max_message_bytes: int
    ) -> None:
        self._studio = studio
        self._gate = gate
        self._held: dict[str, contextlib.ExitStack] = {}
        """What each open socket counts as, until it is closed."""
        self._told: dict[str, Update] = {}
        """What was last told of each job that has not ended."""
        self.server = socketio.AsyncServer(
            async_mode="asgi",
            cors_allowed_origins="*" if "*" in cors_origins else list(cors_origins) or None,
            max_http_buffer_size=max_message_bytes,
            logger=False,
            engineio_logger=False,
        )
        self.server.on("connect", self._connect)
        self.server.on("disconnect", self._disconnect)
        self.server.on("submit_job", self._guarded(self._submit))
        self.server.on("cancel_job", self._guarded(self._cancel))

    async def tell(self, job: Job) -> None:
        """Tell every client that a job has changed, unless it looks to them as it did before."""
        update = update_of(job)
        if self._told.get(job.id) == update:
            return
        if job.state.ended:
            self._told.pop(job.id, None)
        else:
            self._told[job.id] = update
        if update.videoUrl is not None:
            update = replace(update, videoUrl=self._gate.link(update.videoUrl))
        for room in (_EVERYBODY, _room_of(job.submission.key_id)):
            await self.server.emit("job_update", asdict(update), room=room)

    async def _connect(self, sid: str, environ: Mapping[str, Any], auth: Any = None) -> None:
        address = address_of(environ.get("asgi.scope", {}))
        with contextlib.ExitStack() as held:
            try:
                caller = await self._gate.admit(_credentials(environ, auth), address)
                held.enter_context(self._gate.watching(caller))
                with acting_as(caller):
                    updates = [update_of(job) for job in await self._studio.listed(_TOLD_ON_CONNECT)]
            except OviError as error:
                raise socketio.exceptions.ConnectionRefusedError(error.message) from None
            self._held[sid] = held.pop_all()
        await self.server.save_session(sid, {_CALLER: caller, _ADDRESS: address})
        own = caller.key_filter
        await self.server.enter_room(sid, _EVERYBODY if own is None else _room_of(own))
        for update in updates:
            await self.server.emit("job_update", asdict(update), to=sid)

    async def _disconnect(self, sid: str, reason: str = "") -> None:
        if (held := self._held.pop(sid, None)) is not None:
            held.close()

    async def _submit(self, sid: str, message: Any) -> None:
        job = await self._studio.submit(_object(message, "a GenerationJob"))
        update = update_of(job)
        await self.server.emit("job_submitted", {"id": update.id, "status": update.status}, to=sid)

    async def _cancel(self, sid: str, message: Any) -> None:
        label = _object(message, '{"id": ...}').get("id")
        if not isinstance(label, str):
            raise InvalidRequest.of("id", f"got {str(label)[:80]!r}, allowed is the id of a job")
        job = await self._studio.cancel(label)
        await self.server.emit("job_cancelled", {"id": studio_id(job)}, to=sid)

    def _guarded(self, handle: Handler) -> Callable[..., Awaitable[None]]:
        """Around every event: the error table, as an `error` event to the sender."""

        async def call(sid: str, *messages: Any) -> None:
            with structlog.contextvars.bound_contextvars(socket=sid):
                try:
                    session = await self.server.get_session(sid)
                    caller: Caller = session[_CALLER]
                    await self._gate.readmit(caller)
                    self._gate.check(caller, Action.MAKE, f"socket {handle.__name__}", session[_ADDRESS])
                    if len(messages) != 1:
                        raise InvalidRequest.of("message", f"got {len(messages)} arguments, allowed is one object")
                    with acting_as(caller):
                        await handle(sid, messages[0])
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    await self.server.emit("error", {"message": failure_of(error).message}, to=sid)

        return call


def _room_of(key_id: str) -> str:
    return f"key {key_id}"


def _credentials(environ: Mapping[str, Any], auth: Any) -> str:
    """The key of a socket: `auth: {token: KEY}` of the client, or the handshake's headers."""
    if isinstance(auth, Mapping):
        given = auth.get("token") or auth.get("apiKey")
        if isinstance(given, str):
            return given
    names = {"authorization": "HTTP_AUTHORIZATION", "x-api-key": "HTTP_X_API_KEY"}
    return credentials_of({name: str(environ.get(key, "")) for name, key in names.items()})


def _object(message: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest.of("message", f"got {type(message).__name__}, allowed is {what}")
    return message
