"""What many finished jobs leave behind in the gateway's process: memory, open files, threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.gateway_measures import NO_LIMITS, Footprint, processor_s
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.database import DATABASE_FILE
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import scripted_stages

_AT_ONCE = 250
_CLIENTS = 8
_STEPS = 2
_SETTLED_S = 3.0
_RETAINED = 100
_TIDIED_S = 600.0
_CLIP = b"c" * 5000


@dataclass(frozen=True)
class FinishedRow:
    """The gateway's process at one moment."""

    moment: str
    kept: int
    """Jobs in the table, all of them completed."""
    jobs_per_s: float | None
    """Made since the moment before."""
    processor_ms: float | None
    """Of the gateway, for each of these."""
    database_mib: float
    footprint: Footprint


def measure_finished(number: int) -> list[FinishedRow]:
    """Let jobs run to their end through scripted stages, then delete half of them, then let retention do it.

    Of each block of jobs the last one is watched over both APIs. The second gateway is started on the same data.
    """
    with TemporaryDirectory() as name, scripted_stages() as stages:
        stages.vae.clip = _CLIP
        folder = Path(name)
        with running_gateway(folder, *stages.flags, *NO_LIMITS) as gateway:
            rows = [_row("at the start", folder, gateway)]
            for most in sorted({number // 10, number // 2, number}):
                rows.append(_run(folder, gateway, most - rows[-1].kept, f"after {most:,} jobs"))
            _delete(gateway, number // 2)
            rows.append(_row(f"{number // 2:,} of them deleted", folder, gateway))
        with running_gateway(folder, *stages.flags, "--retention-jobs", str(_RETAINED)) as gateway:
            _wait_until_kept(gateway, _RETAINED)
            rows.append(_row(f"another, after retention of {_RETAINED}", folder, gateway))
    return rows


def _run(folder: Path, gateway: GatewayUnderTest, number: int, moment: str) -> FinishedRow:
    begun_s, before_s = time.perf_counter(), processor_s(gateway)
    for start in range(0, number, _AT_ONCE):
        with ThreadPoolExecutor(_CLIENTS) as threads:
            jobs = list(
                threads.map(
                    lambda seed: gateway.create(seed=seed, steps=_STEPS), range(start, min(number, start + _AT_ONCE))
                )
            )
        last = max(jobs, key=lambda job: (job.create_time.seconds, job.create_time.nanos))
        with httpx.stream("GET", f"{gateway.http_url}/v1/jobs/{last.id}/events", timeout=None) as events:
            *_, end = gateway.jobs.WatchJob(pb.WatchJobRequest(id=last.id))
            assert end.job.state == pb.JOB_STATE_COMPLETED, end
            events.read()
    while _counts(gateway)["completed"] < sum(_counts(gateway).values()):
        time.sleep(0.1)
    taken_s, used_s = time.perf_counter() - begun_s, processor_s(gateway) - before_s
    return _row(moment, folder, gateway, number / taken_s, 1e3 * used_s / number)


def _row(
    moment: str, folder: Path, gateway: GatewayUnderTest, per_s: float | None = None, each_ms: float | None = None
) -> FinishedRow:
    time.sleep(_SETTLED_S)
    counts = _counts(gateway)
    return FinishedRow(
        moment,
        counts["completed"],
        round(per_s, 1) if per_s is not None else None,
        round(each_ms, 1) if each_ms is not None else None,
        round((folder / DATABASE_FILE).stat().st_size / 2**20, 1),
        Footprint.of(gateway),
    )


def _counts(gateway: GatewayUnderTest) -> dict[str, int]:
    return dict(gateway.jobs.QueueStats(pb.QueueStatsRequest(), timeout=WAIT_S).num_jobs)


def _delete(gateway: GatewayUnderTest, number: int) -> None:
    while number > 0:
        listed = gateway.jobs.ListJobs(pb.ListJobsRequest(page_size=min(number, 1000)), timeout=WAIT_S).jobs
        with ThreadPoolExecutor(_CLIENTS) as threads:
            list(threads.map(lambda job: gateway.delete(job.id), listed))
        number -= len(listed)


def _wait_until_kept(gateway: GatewayUnderTest, number: int) -> None:
    deadline_s = time.monotonic() + _TIDIED_S
    while _counts(gateway)["completed"] > number:
        assert time.monotonic() < deadline_s, f"retention leaves {_counts(gateway)} after {_TIDIED_S} s"
        time.sleep(0.5)
