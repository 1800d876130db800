"""Lines of logs as rows of a table, read by DuckDB in parallel: any size, in bounded memory, no line dropped silently.

A packed file is unpacked by a thread into a pipe: its checksum is looked at, which DuckDB does not do.
https://duckdb.org/docs/stable/data/json/loading_json
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timezone
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import IO
from zoneinfo import ZoneInfo

import duckdb

from runbook.errors import OpsError
from tasks.logs.reading.files import LogFile

MEMORY, MOST_THREADS = "640MB", 4
LONGEST_LINE_BYTES = 16 << 20  # a reader has two buffers of it
CHUNK_BYTES = 1 << 20
# Fields of a line (§6.1), extracted once, the time first.
FIELDS = ("timestamp", "level", "message", "module", "logger", "user_id")
NO_NAMES: Mapping[str, str] = MappingProxyType({})
_PATH = re.compile(r"'\$\.(\w+)'")
_OPEN = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


@dataclass(frozen=True)
class LogChoice:
    """What is looked for: expressions, by name, of the lines for which `where` holds.

    Expressions may use `line` (the JSON), `time` (UTC), `here` (the same in the operators' zone), and the names of the
    source's fields, NULL where a line has none. `needles`: of each group one text at least is in every line that holds
    `where`.
    """

    columns: Mapping[str, str]
    where: str = "true"
    parameters: Mapping[str, object] = field(default_factory=dict)
    needles: Sequence[Sequence[str]] = ()


@dataclass
class LogSource:
    """Logs that are open. `names`: a field as this project calls it → as the lines do, where they differ.

    `unreadable`: files that could not be read (to their end), and why, by name."""

    connection: duckdb.DuckDBPyConnection
    files: tuple[LogFile, ...]
    zone: ZoneInfo
    fields: Sequence[str] = FIELDS
    names: Mapping[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The stored bytes of all files."""
        return sum(file.bytes for file in self.files)

    def pick(
        self,
        columns: Mapping[str, str],
        where: str,
        parameters: Mapping[str, object],
        needles: Sequence[Sequence[str]] = (),
    ) -> int:
        """`pick_each` for one choice, with the table `picked`."""
        return self.pick_each(picked=LogChoice(columns, where, parameters, needles))

    def pick_each(self, **choices: LogChoice) -> int:
        """Read all files once for several choices: one table each, by its name.

        Returns how many lines are no JSON objects.

        Raises:
            OpsError: a line is longer than LONGEST_LINE_BYTES, the disk is full, or the condition is wrong.
        """
        near, texts = _near([choice.needles for choice in choices.values()])
        query, views = _chosen(choices, _lines(self.places, self.zone.key, self.fields, near))
        parameters = {name: value for choice in choices.values() for name, value in choice.parameters.items()}
        if self.places:
            parameters |= texts
        try:
            query = _translated(query, self.names)
            self.connection.execute(f"CREATE OR REPLACE TEMP TABLE read AS {query}", parameters)
        except duckdb.Error as error:
            raise _refused(error) from None
        for name, view in views.items():
            self.connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {view}")
        return int(self.rows("SELECT count(*) FROM read WHERE bad")[0][0])

    def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[tuple]:  # type: ignore[type-arg]
        """The rows of a query over `picked`."""
        return self.connection.execute(query, dict(parameters or {})).fetchall()


@contextmanager
def reading(
    files: Sequence[LogFile],
    zone: ZoneInfo,
    *,
    since: datetime | None = None,
    fields: Sequence[str] = FIELDS,
    names: Mapping[str, str] = NO_NAMES,
) -> Iterator[LogSource]:
    """Open logs, but for files that were written last before `since`: a rename while they are read changes nothing.
    `fields` of each line are taken out, timestamp first; `names` as in [logs] fields.

    Raises:
        OpsError: none of them can be read.
    """
    wanted = [file for file in files if since is None or file.modified >= since]
    with ExitStack() as stack:
        spill = stack.enter_context(tempfile.TemporaryDirectory(prefix="ops-logs-"))
        settings = {
            "memory_limit": MEMORY,
            "threads": min(MOST_THREADS, os.cpu_count() or 1),
            "temp_directory": spill,
            "preserve_insertion_order": False,
        }
        connection = stack.enter_context(duckdb.connect(config=settings))  # type: ignore[arg-type]
        connection.execute("SET TimeZone = 'UTC'")
        # Otherwise the condition on fields runs before the cheap one on the text, and parses every line.
        connection.execute("SET disabled_optimizers = 'filter_pushdown'")
        source = LogSource(connection, tuple(wanted), zone, fields, names)
        source.places += [place for file in wanted if (place := _opened(stack, source, file))]
        if wanted and not source.places:
            name, why = next(iter(source.unreadable.items()))
            raise OpsError(f"{name} cannot be read: {why}", "run the worker as a user who can read the logs")
        yield source


def _opened(stack: ExitStack, source: LogSource, file: LogFile) -> str:
    """A path that stays valid after a rename; "": the file cannot be opened."""
    try:
        content = stack.enter_context(file.path.open("rb"))
    except OSError as error:
        source.unreadable[file.path.name] = error.strerror or type(error).__name__
        return ""
    if not file.packed:
        return f"/proc/self/fd/{content.fileno()}"
    if file.packed not in _OPEN:
        source.unreadable[file.path.name] = f"packed as {file.packed}, which is not known here"
        return ""
    out, into = os.pipe()
    stack.callback(os.close, out)
    feeder = Thread(target=_unpack, args=(source, file, content, into), daemon=True)
    feeder.start()
    return f"/proc/self/fd/{out}"


def _unpack(source: LogSource, file: LogFile, content: IO[bytes], into: int) -> None:
    try:
        with os.fdopen(into, "wb") as pipe, _OPEN[file.packed](content, "rb") as packed:  # type: ignore[operator]
            while chunk := packed.read1(CHUNK_BYTES):
                pipe.write(chunk)
    except BrokenPipeError:  # the reader has ended
        return
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        source.unreadable[file.path.name] = f"damaged, read up to there: {error}"


def _near(needles: Sequence[Sequence[Sequence[str]]]) -> tuple[str, dict[str, object]]:
    """A condition on the text of a line, quick to look at, that every line holds which could hold a choice's own. A
    text that is written otherwise than it reads has a backslash in it: JSON has no other way.
    """
    found, texts = list[str](), dict[str, object]()

    def contains(text: str) -> str:
        texts[name := f"needle{len(texts)}"] = text
        return f"contains(line, ${name})"

    for groups in needles:
        each = [" OR ".join(map(contains, group)) for group in groups]
        found.append(" AND ".join(f"({one})" for one in each) or "true")
    return " OR ".join((*found, "contains(line, chr(92))")), texts


def _chosen(choices: Mapping[str, LogChoice], lines: str) -> tuple[str, dict[str, str]]:
    """Queries for what is kept of lines, and for each choice's table of it. What several want is kept once."""
    wanted = list(dict.fromkeys(one for choice in choices.values() for one in choice.columns.values()))
    kept = []
    for number, expression in enumerate(wanted):
        holds = " OR ".join(f"in_{name}" for name in choices if expression in choices[name].columns.values())
        kept.append(f"CASE WHEN {holds} THEN {expression} END AS c{number}")
    holds = ", ".join(f"NOT bad AND ({choice.where}) AS in_{name}" for name, choice in choices.items())
    names = [f"in_{name}" for name in choices]
    query = f"""
        SELECT bad, {", ".join((*names, *kept))} FROM (SELECT *, {holds} FROM ({lines}))
        WHERE bad OR {" OR ".join(names)}
    """  # noqa: S608 - names and expressions of this project's own
    views = {
        name: f"SELECT {', '.join(f'c{wanted.index(one)} AS {column}' for column, one in choice.columns.items())} "  # noqa: S608
        f"FROM read WHERE in_{name}"
        for name, choice in choices.items()
    }
    return query, views


def _translated(query: str, own: Mapping[str, str]) -> str:
    """Paths into a line's JSON, `'$.status'`, as the lines call these fields."""
    if not own:
        return query
    return _PATH.sub(lambda path: f"""'$."{own.get(path[1], path[1])}"'""", query)


def _lines(places: Sequence[str], zone: str, fields: Sequence[str], near: str) -> str:
    """Of the lines that may be bad (no JSON object) or are `near`: bad, line, time, here, and `fields`."""
    if not places:
        empty = ", ".join(f"NULL::VARCHAR AS {name}" for name in (*fields, "line"))
        return f"SELECT false AS bad, NULL::TIMESTAMP AS time, NULL::TIMESTAMP AS here, {empty} WHERE false"
    paths = ", ".join(f"'{place}'" for place in places)
    names = ", ".join(f"'$.{name}'" for name in fields)
    parts = ", ".join(f"part[{number}] AS {name}" for number, name in enumerate(fields, 1))
    return f"""
        SELECT bad, line, timezone('UTC', moment) AS time, timezone('{zone}', moment) AS here, {parts}
        FROM (SELECT *, try_cast(replace(part[1], ',', '.') AS TIMESTAMPTZ) AS moment FROM (
              SELECT line, line IS NULL OR NOT starts_with(ltrim(line), '{{') AS bad,
                     json_extract_string(line, [{names}]) AS part FROM (
              SELECT json AS line
              FROM read_ndjson_objects([{paths}], ignore_errors = true, compression = 'none',
                                       maximum_object_size = {LONGEST_LINE_BYTES}))
              WHERE line IS NULL OR NOT starts_with(line, '{{') OR {near}))
    """  # noqa: S608 - paths of open files and this module's own names


def count_undated(source: LogSource) -> int:
    """Lines of the table `undated` (`Conditions.undated`)."""
    return int(source.rows("SELECT count(*) FROM undated")[0][0])


def utc(moment: datetime) -> datetime:
    """A moment as in the column `time`: UTC without zone."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def offset(moment: datetime) -> str:
    """A moment's offset from UTC: +09:00."""
    return moment.isoformat()[-6:]


def by_hour(source: LogSource, counts: str = "count(*)", where: str = "true") -> list[tuple[datetime, list[int]]]:
    """`counts` of what was picked, by hour of the operators' zone, the earliest first. Hours have their offset: the one
    that comes twice where the clock is put back is two."""
    rows = source.rows(
        f"SELECT date_trunc('hour', here), here - time, {counts} FROM picked "  # noqa: S608
        f"WHERE time IS NOT NULL AND ({where}) GROUP BY 1, 2 ORDER BY min(time)"
    )
    return [(hour.replace(tzinfo=timezone(offset)), list(map(int, found))) for hour, offset, *found in rows]


def _refused(error: duckdb.Error) -> OpsError:
    text = " ".join(str(error).split())
    if "maximum_object_size" in text:
        return OpsError(
            f"a line is longer than {LONGEST_LINE_BYTES >> 20} MiB",
            "find it with: awk 'length > 16000000 {print FILENAME, FNR}', and out why it was written",
        )
    if "No space left" in text or isinstance(error, duckdb.OutOfMemoryException):
        return OpsError(
            f"what was found does not fit in memory and {Path(tempfile.gettempdir())}",
            "search a shorter time, or free disk space",
        )
    return OpsError(f"DuckDB refuses the search: {text[:300]}", "correct the condition that it names")
