"""What a terminal sends, as names of keys."""

import re

ESCAPE = "\x1b"
ESCAPE_SECONDS = 0.05
"""If nothing follows an escape for so long, it was the key of that name."""

_LONGEST = 32
"""Characters of a sequence; more are none."""

_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~]|[^\[O])", re.DOTALL)
"""Of ECMA-48: a control sequence, one that application mode sends, or a key with Alt."""

_NAMES = {
    "[A": "up",
    "[B": "down",
    "[C": "right",
    "[D": "left",
    "OA": "up",
    "OB": "down",
    "OC": "right",
    "OD": "left",
    "[H": "home",
    "[F": "end",
    "OH": "home",
    "OF": "end",
    "[1~": "home",
    "[4~": "end",
    "[7~": "home",
    "[8~": "end",
    "[5~": "page up",
    "[6~": "page down",
}


def split(text: str) -> tuple[list[str], str]:
    """The keys that are complete, and what is left of one that is not. Keys of no name here are left out."""
    keys = []
    at = 0
    while at < len(text):
        if text[at] != ESCAPE:
            keys.append(text[at])
            at += 1
            continue
        found = _SEQUENCE.match(text, at)
        if found is None:
            rest = text[at:]
            return keys, rest if len(rest) <= _LONGEST else ""
        name = _NAMES.get(found[0][1:])
        if name is not None:
            keys.append(name)
        at = found.end()
    return keys, ""
