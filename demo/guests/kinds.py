"""The kinds of guests: what is on their disks."""

from attrs import frozen


@frozen
class Kind:
    """What is on a guest's disk."""

    packages: tuple[str, ...]
    """Debian packages."""

    bootstrapped: bool
    """Whether debootstrap installs them with all that Debian has in a minimal system; else they are only unpacked."""

    free: int
    """Bytes left on the file system for the guest."""


KINDS: dict[str, Kind] = {
    # What boots, runs a shell, Perl and Python, and has some 60 MiB to read.
    "boot": Kind(
        packages=(
            *("base-files", "bash", "coreutils", "libacl1", "libattr1", "libc6", "libcrypt1", "libexpat1", "libgmp10"),
            *("libpcre2-8-0", "libpython3.11-minimal", "libpython3.11-stdlib", "libselinux1", "libssl3", "libtinfo6"),
            *("libgcc-s1", "libstdc++6", "libicu72", "perl-base", "python3.11-minimal", "zlib1g"),
        ),
        bootstrapped=False,
        free=96 << 20,
    ),
    # Linux's source, packed as Debian has it, and what a small configuration of it takes to be built.
    "build": Kind(
        packages=("bc", "bison", "flex", "gcc", "libc6-dev", "linux-source-6.1", "make", "xz-utils"),
        bootstrapped=True,
        free=2 << 30,
    ),
    "serve": Kind(packages=("nginx-light", "linux-doc"), bootstrapped=True, free=64 << 20),
}
