"""A new migration script, written by `alembic revision` into the application's directory.

https://alembic.sqlalchemy.org/en/latest/autogenerate.html
"""

from __future__ import annotations

import re

from blocks.places import Application
from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.kinds import action
from tasks.migrations.program import run_alembic
from tasks.migrations.scripts import Script, heads_of

MOST_CHARACTERS = 100
READ_ONLY = "-c default_transaction_read_only=on"


def check_message(message: str) -> str:
    """The message as a title: one line of text.

    Raises:
        OpsError: it is empty, too long, or not one line.
    """
    text = message.strip()
    if not text or len(text) > MOST_CHARACTERS or not text.isprintable() or re.search(r'["\\]', text):
        raise OpsError(
            f"the message is “{text[:40]}”",
            f"enter one line of 1 to {MOST_CHARACTERS} characters, without quotation marks and backslashes",
        )
    return text


@action
def create_revision(postgres: Postgres, application: Application, message: str, database: str = "") -> Script | None:
    """`alembic revision`: an empty script, or one generated from the difference between the models and a `database` at
    head. None, and no file, if they are equal.

    Raises:
        OpsError: Alembic failed, or the application gives it no models.
    """
    known = {script.revision for script in heads_of(application).scripts}
    command = ["revision", *(["--autogenerate"] if database else []), f"--message={message}"]
    where = (database, "") if database else (postgres.database, READ_ONLY)
    try:
        run_alembic(postgres, application, where[0], command, options=where[1])
    except OpsError as error:
        if "does not provide a MetaData object" in error.message:
            raise OpsError(
                "the application's alembic/env.py gives Alembic no models (target_metadata is None)",
                "set target_metadata there, or run this with autogenerate=false and write the migration by hand",
            ) from None
        written = [script for script in heads_of(application).scripts if script.revision not in known]
        left = f"; it wrote {written[0].path}" if written else ""
        hint = "correct the error, then run this again with the same message"
        raise OpsError(error.message + left, hint) from None
    made = [script for script in heads_of(application).scripts if script.revision not in known]
    if len(made) != 1:
        raise OpsError(f"alembic wrote {len(made)} scripts instead of one", "check its versions directory")
    if database and made[0].upgrade == made[0].downgrade == "empty":
        made[0].path.unlink()  # written by this call, and empty
        return None
    return made[0]
