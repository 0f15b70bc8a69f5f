"""How a script ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_status(work: Callable[[], object]) -> int:
    """Do the work and return 0; what the user can mend, a ValueError, is one message and 1."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
