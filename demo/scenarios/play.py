"""``demo/run NAME``: plays a scenario and says how udedup did beside KSM."""

import argparse
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import msgspec
from attrs import asdict
from rich.console import Console
from rich.table import Table

from demo.scenarios import SCENARIOS
from demo.scenarios.comparison import Comparison, Played, Theatre, medians
from demo.scenarios.settings import Rate, Settings, Side
from udedup.commands.options import count
from udedup.errors import UdedupError
from udedup.record.kernel import why_no_ksm
from udedup.record.page import write_html
from udedup.record.plots import write_png

CACHE = Path(__file__).parents[1] / ".cache"


def rate(text: str) -> Rate:
    """Parses ``PAGES/MS``."""
    pages, slash, millisecs = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text!r} is no PAGES/MS, such as {Settings().rate}")
    return Rate(count(1)(pages), count(0)(millisecs))


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to wait between looks")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that concern scenarios only."""
    defaults = Settings()
    group = parser.add_argument_group("scenarios")
    group.add_argument("--against", choices=("ksm", "none"), default="ksm", help="(default: %(default)s)")
    group.add_argument("--no-bare", action="store_true", help="leave out the run with neither udedup nor KSM")
    group.add_argument("--repeat", type=count(1), default=1, metavar="N", help="play so often, and take medians")
    group.add_argument("--policy", default=defaults.policy, help="udedup's (default: %(default)s)")
    group.add_argument(
        "--rate",
        type=rate,
        default=defaults.rate,
        metavar="PAGES/MS",
        help="pages_to_scan and sleep_millisecs, udedup's and KSM's (default: %(default)s)",
    )
    group.add_argument("--ksm-rate", type=rate, metavar="PAGES/MS", help="KSM's, if not the same")
    group.add_argument("--hint-ratio", default=defaults.hint_ratio, metavar="H:S", help="(default: %(default)s)")
    group.add_argument("--hint-slots", type=count(1), metavar="N", help="(default: the engine's)")
    group.add_argument("--guests", type=count(1), metavar="N", help="(default: the scenario's)")
    group.add_argument(
        "--memory", type=count(1), default=defaults.memory_mib, metavar="MIB", help="of a guest (default: %(default)s)"
    )
    group.add_argument(
        "--stagger",
        type=float,
        default=defaults.stagger_seconds,
        metavar="SECONDS",
        help="from one guest's start to the next (default: %(default)g)",
    )
    group.add_argument(
        "--sample",
        type=_seconds,
        default=defaults.sample_seconds,
        metavar="SECONDS",
        help="from one look of the recorder, which takes CPU, to the next (default: %(default)g)",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="the last run's curves, as .png or .html")
    group.add_argument("--record", type=Path, metavar="DIR", help="keep the recorder's Parquet files there")


def play(args: argparse.Namespace, console: Console) -> int:
    """Plays the scenario that the command line names."""
    settings = Settings(
        policy=args.policy,
        rate=args.rate,
        ksm_rate=args.ksm_rate,
        hint_ratio=args.hint_ratio,
        hint_slots=args.hint_slots,
        memory_mib=args.memory,
        guests=args.guests,
        stagger_seconds=args.stagger,
        sample_seconds=args.sample,
    )
    if args.plot and args.plot.suffix not in (".png", ".html"):
        raise UdedupError(f"{args.plot}: a plot is a .png or an .html file")
    sides = [] if args.no_bare else [Side.BARE]
    sides.append(Side.OURS)
    if args.against == "ksm":
        problem = why_no_ksm()
        if problem:
            console.print(f"without KSM: {problem}", highlight=False)
        else:
            sides.append(Side.KSM)

    comparisons: list[Comparison] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="udedup-demo-")))
        folder.chmod(0o711)  # PostgreSQL does not run as root
        theatre = Theatre(args.scenario, SCENARIOS[args.scenario](), settings, CACHE / "guests", console)
        for number in range(args.repeat):
            own = folder / f"{args.scenario}-{number + 1}"
            own.mkdir()
            comparisons.append(theatre.compare(sides, own))
            if args.record:
                _keep(own, args.record)
    _show(console, comparisons)
    if args.json:
        args.json.write_bytes(msgspec.json.format(_encode(args.scenario, settings, comparisons)) + b"\n")
    if args.plot:
        _plot(args.scenario, comparisons[-1], args.plot)
    return 0


def _keep(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.parquet"):
        shutil.copy(file, target / f"{folder.name}-{file.name}")


def _encode(scenario: str, settings: Settings, comparisons: list[Comparison]) -> bytes:
    """``ours``, ``ksm`` and ``bare`` are the last run's; ``ratios`` are medians over ``runs``."""
    middle, ranges = medians([comparison.ratios for comparison in comparisons])
    runs = [_sides(comparison) | {"ratios": asdict(comparison.ratios)} for comparison in comparisons]
    whole = {
        "scenario": scenario,
        "settings": asdict(settings) | {"processors": os.cpu_count()},
        **{side: runs[-1].get(side) for side in ("ours", "ksm", "bare")},
        "ratios": asdict(middle),
        "ranges": ranges,
        "runs": runs,
    }
    return msgspec.json.encode(whole)


def _sides(comparison: Comparison) -> dict[str, object]:
    return {side.value: _side(played) for side, played in comparison.played.items()}


def _side(played: Played) -> dict[str, object]:
    return {"run_seconds": played.run_seconds, **msgspec.structs.asdict(played.totals)}


def _show(console: Console, comparisons: list[Comparison]) -> None:
    last = comparisons[-1]
    table = Table(title="Sides (last run)", title_justify="left")
    table.add_column()
    for side in last.played:
        table.add_column(side.value, justify="right")
    columns = [_side(played) for played in last.played.values()]
    for name in columns[-1]:
        table.add_row(name, *(_number(column.get(name)) for column in columns))
    console.print(table)
    middle, ranges = medians([comparison.ratios for comparison in comparisons])
    table = Table(title=f"udedup beside KSM, median of {len(comparisons)}", title_justify="left")
    for heading in ("", "median", "lowest", "highest"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in asdict(middle).items():
        low, high = ranges[name] or (None, None)
        table.add_row(name, _number(value), _number(low), _number(high))
    console.print(table)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _plot(scenario: str, comparison: Comparison, file: Path) -> None:
    recordings = {side.value: played.recording for side, played in comparison.played.items()}
    write = write_png if file.suffix == ".png" else write_html
    write(recordings, f"udedup, scenario {scenario}", file)
