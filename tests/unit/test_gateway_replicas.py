"""Which of several workers gets a call."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import pytest

from services.gateway import replicas as module
from services.gateway.config import StageAddresses
from services.gateway.replicas import Replicas
from shared.errors import CorruptTensor, OutOfMemory, Unavailable


@dataclass(frozen=True)
class Worker:
    address: str
    name: str = "fusion"


A, B, C = Worker("a"), Worker("b"), Worker("c")


def test_calls_go_where_least_is_under_way():
    replicas = Replicas([A, B, C])
    with contextlib.ExitStack() as busy:
        for worker in (A, B, A):
            busy.enter_context(replicas.using(worker))
        assert replicas.choose() is C
        busy.enter_context(replicas.using(C))
        busy.enter_context(replicas.using(C))
        assert replicas.choose() is B
    assert replicas.choose() is B, "nobody is busy, and it was given least"


def test_idle_workers_take_turns():
    replicas = Replicas([A, B, C])
    chosen = []
    for _ in range(6):
        chosen.append(replicas.choose())
        with replicas.using(chosen[-1]):
            pass
    assert chosen == [A, B, C, A, B, C]


def test_a_worker_that_was_away_is_passed_over_for_a_while(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    replicas = Replicas([A, B])
    with pytest.raises(Unavailable), replicas.using(A):
        raise Unavailable("cannot be reached")
    with replicas.using(B), replicas.using(B):
        assert replicas.choose() is B, "rather wait behind others"
        now_s[0] += 6
        assert replicas.choose() is A
    with pytest.raises(OutOfMemory), replicas.using(A):
        raise OutOfMemory("too small")
    assert replicas.choose() is A, "it answered"


def test_one_that_is_to_be_avoided_is_only_taken_where_there_is_no_other():
    replicas = Replicas([A, B])
    with replicas.using(B):
        assert replicas.choose(avoid=A) is B
    with pytest.raises(Unavailable), replicas.using(B):
        raise Unavailable("cannot be reached")
    assert replicas.choose(avoid=A) is B
    assert Replicas([A]).choose(avoid=A) is A


def test_a_question_is_answered_by_those_who_can():
    replicas = Replicas([A, B, C])

    async def ask(worker: Worker) -> str:
        if worker is A:
            raise Unavailable("a is away")
        return worker.address

    assert asyncio.run(replicas.of_all(ask)) == ["b", "c"]

    async def refuse(worker: Worker) -> str:
        raise Unavailable(f"{worker.address} is away")

    with pytest.raises(Unavailable, match="a is away"):
        asyncio.run(replicas.of_all(refuse))

    async def broken(worker: Worker) -> str:
        raise (Unavailable("away") if worker is A else RuntimeError("a bug"))

    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(replicas.of_all(broken))


def test_the_first_answer_is_taken_and_nobody_else_waited_for():
    replicas = Replicas([A, B, C])
    cancelled = []

    async def ask(worker: Worker) -> str:
        if worker is A:
            raise Unavailable("a is away")
        if worker is B:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(worker)
                raise
        return worker.address

    assert asyncio.run(replicas.of_any(ask)) == "c" and cancelled == [B]

    async def refuse(worker: Worker) -> str:
        raise Unavailable(f"{worker.address} is away")

    with pytest.raises(Unavailable, match="is away"):
        asyncio.run(replicas.of_any(refuse))


def test_a_call_is_made_of_one_and_its_error_told():
    replicas = Replicas([A, B])
    called = []

    async def call(worker: Worker) -> None:
        called.append(worker)
        raise CorruptTensor("no")

    for _ in range(2):
        with pytest.raises(CorruptTensor):
            asyncio.run(replicas.on_one(call))
    assert called == [A, B]


@pytest.mark.parametrize(("fusion", "vae", "flag"), [((), ("v",), "--fusion"), (("f",), ("v", "v"), "--vae: got v,v")])
def test_addresses_are_there_and_differ(fusion, vae, flag):
    with pytest.raises(ValueError, match=flag):
        StageAddresses("t", fusion, vae)
