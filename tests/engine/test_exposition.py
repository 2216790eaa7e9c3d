"""The metrics' text, by the library's own parser and by the rules that `promtool check metrics` goes by."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import msgspec
import pytest
import trio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from udedup.engine.accounting import AgentStatus, LeadTimes, Status
from udedup.engine.exposition import AGENTS, ENGINE, IMAGES, render

ELSEWHERE = {
    *("pid", "policy"),  # udedup_engine_info
    *("pressure.level", "agents.pid", "agents.uid", "agents.domain", "agents.command", "images.name", "images.format"),
    *("lead_time_seconds.p50", "lead_time_seconds.p90", "lead_time_seconds.p99"),  # a histogram
}
"""Fields that are not in the tables, but labels or metrics of their own."""

NOWHERE = {
    *("socket", "mount", "images.path", "agents.reason"),  # texts
    *("kernel.pss_bytes", "kernel.saved_bytes", "kernel.unreadable"),  # take too long to find out
}


def filled(kind: Any, numbers: Iterator[int], name: str = "") -> Any:
    """A value of a type in which no number is there twice."""
    if get_origin(kind) is list:
        return [filled(get_args(kind)[0], numbers, f"{name}{each}") for each in range(2)]
    if get_args(kind):
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: filled(field.type, numbers, field.name) for field in msgspec.structs.fields(kind)})
    return {int: int, float: lambda each: each + 0.5, bool: bool, str: lambda each: f"{name} {each}"}[kind](
        next(numbers)
    )


def leaves(kind: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all fields that are no structures themselves."""
    if get_args(kind):
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield from leaves(field.type, f"{prefix}.{field.name}" if prefix else field.name)
    else:
        yield prefix


@pytest.fixture
def status() -> Status:
    found: Status = filled(Status, itertools.count(1000))
    return msgspec.structs.replace(found, pressure=msgspec.structs.replace(found.pressure, level="some"))


async def parsed(status: Status, lead_times: LeadTimes | None = None) -> dict[str, Metric]:
    """All metrics by name, of which none is there twice."""
    text = (await render(status, lead_times or LeadTimes())).decode()
    metrics = list(text_string_to_metric_families(text))
    assert max(Counter(metric.name for metric in metrics).values()) == 1
    samples = [(sample.name, *sorted(sample.labels.items())) for metric in metrics for sample in metric.samples]
    assert max(Counter(samples).values()) == 1
    return {metric.name: metric for metric in metrics}


def test_every_field_of_the_status_is_shown() -> None:
    """Once, or it is said why not."""
    shown = Counter(field for family in ENGINE for field in family.by_label.values())
    shown += Counter(f"agents.{field}" for family in AGENTS for field in family.by_label.values())
    shown += Counter(f"images.{field}" for family in IMAGES for field in family.by_label.values())
    assert set(shown.values()) == {1}
    assert shown.keys() | ELSEWHERE | NOWHERE == set(leaves(Status))
    assert shown.keys().isdisjoint(ELSEWHERE | NOWHERE)


async def test_values(status: Status) -> None:
    metrics = await parsed(status)

    def value(name: str, **labels: str) -> float:
        (found,) = (
            sample.value
            for sample in metrics[name.removesuffix("_total")].samples
            if sample.name == name and sample.labels == labels
        )
        return found

    assert value("udedup_pages_scanned_total") == status.pages_scanned
    assert value("udedup_sleep_seconds") == pytest.approx(status.limits.sleep_millisecs / 1000)
    assert value("udedup_cpu_limit_ratio") == pytest.approx((status.limits.cpu_percent or 0) / 100)
    assert value("udedup_refused_pages_total", reason="no_vma") == status.merges.no_vma
    assert value("udedup_cpu_seconds_total", part="agents") == status.cpu_seconds.agents
    assert value("udedup_agents") == 2
    levels = {sample.labels["level"]: sample.value for sample in metrics["udedup_pressure_level"].samples}
    assert levels == {"off": 0, "none": 0, "some": 1, "full": 0}
    for agent in status.agents:
        labels = {"pid": str(agent.pid), "uid": str(agent.uid), "domain": agent.domain, "command": "command"}
        assert value("udedup_agent_runs", **labels) == agent.runs
        assert value("udedup_agent_merging", **labels) == 1
    image = status.images[1]
    assert value("udedup_image_blocks_read_total", image=image.name, format=image.format) == image.blocks_read


async def test_what_is_unknown_is_not_there(status: Status) -> None:
    limits = msgspec.structs.replace(status.limits, cpu_percent=None)
    bare = msgspec.structs.replace(status, limits=limits, agents=[], images=[])
    metrics = await parsed(bare)
    assert metrics["udedup_cpu_limit_ratio"].samples == []
    assert metrics["udedup_agent_runs"].samples == []


UNITS = re.compile(
    r"_(?:milli|micro|nano)?secs?(?:_|$)|(?:milli|micro|nano)seconds|minutes|hours|kilobytes|[kmgt]i?b(?:_|$)|percent|bits"
)


async def test_names_are_as_prometheus_wants_them(status: Status) -> None:
    """The rules of client_golang's promlint, which promtool goes by."""
    for metric in (await parsed(status)).values():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert metric.documentation, name
        assert re.fullmatch(r"udedup(_[a-z0-9]+)+", name), name
        assert not UNITS.search(name), name
        assert not re.search(r"counter|gauge|histogram|summary", name), name
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")), name
        for sample in metric.samples:
            assert all(re.fullmatch(r"[a-z]+", label) for label in sample.labels), name
            if metric.type == "counter":
                assert sample.name == name
        if "seconds" in name or "bytes" in name:
            assert re.search(r"_(seconds|bytes)(_total)?$", name), name


def agent(status: Status, **changed: object) -> AgentStatus:
    return msgspec.structs.replace(status.agents[0], **changed)


async def test_labels_are_what_they_are(status: Status) -> None:
    """Whatever a program calls itself; and of its command, nothing but its name."""
    odd = 'a"b\\c\nd{e="f"}, ü'
    agents = [
        agent(status, pid=1, domain=odd, command="/usr/bin/my-server --password secret /path/x"),
        agent(status, pid=2, command=""),
    ]
    metrics = await parsed(msgspec.structs.replace(status, agents=agents))
    first, second = (sample.labels for sample in metrics["udedup_agent_runs"].samples)
    assert (first["domain"], first["command"]) == (odd, "my-server")
    assert second["command"] == ""
    assert "secret" not in str(metrics)


async def test_no_sample_is_there_twice(status: Status) -> None:
    """Programs that look alike are added up: Prometheus would take none of the text."""
    agents = [agent(status, pid=0, runs=3), agent(status, pid=0, runs=4), agent(status, pid=1, runs=5)]
    metrics = await parsed(msgspec.structs.replace(status, agents=agents))
    assert {sample.labels["pid"]: sample.value for sample in metrics["udedup_agent_runs"].samples} == {"0": 7, "1": 5}
    assert metrics["udedup_agents"].samples[0].value == 3


async def test_lead_times(status: Status) -> None:
    """A histogram in which no bucket is below the one before, by the engine's own buckets."""
    lead_times = LeadTimes()
    for bucket, count in ((4 * 19, 5), (4 * 20, 7), (4 * 29 + 3, 11), (4 * 45, 13)):
        lead_times.histogram[bucket] = count
    metric = (await parsed(status, lead_times))["udedup_lead_time_seconds"]
    assert metric.type == "histogram"
    buckets = {sample.labels["le"]: sample.value for sample in metric.samples if sample.name.endswith("_bucket")}
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["0.001048576"] == 5
    assert buckets[str(2**21 / 1e9)] == 12
    assert buckets[str(2**29 / 1e9)] == 12
    assert buckets[str(2**30 / 1e9)] == 23
    assert buckets["+Inf"] == 36
    (count,) = (sample.value for sample in metric.samples if sample.name.endswith("_count"))
    assert count == 36


async def test_others_have_their_turn(status: Status) -> None:
    """The text of thousands of programs is made in pieces."""
    turns, done = 0, False

    async def count_turns() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await trio.lowlevel.checkpoint()

    many = msgspec.structs.replace(status, agents=[agent(status, pid=pid) for pid in range(1000)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await render(many, LeadTimes())
        done = True
    assert turns > len(AGENTS)
