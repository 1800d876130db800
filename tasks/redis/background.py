"""A long pass over a server's keys, in a thread with low priority."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import TypeVar

from tasks.host.priority import session_lowered

T = TypeVar("T")
NICENESS = 10
LOOK_SECONDS = 0.5


def in_background(pages: Generator[None, None, T]) -> T:
    """Run a pass page by page; returns or raises what the pass returns or raises.

    On the server's own host the pass competes with the server and its clients for processors, so the thread and the
    run's session have a low priority. An interrupted run ends it after a page.
    """
    outcome: Future[T] = Future()
    stop = threading.Event()

    def drive() -> None:
        _lower_priority()
        try:
            while not stop.is_set():
                next(pages)
            pages.close()
        except StopIteration as end:
            outcome.set_result(end.value)
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(drive,), name="pass", daemon=True)
    try:
        with session_lowered(NICENESS):
            thread.start()
            while thread.is_alive():
                thread.join(LOOK_SECONDS)  # with a timeout, so that an interruption is noticed
    finally:
        stop.set()
        while thread in threading.enumerate():
            with contextlib.suppress(RuntimeError):  # it was interrupted at its start
                thread.join()
    return outcome.result()


def _lower_priority() -> None:
    """Lower this thread's priority. Only Linux can do that for a thread (setpriority(2), NOTES)."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
