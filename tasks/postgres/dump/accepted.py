"""Objects of a dump that pg_restore cannot build and that an operator accepts as not restored.

Examples: a foreign key that its rows break (triggers were disabled once), an index whose function fails in a restore, a
materialised view that cannot be refreshed. pg_restore stops at them. None of them contains rows.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed
from tasks.postgres.dump.generated import COLUMN

VIEW_ROWS = "MATERIALIZED VIEW DATA"
# No rows, privileges or policies: leaving these out loses no data and grants no access.
KINDS = ("INDEX", "CONSTRAINT", "FK CONSTRAINT", "CHECK CONSTRAINT", "TRIGGER", "EVENT TRIGGER", VIEW_ROWS)
_DEPENDENT = ("COMMENT", "INDEX ATTACH", "STATISTICS DATA")
_LONGEST_FIRST = "|".join(sorted((*KINDS, *_DEPENDENT, "TABLE DATA"), key=len, reverse=True))
_ENTRY = re.compile(rf"\d+; \d+ \d+ (?P<kind>{_LONGEST_FIRST}) (?P<schema>\S+) (?P<name>.+) \S*")
_COMMAND = re.compile(r"^Command was: (.+?;)$", re.MULTILINE | re.DOTALL)
_REFRESH = re.compile(r"^Command was: REFRESH MATERIALIZED VIEW (.+);$", re.MULTILINE)
_ROWS = re.compile(r'COPY failed for table "(.+)": ERROR:')


def name_of(line: str, kinds: Sequence[str] = KINDS) -> str:
    """An operator's name for an entry of an archive's list: `FK CONSTRAINT public.orders orders_user_fkey`; empty for
    other kinds."""
    match = _ENTRY.fullmatch(line)
    if not match or match["kind"] not in kinds:
        return ""
    return f"{match['kind']} {match['schema']}.{match['name']}".replace(" -.", " ", 1)


def without(lines: Sequence[str], accepted: Collection[str]) -> list[str]:
    """The entries without the accepted ones and their comments, statistics and attachments."""
    left = left_out(accepted)
    return [line for line in lines if name_of(line, (*KINDS, *_DEPENDENT)) not in left]


def left_out(accepted: Collection[str]) -> frozenset[str]:
    """The accepted names, with their comments, statistics and attachments."""
    return frozenset(accepted) | {dependent for name in accepted for dependent in _dependents(name)}


def _dependents(name: str) -> list[str]:
    kind = next((kind for kind in KINDS if name.startswith(f"{kind} ")), "")
    schema, _, tag = name.removeprefix(f"{kind} ").partition(".")
    if kind == "EVENT TRIGGER":
        return [f"COMMENT {kind} {schema}"]
    if kind in ("TRIGGER", "CONSTRAINT", "FK CONSTRAINT", "CHECK CONSTRAINT"):
        table, _, own = tag.partition(" ")
        return [f"COMMENT {schema}.{kind.split()[-1]} {own} ON {table}"]
    return [f"COMMENT {schema}.{kind} {tag}", f"INDEX ATTACH {schema}.{tag}", f"STATISTICS DATA {schema}.{tag}"]


def index_of(name: str) -> str:
    """The index of an accepted index or constraint: `public.orders_pkey`."""
    kind = next((kind for kind in ("INDEX", "CONSTRAINT") if name.startswith(f"{kind} ")), "")
    schema, _, tag = name.removeprefix(f"{kind} ").partition(".")
    return f"{schema}.{tag.rpartition(' ')[2] if kind == 'CONSTRAINT' else tag}" if kind else ""


def refused_by(error: CommandFailed, definitions: Mapping[str, str]) -> str:
    """The name of the object at which pg_restore stopped, by the statement that it prints and the dump's `definitions`.

    Empty if it prints none, or if that object cannot be left out.
    """
    if view := _REFRESH.search(error.stderr):
        return f"{VIEW_ROWS} {view[1]}".replace('"', "")
    command = _COMMAND.search(error.stderr)
    found = (key for key, text in definitions.items() if command and text.startswith(command[1].rstrip()))
    name = next(found, "").rpartition(" (owner ")[0]
    return name if name.startswith(tuple(f"{kind} " for kind in KINDS)) else ""


def refused_rows(error: CommandFailed) -> str:
    """The table (without its schema) whose rows pg_restore could not load; empty for other errors."""
    match = _ROWS.search(error.stderr)
    return match[1] if match else ""


def restore_without(accepted: Sequence[str], refused: Sequence[str]) -> str:
    """The next step if objects were refused: accept them too."""
    given = json.dumps(list(dict.fromkeys((*accepted, *refused))), ensure_ascii=False)
    return f"run this again with accept={given} to restore without it; "


def unknown_in(names: Collection[str], tables: Collection[str], accepted: Sequence[str]) -> dict[str, str]:
    """The accepted names that the dump does not have, each with the closest one; of a generated column only the table
    is checked."""
    unknown = [name for name in accepted if name not in names and table_of(name) not in tables]
    return {name: next(iter(difflib.get_close_matches(name, names, 1)), "") for name in unknown}


def table_of(name: str) -> str:
    """The table of an accepted generated column (`public.orders`); empty for another name."""
    return name.removeprefix(f"{COLUMN} ").rpartition(".")[0] if name.startswith(f"{COLUMN} ") else ""


def entries(postgres: Postgres, dump: Path) -> list[str]:
    """The lines of an archive's list."""
    return shell.run([postgres.program("pg_restore"), "--list", dump]).stdout.splitlines()
