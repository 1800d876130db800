"""Tools' JSON is of the form that this project knows, or it is no answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runbook.errors import OpsError


@contextlib.contextmanager
def known_form(tool: str) -> Iterator[None]:
    """Read it in this block.

    Raises:
        OpsError: it is of another form.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise OpsError(f"{tool}'s JSON is of another form than this flow knows", "see its version") from None
