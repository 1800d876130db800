"""The stranger's system, once a module, and its environment as a flow in this process finds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stranger.system import Stranger, running_stranger


@pytest.fixture(scope="module")
def system() -> Iterator[Stranger]:
    """Running, filled, without a backup."""
    with running_stranger() as found:
        yield found


@pytest.fixture
def stranger(system: Stranger, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """The same; its TOML is the minimal one again when the test ends."""
    for name, text in system.variables.items():
        monkeypatch.setenv(name, text)
    yield system
    system.describe()
