"""Finding a command's program as a shell does, and telling whether the agent can enter it."""

import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udedup.commands.elf import read_elf
from udedup.commands.program import ProgramError, find_program

SLEEP = shutil.which("sleep") or "/usr/bin/sleep"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copy(SLEEP, tmp_path / "copy"))


def build(folder: Path, *flags: str) -> Path:
    source, program = folder / "main.c", folder / "program"
    source.write_text("int main(void) { return 5; }\n")
    subprocess.run(["gcc", *flags, "-o", str(program), str(source)], check=True)
    return program


def obstacle(path: Path) -> str | None:
    return find_program([str(path)], {}).obstacle


def test_dynamic_program(copy: Path) -> None:
    assert obstacle(copy) is None


@pytest.mark.require("gcc")
@pytest.mark.parametrize("flag", ["-static", "-static-pie"])
def test_static_program(tmp_path: Path, flag: str) -> None:
    assert obstacle(build(tmp_path, flag)) == "is statically linked"


@pytest.mark.require("gcc")
def test_other_loader(tmp_path: Path) -> None:
    program = build(tmp_path, "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1")
    assert obstacle(program) == "does not run on glibc (its loader is /lib/ld-musl-x86_64.so.1)"


def test_other_architecture(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    struct.pack_into("<H", data, 18, 183)  # e_machine: AArch64
    copy.write_bytes(data)
    assert obstacle(copy) == "is not an x86-64 program"


@pytest.mark.parametrize(("bits", "expected"), [(0o4755, "is setuid"), (0o2755, "is setgid"), (0o2745, None)])
def test_privileged_program(copy: Path, bits: int, expected: str | None) -> None:
    copy.chmod(bits)
    assert stat.S_IMODE(copy.stat().st_mode) == bits
    assert obstacle(copy) == expected


@pytest.mark.require("root", "setcap")
def test_file_capabilities(copy: Path) -> None:
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(["setcap", "cap_net_raw+ep", str(copy)], check=True, env=environment)
    assert obstacle(copy) == "has file capabilities"


def test_script_is_judged_by_its_interpreter(tmp_path: Path, copy: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    inner.write_text(f"#! {copy} -x\n")
    outer.write_text(f"#!{inner}\n")
    for script in (inner, outer):
        script.chmod(0o4755)  # setuid means nothing on a script
    assert obstacle(outer) is None
    copy.chmod(0o4755)
    assert obstacle(outer) == "is setuid"


def test_scripts_in_a_circle_end(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    script.chmod(0o755)
    assert obstacle(script) is None


def test_text_without_interpreter_runs_in_the_shell(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("exit 3\n")
    script.chmod(0o755)
    program = find_program([str(script), "a"], {})
    assert program.path == Path("/bin/sh")
    assert program.arguments == ("/bin/sh", str(script), "a")


def test_search_goes_along_the_path(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "tool").mkdir()  # a folder of that name is passed over
    shutil.copy(SLEEP, tmp_path / "second" / "tool")
    (tmp_path / "second" / "tool").chmod(0o644)  # and so is what is not executable
    shutil.copy(SLEEP, tmp_path / "third" / "tool")
    environment = {"PATH": ":".join(str(tmp_path / name) for name in ("none", "first", "second", "third"))}
    program = find_program(["tool", "x"], environment)
    assert program.path == tmp_path / "third" / "tool"
    assert program.arguments == ("tool", "x")
    (tmp_path / "third" / "tool").unlink()
    with pytest.raises(ProgramError) as caught:
        find_program(["tool"], environment)
    assert caught.value.status == 126


@pytest.mark.parametrize(
    ("command", "status"),
    [("", 127), ("no-such-command", 127), ("./no-such", 127), ("/etc", 126), ("/etc/passwd", 126)],
)
def test_no_program(command: str, status: int) -> None:
    with pytest.raises(ProgramError) as caught:
        find_program([command], {"PATH": "/usr/bin:/bin"})
    assert caught.value.status == status


def test_needed_libraries_are_those_of_readelf() -> None:
    for path in (Path(SLEEP).resolve(), Path("/usr/bin/python3").resolve()):
        shown = subprocess.run(["readelf", "-dlW", str(path)], capture_output=True, text=True, check=True).stdout
        needed = [line.rpartition("[")[2].rstrip("]") for line in shown.splitlines() if "(NEEDED)" in line]
        elf = read_elf(path)
        assert elf is not None
        assert list(elf.needed) == needed
        assert f"[Requesting program interpreter: {elf.interpreter}]" in shown


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 64))
def test_damaged_files_raise_nothing(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, keep: int) -> None:
    head = bytearray(Path(SLEEP).read_bytes()[:1024])
    head[at : at + len(junk)] = junk
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(head[6 : 1024 - keep]))
    read_elf(path)
