"""What a gateway is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from services.gateway.auth.options import SecurityOptions
from services.gateway.http.options import HttpOptions
from shared.grpc_server import ListenConfig

_SHORTEST_LEASE_S = 2.0


@dataclass(frozen=True)
class StageAddresses:
    """host:port of every stage's gRPC service."""

    text_encoder: str
    fusion: tuple[str, ...]
    """Of each replica, at least one."""
    vae: tuple[str, ...]
    """Of each replica, at least one."""

    def __post_init__(self) -> None:
        for name, addresses in (("fusion", self.fusion), ("vae", self.vae)):
            if not addresses or len(set(addresses)) < len(addresses):
                got = ",".join(addresses) or "nothing"
                raise ValueError(f"--{name}: got {got}, allowed is one address or several different ones")


@dataclass(frozen=True)
class Retention:
    """How long ended jobs and their files are kept; the oldest go first. 0 sets no limit."""

    max_age_s: float = 0.0
    """Since a job ended."""
    max_jobs: int = 0
    """Ended ones."""
    max_bytes: int = 0
    """Of the files of all ended jobs."""

    @property
    def limited(self) -> bool:
        """Whether anything ever goes."""
        return bool(self.max_age_s or self.max_jobs or self.max_bytes)

    def __post_init__(self) -> None:
        for flag, value in (("days", self.max_age_s), ("jobs", self.max_jobs), ("gib", self.max_bytes)):
            if not value >= 0:
                raise ValueError(f"--retention-{flag}: got {value}, allowed is 0 (no limit) or more")


@dataclass(frozen=True)
class PipelineOptions:
    """How jobs are worked on."""

    max_concurrent_jobs: int
    """Jobs worked on at once, at least 1; 3 lets one be encoded and one decoded while another is denoised."""
    worker_wait_s: float
    """How long a job waits for a stage that is away, loading or full before it fails."""
    stage_timeout_s: float
    """Most seconds of one stage of one job, waiting included."""
    lease_s: float = 20.0
    """With several gateways: how long others wait for a sign of life before they take one's jobs; at least 2."""
    retention: Retention = field(default_factory=Retention)
    checkpoint_steps: int = 10
    """Steps of a denoise from one checkpoint to the next, which bound what a killed worker costs; 0: none is kept."""
    give_way: bool = False
    """Whether a job at its denoise is set aside for one of higher priority."""

    def __post_init__(self) -> None:
        if not self.lease_s >= _SHORTEST_LEASE_S:
            raise ValueError(f"--lease-s: got {self.lease_s}, allowed is {_SHORTEST_LEASE_S:g} or more")
        if self.checkpoint_steps < 0:
            raise ValueError(f"--checkpoint-steps must be 0 or more, got {self.checkpoint_steps}")
        for name in ("max_concurrent_jobs", "worker_wait_s", "stage_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class GatewayOptions:
    """Flags of the gateway, resolved."""

    listen: ListenConfig
    http_port: int
    """Port of the HTTP side, on the same interface; 0 picks a free one."""
    http: HttpOptions
    data_host: str
    """Interface of the data port; only the stages need to reach it."""
    data_port: int
    """Port of the TensorService that offers kept latents; 0 picks a free one."""
    advertise_host: str
    """Name under which the stages reach this data port."""
    producer_hosts: frozenset[str]
    """Hosts whose tensor references are accepted."""
    data_dir: Path
    """Artifacts and pictures, and the database file, with which it is owned by one gateway at a time."""
    database: sa.URL | None
    """Of PostgreSQL, which several gateways can share; None: a file in the data folder."""
    stages: StageAddresses
    security: SecurityOptions
    """Certificates, and who may come in."""
    pipeline: PipelineOptions
