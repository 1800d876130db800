"""What apply- and undo-redis-settings are to change, and what they leave alone (§2.3, §2.4)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blocks.environment import Environment
from flows.redis.settings.findings import remedy, value_of
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.units import size
from tasks.redis.persistence.place import look_at
from tasks.redis.settings.changes import ON, RESERVED_FILES, REWRITE, SET, Change, act_of
from tasks.redis.settings.recommended import BY_NAME, KINDS, MAXMEMORY, normal, require_possible, same, shown
from tasks.redis.settings.running import AT_ONCE, ServerSettings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Record

_OVERRIDE = re.compile(r"\s*(?:redis-cli\s+)?(?:config\s+set\s+)?([a-z-]+)\s*(?:=|\s)\s*(.*?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Order:
    """What is to be done on one server: its changes, and whether its file is to be written, where it has one."""

    found: ServerSettings
    changes: tuple[Change, ...]
    rewrite: bool

    @property
    def has_file(self) -> bool:
        """Whether CONFIG REWRITE has a file to write."""
        return bool(self.found.server.config_file)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.changes and not (self.rewrite and self.has_file)

    @property
    def acts(self) -> tuple[Act, ...]:
        """What a permit must name."""
        address = self.found.address
        return (*(Act(SET, act_of(address, change)) for change in self.changes), Act(REWRITE, address))


@dataclass(frozen=True)
class Undo:
    """How a record is undone; `left` are its settings that somebody changed since."""

    record: Record
    order: Order
    left: tuple[str, ...]

    @property
    def reopened(self) -> frozenset[str]:
        """The overrides that its record had put an end to: they are in force again."""
        return frozenset(name for change in self.record.changes for name in change.ended)


def require_sense(names: Sequence[str], override: str) -> None:
    """Raises OpsError where the parameters contradict each other."""
    if names and override:
        raise OpsError("names and override exclude each other", "launch it twice: with names, and with the override")
    if unknown := [name for name in names if name not in KINDS]:
        raise OpsError(f"the manual has no setting {', '.join(unknown)}", f"choose of {', '.join(BY_NAME)}")


def parse_override(text: str) -> Change:
    """`maxmemory 2gb` or `maxmemory = 2gb`, also with CONFIG SET before it; checked.

    Raises:
        OpsError: it is no override.
    """
    parted = _OVERRIDE.fullmatch(text)
    name = parted[1].lower() if parted else ""
    if not parted or name not in KINDS:
        raise OpsError(f"“{text[:60]}” is no override", f"write name = value, with one of {', '.join(KINDS)}")
    value = parted[2].strip("\"'")
    require_possible(name, value)
    if name in BY_NAME and same(name, value, BY_NAME[name].value):
        raise OpsError(f"{name} = {value} is the manual's value", f"launch it with names={name} and no override")
    return Change(name, normal(name, value))


def order_override(report: Report, found: ServerSettings, change: Change, known: Sequence[Record]) -> Order:
    """One value for a time; what speaks against it is critical. Where it is in force already its time begins anew."""
    name, running = change.name, found.running[change.name]
    if not same(name, running, change.value):
        if obstacle := obstacle_to(found, change):
            report.fail(
                f"{name} on {found.address}", obstacle[1], value=obstacle[0], expected=shown(name, change.value)
            )
        return Order(found, (replace(change, old=running),), True)
    if before := records.overrides_in_force(known, found).get(name):
        replaced = before[0].change(name)
        return Order(found, (replace(change, old=(replaced and replaced.old) or ""),), True)
    _tell_left(report, found, [(name, shown(name, running), "it runs with that value already, and not for a time")])
    return Order(found, (), bool(found.unwritten()))


def order_manual(
    report: Report, env: Environment, found: ServerSettings, names: Sequence[str], known: Sequence[Record]
) -> Order:
    """The manual's values for what was named, or for all that is not as well with another value; expired overrides go
    back to what was there before them."""
    overrides = records.overrides_in_force(known, found)
    changes: list[Change] = []
    left: list[tuple[str, str, str]] = []
    for name in dict.fromkeys(names or [*BY_NAME, *overrides]):
        aim = _aim(env, found, name, bool(names), known)
        if isinstance(aim, str):
            left += [(name, shown(name, found.running[name]), aim)] if aim else []
        elif obstacle := obstacle_to(found, aim):
            expected = shown(name, aim.value)
            report.warn(f"{name} on {found.address}", obstacle[1], value=obstacle[0], expected=expected)
        else:
            changes.append(aim)
    _tell_left(report, found, left)
    unseen = bool(found.problem and names)
    return Order(found, _in_order(changes), bool(changes or unseen or found.unwritten()))


def _aim(env: Environment, found: ServerSettings, name: str, asked: bool, known: Sequence[Record]) -> Change | str:
    """What a setting is to be; or why it is left alone, "" where that goes without saying."""
    running, manual = found.running[name], BY_NAME[name].value if name in BY_NAME else ""
    chain = list(itertools.takewhile(lambda record: record.until, records.led_to(known, found, name)))
    ended = list(itertools.takewhile(lambda record: asked or record.is_expired, chain))
    value = manual
    if chain and not ended:
        return f"override until {chain[0].until}"
    if ended:
        oldest = ended[-1].change(name)
        base = (oldest and oldest.old) or ""
        # What is beneath may be an override that is in force still; else it must be as well as the manual's.
        value = base if not manual or chain[len(ended) :] or _is_well(env, found, name, base) else manual
    elif name == MAXMEMORY:
        return "no override of it is in force, and the manual has no value for it"
    elif KINDS[name] == "name":
        value = running if _is_well(env, found, name, running) else env.redis.data_directory
    elif not asked and _is_well(env, found, name, running):
        return "" if same(name, running, manual) else f"as well; names={name} sets the manual's value"
    if same(name, running, value):
        return ""
    return Change(name, value, running, tuple(record.name for record in ended))


def _is_well(env: Environment, found: ServerSettings, name: str, value: str) -> bool:
    return value_of(env, replace(found, running={**found.running, name: value}), name).ok


def _tell_left(report: Report, found: ServerSettings, left: Sequence[tuple[str, str, str]]) -> None:
    if left:
        report.table(f"Left alone on {found.address}", ("setting", "value", "why"), left)


def _in_order(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The AOF is switched on last: it takes long, and the rules that bound it hold by then."""
    return tuple(sorted(changes, key=lambda change: change == ON))


def order_undo(report: Report, found: ServerSettings, record: Record) -> Undo:
    """What brings a record's old values back."""
    changes, left = [], []
    for item in record.changes:
        old = item.old or ""
        if found.is_written(item.name, item.new):
            changes.append(Change(item.name, old))
        elif not found.is_written(item.name, old):
            left.append(item.name)
            value = f"{shown(item.name, found.running.get(item.name, 'unknown'))} since"
            report.warn(
                f"{item.name} left alone",
                "undo the newer record first, or set it yourself",
                value=value,
                expected=shown(item.name, item.new),
            )
    for change in changes:
        if obstacle := obstacle_to(found, change):
            expected = shown(change.name, change.value)
            report.fail(change.name, obstacle[1], value=obstacle[0], expected=expected)
    order = Order(found, _in_order(changes), bool(changes) or not left)
    return Undo(record, order, tuple(left))


def obstacle_to(found: ServerSettings, change: Change) -> tuple[str, str] | None:
    """Why a value cannot, or must not, be set now; and what to do."""
    name, value = change.name, change.value
    how, runs = found.by.get(name, ""), f"{shown(name, found.running[name])} runs"
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
