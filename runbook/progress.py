"""Long work says how far it is, every few seconds, in the run's log."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from runbook.errors import OpsError
from runbook.log import logger

EVERY_SECONDS = 5.0


@contextlib.contextmanager
def progress(tell: Callable[[], str]) -> Iterator[None]:
    """Log what `tell` says every few seconds while the block runs. A `tell` that cannot say is silent."""
    log = logger()
    stop = threading.Event()

    def keep_telling() -> None:
        while not stop.wait(EVERY_SECONDS):
            with contextlib.suppress(OpsError, OSError):
                log.info(tell())

    thread = threading.Thread(target=keep_telling, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
