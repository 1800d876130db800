"""What runbooks do with the backups of a store, whatever is in them. Plain functions, called with the open report."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import get_args

from blocks.environment import Environment, Stores
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.page.shown import show_table
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups import catalogue, fetched_files
from tasks.backups.catalogue import Backup
from tasks.backups.log import append_line
from tasks.backups.manifest import Kind
from tasks.backups.publishing import clean_unfinished, find_unfinished, send_waiting, set_aside, sweep_spool
from tasks.backups.retention import read_stores
from tasks.cluster.content import cluster_in
from tasks.stores.directory import BAD
from tasks.stores.store import RESOURCE, Store, has_place, store_of

MOST_SHOWN = 50
# Everything is listed under the environment's lock: a place that is away must not hold it for long.
LIST_PATIENCE_SECONDS = 5.0


def store_for(env: Environment, kind: Kind, which: Stores = "backups") -> Store:
    """Where an environment's backups of a kind are: in its first or its second set of stores.

    Raises:
        OpsError: the environment has no such set, or an address in it is wrong.
    """
    store = store_of(env, kind, which)
    fetched_files.sweep(store)
    return store


def tidy(
    report: Report, env: Environment, store: Store, *, kind: Kind | None = None, wanted: Collection[str] = ()
) -> None:
    """See to what killed runs left in a store (of one `kind`: only that; `wanted`: not these, they are gone on with),
    and tell: a backup that is sent late gets its line in the backup log."""
    sweep_spool(store)
    found = find_unfinished(store, env.name)
    begun = [name for name in found.begun if name not in wanted and kind in (None, catalogue.kind_of(name, "postgres"))]
    if removed := [name for name in begun if clean_unfinished(store, env.name, name)]:
        report.fact("removed unfinished backups", ", ".join(removed))
    for name in found.waiting:
        try:
            backup = send_waiting(store, name)
        except Unreachable:
            raise
        except OpsError as error:
            _tell_waiting(report, env, store, name, error)
        else:
            report.fact("sent now", f"{backup.name}, which had waited in {store.spool}")
            note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)} (sent late)")


def _tell_waiting(report: Report, env: Environment, store: Store, name: str, error: OpsError) -> None:
    """Damaged: it must not keep others from being taken. Whole, and refused: it waits until that is put right."""
    damage = set_aside(store, env.name, name) if isinstance(error, VerificationFailed) else ""
    if damage:
        hint = f"look at it in {store.spool / (BAD + name)}, then remove it; it was never offered"
        report.warn(f"{name} waited to be sent and is damaged", hint, value=damage)
    else:
        hint = f"{error.hint or 'put that right'}; the next backup takes it along. Do not remove {store.spool / name}"
        report.warn(f"{name} waits to be sent: it is whole, and {store.where} refuses it", hint, value=error.message)


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
) -> Backup:
    """The backup that was asked for, its files at hand; whether they are what its manifest says is in the report.

    Args:
        of: another environment's backup, which is restored here
        needed: chooses the files that are read; None: every file

    Raises:
        OpsError: there is none, or it is a backup of something else.
    """
    backup = catalogue.find_backup(store_for(env, kind, source), kind, wanted, of or env.name)
    report.fact("backup", f"{backup.name}, snapshot of {backup.manifest.taken:%Y-%m-%d %H:%M:%S UTC}")
    report.pin("backup", backup.name)
    report.pin_state("backup", backup.name)
    judge_files(report, backup, needed(backup.manifest.readable_files) if needed else None)
    if not of:
        judge_origin(report, env, backup, wanted)
    return backup


def judge_files(report: Report, backup: Backup, only: Collection[str] | None = None, what: str = "files") -> None:
    """Have files of a backup at hand until the run ends; whether they are what its manifest says is in the report.

    Args:
        only: the names of the files that are needed; None: every file
        what: the finding's name begins so
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
    """Have a backup's files (`only`: those of these names) at hand until the run ends, compared with its manifest;
    returns what is wrong."""
    report.at_end(lambda: fetched_files.put_away(backup))
    problems = list(fetched_files.verify_files(backup, only))
    if problems:
        mark_failed(report, backup, problems[0])
    return problems


def judge_origin(report: Report, env: Environment, backup: Backup, wanted: str) -> None:
    """A store may be shared: another environment's backup is taken only by its name."""
    report.require(
        "environment of the backup",
        backup.manifest.environment == env.name,
        f"it was taken of {backup.manifest.environment}; if that is meant, launch it with backup={backup.name}",
        value=backup.manifest.environment,
        expected=env.name,
        worst=Status.WARN if wanted == backup.name else Status.CRITICAL,
    )


def judge_key(report: Report, backup: Backup) -> None:
    """A key that is lost loses every backup: one more is held elsewhere."""
    recipients = backup.manifest.recipients
    if not recipients:
        return
    report.prefer(
        "escrowed key",
        len(recipients) > 1,
        "add the public key of a second one that is kept elsewhere to [backups] recipients",
        value=f"{len(recipients)} recipients",
        expected="2 or more",
    )
    report.prefer(
        "key of the backups",
        backup.store.key.readable,
        "set [backups] identity_env to the secret key of one of the recipients: nothing here could restore this",
        value="fits one of the recipients" if backup.store.key.readable else "missing, or another one",
        expected="this environment can read what it writes",
    )


def mark_verified(report: Report, backup: Backup) -> None:
    """Note that a restore of it was proven; of a database whose data broke a rule only that, for no older backup may be
    deleted because of this one. That it cannot be noted is no reason to call a good restore bad."""
    facts = {"by": report.runbook, "at": report.started_at}
    broken = report.known_broken if backup.manifest.kind == "postgres" else ""
    try:
        if broken:
            catalogue.mark_broken(backup.store, backup.name, {**facts, "rules": broken[:500]})
        else:
            catalogue.mark_verified(backup.store, backup.name, facts)
    except OpsError as error:
        what = f"that it is verified could not be noted: {error.message}"
        report.warn("note in the catalogue", error.hint, value=what)


def mark_failed(report: Report, backup: Backup, reason: str) -> None:
    """Note that it did not stand its proof: from now on it stands in for no other backup."""
    facts = {"by": report.runbook, "at": report.started_at, "reason": reason[:500]}
    try:
        catalogue.mark_failed(backup.store, backup.name, facts)
    except OpsError as error:
        report.warn("note in the catalogue", error.hint, value=error.message)


def measured(backup: Backup) -> tuple[str, int]:
    """As what a proven restore of it is measured, and the bytes by which its time goes."""
    match backup.manifest.kind:
        case "cluster":
            return "database point in time", cluster_in(backup).bytes
        case "postgres":
            return "database backup", backup.manifest.bytes
    return f"{backup.manifest.kind} backup", backup.manifest.bytes


def note(report: Report, env: Environment, text: str) -> None:
    """A line in the backup log. A backup is none the worse for a log that cannot be written."""
    if not env.has("logs"):
        return
    try:
        append_line(env.logs, text)
    except OpsError as error:
        report.warn("backup log", error.hint, value=error.message)


def tell_backups(report: Report, env: Environment) -> None:
    """Every backup of every kind in both sets of stores, newest first: in the report, and as a table artifact. A place
    that is away, or wrongly named, makes no backup worse."""
    resources = sorted(set(RESOURCE.values()))
    kinds = {resource: [kind for kind in get_args(Kind) if RESOURCE[kind] == resource] for resource in resources}
    sets = get_args(Stores)
    places = [
        (which, resource) for which in sets for resource in resources if has_place(env, kinds[resource][0], which)
    ]
    stores = [(_listed(env, kinds[resource][0], which), kinds[resource]) for which, resource in places]
    rows = list[tuple[Backup, str]]()
    for (which, resource), stored in zip(places, read_stores(stores, env.name), strict=True):
        if isinstance(stored, OpsError):
            report.warn(f"{which} of {resource} could not be listed", stored.hint, value=stored.message)
            continue
        rows += [(backup, which) for backup in (*stored.backups, *stored.kept)]
        for name in stored.unreadable:
            report.warn(f"{name} in {which}", "look at it; it is never offered or deleted", value="manifest unreadable")
    rows.sort(key=lambda row: row[0].manifest.taken, reverse=True)
    columns = ("backup", "kind", "where", "taken (UTC)", "age", "size", "encrypted", "verified by a restore")
    told = [
        (
            backup.name,
            _kind_of(backup, env),
            which,
            f"{backup.manifest.taken:%Y-%m-%d %H:%M}",
            duration(backup.age_seconds),
            size(backup.manifest.bytes),
            "yes" if backup.manifest.is_encrypted else "no",
            backup.verified or "never",
        )
        for backup, which in rows
    ]
    more = f" (the newest {MOST_SHOWN} of {len(told)}; all are in the artifact)" if len(told) > MOST_SHOWN else ""
    report.table(f"All backups{more}", columns, told[:MOST_SHOWN])
    show_table(f"backups-{env.name}", f"すべてのバックアップ ({env.title or env.name})", columns, told)


def _kind_of(backup: Backup, env: Environment) -> str:
    """With a word on those that no backup flow took."""
    kept = backup.manifest.environment != env.name
    return f"{backup.manifest.kind}, kept by a restore" if kept else backup.manifest.kind


def _listed(env: Environment, kind: Kind, which: Stores) -> Store | OpsError:
    try:
        return store_of(env, kind, which, patience_seconds=LIST_PATIENCE_SECONDS)
    except OpsError as error:
        return error
