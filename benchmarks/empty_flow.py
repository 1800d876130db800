"""A flow of one step that does nothing: what Prefect itself takes from a click to the first step."""

from __future__ import annotations

from prefect import flow, task


@task
def nothing() -> None:
    """The step."""


@flow(name="empty")
def empty() -> None:
    """The flow."""
    nothing()
