"""Virtual machines for the scenarios: disk images made from Debian's packages, and QEMU guests that boot from them.

```
image = guests.build_image("boot", CACHE)               # once; afterwards found in the cache
async with guests.booted(GuestConfig(image=image, disk=mount / "boot.img"), folder, wrap=wrapped(socket)) as guest:
    done = await guest.run("sha256sum --quiet -c /etc/manifest")
```
"""

from demo.guests.guest import QEMU, Completed, Guest, GuestConfig, GuestError, booted, started, wrapped
from demo.guests.image import MANIFEST, GuestImage, build_image, read_file
from demo.guests.kinds import KINDS

__all__ = [
    "KINDS",
    "MANIFEST",
    "QEMU",
    "Completed",
    "Guest",
    "GuestConfig",
    "GuestError",
    "GuestImage",
    "booted",
    "build_image",
    "read_file",
    "started",
    "wrapped",
]
