"""Writes that a recovery left behind, brought into the live database row by row (§8.2)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.database.tables import judge_ties
from flows.pinned import pin_database
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.files import record
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until
from tasks.cluster.instance import Instance, prepare_instance, put_away, root_for, running, servers_in, sweep_instance
from tasks.cluster.swap import SUPERSEDED
from tasks.postgres.content.keyed import match_keyed
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.tables.filenodes import read_database_oid
from tasks.postgres.tables.find import Table, known_in, resolve, table_of
from tasks.postgres.tables.salvage import SALVAGE, SQL, Applied, Counted, Differing, Writer, apply_salvage
from tasks.postgres.tables.ties import read_ties

NEWEST = "newest"
SALVAGING = ".salvaging"
UNDONE_BY = "undo-restore"
START_SECONDS = 120
_ADDRESS = re.compile(r"(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})(?:/(?P<database>.+))?")


@dataclass(frozen=True)
class Source:
    """A database to compare with. `since`: the transaction of the live server in which it was replaced, "" where that
    is not known."""

    told: str
    postgres: Postgres
    database: str
    since: str = ""


@contextlib.contextmanager
def opened(report: Report, env: Environment, wanted: str) -> Iterator[Source]:
    """The source that an operator means; a kept data directory is started as a private instance while the block runs.

    Raises:
        OpsError: there is none of that name.
        Unreachable: it does not answer, or does not start.
    """
    wanted = wanted.strip()
    directories = _kept_directories(env)
    if match := _ADDRESS.fullmatch(wanted):
        block = env.postgres.model_copy(update={"host": match["host"].strip("[]"), "port": int(match["port"])})
        yield Source(wanted, block, match["database"] or env.postgres.database)
        return
    databases = {old.name: old for old in find_superseded(env.postgres)}
    found = sorted([*databases, *directories], key=lambda name: name[-15:])
    chosen = found[-1] if wanted == NEWEST and found else wanted
    report.pin("source", chosen)
    if chosen in databases:
        # What an undo put aside was made from a backup: what differs in it may be older than what is live.
        undone = databases[chosen].backup == UNDONE_BY
        since = "" if undone else read_replaced(env.postgres, chosen)
        yield Source(f"database {chosen}", env.postgres, chosen, since)
    elif chosen in directories:
        with _started(report, env, Path(chosen)) as block:
            yield Source(f"data directory {chosen}", block, env.postgres.database)
    else:
        there = ", ".join(reversed(found)) or "none at all"
        raise OpsError(
            f"there is no kept database or data directory “{wanted[:80]}”",
            f"there are, newest first: {there}; a running server is named host:port/database",
        )


def _kept_directories(env: Environment) -> list[str]:
    live = Path(env.postgres.data_directory)
    found = {path for one in {live, live.resolve()} for path in one.parent.glob(f"{one.name}{SUPERSEDED}*")}
    return sorted(str(path) for path in found if path.is_dir())


@contextlib.contextmanager
def _started(report: Report, env: Environment, directory: Path) -> Iterator[Postgres]:
    """Its own files are used: it recovers from its crash, if it had one, and is stopped again. No row changes."""
    root = root_for(env.postgres, SALVAGING)
    until(
        lambda: not servers_in(directory),
        what=f"the end of the server that works in {directory}",
        seconds=30,
        hint="a run that was killed had started it, or somebody did: stop it, then launch this again",
    )
    sweep_instance(root)
    instance = prepare_instance(env.postgres, root)
    report.at_end(lambda: put_away(instance))
    instance.data.symlink_to(directory)
    with running(instance, None):
        hint = "it may be of another major version, or damaged: start it by hand and read what it says"
        until(lambda: _answers(instance), what=f"the start of {directory}", seconds=START_SECONDS, hint=hint)
        yield instance.postgres


def _answers(instance: Instance) -> bool:
    try:
        instance.postgres.connect().close()
    except Unreachable:
        return False
    return True


@probe
def read_replaced(postgres: Postgres, kept: str) -> str:
    """The transaction that gave a kept database its name: of its row and its label the older one, since either may have
    been changed later."""
    with postgres.connect() as connection:
        rows = execute(connection, _REPLACED, kept)
    return str(rows[0][0]) if rows else ""


_REPLACED = """
WITH kept AS (SELECT oid, xmin AS version FROM pg_database WHERE datname = %s)
SELECT version::text FROM (
    SELECT version FROM kept
    UNION ALL
    SELECT d.xmin FROM pg_shdescription d JOIN kept ON kept.oid = d.objoid WHERE d.classoid = 'pg_database'::regclass
) AS found ORDER BY age(version) DESC LIMIT 1
"""


@flow(name="salvage-writes", flow_run_name="salvage-writes {environment} {source}")
def salvage_writes(
    environment: str,
    source: str = NEWEST,
    tables: tuple[str, ...] = (),
    differing: Differing = "unchanged",
    since_transaction: Annotated[int, Field(ge=0, le=4_294_967_295)] = 0,
    reviewed: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """復旧で失われた書き込みの救出 (§8.2)

    Compares what a recovery replaced with the live database, by primary key: rows that are only there, only here, or
    differ. What is missing becomes SQL and CSV for a person to read, and is then written into the live database in one
    transaction. Run it after restore-database, restore-to-point or undo-restore, to bring back what was written between
    the backup (or the target) and the recovery.

    Both sides are read in the order of their keys, so memory does not grow with the tables. A row that differs is
    updated only if the live one was not written since the recovery; else it is a conflict, and stays as it is unless
    differing=overwrite. Rows that are only in the live database stay. The statements guard themselves: an INSERT passes
    over a key that is there by then, an UPDATE over a row that was written since it was compared. Triggers do not fire;
    foreign keys are asked before the commit, sequences are advanced. Tables without a primary key cannot be compared,
    and are named.

    Undo: none by itself; the files tell every row. Take a backup first where that matters. Evidence: counts for each
    table, the files, readable by this user only.

    Departs from the manual: it knows no way to get back what a restore leaves behind.

    Args:
        environment: 対象の環境
        source: newest、保存された旧データベース名、旧データディレクトリ、または host:port/データベース
        tables: 対象のテーブル (スキーマ.テーブル)。空なら全テーブル
        differing: 値が異なる行。unchanged 復旧後に更新されていない行だけ更新、overwrite すべて更新、none 更新しない
        since_transaction: 復旧後の最初のトランザクション番号。0 は自動 (旧データベースのみ)
        reviewed: 計画が書き出した差分の名前 (計画のフォームが入力する)。空なら改めて比較する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら比較して SQL と CSV を書き出すだけ
    """
    env = Environment.find(environment)
    with runbook("Salvage writes", env, confirm, plan, changes=True, rank="recovery") as report:
        if reviewed.strip():
            salvage = find(env, reviewed)
        else:
            with opened(report, env, source) as found:
                salvage = compare(env, found, tables, differing, since_transaction)
        report_results(report, env, salvage)
        report.pin("reviewed", salvage.name)
        if salvage.applied:
            report.outcome = f"it was applied already, at {salvage.applied}"
            return report
        if not salvage.written:
            report.outcome = "nothing is to be written"
            return report
        _require_same_database(env, salvage)
        live = find_live(env.postgres, [one.table for one in salvage.written])
        ties = read_ties.after(live)(env.postgres, live)
        judge_ties(report, ties)
        plan_salvage(report, salvage)
        pin_database(report, env.postgres)
        report.pin_state("reviewed", salvage.digest)
        permit = report.permit(*acts(salvage))
        report.state_is("it may have been committed", "launch it again: what is written already is passed over")
        place = folder(env, salvage.stamp)
        done = apply_salvage.after(ties)(permit, env.postgres, place, salvage.digest, live, ties)
        mark_applied(env, salvage)
        tell_done(report, salvage, done)
    return report


_ANEW = "compare anew: launch it again with reviewed left empty"


@action(idempotent=True)
def compare(
    env: Environment, source: Source, tables: tuple[str, ...], differing: Differing, since_transaction: int
) -> Salvage:
    """Compare, and write what is found into files; they are there when this returns.

    Raises:
        OpsError: a table of that name is not in the source, or a database does not answer.
    """
    stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
    since = str(since_transaction - 1) if since_transaction else source.since
    live = env.postgres
    writer = Writer(folder(env, stamp), f"{source.told} against {live.database}, {stamp} UTC")
    with pinned(source.postgres, source.database) as ours, pinned(live, live.database) as theirs:
        chosen = [one.name for one in resolve(tables, known_in(ours))] if tables else []
        matched = match_keyed(live, ours, theirs, chosen)
        counted = tuple(writer.compare(ours, theirs, one, since, differing) for one in matched.tables)
    salvage = Salvage(
        stamp, source.told, read_database_oid.work(live, live.database), writer.close(), counted, matched.others
    )
    keep(env, salvage)
    return salvage


@probe
def find_live(postgres: Postgres, names: list[str]) -> list[Table]:
    """The live tables of these quoted names.

    Raises:
        VerificationFailed: one is gone since it was compared.
    """
    with pinned(postgres, postgres.database) as connection:
        known = {one.name: one for one in known_in(connection)}
        if gone := [name for name in names if name not in known]:
            raise VerificationFailed(f"{', '.join(gone)} is gone since it was compared", _ANEW)
        return [table_of(connection, known[name]) for name in names]


def _require_same_database(env: Environment, salvage: Salvage) -> None:
    if read_database_oid(env.postgres, env.postgres.database) != salvage.database:
        raise OpsError("the live database is another one than was compared", _ANEW)


FOLDER, RECORD = "salvage", "record.json"


@dataclass(frozen=True)
class Salvage:
    """One comparison: of which source, with which live database (its OID), the SQL's SHA-256, each table's counts,
    those that could not be compared and why, and when it was applied ("" if never)."""

    stamp: str
    source: str
    database: int
    digest: str
    tables: tuple[Counted, ...]
    others: tuple[tuple[str, str], ...]
    applied: str = ""

    @property
    def name(self) -> str:
        """As the form names it: when, and of which content."""
        return f"{self.stamp}-{self.digest[:16]}"

    @property
    def written(self) -> list[Counted]:
        """The tables of which there are statements."""
        return [one for one in self.tables if one.inserts or one.updates]


def folder(env: Environment, stamp: str) -> Path:
    """Where a comparison's files are."""
    return env.reports_directory / FOLDER / stamp


def keep(env: Environment, salvage: Salvage) -> None:
    """Write it down beside its files."""
    path = folder(env, salvage.stamp) / RECORD
    record.write(path, salvage)
    path.chmod(0o600)  # the samples in it are masked; the names of tables are not


def find(env: Environment, reviewed: str) -> Salvage:
    """The comparison that a form names.

    Raises:
        OpsError: it is not there, or its files are of another.
    """
    stamp = reviewed.strip().rpartition("-")[0]
    hint = "launch it again without reviewed: it compares anew"
    found = record.read(folder(env, stamp) / RECORD, Salvage, hint) if stamp and "/" not in stamp else None
    if found is None or found.name != reviewed.strip():
        raise OpsError(f"there is no comparison “{reviewed[:60]}” on this host", hint)
    return found


def mark_applied(env: Environment, salvage: Salvage) -> None:
    """Note that it was."""
    keep(env, replace(salvage, applied=datetime.now(UTC).isoformat(timespec="seconds")))


def report_results(report: Report, env: Environment, salvage: Salvage) -> None:
    """Counts, and where the rows are."""
    place = folder(env, salvage.stamp)
    report.fact("source", salvage.source)
    report.fact("SQL to review", place / SQL)
    report.fact("rows as CSV", f"{place}/*.csv")
    report.table(
        "Rows by primary key",
        ("table", "only in the source", "only live", "differing", "of those written live since", "INSERTs", "UPDATEs"),
        [
            (one.table, one.missing, one.live_only, one.differing, one.conflicts, one.inserts, one.updates)
            for one in salvage.tables
        ],
    )
    if samples := [(one.table, text) for one in salvage.tables for text in one.samples]:
        report.table("Samples (texts are masked: read the files)", ("table", "statement"), samples)
    if salvage.others:
        report.table("Not comparable", ("table", "why"), salvage.others)
        report.warn(
            "tables that could not be compared",
            "look at them by hand in the source: no file has their rows",
            value=", ".join(name for name, _ in salvage.others[:10]),
        )
    conflicts = sum(one.conflicts for one in salvage.tables)
    held_back = sum(one.differing - one.updates for one in salvage.tables)
    if conflicts and held_back:
        report.warn(
            "conflicts",
            "read them in the CSV (“differs”); differing=overwrite takes the source's values",
            value=f"{conflicts:,} rows differ and were written in the live database since, or nobody can say: "
            "left as they are",
        )
    elif conflicts:
        report.warn(
            "conflicts",
            "read the UPDATEs before you confirm: they go over what was written since",
            value=f"{conflicts:,} rows that were written live since get the source's values",
        )
    if any(one.missing for one in salvage.tables):
        report.fact(
            "rows only in the source",
            "lost by the recovery, or deleted in the live database since: the keys "
            "do not tell which; read the file before you confirm",
        )


def plan_salvage(report: Report, salvage: Salvage) -> None:
    """A line a table."""
    for one in salvage.written:
        report.plan(
            "write",
            f"{one.table}: {one.inserts:,} rows inserted, {one.updates:,} updated",
            seconds=(one.inserts + one.updates) / 5000,
        )
    report.plan("before the commit", "foreign keys asked, sequences advanced; all of it in one transaction")


def acts(salvage: Salvage) -> Sequence[Act]:
    """What a permit is needed for."""
    return [Act(SALVAGE, one.table) for one in salvage.written]


def tell_done(report: Report, salvage: Salvage, done: Applied) -> None:
    """What was written, and what was not."""
    ran = done.ran
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    if ran.passed:
        report.warn(
            "statements that found nothing to do",
            "their rows were written live since they were compared, or "
            "this was applied before: launch it again without reviewed to see what is left",
            value=f"{ran.passed:,}, such as {ran.examples[0]}",
        )
    report.outcome = f"{ran.inserted:,} rows inserted and {ran.updated:,} updated, of {salvage.source}"
