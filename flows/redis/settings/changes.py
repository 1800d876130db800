"""Which settings apply- and undo-redis-settings change, and which they keep (§2.3, §2.4)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blocks.environment import Environment
from flows.redis.settings.findings import remedy, value_of
from flows.setting_overrides import find_undone
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import size
from tasks.redis.persistence.place import inspect_place
from tasks.redis.settings.changes import ON, RESERVED_FILES, RedisSettingChange
from tasks.redis.settings.recommended import BY_NAME, KINDS, MAXMEMORY, normal, require_possible, same, shown
from tasks.redis.settings.running import AT_ONCE, RedisServerSettings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Record

_OVERRIDE = re.compile(r"\s*(?:redis-cli\s+)?(?:config\s+set\s+)?([a-z-]+)\s*(?:=|\s)\s*(.*?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class SettingsOrder:
    """The changes on one server, and whether to write its file, if it has one."""

    found: RedisServerSettings
    changes: tuple[RedisSettingChange, ...]
    rewrite: bool

    @property
    def has_file(self) -> bool:
        """Whether CONFIG REWRITE has a file to write."""
        return bool(self.found.server.config_file)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.changes and not (self.rewrite and self.has_file)


@dataclass(frozen=True)
class SettingsUndo:
    """How a record is undone. `left`: settings that somebody changed since."""

    record: Record
    order: SettingsOrder
    left: tuple[str, ...]

    @property
    def reopened(self) -> frozenset[str]:
        """The overrides that the record ended: they are in force again."""
        return frozenset(name for change in self.record.changes for name in change.ended)


def require_sense(names: Sequence[str], override: str) -> None:
    """Raises OpsError if the parameters contradict each other."""
    if names and override:
        raise OpsError("names and override exclude each other", "run it twice: with names, and with the override")
    if unknown := [name for name in names if name not in KINDS]:
        raise OpsError(f"the manual has no setting {', '.join(unknown)}", f"choose from {', '.join(BY_NAME)}")


def parse_override(text: str) -> RedisSettingChange:
    """`maxmemory 2gb` or `maxmemory = 2gb`, also with CONFIG SET before it.

    Raises:
        OpsError: the text is no valid override.
    """
    parted = _OVERRIDE.fullmatch(text)
    name = parted[1].lower() if parted else ""
    if not parted or name not in KINDS:
        raise OpsError(f"“{text[:60]}” is no override", f"write name = value, with one of {', '.join(KINDS)}")
    value = parted[2].strip("\"'")
    require_possible(name, value)
    if name in BY_NAME and same(name, value, BY_NAME[name].value):
        raise OpsError(f"{name} = {value} is the manual's value", f"run it with names={name} and without override")
    return RedisSettingChange(name, normal(name, value))


def order_override(
    report: Report, found: RedisServerSettings, change: RedisSettingChange, known: Sequence[Record]
) -> SettingsOrder:
    """One value for a time; an obstacle is CRITICAL. If it is already in force, it is prolonged."""
    name, running = change.name, found.running[change.name]
    if not same(name, running, change.value):
        if obstacle := obstacle_to(found, change):
            report.fail(
                f"{name} on {found.address}", obstacle[1], value=obstacle[0], expected=shown(name, change.value)
            )
        return SettingsOrder(found, (replace(change, old=running),), True)
    if before := records.overrides_in_force(known, found).get(name):
        replaced = before[0].change(name)
        return SettingsOrder(found, (replace(change, old=(replaced and replaced.old) or ""),), True)
    _report_kept(report, found, [(name, shown(name, running), "the server already has that value permanently")])
    return SettingsOrder(found, (), bool(found.unwritten()))


def order_manual(
    report: Report, env: Environment, found: RedisServerSettings, names: Sequence[str], known: Sequence[Record]
) -> SettingsOrder:
    """The manual's values for the named settings, or for all that need one; expired overrides are undone."""
    overrides = records.overrides_in_force(known, found)
    changes: list[RedisSettingChange] = []
    kept: list[tuple[str, str, str]] = []
    for name in dict.fromkeys(names or [*BY_NAME, *overrides]):
        aim = _aim(env, found, name, bool(names), known)
        if isinstance(aim, str):
            kept += [(name, shown(name, found.running[name]), aim)] if aim else []
        elif obstacle := obstacle_to(found, aim):
            expected = shown(name, aim.value)
            report.warn(f"{name} on {found.address}", obstacle[1], value=obstacle[0], expected=expected)
        else:
            changes.append(aim)
    _report_kept(report, found, kept)
    unseen = bool(found.problem and names)
    return SettingsOrder(found, _in_order(changes), bool(changes or unseen or found.unwritten()))


def _aim(
    env: Environment, found: RedisServerSettings, name: str, asked: bool, known: Sequence[Record]
) -> RedisSettingChange | str:
    """The change of a setting; or why it is kept, "" if no reason needs to be reported."""
    running, manual = found.running[name], BY_NAME[name].value if name in BY_NAME else ""
    chain = list(itertools.takewhile(lambda record: record.until, records.led_to(known, found, name)))
    ended = list(itertools.takewhile(lambda record: asked or record.is_expired, chain))
    value = manual
    if chain and not ended:
        return f"override until {chain[0].until}"
    if ended:
        oldest = ended[-1].change(name)
        base = (oldest and oldest.old) or ""
        # The value below can be another override in force; otherwise it must be an accepted one.
        value = base if not manual or chain[len(ended) :] or _is_accepted(env, found, name, base) else manual
    elif name == MAXMEMORY:
        return "no override of it is in force, and the manual has no value for it"
    elif KINDS[name] == "name":
        value = running if _is_accepted(env, found, name, running) else env.redis.data_directory
    elif not asked and _is_accepted(env, found, name, running):
        return "" if same(name, running, manual) else f"accepted; names={name} sets the manual's value"
    if same(name, running, value):
        return ""
    return RedisSettingChange(name, value, running, tuple(record.name for record in ended))


def _is_accepted(env: Environment, found: RedisServerSettings, name: str, value: str) -> bool:
    return value_of(env, replace(found, running={**found.running, name: value}), name).ok


def _report_kept(report: Report, found: RedisServerSettings, kept: Sequence[tuple[str, str, str]]) -> None:
    if kept:
        report.table(f"Kept on {found.address}", ("setting", "value", "why"), kept)


def _in_order(changes: Sequence[RedisSettingChange]) -> tuple[RedisSettingChange, ...]:
    """The AOF is switched on last: that takes long, and its limits must be set before."""
    return tuple(sorted(changes, key=lambda change: change == ON))


def order_undo(report: Report, found: RedisServerSettings, record: Record) -> SettingsUndo:
    """The changes that restore a record's old values."""
    undone, left = find_undone(report, found, record)
    changes = [RedisSettingChange(item.name, item.old or "") for item in undone]
    for change in changes:
        if obstacle := obstacle_to(found, change):
            expected = shown(change.name, change.value)
            report.fail(change.name, obstacle[1], value=obstacle[0], expected=expected)
    order = SettingsOrder(found, _in_order(changes), bool(changes) or not left)
    return SettingsUndo(record, order, tuple(left))


def obstacle_to(found: RedisServerSettings, change: RedisSettingChange) -> tuple[str, str] | None:
    """Why a value cannot or must not be set now, and the next step."""
    name, value = change.name, change.value
    how, runs = found.by.get(name, ""), f"{shown(name, found.running[name])} runs"
    if name == "dir":
        return runs, remedy(found, name)
    if KINDS[name] == "name":
        return runs, (
            "keep it: with another name a start finds no data and serves 0 keys. To rename: stop the server, rename "
            f"the file, change {name} in {found.server.config_file or 'its configuration file'}, start the server"
        )
    if how not in ("", AT_ONCE):
        return f"{runs}; takes effect by {how}", remedy(found, name)
    if name == "maxclients":
        return _too_many_or_few(found, int(value))
    if name == MAXMEMORY:
        return _too_much_or_little(found, int(normal(name, value)))
    return _no_space_for_aof(found) if change == ON else None


def _too_many_or_few(found: RedisServerSettings, value: int) -> tuple[str, str] | None:
    if value < found.connections + 1:
        hint = f"close some of the {found.connections} connections first (check-redis-clients)"
        return f"{value} is less than the current connections; new ones would be rejected", hint
    if 0 < found.most_files < value + RESERVED_FILES:
        most = found.most_files - RESERVED_FILES
        return f"its process can open {found.most_files} files: {most} clients at most", (
            f"raise LimitNOFILE in its unit (ulimit -n) to {value + RESERVED_FILES} or more and restart it. The server "
            "would refuse the value, and block its clients for a while before that"
        )
    return None


def _too_much_or_little(found: RedisServerSettings, value: int) -> tuple[str, str] | None:
    used, host = found.server.used_bytes, found.server.system_bytes
    if 0 < value < used:
        return f"{size(used)} are in use", (
            "free memory first (check-redis-memory, clear-cache): with less than the used memory, the server "
            "immediately evicts keys or refuses every write"
        )
    if host and value > host:
        return f"its host has {size(host)}", "choose less: the kernel would kill the server before it reaches that"
    return None


def _no_space_for_aof(found: RedisServerSettings) -> tuple[str, str] | None:
    place, needed = inspect_place(found.server), found.server.dataset_bytes
    if place.trouble:
        return place.trouble, place.remedy
    if not place.problem and place.free_bytes <= needed:
        return (
            f"{size(place.free_bytes)} are free",
            f"free disk space in {place.directory}: the AOF needs {size(needed)}",
        )
    return None
