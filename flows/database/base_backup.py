"""Base backups of the whole PostgreSQL cluster: what a recovery to a point in time starts from (§8.2)."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from blocks.environment import Environment
from flows.database import cluster_steps as steps
from flows.store import note, store_for, tell_backups, tidy
from runbook.render import size
from runbook.report import Report
from runbook.run import runbook
from tasks.catalogue import Backup
from tasks.cluster.base_backup import NoSummaries, Source, read_source
from tasks.cluster.content import Form
from tasks.stores.store import Store


@flow(name="backup-cluster", flow_run_name="backup-cluster {environment} {kind}")
def backup_cluster(environment: str, kind: Literal[Form, "auto"] = "full") -> Report:
    """クラスタ全体のベースバックアップ (§8.2)

    Takes a physical copy of the whole PostgreSQL cluster (pg_basebackup), with the WAL that it needs, verified by
    pg_verifybackup before it is offered. Together with the archived WAL it can be brought to any moment after it:
    restore-to-point. The full kind runs weekly. On the other days kind=auto takes an incremental one (PostgreSQL 17 and
    later with summarize_wal), a full one where there is no base for it, and none where the server cannot. Run the full
    kind after every failover and every swap of the cluster.

    It changes nothing in the database. An incremental one stands on the newest backup before it: prune-backups never
    removes what another stands on. Evidence: where it begins and ends in WAL, and whether the archive goes on from
    there.

    Departs from the manual, which knows dumps only: with those, everything since the last night is lost.

    Args:
        environment: 対象の環境
        kind: full 完全、incremental 直前のものからの差分 (PostgreSQL 17 以降)、auto 毎日の実行用 (可能なら差分)
    """
    env = Environment.find(environment)
    with runbook("Backup cluster", env, changes=True) as report:
        store = store_for(env, "cluster")
        source = read_source(env.postgres)
        form = steps.daily_form(report, env, store, source) if kind == "auto" else kind
        if form is None:
            report.outcome = f"nothing to take: {report.facts[steps.NO_INCREMENTAL]}; the weekly full backups are kept"
            return report
        steps.judge_source(report, env, source, form)
        report.fail_if_critical()
        tidy(report, env, store)
        try:
            backup = _take(report, env, store, source, form)
        except NoSummaries as error:
            if kind != "auto":
                raise
            report.warn("incremental base backup", "nothing: a full one was taken instead", value=error.message)
            tidy(report, env, store)
            backup = _take(report, env, store, source, "full")
        steps.judge_archive(report, env, backup)
        report.outcome = f"{backup.name} is in the store, verified by pg_verifybackup"
        report.fact("backup", backup.name)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        tell_backups(report, env)
    return report


def _take(report: Report, env: Environment, store: Store, source: Source, form: Form) -> Backup:
    own = not steps.by_pgbackrest(env)
    base = steps.choose_base(report, env, store, source) if form == "incremental" and own else None
    if own:
        steps.judge_room(report, store, source, base)
    report.fail_if_critical()
    return steps.take(report, env, store, source, base, form)
