"""What a gateway is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from services.gateway.auth.options import SecurityOptions
from services.gateway.http.options import HttpOptions
from shared.grpc_server import ListenConfig
from shared.places import Name, Place, parse_place

_SHORTEST_LEASE_S = 2.0


REGISTERED = "registered"
"""In the place of an address: workers that register themselves."""


@dataclass(frozen=True)
class StagePlaces:
    """Where the workers of one stage are."""

    given: tuple[Place | Name, ...]
    """Addresses, and names that are looked up again and again."""
    registered: bool = False
    """Whether workers may register themselves, too."""

    @classmethod
    def parse(cls, flag: str, text: str) -> StagePlaces:
        """From host:port, dns:///name:port and `registered`, comma-separated, at least one of them.

        Raises:
            ValueError: it is something else; names the flag.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts or len(set(parts)) < len(parts):
            got = ",".join(parts) or "nothing"
            raise ValueError(f"{flag}: got {got}, allowed is one address or several different ones")
        try:
            return cls(tuple(parse_place(part) for part in parts if part != REGISTERED), REGISTERED in parts)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}, dns:///name:port or {REGISTERED}") from None


@dataclass(frozen=True)
class StageAddresses:
    """Where the workers of each stage are."""

    text_encoder: StagePlaces
    fusion: StagePlaces
    vae: StagePlaces

    @property
    def by_stage(self) -> dict[str, StagePlaces]:
        """By the stage's name."""
        return {"text_encoder": self.text_encoder, "fusion": self.fusion, "vae": self.vae}


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
    """Jobs worked on at once; 0: as many as there are fusion workers for this gateway, and two."""
    worker_wait_s: float
    """How long a job waits for a stage that is away, loading or full before it fails."""
    stage_timeout_s: float
    """Most seconds of one stage of one job, waiting included."""
    lease_s: float = 20.0
    """With several gateways: how long others wait for a sign of life before they take one's jobs; at least 2."""
    retention: Retention = field(default_factory=Retention)
    checkpoint_steps: int = 10
    """Most steps of a denoise that are made again if its worker or gateway is killed; 0: no checkpoint is kept."""
    give_way: bool = False
    """Whether a job at its denoise is set aside for one of higher priority."""

    def __post_init__(self) -> None:
        if not self.lease_s >= _SHORTEST_LEASE_S:
            raise ValueError(f"--lease-s: got {self.lease_s}, allowed is {_SHORTEST_LEASE_S:g} or more")
        if self.checkpoint_steps < 0:
            raise ValueError(f"--checkpoint-steps must be 0 or more, got {self.checkpoint_steps}")
        if self.max_concurrent_jobs < 0:
            raise ValueError(f"--max-concurrent-jobs must be 0 or more, got {self.max_concurrent_jobs}")
        for name in ("worker_wait_s", "stage_timeout_s"):
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
    artifacts_url: str
    """Where clips, latents, checkpoints and pictures lie, checked; empty: in the data folder."""
    database: sa.URL | None
    """Of PostgreSQL, which several gateways can share; None: a file in the data folder."""
    stages: StageAddresses
    security: SecurityOptions
    """Certificates, and who may come in."""
    pipeline: PipelineOptions
