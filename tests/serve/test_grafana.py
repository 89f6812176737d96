"""The Grafana dashboard, without a server; that a live one exposes its metrics is in tests/e2e/test_page.py."""

from __future__ import annotations

from itertools import combinations

from prometheus_client import CollectorRegistry

from fraqtl_serve.reports.metrics import Metrics
from tests.grafana import DASHBOARD, expressions, metric_names
from tests.serve.pools import pool


def test_every_metric_of_ours_exists() -> None:
    registry = CollectorRegistry()
    Metrics(registry).set_pool(pool())
    exposed = {sample.name for family in registry.collect() for sample in family.samples}
    used = {name for name in metric_names() if name.startswith("fraqtl:")}
    assert used and used <= exposed


def test_panels_are_apart_and_ask_the_chosen_source() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert {panel["datasource"]["uid"]} | {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for a, b in combinations((panel["gridPos"] for panel in panels), 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_every_query_keeps_to_the_chosen_instances() -> None:
    for expression in expressions():
        names = metric_names([expression])
        assert names and expression.count('{instance=~"$instance"}') >= len(names), expression
        assert expression.count("(") == expression.count(")")
