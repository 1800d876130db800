"""Prefect's client in this process, which tests point at another server for a while (a plugin).

Prefect keeps one connection a process for events, and one for logs, to the server that was set when it was opened
(3.9.1). Where the setting changes under it, the events of task runs go on to the first server: that one does not know
their flow runs, or is stopped by then, and every later run of this process has 0 tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings.legacy import Setting

PATIENCE_SECONDS = 20
"""For what is still to be sent; a server that is gone takes nothing."""


@contextlib.contextmanager
def other_server(settings: Mapping[Setting, Any]) -> Iterator[None]:
    """While the block runs Prefect's client has these settings, with connections that no other server's run uses."""
    disconnect()
    with temporary_settings(dict(settings)):
        try:
            yield
        finally:
            disconnect()


def disconnect() -> None:
    """Send what waits, and open new connections for the next event or log line."""
    EventsWorker.drain_all(timeout=PATIENCE_SECONDS)


def pytest_sessionfinish() -> None:
    """Before the servers stop: at the interpreter's end Prefect would try for minutes to send what is left."""
    disconnect()


def connected_to() -> set[str]:
    """The servers to which this process sends events."""
    workers = [worker for worker in EventsWorker._instances.values() if isinstance(worker, EventsWorker)]
    return {worker._client._api_url for worker in workers if hasattr(worker, "_client")}  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of a file: nothing of it goes on to another server."""
    yield
    if nextitem is None or nextitem.path != item.path:
        others = connected_to() - {PREFECT_API_URL.value()}
        assert not others, f"{item.path.name} left this process connected to {others}: use other_server()"
