"""Makes the calls of webhooks: again and again with growing pauses, by whichever gateway is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from services.gateway.auth.caller import LOCAL, acting_as
from services.gateway.engine import GatewayEngine
from services.gateway.http.webhooks.signing import signed_headers
from services.gateway.http.webhooks.store import Webhook, WebhookStore
from services.gateway.http.webhooks.targets import Refused, TargetRules
from services.gateway.jobs.domain import Job
from shared.errors import InvalidRequest, NotFound, OviError
from shared.logging import get_logger
from shared.unending import unending

log = get_logger(__name__)

MAX_ATTEMPTS = 16
"""With the pauses between them about 5 hours."""
_LONGEST_PAUSE_S = 3600.0
_TIMEOUT_S = 10.0
_LEASE_S = 60.0
"""Longer than a call can take; one that was cut by a crash is made again after it."""
_AT_ONCE = 16
_POLL_S = 5.0
_SWEEP_S = 60.0
"""Between two looks for ended jobs whose end this gateway was not told of."""
_GONE = 410


def pause_s(attempts: int) -> float:
    """Seconds until the next attempt, after so many failed ones."""
    return min(2.0 ** (attempts - 1), _LONGEST_PAUSE_S)


class WebhookDelivery:
    """The calls of one gateway."""

    def __init__(
        self,
        engine: GatewayEngine,
        store: WebhookStore,
        rules: TargetRules,
        secret: bytes,
        show: Callable[[Job], dict[str, Any]],
    ) -> None:
        """
        Args:
            engine: knows the jobs.
            store: what is to be called.
            rules: where calls may go.
            secret: for signatures.
            show: a job as JSON values.
        """
        self._engine = engine
        self._store = store
        self._rules = rules
        self._secret = secret
        self._show = show
        self._woken = asyncio.Event()
        self._client = httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, follow_redirects=False)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to call, first what an earlier process has left."""
        self._task = asyncio.create_task(unending("webhooks are called", self._run))

    async def stop(self) -> None:
        """Call nobody any more; calls under way are made again by the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._client.aclose()

    async def job_ended(self, job_id: str) -> None:
        """A job may have ended; somebody may have asked to be told."""
        if await asyncio.to_thread(self._store.wake_ended, time.time(), job_id):
            self._woken.set()

    async def _run(self) -> None:
        swept_s = float("-inf")
        while True:
            self._woken.clear()
            try:
                if time.monotonic() - swept_s > _SWEEP_S:
                    await asyncio.to_thread(self._store.wake_ended, time.time())
                    swept_s = time.monotonic()
                due = await asyncio.to_thread(self._store.claim, time.time(), _LEASE_S, _AT_ONCE)
                await asyncio.gather(*(self._deliver(webhook) for webhook in due))
            except OviError as error:
                log.warning("webhooks have to wait", reason=error.message)
                due = []
            if due:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _POLL_S)

    async def _deliver(self, webhook: Webhook) -> None:
        try:
            with acting_as(LOCAL):
                job = await self._engine.get(webhook.job_id)
            problem, final = await self._call(webhook, job)
        except NotFound:
            return
        except OviError as error:
            problem, final = error.message, False
        attempts = webhook.attempts + 1
        if not problem:
            await asyncio.to_thread(self._store.delivered, webhook.job_id)
            log.info("webhook delivered", job_id=webhook.job_id, attempts=attempts)
            return
        final = final or attempts >= MAX_ATTEMPTS
        next_time_s = None if final else time.time() + pause_s(attempts)
        log.warning("webhook not delivered", job_id=webhook.job_id, attempts=attempts, reason=problem, final=final)
        await asyncio.to_thread(self._store.failed, webhook.job_id, problem, next_time_s)

    async def _call(self, webhook: Webhook, job: Job) -> tuple[str, bool]:
        """What went wrong (empty: nothing), and whether it is of no use to try again."""
        body = json.dumps(
            {"type": f"job.{job.state.value}", "timestamp": round(job.end_time_s or 0), "data": self._show(job)},
            ensure_ascii=False,
        ).encode()
        try:
            target = await self._rules.resolve(self._rules.check(webhook.url, field="webhook_url"))
        except InvalidRequest as error:
            return error.message, True
        except Refused as error:
            return str(error), False
        headers = signed_headers(self._secret, job.id, int(time.time()), body)
        headers |= {"host": target.host_header, "content-type": "application/json", "user-agent": "ovi-serve"}
        try:
            sni = {"sni_hostname": target.url.raw_host.decode("ascii")}
            call = self._client.stream("POST", target.pinned_url, content=body, headers=headers, extensions=sni)
            async with asyncio.timeout(_TIMEOUT_S), call as answer:
                status = answer.status_code
        except TimeoutError:
            return f"no answer within {_TIMEOUT_S:g} s", False
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"[:300], False
        return ("", False) if 200 <= status < 300 else (f"answered {status}", status == _GONE)
