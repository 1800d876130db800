"""Judgements and steps of the rehearsal of a Prefect upgrade."""

from __future__ import annotations

import prefect

from blocks.environment import Environment
from flows.database import restore_steps
from flows.infrastructure.prefect.recovery import COMMAND
from flows.store import judge_key, mark_verified
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import duration
from tasks.backups.catalogue import Backup
from tasks.postgres.content.content import DatabaseContent, read_content
from tasks.postgres.restore.staged_copy import Copy, content_in, create_scratch, drop_scratch, dump_in, fill_scratch
from tasks.prefect.server import missing_in, read_api, revisions
from tasks.prefect.upgrade import HINT, migrate_copy, read_revision, read_served

MODULE = "python -m flows.infrastructure.prefect.server"
KEPT_TABLES = (
    "automation",
    "block_document",
    "block_schema",
    "block_type",
    "concurrency_limit_v2",
    "configuration",
    "deployment",
    "deployment_schedule",
    "flow",
    "flow_run",
    "variable",
    "work_pool",
    "work_queue",
)
"""Tables that must keep all rows. A migration may delete rows of others (events, logs, states)."""


def judge_versions(report: Report, chosen: Backup) -> bool:
    """Whether the installed Prefect is newer than the one that took the backup."""
    content, known = content_in(chosen), revisions()
    judge_key(report, chosen)
    report.fact("taken with", chosen.manifest.tool)
    report.fact("upgrade to", f"Prefect {prefect.__version__}, revision {known[0]}")
    report.require(
        "revision of Prefect's tables",
        content.revision in known,
        f"install a newer Prefect than {prefect.__version__} here: a newer one wrote the backup",
        value=content.revision or "none",
        expected=f"{known[0]}, or an earlier one",
    )
    return f"Prefect {prefect.__version__}" not in chosen.manifest.tool or content.revision != known[0]


def judge_live(report: Report, env: Environment, content: DatabaseContent) -> None:
    """The live Prefect; after the switch, whether it has everything."""
    server = env.prefect_server
    try:
        revision, answer = read_revision(server, server.database), read_api(server)
    except OpsError as error:
        report.warn(
            "live Prefect",
            "nothing to do if it is stopped for the upgrade: run this again when it runs",
            value=error.message,
        )
        return
    report.fact("live", f"Prefect {answer.version}, revision {revision}")
    if (answer.version, revision) == (prefect.__version__, revisions()[0]):
        missing = missing_in({table: one.rows for table, one in content.tables.items()}, answer)
        report.prefer(
            "content of the upgraded API",
            not missing,
            "check whether it was deleted after the backup; otherwise go back to the old version",
            value="; ".join(missing) or "everything in the backup",
        )


def rehearse(report: Report, own: Environment, env: Environment, chosen: Backup, jobs: int) -> None:
    """Restore the backup into a scratch database, prove, migrate, compare and serve it; then drop it.

    Raises:
        VerificationFailed: it does not restore, does not migrate, or the new API does not serve it.
        RunbookFailed: rows or objects were lost.
    """
    content, server = content_in(chosen), env.prefect_server
    try:
        empty = create_scratch(own.postgres, content.properties)
        scratch = fill_scratch(own.postgres, dump_in(chosen), content.properties, empty, jobs)
        proven = restore_steps.prove_database(report, own, chosen, scratch)
        mark_verified(report, chosen)
        migrated = migrate_copy.after(proven)(server, scratch)
        report.fact("migrated in", duration(migrated.seconds))
        report.require(
            "revision of the migrated copy",
            migrated.revision == revisions()[0],
            HINT,
            value=migrated.revision or "none",
            expected=revisions()[0],
        )
        after = judge_rows(report, own, proven, scratch, migrated)
        report.fail_if_critical()
        answer = read_served.after(after)(server, scratch)
        missing = missing_in({table: one.rows for table, one in content.tables.items()}, answer)
        report.require(
            "content of the new API",
            not missing,
            HINT,
            value="; ".join(missing) or "everything",
            expected="every deployment and automation of the backup",
        )
        report.passed("secrets", value=f"{answer.blocks} blocks read in clear by Prefect {answer.version}")
        report.fail_if_critical()
    finally:
        drop_scratch(own.postgres)


def judge_rows(report: Report, own: Environment, before: DatabaseContent, copy: Copy, migrated: object) -> object:
    """Compare every table before and after the migration."""
    after = read_content.after(migrated)(own.postgres, copy.database)
    rows, lost, less = list[tuple[object, ...]](), list[str](), list[str]()
    for table, one in sorted(before.tables.items()):
        found = after.tables.get(table)
        if found == one:
            continue
        rows.append((table, one.rows, found.rows if found else "the table is missing"))
        if found is None or found.rows < one.rows:
            (lost if table.partition(".")[2] in KEPT_TABLES else less).append(table)
    rows += [(table, "", after.tables[table].rows) for table in sorted(after.tables.keys() - before.tables.keys())]
    report.table("Tables that the migration changed", ("table", "rows before", "rows after"), rows)
    report.require(
        "rows to keep",
        not lost,
        HINT,
        value=f"fewer in {', '.join(lost)}" if lost else "all kept",
        expected=f"none lost in {len(KEPT_TABLES)} tables",
    )
    if less:
        report.warn("other rows", "find the reason in the release notes", value=f"fewer in {', '.join(less)}")
    return after


def attach_switch(report: Report, env: Environment) -> None:
    """A table of the steps that operators do: the switch."""
    new, roles = prefect.__version__, ", ".join(reversed(env.prefect_server.roles))
    pools = sorted({env.name, *env.pools.values()})
    report.table(
        "The upgrade, step by step (docs/prefect-upgrade.md)",
        ("step", "how"),
        [
            (
                "pause the work pools, wait until no run is left",
                "; ".join(f"prefect work-pool pause {pool}" for pool in pools),
            ),
            ("stop workers and Prefect", f"the workers of every host, then {roles}"),
            ("take the last backup, without any writer", f"{MODULE} backup --environment {env.name}"),
            ("rehearse with that backup", f"{MODULE} upgrade --environment {env.name} (of Prefect {new})"),
            (f"migrate by Prefect {new}", "prefect server database upgrade -y; or the service migrate of compose.yaml"),
            (
                "start Prefect, then workers of the same version",
                f"make doctor ENVIRONMENT={env.name}; run this again",
            ),
            ("to go back", f"with the old version installed: {COMMAND.format(env.name, 'the last backup')}"),
        ],
    )


def outcome(chosen: Backup, is_newer: bool) -> str:
    """The report's outcome."""
    if is_newer:
        return f"{chosen.name} migrates to Prefect {prefect.__version__} and is served by it; every row is there"
    return (
        f"Prefect {prefect.__version__} wrote {chosen.name} itself: nothing to upgrade; run this with the new version "
        "installed"
    )
