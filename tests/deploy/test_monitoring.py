"""Dashboard and alerts: well-formed, and about metrics that the gateway has."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.memory import StageDevices
from services.gateway.metrics import GatewayMetrics
from services.gateway.workers.choosing import WorkerState
from services.gateway.workers.replicas import WorkerSource, WorkerView
from shared.memory.device_state import DeviceState
from shared.memory.modes import VramMode
from tests.deploy.commands import ROOT
from tests.deploy.monitoring import OF_PROMETHEUS, alerts, dashboard, expressions, grouped_by, selected


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Labels of every sample that the gateway shows once everything has happened that it counts."""
    metrics = GatewayMetrics()
    metrics.job_created()
    metrics.job_ended("failed")
    metrics.stage_finished("decode", 1.0)
    metrics.stage_waited("vae")
    metrics.step_finished(0.1)
    metrics.mode_was_lowered()
    metrics.steps_repeated(3)
    gpu = DeviceState("cuda:0", "NVIDIA H200", "GPU-0", "cuda", 100, 60, 30, 10, utilization=0.5)
    answers = [StageDevices("fusion", "localhost", (gpu,))]
    metrics.devices.show({"GPU-0": gpu}, answers, num_warnings=1, mode=VramMode.STANDARD)
    worker = WorkerView("fusion", "f:1", WorkerSource.ADDRESS, WorkerState.SERVING, "", None, 2, (), 0.0)
    metrics.workers.show([worker])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render({"queued": 2, "running": 1}).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_an_expression_reads_metrics_and_labels_that_there_are(
    known: dict[str, set[str]], place: str, expression: str
) -> None:
    read = selected(expression)
    assert read, f"{place} reads nothing"
    labels: set[str] = set()
    for name, matchers in read:
        if name in OF_PROMETHEUS:
            continue
        assert name in known, f"{place}: the gateway has no {name}"
        assert set(matchers) <= known[name], f"{place}: {name} has the labels {known[name]}"
        labels |= known[name]
    assert grouped_by(expression) <= labels, place


def test_alerts_say_how_bad_it_is_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("info", "warning", "critical"), rule["alert"]
        assert rule["annotations"]["summary"] and rule["annotations"]["description"], rule["alert"]
        labels = grouped_by(rule["expr"]) | {"instance"}
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert used <= labels, f"{rule['alert']} shows labels that its expression has not"
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)


def test_every_alert_is_explained() -> None:
    table = (ROOT / "docs" / "operations.md").read_text().partition("## What to watch")[2]
    assert set(re.findall(r"\bOvi[A-Z]\w+", table)) == {rule["alert"] for rule in alerts()}


def test_panels_have_places_units_and_words() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_prometheus_and_grafana_find_their_files_and_each_other() -> None:
    services = load("compose.yaml")["services"]
    prometheus = load("deploy/prometheus/prometheus.yaml")
    mounts = {volume["target"]: volume["source"] for volume in services["prometheus"]["volumes"]}
    for file in prometheus["rule_files"]:
        assert (ROOT / mounts["/etc/prometheus"] / file.removeprefix("/etc/prometheus/")).is_file()
    (job,) = prometheus["scrape_configs"]
    assert (job["job_name"], job["dns_sd_configs"][0]["port"]) == ("ovi-gateway", 8000)
    assert job["dns_sd_configs"][0]["names"] == ["gateway"]
    (source,) = load("deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("deploy/grafana/provisioning/dashboards/ovi.yaml")["providers"]
    mounts = {volume["target"]: volume["source"] for volume in services["grafana"]["volumes"]}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"])
    folder = ROOT / mounts[provider["options"]["path"]]
    assert (folder / home.rpartition("/")[2]).is_file()
