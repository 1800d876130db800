"""Lines of logs as rows of a table, read by DuckDB in parallel: any size, in bounded memory, no line dropped silently.

A packed file is unpacked by a thread into a pipe: its checksum is looked at, which DuckDB does not do.
https://duckdb.org/docs/stable/data/json/loading_json
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import IO
from zoneinfo import ZoneInfo

import duckdb

from runbook.errors import OpsError
from tasks.logs.files import LogFile

MEMORY, MOST_THREADS = "640MB", 4
LONGEST_LINE_BYTES = 16 << 20  # a reader has two buffers of it
CHUNK_BYTES = 1 << 20
# What every line may have (§6.1, §6.4), and where it stands in the row.
FIELDS = ("timestamp", "level", "message", "module", "logger", "user_id")
_OPEN = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


@dataclass
class Source:
    """Logs that are open. `unreadable`: files that could not be read (to their end), and why, by name."""

    connection: duckdb.DuckDBPyConnection
    files: tuple[LogFile, ...]
    zone: ZoneInfo
    unreadable: dict[str, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all files, as they are stored."""
        return sum(file.bytes for file in self.files)

    def pick(
        self,
        columns: Mapping[str, str],
        where: str,
        parameters: Mapping[str, object],
        needles: Sequence[Sequence[str]] = (),
    ) -> int:
        """Read all files once, into the table `picked`: expressions of the lines for which `where` holds.

        Expressions may use `line` (the JSON), `time` (UTC), `here` (the same in the operators' zone), and the names of
        `FIELDS`, NULL where a line has none. `needles`: of each group one text at least is in every line that holds
        `where`.
        Returns how many lines are no JSON objects.

        Raises:
            OpsError: a line is longer than LONGEST_LINE_BYTES, the disk is full, or the condition is wrong.
        """
        chosen = ", ".join(f"{expression} AS {name}" for name, expression in columns.items())
        near, texts = _near(needles)
        lines = _lines(self.places, self.zone.key, near)
        query = f"SELECT bad, {chosen} FROM lines WHERE bad OR ({where})"  # noqa: S608 - names and expressions of this project's own
        try:
            self.connection.execute(
                f"CREATE OR REPLACE TEMP TABLE read AS WITH lines AS ({lines}) {query}", {**parameters, **texts}
            )
        except duckdb.Error as error:
            raise _refused(error) from None
        self.connection.execute("CREATE OR REPLACE TEMP VIEW picked AS SELECT * FROM read WHERE NOT bad")
        return int(self.rows("SELECT count(*) FROM read WHERE bad")[0][0])

    def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[tuple]:  # type: ignore[type-arg]
        """The rows of a query over `picked`."""
        return self.connection.execute(query, dict(parameters or {})).fetchall()


@contextmanager
def reading(files: Sequence[LogFile], zone: ZoneInfo, *, since: datetime | None = None) -> Iterator[Source]:
    """Open logs, but for files that were written last before `since`: a rename while they are read changes nothing.

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
        source = Source(connection, tuple(wanted), zone)
        source.places += [place for file in wanted if (place := _opened(stack, source, file))]
        if wanted and not source.places:
            name, why = next(iter(source.unreadable.items()))
            raise OpsError(f"{name} cannot be read: {why}", "run the worker as a user that may read the logs")
        yield source


def _opened(stack: ExitStack, source: Source, file: LogFile) -> str:
    """A path that stays what it is, "" where it cannot be had."""
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


def _unpack(source: Source, file: LogFile, content: IO[bytes], into: int) -> None:
    try:
        with os.fdopen(into, "wb") as pipe, _OPEN[file.packed](content, "rb") as packed:  # type: ignore[operator]
            while chunk := packed.read1(CHUNK_BYTES):
                pipe.write(chunk)
    except BrokenPipeError:  # the reader has ended
        return
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        source.unreadable[file.path.name] = f"damaged, read up to there: {error}"


def _near(needles: Sequence[Sequence[str]]) -> tuple[str, dict[str, object]]:
    """A condition on the text of a line, quick to look at, that every line holds which could hold the real one. A text
    that is written otherwise than it reads has a backslash in it: JSON has no other way.
    """
    names = [[f"needle{group}_{number}" for number, _ in enumerate(texts)] for group, texts in enumerate(needles)]
    found = [" OR ".join(f"contains(json, ${name})" for name in group) for group in names]
    texts = zip((name for group in names for name in group), (text for group in needles for text in group), strict=True)
    return " AND ".join(f"({one} OR contains(json, chr(92)))" for one in found) or "true", dict(texts)


def _lines(places: Sequence[str], zone: str, near: str) -> str:
    """Of the lines that are bad (no JSON object) or `near`: bad, line, time, here, and FIELDS."""
    if not places:
        empty = ", ".join(f"NULL::VARCHAR AS {name}" for name in (*FIELDS, "line"))
        times = "NULL::TIMESTAMP AS time, NULL::TIMESTAMP AS here"
        return f"SELECT false AS bad, {times}, {empty} WHERE false AND ({near.replace('json', 'NULL::VARCHAR')})"
    paths = ", ".join(f"'{place}'" for place in places)
    names = ", ".join(f"'$.{name}'" for name in FIELDS)
    fields = ", ".join(f"part[{number}] AS {name}" for number, name in enumerate(FIELDS, 1))
    return f"""
        SELECT bad, json AS line, timezone('UTC', moment) AS time, timezone('{zone}', moment) AS here, {fields}
        FROM (SELECT *, try_cast(replace(part[1], ',', '.') AS TIMESTAMPTZ) AS moment FROM (
              SELECT bad, json, json_extract_string(json, [{names}]) AS part FROM (
              SELECT json, json IS NULL OR NOT (starts_with(json, '{{') OR starts_with(ltrim(json), '{{')) AS bad
              FROM read_ndjson_objects([{paths}], ignore_errors = true, compression = 'none',
                                       maximum_object_size = {LONGEST_LINE_BYTES}))
              WHERE bad OR ({near})))
    """  # noqa: S608 - paths of open files and this module's own names


def utc(moment: datetime) -> datetime:
    """As `time` has it: UTC without its zone."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def _refused(error: duckdb.Error) -> OpsError:
    text = " ".join(str(error).split())
    if "maximum_object_size" in text:
        return OpsError(
            f"a line is longer than {LONGEST_LINE_BYTES >> 20} MiB",
            "find it with: awk 'length > 16000000 {print FILENAME, FNR}', and out why it was written",
        )
    if "No space left" in text or isinstance(error, duckdb.OutOfMemoryException):
        return OpsError(f"what was found does not fit in memory and {Path(tempfile.gettempdir())}",
                        "search a shorter time, or free disk space")  # fmt: skip
    return OpsError(f"DuckDB refuses the search: {text[:300]}", "correct the condition that it names")
