"""How quick calls of the gateway are with a long queue: creating over each API, listing, reading."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import sqlalchemy as sa

from benchmarks.gateway_measures import NO_LIMITS, Spread
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.database import DATABASE_FILE, database_url, open_database, open_postgres
from services.gateway.jobs.domain import ClipParameters, Job, JobState, Submission, VideoInfo, new_job_id
from services.gateway.jobs.schema import jobs
from services.gateway.jobs.store import JobStore
from services.gateway.migrations import migrate
from shared.sampling_options import SamplingOptions
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import MODEL, scripted_stages
from tests.postgres import running_postgres

SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
CLIENTS = 16
"""That create jobs at the same time."""
_PARAMETERS = ClipParameters(
    "a lighthouse in the fog, waves far away", "blur", "echo", MODEL, 64, 64, 121, SamplingOptions()
)
_STAGE_SECONDS = {"encode_prompt": 1.0, "denoise": 60.0, "decode": 9.0}
_AT_ONCE = 1000
_CREATES, _CREATES_AT_ONCE, _CALLS = 200, 640, 200
_PAGE = 50
_WARM_UP = 5


@dataclass(frozen=True)
class CallRow:
    """One kind of call, made by one client."""

    database: str
    queued: int
    """Jobs that waited; half as many had ended."""
    call: str
    spread: Spread


@dataclass(frozen=True)
class CreateRow:
    """Jobs created over one API."""

    database: str
    queued: int
    api: str
    clients: int
    per_s: float
    spread: Spread


def fill(folder: Path, url: str, num_queued: int, num_keys: int = 1) -> None:
    """Put jobs into the table: half as many that were completed as are queued behind them.

    Args:
        folder: of a gateway's data.
        url: of an empty PostgreSQL database; empty: a SQLite file in the folder.
        num_queued: jobs.
        num_keys: API keys that made them, in turns.
    """
    engine = open_postgres(database_url(url)) if url else open_database(folder / DATABASE_FILE)
    migrate(engine)
    store = JobStore(engine)
    begun_s = time.time() - 1e5
    states = [*[JobState.COMPLETED] * (num_queued // 2), *[JobState.QUEUED] * num_queued]
    for start in range(0, len(states), _AT_ONCE):
        asked = Submission(key_id=f"key{(start // _AT_ONCE) % num_keys}" if num_keys > 1 else "")
        times = (begun_s + (start + index) * 1e-2 for index in range(_AT_ONCE))
        part = zip(states[start : start + _AT_ONCE], times, strict=False)
        store.create_all([Job(new_job_id(), _PARAMETERS, time_s, asked, state) for state, time_s in part], "h")
    values = {
        "start_time_s": jobs.c.create_time_s,
        "end_time_s": jobs.c.create_time_s + sum(_STAGE_SECONDS.values()),
        "stage_seconds": _STAGE_SECONDS,
        "video": VideoInfo(1, 64, 64, 121, 24).to_json(),
    }
    with engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.state == JobState.COMPLETED.value).values(values))
    engine.dispose()


def measure_queue(database: str, num_queued: int) -> tuple[list[CallRow], list[CreateRow]]:
    """Figures of one gateway with a full queue; its stages are scripted ones that never finish, so only it works."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        url = stack.enter_context(running_postgres()).new_database() if database == POSTGRESQL else ""
        stages = stack.enter_context(scripted_stages())
        stages.fusion.automatic = False
        fill(folder, url, num_queued)
        flags = ["--database-url", url] if url else []
        gateway = stack.enter_context(running_gateway(folder, *stages.flags, *NO_LIMITS, *flags))
        client = stack.enter_context(httpx.Client(base_url=gateway.http_url, timeout=WAIT_S))
        calls = [
            CallRow(database, num_queued, name, Spread.of(_timed(call, _CALLS)))
            for name, call in _calls(gateway, client).items()
        ]
        creates = []
        for api, create in _creates(gateway, client).items():
            creates.append(CreateRow(database, num_queued, api, 1, *_created(create, 1, _CREATES)))
            creates.append(CreateRow(database, num_queued, api, CLIENTS, *_created(create, CLIENTS, _CREATES_AT_ONCE)))
        return calls, creates


def _calls(gateway: GatewayUnderTest, client: httpx.Client) -> dict[str, Callable[[], object]]:
    last = gateway.create(seed=1)

    def listing(**wanted: object) -> Callable[[], object]:
        request = pb.ListJobsRequest(page_size=_PAGE, **wanted)
        return lambda: gateway.jobs.ListJobs(request, timeout=WAIT_S)

    def paging(**wanted: object) -> Callable[[], object]:
        request = pb.ListJobsRequest(page_size=_PAGE, **wanted)

        def page() -> None:
            request.page_token = gateway.jobs.ListJobs(request, timeout=WAIT_S).next_page_token

        return page

    def get(path: str, **wanted: object) -> Callable[[], object]:
        return lambda: client.get(path, params=wanted).raise_for_status()

    return {
        "ListJobs, newest": listing(),
        "ListJobs, page after page": paging(),
        "ListJobs, queued and running, page after page": paging(states=[pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING]),
        "ListJobs, completed": listing(states=[pb.JOB_STATE_COMPLETED]),
        "ListJobs, oldest first": listing(oldest_first=True),
        "GET /v1/jobs": get("/v1/jobs", limit=_PAGE),
        "GET /v1/videos": get("/v1/videos", limit=_PAGE),
        "GetJob, with position": lambda: gateway.get(last.id),
        "QueueStats": lambda: gateway.jobs.QueueStats(pb.QueueStatsRequest(), timeout=WAIT_S),
    }


def _creates(gateway: GatewayUnderTest, client: httpx.Client) -> dict[str, Callable[[], object]]:
    seeds = itertools.count()

    def native() -> object:
        wanted = {"prompt": "a lighthouse", "num_inference_steps": 4, "seed": next(seeds)}
        return client.post("/v1/jobs", json=wanted).raise_for_status()

    def video() -> object:
        return client.post("/v1/videos", json={"prompt": "a lighthouse", "model": MODEL}).raise_for_status()

    return {
        "CreateJob": lambda: gateway.create(seed=next(seeds)),
        "POST /v1/jobs": native,
        "POST /v1/videos": video,
    }


def _created(create: Callable[[], object], clients: int, number: int) -> tuple[float, Spread]:
    """Jobs a second, and how long each took, with so many clients that wait for their answers."""
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        parts = list(threads.map(lambda _: _timed(create, number // clients, warm_up=0), range(clients)))
    taken = [each for part in parts for each in part]
    return round(len(taken) / (time.perf_counter() - begun_s), 1), Spread.of(taken)


def _timed(call: Callable[[], object], times: int, warm_up: int = _WARM_UP) -> list[float]:
    """Milliseconds of each of some calls, one after the other."""
    taken = []
    for _ in range(warm_up + times):
        begun_s = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begun_s) * 1e3)
    return taken[warm_up:]
