"""An application's migration scripts: their order, and which of them can be undone.

Alembic imports each script to read its revision, as `alembic history` does, so its top level runs. `upgrade` and
`downgrade` are not called; their source is read.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.migrations.bodies import Body, read_bodies

HEAD, BASE = "head", "base"
INI = "alembic.ini"
_SCRIPTS = """
import json, sys
from alembic.config import Config
from alembic.script import ScriptDirectory
found = ScriptDirectory.from_config(Config(sys.argv[1]))
print(json.dumps([[s.revision, list(s._all_down_revisions), s.doc, s.path] for s in found.walk_revisions()]))
"""


@dataclass(frozen=True)
class Script:
    """One migration: its predecessors (`down`), title, file, both functions, and the file's SHA-256.

    `transactional` is False if it commits in between (`autocommit_block`): a failure then leaves a part.
    """

    revision: str
    down: tuple[str, ...]
    title: str
    path: Path
    upgrade: Body = "written"
    downgrade: Body = "written"
    transactional: bool = True
    digest: str = ""

    @property
    def reversible(self) -> bool:
        """Whether its downgrade does something, or has nothing to undo (a merge)."""
        return self.downgrade == "written" or (self.upgrade == "empty" and self.downgrade == "empty")


@dataclass(frozen=True)
class MigrationHeads:
    """The application's migrations, newest first, and the names of those without a successor."""

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
                "merge them (`alembic merge heads`) in the application's repository, test and deploy the result",
            )
        return self.names[0]

    def resolve(self, revision: str) -> str:
        """The full revision for an operator's input: `head`, a revision, or its first characters.

        Raises:
            OpsError: none matches, or several.
        """
        if revision == HEAD:
            return self.one()
        exact = [script.revision for script in self.scripts if script.revision == revision]
        found = exact or [s.revision for s in self.scripts if revision and s.revision.startswith(revision)]
        if len(found) != 1:
            newest = ", ".join(script.revision for script in self.scripts[:3])
            what = f"could be {' or '.join(found)}" if found else "is not a revision"
            raise OpsError(f"“{revision[:60]}” {what} of this application", f"choose head or one of {newest} …")
        return found[0]

    def pending(self, current: str, revision: str = HEAD) -> tuple[Script, ...]:
        """The scripts of an upgrade from `current` (empty: none) to `revision` (or `+1`, the next), in order.

        Raises:
            OpsError: `revision` does not exist, or `current` is unknown: the code is older than the schema.
        """
        done = self.applied(current)
        if re.fullmatch(r"\+[1-9]\d{0,3}", revision):
            following = self._ordered(self._up_to(self.one()) - done)[: int(revision)]
            return self.pending(current, following[-1].revision) if following else ()
        return self._ordered(self._up_to(self.resolve(revision)) - done)

    def undone(self, current: str, revision: str) -> tuple[str, tuple[Script, ...]]:
        """The target of a downgrade from `current` to `revision` (or `-1`, `-2` …, `base`; empty: base) and the scripts
        that it undoes, newest first.

        Raises:
            OpsError: `revision` does not exist, is not below `current`, or is on one side of a merge only.
        """
        applied = self.applied(current)
        target = self._below(current, revision)
        if target and target not in applied:
            raise OpsError(
                f"{target} is not below {current or 'base'}, the database's revision",
                "run apply-migrations to upgrade; check-migrations shows the history",
            )
        undone = applied - (self._up_to(target) if target else set())
        unrelated = sorted(name for name in undone if target and target not in self._up_to(name))
        if unrelated:
            raise OpsError(
                f"{', '.join(unrelated)} would be undone too but does not follow {target}: there is a merge in between",
                "choose a revision below the branch",
            )
        return target, tuple(reversed(self._ordered(undone)))

    def applied(self, current: str) -> set[str]:
        """The migrations that a database at `current` has applied.

        Raises:
            OpsError: it is at several revisions, or at one without a script.
        """
        if "," in current:
            hint = "find the right one and correct alembic_version (alembic stamp)"
            raise OpsError(f"the database is at several revisions at once: {current}", hint)
        if current and current not in {script.revision for script in self.scripts}:
            raise OpsError(
                f"the database is at revision {current}, which this application does not know",
                "deploy the release that created it: older code may fail on a newer schema",
            )
        return self._up_to(current) if current else set()

    def _below(self, current: str, revision: str) -> str:
        if revision == BASE:
            return ""
        if not re.fullmatch(r"-[1-9]\d{0,3}", revision):
            return self.resolve(revision)
        by_name, name = self._by_name(), current
        for _ in range(-int(revision)):
            if not name:
                raise OpsError(f"{revision} is more than the number of applied migrations", "choose base, or fewer")
            if len(by_name[name].down) > 1:
                raise OpsError(
                    f"{name} has several predecessors: {', '.join(by_name[name].down)}",
                    "enter the revision instead of a number",
                )
            name = next(iter(by_name[name].down), "")
        return name

    def _up_to(self, revision: str) -> set[str]:
        by_name = self._by_name()
        found: set[str] = set()
        waiting = [revision]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += by_name[name].down
        return found

    def _by_name(self) -> Mapping[str, Script]:
        return {script.revision: script for script in self.scripts}

    def _ordered(self, names: Iterable[str]) -> tuple[Script, ...]:
        wanted = set(names)
        return tuple(script for script in reversed(self.scripts) if script.revision in wanted)


@probe
def read_heads(application: Application, backend_directory: Path | None = None) -> MigrationHeads:
    """The application's migrations. Alembic imports each script (its top level runs; upgrade and downgrade do not).

    In this process (0.1 s), or with the application's Python if a script imports the application.

    Raises:
        OpsError: there is no Alembic environment, or its scripts are unreadable.
    """
    return heads_of(application, backend_directory)


def heads_of(application: Application, backend_directory: Path | None = None) -> MigrationHeads:
    """See `read_heads`."""
    directory = backend_directory or Path(application.need("backend_directory"))
    file = directory / INI
    if not file.is_file():
        raise OpsError(f"there is no {file}", "correct backend_directory in the environment")
    try:
        scripts = _scripts_here(file)
    except Exception:  # a script may import packages that only the application's Python has
        scripts = _scripts_by_application(application, file)
    followed = {name for script in scripts for name in script.down}
    return MigrationHeads(tuple(s.revision for s in scripts if s.revision not in followed), scripts)


def _scripts_here(file: Path) -> tuple[Script, ...]:
    from alembic.config import Config  # slow to import, and a restore may have no migration
    from alembic.script import ScriptDirectory

    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # write nothing into the application's directory
    try:
        found = ScriptDirectory.from_config(Config(str(file)))
        return tuple(
            _script(s.revision, tuple(s._all_down_revisions), s.doc, Path(s.path)) for s in found.walk_revisions()
        )
    finally:
        sys.dont_write_bytecode = writes


def _scripts_by_application(application: Application, file: Path) -> tuple[Script, ...]:
    try:
        done = shell.run(
            [application.need("python"), "-c", _SCRIPTS, file],
            environment={"PYTHONDONTWRITEBYTECODE": "1"},
            inherit=application.inherit,
            directory=file.parent,
            timeout_seconds=60,
        )
    except CommandFailed as error:
        raise OpsError(
            f"the migrations in {file.parent} cannot be read: {error.stderr.strip().splitlines()[-1:]}",
            "run `alembic history` there and correct the error",
        ) from None
    return tuple(_script(name, tuple(down), title, Path(path)) for name, down, title, path in json.loads(done.stdout))


def _script(revision: str, down: tuple[str, ...], title: str, path: Path) -> Script:
    does = read_bodies(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Script(revision, down, title, path, does.upgrade, does.downgrade, does.transactional, digest)
