"""Data that restores replaced and kept (§1.2, §8.2): listed, and deleted with a permit."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from psycopg import sql
from pydantic import Field

from blocks.environment import Environment
from blocks.places import KeepSuperseded
from flows.deleting import judge_clocks, limit_unattended
from flows.pinned import pin_copies
from runbook import clock
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, size
from tasks.application.staged_files import superseded_files
from tasks.backups.retention import AS_TOML
from tasks.postgres.restore.staged_copy import drop
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.tables.kept import find_superseded_tables
from tasks.redis.restore.swap import superseded_redis

DISCARD = "discard"
STAMP = "%Y%m%d_%H%M%S"
MOST_KEPT = 20


@dataclass(frozen=True)
class SupersededData:
    """Something that a restore replaced."""

    kind: Literal["database", "table", "directory"]
    name: str
    bytes: int
    replaced: str
    at: datetime | None = None
    tables: tuple[tuple[str, str], ...] = ()

    def is_older(self, hours: int) -> bool:
        """Whether it was replaced more than `hours` ago; false if the time is unknown."""
        return self.at is not None and clock.now() - self.at > timedelta(hours=hours)


@flow(name="discard-superseded", flow_run_name=RunName("discard-superseded {environment} {names}"))
def discard_superseded(
    environment: str,
    keep: Annotated[int, Field(ge=AS_TOML, le=MOST_KEPT)] = AS_TOML,
    names: tuple[str, ...] = (),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """旧データの削除 (§1.2, §8.2)

    Deletes the data that restores replaced and kept: databases, rows of tables, and directories of Redis, the
    application, PostgreSQL and its WAL receiver.

    By keep_superseded in the environment's TOML it keeps everything of the last `hours`, so that each restore can be
    undone for that time, and the `newest` of each kind. With `keep` it keeps that number of each kind, whatever their
    age. Rows that were replaced together are deleted together. A confirmed plan deletes the names it lists, no others.

    It cannot be undone: the plan lists every name with its size first. Evidence: that list.

    Args:
        environment: Environment (lab, staging, production …)
        keep: Newest to keep of each kind. -1: keep_superseded in the TOML
        names: Names to delete (as the plan shows them). Empty: use keep
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the list
    """
    env = Environment.find(environment)
    with runbook("Discard superseded", env, confirm, plan, changes=True) as report:
        if not AS_TOML <= keep <= MOST_KEPT:
            raise OpsError(f"keep is {keep}", f"choose 0 to {MOST_KEPT}, or {AS_TOML} for the TOML's keep_superseded")
        found = (
            find_kept_data(env, 0) if names else find_discardable(env) if keep == AS_TOML else find_kept_data(env, keep)
        )
        if not names:
            judge_clocks(report, env)
        doomed = [item for item in found if not names or item.name in names]
        if report.unattended:
            doomed = list(limit_unattended(report, env, "superseded copies", doomed[::-1], len(find_kept_data(env, 0))))
        report.pin("names", [item.name for item in doomed])
        if missing := [name for name in names if name not in {item.name for item in doomed}]:
            report.fact("already deleted", ", ".join(missing))
        report.table(
            "Superseded, to be deleted",
            ("kind", "name", "size", "replaced"),
            [(item.kind, item.name, size(item.bytes), item.replaced) for item in doomed],
        )
        if not doomed:
            report.outcome = "nothing to delete"
            return report
        deleting = [
            Change(discard.bind(env, item), f"delete {item.kind}", item.name, size=item.bytes) for item in doomed
        ]
        freed = size(sum(item.bytes for item in doomed))
        effect = Effect(
            f"deletes {counted(len(doomed), 'superseded copy', 'superseded copies')} ({freed})",
            "",
            "the recoveries that replaced them can no longer be undone",
        )
        pins = [lambda report: pin_copies(report, ((item.name, item.bytes) for item in doomed))]
        with carrying_out(report, *deleting, effect=effect, pins=pins) as carry:
            for each in deleting:
                carry(each)
        report.outcome = f"{len(doomed)} deleted, {size(sum(item.bytes for item in doomed))} freed"
    return report


def discard_surplus(report: Report, env: Environment) -> None:
    """After a restore, delete what keep_superseded no longer keeps, so that many restores a day do not fill the disk.

    Only if the TOML lets discard-superseded run unattended, and never in a contained environment: there it may be
    evidence. An error is a WARN: the restore itself succeeded.
    """
    if discard_superseded.name not in env.unattended or report.contained:
        return
    try:
        if find_discardable(env):
            report.fact("superseded before", discard_superseded.fn(env.name, confirm=env.name).outcome)
    except OpsError as error:
        hint = error.hint or "launch discard-superseded"
        report.warn("superseded data could not be deleted", hint, value=error.message)


def find_discardable(env: Environment) -> list[SupersededData]:
    """Superseded data that keep_superseded no longer keeps; data without a known time is kept."""
    rule = env.backups.keep_superseded if env.has("backups") else KeepSuperseded()
    return [item for item in find_kept_data(env, rule.newest) if item.is_older(rule.hours)]


def find_kept_data(env: Environment, keep: int) -> list[SupersededData]:
    """Superseded data except the newest `keep` of each kind."""
    databases = find_superseded(env.postgres) if env.has("postgres") else ()
    found = [
        SupersededData("database", old.name, old.bytes, f"{old.since} by {old.backup}", _moment(old.name))
        for old in databases
    ][keep:]
    found += _superseded_tables(env, keep) if env.has("postgres") else []
    for aside in superseded_directories(env):
        plain = [path for path in reversed(aside) if path.is_dir() and not path.is_symlink()]
        found += [
            SupersededData("directory", str(path), _bytes(path), path.name[-15:], _moment(path.name))
            for path in plain[keep:]
        ]
    return found


def _superseded_tables(env: Environment, keep: int) -> list[SupersededData]:
    """The kept rows of restored tables, except the newest `keep` of each table.

    Rows that were replaced together can only be restored together, so they are deleted together.
    """
    seen: Counter[str] = Counter()
    found = []
    for _, group in itertools.groupby(find_superseded_tables(env.postgres), key=lambda old: old.stamp):
        together = list(group)
        seen.update(old.table for old in together)
        if all(seen[old.table] > keep for old in together):
            name, size_ = ", ".join(old.name for old in together), sum(old.bytes for old in together)
            where = tuple((old.schema, old.relation) for old in together)
            replaced = f"{together[0].since} by {together[0].backup}"
            found.append(SupersededData("table", name, size_, replaced, _moment(together[0].stamp), where))
    return found


def superseded_directories(env: Environment) -> Iterator[list[Path]]:
    """The superseded directories of each live directory, oldest first; a link's target is searched too."""
    for data in (Path(node.data_directory) for node in env.nodes()):
        yield sorted(path for live in {data, data.resolve()} for path in live.parent.glob(f"{live.name}.superseded_*"))
    if env.has("wal") and env.wal.directory:
        received = Path(env.wal.directory)
        yield sorted(received.parent.glob(f"{received.name}.superseded_*"))
    if env.has("redis"):
        yield superseded_redis(env.redis)
    if env.has("application") and env.application.directory:
        yield superseded_files(env.application)


@action(of=lambda item: Act(DISCARD, item.name), idempotent=True)
def discard(env: Environment, item: SupersededData) -> str:
    """Delete one of them."""
    if item.kind == "directory":
        shutil.rmtree(item.name)
    elif item.kind == "table":
        with env.postgres.connect(env.postgres.database) as connection:
            tables = sql.SQL(", ").join(sql.Identifier(*table) for table in item.tables)
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(tables))
    else:
        with env.postgres.connect() as connection:
            drop(env.postgres, connection, item.name)
    return item.name


def _moment(name: str) -> datetime | None:
    """The time at the end of a superseded name (UTC)."""
    try:
        return datetime.strptime(name[-15:], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def _bytes(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
