"""Waiting is polling with a deadline: the only place that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from runbook.errors import Unreachable

T = TypeVar("T")


def until(ready: Callable[[], T], *, what: str, seconds: float, every_seconds: float = 0.1, hint: str = "") -> T:
    """Call `ready` until it returns something true, and return that.

    `Unreachable` raised by `ready` counts as "not yet".

    Raises:
        Unreachable: `what` did not happen within `seconds`.
    """
    end = time.monotonic() + seconds
    last = ""
    while True:
        try:
            if answer := ready():
                return answer
        except Unreachable as error:
            last = f" (last: {error.message})"
        if time.monotonic() >= end:
            raise Unreachable(f"{what} did not happen within {seconds:.0f} s{last}", hint)
        time.sleep(every_seconds)
