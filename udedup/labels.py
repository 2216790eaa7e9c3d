"""Labels of trust domains that have a meaning of their own. Standard library only, so that commands start fast."""

PRIVATE = "private"
"""A process under this label shares with itself only; every user may take it."""

OFF = "off"
"""A process under this label is left alone; every user may take it."""

RESERVED = (PRIVATE, OFF)
"""No configuration can give these to anybody, and none can take them away."""

LABEL_BYTES_MAX = 63
"""What a hello message holds besides the NUL (UDD_LABEL_MAX in native/common/wire.h)."""
