"""A long pass over a server's keys, in a thread that gives way to everybody else on this host."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
NICENESS = 10
LOOK_SECONDS = 0.5


def in_background(pages: Generator[None, None, T]) -> T:
    """Drive a pass page by page to its end, and return what it returns; what it raises is raised here.

    On the server's own host its loop competes with the server, and with the server's clients, for the processors: the
    thread's priority is lowered (for good: it ends with the pass). A run that is interrupted ends it after a page.
    """
    outcome: Future[T] = Future()
    stop = threading.Event()

    def drive() -> None:
        _give_way()
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
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)  # not for ever: an interruption is to be seen
    finally:
        stop.set()
        while thread in threading.enumerate():
            with contextlib.suppress(RuntimeError):  # it was interrupted in the moment of its start
                thread.join()
    return outcome.result()


def _give_way() -> None:
    """Of this thread only, which is Linux's own way (setpriority(2), NOTES); elsewhere it would be the process."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
