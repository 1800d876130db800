"""Addresses of pages in the Prefect UI."""

from __future__ import annotations

from prefect.settings import PREFECT_UI_URL


def ui_address(path: str) -> str:
    """Of a page, e.g. `runs/flow-run/ID`; "" where nobody knows the address of the UI."""
    ui = PREFECT_UI_URL.value()
    return f"{ui}/{path}" if ui else ""
