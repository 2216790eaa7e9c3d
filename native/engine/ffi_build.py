"""Build description of ``udedup._native``: cffi in API mode over ``native/engine``.

The declarations are the headers themselves (``wire.h``, ``attach.h`` and ``engine.h``) with their preprocessor lines
taken out, so that Python and C can't disagree about a struct.
"""

from pathlib import Path

from cffi import FFI

NATIVE = Path(__file__).resolve().parent.parent


def declarations(header: Path) -> str:
    """The text of a header without preprocessor lines, as ``FFI.cdef`` takes it."""
    lines = header.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


ffi = FFI()
ffi.cdef(declarations(NATIVE / "common" / "wire.h"))
ffi.cdef(declarations(NATIVE / "common" / "attach.h"))
ffi.cdef(declarations(NATIVE / "engine" / "engine.h"))
# What C calls, and Python is: see engine/session.c.
ffi.cdef("""
extern "Python+C" {
    void udd_read_asked(void *request, uint64_t file, uint64_t offset, uint64_t size);
    void udd_fallocate_asked(void *request, uint64_t file, int mode, uint64_t offset, uint64_t length);
    void udd_reads_done(void);
}
""")
ffi.set_source(
    "udedup._native",
    '#include "common/attach.h"\n#include "engine/engine.h"',
    sources=sorted(
        str(path.relative_to(NATIVE.parent)) for part in ("engine", "common") for path in (NATIVE / part).glob("*.c")
    ),
    include_dirs=["native"],
    depends=sorted(str(path.relative_to(NATIVE.parent)) for path in NATIVE.glob("**/*.h")),
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
    ],
    define_macros=[("_GNU_SOURCE", "1")],
)
