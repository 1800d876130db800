"""Backups of any kind in a store: choose, check, list and mark them. Called with the open report."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import get_args

from blocks.environment import Environment, Stores
from runbook import clock, metrics
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.guard.loss import Loss
from runbook.page.shown import show_table
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups import catalogue, fetched_files
from tasks.backups.catalogue import Backup
from tasks.backups.log import append_line
from tasks.backups.manifest import Kind
from tasks.backups.publishing import clean_unfinished, find_unfinished, send_waiting, set_aside, sweep_spool
from tasks.backups.retention import read_stores
from tasks.backups.shrinkage import Drop, differences, drops, rows_of, shrunk_tables
from tasks.cluster.content import cluster_in
from tasks.prefect.offered_backups import offer_backups
from tasks.stores.directory import BAD
from tasks.stores.store import RESOURCE, Store, has_place, store_of

MOST_SHOWN = 50
# Listing runs under the environment's lock: a store that does not answer must not hold it for long.
LIST_PATIENCE_SECONDS = 5.0


def store_for(env: Environment, kind: Kind, which: Stores = "backups") -> Store:
    """The store of an environment's backups of a kind: in `backups`, or in the replica store (`copies`).

    Raises:
        OpsError: the environment has no such store, or its address is wrong.
    """
    store = store_of(env, kind, which)
    fetched_files.sweep(store)
    return store


def tidy(
    report: Report, env: Environment, store: Store, *, kind: Kind | None = None, wanted: Collection[str] = ()
) -> None:
    """Remove what killed runs left in a store, and send the finished backups that wait there.

    `kind`: only this kind. `wanted`: unfinished backups that the run continues.
    """
    sweep_spool(store)
    found = find_unfinished(store, env.name)
    left = [name for name in found.begun if name not in wanted and kind in (None, catalogue.kind_of(name, "postgres"))]
    if removed := [name for name in left if clean_unfinished(store, env.name, name)]:
        report.fact("removed unfinished backups", ", ".join(removed))
    for name in found.waiting:
        try:
            backup = send_waiting(store, name)
        except Unreachable:
            raise
        except OpsError as error:
            _report_unsent(report, env, store, name, error)
        else:
            report.fact("sent now", f"{backup.name}, which waited in {store.spool}")
            note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)} (sent late)")


def _report_unsent(report: Report, env: Environment, store: Store, name: str, error: OpsError) -> None:
    """A damaged backup is moved away, so that it blocks no other. An intact one that the store refuses waits."""
    damage = set_aside(store, env.name, name) if isinstance(error, VerificationFailed) else ""
    if damage:
        hint = f"inspect it in {store.spool / (BAD + name)}, then remove it. No restore was offered it"
        report.warn(f"{name} waited to be sent and is damaged", hint, value=damage)
    else:
        hint = f"{error.hint or 'fix that'}; the next backup sends it too. Do not remove {store.spool / name}"
        report.warn(f"{name} waits to be sent: it is intact, but {store.where} refuses it", hint, value=error.message)


MOST_COMPARED = 60
"""Backups before one that its content is compared with: a restore must not wait for a long list."""


def report_failed(report: Report, newest: Backup, chosen: Backup) -> None:
    """A backup that failed its verification: the chosen one, or newer ones that are passed over."""
    name = f"verification of {newest.name}"
    if not newest.failed or any(finding.name == name for finding in report.findings):
        return
    why = f"{newest.name} failed its verification at {newest.failed}: {newest.reason or 'the reason is not known'}"
    if newest.name == chosen.name:
        report.warn(name, catalogue.instead_of(newest), value=why)
        return
    gap = (newest.manifest.taken - chosen.manifest.taken).total_seconds()
    changed = differences(chosen, newest)
    report.warn(
        name,
        f"run verify-backup with backup={newest.name}: its report names the cause. To restore it anyway, give its name",
        value=f"{why}. {chosen.name} is used: it is {duration(gap)} older ({changed or 'the same number of rows'})",
    )


def judge_drops(report: Report, backup: Backup, *, most: int = MOST_COMPARED) -> None:
    """Warn if earlier backups have rows that a backup lacks: a deletion is backed up and verified as well."""
    name = f"content of {backup.name}"
    if not rows_of(backup) or any(finding.name == name for finding in report.findings):  # of an earlier attempt
        return
    for drop in drops(catalogue.before(backup, most), backup, report.limit(metrics.BACKUP_SHRUNK)[0])[:1]:
        at, lost = drop.backup.manifest.taken, Loss.everything_since("the data", drop.backup.manifest.taken)
        report.warn(
            name,
            f"if those rows were deleted by mistake, restore {drop.backup.name} instead; {lost.text} then",
            value=f"since {drop.backup.name} ({clock.text(at)}) {drop.text}",
            expected="no table that shrank",
        )


def judge_shrunk(report: Report, backup: Backup) -> None:
    """Compare the content of a new backup with that of the newest verified one (without any: the newest). An error is a
    WARN: the backup itself is good."""
    try:
        before = catalogue.earlier_proven_first(backup)
        shrunk = shrunk_tables(before, backup) if before else ()
    except OpsError as error:
        report.warn("content against earlier backups", error.hint, value=f"not compared: {error.message}")
        return
    if not before:
        return
    warn, _ = report.limit(metrics.BACKUP_SHRUNK)
    drop = Drop(before, tuple(one for one in shrunk if one.ratio > warn))
    report.judge(
        metrics.BACKUP_SHRUNK,
        max((one.ratio for one in shrunk), default=0.0),
        f"find out who deleted the rows; restore-tables restores them from {before.name}, which prune-backups keeps",
        of=f"against {before.name}" + (f": {drop.text}" if drop.tables else ""),
        worst=Status.WARN,
    )
    rows = [(one.table, f"{one.before:,}", f"{one.after:,}") for one in drop.tables]
    if rows:
        report.table("Tables that shrank", ("table", f"rows in {before.name}", "rows now"), rows, most=MOST_SHOWN)


Needed = Callable[[Collection[str]], Collection[str]]
"""Which of a backup's files a run needs, by their names."""


def choose_backup(
    report: Report,
    env: Environment,
    kind: Kind,
    wanted: str,
    source: Stores,
    *,
    of: str = "",
    needed: Needed | None = None,
    failed_too: bool = False,
) -> Backup:
    """The backup that the operator named, its files fetched and compared with its manifest.

    Args:
        of: another environment's backup, which is restored here
        needed: chooses the files that are read; None: every file
        failed_too: also one that failed its verification, to verify it again or to restore it with exceptions

    Raises:
        OpsError: there is none, or it is a backup of something else.
    """
    store = store_for(env, kind, source)
    backup = catalogue.find_backup(store, kind, wanted, of or env.name, failed_too=failed_too)
    if not failed_too:
        report_failed(report, catalogue.find_backup(store, kind, wanted, of or env.name, failed_too=True), backup)
    judge_drops(report, backup)
    report.fact("backup", f"{backup.name}, snapshot of {clock.text(backup.manifest.taken)}")
    report.pin("backup", backup.name)
    report.pin_state("backup", backup.name)
    judge_files(report, backup, needed(backup.manifest.readable_files) if needed else None)
    if not of:
        judge_origin(report, env, backup, wanted)
    return backup


def judge_files(report: Report, backup: Backup, only: Collection[str] | None = None, what: str = "files") -> None:
    """Fetch files of a backup until the run ends, and judge them against its manifest.

    Args:
        only: the names of the files that are needed; None: every file
        what: the beginning of the finding's name
    """
    problems, files = read_files(report, backup, only), backup.manifest.readable_files
    chosen = [file for name, file in files.items() if only is None or name in only]
    of = f" of {len(files):,}" if only is not None else ""
    report.require(
        f"{what} of {backup.name}",
        not problems,
        catalogue.instead_of(backup) if problems else "",
        value="; ".join(problems[:3]) or f"{len(chosen):,}{of} files, {size(sum(file.bytes for file in chosen))}",
        expected="as in the manifest (SHA-256)",
    )


def read_files(report: Report, backup: Backup, only: Collection[str] | None = None) -> list[str]:
    """Fetch a backup's files (`only`: those of these names) until the run ends and compare them with the manifest;
    returns the problems."""
    report.at_end(lambda: fetched_files.put_away(backup))
    problems = list(fetched_files.verify_files(backup, only))
    if problems:
        mark_failed(report, backup, problems[0])
    return problems


def judge_origin(report: Report, env: Environment, backup: Backup, wanted: str) -> None:
    """Stores can be shared: another environment's backup is accepted only by its full name."""
    report.require(
        "environment of the backup",
        backup.manifest.environment == env.name,
        f"run this with backup={backup.name} if a backup of {backup.manifest.environment} is intended",
        value=backup.manifest.environment,
        expected=env.name,
        worst=Status.WARN if wanted == backup.name else Status.CRITICAL,
    )


def judge_key(report: Report, backup: Backup) -> None:
    """Whether a second key can decrypt the backup, and whether this environment can: a lost key loses every backup."""
    recipients = backup.manifest.recipients
    if not recipients:
        return
    report.prefer(
        "escrowed key",
        len(recipients) > 1,
        "add the public key of an escrowed key, stored elsewhere, to [backups] recipients",
        value=f"{len(recipients)} recipients",
        expected="2 or more",
    )
    report.prefer(
        "key of the backups",
        backup.store.key.readable,
        "set [backups] identity_env to the secret key of one of the recipients: no restore here can read this backup",
        value="matches one of the recipients" if backup.store.key.readable else "missing, or matches no recipient",
        expected="this environment can read its own backups",
    )


def mark_verified(report: Report, backup: Backup) -> None:
    """Note that a restore of it was proven, or which rules its data breaks: then it counts as no verified backup.

    An error in noting it is a WARN: the restore was good.
    """
    facts = {"by": report.runbook, "at": report.started_at}
    broken = report.known_broken if backup.manifest.kind == "postgres" else ""
    try:
        if broken:
            catalogue.mark_broken(backup.store, backup.name, {**facts, "rules": broken[:500]})
        else:
            catalogue.mark_verified(backup.store, backup.name, facts)
    except OpsError as error:
        value = f"the result could not be written: {error.message}"
        report.warn("note in the catalogue", error.hint, value=value)


def mark_failed(report: Report, backup: Backup, reason: str) -> None:
    """Note that a backup failed its verification: retention no longer counts it."""
    facts = {"by": report.runbook, "at": report.started_at, "reason": reason[:500]}
    try:
        catalogue.mark_failed(backup.store, backup.name, facts)
    except OpsError as error:
        report.warn("note in the catalogue", error.hint, value=error.message)


def measured(backup: Backup) -> tuple[str, int]:
    """The name under which a proven restore is measured, and the bytes that its time depends on."""
    match backup.manifest.kind:
        case "cluster":
            return "database point in time", cluster_in(backup).bytes
        case "postgres":
            return "database backup", backup.manifest.bytes
    # A measure's name is a key, the same in every language: not a message for the catalogues.
    return " ".join((backup.manifest.kind, "backup")), backup.manifest.bytes


def note(report: Report, env: Environment, text: str) -> None:
    """Add a line to the backup log. An error is a WARN: the backup itself is good."""
    if not env.has("logs"):
        return
    try:
        append_line(env.logs, text)
    except OpsError as error:
        report.warn("backup log", error.hint, value=error.message)


def show_backups(report: Report, env: Environment) -> None:
    """List every backup in both sets of stores, newest first: in the report, as a table artifact, and in the forms that
    name one.

    A store that cannot be listed is a WARN.
    """
    resources = sorted(set(RESOURCE.values()))
    kinds = {resource: [kind for kind in get_args(Kind) if RESOURCE[kind] == resource] for resource in resources}
    sets = get_args(Stores)
    places = [
        (which, resource) for which in sets for resource in resources if has_place(env, kinds[resource][0], which)
    ]
    stores = [(_listed(env, kinds[resource][0], which), kinds[resource]) for which, resource in places]
    rows, offered = list[tuple[Backup, str]](), dict[Kind, list[Backup]]()
    for (which, resource), stored in zip(places, read_stores(stores, env.name), strict=True):
        if isinstance(stored, OpsError):
            report.warn(f"{which} of {resource} could not be listed", stored.hint, value=stored.message)
            continue
        rows += [(backup, which) for backup in (*stored.backups, *stored.kept)]
        if which == "backups":
            offered |= {kind: [one for one in stored.backups if one.manifest.kind == kind] for kind in kinds[resource]}
        for name in stored.unreadable:
            hint = "inspect it; no restore is offered it, and no run deletes it"
            report.warn(f"{name} in {which}", hint, value="manifest unreadable")
    rows.sort(key=lambda row: row[0].manifest.taken, reverse=True)
    columns = ("backup", "kind", "where", "taken", "age", "size", "encrypted", "verified by a restore")
    listed = [
        (
            backup.name,
            _kind_of(backup, env),
            which,
            clock.text(backup.manifest.taken, "minutes"),
            duration(backup.age_seconds),
            size(backup.manifest.bytes),
            "yes" if backup.manifest.is_encrypted else "no",
            backup.verified or (f"failed {backup.failed}" if backup.failed else "never"),
        )
        for backup, which in rows
    ]
    artifact = f"backups-{env.name}"
    more = f" (the artifact {artifact} lists all)" if len(listed) > MOST_SHOWN else ""
    report.table(f"All backups, newest first{more}", columns, listed, most=MOST_SHOWN)
    show_table(artifact, f"all backups of {env.title or env.name}", columns, listed)
    offer_backups(env.name, offered)


def _kind_of(backup: Backup, env: Environment) -> str:
    """The kind; for live data that a restore kept, also that."""
    kept = backup.manifest.environment != env.name
    return f"{backup.manifest.kind}, kept by a restore" if kept else backup.manifest.kind


def _listed(env: Environment, kind: Kind, which: Stores) -> Store | OpsError:
    try:
        return store_of(env, kind, which, patience_seconds=LIST_PATIENCE_SECONDS)
    except OpsError as error:
        return error
