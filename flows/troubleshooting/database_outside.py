"""The first half of the database's tree: what can be told from outside, and whether it lets anybody in."""

from __future__ import annotations

from pathlib import Path

from blocks.postgres_refusals import DISK_FULL, TOO_MANY, UNKNOWN, LoginRefused, is_own_limit
from flows.troubleshooting.diagnosis import Cause, Diagnosis, Next, read_state, tell_service
from runbook.errors import OpsError
from runbook.report import Status
from tasks.host import disk_on
from tasks.postgres.greeting import Greeting, read_greeting
from tasks.postgres.log_reasons import Reason, find_reason, own_log, without_statements
from tasks.postgres.trial import try_own_login

MANUAL_CONNECTIONS, REMEDY_HOURS = 300, 24
LEAST_BYTES = 64 * 1024**2  # four files of WAL
PLACES = "places"
DISK = "disk"
OPTIONS = Next("show-recovery-options", "every way to bring the data back, with what each loses")
FREE_DISK = Next("free-disk-emergency", "make room (plan first; pg_wal is never touched)")


def walk_outside(found: Diagnosis) -> bool:
    """Whether the administrator gets in: only then there is more to see."""
    node = found.env.postgres
    where = f"{node.host}:{node.port}"
    log = tell_service(found, node.service, without_statements) + "\n" + own_log(node)
    found.report.fact("server", where)
    _judge_disk(found)
    question = f"does {where} answer?"
    greeting = read_greeting(node)
    if greeting.state == "ready":
        found.well(question, greeting.detail)
        judge_own_login(found)
        return _judge_logins(found)
    if greeting.state == "full":
        found.blame(question, greeting.detail, full_cause(found, where))
        return True  # the places that are reserved for superusers may be free
    found.blame(question, greeting.detail, _silent_cause(found, where, greeting, find_reason(log)))
    return False


def _judge_disk(found: Diagnosis) -> None:
    """First of all: a server without room lets nobody in, hangs, or has ended, and its log could not say so either."""
    node, question = found.env.postgres, "is there room on its disk?"
    data = Path(node.data_directory)
    disks = [disk for path in (data, data / "pg_wal") if (disk := disk_on(node.host, path))]  # WAL may have its own
    disk = max(disks, key=lambda one: one.used_ratio, default=None)
    if disk is None:
        found.told(question, f"not measured: {node.data_directory} cannot be seen from this host")
        found.report.fact("disk of the database", "not measured: run a worker on its host")
        return
    told = disk.told
    found.report.fact("disk of the database", told)
    if disk.free_bytes < LEAST_BYTES or disk.used_ratio > 0.99:
        found.blame(question, told, Cause(f"the disk of PostgreSQL is full: {told} at {disk.path}",
                    "make room before it stops: it ends when it cannot write WAL", (FREE_DISK,)))  # fmt: skip
    elif disk.used_ratio > 0.95:
        found.blame(question, told, Cause(f"the disk of PostgreSQL is nearly full: {told}",
                    "make room before it stops", (FREE_DISK,), Status.WARN))  # fmt: skip
    else:
        found.well(question, told)


def full_cause(found: Diagnosis, where: str, told: str = "", most: int = 0) -> Cause:
    """Every place is taken. The manual's remedy, and what the manual leaves out of it."""
    raised = max(MANUAL_CONNECTIONS, -(-most * 3 // 2))
    return Cause(
        f"PostgreSQL at {where} has reached its connection limit{told}: it takes no more clients",
        "close what is idle in a transaction; then lower the pools, or raise max_connections (needs a restart)",
        (
            Next("close-idle-connections", "end sessions that sit idle in a transaction", {"min_seconds": 60}),
            Next("check-connections", "see who has the places"),
            Next("check-pool-settings", "compare the pools with the places"),
            Next(
                "apply-postgres-settings",
                "temporary remedy: more places (付録A)",
                {
                    "override": f"max_connections = {raised}",
                    "override_hours": REMEDY_HOURS,
                    "reason": "connection limit reached (diagnose-database)",
                },
                "takes effect at a restart of PostgreSQL only (a reload does nothing; a standby goes first), and ends "
                f"after {REMEDY_HOURS} h: undo it then, and restart again",
            ),
            Next("undo-postgres-settings", "afterwards: put the old limit back"),
        ),
        kind=PLACES,
    )


def _silent_cause(found: Diagnosis, where: str, greeting: Greeting, reason: Reason | None) -> Cause:
    ways = (Next("postgres-failover", "promote the standby"), OPTIONS) if found.env.has("standby") else (OPTIONS,)
    match greeting.state:
        case "unknown name":
            return Cause(f"the name of PostgreSQL's host is not known here: {found.env.postgres.host}",
                         "correct [postgres] host, or the name server")  # fmt: skip
        case "unreachable":
            return Cause(f"the host of PostgreSQL cannot be reached: {where} ({greeting.detail})",
                         "look whether the host runs, and at network and firewall between", ways)  # fmt: skip
        case "silent":
            return Cause(f"PostgreSQL at {where} hangs: it takes connections and says nothing (or it is no PostgreSQL)",
                         "look at its host (CPU, disk, a stopped process: ps -o stat), and its log", ways)  # fmt: skip
        case "not PostgreSQL":
            return Cause(f"what listens on {where} is no PostgreSQL ({greeting.detail})",
                         "ss -ltnp names the process; correct [postgres] port, or end that process")  # fmt: skip
        case "not now":
            return Cause(f"PostgreSQL at {where} is starting up, recovering or stopping: {greeting.detail}",
                         "wait: it replays WAL since its last checkpoint; its log tells how far. Launch this again",
                         (Next("diagnose-database", "look again in a minute"),))  # fmt: skip
    return _down_cause(found, where, reason, ways)


def _down_cause(found: Diagnosis, where: str, reason: Reason | None, ways: tuple[Next, ...]) -> Cause:
    """Nobody listens: by its service manager the process is dead, or lives and listens elsewhere."""
    state, told = read_state(found, found.env.postgres.service)
    since = f", since {reason.what}" if reason else ""
    if reason:
        found.told("what does its log say?", reason.line)
    disk = (FREE_DISK,) if reason and reason.kind == "disk" else ()
    undo = (Next("undo-postgres-settings", "put back what ALTER SYSTEM wrote"),) \
        if reason and reason.kind == "configuration" else ()  # fmt: skip
    # A service manager starts again and again what ends at once: for a moment each time there is a process.
    if state and state.pid:
        return Cause(f"nobody listens on {where}, and yet the server's process runs ({told}){since}",
                     reason.hint if reason else "compare port and listen_addresses with [postgres]; it may be starting",
                     (*disk, *undo, *ways))  # fmt: skip
    dead = f"the server's process is dead ({told})" if state else f"nobody listens there ({told})"
    return Cause(f"PostgreSQL at {where} is down: {dead}{since}",
                 reason.hint if reason else "start it; where it ends again its log says why",
                 (*disk, *undo, *ways))  # fmt: skip


def _full_disk(told: str) -> Cause:
    return Cause(
        f"the disk of PostgreSQL is full: {told}", "make room, never by hand in pg_wal", (FREE_DISK,), kind=DISK
    )


def judge_own_login(found: Diagnosis) -> None:
    """The connection string that the application itself has."""
    if not found.env.has("application") or not found.env.application.env_file:
        return
    application = found.env.application
    question = f"is the application's own {application.dsn_variable} taken?"
    with found.asking(question):
        trial = try_own_login(application)
        if trial.ok:
            found.well(question, "it logs in")
            return
        then = (Next("diagnose-application", "then see that it is healthy"),)
        string = f"the application's own connection string ({application.dsn_variable} in {application.env_file})"
        match trial.kind:
            case "full":
                cause = full_cause(found, f"{found.env.postgres.host}:{found.env.postgres.port}")
            case "disk":
                cause = _full_disk(trial.said)
            case "password":
                cause = Cause(
                    f"PostgreSQL refuses the password of {string}: {trial.said}",
                    "correct that line and restart the backend, or give the role that password (ALTER ROLE … PASSWORD)",
                    then,
                )
            case "no answer":
                cause = Cause(
                    f"nothing answers at the address of {string}: {trial.said}",
                    "compare its host and port with [postgres]: it may name another server",
                    then,
                )
            case _:
                cause = Cause(f"PostgreSQL refuses the log-in of {string}: {trial.said}", trial.hint, then)
        found.blame(question, trial.said, cause)


def _judge_logins(found: Diagnosis) -> bool:
    node = found.env.postgres
    for user, database, as_application in ((node.user, node.database, True), (node.admin_user, "", False)):
        question = f"is role {user} let in?"
        try:
            node.connect(database, as_application=as_application).close()
            found.well(question, f"into {database or node.maintenance_database}")
        except OpsError as error:
            found.blame(question, error.message, _login_cause(found, error))
            if not as_application:
                return False
    return True


def _login_cause(found: Diagnosis, error: OpsError) -> Cause:
    """By the SQLSTATE: a server without a free connection has refused no password."""
    code = error.sqlstate if isinstance(error, LoginRefused) else UNKNOWN
    if code == DISK_FULL:
        return _full_disk(error.message)
    if code == TOO_MANY and not is_own_limit(error.message):
        return full_cause(found, f"{found.env.postgres.host}:{found.env.postgres.port}")
    who = (Next("check-connections", "see who holds the connections"),) if code == TOO_MANY else ()
    return Cause(error.message, error.hint, who)
