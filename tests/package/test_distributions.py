"""What is handed out: a source distribution, a wheel built from that, and what Debian's package says of itself."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from udedup.commands.topics import TOPICS

PROJECT = Path(__file__).parent.parent.parent
DEBIAN = PROJECT / "native" / "debian"
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.require("gcc")
@pytest.mark.timeout(300)
def test_sdist_and_wheel(tmp_path: Path) -> None:
    """`python -m build` as a stranger has it: from the source distribution alone; it works without the tree."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    source = tmp_path / "dist" / f"udedup-{VERSION}.tar.gz"
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.py", "native/common/wire.h", "native/agent/udedup.h"} <= names
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    units = {"udedup.service", "udedup.socket", "tmpfiles.conf"}
    assert {f"udedup/systemd/{name}" for name in units} | {f"udedup/topics/{name}.md" for name in TOPICS} <= files
    assert {"udedup/libudedup.so", "udedup/_native.abi3.so", "udedup/py.typed"} <= files
    assert not [name for name in files if name.startswith(("tests", "demo", "native"))]
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from udedup.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "installed"), "help", "safety"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Safety" in done.stdout


def test_debian_has_the_same_version() -> None:
    first = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"udedup ({VERSION}) ")


def test_debian_wants_the_python_that_debian_has() -> None:
    wanted = re.findall(r"python3 \(([<>=]+) 3\.(\d+)\)", (DEBIAN / "control").read_text())
    assert wanted == [(">=", "11"), ("<<", "12")]
