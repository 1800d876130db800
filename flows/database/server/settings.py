"""PostgreSQL's settings: compared with the manual's, applied, temporarily overridden, undone (§1.3, §1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.setting_overrides import Overrides, find_overrides, find_undone, judge_overrides
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.postgres.server.recommended import BY_NAME, MANUAL, RecommendedSetting
from tasks.postgres.server.settings import (
    PostgresServerSettings,
    PostgresSettingChange,
    alter_system,
    read_settings,
)
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Changed

MOST_HOURS = 168
APPLY, UNDO = "apply-postgres-settings", "undo-postgres-settings"
SET = "set the manual's value"
RESTART = "restart PostgreSQL in a maintenance window"


@flow(name="check-postgres-settings", flow_run_name=RunName("check-postgres-settings {environment}"))
def check_postgres_settings(environment: str) -> Report:
    """postgresql.conf推奨設定の確認・VACUUM設定チューニング (§1.5, §1.3)

    Compares the running values with the manual's 7 autovacuum and 12 server settings. Shows whether a change needs a
    reload or a restart, which values wait for one, and which temporary overrides are in force or expired. Run it
    monthly, and after every change of the server.

    It changes nothing; there is nothing to undo. Evidence: the table of settings with the source of each.

    Departs from the manual: it reads the running values, not the files. The manual's values for memory, connections and
    WAL are minima: higher ones are accepted, and so is a more eager autovacuum.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check PostgreSQL settings", env) as report:
        found = read_settings(env.postgres)
        overrides = find_overrides(env, found)
        judge_files(report, found)
        judge_overrides(report, found, overrides, apply=Next(APPLY, SET), undo=UNDO)
        same = [judge_setting(report, setting, overrides) for setting in found.by_name.values()]
        show_settings(report, found, overrides)
        judge_narrower(report, env, found)
        report.outcome = f"{sum(same)} of {len(MANUAL)} settings have an accepted value"
    return report


@flow(name="apply-postgres-settings", flow_run_name=RunName("apply-postgres-settings {environment} {names}"))
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

    Sets the values that check-postgres-settings reports (ALTER SYSTEM, then a reload), or sets one value for a limited
    time (`override`, such as the manual's `max_connections = 300`). An expired override returns to the manual's value.
    It keeps an override in force, and a higher value or a more eager autovacuum unless `names` has it.

    It never restarts the server; it names the settings that need one. To undo: undo-postgres-settings with the record,
    which is written first. Evidence: old and new values, and the values in effect.

    Departs from the manual: ALTER SYSTEM SET max_connections has no effect until a restart.

    Args:
        environment: Environment (lab, staging, production …)
        names: Settings. Empty: all that are missing (a value above the recommended one is lowered only if it is named
            here)
        override: Temporary settings (e.g. max_connections = 300). Empty: apply the manual's values
        override_hours: How long the temporary settings are valid, in hours
        reason: Reason for the temporary settings, for the record. May be empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
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
            report.outcome = "nothing to change"
            return report
        judge_order(report, found, wanted)
        altering = _altering(env, found, changes, "the configuration")
        with carrying_out(report, altering, effect=_effect(changes, UNDO)) as carry:
            if changes:
                pairs = [Changed(c.name, found.by_name[c.name].auto, wanted[c.name]) for c in changes]
                hours = override_hours if override else 0
                kept = records.keep(env.reports_directory, found.identity, pairs, hours=hours, reason=reason)
                report.fact("record of the old values", f"{kept.name} (to undo: {UNDO} with record={kept.name})")
                if kept.until:
                    report.fact("override until", kept.until)
            show_effect(report, carry(altering))
        records.close_replaced(env.reports_directory, read_settings(env.postgres), at_once=True)
        report.outcome = f"{len(changes)} settings written, configuration reloaded"
    return report


@flow(name="undo-postgres-settings", flow_run_name=RunName("undo-postgres-settings {environment} {record}"))
def undo_postgres_settings(environment: str, record: str = "", plan: str = "", confirm: str = "") -> Report:
    """postgresql.conf推奨設定の復元 (§1.5)

    Restores the values that apply-postgres-settings replaced: the earlier ALTER SYSTEM value, or none, so that
    postgresql.conf applies again. Run it when a setting causes harm, or when an override is no longer needed.

    It keeps and names a setting that somebody changed since. It never restarts the server. To undo:
    apply-postgres-settings. Evidence: old and new values, and the values in effect.

    Args:
        environment: Environment (lab, staging, production …)
        record: Name of the record to undo. Empty: the newest
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Undo PostgreSQL settings", env, confirm, plan, changes=True, name="undo-postgres-settings") as report:
        found = read_settings(env.postgres)
        chosen = records.find_record(records.read_all(env.reports_directory), found.identity, record)
        report.fact("record", f"{chosen.name} of {chosen.taken}")
        report.pin("record", chosen.name)
        undone, left = find_undone(report, found, chosen)
        changes = [PostgresSettingChange(item.name, item.old) for item in undone]
        if left and not changes:
            report.outcome = "nothing to undo"
            return report
        judge_order(report, found, {change.name: change.value for change in changes if change.value is not None})
        altering = _altering(env, found, changes, f"the configuration; record {chosen.name} is undone then")
        with carrying_out(report, altering, effect=_effect(changes, APPLY)) as carry:
            show_effect(report, carry(altering))
        records.close_replaced(env.reports_directory, read_settings(env.postgres), at_once=True)
        if not left:
            records.mark_undone(env.reports_directory, chosen)
        report.outcome = f"{len(changes)} settings restored, configuration reloaded"
    return report


def _value_for(name: str, overrides: Overrides) -> str:
    """The manual's value, or that of an override that has not expired."""
    if name in overrides and not overrides[name][0].is_expired:
        return overrides[name][1]
    return MANUAL[name]


def needs(setting: RecommendedSetting) -> str:
    """How a change takes effect."""
    if setting.is_fixed:
        return "another start command"
    return "restart" if setting.needs_restart else "reload"


def judge_setting(report: Report, setting: RecommendedSetting, overrides: Overrides) -> bool:
    """Whether the server runs with an accepted value: the manual's or a better one, or exactly an override's."""
    wanted = _value_for(setting.name, overrides)
    exact = setting.name in overrides

    def accepts(value: str) -> bool:
        return setting.same(value, wanted) if exact else setting.is_accepted(value)

    running, coming = accepts(setting.value), accepts(setting.coming)
    ok = running and setting.same(setting.value, setting.coming)
    value, hint, follow = (
        setting.shown,
        f"run {APPLY} with names={setting.name} (takes effect by {needs(setting)})",
        list[Next](),
    )
    if setting.is_narrower:
        hint = f"ALTER ROLE … RESET {setting.name} for the administrator: the role's setting overrides the server's"
        report.warn(f"{setting.name} not measured", hint, value=f"set by {setting.source}", expected=wanted)
        return False
    if running and not ok:
        value = f"{setting.filed} after the next {'restart' if setting.needs_restart else 'reload'}"
    if coming:
        hint = RESTART if setting.needs_restart else "SELECT pg_reload_conf()"
    elif setting.is_fixed:
        hint = f"correct the server's start command ({setting.source}): it overrides ALTER SYSTEM"
    else:
        follow = [Next(APPLY, SET, {"names": [setting.name]})]
    worst = Status.CRITICAL if setting.name == "autovacuum" and not running else Status.WARN
    expected = wanted if exact else BY_NAME[setting.name]
    return report.require(setting.name, ok, hint, value=value, expected=expected, worst=worst, follow=follow)


def show_settings(report: Report, found: PostgresServerSettings, overrides: Overrides) -> None:
    """A table of all settings; those that this server lacks are not measured."""
    if missing := [name for name in MANUAL if name not in found.by_name]:
        hint = "check whether this version of PostgreSQL renamed them"
        report.warn("not measured", hint, value=", ".join(missing))
    rows = [
        (s.name, s.shown, _value_for(name, overrides), BY_NAME[name].section, s.source, needs(s), _note(s, overrides))
        for name in MANUAL
        if (s := found.by_name.get(name))
    ]
    report.table("Settings", ("setting", "running", "wanted", "section", "set by", "takes effect by", "note"), rows)


def _note(setting: RecommendedSetting, overrides: Overrides) -> str:
    waits = setting.pending_restart and not setting.is_fixed
    notes = [f"waits for a restart: {setting.filed or 'the default'}"] if waits else []
    manual = setting.is_value(MANUAL[setting.name])
    if setting.name not in overrides and not manual and setting.is_accepted(setting.value):
        notes.append(f"accepted: the manual has {BY_NAME[setting.name]}")
    if setting.name in overrides:
        record = overrides[setting.name][0]
        notes.append(f"override {'expired' if record.is_expired else 'until'} {record.until}")
    return "; ".join(notes)


def judge_files(report: Report, found: PostgresServerSettings) -> None:
    """Whether the configuration files have an error, which stops every reload."""
    report.require(
        "configuration files",
        not found.file_errors,
        "correct that line: until then a reload changes nothing and a restart fails",
        value="; ".join(found.file_errors[:3]) or "no errors",
        expected="no errors",
    )


def judge_narrower(report: Report, env: Environment, found: PostgresServerSettings) -> None:
    """Values of a database or a role, which override the server's."""
    rows = [(item.where, item.name, item.value) for item in found.narrower]
    if rows:
        report.table("Values of a database or role", ("where", "setting", "value"), rows, most=50)
    mine = (env.postgres.database, env.postgres.user)
    ours = [item for item in found.narrower if any(item.where.endswith(f" {name}") for name in mine)]
    if ours:
        hint = (
            "ALTER DATABASE or ALTER ROLE … RESET, unless it is intended: it overrides the server's for the application"
        )
        report.warn("other values for the application", hint, value=f"{ours[0].name} = {ours[0].value} …")


def parse_override(found: PostgresServerSettings, override: str) -> dict[str, str]:
    """Parse and check an override such as `max_connections = 300`.

    Raises:
        OpsError: it is not valid, or it would have no effect.
    """
    name, separator, value = (part.strip() for part in override.partition("="))
    if not separator or name not in found.by_name or not value:
        raise OpsError(f"“{override[:60]}” is not an override", f"write name = value, with one of {', '.join(MANUAL)}")
    setting = found.by_name[name]
    setting.require_possible(value)
    if setting.is_fixed:
        raise OpsError(
            f"{name} is set by the {setting.source}", "ALTER SYSTEM has no effect: correct the start command"
        )
    if setting.same(value, MANUAL[name]):
        raise OpsError(f"{name} = {value} is the manual's value", f"run it with names={name} and no override")
    return {name: value}


def find_wanted(
    report: Report, found: PostgresServerSettings, names: Sequence[str], overrides: Overrides
) -> dict[str, str]:
    """The manual's values for the named settings, or for all without an accepted value.

    A higher value on a bigger server is lowered only if `names` has it.

    Raises:
        OpsError: the manual has no such setting.
    """
    if unknown := [name for name in names if name not in found.by_name]:
        raise OpsError(f"the manual has no setting {', '.join(unknown)}", f"choose from {', '.join(MANUAL)}")
    wanted: dict[str, str] = {}
    left = []
    for name in names or found.by_name:
        setting, manual = found.by_name[name], BY_NAME[name]
        if name in overrides and not overrides[name][0].is_expired:
            left.append((name, overrides[name][1], manual, f"override until {overrides[name][0].until}"))
        elif names or name in overrides or not _is_more(setting):
            wanted[name] = manual.value
        else:
            left.append((name, setting.coming, manual, f"accepted; names={name} sets the manual's value"))
            wanted[name] = setting.coming  # it may wait for a reload
    if left:
        report.table("Kept", ("setting", "value", "manual", "why"), left)
    return wanted


def _is_more(setting: RecommendedSetting) -> bool:
    """Whether its value, now or after a reload, is accepted but not the manual's."""
    coming = setting.coming
    return not setting.is_narrower and setting.is_accepted(coming) and not setting.same(coming, MANUAL[setting.name])


def choose_changes(
    report: Report, found: PostgresServerSettings, wanted: Mapping[str, str]
) -> tuple[list[PostgresSettingChange], bool]:
    """The changes to write, and whether a value waits only for a reload."""
    changes, reload = [], False
    for name, value in wanted.items():
        setting = found.by_name[name]
        if setting.is_fixed:
            if not setting.is_value(value):
                hint = "correct the server's start command: it overrides ALTER SYSTEM"
                report.warn(name, hint, value=f"{setting.shown}, by {setting.source}", expected=value)
        elif not setting.same(setting.coming, value) or (setting.is_narrower and not setting.filed):
            changes.append(PostgresSettingChange(name, value))
        elif not setting.is_value(value) and not setting.needs_restart and not setting.is_narrower:
            reload = True
    return changes, reload


def judge_order(report: Report, found: PostgresServerSettings, wanted: Mapping[str, str]) -> None:
    """The limits of max_connections: the reserved connections, and primary before or after its standbys."""
    setting = found.by_name["max_connections"]
    if "max_connections" not in wanted or setting.same(setting.coming, wanted["max_connections"]):
        return
    new, old = float(setting.measure(wanted["max_connections"])), float(setting.measure(setting.value))
    report.require(
        "max_connections above the reserved ones",
        new > found.reserved,
        f"choose more than {found.reserved}: the server would not start again",
        value=int(new),
        expected=f"more than {found.reserved}",
    )
    if new < found.clients:
        hint = "close sessions or shrink the pools first"
        report.warn("max_connections below its use", hint, value=int(new), expected=f"at least {found.clients}")
    if found.in_recovery and new < old:
        hint = "lower the primary first: a standby with a lower value stops replaying"
        report.warn("this is a standby", hint, value=int(new))
    if found.standbys and new > old:
        hint = "raise it on the standbys first and restart them: with a lower value they stop replaying"
        report.warn("standbys", hint, value=int(new))


def _effect(changes: Sequence[PostgresSettingChange], undo: str) -> Effect:
    if not changes:
        return Effect("PostgreSQL reads its configuration again", "restore the files, then reload")
    return Effect(f"PostgreSQL's settings change: {first_of([change.name for change in changes])}", undo)


def _altering(
    env: Environment, found: PostgresServerSettings, changes: Sequence[PostgresSettingChange], reload: str
) -> Change[[], tuple[RecommendedSetting, ...]]:
    """Each setting with its current value, then the reload."""
    lines = [PlannedStep("ALTER SYSTEM", _planned(found.by_name[change.name], change)) for change in changes]
    first, *others = *lines, PlannedStep("reload", reload)
    return Change(
        alter_system.bind(env.postgres, changes),
        first.step,
        first.detail,
        more=others,
        pins=[lambda report: report.pin_state("cluster", found.identity)],
    )


def _planned(setting: RecommendedSetting, change: PostgresSettingChange) -> str:
    less = ", which is more" if change.value is not None and setting.is_lower(change.value) else ""
    return f"{change}; now {setting.shown}{less}; takes effect by {needs(setting)}"


def show_effect(report: Report, settings: tuple[RecommendedSetting, ...]) -> None:
    """The values in effect, and those that wait for a restart."""
    report.table(
        "In effect",
        ("setting", "running", "in the files", "waits for a restart"),
        [(s.name, s.shown, s.filed or "nothing", "yes" if s.pending_restart else "") for s in settings],
    )
    waiting = [setting.name for setting in settings if setting.pending_restart]
    if waiting:
        report.warn("waits for a restart", f"{RESTART}; until then the old values apply", value=", ".join(waiting))
