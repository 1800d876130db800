"""What check-redis-settings says: running values against the manual's, the file, overrides, replicas (§2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blocks.environment import Environment
from flows.redis.master import judge_master
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.redis.sentinels import read_sentinels
from tasks.redis.settings.recommended import BY_NAME, MAXMEMORY, RECOMMENDED, Judged, judged, same, shown
from tasks.redis.settings.running import AT_ONCE, PROTECTED, ServerSettings, read_settings
from tasks.redis.topology.topology import is_own, read_surroundings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Record

APPLY, UNDO = "apply-redis-settings", "undo-redis-settings"
# With neither of them nothing is on disk.
KEEPING = ("save", "appendonly")
Overrides = Mapping[str, tuple[Record, str]]


def find_servers(report: Report, env: Environment, *, changes: bool = False, waiver: str = "") -> list[ServerSettings]:
    """The master first, then every other server of the data set that can be asked; the rest is told as not measured."""
    master = judge_master(report, env.redis, read_sentinels(env.redis), changes=changes, waiver=waiver)
    found = [read_settings(master, env.name)]
    around = read_surroundings(env.redis, env.reports_directory)
    known = [*around.others, around.own] if around.watchers else around.others
    for address in dict.fromkeys(known):
        if address == master.address:
            continue
        try:
            if address in around.lost:
                raise OpsError(f"Redis at {address} does not answer")
            found.append(read_settings(env.redis.at(address), env.name))
        except OpsError as error:
            hint = "launch it again when it is there: it keeps its own values, and counts with them once promoted"
            report.warn(f"settings of {address}", hint, value=f"not measured: {error.message}")
    first = found[0].server
    report.fact("server", f"{first.address} ({first.state.role}, {first.version})")
    if len(found) > 1:
        report.fact("others", ", ".join(f"{each.address} ({each.role})" for each in found[1:]))
    return found


def find_overrides(env: Environment, found: ServerSettings) -> Overrides:
    """The temporary values that are in force on a server, expired or not; those that somebody replaced are closed."""
    records.close_replaced(env.reports_directory, found)
    return records.overrides_in_force(records.read_all(env.reports_directory), found)


def judge_role(report: Report, found: ServerSettings, otherwise: Status) -> None:
    """The master's values are those that count."""
    report.require(
        "role",
        found.role == "master",
        "name the Sentinels in [redis], or the master, and register the blocks again: a replica keeps its own values",
        value=found.role if found.role == "master" else f"a replica of {found.server.state.master}",
        expected="master",
        worst=otherwise,
    )


def value_of(env: Environment, found: ServerSettings, name: str) -> Judged:
    """A running value against the manual's. Only of the configured server is it known where its data is to lie."""
    own = is_own(env.redis, found.address) and not env.redis.remote
    directory = env.redis.data_directory if own else ""
    return judged(name, found.running[name], dataset_bytes=found.server.dataset_bytes, directory=directory)


def judge_setting(report: Report, env: Environment, found: ServerSettings, name: str, overrides: Overrides) -> bool:
    """Whether it runs with what it should: the manual's value, or one that is as well. What an override excuses is told
    with the overrides."""
    told = value_of(env, found, name)
    if _is_excused(found, name, overrides):
        return told.ok
    worst = Status.CRITICAL if found.keeps_nothing and name in KEEPING else Status.WARN
    return report.require(
        name,
        told.ok,
        f"{told.why}: {remedy(found, name)}",
        value=told.running or "off",
        expected=told.manual,
        worst=worst,
    )


def _is_excused(found: ServerSettings, name: str, overrides: Overrides) -> bool:
    """Whether an override is in force; none excuses that nothing is kept on disk."""
    if name not in overrides or overrides[name][0].is_expired:
        return False
    return not (found.keeps_nothing and name in KEEPING)


def remedy(found: ServerSettings, name: str) -> str:
    """What to do for the manual's value."""
    manual, how, file = BY_NAME[name], found.by.get(name, ""), found.server.config_file or "its configuration file"
    if name == "dir":
        return (
            "correct the environment; or stop it, move the files, change dir in its file and start it. A dir that is "
            "only changed in the file has no data: it would serve 0 keys"
        )
    if name == "maxclients" and not found.problem and not same(name, found.written[name], found.running[name]):
        return (
            f"{file} has {found.written[name]}: the server lowered it at its start if its limit of open files is less; "
            f"raise LimitNOFILE (ulimit -n), then {APPLY} with names={name}"
        )
    if how in ("", AT_ONCE):
        return f"{APPLY} with names={name}"
    text = f"write {name} {manual.value} into {file} and restart it at once: a CONFIG REWRITE before (a Sentinel's, or "
    text += f"{APPLY}'s) puts the running value back"
    return text + (", or allow it by enable-protected-configs there" if how == PROTECTED else "")


def judge_overrides(report: Report, found: ServerSettings, overrides: Overrides) -> None:
    """Temporary values that still stand: each has its time."""
    for name, (record, value) in overrides.items():
        everywhere = "" if found.role == "master" else " and everywhere"
        report.prefer(
            f"override {name} = {shown(name, value)} on {found.address}",
            not record.is_expired,
            f"{UNDO} with record={record.name}, or {APPLY} with names={name}{everywhere}: both end it",
            value=f"until {record.until}" + (f" ({record.reason})" if record.reason else ""),
            expected="removed when its time is over",
        )


def judge_file(report: Report, found: ServerSettings) -> None:
    """What runs and is not in the file is lost with the next start."""
    if found.problem:
        told = "start it with one" if not found.server.config_file else f"{APPLY} with names=… writes it in any case"
        report.warn(
            "configuration file: not measured", f"what was set at run time may be lost: {told}", value=found.problem
        )
        return
    lost = differences(found.unwritten())
    report.prefer(
        "configuration file",
        not lost,
        f"the next start brings its values back: {APPLY} keeps all that runs (CONFIG REWRITE)",
        value="; ".join(lost) or found.server.config_file,
        expected="what runs now",
    )
    if found.others_problem:
        hint = "correct [redis] server_program: it knows what the next start would bring"
        report.warn("configuration file: only the manual's settings", hint, value=found.others_problem)


def differences(unwritten: Mapping[str, tuple[str, str]]) -> list[str]:
    """`save off runs, 900 1 is written`, for each."""
    return [
        f"{name} {shown(name, runs)} runs, {shown(name, file)} is written" for name, (runs, file) in unwritten.items()
    ]


def judge_replicas(report: Report, env: Environment, others: Sequence[ServerSettings]) -> None:
    """Each keeps its own values, and they count once it is promoted; its overrides too."""
    for found in others:
        overrides = find_overrides(env, found)
        judge_overrides(report, found, overrides)
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
            f"they count once it is promoted: {APPLY} with everywhere",
            value=", ".join([*bad, *unkept]) or "as they should be",
            expected="the manual's too",
        )


def outcome(overrides: Overrides, well: int) -> str:
    """The check in one line."""
    over = sum(not record.is_expired for record, _ in overrides.values())
    more = f", {over} overridden for a time" if over else ""
    return f"{well} of {len(RECOMMENDED)} settings are as they should be{more}"


def judge_rights(report: Report, found: ServerSettings) -> None:
    """Whether this user could change them; without CONFIG SET it was not measured how a change takes effect."""
    for error in found.refused:
        report.warn("rights", f"{APPLY} needs it: {error.hint}", value=error.message, expected="CONFIG SET and REWRITE")


def tell_settings(report: Report, env: Environment, found: ServerSettings, overrides: Overrides) -> None:
    """All of them as a table."""
    rows = []
    for one in RECOMMENDED:
        told = value_of(env, found, one.name)
        rows.append(
            (
                one.name,
                told.running or "off",
                shown(one.name, found.written.get(one.name, "not measured")),
                told.manual,
                one.section,
                found.by.get(one.name, "not measured"),
                _note(found, one.name, overrides, told),
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


def _note(found: ServerSettings, name: str, overrides: Overrides, told: Judged | None) -> str:
    notes = []
    if name in overrides:
        record = overrides[name][0]
        notes.append(f"override {'expired' if record.is_expired else 'until'} {record.until}")
    elif told and told.ok and not same(name, found.running[name], BY_NAME[name].value):
        notes.append("as well")
    if not found.problem and name in found.unwritten():
        notes.append("lost at the next start")
    return "; ".join(notes)
