"""Whose turn it is, what jobs cost, what a batch asks for: pure functions."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.auth.caller import KeyLimits
from services.gateway.batch import MAX_JOBS, parameters_of
from services.gateway.jobs.admission import AGEING_S, KeyQueue, NoLimits, QueueSnapshot, next_head, rank
from services.gateway.jobs.costs import CostModel, Load, cost_class, estimate, remaining_s
from services.gateway.jobs.domain import ClipParameters, Job, JobStage, JobState, Progress
from shared.errors import InvalidRequest
from shared.sampling_options import MAX_SEED, SamplingOptions

PARAMETERS = ClipParameters("a", "b", "c", "tiny", 64, 96, 121, SamplingOptions(num_inference_steps=10))
NOW_S = 50_000.0


def queue(key: str, *, priority: int = 5, created: float = NOW_S, running: int = 0, served: float = 0.0) -> KeyQueue:
    return KeyQueue(key, f"head of {key}", priority, created, running, served)


@pytest.mark.parametrize(
    ("queues", "expected"),
    [
        ([queue("a", priority=4), queue("b", priority=6)], "b"),
        ([queue("a", running=1), queue("b")], "b"),
        ([queue("a", served=30.0), queue("b", served=20.0)], "b"),
        ([queue("a", priority=5), queue("b", priority=3, created=NOW_S - 2 * AGEING_S - 1, running=-1)], "b"),
        ([queue("a", priority=5), queue("b", priority=3, created=0, served=NOW_S - 1)], "a"),
        ([], None),
    ],
    ids=["priority", "fewer at work", "served longer ago", "waited", "waited but served", "none"],
)
def test_the_next_key(queues, expected):
    for order in (queues, queues[::-1]):
        head = next_head(order, NoLimits(), NOW_S)
        assert (head.key_id if head else None) == expected


def test_a_key_at_its_limit_is_passed_over():
    class Limits:
        def of(self, key_id: str) -> KeyLimits:
            return KeyLimits(max_concurrent_jobs=2)

    assert next_head([queue("a", priority=9, running=2), queue("b", running=1)], Limits(), NOW_S).key_id == "b"
    assert next_head([queue("a", running=2)], Limits(), NOW_S) is None


def test_positions_between_keys_are_those_of_turns():
    snapshot = QueueSnapshot(
        {"a": [(rank(float(i), 5), 5) for i in range(4)], "b": [(rank(9.0, 7), 7), (rank(10.0, 5), 5)]}, {"x": 6}
    )
    assert snapshot.position("a", rank(2.0, 5), 5) == 2 + 1 + 1, "two of its own, b's first, and b's turn"
    assert snapshot.position("b", rank(10.0, 5), 5) == 1
    assert snapshot.position("new", rank(99.0, 5), 5) == 1


def test_positions_agree_with_counting():
    draw = random.Random(0)
    for _ in range(20):
        wishes = {
            key: [(draw.uniform(0, 5000), draw.choice((0, 4, 5, 9))) for _ in range(draw.randrange(1, 30))]
            for key in "abcd"[: draw.randrange(1, 5)]
        }
        by_key = {key: sorted((rank(at, level), level) for at, level in jobs) for key, jobs in wishes.items()}
        snapshot = QueueSnapshot(by_key, {})
        for key in (*by_key, "new"):
            for at, level in wishes.get(key, [(2500.0, 5)]):
                before = [other for place, other in by_key.get(key, []) if place < rank(at, level)]
                others = [[other for _, other in jobs] for name, jobs in by_key.items() if name != key]
                higher = sum(other > level for levels in others for other in levels)
                turns = sum(min(before.count(level), levels.count(level)) for levels in others)
                assert snapshot.position(key, rank(at, level), level) == len(before) + higher + turns


def test_medians_are_learned_by_kind_and_scaled_by_steps():
    model = CostModel()
    ten, twenty = (
        cost_class(replace(PARAMETERS, options=replace(PARAMETERS.options, num_inference_steps=n))) for n in (10, 20)
    )
    assert model.cost(ten) is None
    for seconds in (10.0, 20.0, 90.0):
        model.learn(ten, {"encode_prompt": 1.0, "denoise": seconds, "decode": 4.0})
    assert model.cost(ten).stage_seconds == {"encode_prompt": 1.0, "denoise": 20.0, "decode": 4.0}
    assert model.cost(twenty).total_s == 45.0 and model.cost(twenty).bottleneck_s == 40.0
    other = cost_class(replace(PARAMETERS, height=128))
    assert model.cost(other) is None
    assert model.mean_bottleneck_s({ten: 3, twenty: 1, other: 9}) == 25.0
    assert model.mean_bottleneck_s({other: 1}) is None


def test_estimates_count_what_is_before_and_what_is_under_way():
    model = CostModel()
    name = cost_class(PARAMETERS)
    model.learn(name, {"encode_prompt": 2.0, "denoise": 30.0, "decode": 8.0})
    running = Job("r", PARAMETERS, NOW_S, state=JobState.RUNNING, progress=Progress(JobStage.DENOISE, 5, 10))
    running = replace(running, stage_seconds={"encode_prompt": 2.0}, start_time_s=NOW_S - 17)
    assert remaining_s(running, model.cost(name)) == pytest.approx(23.0)
    load = Load.of([running], {name: 3}, 1, model)
    waiting = Job("w", PARAMETERS, NOW_S)
    told = estimate(waiting, 2, load, model, NOW_S)
    assert told.position == 2 and told.start_time_s == pytest.approx(NOW_S + 23 + 60)
    assert told.end_time_s == pytest.approx(told.start_time_s + 40)
    assert estimate(waiting, 2, replace(load, lanes=2), model, NOW_S).start_time_s == pytest.approx(NOW_S + 41.5)
    assert estimate(running, 0, load, model, NOW_S).end_time_s == pytest.approx(NOW_S + 23)
    assert estimate(waiting, 2, load, CostModel(), NOW_S).start_time_s is None


def test_a_table_becomes_jobs_with_seeds_counted_up():
    template = pb.GenerationParameters(options=generation_pb2.SamplingOptions(seed=40, num_inference_steps=3))
    table = 'text_prompt,image_path\n"a dog, barking <S>hi<E>",\nb,abc\n'.encode("utf-8-sig")
    wishes = parameters_of(pb.BatchCreateRequest(table=table, template=template, samples_per_prompt=2))
    assert [(w.prompt, w.image_id, w.options.seed, w.options.num_inference_steps) for _, w in wishes] == [
        ("a dog, barking <S>hi<E>", "", 40, 3),
        ("a dog, barking <S>hi<E>", "", 41, 3),
        ("b", "abc", 40, 3),
        ("b", "abc", 41, 3),
    ]
    assert [path for path, _ in wishes] == ["table[0]"] * 2 + ["table[1]"] * 2
    tabs = parameters_of(pb.BatchCreateRequest(table=b"image_path\ttext_prompt\r\n\ta, b\r\n"))
    assert [(w.prompt, w.options.seed) for _, w in tabs] == [("a, b", SamplingOptions().seed)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.BatchCreateRequest(), "requests"),
        (pb.BatchCreateRequest(table=b"text_prompt\n"), "table"),
        (pb.BatchCreateRequest(table=b"text_prompt\na", requests=[pb.GenerationParameters(prompt="a")]), "requests"),
        (pb.BatchCreateRequest(table=b"prompt\na"), "table"),
        (pb.BatchCreateRequest(table=b"\xff\xfe"), "table"),
        (pb.BatchCreateRequest(table=b'text_prompt\n"a'), "table"),
        (pb.BatchCreateRequest(table=b"text_prompt,image_path\na\n"), "table[0]"),
        (pb.BatchCreateRequest(table=b"text_prompt\na,b\n"), "table[0]"),
        (pb.BatchCreateRequest(table=b"text_prompt\n" + b"a\n" * (MAX_JOBS + 1)), "table"),
        (pb.BatchCreateRequest(table=b"text_prompt\n" + b"a" * (3 << 20)), "table"),
        (pb.BatchCreateRequest(table=b"text_prompt\na", samples_per_prompt=101), "samples_per_prompt"),
        (pb.BatchCreateRequest(table=b"text_prompt\na", request_id="a b"), "request_id"),
        (
            pb.BatchCreateRequest(table=b"text_prompt\na", template=pb.GenerationParameters(prompt="x")),
            "template.prompt",
        ),
        (
            pb.BatchCreateRequest(
                requests=[pb.GenerationParameters(options=generation_pb2.SamplingOptions(seed=MAX_SEED))],
                samples_per_prompt=2,
            ),
            "requests[0].options.seed",
        ),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused_with_its_field(request_, field):
    with pytest.raises(InvalidRequest) as refused:
        parameters_of(request_)
    assert field in [violation.field for violation in refused.value.violations]
