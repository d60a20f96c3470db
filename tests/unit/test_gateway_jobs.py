"""The jobs table and its tracker: order, idempotency, exactly one end, nothing missed by watchers."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from ovi.common.v1 import system_pb2
from ovi.gateway.v1 import gateway_pb2
from services.gateway.artifacts import is_job_id
from services.gateway.database import open_database
from services.gateway.jobs.domain import (
    UNFINISHED,
    ClipParameters,
    Ending,
    Job,
    JobFailure,
    JobStage,
    JobState,
    Progress,
    Submission,
    VideoInfo,
    new_job_id,
)
from services.gateway.jobs.listing import JobFilter
from services.gateway.jobs.schema import jobs
from services.gateway.jobs.store import JobStore
from services.gateway.jobs.tracker import JobTracker
from services.gateway.messages import job_to_proto
from services.gateway.metrics import GatewayMetrics
from services.gateway.migrations import migrate
from services.gateway.validation import MAX_PROMPT_CHARACTERS
from shared.errors import AlreadyExists, DiskFull, FailedPrecondition, InvalidRequest, NotFound, Unavailable
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver

PARAMETERS = ClipParameters(
    "a cat", "blur", "echo", "tiny", 64, 96, 121, SamplingOptions(seed=5, solver=Solver.DPMPP), "a" * 64
)
VIDEO = VideoInfo(num_bytes=1234, height=64, width=96, num_frames=121, fps=24)


@pytest.fixture
def store(tmp_path) -> Iterator[JobStore]:
    database = open_database(tmp_path / "jobs.sqlite3")
    migrate(database)
    store = JobStore(database)
    yield store
    database.dispose()


def make(store: JobStore, request_id: str = "", request_hash: str = "h", **asked: Any) -> Job:
    submission = Submission(request_id=request_id, **asked)
    return store.create(Job(new_job_id(), PARAMETERS, create_time_s=100.5, submission=submission), request_hash)


def ids_of(store: JobStore, *states: JobState) -> list[str]:
    """All jobs in some states, oldest first."""
    wanted = JobFilter(states=frozenset(states), oldest_first=True)
    return [job.id for job in store.page(page_size=1000, wanted=wanted).jobs]


def test_job_survives_the_table(store):
    job = make(store, "r")
    assert store.get(job.id) == job
    begun = store.begin(job.id, 101.5)
    assert begun == replace(job, state=JobState.RUNNING, attempts=1, start_time_s=101.5)
    store.save(job.id, Progress(JobStage.DENOISE, 9, 10), {})
    assert store.begin(job.id, 109.0) == replace(begun, attempts=2), "the first start stands, the progress does not"
    store.save(job.id, Progress(JobStage.DENOISE, 3, 10), {"encode_prompt": 0.25})
    ended = store.finish(job.id, Ending.completed(VIDEO), 110.5)
    assert ended == store.get(job.id)
    assert ended.video == VIDEO and ended.stage_seconds == {"encode_prompt": 0.25} and ended.end_time_s == 110.5
    assert ended.progress.fraction == 1.0


def test_a_job_written_without_a_step_cache_or_modes_still_loads(store):
    job = make(store)
    ended = store.finish(job.id, Ending.completed(VIDEO), 1.0)
    with store._engine.begin() as connection:
        (row,) = connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).mappings()
        options = {key: value for key, value in row["parameters"]["options"].items() if key != "step_cache_threshold"}
        video = {key: value for key, value in row["video"].items() if key not in ("steps_reused", "vram_mode")}
        change = sa.update(jobs).where(jobs.c.id == job.id)
        parameters = {key: value for key, value in row["parameters"].items() if key != "vram_mode"}
        connection.execute(change.values(parameters={**parameters, "options": options}, video=video))
    assert store.get(job.id) == ended


def test_modes_survive_the_table_and_the_wire(store):
    wanted = replace(PARAMETERS, vram_mode=VramMode.FP8_OFFLOAD)
    job = store.create(Job(new_job_id(), wanted, create_time_s=100.5), "h")
    ended = store.finish(job.id, Ending.completed(replace(VIDEO, vram_mode=VramMode.ULTRA_LOW)), 110.5)
    assert ended == store.get(job.id) and ended.parameters == wanted
    assert VideoInfo.from_json(json.loads(json.dumps(ended.video.to_json()))) == ended.video
    message = job_to_proto(ended)
    assert message.parameters.vram_mode == system_pb2.VRAM_MODE_FP8_OFFLOAD
    assert message.video.vram_mode == system_pb2.VRAM_MODE_ULTRA_LOW


def test_ids_are_fresh_sorted_by_time_and_fit_their_pattern():
    ids = [new_job_id() for _ in range(1000)]
    assert len(set(ids)) == 1000 and all(map(is_job_id, ids))
    assert [job_id[:14] for job_id in ids] == sorted(job_id[:14] for job_id in ids)
    for text in ("", "job_", ids[0] + "\n", ids[0].lower(), "job_" + "U" * 26, "../" + ids[0]):
        assert not is_job_id(text)


def test_request_id_gives_the_same_job_or_is_refused(store):
    first = make(store, "r", "one")
    assert make(store, "r", "one") == first == store.find_request("r", "one")
    with pytest.raises(AlreadyExists, match="'r'"):
        make(store, "r", "two")
    assert store.find_request("other", "one") is None
    assert make(store).id != make(store).id, "no request_id, no idempotency"


def test_one_of_many_concurrent_creates_wins(store):
    with ThreadPoolExecutor(8) as threads:
        ids = {job.id for job in threads.map(lambda _: make(store, "r"), range(16))}
    assert len(ids) == 1 and ids_of(store, JobState.QUEUED) == list(ids)


def test_exactly_one_ending_is_written(store):
    endings = [Ending.completed(VIDEO), Ending.cancelled(), Ending.failed("INTERNAL", "no")] * 4
    for _ in range(5):
        job = make(store)
        store.begin(job.id, 1.0)
        together = threading.Barrier(len(endings))

        def end(ending: Ending, job_id: str = job.id, together: threading.Barrier = together) -> Job | None:
            together.wait()
            return store.finish(job_id, ending, 2.0)

        with ThreadPoolExecutor(len(endings)) as threads:
            won = [job for job in threads.map(end, endings) if job is not None]
        assert len(won) == 1 and store.get(job.id) == won[0]


@pytest.mark.parametrize("ending", [Ending.completed(VIDEO), Ending.cancelled(), Ending.failed("INTERNAL", "no")])
def test_nothing_changes_an_ended_job(store, ending):
    job = make(store)
    ended = store.finish(job.id, ending, 2.0)
    assert store.finish(job.id, Ending.failed("INTERNAL", "other"), 3.0) is None
    assert store.begin(job.id, 3.0) is None
    assert store.save(job.id, Progress(JobStage.DECODE, 1, 2), {"decode": 1.0}) is None
    assert store.get(job.id) == ended
    assert (ended.failure == JobFailure("INTERNAL", "no")) == (ending.state is JobState.FAILED)


@pytest.mark.parametrize(
    ("state", "failure", "video"),
    [
        (JobState.COMPLETED, None, None),
        (JobState.FAILED, None, None),
        (JobState.CANCELLED, None, VIDEO),
        (JobState.RUNNING, None, None),
    ],
)
def test_endings_that_make_no_sense_cannot_be_made(state, failure, video):
    with pytest.raises(ValueError, match="cannot end"):
        Ending(state, failure, video)


def test_pages_show_every_job_once_newest_first(store):
    ids = [make(store).id for _ in range(7)]
    seen, token = [], ""
    while True:
        page = store.page(page_size=3, page_token=token)
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
        if len(seen) == 3:
            make(store)  # A job made meanwhile is newer than every page to come.
        if not token:
            break
    assert seen == ids[::-1]


def test_a_page_of_the_longest_prompts_fits_a_message(store):
    text = "\N{CLAPPER BOARD}" * MAX_PROMPT_CHARACTERS
    parameters = replace(PARAMETERS, prompt=text, video_negative_prompt=text, audio_negative_prompt=text)
    ids = [store.create(Job(new_job_id(), parameters, create_time_s=1.0), "h").id for _ in range(120)]
    store.begin(ids[60], 1.0)
    store.finish(ids[60], Ending.failed("INTERNAL", text), 2.0)
    seen, token, sizes = [], "", []
    while not seen or token:
        page = store.page(page_size=1000, page_token=token)
        answer = gateway_pb2.ListJobsResponse(jobs=map(job_to_proto, page.jobs), next_page_token=page.next_page_token)
        sizes.append(answer.ByteSize())
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
    assert seen == ids[::-1]
    assert max(sizes) < 4 << 20, "gRPC's default limit"
    assert min(sizes[:-1]) > 2 << 20, "pages are as full as they can be"


def test_states_filter_pages_and_bind_their_tokens(store):
    ids = [make(store).id for _ in range(6)]
    for job_id in ids[::2]:
        store.finish(job_id, Ending.cancelled(), 1.0)
    cancelled = JobFilter(states=frozenset({JobState.CANCELLED}))
    page = store.page(page_size=2, page_token="", wanted=cancelled)
    assert [job.id for job in page.jobs] == [ids[4], ids[2]]
    rest = store.page(page_size=2, page_token=page.next_page_token, wanted=cancelled)
    assert [job.id for job in rest.jobs] == [ids[0]] and rest.next_page_token == ""
    for token in (page.next_page_token, "x", "é", "bnVsbA==", "WzFd"):
        with pytest.raises(InvalidRequest, match="page_token"):
            store.page(page_size=2, page_token=token, wanted=JobFilter(states=frozenset({JobState.QUEUED})))
    _, digest = json.loads(base64.urlsafe_b64decode(page.next_page_token))
    nested = base64.urlsafe_b64encode(b"[" * 200_000).decode()
    forged = [base64.urlsafe_b64encode(json.dumps([seq, digest]).encode()).decode() for seq in (True, 2**63, -1, 0.5)]
    for token in (nested, *forged):
        with pytest.raises(InvalidRequest, match="page_token"):
            store.page(page_size=2, page_token=token, wanted=cancelled)
    assert store.count_by_state()[JobState.CANCELLED] == 3 and store.count_by_state()[JobState.RUNNING] == 0
    assert ids_of(store, *UNFINISHED) == ids[1::2]


def test_delete_is_for_ended_jobs(store):
    job = make(store)
    with pytest.raises(FailedPrecondition, match="is queued; cancel it"):
        store.delete(job.id)
    store.finish(job.id, Ending.cancelled(), 1.0)
    store.delete(job.id)
    store.delete(job.id)
    with pytest.raises(NotFound, match=job.id):
        store.get(job.id)


def test_fraction_never_goes_back_through_the_stages():
    way = [Progress()]
    for stage, total in (
        (JobStage.ENCODE_PROMPT, 0),
        (JobStage.ENCODE_IMAGE, 0),
        (JobStage.DENOISE, 50),
        (JobStage.DECODE, 121),
        (JobStage.DONE, 0),
    ):
        way += [Progress(stage, done, total) for done in range(total + 1)]
    fractions = [progress.fraction for progress in way]
    assert fractions == sorted(fractions) and fractions[0] == 0.0 and fractions[-1] == 1.0


def tracked(store: JobStore, test) -> None:
    async def main() -> None:
        tracker = JobTracker(store, GatewayMetrics())
        try:
            await asyncio.wait_for(test(tracker), 30)
        finally:
            tracker.close()

    asyncio.run(main())


def test_watcher_sees_each_step_and_the_end(store):
    job = make(store)

    async def test(tracker: JobTracker) -> None:
        watch = tracker.watch(job.id)
        assert (await anext(watch)).state is JobState.QUEUED
        await tracker.begin(job.id)
        await tracker.enter(job.id, JobStage.DENOISE, total=3)
        for done in (1, 2, 3):
            await tracker.advance(job.id, done, 3)
        await tracker.leave(job.id, JobStage.DENOISE, 1.5)
        assert await tracker.finish(job.id, Ending.completed(VIDEO))
        seen = [job async for job in watch]
        steps = [job.progress.done for job in seen if job.progress.stage is JobStage.DENOISE]
        assert steps == [0, 1, 2, 3, 3] and seen[-1] == store.get(job.id)
        assert seen[-1].stage_seconds == {"denoise": 1.5}

    tracked(store, test)


def test_end_between_subscribing_and_reading_is_not_missed(store):
    async def test(tracker: JobTracker) -> None:
        for _ in range(50):
            job = make(store)
            await tracker.begin(job.id)

            async def last(job_id: str = job.id) -> Job:
                return [seen async for seen in tracker.watch(job_id)][-1]

            watched, _ = await asyncio.gather(last(), tracker.finish(job.id, Ending.cancelled()))
            assert watched.state is JobState.CANCELLED

    tracked(store, test)


def test_slow_watcher_costs_bounded_memory_and_still_sees_the_end(store):
    job = make(store)

    async def test(tracker: JobTracker) -> None:
        await tracker.begin(job.id)
        await tracker.enter(job.id, JobStage.DENOISE, total=1000)
        watch = tracker.watch(job.id)
        await anext(watch)
        for done in range(1, 1001):
            await tracker.advance(job.id, done, 1000)
        await tracker.finish(job.id, Ending.cancelled())
        seen = [job async for job in watch]
        assert len(seen) <= 300 and seen[-1].state is JobState.CANCELLED
        done = [job.progress.done for job in seen]
        assert done == sorted(done)

    tracked(store, test)


def test_progress_is_read_at_once_and_written_once_a_second(store):
    job = make(store)

    async def test(tracker: JobTracker) -> None:
        await tracker.begin(job.id)
        await tracker.enter(job.id, JobStage.DENOISE, total=10)
        await tracker.advance(job.id, 1, 10)
        assert (await tracker.get(job.id)).progress.done == 1
        assert store.get(job.id).progress == Progress(JobStage.DENOISE, 0, 10), "kept at the stage's begin"
        assert (await tracker.page(page_size=9)).jobs[0].progress.done == 1

    tracked(store, test)


def test_progress_after_the_end_is_dropped(store):
    job = make(store)

    async def test(tracker: JobTracker) -> None:
        await tracker.begin(job.id)
        await tracker.finish(job.id, Ending.cancelled())
        await tracker.enter(job.id, JobStage.DECODE, total=5)
        await tracker.advance(job.id, 1, 5)
        await tracker.leave(job.id, JobStage.DECODE, 1.0)
        assert not await tracker.finish(job.id, Ending.completed(VIDEO))
        assert await tracker.begin(job.id) is None
        assert (await tracker.get(job.id)) == store.get(job.id)
        assert store.get(job.id).state is JobState.CANCELLED and store.get(job.id).progress == Progress()

    tracked(store, test)


def test_draining_sends_watchers_away(store):
    job = make(store)

    async def test(tracker: JobTracker) -> None:
        watch = tracker.watch(job.id)
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        tracker.end_watches()
        with pytest.raises(Unavailable, match="draining"):
            await waiting

    tracked(store, test)


def test_a_full_database_is_said_and_waited_for(tmp_path):
    database = open_database(tmp_path / "jobs.sqlite3")
    migrate(database)
    with database.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    limits: list[int] = [pages + 4]

    @sa.event.listens_for(database, "checkout")
    def limit(connection, record, proxy):
        connection.execute(f"PRAGMA max_page_count={limits[-1]}")

    async def scenario() -> None:
        tracker = JobTracker(JobStore(database), GatewayMetrics())
        long = replace(PARAMETERS, prompt="x" * 5000)
        kept: list[Job] = []
        with pytest.raises(DiskFull, match="free some space"):
            while len(kept) < 100:
                kept.append(await tracker.create(Job(new_job_id(), long, create_time_s=1.0), "h"))
        assert kept, "there was room for some"
        failure = Ending.failed("INTERNAL", "y" * 20_000)
        with pytest.raises(DiskFull):
            await tracker.finish(kept[0].id, failure)
        assert (await tracker.get(kept[0].id)).state is JobState.QUEUED
        limits.append(pages + 1000)
        assert await tracker.finish(kept[0].id, failure)
        assert (await tracker.get(kept[0].id)).state is JobState.FAILED
        tracker.close()

    asyncio.run(scenario())
    database.dispose()
