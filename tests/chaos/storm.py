"""A storm over gateways and workers: jobs are made, everything is killed, and at the end nothing may be missing.

What is looked at: every job ends exactly once, counted by the database itself; none fails; each clip is, to the byte,
the one of its seed, and plays; and no cut of a denoise costs more steps than `--checkpoint-steps`.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import grpc
import sqlalchemy as sa

from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from services.gateway.database import DATABASE_FILE, database_url, open_database, open_postgres
from tests.chaos.clips import FPS, NUM_FRAMES, SAMPLE_RATE_HZ, encoded, played
from tests.grpc.scripted_stages import latents_of
from tests.postgres import PostgresUnderTest
from tests.service_process import ServiceProcess, free_port, running_service

STEPS = 20
CHECKPOINT_STEPS = 5
JOBS_AT_ONCE = 4
"""Of a gateway."""
LEASE_S = 4.0
_CALL_S = 10.0
_TABLES_S = 120.0
_RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_ENDED = {pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED}


@dataclass(frozen=True)
class Plan:
    """How large a storm is."""

    num_jobs: int
    num_gateways: int
    pause_s: float
    """Between two blows."""
    blows: int
    """How many there are; then everything is left alone until the jobs have ended."""
    limit_s: float
    """Until all jobs must have ended."""
    cancelled_part: float = 0.1
    """Of the jobs."""
    seed: int = 1


@dataclass
class Denoised:
    """The denoise of one job, over all its attempts."""

    begun: int = 0
    """How many attempts came to a worker."""
    made: int = 0
    """Steps, by all attempts."""
    furthest: int = 0
    repeated: int = 0
    """Steps that had been made before."""
    largest_repeat: int = 0
    """Most steps by which an attempt began behind the furthest one."""

    @property
    def cuts(self) -> int:
        """Each attempt but the first follows a cut."""
        return max(0, self.begun - 1)

    def begin(self, index: int) -> None:
        """An attempt begins after so many steps."""
        self.begun += 1
        self.largest_repeat = max(self.largest_repeat, self.furthest - index)

    def step(self, index: int) -> None:
        """An attempt has made a step."""
        self.made += 1
        self.repeated += index <= self.furthest
        self.furthest = max(self.furthest, index)


@dataclass
class Report:
    """What came of it."""

    blows: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    endings: Counter[int] = field(default_factory=Counter)
    """How many jobs have ended so many times."""
    attempts: Counter[int] = field(default_factory=Counter)
    denoises: dict[int, Denoised] = field(default_factory=dict)
    """As the workers noted them, by seed."""
    steps_needed: int = 0
    clips: Counter[str] = field(default_factory=Counter)
    """Those of completed jobs: right, wrong bytes, do not play."""
    frames_played: int = 0
    samples_played: int = 0
    seconds: float = 0.0

    @property
    def steps_made(self) -> int:
        """By all denoises, those that were cancelled as well."""
        return sum(denoised.made for denoised in self.denoises.values())

    @property
    def cuts(self) -> int:
        """How often a denoise was begun again."""
        return sum(denoised.cuts for denoised in self.denoises.values())

    @property
    def largest_repeat(self) -> int:
        """Most steps that one new attempt began behind the furthest one before it."""
        return max((denoised.largest_repeat for denoised in self.denoises.values()), default=0)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"blows: {dict(self.blows)}; {self.seconds:.0f} s"
        attempts = dict(sorted(self.attempts.items()))
        yield f"jobs: {dict(self.states)}; ends of a job: {dict(self.endings)}; attempts: {attempts}"
        made = f"{self.steps_needed} needed by completed jobs, {self.steps_made} made by all"
        repeated = f"{sum(denoised.repeated for denoised in self.denoises.values())} of them again"
        cuts = f"{self.cuts} cuts of a denoise, {CHECKPOINT_STEPS * self.cuts} steps allowed for them"
        yield f"steps: {made}, {repeated}; {cuts}; {self.largest_repeat} at once at most"
        yield f"clips: {dict(self.clips)}; played: {self.frames_played} frames, {self.samples_played} samples of sound"


class Process:
    """A service that comes back at the same address after it was killed."""

    def __init__(self, start: Callable[[int], contextlib.AbstractContextManager[ServiceProcess]]) -> None:
        self._start = start
        self.port = free_port()
        self._context = contextlib.ExitStack()
        self._service = self._context.enter_context(start(self.port))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        self._service.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, then start it again."""
        self.signal(signal.SIGKILL)
        self._service.process.wait(_CALL_S)
        self.close()
        self._service = self._context.enter_context(self._start(self.port))

    def close(self) -> None:
        self._context.close()


class Storm:
    """Gateways, workers, and what happens to them."""

    def __init__(self, folder: Path, plan: Plan, postgres: PostgresUnderTest | None) -> None:
        self._folder = folder
        self._plan = plan
        self._postgres = postgres
        self._random = random.Random(plan.seed)
        self._steps_log = folder / "steps.log"
        self._steps_log.touch()
        self._url = postgres.new_database() if postgres is not None else ""
        self.report = Report()

    def run(self) -> Report:
        """The whole storm; what it found."""
        begun_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            workers = {}
            for name in ("text_encoder", "fusion", "fusion", "vae"):
                worker = Process(lambda port, stage=name: self._worker(stage, port))
                stack.callback(worker.close)
                workers.setdefault(name, []).append(worker)
            gateways = []
            for _ in range(self._plan.num_gateways):
                gateways.append(Process(lambda port: self._gateway(port, workers)))
                stack.callback(gateways[-1].close)
            stack.enter_context(self._counting_endings())
            addresses = [gateway.address for gateway in gateways]
            ids: dict[int, str] = {}
            with Client(addresses, self._random.randrange(1 << 30)) as client:
                making = threading.Thread(target=self._make, args=(client, ids), daemon=True)
                making.start()
                self._blow(gateways, [worker for same in workers.values() for worker in same])
                making.join(self._plan.limit_s)
                assert len(ids) == self._plan.num_jobs, f"only {len(ids)} jobs could be made"
                self._judge(client, ids, begun_s + self._plan.limit_s)
        self.report.seconds = time.monotonic() - begun_s
        return self.report

    def _worker(self, stage: str, port: int) -> contextlib.AbstractContextManager[ServiceProcess]:
        flags = ("--stage", stage, "--log", str(self._steps_log))
        return running_service(stage, *flags, port=port, serving=False, module="tests.chaos.workers")

    def _gateway(
        self, port: int, workers: dict[str, list[Process]]
    ) -> contextlib.AbstractContextManager[ServiceProcess]:
        flags = ["--data-dir", str(self._folder / "data"), "--http-port", "0", "--grace-s", "5"]
        flags += ["--checkpoint-steps", str(CHECKPOINT_STEPS), "--lease-s", str(LEASE_S)]
        flags += ["--max-concurrent-jobs", str(JOBS_AT_ONCE)]
        for name, same in workers.items():
            flags += [f"--{name.replace('_', '-')}", ",".join(worker.address for worker in same)]
        if self._url:
            flags += ["--database-url", self._url]
        return running_service("gateway", *flags, port=port, serving=False)

    def _make(self, client: Client, ids: dict[int, str]) -> None:
        for seed in range(self._plan.num_jobs):
            ids[seed] = client.create(seed, priority=self._random.randrange(10))
            if self._random.random() < self._plan.cancelled_part:
                client.cancel(ids[seed])

    def _blow(self, gateways: list[Process], workers: list[Process]) -> None:
        blows = [self._kill_gateway, self._kill_worker]
        if self._postgres is not None:
            blows += [self._stop_gateway, self._stop_database]
        for number in range(self._plan.blows):
            time.sleep(self._plan.pause_s)
            # Each kind comes in turn, so that a short storm has all of them.
            blows[number % len(blows)](gateways, workers)

    def _kill_gateway(self, gateways: list[Process], workers: list[Process]) -> None:
        self.report.blows["gateway killed"] += 1
        self._random.choice(gateways).kill()

    def _kill_worker(self, gateways: list[Process], workers: list[Process]) -> None:
        self.report.blows["worker killed"] += 1
        self._random.choice(workers).kill()

    def _stop_gateway(self, gateways: list[Process], workers: list[Process]) -> None:
        self.report.blows["gateway stopped and woken"] += 1
        gateway = self._random.choice(gateways)
        gateway.signal(signal.SIGSTOP)
        time.sleep(LEASE_S + 2.0)
        gateway.signal(signal.SIGCONT)

    def _stop_database(self, gateways: list[Process], workers: list[Process]) -> None:
        assert self._postgres is not None
        self.report.blows["database stopped hard"] += 1
        self._postgres.stop_hard()
        self._postgres.start()

    @contextlib.contextmanager
    def _counting_endings(self) -> Iterator[None]:
        """The database itself notes each time that a job comes to an end."""
        engine = self._engine()
        deadline_s = time.monotonic() + _TABLES_S
        while not sa.inspect(engine).has_table("leases"):
            assert time.monotonic() < deadline_s, "no gateway has made the tables"
            time.sleep(0.1)
        ended = "NEW.state IN ('completed', 'failed', 'cancelled')"
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE endings (id VARCHAR NOT NULL)"))
            if self._postgres is None:
                what = f"AFTER UPDATE OF state ON jobs WHEN {ended}"
                body = "BEGIN INSERT INTO endings VALUES (NEW.id); END"
                connection.execute(sa.text(f"CREATE TRIGGER note_ending {what} {body}"))
            else:
                body = "BEGIN INSERT INTO endings VALUES (NEW.id); RETURN NEW; END"
                connection.execute(
                    sa.text(f"CREATE FUNCTION note_ending() RETURNS trigger AS $$ {body} $$ LANGUAGE plpgsql")
                )
                what = f"AFTER UPDATE OF state ON jobs FOR EACH ROW WHEN ({ended})"
                connection.execute(sa.text(f"CREATE TRIGGER note_ending {what} EXECUTE FUNCTION note_ending()"))
        engine.dispose()
        yield

    def _engine(self) -> sa.Engine:
        if self._postgres is None:
            return open_database(self._folder / "data" / DATABASE_FILE)
        return open_postgres(database_url(self._url))

    def _judge(self, client: Client, ids: dict[int, str], deadline_s: float) -> None:
        report = self.report
        for seed, job_id in ids.items():
            job = client.end_of(job_id, deadline_s)
            report.states[pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()] += 1
            report.attempts[job.attempts] += 1
            if job.state == pb.JOB_STATE_COMPLETED:
                report.steps_needed += STEPS
                self._play(client.download(job_id), seed)
        engine = self._engine()
        with engine.connect() as connection:
            counts = Counter(connection.execute(sa.text("SELECT id FROM endings")).scalars())
        engine.dispose()
        report.endings = Counter(counts[job_id] for job_id in ids.values())
        self._count_steps()

    def _play(self, clip: bytes, seed: int) -> None:
        report = self.report
        try:
            pictures_and_sound = played(clip)
        except av.FFmpegError:
            report.clips["do not play"] += 1
            return
        report.frames_played += pictures_and_sound.num_frames
        report.samples_played += pictures_and_sound.num_samples
        report.clips["right" if clip == encoded(*latents_of(seed)) else "wrong bytes"] += 1

    def _count_steps(self) -> None:
        denoises = self.report.denoises
        for line in self._steps_log.read_text().splitlines():
            what, seed, index = line.split()
            denoised = denoises.setdefault(int(seed), Denoised())
            denoised.step(int(index)) if what == "step" else denoised.begin(int(index))


class Client:
    """Asks one gateway after the other until one answers."""

    def __init__(self, addresses: list[str], seed: int) -> None:
        self._random = random.Random(seed)
        self._channels = [grpc.insecure_channel(address) for address in addresses]
        self._stubs = [pb_grpc.JobServiceStub(channel) for channel in self._channels]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        for channel in self._channels:
            channel.close()

    def create(self, seed: int, priority: int) -> str:
        options = generation_pb2.SamplingOptions(num_inference_steps=STEPS, seed=seed)
        parameters = pb.GenerationParameters(prompt="a lighthouse in a storm", options=options)
        request = pb.CreateJobRequest(request_id=f"storm-{seed}", parameters=parameters, priority=priority)
        return self._ask("CreateJob", request).job.id

    def cancel(self, job_id: str) -> None:
        self._ask("CancelJob", pb.CancelJobRequest(id=job_id))

    def end_of(self, job_id: str, deadline_s: float) -> pb.Job:
        while (job := self._ask("GetJob", pb.GetJobRequest(id=job_id)).job).state not in _ENDED:
            assert time.monotonic() < deadline_s, f"{job_id} has not ended: {job}"
            time.sleep(0.1)
        return job

    def download(self, job_id: str) -> bytes:
        return self._try(
            lambda stub: b"".join(
                part.chunk for part in stub.DownloadVideo(pb.DownloadVideoRequest(id=job_id), timeout=_CALL_S)
            )
        )

    def _ask(self, method: str, request: object):
        return self._try(lambda stub: getattr(stub, method)(request, timeout=_CALL_S))

    def _try(self, call):
        deadline_s = time.monotonic() + 120.0
        while True:
            try:
                return call(self._random.choice(self._stubs))
            except grpc.RpcError as error:
                if error.code() not in _RETRIED or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.1)


def check(report: Report, plan: Plan) -> None:
    """Fail if the storm has broken anything.

    Args:
        report: of the storm.
        plan: of the storm.
    """
    completed = report.states["completed"]
    assert set(report.endings) == {1} and report.endings[1] == plan.num_jobs, report
    assert set(report.states) <= {"completed", "cancelled"}, report
    assert completed >= plan.num_jobs * (1 - 3 * plan.cancelled_part), report
    assert report.clips == {"right": completed}, report
    assert report.frames_played == completed * NUM_FRAMES, report
    assert report.samples_played >= completed * NUM_FRAMES * SAMPLE_RATE_HZ / FPS * 0.99, report
    # An attempt begins where the last kept checkpoint is, and none before it was further than that by more.
    assert report.largest_repeat <= CHECKPOINT_STEPS, report
    for seed, denoised in report.denoises.items():
        assert denoised.made <= STEPS + CHECKPOINT_STEPS * denoised.cuts, (seed, denoised)
    # And a blow cuts at most everything that is under way.
    assert report.cuts <= sum(report.blows.values()) * plan.num_gateways * JOBS_AT_ONCE, report
