"""A run's shared memory ends with the run (a plugin): a server that a test kills, and whose directory it removes, leaves
a System V segment, and a host has 4,096 of them. https://man7.org/linux/man-pages/man7/ipc_namespaces.7.html"""

from __future__ import annotations

import ctypes

import pytest

CLONE_NEWIPC = 0x08000000


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Move the run, with all processes that it starts, into a namespace of its own. Only root may, and in a container
    not even root: then the segments stay."""
    if not hasattr(config, "workerinput"):
        ctypes.CDLL(None).unshare(CLONE_NEWIPC)
