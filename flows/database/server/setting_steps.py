"""Judgement of PostgreSQL's settings against the manual's and the temporary overrides (§1.3, §1.5)."""

from __future__ import annotations

from collections.abc import Mapping

from blocks.environment import Environment
from runbook.report import Report, Status
from tasks.postgres.server.recommended import BY_NAME, MANUAL, Setting
from tasks.postgres.server.settings import ServerSettings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Record

APPLY, UNDO = "apply-postgres-settings", "undo-postgres-settings"
RESTART = "restart PostgreSQL in a maintenance window"
Overrides = Mapping[str, tuple[Record, str]]


def _value_for(name: str, overrides: Overrides) -> str:
    """The manual's value, or that of an override whose time is not over."""
    if name in overrides and not overrides[name][0].is_expired:
        return overrides[name][1]
    return MANUAL[name]


def needs(setting: Setting) -> str:
    """By what a change takes effect."""
    if setting.is_fixed:
        return "another start command"
    return "restart" if setting.needs_restart else "reload"


def find_overrides(env: Environment, found: ServerSettings) -> Overrides:
    """The environment's temporary values that are in force on this server, expired or not; those that somebody replaced
    are closed."""
    records.close_replaced(env.reports_directory, found)
    return records.overrides_in_force(records.read_all(env.reports_directory), found)


def judge_setting(report: Report, setting: Setting, overrides: Overrides) -> bool:
    """Whether it runs with what it should: the manual's value or one that is as well, or exactly an override's."""
    wanted = _value_for(setting.name, overrides)
    exact = setting.name in overrides

    def suits(value: str) -> bool:
        return setting.same(value, wanted) if exact else setting.is_well(value)

    running, coming = suits(setting.value), suits(setting.coming)
    well = running and setting.same(setting.value, setting.coming)
    what = "restart" if setting.needs_restart else "reload"
    value, hint = setting.shown, f"{APPLY} with names={setting.name} (takes effect by {needs(setting)})"
    if setting.is_narrower:
        hint = f"ALTER ROLE … RESET {setting.name} for the administrator: his own value hides the server's"
        report.warn(f"{setting.name} not measured", hint, value=f"set by {setting.source}", expected=wanted)
        return False
    if running and not well:
        value = f"{setting.filed} after the next {what}"
    if coming:
        hint = RESTART if setting.needs_restart else "SELECT pg_reload_conf()"
    elif setting.is_fixed:
        hint = f"correct the server's start command (source: {setting.source}): it stands above ALTER SYSTEM"
    worst = Status.CRITICAL if setting.name == "autovacuum" and not running else Status.WARN
    expected = wanted if exact else BY_NAME[setting.name]
    return report.require(setting.name, well, hint, value=value, expected=expected, worst=worst)


def tell_settings(report: Report, found: ServerSettings, overrides: Overrides) -> None:
    """All of them as a table; those that this server does not have are not measured."""
    if missing := [name for name in MANUAL if name not in found.by_name]:
        report.warn("not measured", "look whether this version of PostgreSQL renamed them", value=", ".join(missing))
    rows = [
        (s.name, s.shown, _value_for(name, overrides), BY_NAME[name].section, s.source, needs(s), _note(s, overrides))
        for name in MANUAL
        if (s := found.by_name.get(name))
    ]
    report.table("Settings", ("setting", "running", "wanted", "section", "source", "takes effect by", "note"), rows)


def _note(setting: Setting, overrides: Overrides) -> str:
    waits = setting.pending_restart and not setting.is_fixed
    notes = [f"waits for a restart: {setting.filed or 'the default'}"] if waits else []
    if setting.name not in overrides and not setting.is_value(MANUAL[setting.name]) and setting.is_well(setting.value):
        notes.append(f"as well: the manual has {BY_NAME[setting.name]}")
    if setting.name in overrides:
        record = overrides[setting.name][0]
        notes.append(f"override {'expired' if record.is_expired else 'until'} {record.until}")
    return "; ".join(notes)


def judge_files(report: Report, found: ServerSettings) -> None:
    """An error in a configuration file stops every reload."""
    report.require(
        "configuration files",
        not found.file_errors,
        "correct that line: until then a reload takes nothing over and a restart fails",
        value="; ".join(found.file_errors[:3]) or "no errors",
    )


def judge_overrides(report: Report, found: ServerSettings, overrides: Overrides) -> None:
    """Temporary values that still stand: each has its time."""
    for name, (record, value) in overrides.items():
        setting = found.by_name.get(name)
        if setting and setting.is_filed(value):
            report.prefer(
                f"override {name} = {value}",
                not record.is_expired,
                f"{UNDO} with record={record.name}, or {APPLY} with names={name} for the manual's value",
                value=f"until {record.until}" + (f" ({record.reason})" if record.reason else ""),
                expected="removed when its time is over",
            )


def judge_narrower(report: Report, env: Environment, found: ServerSettings) -> None:
    """Values for a database or a role, which stand above the server's."""
    rows = [(item.where, item.name, item.value) for item in found.narrower]
    if rows:
        report.table("Other values for a database or role", ("where", "setting", "value"), rows[:50])
    mine = (env.postgres.database, env.postgres.user)
    ours = [item for item in found.narrower if any(item.where.endswith(f" {name}") for name in mine)]
    if ours:
        hint = "ALTER DATABASE or ALTER ROLE … RESET, unless it is meant: the application does not use the server's"
        report.warn("other values for the application", hint, value=f"{ours[0].name} = {ours[0].value} …")
