"""Fixtures of the runbook's tests."""

from tests.runbook.processes import actors, prefect_server, system

__all__ = ["actors", "prefect_server", "system"]
