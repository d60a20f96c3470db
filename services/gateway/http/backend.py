"""What the routers stand on."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from services.gateway.artifacts import Artifacts
from services.gateway.engine import GatewayEngine
from services.gateway.metrics import GatewayMetrics
from services.gateway.stages import StageClients
from services.gateway.system import StackSystem
from shared.errors import Unavailable
from shared.memory.watcher import DeviceWatcher


class GatewayPhase:
    """Whether the gateway itself takes work; the HTTP side answers from the start of the process."""

    def __init__(self) -> None:
        self.serving = False

    def require_serving(self) -> None:
        """Refuse work while loading or draining.

        Raises:
            Unavailable: not serving.
        """
        if not self.serving:
            raise Unavailable("the gateway is loading or draining; try again soon")


@dataclass(frozen=True)
class Backend:
    """The gateway behind the HTTP side."""

    engine: GatewayEngine
    database: sa.Engine
    clients: StageClients
    artifacts: Artifacts
    metrics: GatewayMetrics
    phase: GatewayPhase
    system: StackSystem
    watcher: DeviceWatcher
    kept_s: float = 0.0
    """How long clips are kept after their end; 0: for ever, as far as their age goes."""
