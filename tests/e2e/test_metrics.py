"""What Prometheus scrapes of a running stack has every name that dashboards and alerts ask for."""

from __future__ import annotations

import re
import urllib.request

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.deploy.monitoring import OF_PROMETHEUS, expressions, selected
from tests.e2e.conftest import RunningStack

_OF_HISTOGRAMS = ("_bucket", "_sum", "_count")


def test_dashboards_and_alerts_ask_for_what_a_stack_tells(stack: RunningStack) -> None:
    job = stack.finished(stack.create("counted", steps=1).id)
    assert job.state == pb.JOB_STATE_COMPLETED, job
    with urllib.request.urlopen(f"{stack.info['http_url']}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    told = set(kinds) | {name + end for name, kind in kinds.items() if kind == "histogram" for end in _OF_HISTOGRAMS}
    asked = {name for _, expression in expressions() for name, _ in selected(expression)} - OF_PROMETHEUS
    assert asked <= told, asked - told
    assert re.search(r'^ovi_jobs_ended_total\{state="completed"\} [1-9]', text, re.MULTILINE)
    assert re.search(r'^ovi_jobs\{state="running"\} 0', text, re.MULTILINE)
    stages = set(re.findall(r'^ovi_stage_seconds_count\{stage="(\w+)"\} [1-9]', text, re.MULTILINE))
    assert {"encode_prompt", "denoise", "decode"} <= stages
