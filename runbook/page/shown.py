"""Tables that outlive their run: one artifact of a key, whose newest version people look up in the Prefect UI."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.artifacts import create_table_artifact
from prefect.context import FlowRunContext

from runbook.current import artifact_key
from runbook.guard.brief import asked_briefly
from runbook.language.say import label, say
from runbook.log import logger


def show_table(key: str, description: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Make a table the newest version of the artifact `key` (lower-case letters, digits and hyphens).

    Outside a flow run nothing is shown; that Prefect is away disturbs nothing.
    """
    if FlowRunContext.get() is None:
        return
    content = [dict(zip(map(label, columns), (say(str(cell)) for cell in row), strict=True)) for row in rows]
    try:
        with asked_briefly(retries=2):
            create_table_artifact(table=content, key=artifact_key(key), description=say(description))
    except Exception as error:
        logger().warning("the table %s could not be shown in Prefect: %s", key, error)
