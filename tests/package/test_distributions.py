"""What is handed out: a source distribution, a wheel built from that, and what Debian's package says of itself."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from record.conftest import row

from udedup.commands.topics import TOPICS
from udedup.record.recording import About, Recording

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
    assert "udedup/grafana/dashboard.json" in files
    assert {"udedup/libudedup.so", "udedup/udedup.h", "udedup/_native.abi3.so", "udedup/py.typed"} <= files
    assert not [name for name in files if name.startswith(("tests", "demo", "native"))]
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from udedup.cli import main; sys.exit(main())"

    def run(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "installed"), *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert "Safety" in run("help", "safety")
    about = About(settings={}, marks={}, interval=1.0)
    Recording([row(0.0, 0, 0)], about, np.empty(0, np.float32)).write(tmp_path / "run.parquet")
    run("report", "run.parquet", "-o", "page.html")
    assert (tmp_path / "page.html").read_text().endswith("</html>")
    # A C program needs nothing else, and starts where the wheel was installed.
    folder, source = tmp_path / "installed" / "udedup", tmp_path / "program.c"
    source.write_text(
        "#include <udedup.h>\nint main(void) { return udedup_stats(&(struct udedup_stats){0}) == -107 ? 42 : 1; }\n"
    )
    flags = [f"-I{folder}", f"-L{folder}", "-ludedup", f"-Wl,-rpath,{folder}"]
    subprocess.run(["gcc", str(source), "-o", str(tmp_path / "program"), *flags], check=True)
    assert subprocess.run([tmp_path / "program"], check=False).returncode == 42


def test_debian_has_the_same_version() -> None:
    first = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"udedup ({VERSION}) ")


def test_debian_wants_the_python_that_debian_has() -> None:
    wanted = re.findall(r"python3 \(([<>=]+) 3\.(\d+)\)", (DEBIAN / "control").read_text())
    assert wanted == [(">=", "11"), ("<<", "12")]
