"""What restores left standing aside (§1.2, §8.2): listed, and removed with a permit."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow
from psycopg import sql
from pydantic import Field

from blocks.environment import Environment
from blocks.places import KeepSuperseded
from flows.deleting import judge_clocks, limit_unattended
from flows.pinned import pin_copies
from runbook import clock
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.units import size
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
class Aside:
    """Something that a restore replaced."""

    kind: Literal["database", "table", "directory"]
    name: str
    bytes: int
    replaced: str
    at: datetime | None = None
    tables: tuple[tuple[str, str], ...] = ()

    def is_older(self, hours: int) -> bool:
        """Whether it was replaced longer ago; false where nobody knows when."""
        return self.at is not None and clock.now() - self.at > timedelta(hours=hours)


@flow(name="discard-superseded", flow_run_name="discard-superseded {environment}")
def discard_superseded(
    environment: str,
    keep: Annotated[int, Field(ge=AS_TOML, le=MOST_KEPT)] = AS_TOML,
    names: tuple[str, ...] = (),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """旧データの削除 (§1.2, §8.2)

    Removes what restores replaced and kept: old databases, old rows of tables, and old directories of Redis, the
    application, PostgreSQL and its WAL receiver. It follows keep_superseded in the environment's TOML: everything of
    the last `hours` stays, so that each restore can be undone for so long, and the `newest` of each kind. A person who
    gives `keep` keeps the newest so many, whatever their age. Rows that were replaced together go together. What is
    confirmed in the plan's form is what the plan names, whatever was replaced since.

    It cannot be undone: the plan lists every name with its size first. Evidence: that list.

    Args:
        environment: 対象の環境
        keep: 種類ごとに残す数 (新しい順)。-1 は TOML の keep_superseded
        names: 削除する名前 (計画が表示したもの)。空なら keep に従う
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら一覧だけを表示
    """
    env = Environment.find(environment)
    with runbook("Discard superseded", env, confirm, plan, changes=True) as report:
        if not AS_TOML <= keep <= MOST_KEPT:
            raise OpsError(f"keep is {keep}", f"choose 0 to {MOST_KEPT}, or {AS_TOML} for the TOML's keep_superseded")
        found = find_aside(env, 0) if names else find_discardable(env) if keep == AS_TOML else find_aside(env, keep)
        if not names:
            judge_clocks(report, env)
        doomed = [item for item in found if not names or item.name in names]
        if report.unattended:
            doomed = list(limit_unattended(report, env, "superseded copies", doomed[::-1], len(find_aside(env, 0))))
        report.pin("names", [item.name for item in doomed])
        if gone := [name for name in names if name not in {item.name for item in doomed}]:
            report.fact("gone already", ", ".join(gone))
        report.table(
            "Superseded, to be removed",
            ("kind", "name", "size", "replaced"),
            [(item.kind, item.name, size(item.bytes), item.replaced) for item in doomed],
        )
        if not doomed:
            report.outcome = "there is nothing to remove"
            return report
        for item in doomed:
            report.plan(f"remove {item.kind}", item.name, size=item.bytes)
        pin_copies(report, ((item.name, item.bytes) for item in doomed))
        permit = report.permit(*(Act(DISCARD, item.name) for item in doomed))
        for item in doomed:
            discard(permit, env, item)
        report.outcome = f"{len(doomed)} removed, {size(sum(item.bytes for item in doomed))} free again"
    return report


def discard_surplus(report: Report, env: Environment) -> None:
    """At the end of a restore: what keep_superseded no longer keeps is discarded at once, so that many restores in one
    day do not fill the disk. Only where the TOML lets discard-superseded run unattended, and never in a contained
    environment: it may be evidence. The restore is none the worse if this fails."""
    if discard_superseded.name not in env.unattended or report.contained:
        return
    try:
        if find_discardable(env):
            report.fact("superseded before", discard_superseded.fn(env.name, confirm=env.name).outcome)
    except OpsError as error:
        hint = error.hint or "launch discard-superseded"
        report.warn("what earlier restores replaced could not be discarded", hint, value=error.message)


def find_discardable(env: Environment) -> list[Aside]:
    """By keep_superseded: what is older than its hours, but the newest so many of each kind. Something of which nobody
    knows when it was replaced stays."""
    rule = env.backups.keep_superseded if env.has("backups") else KeepSuperseded()
    return [item for item in find_aside(env, rule.newest) if item.is_older(rule.hours)]


def find_aside(env: Environment, keep: int) -> list[Aside]:
    """Everything superseded but the newest `keep` of each kind."""
    databases = find_superseded(env.postgres) if env.has("postgres") else ()
    found = [
        Aside("database", old.name, old.bytes, f"{old.since} by {old.backup}", _moment(old.name)) for old in databases
    ][keep:]
    found += _tables_aside(env, keep) if env.has("postgres") else []
    for aside in directories_aside(env):
        plain = [path for path in reversed(aside) if path.is_dir() and not path.is_symlink()]
        found += [
            Aside("directory", str(path), _bytes(path), path.name[-15:], _moment(path.name)) for path in plain[keep:]
        ]
    return found


def _tables_aside(env: Environment, keep: int) -> list[Aside]:
    """The kept rows of restored tables, but for the newest `keep` of each table. What was replaced together can only be
    put back together, so it goes as a whole."""
    seen: Counter[str] = Counter()
    found = []
    for _, group in itertools.groupby(find_superseded_tables(env.postgres), key=lambda old: old.stamp):
        together = list(group)
        seen.update(old.table for old in together)
        if all(seen[old.table] > keep for old in together):
            name, size_ = ", ".join(old.name for old in together), sum(old.bytes for old in together)
            where = tuple((old.schema, old.relation) for old in together)
            replaced = f"{together[0].since} by {together[0].backup}"
            found.append(Aside("table", name, size_, replaced, _moment(together[0].stamp), where))
    return found


def directories_aside(env: Environment) -> Iterator[list[Path]]:
    """What lies beside each live directory, oldest first: beside the directory itself, where a link leads to it."""
    for data in (Path(node.data_directory) for node in env.nodes()):
        yield sorted(path for live in {data, data.resolve()} for path in live.parent.glob(f"{live.name}.superseded_*"))
    if env.has("wal") and env.wal.directory:
        received = Path(env.wal.directory)
        yield sorted(received.parent.glob(f"{received.name}.superseded_*"))
    if env.has("redis"):
        yield superseded_redis(env.redis)
    if env.has("application") and env.application.directory:
        yield superseded_files(env.application)


@action(idempotent=True)
def discard(permit: Permit, env: Environment, item: Aside) -> str:
    """Remove one of them."""
    permit.require(DISCARD, item.name)
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
    """When something was set aside, by the end of its name (UTC)."""
    try:
        return datetime.strptime(name[-15:], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def _bytes(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
