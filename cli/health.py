"""`ovi health`: what a service's health says, as an exit status."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated

import grpc.aio
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.connection import Connection, chosen_connection
from cli.errors import CommandFailed, errors_in_words


def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the gateway, or of a stage.")],
    service: Annotated[str, typer.Option(help="One gRPC service of it, by its full name; all of them if empty.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Ask a service's gRPC health, for which no key is needed; for health checks of containers.

    Exit status: 0 it serves; 1 it does not, or cannot be reached.
    """
    with errors_in_words():
        typer.echo(asyncio.run(_ask(address, service, timeout_s, replace(chosen_connection(), api_key=""))))


async def _ask(address: str, service: str, timeout_s: float, connection: Connection) -> str:
    async with connection.open(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise CommandFailed(f"{address}: {error.code().name}, {error.details()}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise CommandFailed(f"{address}: {status}")
    return status
