"""Fixtures of the routine's tests."""

from tests.runbook.processes import prefect_server

__all__ = ["prefect_server"]
