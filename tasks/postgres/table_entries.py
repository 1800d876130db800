"""Which entries of a dump a few tables need before their rows come: themselves, and what they are made of.

`pg_restore --list --verbose` prints each entry with the entries that it depends on.
https://www.postgresql.org/docs/current/app-pgrestore.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres import Postgres
from runbook import shell

_ENTRY = re.compile(r"(\d+); \d+ \d+ (.+)")
_NEEDS = re.compile(r";\s+depends on: ([\d ]+)")
_PLAIN = re.compile(r"(?:([a-z_][a-z0-9_$]*)\.)?([a-z_][a-z0-9_$]*)")
# What there are thousands of where there are thousands of tables, and what comes after the rows. Everything else
# (types, functions …) is restored.
_OF_TABLES = (
    *("TABLE ", "VIEW ", "MATERIALIZED VIEW ", "FOREIGN TABLE ", "SEQUENCE ", "DEFAULT ", "COMMENT ", "ACL "),
    *("SECURITY LABEL ", "STATISTICS ", "RULE ", "CONSTRAINT ", "CHECK CONSTRAINT ", "FK CONSTRAINT ", "INDEX "),
    *("TRIGGER ", "EVENT TRIGGER ", "POLICY ", "ROW SECURITY ", "PUBLICATION ", "SUBSCRIPTION "),
)
_ATTACH, _DEFAULT = "TABLE ATTACH ", "DEFAULT "


@dataclass(frozen=True)
class Entry:
    """One line of the list: its number, what it is (kind, schema, name, owner), and the numbers that it needs."""

    number: int
    what: str
    line: str
    needs: frozenset[int]


def list_entries(postgres: Postgres, dump: Path) -> list[Entry]:
    """A dump's table of contents, in its order."""
    listed = shell.run([postgres.program("pg_restore"), "--list", "--verbose", dump]).stdout
    found = list[Entry]()
    for line in listed.splitlines():
        if match := _ENTRY.match(line):
            found.append(Entry(int(match[1]), match[2], line, frozenset()))
        elif found and (match := _NEEDS.match(line)):
            last = found[-1]
            found[-1] = Entry(last.number, last.what, last.line, frozenset(map(int, match[1].split())))
    return found


def choose_entries(entries: Sequence[Entry], typed: Sequence[str]) -> list[str] | None:
    """The lines that the named tables need, with their partitions; None where a name is not one plain table's: then
    only the whole schema tells what is meant."""
    numbers = {entry.number: entry for entry in entries}
    chosen = set[int]()
    for name in typed:
        found = _tables_of(entries, name.strip())
        if len(found) != 1:
            return None
        chosen.update(found)
    chosen |= {entry.number for entry in entries if not _is_of_tables(entry.what)}
    while added := _needed(entries, numbers, chosen):
        chosen |= added
    return [entry.line for entry in entries if entry.number in chosen]


def _tables_of(entries: Sequence[Entry], typed: str) -> list[int]:
    if not (match := _PLAIN.fullmatch(typed)):
        return []
    found = []
    for entry in entries:
        words = entry.what.split(" ")
        if len(words) == 4 and words[0] == "TABLE" and words[2] == match[2] and match[1] in (None, words[1]):
            found.append(entry.number)
    return found


def _is_of_tables(what: str) -> bool:
    return what.startswith(_OF_TABLES) and not what.startswith("DEFAULT ACL ")


def _needed(entries: Sequence[Entry], numbers: dict[int, Entry], chosen: set[int]) -> set[int]:
    """What the chosen ones need and is not among them yet: the entries that they depend on; a table's defaults, and
    its partitions with their attachment."""
    needed = {number for one in chosen if one in numbers for number in numbers[one].needs}
    tables = {number for number in chosen if number in numbers and _is_of_tables(numbers[number].what)}
    for entry in entries:
        if entry.what.startswith((_ATTACH, _DEFAULT)) and _is_of_tables(entry.what) and entry.needs & tables:
            needed |= {entry.number, *entry.needs}
    return (needed & numbers.keys()) - chosen
