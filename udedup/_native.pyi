"""The cffi extension; its declarations are native/common/wire.h and native/engine/engine.h."""

from typing import Any

ffi: Any
"""cffi.FFI of the compiled kind, which no published stub describes."""

lib: Any
