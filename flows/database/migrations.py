"""Alembic's migrations (§1.1): checked, applied, rolled back, created."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.database import expectations
from flows.database.migration import rehearsal, steps
from flows.database.migration.rehearsal import expect_sound
from flows.database.migration.review import find_unfinished, judge_new, rehearse_new, scratch_at
from flows.database.migration.steps import carry_out
from flows.pinned import pin_database
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.migrations.alembic import MIGRATE, Undo, Upgrade, downgrade, read_revision, upgrade
from tasks.migrations.revision import check_message, create_revision
from tasks.migrations.scripts import BASE, read_heads
from tasks.postgres.server.server import read_database_bytes

Seconds = Annotated[float, Field(ge=0, le=86400)]


@flow(name="check-migrations", flow_run_name="check-migrations {environment}")
def check_migrations(environment: str, rehearse: bool = False, longest_lock_seconds: Seconds = 10.0) -> Report:
    """マイグレーションの適用: 状態と履歴の確認 (§1.1)

    Says at which revision the database is, which migrations are pending, the history and the heads, and which scripts
    have no downgrade that does anything. Alembic imports the scripts for that (their top level runs, as in `alembic
    history`); upgrade and downgrade are read, not run. Run it before a release, and whenever one failed.

    It changes nothing. With `rehearse` what is pending runs on a scratch copy (up, down, up), which is dropped:
    that needs twice the database's space, and tells the locks, and what is lost, before anybody confirms. Evidence:
    history, locks, losses.

    Departs from the manual: `alembic history` does not show that a downgrade is empty.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        rehearse: 未適用のマイグレーションを複製データベースで試す
        longest_lock_seconds: これより長く他を待たせるロックを警告
    """
    env = Environment.find(environment)
    with runbook("Check migrations", env, changes=rehearse) as report:
        current = read_revision(env.postgres, env.postgres.database)
        heads = read_heads(env.application)
        steps.judge_heads(report, heads, current)
        applied = heads.applied(current)
        steps.tell_history(report, heads, applied, current)
        pending = [script for script in reversed(heads.scripts) if script.revision not in applied]
        report.prefer(
            "pending migrations",
            not pending,
            "apply-migrations shows the plan, and applies them",
            value=", ".join(s.revision for s in pending[:5]) or "none",
            expected="none",
        )
        steps.judge_downgrades(report, heads.scripts, Status.WARN)
        report.outcome = f"{env.postgres.database} is at {current or 'no revision'}, {len(pending)} pending"
        if pending and rehearse:
            rehearsal.judge_space(report, env, read_database_bytes(env.postgres, env.postgres.database))
            report.fail_if_critical()
            expectations.prepare(env)
            rehearsed = rehearsal.rehearse(
                report, env, current, heads.one(), first="up", longest=longest_lock_seconds, stops=False
            )
            steps.judge_upgrade(report, env, rehearsed)
    return report


@flow(name="apply-migrations", flow_run_name="apply-migrations {environment} {revision}")
def apply_migrations(
    environment: str, revision: str = "head", longest_lock_seconds: Seconds = 10.0, plan: str = "", confirm: str = ""
) -> Report:
    """マイグレーションの適用 (§1.1)

    Brings the application's database to a revision of Alembic's, newest by default. Run it with a release that has new
    migrations. Without `confirm` it says which are pending and changes nothing; where none is, it is OK at once.

    First they run on a scratch copy of the database: up, down, up. What fails there, or holds a lock too long, ends the
    run with the live database untouched; what is lost there is told. Only what was rehearsed runs. In production it
    needs a verified backup younger than the RPO, or takes one. To undo: rollback-migrations, or that backup. Evidence:
    the locks, the losses, the revision, the schema as rehearsed, the expectations on the migrated data.

    Departs from the manual: several heads are an error; a migration that waits 10 s for a lock gives up (where env.py's
    driver ignores PGOPTIONS, as asyncpg does, the rehearsal says that it will not).

    Args:
        environment: 対象の環境 (lab, staging, production …)
        revision: head、+1 (次の一つ)、またはリビジョンの ID (先頭の数文字でもよい)
        longest_lock_seconds: 複製でこれより長く他を待たせるロックがあれば本番に触れず中止
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するときは環境名を入力。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Apply migrations", env, confirm, plan, changes=True) as report:
        name = env.postgres.database
        current, heads = read_revision(env.postgres, name), read_heads(env.application)
        pending = steps.judge_pending(report, heads, current, revision)
        if not pending:
            report.outcome = f"nothing is pending: {name} is at {current or 'no revision'}"
            return report
        report.pin("revision", pending[-1].revision)
        expectations.prepare(env)
        steps.judge_downgrades(report, pending, Status.WARN)
        size = read_database_bytes(env.postgres, name)
        rehearsal.judge_space(report, env, size)
        steps.plan_rehearsal(report, env, size, "up, down, up")
        steps.plan_backup(report, env)
        for script in pending:
            report.plan("migrate", f"{', '.join(script.down) or 'nothing'} → {script.revision}: {script.title}")
        sound = ", expectations on the migrated data" * bool(env.suites)
        report.plan("check", f"revision, schema as rehearsed{sound}", seconds=2)
        pin_database(report, env.postgres)
        report.pin_state("revision of the database", current or BASE)
        permit = report.permit(Act(MIGRATE, name))
        report.state_is(f"{name} was not touched: it is at {current or BASE}", "put that right, then launch this again")
        target = pending[-1].revision
        rehearsed = rehearsal.rehearse(report, env, current, target, first="up", longest=longest_lock_seconds)
        steps.judge_upgrade(report, env, rehearsed)
        steps.secure_backup(report, env)
        ends, judged = (current, target), Upgrade(current, pending)
        carry_out(
            report,
            env,
            pending,
            ends,
            rehearsed,
            lambda: upgrade(permit, env.postgres, env.application, name, target, rehearsed=judged),
        )
        expect_sound(report, env, name, "after it")
        report.outcome = f"{name} is at {target}"
    return report


@flow(name="rollback-migrations", flow_run_name="rollback-migrations {environment} {revision}")
def rollback_migrations(
    environment: str,
    revision: str = "-1",
    lose_rows: Annotated[int, Field(ge=0)] = 0,
    longest_lock_seconds: Seconds = 10.0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """マイグレーションのロールバック (§1.1)

    Takes the application's database back to an older revision: one step, several, a named one, or base (nothing). Run
    it when a release is taken back, after the older code was deployed: newer code may not run on an older schema.

    Already the plan goes down, up, down on a scratch copy: only so it can say which rows and columns are lost. To lose
    data, type the number of rows that go or lose what is in a dropped column. An empty downgrade on the way is refused.
    In production it needs a verified backup younger than the RPO, or takes one. To undo: apply-migrations (the schema),
    that backup (what was lost). Evidence: what is lost, the locks, the revision.

    Departs from the manual: `downgrade base` deletes everything without a word.

    Args:
        environment: 対象の環境
        revision: -1 (一つ前)、-2 …、リビジョンの ID (先頭の数文字でもよい)、または base (初期状態)
        lose_rows: データが失われてもよい行数 (削除される行 + 削除列に値がある行。計画に表示される数)
        longest_lock_seconds: 複製でこれより長く他を待たせるロックがあれば中止
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Rollback migrations", env, confirm, plan, changes=True) as report:
        name = env.postgres.database
        current, heads = read_revision(env.postgres, name), read_heads(env.application)
        report.fact("revision of the database", current or "none")
        target, gone = heads.undone(current, revision)
        if not gone:
            report.outcome = f"nothing to roll back: {name} is at {current or BASE}"
            return report
        report.pin("revision", target or BASE)
        report.state_is(f"{name} was not touched: it is at {current}", "put that right, then launch this again")
        steps.judge_downgrades(report, gone, Status.CRITICAL)
        size = read_database_bytes(env.postgres, name)
        rehearsal.judge_space(report, env, size)
        steps.judge_backend(report, env, target)
        report.fail_if_critical()
        rehearsed = rehearsal.rehearse(report, env, current, target, first="down", longest=longest_lock_seconds)
        undo = steps.judge_losses(report, env, rehearsed, Undo(current, target, gone), lose_rows)
        steps.plan_rehearsal(report, env, size, "down, up, down, again")
        steps.plan_backup(report, env)
        for script in gone:
            report.plan("roll back", f"{script.revision} → {', '.join(script.down) or BASE}: {script.title}")
        pin_database(report, env.postgres, replaced=True)
        report.pin_state("revision of the database", current or BASE)
        permit = report.permit(undo.act(name))
        steps.secure_backup(report, env)
        ends = current, target
        carry_out(report, env, gone, ends, rehearsed, lambda: downgrade(permit, env.postgres, env.application, undo))
        report.outcome = f"{name} is at {target or BASE}"
    return report


@flow(name="create-migration", flow_run_name="create-migration {environment}")
def create_migration(environment: str, message: str = "", autogenerate: bool = True) -> Report:
    """新規マイグレーションの作成 (§1.1)

    Writes a new migration into the application's directory: generated from what its models have and its migrations do
    not make, or empty. Run it on development, in the repository. The same message again judges the file that is there.

    It is not done while upgrade or downgrade are empty, or up, down, up does not lead back on an empty scratch
    database: the run is CRITICAL until then. No live data is read or changed; to undo, delete the file. Evidence: the
    file, and the table of what autogenerate misses.

    Departs from the manual: the models are compared with a scratch database at head, not with a live one.

    Args:
        environment: 対象の環境 (本番では作成できない)
        message: 説明メッセージ (必須、1 行)
        autogenerate: モデルとの差分から生成する。false なら空のファイル
    """
    env = Environment.find(environment)
    with runbook("Create migration", env, changes=True) as report:
        title = check_message(message)
        if env.tier == "production":
            raise OpsError(
                f"{env.name} is production: migrations are created in the repository, and come here with a release",
                "launch this on development, review and commit the file, deploy it",
            )
        heads = read_heads(env.application)
        current = read_revision(env.postgres, env.postgres.database)
        steps.judge_heads(report, heads, current)
        report.fail_if_critical()
        script = there = find_unfinished(heads, heads.applied(current), title)
        if there or autogenerate:
            with scratch_at(report, env, next(iter(there.down if there else heads.names), "")) as scratch:
                script = there or create_revision(env.postgres, env.application, title, scratch)
                if script and script.upgrade == script.downgrade == "written":
                    rehearse_new(report, env, scratch, script)
        else:
            script = create_revision(env.postgres, env.application, title)
        if not script:
            report.outcome = (
                "nothing was created: models and migrations agree (what autogenerate does not see: write by hand)"
            )
            return report
        judge_new(report, script, generated=autogenerate and not there)
        report.outcome = f"{script.path.name}: " + ("judged again" if there else "created, to be reviewed")
    return report
