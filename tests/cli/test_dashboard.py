"""The dashboard for Grafana: each query names metrics and labels that an engine has."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from engine.test_exposition import filled, parsed
from prometheus_client import Metric
from support.engine import udedup

from udedup.commands.dashboard import FILE
from udedup.engine.accounting import Status

DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
COLUMNS = 24
OF_PROMETHEUS = {"instance", "job", "le"}
"""Labels that metrics get on their way, and of histograms."""

EXPRESSIONS = [
    *(pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']}-{target['refId']}")
      for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *(pytest.param(each["expr"], each["titleFormat"], id=each["name"]) for each in DASHBOARD["annotations"]["list"]),
]  # fmt: skip


@pytest.fixture
async def metrics() -> dict[str, Metric]:
    """Each sample's name, and what it is a sample of."""
    status: Status = filled(Status, itertools.count(1))
    pressure = msgspec.structs.replace(status.pressure, level="none")
    found = await parsed(msgspec.structs.replace(status, pressure=pressure))
    return {sample.name: metric for metric in found.values() for sample in metric.samples}


def test_it_is_printed() -> None:
    done = udedup("dashboard")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == DASHBOARD


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
async def test_queries_are_of_metrics_there_are(metrics: dict[str, Metric], expression: str, legend: str) -> None:
    names = re.findall(r"\budedup_\w+", expression)
    assert names
    assert set(names) <= metrics.keys()
    labels = {label for name in names for sample in metrics[name].samples for label in sample.labels} | OF_PROMETHEUS
    asked = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    asked += [label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")]
    assert set(asked) | set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels
    assert 'instance=~"$instance"' in expression
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
async def test_rates_are_of_counters_alone(metrics: dict[str, Metric], expression: str, legend: str) -> None:
    """And of all counters, for their values say nothing."""
    rated = set(re.findall(r"\brate\((\w+)\{[^}]*\}\[\$__rate_interval\]\)", expression))
    for name in re.findall(r"\budedup_\w+", expression):
        assert (name in rated) == (metrics[name].type in ("counter", "histogram")), name
    assert ("histogram_quantile" in expression) == any(metrics[name].type == "histogram" for name in rated)


def places(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    place = panel["gridPos"]
    assert place["x"] + place["w"] <= COLUMNS
    yield from itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))


def sources(part: object) -> Iterator[dict[str, str]]:
    """All sources of data that are named in it."""
    if isinstance(part, dict):
        yield from [part["datasource"]] if "datasource" in part else []
        yield from itertools.chain.from_iterable(map(sources, part.values()))
    elif isinstance(part, list):
        yield from itertools.chain.from_iterable(map(sources, part))


def test_panels() -> None:
    """Each says what it is, none covers another, and all ask the source of data that is chosen."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
    taken = [place for panel in panels for place in places(panel)]
    assert len(taken) == len(set(taken))
    assert {source["uid"] for source in sources(DASHBOARD)} == {"${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]
