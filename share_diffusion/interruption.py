"""Ctrl-C and SIGTERM as a request that a loop answers between two steps."""

from __future__ import annotations

import signal


class Interruption:
    """Within its `with` block, the first signal sets `wanted`; the second one acts as it would have before."""

    def __init__(self) -> None:
        self.wanted = False
        self.before: dict[int, object] = {}

    def ask(self, number: int, _: object) -> None:
        self.wanted = True
        signal.signal(number, self.before[number])  # type: ignore[arg-type]

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
