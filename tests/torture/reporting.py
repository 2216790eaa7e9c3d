"""What torture runs say of themselves, one or many together."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import attrs
from support.faults import Fault, fault_table

WANTED: Final = {
    "merged": "pages merged",
    "broken": "pages broken by a write",
    "discarded": "merged pages discarded",
    "collided": "unmaps that met a frozen run",
    "refused": "pinned pages refused",
}
"""What must have happened often, by counter."""

DIGITS: Final = 13

COSTS: Final = {"whole": "all", "asleep": "of that asleep", "ran": "of that on a CPU"}
"""What is measured of each operation; the rest of the time it is ready to run but has no CPU."""


def together(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums up what many runs wrote with ``--json``, in the form of one."""
    sums: dict[str, Counter[Any]] = {name: Counter() for name in ("counters", "engine", "reasons", "guests", "attacks")}
    faults: dict[tuple[str, str, str], Fault] = {}
    failures: list[str] = []
    instances: list[dict[str, Any]] = []
    restarts = stops = seconds = 0
    plan = {"faults": False, "guests": 0, "hostile": False}
    for report in reports:
        for name, counter in sums.items():
            counter.update(report.get(name, {}))
        for item in report["faults"]:
            fault = Fault(**item)
            key = (fault.call, fault.function, fault.error)
            old = faults.get(key, attrs.evolve(fault, times=0, calls=0))
            faults[key] = attrs.evolve(old, times=old.times + fault.times, calls=old.calls + fault.calls)
        failures += [f"seed {report['plan']['seed']}: {failure}" for failure in report["failures"]]
        instances += report["instances"]
        restarts += report["engine_restarts"]
        stops += report["engine_stops"]
        seconds += report["plan"]["seconds"]
        plan = {name: max(value, report["plan"].get(name, 0)) for name, value in plan.items()}
    return {
        **{name: dict(counter) for name, counter in sums.items()},
        "passed": not failures,
        "failures": failures,
        "plan": {**plan, "seconds": seconds},
        "faults": [attrs.asdict(faults[key]) for key in sorted(faults)],
        "engine_restarts": restarts,
        "engine_stops": stops,
        "instances": instances,
    }


def percentile(histogram: dict[str, int], share: float) -> float:
    """Upper end of the bucket that holds it, ms."""
    wanted = sum(histogram.values()) * share
    seen = 0
    for end, count in sorted((float(end), count) for end, count in histogram.items()):
        seen += count
        if seen > wanted:
            return end / 1e3
    return 0.0


def kinds_table(instances: list[dict[str, Any]]) -> list[str]:
    """What each kind of operation took, over all instances."""
    kinds: dict[str, dict[str, Counter[str]]] = {}
    most: dict[tuple[str, str], float] = {}
    for instance in instances:
        for name, costs in instance["by_kind"].items():
            for cost in COSTS:
                kinds.setdefault(name, {}).setdefault(cost, Counter()).update(costs[cost]["histogram"])
                most[name, cost] = max(most.get((name, cost), 0.0), costs[cost]["max_us"] / 1e3)
    whole = [histograms for name, histograms in kinds.items() if not name.startswith("one ")]
    kinds["all together"] = {cost: sum((histograms[cost] for histograms in whole), Counter[str]()) for cost in COSTS}
    lines = [" " * 28 + "".join(f"{title:>22}" for title in COSTS.values())]
    lines.append(f"{'operation, ms':<17} {'count':>10}" + f"{'p99.99':>12}{'max':>10}" * len(COSTS))
    for name, histograms in kinds.items():
        line = f"{name:<17} {histograms['whole'].total():>10,}"
        for cost, histogram in histograms.items():
            top = most.get((name, cost)) or max((value for (_, c), value in most.items() if c == cost), default=0.0)
            line += f"{min(percentile(histogram, 0.9999), top):>12.2f}{top:>10.2f}"
        lines.append(line)
    return lines


def summary(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{name:<14} {value:>{DIGITS},}  {WANTED.get(name, '')}" for name, value in report["counters"].items()]
    lines += [f"engine: {name:<16} {value:>{DIGITS - 10},}" for name, value in report["engine"].items()]
    lines.append(f"engines killed {report['engine_restarts']:>{DIGITS},}")
    lines.append(f"engine stopped {report['engine_stops']:>{DIGITS},}")
    lines += kinds_table(report["instances"])
    lines += fault_table([Fault(**fault) for fault in report["faults"]]) if report["plan"]["faults"] else []
    lines += [
        f"seen in status, {count} times: {reason or 'not joined yet'}" for reason, count in report["reasons"].items()
    ]
    if report["plan"]["hostile"]:
        attacks = sum(report["attacks"].values())
        lines.append(f"hostile clients: {attacks:,}; what they sent and was refused is counted above")
    verified = sum(instance["verified_pages"] for instance in report["instances"])
    operations = sum(instance["operations"] for instance in report["instances"])
    if report["plan"]["guests"]:
        lines.append("guests: {laps:,} laps, {files:,} files of theirs verified".format(**report["guests"]))
    lines.append(f"{operations:,} operations, {verified:,} pages verified, no wrong byte in what ended")
    return "\n".join(lines)
