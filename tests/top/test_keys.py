"""What terminals send."""

import pytest

from udedup.top.keys import split


@pytest.mark.parametrize(
    ("sent", "keys", "left"),
    [
        ("", [], ""),
        ("qu", ["q", "u"], ""),
        ("\x1b[A\x1bOB", ["up", "down"], ""),
        ("\x1b[5~j\x1b[6~", ["page up", "j", "page down"], ""),
        ("j\x1b", ["j"], "\x1b"),
        ("\x1b[", [], "\x1b["),
        ("\x1b[1;5", [], "\x1b[1;5"),
        # Keys that mean nothing, a mouse's report among them, are no letters either.
        ("\x1b[1;5Cy", ["y"], ""),
        ("\x1bu", [], ""),
        ("\x1b[<0;10;10Mq", ["q"], ""),
        ("\x1b[200~u\x1b[201~", ["u"], ""),
        ("\x1b[" + "1" * 100, [], ""),
    ],
)
def test_split(sent: str, keys: list[str], left: str) -> None:
    assert split(sent) == (keys, left)


@pytest.mark.parametrize("sent", ["\x1b[A", "\x1b[5~", "\x1bOC"])
def test_keys_that_come_in_pieces(sent: str) -> None:
    whole, _ = split(sent)
    for cut in range(1, len(sent)):
        keys, left = split(sent[:cut])
        assert (keys, left) == ([], sent[:cut])
        assert split(left + sent[cut:]) == (whole, "")
