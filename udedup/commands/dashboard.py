"""Print a dashboard for Grafana, of the metrics that `udedup engine --metrics` has.

Import it in Grafana under Dashboards, New, Import. `udedup help metrics` tells how the metrics get there.
"""

import argparse
from pathlib import Path

FILE = Path(__file__).parent.parent / "grafana" / "dashboard.json"
"""JSON, as Grafana's own export has it."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: there is one dashboard."""


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    print(FILE.read_text(encoding="utf-8"), end="")
    return 0
