"""What dashboards and alerts ask of Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.deploy.commands import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "ovi.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
OF_PROMETHEUS = {"up"}


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for rule in alerts():
        yield rule["alert"], rule["expr"]


def selected(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Every metric that an expression reads, with the values that its labels must equal.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[tuple[str, dict[str, str]]] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            matchers = {matcher.name: matcher.value for matcher in node.matchers.matchers}
            found.append((node.name, matchers))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def grouped_by(expression: str) -> set[str]:
    """Labels by which it aggregates, but for those that Prometheus itself brings."""
    labels: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return labels - {"le", "instance", "job"}
