"""The short storms; `make chaos` has the long ones."""

from __future__ import annotations

import av
import pytest

from tests.chaos.clips import NUM_FRAMES, encoded, played
from tests.chaos.storm import Plan, Storm, check
from tests.grpc.scripted_stages import latents_of
from tests.postgres import running_postgres


def test_what_is_taken_for_a_clip_plays():
    one, other = encoded(*latents_of(1)), encoded(*latents_of(2))
    assert one != other and played(one).num_frames == NUM_FRAMES
    with pytest.raises(av.FFmpegError):
        played(one[: len(one) // 2])


@pytest.mark.timeout(400)
def test_one_gateway_on_sqlite(tmp_path):
    plan = Plan(num_jobs=24, num_gateways=1, pause_s=1.5, blows=4, limit_s=300.0)
    report = Storm(tmp_path, plan, None).run()
    assert report.blows == {"gateway killed": 2, "worker killed": 2}
    check(report, plan)


@pytest.mark.timeout(400)
def test_three_gateways_on_postgresql(tmp_path):
    plan = Plan(num_jobs=24, num_gateways=3, pause_s=1.0, blows=4, limit_s=300.0)
    with running_postgres() as postgres:
        report = Storm(tmp_path, plan, postgres).run()
    assert set(report.blows.values()) == {1} and len(report.blows) == 4
    check(report, plan)
