"""The cost of a month's AI calls, measured repeatedly: a file that no longer changes is read once (§5.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from zoneinfo import ZoneInfo

from blocks.places import Logs
from runbook.kinds import probe
from tasks.logs.figures import tokens
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.reading.source import count_undated, reading


@dataclass(frozen=True)
class FileUse:
    """Tokens in one file, of one month (`2026-11`): model → prompt and completion; `tokenless` calls tell none, no
    time, or only a total. It is the file's as long as its size and time are these."""

    bytes: int
    modified: datetime
    month: str
    models: dict[str, tuple[int, int]]
    tokenless: int


@dataclass(frozen=True)
class Spent:
    """The month so far. `unpriced` models and `tokenless` calls are not counted. `files`: for the next reading."""

    cost: float
    unpriced: tuple[str, ...]
    tokenless: int
    files: dict[str, FileUse]


@probe
def read_spent(
    logs: Logs, zone: ZoneInfo, prices: Mapping[str, Sequence[float]], now: datetime, known: Mapping[str, FileUse]
) -> Spent:
    """The cost so far; `known`: the files of the last reading.

    Raises:
        OpsError: there is no log, or it cannot be read.
    """
    today = now.astimezone(zone)
    month, begin = f"{today:%Y-%m}", datetime.combine(today.date().replace(day=1), time(), zone)
    files = {}
    for file in find_logs.work(Path(logs.need("app"))):
        if file.modified >= begin:
            before = known.get(str(file.inode))
            is_same = before and (before.bytes, before.modified, before.month) == (file.bytes, file.modified, month)
            files[str(file.inode)] = before if before and is_same else _read(file, zone, begin, month, logs)
    models = defaultdict[str, list[tuple[int, int]]](list)
    for use in files.values():
        for model, taken in use.models.items():
            models[model].append(taken)
    cost = sum(
        (prompt * prices[model][0] + completion * prices[model][1]) / 1_000_000
        for model, taken in models.items()
        if model in prices
        for prompt, completion in taken
    )
    unpriced = tuple(sorted(model for model in models if model not in prices))
    return Spent(cost, unpriced, sum(use.tokenless for use in files.values()), files)


def _read(file: LogFile, zone: ZoneInfo, begin: datetime, month: str, logs: Logs) -> FileUse:
    wanted = tokens.calls(logs.ai_message).within(begin, None)
    with reading((file,), zone, names=logs.fields) as source:
        source.pick_each(picked=wanted.choice(tokens.COLUMNS), undated=wanted.undated())
        uses = tokens.read_use(source)
        undated = count_undated(source)
    models = defaultdict[str, tuple[int, int]](lambda: (0, 0))
    for use in uses:
        prompt, completion = models[use.model]
        models[use.model] = (prompt + use.prompt, completion + use.completion)
    uncounted = sum(use.tokenless + use.unsplit for use in uses) + undated
    return FileUse(file.bytes, file.modified, month, dict(models), uncounted)
