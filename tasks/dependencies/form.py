"""Check that a tool's JSON has the known format; otherwise it is not a valid answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runbook.errors import OpsError


@contextlib.contextmanager
def known_form(tool: str) -> Iterator[None]:
    """Read the JSON inside the block.

    Raises:
        OpsError: it has another format.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise OpsError(f"{tool}'s JSON has an unknown format", "check its version") from None
