"""Why the database cannot be reached, refuses log-ins or writes, or lets its clients wait (appendix A)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.refusals import DISK_FULL, TOO_MANY, UNKNOWN, LoginRefused, is_own_limit
from flows.troubleshooting.database_replication import STANDBY, has_one_primary, judge_replication, judge_standby
from flows.troubleshooting.database_sessions import LIMIT, full_cause, judge_sessions
from flows.troubleshooting.diagnosis import (
    Cause,
    Diagnosis,
    Impact,
    attach_service,
    read_state,
    start_hint,
    stopped_process,
)
from flows.troubleshooting.restarts import (
    WINDOW_MINUTES,
    Window,
    describe_start,
    judge_restart,
    long_log,
    previous_end,
)
from runbook import metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.host.disk import disk_on
from tasks.host.restarts import LastEnd, postgres_end
from tasks.postgres.server.greeting import Greeting, read_greeting
from tasks.postgres.server.log_reasons import LogReason, find_reason, own_log, without_statements
from tasks.postgres.server.login_trial import try_own_login, try_to_extend
from tasks.postgres.sessions.uptime import read_uptime


@flow(name="diagnose-database", flow_run_name=RunName("diagnose-database {environment}"))
def diagnose_database(environment: str, window_minutes: Window = WINDOW_MINUTES) -> Report:
    """データベース接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first:

    - Does only one server take writes? Is there free disk space? Do host, port and process answer?
    - Does the server accept connections (starting, in recovery, connection limit)?
    - Does it accept the logins of the environment and of the application?
    - Can it write (disk full, read only)?
    - Which sessions block others, or are idle in a transaction? How many connections are left?
    - Do commits wait for a standby? Does replication lag? Is WAL archived?
    - Has the server been running for longer than `window_minutes`, or did it restart after a crash?

    Run it first when the application reports database errors, or when replication lags. It also works while the
    database is down. It changes nothing (a temporary table is rolled back) and takes no lock.

    Evidence: every answer, the last 100 lines of the log, and the names of the service's variables; secrets are
    masked. Each cause links the runbooks that help, with their forms filled in.

    Departs from the manual: `max_connections` takes effect only after a restart, `pg_reload_conf()` does not apply it;
    not every row of pg_stat_activity is a client.

    Args:
        environment: Environment (lab, staging, production …)
        window_minutes: Unplanned restarts within this many minutes are possible causes
    """
    env = Environment.find(environment)
    with runbook("Diagnose database", env) as report:
        found = Diagnosis(report, env)
        if has_one_primary(found):
            _walk(found, window_minutes)
        found.close("the database accepts connections and writes, and no session waits")
    return report


def _walk(found: Diagnosis, minutes: int) -> None:
    judge_standby(found)
    if is_reachable(found):
        _judge_writing(found)
        judge_sessions(found)
        judge_replication(found)
        _judge_restart(found, minutes)


def _judge_restart(found: Diagnosis, minutes: int) -> None:
    """A crash is over when somebody looks: clients lost their sessions, and what they had not committed."""
    node, question = found.env.postgres, "since when has PostgreSQL been running?"
    uptime = found.ask(question, lambda: read_uptime(node))
    if not uptime:
        return
    end = previous_end(found, node.service, postgres_end(long_log(found, node.service) + "\n" + own_log(node)))
    if uptime.crashed and end.how != "unexpected":
        end = LastEnd("unexpected", "one of its processes crashed, and it started all of them again")
    consequence = "All sessions ended; transactions that were not committed are lost"
    where = f"PostgreSQL at {node.host}:{node.port}"
    judge_restart(found, where, uptime.seconds, end, minutes=minutes, consequence=consequence, follow=(CHECK_DATA,))


CHECK_DATA = Next("check-corruption", "if its host or disk failed: check the data files")
LEAST_BYTES = 64 * 1024**2  # four files of WAL
FULL_RATIO = 0.99
DISK, LOGIN = "disk", "login"
OPTIONS = Next("show-recovery-options", "compare the recovery options and their data loss")
FREE_DISK = Next("free-disk-emergency", "free disk space (plan first; it never touches pg_wal)")


def is_reachable(found: Diagnosis) -> bool:
    """Whether the administrator can log in; all other questions need that."""
    node = found.env.postgres
    where = f"{node.host}:{node.port}"
    log = attach_service(found, node.service, without_statements) + "\n" + own_log(node)
    found.report.fact("server", where)
    _judge_disk(found)
    question = f"does {where} answer?"
    greeting = read_greeting(node)
    if greeting.state == "ready":
        found.record(question, greeting.detail)
        return _judge_logins(found, judge_own_login(found))
    if greeting.state == "full":
        found.record(question, greeting.detail, full_cause(where))
        return _judge_admin(found)  # the connections that are reserved for superusers may be free
    found.record(question, greeting.detail, _silent_cause(found, where, greeting, log))
    return False


def _judge_disk(found: Diagnosis) -> None:
    """The first question: with a full disk the server refuses connections, hangs or stops, and cannot log why."""
    node, question = found.env.postgres, "is there free disk space?"
    data = Path(node.data_directory)
    disks = [disk for path in (data, data / "pg_wal") if (disk := disk_on(node.host, path))]  # WAL may have its own
    disk = max(disks, key=lambda one: one.used_ratio, default=None)
    if disk is None:
        found.note(question, f"not measured: {node.data_directory} is not visible from this host")
        found.report.fact("disk of the database", "not measured: run a worker on the database's host")
        return
    found.report.fact("disk of the database", disk.told)
    cause = None
    if disk.free_bytes < LEAST_BYTES or disk.used_ratio > FULL_RATIO:
        cause = _full_disk(f"{disk.told} at {disk.path}", kind="")
    elif disk.used_ratio > found.report.limit(metrics.DISK)[1]:
        what = f"the disk of PostgreSQL is nearly full: {disk.told}"
        hint = "free disk space before PostgreSQL stops"
        cause = Cause(what, hint, (FREE_DISK,), Status.WARN, impact=Impact.THREATENS)
    found.record(question, disk.told, cause)


def _full_disk(seen: str, kind: str = DISK) -> Cause:
    hint = "free disk space: PostgreSQL stops if it cannot write WAL; never delete files in pg_wal"
    return Cause(f"the disk of PostgreSQL is full: {seen}", hint, (FREE_DISK,), kind=kind, impact=Impact.HIDES)


def _silent_cause(found: Diagnosis, where: str, greeting: Greeting, log: str) -> Cause:
    """Why nobody can log in: nothing else about the server can be judged."""
    follow = _options(found)
    match greeting.state:
        case "unknown name":
            what = f"this host cannot resolve the name of PostgreSQL's host: {found.env.postgres.host}"
            hint, follow = "correct [postgres] host, or fix name resolution (DNS)", ()
        case "unreachable":
            what = f"the host of PostgreSQL cannot be reached: {where} ({greeting.detail})"
            hint = "check that the host is up, then the network and the firewall"
        case "silent":
            what = f"PostgreSQL at {where} hangs: it accepts connections and does not answer (or is no PostgreSQL)"
            seen, hint = stopped_process(found, found.env.postgres.service)
            what += f"; {seen}" if seen else ""
            hint = hint or "check its host (CPU, disk, a stopped process: ps -o stat) and its log"
        case "not PostgreSQL":
            what = f"the process that listens on {where} is no PostgreSQL ({greeting.detail})"
            hint = "find that process with ss -ltnp; then correct [postgres] port, or stop the process"
            follow = ()
        case "not now":
            what = f"PostgreSQL at {where} is starting up, recovering or stopping: {greeting.detail}"
            hint = "wait: it replays WAL since its last checkpoint; its log shows the progress"
            what += describe_start(found, found.env.postgres.service, postgres_end(log))
            follow = (Next("diagnose-database", "check again in a minute"),)
        case _:
            return _down_cause(found, where, find_reason(log), follow)
    return Cause(what, hint, follow, impact=Impact.HIDES)


def _options(found: Diagnosis) -> tuple[Next, ...]:
    """The recoveries of a server that does not answer. A standby that does not answer either cannot be promoted."""
    can_promote = found.env.has("standby") and not any(one.kind == STANDBY for one in found.causes)
    return (Next("postgres-failover", "promote the standby"), OPTIONS) if can_promote else (OPTIONS,)


def _down_cause(found: Diagnosis, where: str, reason: LogReason | None, options: tuple[Next, ...]) -> Cause:
    """Nobody listens: either the process is dead, or it listens on another address."""
    role = found.env.postgres.service
    state, described = read_state(found, role)
    since = f", since {reason.what}" if reason else ""
    first: tuple[Next, ...] = ()
    if reason:
        found.note("what does its log report?", reason.line)
        undo = Next("undo-postgres-settings", "undo what ALTER SYSTEM wrote")
        first = {"disk": (FREE_DISK,), "configuration": (undo,)}.get(reason.kind, ())
    # A service manager restarts a process that exits at once: for a moment each time there is one.
    if state and state.pid:
        what = f"nobody listens on {where}, but the server's process runs ({described}){since}"
        hint = "compare port and listen_addresses with [postgres]; the server may still be starting"
        hint = reason.hint if reason else hint
    else:
        dead = f"the server's process is dead ({described})" if state else f"nobody listens there ({described})"
        what = f"PostgreSQL at {where} is down: {dead}{since}"
        hint = f"{start_hint(found, role)}; if it stops again, its log shows why"
        if reason and reason.hint.endswith("start it"):
            hint = reason.hint.removesuffix("start it") + start_hint(found, role)
        elif reason:
            hint = reason.hint
    return Cause(what, hint, (*first, *options), impact=Impact.HIDES)


def judge_own_login(found: Diagnosis) -> bool:
    """Log in with the application's own connection string. Whether that succeeded."""
    if not found.env.has("application") or not found.env.application.env_file:
        return False
    application = found.env.application
    question = f"does PostgreSQL accept the application's own {application.dsn_variable}?"
    with found.asking(question):
        trial = try_own_login(application)
        if trial.ok:
            found.record(question, "it logs in")
            return True
        then = (Next("diagnose-application", "check the application afterwards"),)
        string = f"the application's own connection string ({application.dsn_variable} in {application.env_file})"
        match trial.kind:
            case "full":
                cause = full_cause(f"{found.env.postgres.host}:{found.env.postgres.port}")
            case "disk":
                cause = _full_disk(trial.said)
            case "password":
                hint = "correct that line and restart the backend, or set the role's password (ALTER ROLE … PASSWORD)"
                cause = Cause(f"PostgreSQL refuses the password of {string}: {trial.said}", hint, then)
            case "no answer":
                hint = "compare its host and port with [postgres]: it may name another server"
                cause = Cause(f"no server answers at the address of {string}: {trial.said}", hint, then)
            case _:
                kind = LIMIT if trial.kind == "limit" else ""
                what = f"PostgreSQL refuses the login of {string}: {trial.said}"
                cause = Cause(what, trial.hint, then, kind=kind)
        found.record(question, trial.said, cause)
    return False


def _judge_logins(found: Diagnosis, application_logs_in: bool) -> bool:
    """The environment's two roles. Where the application itself logs in, a password that is wrong only in the
    environment affects these runbooks, no client."""
    node = found.env.postgres
    question = f"can role {node.user} log in?"
    try:
        node.connect(node.database, as_application=True).close()
        found.record(question, f"into {node.database}")
    except OpsError as error:
        cause = _login_cause(found, error)
        if not cause.kind:
            cause = replace(cause, kind=LOGIN)
            if application_logs_in:
                cause = replace(cause, status=Status.WARN, impact=Impact.THREATENS)
        found.record(question, error.message, cause)
    return _judge_admin(found)


def _judge_admin(found: Diagnosis) -> bool:
    """Every other question needs the administrator's login."""
    node = found.env.postgres
    question = f"can role {node.admin_user} log in?"
    try:
        node.connect("").close()
    except OpsError as error:
        cause = _login_cause(found, error)
        if cause.kind == LIMIT:
            cause = full_cause(f"{node.host}:{node.port}", is_blind=True)
        found.record(question, error.message, replace(cause, impact=Impact.HIDES))
        return False
    found.record(question, f"into {node.maintenance_database}")
    return True


def _login_cause(found: Diagnosis, error: OpsError) -> Cause:
    """Decided by SQLSTATE: a server without a free connection has not refused the password."""
    code = error.sqlstate if isinstance(error, LoginRefused) else UNKNOWN
    if code == DISK_FULL:
        return _full_disk(error.message)
    if code == TOO_MANY and not is_own_limit(error.message):
        return full_cause(f"{found.env.postgres.host}:{found.env.postgres.port}")
    check = Next("check-connections", "see which clients use the connections")
    if code == TOO_MANY:  # the role's or the database's own limit
        return Cause(error.message, error.hint, (check,), kind=LIMIT)
    return Cause(error.message, error.hint)


def _judge_writing(found: Diagnosis) -> None:
    question = "can it write?"
    # If the application's role cannot log in, the administrator tries: the server itself may still be able to write.
    refused = any(one.kind in (LOGIN, LIMIT) for one in found.causes)
    trial = found.ask(question, lambda: try_to_extend(found.env.postgres, as_application=not refused))
    if not trial:
        return
    cause = None
    if trial.kind == "disk":
        cause = _full_disk(trial.said, kind="")
    elif trial.kind == "read only":
        failover = Next("postgres-failover", "promote the standby, if the primary is lost")
        hint = "it is a standby, or an operator contained the environment (release-containment)"
        cause = Cause(f"the database rejects writes: {trial.said}", hint, (failover, OPTIONS))
    elif not trial.ok:
        cause = Cause(f"PostgreSQL refuses a write: {trial.said}", "fix this error; the server's log has the details")
    found.record(question, "a temporary table, rolled back" if trial.ok else trial.said, cause)
