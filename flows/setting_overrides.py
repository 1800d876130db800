"""Overrides and undo of settings: what PostgreSQL's and Redis's runbooks do alike (§1.5, §2.4).

Each server's settings are an adapter of `ServerSettings`; how a value is set, and what it may be, is the server's own.
"""

from __future__ import annotations

from collections.abc import Mapping

from blocks.environment import Environment
from runbook.next import Next
from runbook.report import Report
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Changed, Record, ServerSettings

Overrides = Mapping[str, tuple[Record, str]]


def find_overrides(env: Environment, found: ServerSettings) -> Overrides:
    """A server's temporary values, also expired ones, with their records. Records of replaced values are closed."""
    records.close_replaced(env.reports_directory, found)
    return records.overrides_in_force(records.read_all(env.reports_directory), found)


def judge_overrides(
    report: Report, found: ServerSettings, overrides: Overrides, *, apply: Next, undo: str, where: str = ""
) -> None:
    """Warn of expired overrides. `apply` and `undo` are the runbooks that end one, `apply` with the parameters that
    this server needs; `where` is the server, if the data has several."""
    also = "".join(f" and {parameter}" for parameter in apply.parameters)
    for name, (record, value) in overrides.items():
        report.prefer(
            f"override {name} = {found.shown(name, value)}{where and f' on {where}'}",
            not record.is_expired,
            f"run {undo} with record={record.name}, or {apply.flow} with names={name}{also} for the manual's value",
            value=f"until {record.until}" + (f" ({record.reason})" if record.reason else ""),
            expected="removed when its time is over",
            follow=[
                Next(undo, "undo it", {"record": record.name}),
                Next(apply.flow, apply.why, {**apply.parameters, "names": [name]}),
            ],
        )


def find_undone(report: Report, found: ServerSettings, record: Record) -> tuple[list[Changed], list[str]]:
    """What a record replaced and is to come back, and the settings that somebody changed since: they are kept, with a
    warning."""
    undone: list[Changed] = []
    kept: list[str] = []
    for item in record.changes:
        if found.is_written(item.name, item.old):
            continue
        if found.is_written(item.name, item.new):
            undone.append(item)
        else:
            kept.append(item.name)
            report.warn(
                f"{item.name} kept",
                "undo the newer record first, or set it yourself",
                value=f"{found.shown(item.name)}, changed since",
                expected=found.shown(item.name, item.new),
            )
    return undone, kept
