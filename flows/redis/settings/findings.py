"""Running settings against the manual's and the file; overrides; replicas (§2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from flows.redis.master import judge_master
from flows.setting_overrides import Overrides, find_overrides, judge_overrides
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report, Status
from tasks.redis.sentinels import read_sentinels
from tasks.redis.settings.recommended import BY_NAME, MAXMEMORY, RECOMMENDED, JudgedSetting, judged, same, shown
from tasks.redis.settings.running import AT_ONCE, PROTECTED, RedisServerSettings, differences, read_settings
from tasks.redis.topology.topology import is_own, read_topology

APPLY, UNDO = "apply-redis-settings", "undo-redis-settings"
SET = "set the manual's value"
# Without both of them, nothing is saved to disk.
KEEPING = ("save", "appendonly")


def find_servers(
    report: Report, env: Environment, *, changes: bool = False, waiver: str = ""
) -> list[RedisServerSettings]:
    """The master first, then every other server of the data set. Unreachable ones are reported as not measured."""
    master = judge_master(report, env.redis, read_sentinels(env.redis), changes=changes, waiver=waiver)
    found = [read_settings(master, env.name)]
    around = read_topology(env.redis, env.reports_directory)
    known = [*around.others, around.own] if around.watchers else around.others
    for address in dict.fromkeys(known):
        if address == master.address:
            continue
        try:
            if address in around.lost:
                raise OpsError(f"Redis at {address} does not answer")
            found.append(read_settings(env.redis.at(address), env.name))
        except OpsError as error:
            hint = "run it again when the server answers: if it is promoted, its own values apply"
            report.warn(f"settings of {address}", hint, value=f"not measured: {error.message}")
    first = found[0].server
    report.fact("server", f"{first.address} ({first.state.role}, {first.version})")
    if len(found) > 1:
        report.fact("others", ", ".join(f"{each.address} ({each.role})" for each in found[1:]))
    return found


def judge_role(report: Report, found: RedisServerSettings, otherwise: Status) -> None:
    """The server is the master, whose settings apply."""
    report.require(
        "role",
        found.role == "master",
        "name the Sentinels or the master in [redis], then register the blocks again: a replica has its own values",
        value=found.role if found.role == "master" else f"a replica of {found.server.state.master}",
        expected="master",
        worst=otherwise,
    )


def value_of(env: Environment, found: RedisServerSettings, name: str) -> JudgedSetting:
    """A running value against the manual's. Only of the configured server is it known where its data is to lie."""
    own = is_own(env.redis, found.address) and not env.redis.remote
    directory = env.redis.data_directory if own else ""
    return judged(name, found.running[name], dataset_bytes=found.server.dataset_bytes, directory=directory)


def judge_setting(
    report: Report, env: Environment, found: RedisServerSettings, name: str, overrides: Overrides
) -> bool:
    """A running setting has the manual's value or an accepted one. An override in force is reported separately."""
    value = value_of(env, found, name)
    if _is_excused(found, name, overrides):
        return value.ok
    worst = Status.CRITICAL if found.keeps_nothing and name in KEEPING else Status.WARN
    return report.require(
        name,
        value.ok,
        f"{remedy(found, name)}: {value.why}",
        value=value.running or "off",
        expected=value.manual,
        worst=worst,
    )


def _is_excused(found: RedisServerSettings, name: str, overrides: Overrides) -> bool:
    """Whether an override is in force. No override excuses a server that saves nothing to disk."""
    if name not in overrides or overrides[name][0].is_expired:
        return False
    return not (found.keeps_nothing and name in KEEPING)


def remedy(found: RedisServerSettings, name: str) -> str:
    """The next step to set the manual's value."""
    manual, how, file = BY_NAME[name], found.by.get(name, ""), found.server.config_file or "its configuration file"
    if name == "dir":
        return (
            "correct the environment; or stop the server, move the files, change dir in its file and start it. Without "
            "the files it would serve 0 keys"
        )
    if name == "maxclients" and not found.problem and not same(name, found.written[name], found.running[name]):
        return (
            f"raise LimitNOFILE (ulimit -n), then {APPLY} with names={name}. {file} has {found.written[name]}; a "
            "server lowers it at its start to fit its limit of open files"
        )
    if how in ("", AT_ONCE):
        return f"{APPLY} with names={name}"
    text = (
        f"write {name} {manual.value} into {file} and restart it immediately, before a Sentinel or {APPLY} writes the "
        "running value there (CONFIG REWRITE)"
    )
    return f"{text}. Or set enable-protected-configs in the file" if how == PROTECTED else text


def judge_file(report: Report, found: RedisServerSettings) -> None:
    """The running settings are in the file; the next start loses others."""
    if found.problem:
        hint = f"{APPLY} with names=… writes the file" if found.server.config_file else "start it with such a file"
        hint += ": settings made at run time can be lost"
        report.warn("configuration file: not measured", hint, value=found.problem)
        return
    lost = differences(found.unwritten())
    report.prefer(
        "configuration file",
        not lost,
        f"save the running settings (CONFIG REWRITE): {APPLY}. Otherwise the next start uses the file's",
        value="; ".join(lost) or found.server.config_file,
        expected="the running settings",
    )
    if found.others_problem:
        hint = "correct [redis] server_program: it is started to find out the file's values"
        report.warn("configuration file: only the manual's settings", hint, value=found.others_problem)


def judge_replicas(report: Report, env: Environment, others: Sequence[RedisServerSettings]) -> None:
    """The replicas' own settings and overrides, which apply after a promotion."""
    for found in others:
        overrides = find_overrides(env, found)
        judge_overrides(
            report, found, overrides, apply=Next(APPLY, SET, {"everywhere": True}), undo=UNDO, where=found.address
        )
        named = [one.name for one in RECOMMENDED if not _is_excused(found, one.name, overrides)]
        bad = [
            f"{name} {value_of(env, found, name).running or 'off'}"
            for name in named
            if not value_of(env, found, name).ok
        ]
        unkept = [] if found.problem else [f"{name} not in its file" for name in found.unwritten()]
        report.prefer(
            f"settings of {found.address} ({found.role})",
            not bad and not unkept,
            f"{APPLY} with everywhere: after a promotion these values apply",
            value=", ".join([*bad, *unkept]) or "the manual's, or accepted",
            expected="the manual's, or accepted",
        )


def outcome(overrides: Overrides, passed: int) -> str:
    """The check in one line."""
    in_force = sum(not record.is_expired for record, _ in overrides.values())
    also = f", {in_force} overridden for a time" if in_force else ""
    return f"{passed} of {len(RECOMMENDED)} settings have the manual's or an accepted value{also}"


def judge_rights(report: Report, found: RedisServerSettings) -> None:
    """The user may change settings. Without CONFIG SET it is unknown how a change takes effect."""
    for error in found.refused:
        hint = f"{error.hint}: {APPLY} needs it"
        report.warn("rights", hint, value=error.message, expected="CONFIG SET and REWRITE")


def report_settings(report: Report, env: Environment, found: RedisServerSettings, overrides: Overrides) -> None:
    """A table of all settings."""
    rows = []
    for one in RECOMMENDED:
        value = value_of(env, found, one.name)
        rows.append(
            (
                one.name,
                value.running or "off",
                shown(one.name, found.written.get(one.name, "not measured")),
                value.manual,
                one.section,
                found.by.get(one.name, "not measured"),
                _note(found, one.name, overrides, value),
            )
        )
    if MAXMEMORY in overrides:
        note = _note(found, MAXMEMORY, overrides, None)
        file = found.written.get(MAXMEMORY, "not measured")
        rows.append(
            (
                MAXMEMORY,
                shown(MAXMEMORY, found.running[MAXMEMORY]),
                shown(MAXMEMORY, file),
                "",
                "",
                found.by.get(MAXMEMORY, ""),
                note,
            )
        )
    columns = ("setting", "running", "in the file", "manual", "section", "takes effect", "note")
    report.table("Settings", columns, rows)


def _note(found: RedisServerSettings, name: str, overrides: Overrides, value: JudgedSetting | None) -> str:
    notes = []
    if name in overrides:
        record = overrides[name][0]
        notes.append(f"override {'expired' if record.is_expired else 'until'} {record.until}")
    elif value and value.ok and not same(name, found.running[name], BY_NAME[name].value):
        notes.append("accepted")
    if not found.problem and name in found.unwritten():
        notes.append("lost at the next start")
    return "; ".join(notes)
