"""The C half of the engine: ``lib`` has its functions, ``ffi`` makes their arguments, ``CData`` is what those are."""

from typing import TYPE_CHECKING, Any, Protocol

from udedup._native import ffi, lib

__all__ = ["CData", "ffi", "lib"]

if TYPE_CHECKING:

    class CData(Protocol):
        """A C object: a struct's fields are attributes, an array's elements items. Their types are C's to check."""

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def __getitem__(self, index: Any) -> Any: ...
        def __setitem__(self, index: int, value: Any) -> None: ...
        def __add__(self, count: int) -> "CData": ...
        def __len__(self) -> int: ...

else:
    CData = ffi.CData
