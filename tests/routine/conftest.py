"""Fixtures of the routine's tests."""

from tests.routine.small import small
from tests.runbook.processes import prefect_server

__all__ = ["prefect_server", "small"]
