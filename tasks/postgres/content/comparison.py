"""Compare a restored copy with its backup's manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tasks.postgres.content.content import LARGE_OBJECTS, DatabaseContent, Part, SequenceValue
from tasks.postgres.content.definitions import differences as definition_differences
from tasks.postgres.content.equivalence import JudgedDefinition
from tasks.postgres.content.sums import TableSum
from tasks.postgres.dump.accepted import VIEW_ROWS, index_of, left_out, table_of
from tasks.postgres.server.properties import Properties


@dataclass(frozen=True)
class ContentComparison:
    """The compared objects (name, expected, found, equal) and every difference as a sentence.

    `versions`: extensions of another version, because a dump names none and the copy has the installed one.
    `reordered`: child tables with their parent's columns first. `not_compared`: parts that an older manifest lacks.
    """

    proven: tuple[tuple[str, str, str, bool], ...]
    differences: tuple[str, ...]
    versions: tuple[str, ...] = ()
    reordered: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()


def compare(
    expected: DatabaseContent,
    actual: DatabaseContent,
    judged: JudgedDefinition,
    *,
    unfilled: Collection[str] = (),
    accepted: Collection[str] = (),
) -> ContentComparison:
    """Compare a restored copy with its manifest, for the parts that the backup has.

    `judged`: definitions that differ in text, by `compare_definitions`. `unfilled`: views left empty, reported
    separately. `accepted`: objects that an operator left out.
    """
    whole = expected.part == "full"
    expected = _without_accepted(expected, actual, accepted)
    proven, problems = [], []
    for name, table in expected.tables.items():
        found = actual.tables.get(name)
        equal = found is not None and (found.rows, found.hash) == (table.rows, table.hash)
        shown = f"{found.rows:,} rows" if found else "missing"
        proven.append((name, f"{table.rows:,} rows", shown, equal))
        if not equal:
            problems.append(_table_problem(name, table, found))
    absent, new = {*expected.extensions} - {*actual.extensions}, {*actual.extensions} - {*expected.extensions}
    problems += [f"extension {name}: missing" for name in sorted(absent)]
    problems += [f"extension {name}: not in the backup" for name in sorted(new)]
    if expected.part != "schema":
        problems += _unequal("sequence", expected.sequences, actual.sequences)
    if whole:
        problems += [f"{name}: not in the backup" for name in actual.tables if name not in expected.tables]
        empty = {name: False for name in expected.populated if name in unfilled}
        problems += _unequal("materialised view populated", {**expected.populated, **empty}, actual.populated)
    problems += _unequal_storage(expected, actual)
    problems += _unequal("database", _attributes(expected.properties), _attributes(actual.properties))
    if whole and expected.revision != actual.revision:
        problems.append(f"Alembic revision: expected {expected.revision}, found {actual.revision}")
    definitions = {
        key: text
        for key, text in expected.definitions.items()
        if whole or not key.startswith(NEEDS_OTHER_ROWS[expected.part])
    }
    problems += definition_differences(definitions, actual.definitions, judged)
    versions = (
        f"{name}: {version} in the backup, {actual.extensions[name]} in the copy"
        for name, version in expected.extensions.items()
        if actual.extensions.get(name, version) != version
    )
    reordered = [key for key in judged.equal if _is_reordered(definitions[key], actual.definitions[key])]
    return ContentComparison(
        (*proven, *_proven(expected, actual, problems)),
        tuple(problems),
        tuple(versions),
        tuple(sorted(key.removeprefix("TABLE ").rpartition(" (owner ")[0] for key in reordered)),
        (*(what for what, known in _of_later_manifests(expected) if known is None), *map(_not_compared, accepted)),
    )


def _without_accepted(expected: DatabaseContent, actual: DatabaseContent, accepted: Collection[str]) -> DatabaseContent:
    """The expected content without the accepted objects. Of a table with an accepted empty column only the number of
    rows is compared."""
    if not accepted:
        return expected
    left, indexes = left_out(accepted), {index_of(name) for name in accepted}
    views = {name for name in expected.populated if f"{VIEW_ROWS} {name}".replace('"', "") in accepted}
    emptied = {table_of(name) for name in accepted}
    hashes = {name: actual.tables[name].hash for name in expected.tables if name in emptied and name in actual.tables}
    return expected.model_copy(
        update={
            "definitions": {
                key: text for key, text in expected.definitions.items() if key.rpartition(" (owner ")[0] not in left
            },
            "populated": {name: filled and name not in views for name, filled in expected.populated.items()},
            "tables": {
                name: table.model_copy(update={"hash": hashes.get(name, table.hash)})
                for name, table in expected.tables.items()
            },
            "tablespaces": expected.tablespaces
            and {name: place for name, place in expected.tablespaces.items() if name not in indexes},
        }
    )


def _not_compared(accepted: str) -> str:
    if table := table_of(accepted):
        return f"values in table {table}, only the number of its rows ({accepted} is empty, as accepted)"
    return f"{accepted} (not restored, as accepted)"


def _of_later_manifests(content: DatabaseContent) -> Iterator[tuple[str, object]]:
    old = "(the backup was taken by an earlier version)"
    yield f"tablespaces of tables and indexes {old}", content.tablespaces
    yield f"access methods of tables {old}", content.access_methods
    if content.part == "full":
        yield f"owners, privileges and comments of large objects {old}", content.large_object_rights


def _unequal_storage(expected: DatabaseContent, actual: DatabaseContent) -> list[str]:
    """Properties that pg_dump prints outside the object's definition."""
    problems = []
    if expected.tablespaces is not None:
        problems += _unequal("tablespace of", expected.tablespaces, actual.tablespaces or {})
    if expected.access_methods is not None:
        problems += _unequal("access method of", expected.access_methods, actual.access_methods or {})
    if expected.large_object_rights not in (None, actual.large_object_rights):
        problems.append(f"{LARGE_OBJECTS}: their owners, privileges or comments differ")
    return problems


def _is_reordered(expected: str, actual: str) -> bool:
    """Whether a child table's columns are the same in another order."""
    ours, theirs = (_COLUMN.findall(text) for text in (expected, actual))
    return _CHILD in expected and ours != theirs and sorted(ours) == sorted(theirs)


_CHILD = "\nINHERITS ("
_COLUMN = re.compile(r'^    ("(?:[^"]|"")+"|(?!CONSTRAINT )[\w$]+) ', re.MULTILINE)


# A foreign key to rows that are not in the backup cannot be created.
NEEDS_OTHER_ROWS: dict[Part, tuple[str, ...]] = {"full": (), "schema": (), "tables": ("FK CONSTRAINT ",)}


def _proven(
    expected: DatabaseContent, actual: DatabaseContent, problems: Sequence[str]
) -> list[tuple[str, str, str, bool]]:
    """The last rows of the comparison's table."""
    definitions = ("definitions", str(len(expected.definitions)), str(len(actual.definitions)), not problems)
    if expected.part == "schema":
        return [definitions]
    found = [
        ("sequences", str(len(expected.sequences)), str(len(actual.sequences)), expected.sequences == actual.sequences),
        definitions,
    ]
    if expected.part == "full":
        found.append(("Alembic revision", expected.revision, actual.revision, expected.revision == actual.revision))
    return found


def _table_problem(name: str, expected: TableSum, found: TableSum | None) -> str:
    if found is None:
        return f"table {name}: missing"
    if found.rows != expected.rows:
        return f"table {name}: {found.rows:,} rows instead of {expected.rows:,}"
    return f"table {name}: the number of rows is equal, their content differs"


def _attributes(properties: Properties) -> dict[str, object]:
    found = properties.model_dump()
    found.pop("collation_version")
    return found


def _unequal(what: str, expected: Mapping[str, object], actual: Mapping[str, object]) -> list[str]:
    return [
        f"{what} {name}: expected {_shown(expected.get(name))}, found {_shown(actual.get(name))}"
        for name in sorted({*expected, *actual})
        if expected.get(name) != actual.get(name)
    ]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, SequenceValue):
        return str(value.last) + ("" if value.called else " (not used yet)")
    return str(value)
