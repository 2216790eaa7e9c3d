"""``python -m udedup``: the same as the command ``udedup``."""

import sys

from udedup.cli import main

if __name__ == "__main__":
    sys.exit(main())
