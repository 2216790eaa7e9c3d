"""Builds the two native parts: the engine's cffi extension and the agent, a plain shared object.

Everything that can be said declaratively is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("native")
HEADER = NATIVE / "agent" / "udedup.h"

AGENT = Extension(
    "udedup.libudedup",
    sources=sorted(str(path) for part in ("agent", "common") for path in (NATIVE / part).glob("*.c")),
    depends=sorted(str(path) for path in NATIVE.glob("**/*.h")),
    include_dirs=["native"],
    define_macros=[("_GNU_SOURCE", "1")],
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        # Agent threads have no thread control block of libc's: no canary, no lazily allocated TLS.
        "-fno-stack-protector",
        "-ftls-model=initial-exec",
        "-fcf-protection=none",
    ],
    # Lazy binding would run the dynamic linker, which takes locks, on agent threads.
    extra_link_args=["-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,nodelete"],
)


class BuildExt(build_ext):
    """Names the agent ``libudedup.so``, puts its header beside it, and exports only what that marks."""

    def run(self) -> None:
        super().run()
        self.copy_file(str(HEADER), str(Path(self.get_ext_fullpath(AGENT.name)).with_name(HEADER.name)))

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "libudedup":
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if ext.name == AGENT.name else super().get_export_symbols(ext)


setup(
    cffi_modules=["native/engine/ffi_build.py:ffi"],
    ext_modules=[AGENT],
    cmdclass={"build_ext": BuildExt},
)
