"""A second place for all backups, in another region (§1.2, §8.1)."""

from __future__ import annotations

from typing import Literal, get_args

from prefect import flow

from blocks.environment import Environment
from flows.store import note, store_for, tell_backups, tidy
from runbook.errors import OpsError, VerificationFailed
from runbook.render import duration, size
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.catalogue import Backup
from tasks.manifest import Kind
from tasks.replicas import Copied, Gap, copy_backup, note_verified, prove_copy, read_copies, read_gap
from tasks.stores.store import Store

MOST_SHOWN = 50
Reading = Literal["new", "all"]


@flow(name="replicate-backups", flow_run_name="replicate-backups {environment} {kind}")
def replicate_backups(environment: str, kind: Literal["all", Kind] = "all", read: Reading = "new") -> Report:
    """バックアップの複製 (§1.2, §8.1)

    Copies every backup that the second set of stores (`[copies]`, best in another region) lacks: of the database, of
    Redis, of the files. Each copy is read back and compared by SHA-256. Run it daily, after the backups: a fire in one
    place must not take both.

    It adds and never deletes (prune-backups with source=copies does). Interrupted and launched again, it goes on.
    Evidence: what was copied, what is where, and how old the newest copy is.

    Departs from the manual: it keeps its backups on the host that they are backups of.

    Args:
        environment: 対象の環境
        kind: バックアップの種類。all はすべて
        read: 読み戻して照合する範囲。new は今回の複製、all は既存の複製もすべて
    """
    env = Environment.find(environment)
    with runbook("Replicate backups", env, changes=True) as report:
        if not env.has("copies"):
            raise OpsError(f"{env.name} has no second place for backups", "add [copies] to its TOML and register it")
        if kind != "all" and kind not in get_args(Kind):
            raise OpsError(f"kind is “{kind}”", f"choose all or one of {', '.join(get_args(Kind))}")
        report.fact("from", store_for(env, "postgres").where)
        report.fact("to", store_for(env, "postgres", "copies").where)
        copied = list[Copied]()
        for each in get_args(Kind) if kind == "all" else (kind,):
            copied += _replicate(report, env, each, read)
        report.table("Copied now", ("backup", "size", "seconds"),
                     [(one.name, size(one.bytes), f"{one.seconds:.1f}") for one in copied[-MOST_SHOWN:]])  # fmt: skip
        tell_backups(report, env)
        whole = sum(one.bytes for one in copied)
        if copied:
            note(report, env, f"Replicated {len(copied)} - {', '.join(one.name for one in copied)}, {size(whole)}")
        report.outcome = f"{len(copied)} copied, {size(whole)}" if copied else "every backup has its copy"
    return report


def _replicate(report: Report, env: Environment, kind: Kind, read: Reading) -> list[Copied]:
    first, second = store_for(env, kind), store_for(env, kind, "copies")
    tidy(report, env, second)
    gap = read_gap(first, second, kind, env.name)
    for name in gap.different:
        report.expect(f"copy of {name}", False, f"compare both manifests; one of them was altered: {first.where}, "
                      f"{second.where}", value="has another manifest", expected="the same")  # fmt: skip
    for name in gap.bad_copies:
        report.expect(f"copy of {name}", False, f"move it out of {second.where}, then launch this again: it is copied "
                      "anew", value="its manifest cannot be read", expected="a readable manifest")  # fmt: skip
    for name in gap.unreadable:
        report.warn(f"manifest of {name}", f"look at it in {first.where}; it is not copied", value="cannot be read")
    copied = [one for backup in gap.missing if (one := _copy(report, backup, second))]
    if read == "all":
        problems = read_copies(gap.there)
        report.expect(f"copies of {kind} that were there", not problems,
                      f"remove what is bad from {second.where} and launch this again", value="; ".join(problems[:3])
                      or f"{len(gap.there)} read", expected="as their manifests say (SHA-256)")  # fmt: skip
    for backup in gap.verified_since:
        note_verified(backup, second)
    _judge_newest(report, env, second, gap, copied)
    return copied


def _copy(report: Report, backup: Backup, second: Store) -> Copied | None:
    """One that is damaged must not keep the others from being copied."""
    try:
        copied = copy_backup(backup, second)
        prove_copy.after(copied)(backup, second)
        return copied
    except VerificationFailed as error:
        report.expect(f"copy of {backup.name}", False, error.hint, value=error.message, expected="equal to the backup")
        return None


def _judge_newest(report: Report, env: Environment, second: Store, gap: Gap, copied: list[Copied]) -> None:
    kind = gap.kind
    names = {one.name for one in copied}
    there = [*gap.there, *(backup for backup in gap.missing if backup.name in names)]
    if not there:
        if gap.missing:
            report.warn(f"newest copy of {kind}", "see above why none could be made", value="none")
        return
    newest = max(there, key=lambda backup: backup.manifest.taken)
    report.expect(
        f"newest copy of {kind}",
        newest.age_seconds <= env.rpo_seconds or kind in ("schema", "tables", "sql"),
        "take backups more often, or copy them at once: that much is lost when this place is",
        value=f"{newest.name}, {duration(newest.age_seconds)} old, one of {len(there)} in {second.where}",
        expected=f"at most {duration(env.rpo_seconds)} old",
        otherwise=Status.WARN,
    )
