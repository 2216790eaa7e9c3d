"""Packages that only some commands need, and that `pip install udedup` alone does not bring."""

from collections.abc import Iterator
from contextlib import contextmanager

from udedup.errors import UdedupError


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Around imports. Raises UdedupError if a package of ``extra`` is missing, saying ``what`` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "udedup":
            raise
        raise UdedupError(f"{what} needs the Python package {error.name}: pip install 'udedup[{extra}]'") from None
