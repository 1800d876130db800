"""Waiting is polling with a deadline: the only place that sleeps."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from runbook.errors import OpsError, Unreachable

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], what: str) -> T:
    """What `work` returns. One that hangs where no timeout reaches (a server whose disk stands still) is left behind in
    its thread, which ends with the process.

    Raises:
        OpsError: `what` did not happen within `seconds`.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise OpsError(
            f"{what} did not happen within {seconds:.0f} s", "the queried program hangs: check its host"
        ) from None


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
