"""Check whether this machine can run udedup, and say what to do where it cannot."""

import argparse

from udedup.commands.options import add_json_option


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup doctor``."""
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints every check; 1 if one fails that udedup cannot do without."""
    from udedup.commands.checks import examine

    checks = examine()
    if args.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(checks)).decode())
    else:
        for check in checks:
            mark = "ok  " if check.passed else "FAIL" if check.essential else "warn"
            print(f"{mark}  {check.name}: {check.found}")
            if check.advice:
                print(f"      {check.advice}")
    return 1 if any(check.essential and not check.passed for check in checks) else 0
