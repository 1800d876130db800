"""Checks for corrupt data: checksums, collation versions, every page by amcheck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.pinned import pin_database
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, first_of, size
from tasks.postgres.upkeep.amcheck import (
    EXTENSION,
    INSTALL,
    CheckedRelation,
    Extension,
    Outcome,
    check_relations,
    find_amcheck,
    find_relations,
    install_amcheck,
    wait_for_amcheck,
)
from tasks.postgres.upkeep.corruption import Checksums, Collations, read_checksums, read_collations

Where = Literal["auto", "primary", "standby"]


@flow(name="check-corruption", flow_run_name=RunName("check-corruption {environment} {where} {database}"))
def check_corruption(
    environment: str,
    where: Where = "auto",
    database: str = "",
    tables: list[str] = [],  # noqa: B006 - Prefect's form needs the value; it is never changed
    heapallindexed: bool = False,
    budget_seconds: Annotated[int, Field(ge=1, le=86400)] = 600,
    install: bool = False,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """データ破損の検査 (§1)

    Checks every heap page, B-tree and GIN index of a database with amcheck. Reports failed checksums, and collations
    whose provider has another version than the recorded one. Run it weekly, and after a power cut, a disk fault or a
    move to another operating system.

    It checks the standby if the environment has one ([standby]), so that the primary has no load, or a restored copy
    (`database`). Neither covers the primary's disk: each backup reads its heap pages, only where=primary its indexes.

    It reads only, with locks like a SELECT, one relation at a time; its snapshot holds vacuum back meanwhile. Only
    `install` changes something: CREATE EXTENSION amcheck on the primary. To undo: DROP EXTENSION. Cached pages are not
    read from the disk again. Evidence: the tables of checked and unchecked relations with the reasons.

    Not in the manual.

    Args:
        environment: Environment (lab, staging, production …)
        where: Server to check. auto: the standby if the environment has [standby], else the primary
        database: Database to check. Empty: the application's (the name of a restored copy is allowed)
        tables: Tables to check (table or schema.table). Empty: all
        heapallindexed: Also verify that every row is in its index (takes time and memory)
        budget_seconds: Longest time for amcheck, in seconds
        install: Run CREATE EXTENSION on the primary if amcheck is missing
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Only for install: type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Check corruption", env, confirm, plan, changes=install) as report:
        server = _server(env, where)
        name = database or server.database
        report.fact("database", name)
        extension = find_amcheck(server, name)
        standby = _identify_server(report, env, server, extension)
        if install and not extension.schema:
            _install(report, env, name)
            extension = wait_for_amcheck(server, name)
            report.fact("installed", f"{EXTENSION} {extension.version} in {name}")
        judge_collations(report, read_collations(server, name), name, standby=standby)
        if _has_amcheck(report, extension, name):
            relations = find_relations(server, name, tables)
            checked = check_relations(server, name, extension.schema, relations, heapallindexed, float(budget_seconds))
            judge_checked(report, checked, live=name == server.database, standby=standby)
            report_results(report, checked, heapallindexed)
        else:
            report.outcome = "heap and indexes were not checked: amcheck is missing"
        judge_checksums(report, read_checksums(server), standby=standby)  # last, to count what amcheck has read
    return report


def _server(env: Environment, where: Where) -> Postgres:
    if where not in ("auto", "primary", "standby"):
        raise OpsError(f"where is “{str(where)[:40]}”", "choose auto, primary or standby")
    return env.standby if where == "standby" or (where == "auto" and env.has("standby")) else env.postgres


def _identify_server(report: Report, env: Environment, server: Postgres, extension: Extension) -> bool:
    """Name the server in the report's head; returns whether it is a standby.

    Raises:
        OpsError: [standby] names a server that is not a standby.
    """
    address = f"{server.host}:{server.port}"
    if server is not env.postgres and not extension.in_recovery:
        raise OpsError(
            f"{address}, named by [standby], is not a standby (any more)",
            "stop the server that clients do not use and rejoin it (rejoin-standby), or choose where=primary: both "
            "servers accept writes",
        )
    if extension.in_recovery:
        replayed = f", replayed up to {extension.replayed}" if extension.replayed else ""
        report.fact("server", f"standby {address}{replayed}; where=primary reads the primary's disk")
    else:
        report.fact("server", f"primary {address}")
    return extension.in_recovery


def _install(report: Report, env: Environment, database: str) -> None:
    """Install it on the primary, unless the primary has it. A standby gets it by replication.

    Raises:
        OpsError: it cannot be installed.
    """
    found = find_amcheck(env.postgres, database)
    if found.schema:
        return
    if not found.available:
        raise OpsError("amcheck is not available on this server", "install the contrib package of its version")
    if found.in_recovery:
        raise OpsError("a standby cannot install an extension", "install it on the primary; replication copies it")
    installing = Change(
        install_amcheck.bind(env.postgres, database),
        INSTALL,
        f"{EXTENSION} {found.available} in {database}; undo: DROP EXTENSION {EXTENSION}",
        pins=[lambda report: pin_database(report, env.postgres)],
    )
    effect = Effect(f"the extension {EXTENSION} is installed in {database}", f"DROP EXTENSION {EXTENSION}")
    with carrying_out(report, installing, effect=effect) as carry:
        carry(installing)


def _has_amcheck(report: Report, extension: Extension, database: str) -> bool:
    if extension.schema:
        report.fact("amcheck", extension.version)
        return True
    create = f"run CREATE EXTENSION amcheck in {database} on the primary, or run this with install=true"
    hint = create if extension.available else "install the contrib package of the server's version, then " + create
    report.warn("heap and indexes", hint, value="not measured: amcheck is not installed", expected="checked")
    return False


MOST_ROWS = 50
MOST_FINDINGS = 10
# Physical damage is not replicated: the primary can be intact.
ON_STANDBY = (
    "run this with where=primary. If the primary is intact, keep a copy of this host's files, check its disk and "
    "memory, and rebuild the standby (pg_basebackup -R): a standby cannot be repaired"
)


def judge_checksums(report: Report, found: Checksums, *, standby: bool) -> None:
    """Whether the server can detect damage, and the failures that it counted."""
    also = ", on the primary and every standby while all are stopped" if standby else ""
    report.prefer(
        "data checksums",
        found.on,
        f"stop the server and switch them on: pg_checksums --enable{also}",
        value="on" if found.on else "off: failures are not measured",
        expected="on",
    )
    report.require(
        "settings that hide damage",
        not found.hiding,
        "switch them off: they hide damaged pages from queries",
        value=", ".join(found.hiding) or "none",
        expected="none",
    )
    for failed in found.failures[:MOST_FINDINGS]:
        report.fail(
            f"failed checksums in {failed.database or 'the shared catalogs'}",
            (
                ON_STANDBY
                if standby
                else "find the page in the server's log, check disk and memory of the host, then restore-database, or "
                "REINDEX if only an index is damaged"
            )
            + "; pg_stat_reset() in that database resets the count",
            value=f"{failed.count}, the last at {failed.last}",
            expected="0",
        )
    if found.on and not found.failures:
        report.passed("failed checksums", value=0, expected=0)


def judge_collations(report: Report, found: Collations, database: str, *, standby: bool) -> None:
    """Whether text still sorts as it did when the indexes were built."""
    for changed in found.changed[:MOST_FINDINGS]:
        kind = changed.name.split(" ", 1)[0]
        target = changed.name.split(" ", 1)[1] if kind == "collation" else f'"{database}"'
        indexes = f"REINDEX {', '.join(changed.indexes[:5])}" if changed.indexes else "no index depends on it"
        if len(changed.indexes) > 5:
            indexes = f"REINDEX the {len(changed.indexes)} indexes in the table below"
        refresh = f"ALTER {kind.upper()} {target} REFRESH {'COLLATION ' * (kind == 'database')}VERSION"
        elsewhere = (
            "run this with where=primary; where only the standby differs, give its host the primary's "
            "operating system; where both do, on the primary: "
        )
        report.warn(
            f"version of {changed.name}",
            f"{elsewhere * standby}{indexes}; then {refresh}. Until then indexes may miss rows",
            value=f"recorded {changed.recorded}, the provider has {changed.actual}",
            expected="the same version",
        )
    if found.changed:
        rows = [(changed.name, index) for changed in found.changed for index in changed.indexes]
        report.table("Indexes that depend on a changed collation", ("collation", "index"), rows, most=MOST_ROWS)
    if found.unrecorded:
        report.warn(
            "collations without a recorded version",
            "REINDEX the indexes that use them, unless the host's libraries are unchanged. A version is recorded "
            "only when the database (restore-database) or the collation is created",
            value=f"not measured: {first_of(found.unrecorded, 5)}",
        )
    if not found.changed:
        value = f"{found.compared} the same, {found.unversioned} without a version (C sorts by bytes and needs none)"
        report.passed("collation versions", value=value)


def judge_checked(report: Report, checked: tuple[CheckedRelation, ...], *, live: bool, standby: bool) -> None:
    """One finding for each damaged relation, and for what was not checked. `live`: the application's database."""
    damaged = [one for one in checked if one.outcome == "damaged"]
    for one in damaged[:MOST_FINDINGS]:
        remedy = ON_STANDBY if standby else _remedy(one, damaged, live)
        report.fail(f"{_kind(one)} {one.relation.name}", remedy, value=one.message, expected="intact")
    if len(damaged) > MOST_FINDINGS:
        report.warn("more damaged relations", "see the table", value=len(damaged) - MOST_FINDINGS)
    reached = [one for one in checked if one.outcome == "intact"]
    if not damaged and reached:
        report.passed("heap and indexes", value=f"{len(reached)} intact, {size(_bytes(reached))}")
    missed = [one for one in checked if one.outcome == "not reached"]
    names = list(dict.fromkeys(one.relation.table for one in missed))
    report.prefer(
        "time budget",
        not missed,
        f"run this with a larger budget_seconds, or with tables={names[:5]}",
        value=f"{len(missed)} of {len(checked)} relations not reached ({size(_bytes(missed))})",
        expected="all reached",
    )
    # Indexes that amcheck does not support are in the table only.
    failed = [one for one in checked if one.outcome == "not checked" and not one.relation.why_not]
    if failed:
        report.warn(
            "relations that could not be checked",
            "fix the cause, then run this with their tables",
            value="; ".join(f"{one.relation.name}: {one.message}" for one in failed[:3]),
        )
    if not damaged and not reached:
        report.warn("heap and indexes", "see the reasons in the table", value="not measured: nothing was checked")


def _remedy(one: CheckedRelation, damaged: list[CheckedRelation], live: bool) -> str:
    if one.relation.is_index:
        heap_is_sound = not any(
            other.relation.table == one.relation.table and not other.relation.is_index for other in damaged
        )
        rebuild = f"REINDEX INDEX CONCURRENTLY {one.relation.name}"
        return f"{rebuild}: its table is intact" if heap_is_sound else f"repair its table first, then {rebuild}"
    if not live:
        return "check the live database, then verify the backup before this one: this copy's backup is damaged"
    return (
        "keep a copy of the files, check disk and memory of the host, then run restore-database or restore-tables. Do "
        "not VACUUM or rewrite the table before"
    )


def report_results(report: Report, checked: tuple[CheckedRelation, ...], heapallindexed: bool) -> None:
    """The outcome and the tables."""
    count = Counter(one.outcome for one in checked)
    outcomes: tuple[Outcome, ...] = ("intact", "damaged", "not reached", "not checked")
    report.outcome = ", ".join(f"{count[each]} {each}" for each in outcomes if count[each]) or "nothing to check"
    report.fact(
        "checked",
        f"{size(_bytes(one for one in checked if one.outcome in ('intact', 'damaged')))} in "
        f"{duration(sum(one.seconds for one in checked))}; rows missing in indexes: "
        f"{'checked' if heapallindexed else 'not checked (heapallindexed=false)'}",
    )
    if ends := [one.relation.name for one in checked if one.relation.is_unindexed and one.outcome == "intact"]:
        names = ", ".join(ends[:MOST_FINDINGS]) + " …" * (len(ends) > MOST_FINDINGS)
        report.fact(
            "ends of files",
            f"{len(ends)} tables have no B-tree index: amcheck detects a truncated file only up to the last page that "
            f"VACUUM marked in the visibility map: {names}",
        )
    bad = [one for one in checked if one.outcome != "intact"]
    rows = [(one.relation.name, _kind(one), one.outcome, one.message) for one in bad]
    report.table("Damaged, or not checked", ("relation", "kind", "outcome", "why"), rows, most=MOST_ROWS)
    longest = sorted((one for one in checked if one.outcome == "intact"), key=lambda one: -one.seconds)[:20]
    report.table(
        "Intact, slowest checks first",
        ("relation", "kind", "size", "seconds"),
        [(one.relation.name, _kind(one), size(one.relation.bytes), f"{one.seconds:.2f}") for one in longest],
    )


def _kind(one: CheckedRelation) -> str:
    return "index" if one.relation.is_index else "table"


def _bytes(checked: Iterable[CheckedRelation]) -> int:
    return sum(one.relation.bytes for one in checked)
