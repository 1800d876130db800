"""That the region which failed is dead, or attested to be: looked at before the plan, after the confirmation, and once
more before users are sent away from it. Called with the open report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from runbook.report import Report
from tasks.failover.fencing import Fencing
from tasks.failover.region import find_region
from tasks.wal.archive import Archive


def other_region(env: Environment, source: str) -> Environment:
    """The environment that failed.

    Raises:
        OpsError: none was named, it is this one, or nobody knows it.
    """
    if not source.strip():
        raise OpsError("no source was given", "name the environment that failed: its backups are in this one's stores")
    if source == env.name:
        raise OpsError(f"{source} is to take over from itself", "environment is the region to go to, source the one "
                       "that failed; in place it is full-restore")  # fmt: skip
    if not env.has("endpoint"):
        raise OpsError(f"{env.name} names no endpoint", "add [endpoint] to its TOML: how users are sent to it")
    if not env.application.url:
        raise OpsError(f"[application] url of {env.name} is not configured", "add it: users are sent there")
    if not (env.has("application") and env.has("backups")):
        raise OpsError(f"{env.name} is no place for the application", f"add {get_args(Stores)[0]} and application")
    return Environment.find(source)


@dataclass
class Fence:
    """What is known of the old region; `shipped` are the files of its WAL that were in the archive at the first
    look."""

    old: Environment
    attested: str
    archive: Archive | None = None
    shipped: frozenset[str] = field(default_factory=frozenset)

    def judge(self, report: Report, when: str, after: object = None) -> Fencing:
        """Look at it.

        Raises:
            RunbookFailed: it answers, sends WAL, or nobody has proven or attested that it is cut off.
        """
        found = find_region.after(after)(self.old)
        report.table(
            f"Fence of {found.server}, {when}",
            ("what", "holds", "seen"),
            [(row.what, _word(row.holds, self.attested), row.seen) for row in found.rows],
        )
        against, unknown = found.against, found.unknown
        report.expect(
            f"the region {found.server} is dead ({when})",
            not against,
            against[0].hint if against else "",
            value="; ".join(f"{row.what}: no, {row.seen}" for row in against[:3]) or "nothing of it was seen alive",
            expected="nothing answers, and nothing starts it again",
        )
        if unknown and not against:
            report.expect(
                f"the region {found.server} is cut off ({when})",
                bool(self.attested),
                unknown[0].hint,
                value=f"attested: {self.attested}" if self.attested else f"{unknown[0].what}: {unknown[0].seen}",
                expected="proven, or attested by a named person",
            )
        self._judge_silence(report, when)
        told = f"attested for {len(unknown)} of {len(found.rows)}: {self.attested}" if unknown else "proven"
        report.fact(f"fence of {found.server}", told)
        report.fail_if_critical()
        return found

    def watch(self, archive: Archive) -> None:
        """From now on its WAL must not grow: somebody would be writing."""
        self.archive, self.shipped = archive, frozenset(archive.place.names())

    def _judge_silence(self, report: Report, when: str) -> None:
        if self.archive is None:
            return
        new = sorted(frozenset(self.archive.place.names()) - self.shipped)
        report.expect(
            f"no new WAL of {self.old.name} ({when})",
            not new,
            "somebody there lives and sends it: cut that off, then launch this again: it takes what has come along",
            value=", ".join(name[:40] for name in new[:3]) or "none has come since this run began",
        )


def _word(holds: bool | None, attested: str) -> str:
    if holds is None:
        return "attested" if attested else "not known"
    return "proven" if holds else "NO"
