"""How apply- and undo-redis-settings go about it: plan, record, set, write the file, tell (§2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from flows.redis.setting_findings import APPLY, UNDO, differences
from flows.redis.setting_orders import OFF, ON, Order
from runbook.permit import Permit
from runbook.render import size
from runbook.report import Report, Status
from tasks import setting_records as records
from tasks.redis.settings.changes import Change, Done, rewrite_file, set_values, switch_aof_on
from tasks.redis.settings.running import ServerSettings, read_settings
from tasks.setting_records import Changed, Record


def plan(report: Report, orders: Sequence[Order]) -> None:
    """One step for each change, with what it is now; then the file."""
    for order in orders:
        found = order.found
        for change in order.changes:
            now = f"now {found.running[change.name] or 'off'}"
            data = found.server.dataset_bytes if change == ON else 0
            more = "; waits until the AOF holds everything" if change == ON else ""
            report.plan("CONFIG SET", f"{change} on {found.address}; {now}{more}", size=data, seconds=data / 5e7)
        if order.rewrite:
            after = {change.name: change.value for change in order.changes}
            also = [name for name in found.unwritten() if name not in after] if not found.problem else []
            told = f" (also keeps: {'; '.join(differences(found, also))})" if also else ""
            report.plan(
                "CONFIG REWRITE", f"{found.server.config_file or 'no configuration file'} of {found.address}{told}"
            )
        if any(change == OFF for change in order.changes):
            hint = "snapshot-redis right after it: from then on a kill loses every change since the last save"
            report.warn(f"the AOF of {found.address} is switched off", hint)


def require_rights(orders: Sequence[Order]) -> None:
    """Raises OpsError where this user may not give a command that it takes: before anything is changed."""
    for error in (error for order in orders for error in order.found.refused):
        raise error


def keep(report: Report, env: Environment, orders: Sequence[Order], *, hours: float = 0, reason: str = "") -> None:
    """Write the old values down, a record for each server, before anything is changed."""
    told = []
    for found, changes in ((order.found, order.changes) for order in orders if order.changes):
        pairs = [Changed(each.name, found.running[each.name], each.value) for each in changes]
        kept = records.keep(env.reports_directory, found.identity, pairs, hours=hours, reason=reason)
        told.append(f"{kept.name} of {found.address}")
        if kept.until:
            report.fact("override until", kept.until)
    if told:
        names = ", ".join(told)
        report.fact("record of the old values", f"{names} (to undo: {UNDO} with record=…)")
        report.state_is("some values may be set and not yet in the file", f"launch it again, or {UNDO} ({names})")


def carry_out(report: Report, env: Environment, permit: Permit, order: Order) -> None:
    """Set, switch the AOF on, write the file, and tell what runs then and what would be lost."""
    block, found = env.redis.at(order.found.address), order.found
    plain = [change for change in order.changes if change != ON]
    done = set_values(permit, block, found, plain) if plain else ()
    saved = switch_aof_on.after(done)(permit, block, found) if ON in order.changes else None
    if saved:
        report.fact("AOF", f"on; written in {saved.seconds:.1f} s, {size(saved.after.aof_bytes)}")
    problem = rewrite_file.after(done, saved)(permit, block, found) if order.rewrite else ""
    after = read_settings.after(problem)(block, env.name)
    _tell_done(report, order, after, done, problem)


def _tell_done(report: Report, order: Order, after: ServerSettings, done: Sequence[Done], problem: str) -> None:
    rows = [
        (change.name, order.found.running[change.name] or "off", after.running[change.name] or "off",
         after.written.get(change.name, "not measured") or "off")
        for change in order.changes
    ]  # fmt: skip
    report.table(f"In effect on {after.address}", ("setting", "before", "running", "in the file"), rows)
    refused = {each.change.name: each.refused for each in done if each.refused}
    for change in order.changes:
        why = refused.get(change.name, "")
        report.expect(
            f"{change} on {after.address}",
            after.is_written(change.name, change.value),
            _after_refusal(change, why),
            value=f"the server refuses it: {why}" if why else after.running[change.name] or "off",
            expected=change.value or "off",
        )
    if not order.rewrite:
        return
    unwritten = after.unwritten()
    report.expect(
        f"kept in the file of {after.address}",
        not problem and not unwritten,
        f"{_file_remedy(after, problem)}: until then the values are lost at the next restart",
        value=problem or "; ".join(differences(after, unwritten)) or after.server.config_file,
        expected="what runs now",
        otherwise=Status.WARN,
    )


def _after_refusal(change: Change, why: str) -> str:
    if change.name == "maxclients" and "operating system" in why:
        return "its process may not open so many files: raise LimitNOFILE in its unit (ulimit -n) and restart it"
    return "look at the server's log, and launch it again"


def _file_remedy(after: ServerSettings, problem: str) -> str:
    if not after.server.config_file:
        return "start it with a configuration file that has them"
    if problem:
        folder = after.server.config_file.rpartition("/")[0]
        return f"let the server's user write {after.server.config_file} and its directory {folder}, then {APPLY} again"
    return f"look whether a file that {after.server.config_file} includes says otherwise"


def find_undoable(
    known: Sequence[Record], servers: Sequence[ServerSettings], name: str
) -> list[tuple[ServerSettings, Record]]:
    """For each server its newest record that is not undone, or the one of that name.

    Raises:
        OpsError: there is none.
    """
    pairs: list[tuple[ServerSettings, Record]] = []
    for found in servers:
        ours = [r for r in records.open_records(known, found.identity) if not name or r.name == name]
        pairs += [(found, record) for record in ours[-1:]]
    if not pairs:
        records.find_record(known, servers[0].identity, name)  # raises
    return pairs


def tell_left_out(report: Report, orders: Sequence[Order], others: Sequence[ServerSettings]) -> None:
    """Servers that keep what they have."""
    if others and any(order.changes for order in orders):
        names = ", ".join(f"{found.address} ({found.role})" for found in others)
        report.warn(
            "other servers keep their own values",
            "launch it with everywhere: they count once one of them is promoted",
            value=names,
        )


def told_of(orders: Sequence[Order], done: str) -> str:
    """The run in one line."""
    return ", ".join(f"{len(order.changes)} values {done} on {order.found.address}" for order in orders)
