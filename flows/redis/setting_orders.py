"""What apply- and undo-redis-settings are to change, and what they leave alone (§2.3, §2.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blocks.environment import Environment
from flows.redis.setting_findings import Overrides, find_overrides, remedy, value_of
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import size
from runbook.report import Report
from tasks import setting_records as records
from tasks.redis.persistence.place import look_at
from tasks.redis.settings.changes import RESERVED_FILES, REWRITE, SET, Change, act_of
from tasks.redis.settings.recommended import BY_NAME, KINDS, MAXMEMORY, normal, require_possible, same
from tasks.redis.settings.running import AT_ONCE, ServerSettings
from tasks.setting_records import Record

ON, OFF = Change("appendonly", "yes"), Change("appendonly", "no")


@dataclass(frozen=True)
class Order:
    """What is to be done on one server: its changes, and whether its file is to be written. `ended` are the expired
    overrides that this puts an end to."""

    found: ServerSettings
    changes: tuple[Change, ...]
    rewrite: bool
    ended: tuple[Record, ...] = ()

    @property
    def acts(self) -> tuple[Act, ...]:
        """What a permit must name."""
        address = self.found.address
        return (*(Act(SET, act_of(address, change)) for change in self.changes), Act(REWRITE, address))


def parse_override(text: str) -> Change:
    """`maxmemory 2gb` or `maxmemory = 2gb`, checked.

    Raises:
        OpsError: it is no override.
    """
    parted = re.fullmatch(r"\s*([a-z-]+)\s*(?:=|\s)\s*(.*?)\s*", text)
    if not parted or (parted[1] != MAXMEMORY and parted[1] not in BY_NAME):
        known = ", ".join((MAXMEMORY, *BY_NAME))
        raise OpsError(f"“{text[:60]}” is no override", f"write name = value, with one of {known}")
    name, value = parted[1], parted[2].strip("\"'")
    require_possible(name, value)
    if name in BY_NAME and same(name, value, BY_NAME[name].value):
        raise OpsError(f"{name} = {value} is the manual's value", f"launch it with names={name} and no override")
    return Change(name, normal(name, value))


def order_override(report: Report, found: ServerSettings, change: Change) -> Order:
    """One value for a time; what speaks against it is critical."""
    if same(change.name, found.running[change.name], change.value):
        left = [(change.name, found.running[change.name], "it runs with that value already")]
        report.table(f"Left alone on {found.address}", ("setting", "value", "why"), left)
        return Order(found, (), bool(found.unwritten()))
    if obstacle := obstacle_to(found, change):
        name = f"{change.name} on {found.address}"
        report.expect(name, False, obstacle[1], value=obstacle[0], expected=change.value)
    return Order(found, (change,), True)


def order_manual(
    report: Report, env: Environment, found: ServerSettings, names: Sequence[str], known: Sequence[Record]
) -> Order:
    """The manual's values for what was named, or for all that is not as well with another value; expired overrides go
    back to what was there before them.

    Raises:
        OpsError: the manual has no such setting.
    """
    overrides = find_overrides(env, found)
    if unknown := [name for name in names if name not in BY_NAME and name not in overrides]:
        raise OpsError(f"the manual has no setting {', '.join(unknown)}", f"choose of {', '.join(BY_NAME)}")
    wanted, left, expiring = _wanted(env, found, names, overrides, known)
    if left:
        report.table(f"Left alone on {found.address}", ("setting", "value", "why"), left)
    changes, stay = [], set()
    for change in wanted:
        if obstacle := obstacle_to(found, change):
            report.warn(f"{change.name} on {found.address}", obstacle[1], value=obstacle[0], expected=change.value)
            stay.add(change.name)
        else:
            changes.append(change)
    unseen = bool(found.problem and names)
    rewrite = bool(changes or unseen or found.unwritten())
    ended = {name: record for name, record in expiring.items() if name not in stay}
    return Order(found, _in_order(changes), rewrite, tuple(ended.values()))


def _wanted(
    env: Environment, found: ServerSettings, names: Sequence[str], overrides: Overrides, known: Sequence[Record]
) -> tuple[list[Change], list[tuple[str, str, str]], dict[str, Record]]:
    """Changes, what is left alone with the reason, and the overrides that end."""
    wanted: list[Change] = []
    left: list[tuple[str, str, str]] = []
    ended: dict[str, Record] = {}
    for name in names or dict.fromkeys([*BY_NAME, *overrides]):
        running, value = found.running[name], BY_NAME[name].value if name in BY_NAME else ""
        if name in overrides and not (names or overrides[name][0].is_expired):
            left.append((name, running, f"override until {overrides[name][0].until}"))
            continue
        if name in overrides:
            ended[name] = overrides[name][0]
            base = before_overrides(found, name, overrides[name][0], known)
            value = base if not value or _is_well(env, found, name, base) else value
        elif KINDS[name] == "name":
            value = running if value_of(env, found, name).ok else env.redis.data_directory
        elif not names and value_of(env, found, name).ok:
            if not same(name, running, value):
                left.append((name, running or "off", f"as well; names={name} sets the manual's value"))
            continue
        if not same(name, running, value):
            wanted.append(Change(name, value))
    return wanted, left, ended


def before_overrides(found: ServerSettings, name: str, newest: Record, known: Sequence[Record]) -> str:
    """The value that was there before an override, and before the expired ones under it."""
    value = found.running[name]
    for record in reversed(records.open_records(known, found.identity)):
        change = next((change for change in record.changes if change.name == name), None)
        expired = record.name == newest.name or record.is_expired
        if change and record.until and expired and record.name <= newest.name and same(name, change.new, value):
            value = change.old or ""
    return value


def _is_well(env: Environment, found: ServerSettings, name: str, value: str) -> bool:
    return value_of(env, replace(found, running={**found.running, name: value}), name).ok


def _in_order(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The AOF is switched on last: it takes long, and the rules that bound it hold by then."""
    return tuple(sorted(changes, key=lambda change: change == ON))


def order_undo(report: Report, found: ServerSettings, record: Record) -> tuple[Order, bool]:
    """What brings a record's old values back, and whether a setting is left alone since somebody changed it."""
    changes, left = [], False
    for item in record.changes:
        old = item.old or ""
        if found.is_written(item.name, item.new):
            changes.append(Change(item.name, old))
        elif not found.is_written(item.name, old):
            left = True
            value = f"{found.running.get(item.name, 'unknown')} since"
            report.warn(f"{item.name} left alone", "undo the newer record first, or set it yourself", value=value,
                        expected=item.new)  # fmt: skip
    for change in changes:
        if obstacle := obstacle_to(found, change):
            report.expect(change.name, False, obstacle[1], value=obstacle[0], expected=change.value)
    return Order(found, _in_order(changes), bool(changes) or not left), left


def obstacle_to(found: ServerSettings, change: Change) -> tuple[str, str] | None:
    """Why a value cannot, or must not, be set now; and what to do."""
    name, value = change.name, change.value
    how, runs = found.by.get(name, ""), f"{found.running[name] or 'off'} runs"
    if name == "dir":
        return runs, remedy(found, name)
    if KINDS[name] == "name":
        return runs, (
            "leave it: a start under another name finds no data and serves 0 keys. To rename: stop it, rename the "
            f"file too, change {name} in {found.server.config_file or 'its configuration file'}, start it"
        )
    if how not in ("", AT_ONCE):
        return f"{runs}; takes effect by {how}", remedy(found, name)
    if name == "maxclients":
        return _too_many_or_few(found, int(value))
    if name == MAXMEMORY:
        return _too_much_or_little(found, int(normal(name, value)))
    return _no_place_for_aof(found) if change == ON else None


def _too_many_or_few(found: ServerSettings, value: int) -> tuple[str, str] | None:
    if value < found.connections + 1:
        hint = f"close some first (check-redis-clients): {found.connections} are connected, new ones would be refused"
        return f"{value} is below what is connected", hint
    if 0 < found.most_files < value + RESERVED_FILES:
        most = found.most_files - RESERVED_FILES
        return f"its process may open {found.most_files} files: {most} clients at most", (
            f"raise LimitNOFILE in its unit (ulimit -n) to {value + RESERVED_FILES} or more and restart it; the server "
            "would refuse it, after it has served nobody for a while"
        )
    return None


def _too_much_or_little(found: ServerSettings, value: int) -> tuple[str, str] | None:
    used, host = found.server.used_bytes, found.server.system_bytes
    if 0 < value < used:
        return f"{size(used)} are in use", (
            "free memory first (check-redis-memory, clear-cache): below what is used it evicts keys, or refuses every "
            "write, at once"
        )
    if host and value > host:
        return f"its host has {size(host)}", "choose less: the kernel would end it before it reaches that"
    return None


def _no_place_for_aof(found: ServerSettings) -> tuple[str, str] | None:
    place, needed = look_at(found.server), found.server.dataset_bytes
    if place.trouble:
        return place.trouble, place.remedy
    if not place.problem and place.free_bytes <= needed:
        return f"{size(place.free_bytes)} are free", f"make room at {place.directory}: the AOF needs {size(needed)}"
    return None
