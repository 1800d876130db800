"""Alembic: the revision that a database is at, the scripts that the application brings, and the way between (§1.1)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from alembic.config import Config
from alembic.script import ScriptDirectory

from blocks.places import Application
from blocks.postgres import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import action, probe
from runbook.permit import Permit

MIGRATE = "migrate"
HEAD = "head"
TIMEOUT_SECONDS = 3600.0
TAIL_LINES = 20
# A migration that waits for a lock makes everybody wait behind it: it gives up instead, and the schema stays as it was.
LOCK_TIMEOUT = "-c lock_timeout=10s"
_SCRIPTS = """
import json, sys
from alembic.config import Config
from alembic.script import ScriptDirectory
found = ScriptDirectory.from_config(Config(sys.argv[1]))
print(json.dumps([[s.revision, list(s._all_down_revisions), s.doc] for s in found.walk_revisions()]))
"""


@dataclass(frozen=True)
class Script:
    """One migration: what it needs first, and its title."""

    revision: str
    down: tuple[str, ...]
    title: str


@dataclass(frozen=True)
class Heads:
    """The application's migrations, newest first, and those that nothing follows."""

    names: tuple[str, ...]
    scripts: tuple[Script, ...]

    def one(self) -> str:
        """The only head.

        Raises:
            OpsError: there are several, or none.
        """
        if len(self.names) != 1:
            found = ", ".join(self.names) or "none"
            raise OpsError(
                f"the migrations have {len(self.names)} heads instead of one: {found}",
                "merge them (`alembic merge heads`) in the application's repository, test it, and deploy that",
            )
        return self.names[0]

    def resolve(self, revision: str) -> str:
        """A full revision of what an operator wrote: `head`, a revision, or the beginning of one.

        Raises:
            OpsError: there is none, or several.
        """
        if revision == HEAD:
            return self.one()
        exact = [script.revision for script in self.scripts if script.revision == revision]
        found = exact or [s.revision for s in self.scripts if revision and s.revision.startswith(revision)]
        if len(found) != 1:
            newest = ", ".join(script.revision for script in self.scripts[:3])
            what = "is not a revision" if not found else f"may be {' or '.join(found)}"
            raise OpsError(f"“{revision[:60]}” {what} of this application", f"choose head or one of {newest} …")
        return found[0]

    def pending(self, current: str, revision: str = HEAD) -> tuple[Script, ...]:
        """What an upgrade from `current` (empty: nothing yet) to `revision` would run, in its order.

        Raises:
            OpsError: `revision` is none; or `current` is unknown: the code is older than the schema.
        """
        if current and "," in current:
            raise OpsError(f"the database is at several revisions at once: {current}", "find out which is right")
        if current and current not in {script.revision for script in self.scripts}:
            raise OpsError(
                f"the database is at revision {current}, which this application does not know",
                "deploy the release that made it: older code may not run on a newer schema",
            )
        done = self._up_to(current) if current else set()
        wanted = self._up_to(self.resolve(revision)) - done
        return tuple(script for script in reversed(self.scripts) if script.revision in wanted)

    def _up_to(self, revision: str) -> set[str]:
        by_name: Mapping[str, Script] = {script.revision: script for script in self.scripts}
        found: set[str] = set()
        waiting = [revision]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += by_name[name].down
        return found


@dataclass(frozen=True)
class Migrated:
    """A database's revision before and after, and the end of what Alembic said (empty where nothing was pending)."""

    before: str
    after: str
    seconds: float
    output: str


@probe
def read_revision(postgres: Postgres, database: str) -> str:
    """What `alembic_version` says: empty when there is none, several joined with commas.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses, or the table is not Alembic's.
    """
    return _revision(postgres, database)


@probe
def read_heads(application: Application, backend_directory: Path | None = None) -> Heads:
    """The application's migrations, read from its scripts.

    Read in this process (0.1 s); where that fails, since a script imports the application, with its own Python.

    Raises:
        OpsError: there is no Alembic environment, or its scripts cannot be read.
    """
    return _heads(application, backend_directory)


@action
def upgrade(
    permit: Permit,
    postgres: Postgres,
    application: Application,
    database: str,
    revision: str = HEAD,
    backend_directory: Path | None = None,
) -> Migrated:
    """`alembic upgrade` on one database (§8.2, step 5), as the application's role. Nothing is run where nothing is
    pending. Where Alembic runs them in one transaction, what fails leaves the schema as it was.

    The permit names the application's database, also where `database` is a copy that will take its place.

    Raises:
        NotConfirmed: not permitted.
        OpsError: several heads, an unknown revision, or the migration failed; the end of its output is in the message.
    """
    permit.require(MIGRATE, postgres.database)
    directory = backend_directory or Path(application.backend_directory)
    before, heads = _revision(postgres, database), _heads(application, directory)
    target = heads.resolve(revision)
    if not heads.pending(before, target):
        return Migrated(before, before, 0.0, "")
    environment = {
        "DATABASE_URL": postgres.url(database),
        "PGOPTIONS": LOCK_TIMEOUT,
        "PGAPPNAME": "interview-ops",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    secret = postgres.password.get_secret_value()
    hint = "see at which revision it is now; correct the migration or what it needs, then launch this again"
    try:
        done = shell.run(
            [application.python, "-m", "alembic", "upgrade", target],
            environment=environment,
            directory=directory,
            timeout_seconds=TIMEOUT_SECONDS,
            hint=hint,
        )
    except CommandFailed as error:
        raise OpsError(f"alembic upgrade {target} failed: {_cause(_masked(error.stderr, secret))}", hint) from None
    after = _revision(postgres, database)
    if heads.pending(after, target):
        raise OpsError(f"alembic said nothing, yet {database} is at {after or 'no revision'} instead of {target}", hint)
    lines = _masked(done.stderr + done.stdout, secret).strip().splitlines()
    return Migrated(before, after, done.seconds, "\n".join(lines[-TAIL_LINES:]))


def _revision(postgres: Postgres, database: str) -> str:
    with postgres.connect(database) as connection:
        try:
            found = execute(connection, "SELECT pg_catalog.to_regclass('public.alembic_version')")
            if found[0][0] is None:
                return ""
            rows = execute(connection, "SELECT version_num FROM public.alembic_version ORDER BY 1")
        except psycopg.Error as error:
            what = str(error).splitlines()[0]
            raise OpsError(
                f"the revision of {database} cannot be read: {what}", "look at its alembic_version"
            ) from None
    return ",".join(str(row[0]) for row in rows)


def _heads(application: Application, backend_directory: Path | None) -> Heads:
    directory = backend_directory or Path(application.backend_directory)
    file = directory / "alembic.ini"
    if not file.is_file():
        raise OpsError(f"there is no {file}", "correct backend_directory in the environment")
    try:
        scripts = _scripts_here(file)
    except Exception:  # whatever a script imports may be missing here, and is there in the application's own Python
        scripts = _scripts_there(application, file)
    followed = {name for script in scripts for name in script.down}
    return Heads(tuple(s.revision for s in scripts if s.revision not in followed), scripts)


def _scripts_here(file: Path) -> tuple[Script, ...]:
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing of ours in the application's directory
    try:
        found = ScriptDirectory.from_config(Config(str(file)))
        return tuple(Script(s.revision, tuple(s._all_down_revisions), s.doc) for s in found.walk_revisions())
    finally:
        sys.dont_write_bytecode = writes


def _scripts_there(application: Application, file: Path) -> tuple[Script, ...]:
    try:
        done = shell.run(
            [application.python, "-c", _SCRIPTS, file],
            environment={"PYTHONDONTWRITEBYTECODE": "1"},
            directory=file.parent,
            timeout_seconds=60,
        )
        return tuple(Script(name, tuple(down), title) for name, down, title in json.loads(done.stdout))
    except CommandFailed as error:
        raise OpsError(
            f"the migrations in {file.parent} cannot be read: {error.stderr.strip().splitlines()[-1:]}",
            "run `alembic history` there and correct what it says",
        ) from None


def _cause(output: str) -> str:
    """The line of a traceback that names the error; Alembic's own messages are one line."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+: ", line)]
    return (named or lines or ["no message"])[-1][:500]


def _masked(text: str, secret: str) -> str:
    """A driver may quote the connection string that it was given."""
    for form in {secret, quote(secret, safe=""), quote(secret)} - {""}:
        text = text.replace(form, "********")
    return text
