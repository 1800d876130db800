"""The target of a recovery: one LSN, with the transactions before and after it. Commit times are not in the order of
WAL, so a time becomes an LSN too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from zoneinfo import ZoneInfo

from runbook.errors import OpsError
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.reading.waldump import Commit

By = Literal["before_transaction", "transaction", "time", "lsn", "latest"]
_EXAMPLES = {
    "before_transaction": "a transaction ID, e.g. 751 (find-transaction finds it)",
    "transaction": "a transaction ID, e.g. 751",
    "time": "a time, e.g. 2026-11-26 14:03:00 or 2026-11-26T14:03:00.123456+09:00",
    "lsn": "an LSN, e.g. 0/3A2F0C8",
    "latest": "nothing",
}


_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class RecoveryTarget:
    """What the operator chose. One of these is set: `xid` without its epoch, `lsn` in bytes, `at` with its zone."""

    by: By
    xid: int = 0
    lsn: int = 0
    at: datetime = _NEVER

    @property
    def text(self) -> str:
        """The target as a phrase."""
        return {
            "before_transaction": f"just before transaction {self.xid} was committed",
            "transaction": f"just after transaction {self.xid} was committed",
            "time": f"before the first commit after {self.at.isoformat()}",
            "lsn": f"before the record at {lsn_text(self.lsn)}",
            "latest": "the newest point of the archive",
        }[self.by]


@dataclass(frozen=True)
class Stop:
    """Recovery stops before the record at `lsn`, or after it (`inclusive`); `lsn` 0: as soon as the backup is
    consistent. `before`: the last transaction that is included, None if none was committed since the backup; `after`:
    the first one that is excluded, None at the end of the archive."""

    lsn: int
    inclusive: bool
    before: Commit | None
    after: Commit | None


def parse_target(by: By, text: str, zone: ZoneInfo) -> RecoveryTarget:
    """Parse a form's two fields. A time without a zone is in the environment's zone.

    Raises:
        OpsError: `text` does not fit `by`.
    """
    text = text.strip()
    try:
        match by:
            case "latest":
                if text:
                    raise ValueError
                return RecoveryTarget(by)
            case "time":
                at = datetime.fromisoformat(text)
                return RecoveryTarget(by, at=(at if at.tzinfo else at.replace(tzinfo=zone)).astimezone(UTC))
            case "lsn":
                return RecoveryTarget(by, lsn=lsn_of(text))
            case "before_transaction" | "transaction":
                number = int(text)
                if number < 3:
                    raise ValueError
                return RecoveryTarget(by, xid=number & 0xFFFFFFFF)
    except ValueError:
        pass
    if by not in _EXAMPLES:
        raise OpsError(f"by is “{by}”", f"choose one of {', '.join(_EXAMPLES)}")
    raise OpsError(f"the target “{text[:60]}” does not fit {by}", f"write {_EXAMPLES[by]}")


def find_stop(target: RecoveryTarget, commits: Sequence[Commit], begin: int, end: int, *, whole: bool) -> Stop | None:
    """The stop among the commits between a backup's end (`begin`) and `end`. `whole`: no WAL follows `end`.

    None: it is not among them.
    """
    there = [commit for commit in commits if commit.lsn >= begin]
    match target.by:
        case "latest":
            return _after(there, len(there) - 1) if whole else None
        case "lsn" if target.lsn >= end or target.lsn < begin:
            return None
        case "lsn":
            return find_stop_at(there, target.lsn)
        case "time":
            index = next((i for i, one in enumerate(there) if one.at > target.at), -1)
        case _:
            index = next((i for i, one in enumerate(there) if one.xid == target.xid), -1)
            if target.by == "transaction" and index >= 0:
                return _after(there, index)
    return find_stop_at(there, there[index].lsn) if index >= 0 else None


def find_stop_at(commits: Sequence[Commit], lsn: int) -> Stop:
    """The stop before the record at `lsn`."""
    index = next((i for i, one in enumerate(commits) if one.lsn >= lsn), len(commits))
    return Stop(lsn, False, commits[index - 1] if index else None, commits[index] if index < len(commits) else None)


def _after(there: Sequence[Commit], index: int) -> Stop:
    if index < 0:
        return Stop(0, False, None, None)  # nothing was committed since the backup: stop when it is consistent
    return Stop(there[index].lsn, True, there[index], there[index + 1] if index + 1 < len(there) else None)
