"""The engine's status as metrics of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

Names and units are those that Prometheus recommends; pages are called as node_exporter's ``ksmd`` collector calls the
kernel's. What one family needs is in one line of a table, which names the field of ``udedup.engine.accounting.Status``
that it shows; what takes long to find out (``Status.kernel``) is not there, and no arguments of commands, which may be
secret.

Needs the extra ``metrics``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from operator import attrgetter
from typing import Final, Literal, TypeVar

import attrs
import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from udedup.engine.accounting import AgentStatus, ImageStatus, LeadTimes, Status

PREFIX: Final = "udedup_"
LEAD_EXPONENTS: Final = range(20, 41)
"""The lead times' buckets end at these powers of two, ns: 1 ms to 18 minutes."""

BYTES_AT_ONCE: Final = 4096
ROWS_AT_ONCE: Final = 100
"""After a piece of that length, or so many rows, others have their turn."""

LEVELS: Final = ("off", "none", "some", "full")
"""Of memory pressure."""


@attrs.frozen
class Family:
    """One metric; a counter's name gets ``_total``."""

    name: str
    """Without PREFIX."""

    kind: Literal["counter", "gauge"]

    about: str

    fields: str | Mapping[str, str]
    """The field that it shows, or several by the value of ``label``."""

    label: str = ""
    """What tells several fields apart."""

    scale: float = 1.0
    """What the field's unit is in the metric's."""

    @property
    def by_label(self) -> Mapping[str, str]:
        """``fields``, alone under the empty value."""
        return {"": self.fields} if isinstance(self.fields, str) else self.fields


ENGINE: Final = (
    Family("uptime_seconds", "gauge", "Time since the engine's start.", "uptime_seconds"),
    Family("pages_shared", "gauge", "Pages of the store in use.", "pages_shared"),
    Family("pages_sharing", "gauge", "Mappings of shared pages beyond the first.", "pages_sharing"),
    Family("pages_unshared", "gauge", "Pages looked at that are equal to no other: candidates.", "pages_unshared"),
    Family("pages_volatile", "gauge", "Pages that changed since the round before.", "pages_volatile"),
    Family("zero_pages", "gauge", "Pages of zeros left to the kernel's own page of zeros.", "zero_pages"),
    Family("pages_scanned", "counter", "Pages looked at.", "pages_scanned"),
    Family("pages_skipped", "counter", "Pages that the smart scan passed over.", "pages_skipped"),
    Family("full_scans", "counter", "Times that the linear scan went through all memory.", "full_scans"),
    Family("pages_to_scan", "gauge", "Pages of the next spurt.", "pages_to_scan"),
    Family("sleep_seconds", "gauge", "Pause between two spurts.", "limits.sleep_millisecs", scale=1e-3),
    Family("cpu_limit_ratio", "gauge", "Limit of the advisor, of one processor.", "limits.cpu_percent", scale=1e-2),
    Family("hint_slots", "gauge", "Pages that the hint stack has room for.", "limits.hint_slots"),
    Family("vma_limit", "gauge", "Mappings of a program, from which on nothing more is merged in it.", "limits.vmas"),
    Family("saved_bytes", "gauge", "Memory saved, by the engine's account.", "bytes_saved"),
    Family("general_profit_bytes", "gauge", "Memory saved less the engine's and the agents' own.", "general_profit"),
    Family(
        "hints",
        "counter",
        "Hints taken in: of places from agents, of content (blocks) from the mount.",
        {"place": "hints.place", "content": "hints.content"},
        "kind",
    ),
    Family("hints_dropped", "counter", "Hints lost, and hinted pages that were forgotten.", "hints.dropped"),
    Family("hints_visited", "counter", "Hinted pages whose turn came.", "hints.visited"),
    Family("hints_merged", "counter", "Hinted pages merged in their own turn.", "hints.merged"),
    Family("hints_waiting", "gauge", "Pages on the hint stack.", "hints.waiting"),
    Family("merged_pages", "counter", "Pages that agents replaced by those of the store.", "merges.pages"),
    Family("merged_runs", "counter", "Runs that merged pages were in.", "merges.runs"),
    Family(
        "refused_pages",
        "counter",
        "Pages that were not merged though they seemed equal, by reason.",
        {name: f"merges.{name}" for name in ("mismatch", "busy", "gone", "no_vma", "deferred", "huge", "dropped")},
        "reason",
    ),
    Family("break_pages", "counter", "Shared pages written to.", "breaks.pages"),
    Family("break_events", "counter", "Write faults at shared pages; one may break several.", "breaks.events"),
    Family(
        "cpu_seconds", "counter", "CPU time.", {"engine": "cpu_seconds.engine", "agents": "cpu_seconds.agents"}, "part"
    ),
    Family(
        "memory_bytes",
        "gauge",
        "Memory that udedup itself uses, the store apart.",
        {"engine": "memory.engine", "agents": "memory.agents"},
        "part",
    ),
    Family("managed_bytes", "gauge", "Memory of programs that could be merged.", "memory.managed"),
    Family("store_segments", "gauge", "Segments of the store.", "store.segments"),
    Family("store_segments_adopted", "counter", "Segments taken over from earlier engines.", "store.adopted"),
    Family("store_segments_retired", "counter", "Segments given back.", "store.retired"),
    Family("store_bytes", "gauge", "Pages written to the store.", "store.bytes"),
    Family("store_live_bytes", "gauge", "Pages of the store that somebody uses.", "store.live_bytes"),
    Family(
        "index_pages",
        "gauge",
        "Pages that can be found by their content: of the store, and candidates.",
        {"shared": "index.shared", "candidates": "index.candidates"},
        "state",
    ),
    Family("index_bytes", "gauge", "Memory of the index.", "index.bytes"),
    Family(
        "blocks",
        "counter",
        "Blocks of images: given to readers out of the store, found equal to a page of it, and found to differ.",
        {name: f"blocks.{name}" for name in ("served", "entered", "differing")},
        "result",
    ),
    Family("agents_joined", "counter", "Programs that came.", "agents_total.joined"),
    Family("agents_dropped", "counter", "Programs that lied or did not answer.", "agents_total.dropped"),
    Family("agents_silent", "counter", "Of those dropped: programs that did not answer.", "agents_total.silent"),
    Family(
        "refused",
        "counter",
        "Connections and control requests that were not even begun.",
        {"connection": "refused.connections", "request": "refused.requests"},
        "kind",
    ),
    Family(
        "pressure_stall_ratio",
        "gauge",
        "Part of the time that some or all tasks waited for memory, at the last look.",
        {"some": "pressure.some", "full": "pressure.full"},
        "kind",
    ),
    Family(
        "pressure_rises",
        "counter",
        "Times that the memory pressure rose to a level.",
        {"some": "pressure.times_some", "full": "pressure.times_full"},
        "level",
    ),
)

AGENTS: Final = (
    Family("agent_pages_sharing", "gauge", "Pages of a program that are mapped to the store.", "pages_sharing"),
    Family("agent_zero_pages", "gauge", "Pages of a program left to the kernel's page of zeros.", "zero_pages"),
    Family("agent_runs", "gauge", "Runs of merged pages in a program.", "runs"),
    Family("agent_vmas", "gauge", "Mappings that merging costs a program.", "vmas"),
    Family("agent_merging", "gauge", "Whether a program's memory is being merged.", "merging"),
    Family("agent_paused", "gauge", "Whether a program is left alone on request.", "paused"),
    Family("agent_break_pages", "counter", "Merged pages that a program wrote to.", "break_pages"),
    Family("agent_break_events", "counter", "Write faults that took.", "break_events"),
    Family("agent_hints", "counter", "Hints that a program gave.", "hints"),
    Family("agent_cpu_seconds", "counter", "CPU time of a program's agent.", "cpu_seconds"),
)
"""Of each program, with the labels of :func:`agent_labels`."""

IMAGES: Final = (
    Family("image_size_bytes", "gauge", "Size of an image.", "size"),
    Family("image_blocks_read", "counter", "Blocks read through the mount.", "blocks_read"),
    Family("image_blocks_served", "counter", "Of those read: blocks that came out of the store.", "blocks_served"),
)
"""Of each image, by its name in the mount."""

Row = TypeVar("Row", AgentStatus, ImageStatus)


def agent_labels(agent: AgentStatus) -> dict[str, str]:
    """The program's name is all that is told of its command."""
    name = agent.command.partition(" ")[0].rpartition("/")[2]
    return {"pid": str(agent.pid), "uid": str(agent.uid), "domain": agent.domain, "command": name}


def image_labels(image: ImageStatus) -> dict[str, str]:
    """Names in the mount are unique."""
    return {"image": image.name, "format": image.format}


async def render(status: Status, lead_times: LeadTimes) -> bytes:
    """The text of all metrics; others have their turn of the loop every now and then."""
    parts = []
    for part in _texts(status, lead_times):
        parts.append(part)
        if not part or len(part) >= BYTES_AT_ONCE:
            await trio.lowlevel.checkpoint()
    return b"".join(parts)


def _texts(status: Status, lead_times: LeadTimes) -> Iterator[bytes]:
    """One metric after the other."""
    info = {"version": version("udedup"), "policy": status.policy, "pid": str(status.pid)}
    yield _text(InfoMetricFamily(f"{PREFIX}engine", "The engine.", value=info))
    for family in ENGINE:
        metric = _metric(family, [family.label] if family.label else [])
        for value, field in family.by_label.items():
            shown = attrgetter(field)(status)
            if shown is not None:
                metric.add_metric([value] if family.label else [], shown * family.scale)
        yield _text(metric)
    yield _text(_pressure_level(status.pressure.level))
    yield _text(_lead_times(lead_times))
    yield _text(GaugeMetricFamily(f"{PREFIX}agents", "Programs that take part.", value=len(status.agents)))
    yield from _rows(AGENTS, status.agents, agent_labels)
    yield _text(GaugeMetricFamily(f"{PREFIX}images", "Images in the mount.", value=len(status.images)))
    yield from _rows(IMAGES, status.images, image_labels)


class _Single(Collector):
    """What the library takes for a registry."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


def _text(metric: Metric) -> bytes:
    return generate_latest(_Single(metric))


def _metric(family: Family, labels: Iterable[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + family.name, family.about, labels=list(labels))


def _rows(
    table: Iterable[Family], all_rows: Iterable[Row], labels_of: Callable[[Row], dict[str, str]]
) -> Iterator[bytes]:
    """Each family with all rows; in between, nothing.

    Those of the same labels add up: no sample may be there twice, but a program that has just replaced itself, and
    programs whose pids can't be seen from here, can.
    """
    alike: dict[bytes, list[Row]] = {}
    for number, row in enumerate(all_rows, 1):
        alike.setdefault(_label_text(labels_of(row)), []).append(row)
        if number % ROWS_AT_ONCE == 0:
            yield b""
    groups = list(alike.items())
    for family in table:
        (field,) = family.by_label.values()
        head = _text(_metric(family, ()))
        name = (PREFIX + family.name + ("_total" if family.kind == "counter" else "")).encode()
        lines: list[bytes] = [
            b"%s%s %a\n" % (name, labels, sum(getattr(row, field) for row in rows)) for labels, rows in groups
        ]
        yield b"".join([head, *lines])


def _label_text(labels: Mapping[str, str]) -> bytes:
    """Labels as the library writes them. That takes most of the time, so it is not done for each sample."""
    metric = Metric("x", "x", "gauge")
    metric.add_sample("x", dict(labels), 0)
    sample = _text(metric).rstrip(b"\n").rpartition(b"\n")[2]
    return sample.removeprefix(b"x").removesuffix(b" 0.0")


def _pressure_level(level: str) -> Metric:
    metric = GaugeMetricFamily(f"{PREFIX}pressure_level", "Memory pressure: 1 for the level it has.", labels=["level"])
    for each in LEVELS:
        metric.add_metric([each], each == level)
    return metric


def _lead_times(lead_times: LeadTimes) -> Metric:
    """A histogram without a sum, which nobody has counted."""
    name = f"{PREFIX}lead_time_seconds"
    metric = Metric(name, "From content in place to merged, of pages merged on a hint.", "histogram")
    for exponent in LEAD_EXPONENTS:
        metric.add_sample(f"{name}_bucket", {"le": str(2**exponent / 1e9)}, lead_times.below(exponent))
    metric.add_sample(f"{name}_bucket", {"le": "+Inf"}, lead_times.total)
    metric.add_sample(f"{name}_count", {}, lead_times.total)
    return metric
