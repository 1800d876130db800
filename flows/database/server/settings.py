"""PostgreSQL's settings against the manual's: checked, applied, temporarily overridden, undone (§1.3, §1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.database.server.setting_steps import (
    RESTART,
    UNDO,
    Overrides,
    find_overrides,
    judge_files,
    judge_narrower,
    judge_overrides,
    judge_setting,
    needs,
    tell_settings,
)
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.server.recommended import BY_NAME, MANUAL, Setting
from tasks.postgres.server.settings import CHANGE, RELOAD, Change, ServerSettings, alter_system, read_settings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Changed, Record

MOST_HOURS = 168


@flow(name="check-postgres-settings", flow_run_name="check-postgres-settings {environment}")
def check_postgres_settings(environment: str) -> Report:
    """postgresql.conf推奨設定の確認・VACUUM設定チューニング (§1.5, §1.3)

    Compares what the server runs with to the manual's 7 autovacuum and 12 server settings, says which would need a
    reload and which a restart, what waits for one, and which temporary overrides are in force or expired. Run it
    monthly, and after every change of the server.

    It changes nothing; there is nothing to undo. Evidence: the table of settings with the source of each.

    Departs from the manual: read is what the server runs with, not what a file says. Its values for memory, connections
    and WAL are minima: more is well on a bigger server, and so is an autovacuum that is more eager.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check PostgreSQL settings", env) as report:
        found = read_settings(env.postgres)
        overrides = find_overrides(env, found)
        judge_files(report, found)
        judge_overrides(report, found, overrides)
        same = [judge_setting(report, setting, overrides) for setting in found.by_name.values()]
        tell_settings(report, found, overrides)
        judge_narrower(report, env, found)
        report.outcome = f"{sum(same)} of {len(MANUAL)} settings are as they should be"
    return report


@flow(name="apply-postgres-settings", flow_run_name="apply-postgres-settings {environment}")
def apply_postgres_settings(
    environment: str,
    names: tuple[str, ...] = (),
    override: str = "",
    override_hours: Annotated[int, Field(ge=1, le=MOST_HOURS)] = 24,
    reason: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """postgresql.conf推奨設定の適用・VACUUM設定チューニング (§1.5, §1.3)

    Sets what check-postgres-settings finds wrong by ALTER SYSTEM and reloads; or sets one value for a time (`override`,
    such as the manual's `max_connections = 300`). An override that has expired goes back to the manual's value; one in
    force is left alone, and so is a bigger server's higher value, or an eager autovacuum's, unless `names` has it.

    It never restarts the server: what needs that is said. To undo: undo-postgres-settings, with the record that is
    written first. Evidence: old and new values, and what is in effect.

    Departs from the manual: its ALTER SYSTEM SET max_connections with a reload alone has no effect until a restart.

    Args:
        environment: 対象の環境
        names: 対象の設定名。空なら不足している項目すべて (推奨値を上回る値は、ここで指定した場合だけ下げる)
        override: 一時的な設定。例 max_connections = 300。空ならマニュアルの値を適用
        override_hours: 一時的な設定の有効期間 (時間)
        reason: 一時的な設定の理由。記録に残る。空でもよい
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook(
        "Apply PostgreSQL settings", env, confirm, plan, changes=True, name="apply-postgres-settings"
    ) as report:
        found = read_settings(env.postgres)
        overrides = find_overrides(env, found)
        wanted = parse_override(found, override) if override else find_wanted(report, found, names, overrides)
        judge_files(report, found)
        changes, reload = choose_changes(report, found, wanted)
        if not changes and not reload:
            report.outcome = "there is nothing to change"
            return report
        judge_order(report, found, wanted)
        plan_changes(report, found, changes)
        report.pin_state("cluster", found.identity)
        permit = report.permit(*(Act(CHANGE, str(change)) for change in changes), Act(CHANGE, RELOAD))
        if changes:
            pairs = [Changed(c.name, found.by_name[c.name].auto, wanted[c.name]) for c in changes]
            hours = override_hours if override else 0
            kept = records.keep(env.reports_directory, found.identity, pairs, hours=hours, reason=reason)
            report.fact("record of the old values", f"{kept.name} (to undo: {UNDO} with record={kept.name})")
            if kept.until:
                report.fact("override until", kept.until)
        tell_done(report, alter_system(permit, env.postgres, changes))
        records.close_replaced(env.reports_directory, read_settings(env.postgres), at_once=True)
        report.outcome = f"{len(changes)} settings written, configuration reloaded"
    return report


@flow(name="undo-postgres-settings", flow_run_name="undo-postgres-settings {environment}")
def undo_postgres_settings(environment: str, record: str = "", plan: str = "", confirm: str = "") -> Report:
    """postgresql.conf推奨設定の復元 (§1.5)

    Puts back what apply-postgres-settings had replaced: the value that ALTER SYSTEM had written before, or none, so
    that postgresql.conf counts again. Run it when a setting does harm, or when an override is no longer needed.

    A setting that somebody changed since is left alone and named. It never restarts the server. To undo:
    apply-postgres-settings again. Evidence: old and new values, and what is in effect.

    Args:
        environment: 対象の環境
        record: 元に戻す記録の名前。空なら最新のもの
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Undo PostgreSQL settings", env, confirm, plan, changes=True, name="undo-postgres-settings") as report:
        found = read_settings(env.postgres)
        chosen = records.find_record(records.read_all(env.reports_directory), found.identity, record)
        report.fact("record", f"{chosen.name} of {chosen.taken}")
        report.pin("record", chosen.name)
        changes, left = find_undone(report, found, chosen)
        if left and not changes:
            report.outcome = "there is nothing that could be undone"
            return report
        judge_order(report, found, {change.name: change.value for change in changes if change.value is not None})
        plan_changes(report, found, changes)
        report.plan("reload", f"the configuration; record {chosen.name} is then undone")
        report.pin_state("cluster", found.identity)
        permit = report.permit(*(Act(CHANGE, str(change)) for change in changes), Act(CHANGE, RELOAD))
        tell_done(report, alter_system(permit, env.postgres, changes))
        records.close_replaced(env.reports_directory, read_settings(env.postgres), at_once=True)
        if not left:
            records.mark_undone(env.reports_directory, chosen)
        report.outcome = f"{len(changes)} settings are back, configuration reloaded"
    return report


def parse_override(found: ServerSettings, override: str) -> dict[str, str]:
    """`max_connections = 300`, checked.

    Raises:
        OpsError: it is no override, or it would have no effect.
    """
    name, separator, value = (part.strip() for part in override.partition("="))
    if not separator or name not in found.by_name or not value:
        raise OpsError(f"“{override[:60]}” is no override", f"write name = value, with one of {', '.join(MANUAL)}")
    setting = found.by_name[name]
    setting.require_possible(value)
    if setting.is_fixed:
        raise OpsError(
            f"{name} is set by the {setting.source}", "ALTER SYSTEM has no effect: correct the start command"
        )
    if setting.same(value, MANUAL[name]):
        raise OpsError(f"{name} = {value} is the manual's value", f"launch it with names={name} and no override")
    return {name: value}


def find_wanted(report: Report, found: ServerSettings, names: Sequence[str], overrides: Overrides) -> dict[str, str]:
    """The manual's values for what was named, or for all that is not as well with another value: only who names a
    setting lowers what a bigger server has more of.

    Raises:
        OpsError: the manual has no such setting.
    """
    if unknown := [name for name in names if name not in found.by_name]:
        raise OpsError(f"the manual has no setting {', '.join(unknown)}", f"choose of {', '.join(MANUAL)}")
    wanted: dict[str, str] = {}
    left = []
    for name in names or found.by_name:
        setting, manual = found.by_name[name], BY_NAME[name]
        if name in overrides and not overrides[name][0].is_expired:
            left.append((name, overrides[name][1], manual, f"override until {overrides[name][0].until}"))
        elif names or name in overrides or not _is_more(setting):
            wanted[name] = manual.value
        else:
            left.append((name, setting.coming, manual, f"as well; names={name} sets the manual's value"))
            wanted[name] = setting.coming  # it may wait for a reload
    if left:
        report.table("Left alone", ("setting", "value", "manual", "why"), left)
    return wanted


def _is_more(setting: Setting) -> bool:
    """Whether it has, or will have, another value than the manual's that is as well."""
    coming = setting.coming
    return not setting.is_narrower and setting.is_well(coming) and not setting.same(coming, MANUAL[setting.name])


def choose_changes(report: Report, found: ServerSettings, wanted: Mapping[str, str]) -> tuple[list[Change], bool]:
    """What is to be written, and whether anything waits for a reload only."""
    changes, reload = [], False
    for name, value in wanted.items():
        setting = found.by_name[name]
        if setting.is_fixed:
            if not setting.is_value(value):
                hint = "correct the server's start command: it stands above ALTER SYSTEM"
                report.warn(name, hint, value=f"{setting.shown}, by {setting.source}", expected=value)
        elif not setting.same(setting.coming, value) or (setting.is_narrower and not setting.filed):
            changes.append(Change(name, value))
        elif not setting.is_value(value) and not setting.needs_restart and not setting.is_narrower:
            reload = True
    return changes, reload


def judge_order(report: Report, found: ServerSettings, wanted: Mapping[str, str]) -> None:
    """max_connections: below the reserved ones no server starts; a standby below its primary refuses to replay."""
    setting = found.by_name["max_connections"]
    if "max_connections" not in wanted or setting.same(setting.coming, wanted["max_connections"]):
        return
    new, old = float(setting.measure(wanted["max_connections"])), float(setting.measure(setting.value))
    report.require(
        "max_connections above the reserved ones",
        new > found.reserved,
        f"choose more than {found.reserved}: the server would not start again",
        value=int(new),
    )
    if new < found.clients:
        report.warn("max_connections below its use", "close sessions or lower the pools first", value=found.clients)
    if found.in_recovery and new < old:
        report.warn("this is a standby", "lower the primary first: a standby below it stops replaying", value=int(new))
    if found.standbys and new > old:
        report.warn("standbys", "raise it on them first and restart them: below it they stop replaying", value=int(new))


def plan_changes(report: Report, found: ServerSettings, changes: Sequence[Change]) -> None:
    """One step each, with what it is now."""
    for change in changes:
        setting = found.by_name[change.name]
        less = ", which is more" if change.value is not None and setting.is_lower(change.value) else ""
        report.plan("ALTER SYSTEM", f"{change}; now {setting.shown}{less}; takes effect by {needs(setting)}")


def tell_done(report: Report, settings: Sequence[Setting]) -> None:
    """What is in effect, and what waits for a restart."""
    report.table(
        "In effect",
        ("setting", "running", "in the files", "waits for a restart"),
        [(s.name, s.shown, s.filed or "nothing", "yes" if s.pending_restart else "") for s in settings],
    )
    waiting = [setting.name for setting in settings if setting.pending_restart]
    if waiting:
        report.warn("waits for a restart", f"{RESTART}; until then the old values hold", value=", ".join(waiting))


def find_undone(report: Report, found: ServerSettings, record: Record) -> tuple[list[Change], bool]:
    """What brings the old values back, and whether a setting is left alone."""
    changes, left = [], False
    for item in record.changes:
        setting = found.by_name[item.name]
        if setting.is_filed(item.new):
            if item.old is None or not setting.is_filed(item.old):
                changes.append(Change(item.name, item.old))
        elif not (setting.auto is None if item.old is None else setting.is_filed(item.old)):
            left = True
            hint = "undo the newer record first, or set it yourself"
            report.warn(f"{item.name} left alone", hint, value=f"{setting.auto or 'reset'} since", expected=item.new)
    return changes, left
