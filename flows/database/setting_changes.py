"""What apply- and undo-postgres-settings change, in which order, and what they leave alone (§1.3, §1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flows.database.setting_steps import RESTART, Overrides, needs
from runbook.errors import OpsError
from runbook.report import Report
from tasks.postgres.recommended import BY_NAME, MANUAL, Setting
from tasks.postgres.settings import Change, ServerSettings
from tasks.setting_records import Record


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
    report.expect(
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
