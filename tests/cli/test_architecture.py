"""The picture of the architecture names files that there are, and is a picture."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from udedup.commands.topics import TEXTS

PROJECT = Path(__file__).parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_matches_the_code() -> None:
    root = ET.parse(TEXTS / "architecture.svg").getroot()
    lines = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    named = 0
    for line in lines:
        folder = None
        for word in re.findall(r"[\w/]+\.(?:py|c)\b", line):
            path = Path(word)
            folder = path.parent if "/" in word else folder
            assert folder is not None
            assert (PROJECT / folder / path.name).is_file(), word
            named += 1
    assert named >= 12


def test_nothing_of_it_lies_outside() -> None:
    root = ET.parse(TEXTS / "architecture.svg").getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x + float(rect.attrib["width"]) <= width
        assert y + float(rect.attrib["height"]) <= height


def test_texts_name_files_there_are() -> None:
    for text in [*TEXTS.glob("*.md"), PROJECT / "README.md", PROJECT / "CONTRIBUTING.md"]:
        for word in re.findall(r"`((?:udedup|native|tests|demo)/[\w/.-]+)", text.read_text()):
            assert (PROJECT / word).exists(), f"{text.name}: {word}"
