"""Copies of all backups in the replica store, preferably in another region (§1.2, §8.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from blocks.environment import Environment
from flows.store import mark_failed, note, show_backups, store_for, tidy
from runbook import clock
from runbook.errors import OpsError, Unreachable
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind
from tasks.backups.publishing import sweep_spool
from tasks.backups.replicas import Copied, Gap, copy_backup, note_verified, prove_copy, read_copies, read_gap
from tasks.backups.retention import reasons_to_stay, rule_of
from tasks.stores.store import Store, has_place

MOST_SHOWN = 50
Reading = Literal["new", "all"]


@flow(name="replicate-backups", flow_run_name=RunName("replicate-backups {environment} {kind}"))
def replicate_backups(environment: str, kind: Literal["all", Kind] = "all", read: Reading = "new") -> Report:
    """バックアップの複製 (§1.2, §8.1)

    Copies the backups of the database, Redis and the files that the replica store (`[copies]`, preferably in another
    region) lacks. It reads each copy back and compares its SHA-256 before it publishes the copy, and again before the
    copy counts as verified. Run it daily, after the backups.

    It only adds; prune-backups with source=copies deletes. After an interruption, the next run continues. Evidence: the
    copied backups, all backups with their stores, the age of the newest copy.

    Departs from the manual: it keeps its backups on the host that they protect.

    Args:
        environment: Environment (lab, staging, production …)
        kind: Kind of backup. all: every kind
        read: What to read back and verify. new: copies made now; all: all existing copies too
    """
    env = Environment.find(environment)
    with runbook("Replicate backups", env, changes=True) as report:
        if not env.has("copies"):
            raise OpsError(f"{env.name} has no replica store", "add [copies] to its TOML and register it")
        if kind != "all" and kind not in get_args(Kind):
            raise OpsError(f"kind is “{kind}”", f"choose all or one of {', '.join(get_args(Kind))}")
        report.fact("from", store_for(env, "postgres").where)
        report.fact("to", store_for(env, "postgres", "copies").where)
        copied = list[Copied]()
        both = [each for each in get_args(Kind) if has_place(env, each) and has_place(env, each, "copies")]
        for each in both if kind == "all" else (kind,):
            copied += _replicate(report, env, each, read)
        report.table(
            "Copied now",
            ("backup", "size", "seconds"),
            [(one.name, size(one.bytes), f"{one.seconds:.1f}") for one in copied[-MOST_SHOWN:]],
        )
        whole = sum(one.bytes for one in copied)
        if copied:
            note(report, env, f"Replicated {len(copied)} - {', '.join(one.name for one in copied)}, {size(whole)}")
        show_backups(report, env)
        report.outcome = f"{len(copied)} copied, {size(whole)}" if copied else "every backup has a copy"
    return report


def _replicate(report: Report, env: Environment, kind: Kind, read: Reading) -> list[Copied]:
    first, second = store_for(env, kind), store_for(env, kind, "copies")
    gap = _without_expired(report, env, read_gap(first, second, kind, env.name))
    missing = [backup.name for backup in gap.missing]
    sweep_spool(first, kind, missing)
    tidy(report, env, second, kind=kind, wanted=missing)
    for name in gap.different:
        report.fail(
            f"copy of {name}",
            f"compare both manifests in {first.where} and {second.where}: one of them was changed",
            value="its manifest differs from the backup's",
            expected="the same manifest",
        )
    for name in gap.bad_copies:
        report.fail(
            f"copy of {name}",
            f"move it out of {second.where}, then run this again to copy it anew",
            value="its manifest cannot be read",
            expected="a readable manifest",
        )
    for name in gap.unreadable:
        report.warn(f"manifest of {name}", f"inspect it in {first.where}", value="unreadable: it was not copied")
    copied = [one for backup in gap.missing if (one := _copy(report, backup, second))]
    bad = _verify_copies(report, gap, second, read)
    _judge_newest(report, env, second, gap, copied, bad)
    return copied


def _without_expired(report: Report, env: Environment, gap: Gap) -> Gap:
    """Without the missing backups that prune-backups would delete again by [copies] keep."""
    stays = reasons_to_stay([*gap.there, *gap.missing], rule_of(env, "copies"), clock.now()) if gap.missing else {}
    wanted = tuple(backup for backup in gap.missing if backup.name in stays)
    if left := len(gap.missing) - len(wanted):
        report.fact(f"not copied of {gap.kind}", f"{left}: older than [copies] keep allows")
    return replace(gap, missing=wanted)


def _verify_copies(report: Report, gap: Gap, second: Store, read: Reading) -> set[str]:
    """Read existing copies, all of them or those whose backups were verified since; returns the names of bad ones."""
    verified = {backup.name for backup in gap.verified_since}
    wanted = [copy for copy in gap.there if read == "all" or copy.name in verified]
    problems = read_copies(wanted)
    for copy in wanted:
        if copy.name in problems:
            mark_failed(report, copy, problems[copy.name])
    for backup in gap.verified_since:
        if backup.name not in problems:
            note_verified(backup, second)
    known = [copy for copy in gap.there if copy.failed and copy.name not in problems]
    for copy in known:
        report.warn(
            f"copy of {copy.name}",
            f"remove it from {second.where} and run this again to copy it anew",
            value=f"failed its verification: {copy.failed}",
            expected="no failed verification",
        )
    if wanted:
        bad = [f"{name}: {problem}" for name, problem in problems.items()]
        report.require(
            f"existing copies of {gap.kind}",
            not bad,
            f"remove the bad copies from {second.where} and run this again",
            value="; ".join(bad[:3]) or f"{len(wanted)} read",
            expected="as in their manifests (SHA-256)",
        )
    return {*problems, *(copy.name for copy in known)}


def _copy(report: Report, backup: Backup, second: Store) -> Copied | None:
    """Copy one backup. An error is a finding, so the others are still copied; an unreachable store ends the run."""
    try:
        copied = copy_backup(backup, second)
        prove_copy.after(copied)(backup, second)
        return copied
    except Unreachable:
        raise
    except OpsError as error:
        report.fail(f"copy of {backup.name}", error.hint, value=error.message, expected="equal to the backup")
        return None


def _judge_newest(
    report: Report, env: Environment, second: Store, gap: Gap, copied: list[Copied], bad: set[str]
) -> None:
    kind = gap.kind
    names = {one.name for one in copied} | {copy.name for copy in gap.there} - bad
    there = [backup for backup in (*gap.there, *gap.missing) if backup.name in names]
    if not there:
        if gap.missing or bad:
            report.warn(f"newest copy of {kind}", "fix the findings above, then run this again", value="none")
        return
    newest = max(there, key=lambda backup: backup.manifest.taken)
    report.prefer(
        f"newest copy of {kind}",
        newest.age_seconds <= env.rpo_seconds or kind in ("schema", "tables", "sql"),
        "take backups more often, or copy them at once: losing this site loses that much data",
        value=f"{newest.name}, {duration(newest.age_seconds)} old, one of {len(there)} in {second.where}",
        expected=f"at most {duration(env.rpo_seconds)} old",
    )
