"""Webhooks as the APIs use them: checked, kept, and told to whoever asked."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from services.gateway.http.backend import Backend
from services.gateway.http.jobs_api.schemas import job_view
from services.gateway.http.options import HttpOptions
from services.gateway.http.webhooks.delivery import WebhookDelivery
from services.gateway.http.webhooks.signing import read_secret
from services.gateway.http.webhooks.store import WebhookStore
from services.gateway.http.webhooks.targets import TargetRules
from services.gateway.jobs.domain import Job
from shared.errors import InvalidRequest, OviError
from shared.logging import get_logger

log = get_logger(__name__)

_FIELD = "webhook_url"


def make_webhooks(backend: Backend, options: HttpOptions) -> Webhooks:
    """The webhooks of a gateway.

    Raises:
        ValueError: the secret cannot be used; names the flag.
    """
    store = WebhookStore(backend.database)
    rules = TargetRules(options.webhook_hosts, allow_private=options.webhook_private)
    if options.webhook_secret_file is None:
        return Webhooks(store, rules, None)
    secret = read_secret(options.webhook_secret_file)

    def show(job: Job) -> dict[str, Any]:
        return job_view(job).model_dump(mode="json")

    return Webhooks(store, rules, WebhookDelivery(backend.engine, store, rules, secret, show))


class Webhooks:
    """Who is to be told of the ends of jobs."""

    def __init__(self, store: WebhookStore, rules: TargetRules, delivery: WebhookDelivery | None) -> None:
        """
        Args:
            store: the table.
            rules: where calls may go.
            delivery: makes the calls; None: this gateway has no secret to sign them with, and takes none.
        """
        self._store = store
        self._rules = rules
        self._delivery = delivery

    def check(self, url: str) -> httpx.URL:
        """Return if a job may name this URL.

        Raises:
            InvalidRequest: it may not.
        """
        if self._delivery is None:
            what = "is given, but this gateway calls nobody: it was started without --webhook-secret-file"
            raise InvalidRequest.of(_FIELD, what)
        return self._rules.check(url, field=_FIELD)

    async def add(self, job: Job, url: str) -> None:
        """Keep that a URL is to be told of the end of a job, which may have come since the job was created."""
        await asyncio.to_thread(self._store.add, job.id, url)
        if self._delivery is not None:
            await self._delivery.job_ended(job.id)

    async def job_changed(self, job: Job) -> None:
        """A job has changed; if it has ended, who asked is told."""
        if self._delivery is None or not job.state.ended:
            return
        try:
            await self._delivery.job_ended(job.id)
        except OviError as error:
            log.warning("webhooks have to wait", job_id=job.id, reason=error.message)

    def start(self) -> None:
        """Begin to call."""
        if self._delivery is not None:
            self._delivery.start()

    async def stop(self) -> None:
        """Call nobody any more."""
        if self._delivery is not None:
            await self._delivery.stop()
