"""A gateway over scripted stages whose clips are real mp4 files, for clients of every HTTP family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages, scripted_stages
from tests.http.clips import tiny_clip


@pytest.fixture(scope="module")
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.vae.clip = tiny_clip()
        yield stages


@pytest.fixture(scope="module")
def gateway(stages: ScriptedStages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    data_dir: Path = tmp_path_factory.mktemp("gateway") / "data"
    with running_gateway(data_dir, *stages.flags) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def http(gateway: GatewayUnderTest) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.http_url, timeout=60) as http:
        yield http


@pytest.fixture
def by_hand(stages: ScriptedStages) -> Iterator[ScriptedStages]:
    """The fusion service does a step only when the test says so."""
    stages.fusion.automatic = False
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    yield stages
    stages.fusion.automatic = True
