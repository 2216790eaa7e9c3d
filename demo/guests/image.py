"""Builds guest images: Debian's cloud kernel, an initrd with its virtio drivers, and an ext4 disk per kind of guest."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from attrs import frozen

from demo.guests.kinds import KINDS, Kind
from udedup.errors import UdedupError

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")
MANIFEST = "etc/manifest"
"""In the root file system: sha256sum's list of all its regular files."""

_SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_HERE = Path(__file__).parent
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio-rng")
_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "root", "var/tmp", "etc")
_MERGED_USR = ("bin", "sbin", "lib", "lib64")
_BLOCK_BYTES = 4096
_BYTES_PER_INODE = 8192


@frozen
class GuestImage:
    """A finished image."""

    kernel: Path
    """bzImage."""

    initrd: Path
    """cpio archive."""

    disk: Path
    """Raw ext4 image, a whole number of 4 KiB blocks; never written to."""

    disk_bytes: int
    """Its size."""

    files: int
    """Lines of the manifest in it."""


def build_image(kind: str, cache: Path) -> GuestImage:
    """Returns the image of a kind (a key of KINDS) kept in ``cache``, building it first if it is not there.

    Takes seconds for ``boot``, minutes for those that debootstrap makes. Raises UdedupError if a package can't be had.
    """
    folder = cache / f"guest-{kind}"
    description = folder / "image.json"
    recipe = _recipe(kind)
    if not description.exists() or (folder / "recipe").read_text() != recipe:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="udedup-guest-") as name:
            image = _build(KINDS[kind], folder.absolute(), Path(name))
        (folder / "recipe").write_text(recipe)
        # Last, so that a build that was interrupted is not taken for a finished one.
        description.write_bytes(msgspec.json.encode(image, enc_hook=str))
    return msgspec.json.decode(description.read_bytes(), type=GuestImage, dec_hook=lambda kind, text: kind(text))


def read_file(disk: Path, path: str) -> bytes:
    """The content of a text file, by its path from the root, in a disk's ext4. Raises UdedupError."""
    return _run(["debugfs", "-R", f"cat /{path}", disk]).encode()


def _recipe(kind: str) -> str:
    """What an image depends on, as a digest: a change of this code makes a new one."""
    parts = [repr(KINDS[kind]), *(path.read_text() for path in sorted(_HERE.glob("*.sh"))), Path(__file__).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _build(kind: Kind, folder: Path, temporary: Path) -> GuestImage:
    kernel_tree, root = temporary / "kernel", temporary / "root"
    (package,) = _download((_kernel_package(),), temporary)
    _run(["dpkg", "-x", package, kernel_tree])
    (kernel,) = kernel_tree.glob("boot/vmlinuz-*")
    shutil.copy(kernel, folder / "kernel")
    _build_initrd(kernel_tree, temporary / "initrd", folder / "initrd")

    if kind.bootstrapped:
        _run(["debootstrap", "--variant=minbase", f"--include={','.join(kind.packages)}", _SUITE, root, _MIRROR])
        shutil.rmtree(root / "var/cache/apt")
        shutil.rmtree(root / "var/lib/apt/lists")
    else:
        _unpack(kind.packages, root, temporary)
    files = _finish(root)
    size = _build_disk(root, folder / "disk.img", kind.free)
    return GuestImage(folder / "kernel", folder / "initrd", folder / "disk.img", size, files)


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Runs a tool to its end and returns what it printed. Raises UdedupError with its last line if it fails."""
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UdedupError(f"{command[0]} is not installed: tests/setup names the packages to install") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UdedupError(f"{command[0]} failed while a guest image was built: {last}")
    return done.stdout


def _kernel_package() -> str:
    """The package that the kernel's meta-package stands for now."""
    for line in _with_lists(["apt-cache", "depends", KERNEL_PACKAGE]).splitlines():
        relation, _, name = line.strip().partition(": ")
        if relation == "Depends" and name.startswith("linux-image-"):
            return name
    raise UdedupError(f"apt knows no kernel behind {KERNEL_PACKAGE}")


def _download(packages: Sequence[str], temporary: Path) -> list[Path]:
    folder = Path(tempfile.mkdtemp(dir=temporary))
    _with_lists(["apt-get", "--quiet", "--quiet", "download", *packages], cwd=folder)
    return sorted(folder.glob("*.deb"))


def _with_lists(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Like :func:`_run`, of a command that reads apt's lists: where these are old or missing, root gets new ones."""
    try:
        return _run(command, cwd)
    except UdedupError:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "--quiet", "--quiet", "update"])
        return _run(command, cwd)


def _unpack(packages: Sequence[str], root: Path, temporary: Path) -> None:
    for name in _MERGED_USR:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in _download(packages, temporary):
        # dpkg -x would put directories in place of the links.
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink'
        _run(["sh", "-c", unpack, "sh", package, root])
    (root / "usr/bin/sh").symlink_to("bash")


def _finish(root: Path) -> int:
    """Adds what a guest needs besides its packages; returns the number of files in the manifest."""
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    tools = root / "usr/local/bin"
    tools.mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, tools / "busybox")
    for applet in _run([BUSYBOX, "--list"]).split():
        if applet != "busybox":
            (tools / applet).symlink_to("busybox")
    init = root / "usr/local/sbin/guest-init"
    init.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_HERE / "init.sh", init)
    init.chmod(0o755)

    lines = []
    for path in _regular_files(root):
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  /{path.relative_to(root)}\n")
    (root / MANIFEST).write_text("".join(lines))
    return len(lines)


def _regular_files(root: Path) -> Iterator[Path]:
    """Those whose names sha256sum's list can hold as they are."""
    for folder, _, names in sorted(os.walk(root)):
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and not set(name) & {"\\", "\n"}:
                yield path


def _build_disk(root: Path, disk: Path, free: int) -> int:
    entries = [path.lstat().st_size for path in root.rglob("*")]
    used = sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in entries)
    # A twentieth for the tables of the file system, and its journal.
    size = (int(used * 1.05) + (16 << 20) + free) // _BLOCK_BYTES * _BLOCK_BYTES
    with disk.open("wb") as file:
        file.truncate(size)
    inodes = len(entries) * 2 + free // _BYTES_PER_INODE
    _run(["mkfs.ext4", "-q", "-F", "-b", str(_BLOCK_BYTES), "-N", str(inodes), "-m", "0", "-d", root, disk])
    return size


def _build_initrd(kernel_tree: Path, tree: Path, initrd: Path) -> None:
    (version,) = (path.name for path in kernel_tree.glob("lib/modules/*"))
    _run([BUSYBOX, "depmod", "-b", kernel_tree, version])
    modules = kernel_tree / "lib/modules" / version
    for name in ("bin", "dev", "proc", "disk"):
        (tree / name).mkdir(parents=True)
    wanted = _with_dependencies(modules)
    for module in wanted:
        shutil.copy(modules / module, tree)
    (tree / "modules").write_text("".join(f"/{Path(module).name}\n" for module in wanted))
    shutil.copy(BUSYBOX, tree / "bin")
    shutil.copy(_HERE / "initrd.sh", tree / "init")
    (tree / "init").chmod(0o755)
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with initrd.open("wb") as output:
        command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
        subprocess.run(command, cwd=tree, input=names.encode(), stdout=output, check=True)


def _with_dependencies(modules: Path) -> list[str]:
    """The drivers' files, relative to ``modules``, each behind those it needs."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    wanted: list[str] = []

    def add(path: str) -> None:
        for other in needs[path]:
            add(other)
        if path not in wanted:
            wanted.append(path)

    for name in _MODULES:
        (path,) = (path for path in needs if Path(path).name == f"{name}.ko")
        add(path)
    return wanted
