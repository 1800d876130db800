"""salvage-writes (§8.2): rows that a recovery left behind are copied into the live database."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.database.live_tables import judge_ties
from flows.pinned import pin_database
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.files import record
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.kinds import action, probe
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted
from runbook.wait import until
from tasks.cluster.instance import (
    PrivateInstance,
    prepare_instance,
    put_away,
    root_for,
    running,
    servers_in,
    sweep_instance,
)
from tasks.cluster.swap import SUPERSEDED
from tasks.cluster.tablespaces import outside_links
from tasks.postgres.content.keyed import match_keyed
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.tables.filenodes import read_database_oid
from tasks.postgres.tables.find import FoundTable, known_in, resolve, table_of
from tasks.postgres.tables.salvage import SQL, Applied, CountedRows, Differing, SalvageWriter, apply_salvage
from tasks.postgres.tables.ties import Ties, read_ties

NEWEST = "newest"
SALVAGING = ".salvaging"
UNDONE_BY = "undo-restore"
FOLDER, RECORD = "salvage", "record.json"
_ANEW = "run it again with reviewed left empty: it compares again"
START_SECONDS = 120
_ADDRESS = re.compile(r"(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})(?:/(?P<database>.+))?")


@dataclass(frozen=True)
class Salvage:
    """One comparison: its source, the OID of the live database, the SHA-256 of its SQL, the counts of each table, the
    tables that were not compared and why, and when it was applied ("" if never)."""

    stamp: str
    source: str
    database: int
    digest: str
    tables: tuple[CountedRows, ...]
    others: tuple[tuple[str, str], ...]
    applied: str = ""

    @property
    def name(self) -> str:
        """As the form names it: time and content."""
        return f"{self.stamp}-{self.digest[:16]}"

    @property
    def written(self) -> list[CountedRows]:
        """The tables with statements."""
        return [one for one in self.tables if one.inserts or one.updates]


@flow(name="salvage-writes", flow_run_name=RunName("salvage-writes {environment} {source}"))
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

    Compares the data that a recovery replaced with the live database, by primary key. Rows that are missing or differ
    become SQL and CSV files for review. With confirm that SQL is applied in one transaction. Run it after
    restore-database, restore-to-point or undo-restore.

    A row that differs is updated only if the live row was not written since the recovery. Otherwise it is a conflict
    and stays unchanged, unless differing=overwrite. Rows that are only in the live database stay. An INSERT skips a key
    that exists by then; an UPDATE skips a row that was written after the comparison. Triggers do not fire. Foreign keys
    are checked before the commit, sequences are advanced. Tables without a primary key are listed and not compared.

    Memory does not grow with the tables. Undo: none; take a backup first. Evidence: counts for each table, and the
    files, readable by this user only.

    Departs from the manual: it cannot restore the writes that a restore leaves behind.

    Args:
        environment: Environment (lab, staging, production …)
        source: newest, the name of a superseded database, a superseded data directory, or host:port/database
        tables: Tables (schema.table). Empty: all
        differing: Rows with different values. unchanged: update only rows not changed since the recovery; overwrite:
            update all
        since_transaction: First transaction ID after the recovery. 0: found automatically (superseded database only)
        reviewed: Name of the differences that the plan wrote (the plan's form fills it in). Empty: compare again
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only compare, and write SQL and CSV files
    """
    env = Environment.find(environment)
    with runbook(
        "Salvage writes", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery"
    ) as report:
        if reviewed.strip():
            salvage = find_comparison(env, reviewed)
        else:
            with opened(report, env, source) as found:
                salvage = compare(env, found, tables, differing, since_transaction)
        report_comparison(report, env, salvage)
        report.pin("reviewed", salvage.name)
        if salvage.applied:
            report.outcome = f"it was applied already, at {salvage.applied}"
            return report
        if not salvage.written:
            report.outcome = "no row has to be written"
            return report
        _require_same_database(env, salvage)
        live = find_live(env.postgres, [one.table for one in salvage.written])
        ties = read_ties.after(live)(env.postgres, live)
        judge_ties(report, ties)
        rows = sum(one.inserts + one.updates for one in salvage.written)
        effect = Effect(
            f"writes {counted(rows, 'row')} to {counted(len(salvage.written), 'table')}, in one transaction", ""
        )
        applying = _applying(env, salvage, live)
        with carrying_out(report, applying, effect=effect) as carry:
            done = carry(applying, ties)
        record_comparison(env, replace(salvage, applied=datetime.now(UTC).isoformat(timespec="seconds")))
        report_done(report, salvage, done)
    return report


@dataclass(frozen=True)
class SalvageSource:
    """A database to compare with. `since`: the transaction of the live server that replaced it, "" if unknown."""

    text: str
    postgres: Postgres
    database: str
    since: str = ""


@contextlib.contextmanager
def opened(report: Report, env: Environment, wanted: str) -> Iterator[SalvageSource]:
    """The source by its name. A kept data directory runs as a private instance while the block runs.

    Raises:
        OpsError: no source has that name.
        Unreachable: it does not answer, or does not start.
    """
    wanted = wanted.strip()
    directories = _kept_directories(env)
    if match := _ADDRESS.fullmatch(wanted):
        block = env.postgres.model_copy(update={"host": match["host"].strip("[]"), "port": int(match["port"])})
        yield SalvageSource(wanted, block, match["database"] or env.postgres.database)
        return
    databases = {old.name: old for old in find_superseded(env.postgres)}
    found = sorted([*databases, *directories], key=lambda name: name[-15:])
    chosen = found[-1] if wanted == NEWEST and found else wanted
    report.pin("source", chosen)
    if chosen in databases:
        # An undo sets a restored database aside: its rows may be older than the live ones.
        undone = databases[chosen].backup == UNDONE_BY
        since = "" if undone else read_replaced(env.postgres, chosen)
        yield SalvageSource(f"database {chosen}", env.postgres, chosen, since)
    elif chosen in directories:
        with _started(report, env, Path(chosen)) as block:
            yield SalvageSource(f"data directory {chosen}", block, env.postgres.database)
    else:
        there = ", ".join(reversed(found)) or "none"
        raise OpsError(
            f"there is no kept database or data directory “{wanted[:80]}”",
            f"choose one of these, newest first: {there}; or host:port/database of a running server",
        )


def _kept_directories(env: Environment) -> list[str]:
    live = Path(env.postgres.data_directory)
    found = {path for one in {live, live.resolve()} for path in one.parent.glob(f"{one.name}{SUPERSEDED}*")}
    return sorted(str(path) for path in found if path.is_dir())


@contextlib.contextmanager
def _started(report: Report, env: Environment, directory: Path) -> Iterator[Postgres]:
    """Runs on the directory's own files: crash recovery may run, no row changes. It is stopped afterwards."""
    root, live = root_for(env.postgres, SALVAGING), Path(env.postgres.data_directory)
    if shared := set(outside_links(directory).values()) & set(outside_links(live).values()):
        raise OpsError(
            f"{directory} and the live server use the same directory of a tablespace: {', '.join(map(str, shared))}",
            "its crash recovery would write into live files. Compare a copy on another host: source=host:port/database",
        )
    until(
        lambda: not servers_in(directory),
        what=f"the end of the server that works in {directory}",
        seconds=30,
        hint="stop that server (a killed run may have started it), then run this again",
    )
    sweep_instance(root)
    instance = prepare_instance(env.postgres, root)
    report.at_end(lambda: put_away(instance))
    instance.data.symlink_to(directory)
    with running(instance, None):
        hint = "start it by hand and read its log: it may be of another major version, or damaged"
        until(lambda: _answers(instance), what=f"the start of {directory}", seconds=START_SECONDS, hint=hint)
        yield instance.postgres


def _answers(instance: PrivateInstance) -> bool:
    try:
        instance.postgres.connect().close()
    except Unreachable:
        return False
    return True


@probe
def read_replaced(postgres: Postgres, kept: str) -> str:
    """The transaction that gave a kept database its name: the older one of its row and its comment, because either may
    have been changed later."""
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


@action(idempotent=True)
def compare(
    env: Environment, source: SalvageSource, tables: tuple[str, ...], differing: Differing, since_transaction: int
) -> Salvage:
    """Compare, and write the differences to files.

    Raises:
        OpsError: the source has no table of that name, or a database does not answer.
    """
    stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
    since = str(since_transaction - 1) if since_transaction else source.since
    live = env.postgres
    writer = SalvageWriter(folder(env, stamp), f"{source.text} against {live.database}, {stamp} UTC")
    with pinned(source.postgres, source.database) as ours, pinned(live, live.database) as theirs:
        chosen = [one.name for one in resolve(tables, known_in(ours))] if tables else []
        matched = match_keyed(live, ours, theirs, chosen)
        counted = tuple(writer.compare(ours, theirs, one, since, differing) for one in matched.tables)
    salvage = Salvage(
        stamp, source.text, read_database_oid.work(live, live.database), writer.close(), counted, matched.others
    )
    record_comparison(env, salvage)
    return salvage


@probe
def find_live(postgres: Postgres, names: list[str]) -> list[FoundTable]:
    """The live tables of these quoted names.

    Raises:
        VerificationFailed: one was dropped since the comparison.
    """
    with pinned(postgres, postgres.database) as connection:
        known = {one.name: one for one in known_in(connection)}
        if missing := [name for name in names if name not in known]:
            raise VerificationFailed(f"{', '.join(missing)} was dropped since the comparison", _ANEW)
        return [table_of(connection, known[name]) for name in names]


def _require_same_database(env: Environment, salvage: Salvage) -> None:
    if read_database_oid(env.postgres, env.postgres.database) != salvage.database:
        raise OpsError("the live database was replaced since the comparison", _ANEW)


def folder(env: Environment, stamp: str) -> Path:
    """Where a comparison's files are."""
    return env.reports_directory / FOLDER / stamp


def record_comparison(env: Environment, salvage: Salvage) -> None:
    """Write it next to its files."""
    path = folder(env, salvage.stamp) / RECORD
    record.write(path, salvage)
    path.chmod(0o600)  # it names tables


def find_comparison(env: Environment, reviewed: str) -> Salvage:
    """The comparison that a form names.

    Raises:
        OpsError: it is not on this host, or its files belong to another one.
    """
    stamp = reviewed.strip().rpartition("-")[0]
    found = record.read(folder(env, stamp) / RECORD, Salvage, _ANEW) if stamp and "/" not in stamp else None
    if found is None or found.name != reviewed.strip():
        raise OpsError(f"there is no comparison “{reviewed[:60]}” on this host", _ANEW)
    return found


def report_comparison(report: Report, env: Environment, salvage: Salvage) -> None:
    """Counts, and the files with the rows."""
    place = folder(env, salvage.stamp)
    report.fact("source", salvage.source)
    report.fact("SQL to review", place / SQL)
    report.fact("rows as CSV", f"{place}/*.csv")
    columns = ("table", "only in the source", "only live", "differing", "conflicts", "INSERTs", "UPDATEs")
    rows = [
        (one.table, one.missing, one.live_only, one.differing, one.conflicts, one.inserts, one.updates)
        for one in salvage.tables
    ]
    report.table("Rows by primary key", columns, rows)
    if salvage.others:
        report.table("Not compared", ("table", "why"), salvage.others)
        report.warn(
            "tables that were not compared",
            "compare them by hand: no file has their rows",
            value=", ".join(name for name, _ in salvage.others[:10]),
        )
    conflicts = sum(one.conflicts for one in salvage.tables)
    unchanged = sum(one.differing - one.updates for one in salvage.tables)
    if conflicts:
        hint = "read them in the CSV (“differs”); differing=overwrite writes the source's values"
        report.warn(
            "conflicts",
            hint if unchanged else "read the UPDATEs before you confirm: they overwrite later writes",
            value=f"{conflicts:,} rows differ and were, or may have been, written in the live database since: "
            f"they {'stay unchanged' if unchanged else 'get the values of the source'}",
        )
    if any(one.missing for one in salvage.tables):
        report.fact(
            "rows only in the source",
            "lost by the recovery, or deleted in the live database since: the keys do not show which; read the file "
            "before you confirm",
        )


def _applying(env: Environment, salvage: Salvage, live: list[FoundTable]) -> Change[[Ties], Applied]:
    first, *others = [
        PlannedStep(
            "write",
            f"{one.table}: {one.inserts:,} rows inserted, {one.updates:,} updated",
            seconds=(one.inserts + one.updates) / 5000,
        )
        for one in salvage.written
    ]
    check = PlannedStep("before the commit", "check foreign keys, advance sequences; all of it is one transaction")
    return Change(
        apply_salvage.bind(env.postgres, folder(env, salvage.stamp), salvage.digest, live),
        first.step,
        first.detail,
        seconds=first.seconds,
        more=[*others, check],
        pins=[
            lambda report: pin_database(report, env.postgres),
            lambda report: report.pin_state("reviewed", salvage.digest),
        ],
        begun=State("the rows may be committed", "run it again: rows that are there already are skipped"),
    )


def report_done(report: Report, salvage: Salvage, done: Applied) -> None:
    """Which rows were written, and which were not."""
    ran = done.ran
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    if ran.skipped:
        report.warn(
            "statements without an effect",
            "run it again with reviewed left empty to see what is left",
            value=f"{ran.skipped:,}, such as {ran.example}: the row was written since the comparison, or this was "
            "applied before",
        )
    report.outcome = f"{ran.inserted:,} rows inserted and {ran.updated:,} updated, of {salvage.source}"
