"""The workers of a stage: they come and go, are busy, fail, and what failed is tried at another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from services.gateway.config import StagePlaces
from services.gateway.metrics import GatewayMetrics
from services.gateway.patience import Patience
from services.gateway.workers.choosing import ANYTHING, Report, Wish, WorkerState
from services.gateway.workers.listing import worker_to_proto
from services.gateway.workers.replicas import Origin, Replicas, WorkerCut, WorkerSource
from services.gateway.workers.trying import LongCall, carry_out
from shared.errors import CheckpointError, CorruptTensor, Internal, OutOfMemory, ResourceExhausted, Unavailable
from shared.places import Name, Place

GIVEN = Origin(WorkerSource.ADDRESS)
LOOKED_UP = Origin(WorkerSource.NAME, "dns:///fusion:1")
WISH = Wish("720x720_5s")


class Worker:
    """A client that only knows its address."""

    def __init__(self, place: Place) -> None:
        self.address = place.address
        self.closed = False

    async def close(self) -> None:
        self.closed = True


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def pool(*addresses: str) -> tuple[Replicas[Worker], Clock]:
    clock = Clock()
    replicas = Replicas("fusion", Worker, clock)
    replicas.place(GIVEN, [Place(address) for address in addresses])
    return replicas, clock


def named(replicas: Replicas[Worker]) -> dict[str, Worker]:
    return {worker.address: worker for worker in replicas.workers}


def serving(replicas: Replicas[Worker], **pending: int) -> None:
    """All of them say that they serve, with so many calls there."""
    for address, worker in named(replicas).items():
        replicas.note_report(worker, Report("fusion", num_pending=pending.get(address, 0)))


def test_calls_go_where_least_is_under_way_by_the_workers_own_count():
    replicas, _ = pool("a", "b", "c")
    a, b, c = replicas.workers
    with contextlib.ExitStack() as busy:
        for worker in (a, b, a):
            busy.enter_context(replicas.using(worker))
        assert replicas.choose() is c
        serving(replicas, a=2, b=1, c=3)
        assert replicas.choose() is b, "c has three of other gateways"
        busy.enter_context(replicas.using(b))
        busy.enter_context(replicas.using(b))
        assert replicas.choose() is a, "what it was given since counts at once"
        assert [view.num_pending for view in replicas.views()] == [2, 3, 3]


def test_one_that_fails_is_passed_over_longer_each_time_until_a_call_succeeds():
    replicas, clock = pool("a", "b")
    a, b = replicas.workers
    serving(replicas)
    for error, pause_s in ((Unavailable("draining"), 1), (ResourceExhausted("full"), 2), (Internal("a bug"), 4)):
        with pytest.raises(type(error)), replicas.using(a):
            raise error
        with replicas.using(b):
            clock.now_s += pause_s - 0.5
            assert replicas.choose() is b, "rather wait behind others"
            clock.now_s += 1
            assert replicas.choose() is a
    with replicas.using(a):
        pass
    with pytest.raises(Unavailable), replicas.using(a):
        raise Unavailable("draining")
    assert replicas.views()[0].passed_over_s == 1 and replicas.views()[0].reason == "draining"


def test_a_cut_worker_is_away_until_it_says_otherwise():
    replicas, clock = pool("a", "b")
    a, b = replicas.workers
    serving(replicas)
    with pytest.raises(WorkerCut), replicas.using(a):
        raise WorkerCut("connection reset")
    clock.now_s += 100
    with replicas.using(b):
        assert replicas.choose() is b and replicas.num_up == 1
        serving(replicas)
        assert replicas.choose() is a and replicas.num_up == 2


def test_want_of_memory_is_remembered_for_such_calls_alone():
    replicas, clock = pool("a", "b")
    a, b = replicas.workers
    with pytest.raises(OutOfMemory), replicas.using(a, WISH):
        raise OutOfMemory("too small")
    with replicas.using(b):
        assert replicas.choose(WISH) is b and replicas.choose() is a
        clock.now_s += 61
        assert replicas.choose(WISH) is a


def test_a_slow_worker_is_taken_to_be_as_it_was_for_a_while():
    replicas, clock = pool("a", "b")
    a, _ = replicas.workers
    clock.now_s += 10
    replicas.note_silence(a, WorkerState.UNREACHABLE, "no answer", is_slow=True)
    assert replicas.num_up == 2, "one that has just come"
    serving(replicas)
    clock.now_s += 10
    replicas.note_silence(a, WorkerState.UNREACHABLE, "no answer", is_slow=True)
    assert replicas.num_up == 2
    clock.now_s += 6
    replicas.note_silence(a, WorkerState.UNREACHABLE, "no answer", is_slow=True)
    assert replicas.num_up == 1 and replicas.views()[0].reason == "no answer"


def test_ids_of_jobs_are_told_to_those_who_see_all_jobs():
    replicas, _ = pool("a")
    with replicas.using(replicas.workers[0], WISH, "job_1"):
        (view,) = replicas.views()
        assert list(worker_to_proto(view, shows_jobs=True).job_ids) == ["job_1"]
        told = worker_to_proto(view, shows_jobs=False)
        assert not told.job_ids and told.num_pending == 1


def test_another_service_at_the_address_gets_no_work():
    replicas, _ = pool("a", "b")
    a, b = replicas.workers
    replicas.note_report(a, Report("vae"))
    with replicas.using(b), replicas.using(b):
        assert replicas.choose() is b
    assert replicas.views()[0].reason == "it is a vae service"


def test_workers_come_and_go_and_one_that_is_busy_ends_its_call_first():
    async def run() -> None:
        replicas, _ = pool("a")
        (a,) = replicas.workers
        replicas.place(LOOKED_UP, [Place("a"), Place("b")])
        b = named(replicas)["b"]
        assert replicas.workers[0] is a, "known by both, it is one"
        replicas.place(GIVEN, [])
        assert set(named(replicas)) == {"a", "b"}
        with replicas.using(b):
            replicas.place(LOOKED_UP, [Place("c")])
            assert set(named(replicas)) == {"c"}
            await asyncio.sleep(0)
            assert a.closed and not b.closed
            replicas.place(LOOKED_UP, [Place("b"), Place("c")])
            assert named(replicas)["b"] is b, "it came back meanwhile"
            replicas.place(LOOKED_UP, [])
        await asyncio.sleep(0)
        assert b.closed and replicas.num_up == 0
        with pytest.raises(Unavailable, match="no fusion service is known"):
            replicas.choose()
        with pytest.raises(Unavailable, match="just left"), replicas.using(b):
            raise AssertionError("its connection is closed")
        with pytest.raises(Unavailable, match="no fusion service is known"):
            await replicas.of_all(_ask)

    asyncio.run(run())


async def _ask(worker: Worker) -> str:
    return worker.address


def test_a_question_is_put_to_those_that_are_up_and_answered_by_those_who_can():
    replicas, _ = pool("a", "b", "c")
    a, b, c = replicas.workers

    async def ask(worker: Worker) -> str:
        if worker is a:
            raise Unavailable("a is away")
        return worker.address

    assert asyncio.run(replicas.of_all(ask)) == ["b", "c"]
    replicas.note_silence(b, WorkerState.UNREACHABLE, "gone")
    assert asyncio.run(replicas.of_all(ask)) == ["c"], "b is not waited for"
    for worker in (a, c):
        replicas.note_silence(worker, WorkerState.UNREACHABLE, "gone")
    assert asyncio.run(replicas.of_all(ask)) == ["b", "c"], "somebody has to be asked"

    async def refuse(worker: Worker) -> str:
        raise Unavailable(f"{worker.address} is away")

    with pytest.raises(Unavailable, match="a is away"):
        asyncio.run(replicas.of_all(refuse))

    async def broken(worker: Worker) -> str:
        raise (Unavailable("away") if worker is a else RuntimeError("a bug"))

    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(replicas.of_all(broken))


def test_a_call_is_made_of_one_and_its_error_told():
    replicas, _ = pool("a", "b")
    called = []

    async def call(worker: Worker) -> None:
        called.append(worker.address)
        raise CorruptTensor("no")

    for _ in range(2):
        with pytest.raises(CorruptTensor):
            asyncio.run(replicas.on_one(call))
    assert called == ["a", "b"]


class Script:
    """What each attempt of a long call does, in order."""

    def __init__(self, *steps: Exception | str) -> None:
        self.steps = list(steps)
        self.asked: list[str] = []
        self.setbacks: list[tuple[str, str]] = []
        self.kept = 0

    async def attempt(self, worker: Worker, patience: Patience) -> str:
        self.asked.append(worker.address)
        step = self.steps.pop(0)
        if isinstance(step, WorkerCut):
            patience.alive()  # it dies at its work
        if isinstance(step, Exception):
            raise step
        return step

    async def begin_again(self, reason: str, worker: str) -> None:
        self.setbacks.append((reason, worker))

    def run(self, replicas: Replicas[Worker], patience: Patience | None = None) -> str:
        call = LongCall("job", WISH, self.attempt, self.begin_again, lambda: self.kept)
        return asyncio.run(carry_out(call, replicas, patience or Patience("fusion", 5.0, GatewayMetrics())))


def test_a_job_that_kills_three_different_workers_is_given_up():
    replicas, _ = pool("a", "b", "c", "d")
    serving(replicas)
    script = Script(*(WorkerCut(f"reset {n}") for n in range(3)))
    with pytest.raises(Unavailable, match="the fusion service stopped 3 times during this job: reset 2"):
        script.run(replicas)
    assert script.asked == ["a", "b", "c"]
    assert script.setbacks == [("reset 0", "a"), ("reset 1", "b")], "what the end says is no setback"


def test_progress_between_two_deaths_speaks_for_the_job():
    replicas, _ = pool("a", "b")
    script = Script(*(WorkerCut(f"reset {n}") for n in range(5)), "made")

    async def attempt(worker: Worker, patience: Patience) -> str:
        script.kept += 1
        return await Script.attempt(script, worker, patience)

    script.attempt = attempt  # type: ignore[method-assign]
    assert script.run(replicas) == "made"


def test_workers_that_leave_in_order_are_not_the_jobs_fault():
    replicas, _ = pool("a")
    (a,) = replicas.workers
    serving(replicas)
    replicas.note_silence(a, WorkerState.NOT_SERVING, "draining")
    script = Script(*(WorkerCut("grace is over") for _ in range(4)), "made")
    assert script.run(replicas) == "made"
    assert [worker for _, worker in script.setbacks] == ["a"] * 4


@pytest.mark.parametrize("error", [Internal("error 17"), CheckpointError("damaged"), OutOfMemory("too small")])
def test_what_fails_at_one_is_tried_at_another_and_nowhere_twice(error):
    replicas, _ = pool("a", "b")
    script = Script(error, "made")
    assert script.run(replicas) == "made"
    assert script.asked == ["a", "b"] and script.setbacks == [(error.message, "a")]
    replicas, _ = pool("a", "b")
    script = Script(error, type(error)("there, too"))
    with pytest.raises(type(error), match="there, too"):
        script.run(replicas)
    alone, _ = pool("a")
    script = Script(error)
    with pytest.raises(type(error)):
        script.run(alone)
    assert not script.setbacks


def test_a_job_at_which_workers_fail_is_given_up_after_three_but_memory_is_sought_everywhere():
    replicas, _ = pool("a", "b", "c", "d", "e")
    script = Script(*(Internal(f"error {n}") for n in range(5)))
    with pytest.raises(Internal, match="error 2"):
        script.run(replicas)
    replicas, _ = pool("a", "b", "c", "d", "e")
    assert Script(*(OutOfMemory("too small") for _ in range(4)), "made").run(replicas) == "made"


def test_a_refusal_is_taken_to_the_next_one_and_is_no_setback():
    replicas, _ = pool("a", "b")
    script = Script(ResourceExhausted("full"), Unavailable("loading"), "made")
    assert script.run(replicas) == "made"
    assert script.asked[:2] == ["a", "b"] and not script.setbacks


def test_a_variant_that_nobody_has_is_waited_for():
    replicas, _ = pool("a")
    (a,) = replicas.workers
    replicas.note_report(a, Report("fusion", ("960x960_5s",)))
    with pytest.raises(Unavailable, match=r"gave up after waiting .* has '720x720_5s'"):
        Script().run(replicas, Patience("fusion", 0.2, GatewayMetrics()))
    assert replicas.choose(ANYTHING) is a


def places(text: str) -> Callable[[], StagePlaces]:
    return lambda: StagePlaces.parse("--fusion", text)


def test_flags_name_addresses_names_and_those_that_register():
    found = places("f:1, dns:///fusion.ovi:50052,registered,[::1]:2")()
    assert found == StagePlaces((Place("f:1"), Name("fusion.ovi", 50052), Place("[::1]:2")), registered=True)
    assert places("registered")() == StagePlaces((), registered=True)


@pytest.mark.parametrize(
    "text", ["", "f", "f:0", "f:65536", "f:1,f:1", "dns:///f", "dns://f:1", "f g:1", "unix:/x:1", "-f:1", "f:1:2", ":1"]
)
def test_other_flags_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"--fusion: got .*, allowed is"):
        places(text)()
