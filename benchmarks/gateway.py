"""How quick the gateway is with a long queue: creating, listing, reading and watching jobs over gRPC.

`python -m benchmarks.gateway --queued 20000 [--database-url URL]` fills a queue, starts a gateway on it and prints a
table; `--json FILE` keeps the figures. Stages are scripted ones that never finish, so nothing but the gateway works.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil

from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from services.gateway.database import DATABASE_FILE, database_url, open_database, open_postgres
from services.gateway.jobs.domain import ClipParameters, Ending, Job, Submission, VideoInfo, new_job_id
from services.gateway.jobs.store import JobStore
from services.gateway.migrations import migrate
from shared.sampling_options import SamplingOptions
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import MODEL, scripted_stages

_PARAMETERS = ClipParameters(
    "a lighthouse in the fog, waves far away", "blur", "echo", MODEL, 64, 64, 121, SamplingOptions()
)
_AT_ONCE = 1000
_IDLE_S = 10.0


def fill(folder: Path, url: str, num_queued: int, num_keys: int) -> None:
    """Put jobs into the table: the queue, and half as many that have ended before."""
    engine = open_postgres(database_url(url)) if url else open_database(folder / DATABASE_FILE)
    migrate(engine)
    store = JobStore(engine)
    begun_s = time.time() - 1e5
    for start in range(0, num_queued, _AT_ONCE):
        number = min(_AT_ONCE, num_queued - start)
        new = [
            Job(
                new_job_id(),
                _PARAMETERS,
                create_time_s=begun_s + (start + index) * 1e-2,
                submission=Submission(key_id=f"key{(start // _AT_ONCE) % num_keys}" if num_keys > 1 else ""),
            )
            for index in range(number)
        ]
        store.create_all(new, "h")
        if start == 0:
            for job in new[:20]:
                store.begin(job.id, begun_s)
                store.save(job.id, job.progress, {"encode_prompt": 1.0, "denoise": 60.0, "decode": 9.0})
                store.finish(job.id, Ending.completed(VideoInfo(1, 64, 64, 121, 24)), begun_s + 70)
    engine.dispose()


def timed(call: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each of some calls, one after the other."""
    taken = []
    for _ in range(times):
        begun_s = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begun_s) * 1e3)
    return taken


def spread(taken: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest of milliseconds."""
    ordered = sorted(taken)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max_ms": round(ordered[-1], 2),
    }


def measure(gateway: GatewayUnderTest, watchers: int) -> dict[str, object]:
    """Figures of one gateway with a full queue."""
    seeds = itertools.count()

    def create() -> object:
        return gateway.create(seed=next(seeds))

    def pages(states: list[pb.JobState.ValueType]) -> Callable[[], object]:
        request = pb.ListJobsRequest(page_size=50, states=states)
        token = ""

        def page() -> None:
            nonlocal token
            request.page_token = token
            token = gateway.jobs.ListJobs(request).next_page_token

        return page

    last = gateway.create(seed=next(seeds))
    figures: dict[str, object] = {
        "create": spread(timed(create, 300)),
        "list newest": spread(timed(lambda: gateway.jobs.ListJobs(pb.ListJobsRequest(page_size=50)), 100)),
        "list page after page": spread(timed(pages([]), 100)),
        "list queued and running": spread(timed(pages([pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING]), 100)),
        "list oldest first": spread(
            timed(lambda: gateway.jobs.ListJobs(pb.ListJobsRequest(page_size=50, oldest_first=True)), 100)
        ),
        "get with position": spread(timed(lambda: gateway.get(last.id), 200)),
        "queue stats": spread(timed(lambda: gateway.jobs.QueueStats(pb.QueueStatsRequest()), 50)),
    }
    begun_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: create(), range(800)))
    figures["creates_per_s"] = round(800 / (time.perf_counter() - begun_s), 1)
    figures |= idle(gateway)
    if watchers:
        figures["watched"] = watched(gateway, watchers)
    return figures


def idle(gateway: GatewayUnderTest) -> dict[str, object]:
    """Part of a core that a gateway takes while nothing happens, and its memory."""
    process = psutil.Process(gateway.service.process.pid)
    before = process.cpu_times()
    time.sleep(_IDLE_S)
    after = process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    return {
        "idle_core_percent": round(100 * used_s / _IDLE_S, 1),
        "resident_mib": round(process.memory_info().rss / 2**20),
    }


def watched(gateway: GatewayUnderTest, number: int) -> dict[str, float]:
    """Time from an answered CancelJob to what each of many gRPC watchers is told of it."""
    job = gateway.create(seed=1)
    told: list[float] = []
    ready, lock = threading.Semaphore(0), threading.Lock()

    def watch(channel: grpc.Channel) -> None:
        stub = pb_grpc.JobServiceStub(channel)
        states: Iterator[pb.WatchJobResponse] = stub.WatchJob(pb.WatchJobRequest(id=job.id))
        next(states)
        ready.release()
        for _ in states:
            pass
        with lock:
            told.append(time.perf_counter())

    apart = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(gateway.service.address, apart) for _ in range(10)]
    threads = [threading.Thread(target=watch, args=(channels[index % 10],), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    begun_s = time.perf_counter()
    gateway.cancel(job.id)
    for thread in threads:
        thread.join()
    for channel in channels:
        channel.close()
    return spread([(time_s - begun_s) * 1e3 for time_s in told])


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, default=20_000, help="jobs in the queue (default: %(default)s)")
    parser.add_argument("--keys", type=int, default=1, help="API keys that made them (default: %(default)s)")
    parser.add_argument("--watchers", type=int, default=200, help="concurrent WatchJob calls (default: %(default)s)")
    parser.add_argument("--database-url", default="", help="an empty PostgreSQL database (default: SQLite)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, scripted_stages() as stages:
        stages.fusion.automatic = False
        folder = Path(name)
        begun_s = time.perf_counter()
        fill(folder, args.database_url, args.queued, args.keys)
        filled_s = time.perf_counter() - begun_s
        flags = ["--database-url", args.database_url] if args.database_url else []
        with running_gateway(folder, *stages.flags, *flags) as gateway:
            figures = measure(gateway, args.watchers)
    figures |= {"queued": args.queued, "keys": args.keys, "filled_s": round(filled_s, 1)}
    figures["database"] = "PostgreSQL" if args.database_url else "SQLite"
    for title, value in figures.items():
        sys.stdout.write(f"{title:28} {value}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
