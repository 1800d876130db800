"""Lines with the seconds since the command began, from whichever thread works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Tell = Callable[[str], None]


def progress(show: Callable[[str], None] = lambda line: print(line, flush=True)) -> Tell:
    """A function that shows one line of progress."""
    begun, turn = time.monotonic(), threading.Lock()

    def tell(text: str) -> None:
        with turn:
            show(f"[{time.monotonic() - begun:5.1f} s] {text}")

    return tell


def silent(text: str) -> None:
    """For tests."""
