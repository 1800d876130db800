"""Why the database cannot be reached or does not answer as it should (appendix A)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prefect import flow

from blocks.environment import Environment
from blocks.postgres.refusals import DISK_FULL, TOO_MANY, UNKNOWN, LoginRefused, is_own_limit
from flows.database.server.sessions import judge_blocked, judge_idle, judge_used
from flows.troubleshooting.diagnosis import Cause, Diagnosis, read_state, tell_service, worst_of
from runbook import metrics
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import duration
from tasks.host.disk import disk_on
from tasks.postgres.replication.status import Replication, read_replication
from tasks.postgres.server.greeting import Greeting, read_greeting
from tasks.postgres.server.log_reasons import Reason, find_reason, own_log, without_statements
from tasks.postgres.server.login_trial import try_own_login, try_to_extend
from tasks.postgres.sessions.blocking import tree_of
from tasks.postgres.sessions.connections import Activity, read_activity


@flow(name="diagnose-database", flow_run_name="diagnose-database {environment}")
def diagnose_database(environment: str) -> Report:
    """データベース接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: whether the host and the port can be reached and the
    process lives, whether the server takes connections (starting, in recovery, full), whether the environment's logins
    and the application's own are taken, whether it can write (disk, read only), who blocks whom, who sits idle in a
    transaction, what is left of max_connections, whether commits wait and WAL gets away. Run it first when the
    application reports database errors, and when replication lags.

    It changes nothing (a temporary table is rolled back), takes no lock, and works with the database down. Evidence:
    the answers in their order, the last 100 lines of the log and the environment by names, masked. It ends with links
    to the runbooks that help, filled in, and what must be undone later.

    Departs from the manual: `max_connections` takes effect at a restart only, `pg_reload_conf()` does nothing for it;
    lines of pg_stat_activity are not all clients.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose database", env) as report:
        found = Diagnosis(report, env)
        if walk_outside(found):
            walk_inside(found)
        found.close("the database takes connections and writes, and nobody waits")
    return report


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
        found.blame(
            question,
            told,
            Cause(
                f"the disk of PostgreSQL is full: {told} at {disk.path}",
                "make room before it stops: it ends when it cannot write WAL",
                (FREE_DISK,),
            ),
        )
    elif disk.used_ratio > 0.95:
        found.blame(
            question,
            told,
            Cause(
                f"the disk of PostgreSQL is nearly full: {told}", "make room before it stops", (FREE_DISK,), Status.WARN
            ),
        )
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
            return Cause(
                f"the name of PostgreSQL's host is not known here: {found.env.postgres.host}",
                "correct [postgres] host, or the name server",
            )
        case "unreachable":
            return Cause(
                f"the host of PostgreSQL cannot be reached: {where} ({greeting.detail})",
                "look whether the host runs, and at network and firewall between",
                ways,
            )
        case "silent":
            return Cause(
                f"PostgreSQL at {where} hangs: it takes connections and says nothing (or it is no PostgreSQL)",
                "look at its host (CPU, disk, a stopped process: ps -o stat), and its log",
                ways,
            )
        case "not PostgreSQL":
            return Cause(
                f"what listens on {where} is no PostgreSQL ({greeting.detail})",
                "ss -ltnp names the process; correct [postgres] port, or end that process",
            )
        case "not now":
            return Cause(
                f"PostgreSQL at {where} is starting up, recovering or stopping: {greeting.detail}",
                "wait: it replays WAL since its last checkpoint; its log tells how far. Launch this again",
                (Next("diagnose-database", "look again in a minute"),),
            )
    return _down_cause(found, where, reason, ways)


def _down_cause(found: Diagnosis, where: str, reason: Reason | None, ways: tuple[Next, ...]) -> Cause:
    """Nobody listens: by its service manager the process is dead, or lives and listens elsewhere."""
    state, told = read_state(found, found.env.postgres.service)
    since = f", since {reason.what}" if reason else ""
    if reason:
        found.told("what does its log say?", reason.line)
    disk = (FREE_DISK,) if reason and reason.kind == "disk" else ()
    undo = (
        (Next("undo-postgres-settings", "put back what ALTER SYSTEM wrote"),)
        if reason and reason.kind == "configuration"
        else ()
    )
    # A service manager starts again and again what ends at once: for a moment each time there is a process.
    if state and state.pid:
        return Cause(
            f"nobody listens on {where}, and yet the server's process runs ({told}){since}",
            reason.hint if reason else "compare port and listen_addresses with [postgres]; it may be starting",
            (*disk, *undo, *ways),
        )
    dead = f"the server's process is dead ({told})" if state else f"nobody listens there ({told})"
    return Cause(
        f"PostgreSQL at {where} is down: {dead}{since}",
        reason.hint if reason else "start it; where it ends again its log says why",
        (*disk, *undo, *ways),
    )


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


CLOSE = Next("close-idle-connections", "end what sits idle in a transaction", {"min_seconds": 60})
CHECK = Next("check-connections", "see who blocks whom, and who has the places")
REPLICATION = Next("check-replication", "see who lags, and what holds WAL")
LAG_SECONDS = 10.0  # the manual's alarm (appendix B)
WAITED_SECONDS = 10.0


def walk_inside(found: Diagnosis) -> None:
    """Each of these is judged, whatever the one before found."""
    _judge_writing(found)
    node = found.env.postgres
    activity = found.ask("who is connected?", lambda: read_activity(node))
    if activity:
        if activity.hidden:
            found.skip(
                "what does every session do?",
                f"{activity.hidden} sessions hide it",
                f"make {node.admin_user} a member of pg_read_all_stats",
            )
        _judge_places(found, activity)
        _judge_locks(found, activity)
        _judge_idle(found, activity)
    _judge_standby(found)
    replication = found.ask("does WAL get away?", lambda: read_replication(node))
    if replication:
        _judge_replication(found, replication)


def _judge_writing(found: Diagnosis) -> None:
    question = "can it write?"
    # Where the application's role is not let in, whether the server can write is asked all the same.
    trial = found.ask(question, lambda: try_to_extend(found.env.postgres, as_application=not found.causes))
    if trial:
        if trial.ok:
            found.well(question, "a temporary table, rolled back")
        elif trial.kind == "disk":
            found.blame(
                question,
                trial.said,
                Cause(
                    f"the disk of PostgreSQL is full: {trial.said}", "make room, never by hand in pg_wal", (FREE_DISK,)
                ),
            )
        elif trial.kind == "read only":
            ways = (Next("postgres-failover", "promote it, if the primary is lost"), OPTIONS)
            found.blame(
                question,
                trial.said,
                Cause(
                    f"the database takes no writes: {trial.said}",
                    "it is a standby, or somebody contained it (release-containment)",
                    ways,
                ),
            )
        else:
            found.blame(
                question,
                trial.said,
                Cause(f"PostgreSQL refuses a write: {trial.said}", "correct that; its log tells more"),
            )


def _judge_places(found: Diagnosis, activity: Activity) -> None:
    question, limits = "are there places left?", activity.limits
    status = worst_of(found.report, lambda: judge_used(found.report, activity), metrics.CONNECTIONS.name)
    told = f"{len(activity.clients) + 1} of {limits.most}, {limits.reserved} of them reserved"
    counted = Counter((one.user, one.application or "no name") for one in activity.clients).most_common(1)
    by = f", {counted[0][1]} by {counted[0][0][0]} ({counted[0][0][1]})" if counted else ""
    node = found.env.postgres
    own = sum(one.user == node.user for one in activity.clients)
    inside = sum(one.database == node.database for one in activity.clients)
    narrow = (("role", node.user, own, limits.of_role), ("database", node.database, inside, limits.of_database))
    limited = [(kind, name, most) for kind, name, there, most in narrow if 0 <= most <= there]
    if limited:
        kind, name, most = limited[0]
        found.blame(
            question,
            told,
            Cause(
                f"the {kind} {name} has reached its own connection limit of {most}: max_connections does not matter",
                f"ALTER {kind.upper()} {name} CONNECTION LIMIT raises it; close-idle-connections ends idle sessions",
                (CLOSE, CHECK),
            ),
        )
        return
    full = len(activity.clients) >= limits.ordinary or own >= limits.application
    if full or (status is not Status.OK and activity.used_ratio >= 0.95):
        found.blame(question, told, full_cause(found, f"{node.host}:{node.port}", f" ({told}{by})", limits.most))
    elif status is not Status.OK:
        found.blame(
            question,
            told,
            Cause(
                f"PostgreSQL is near its connection limit: {told}{by}",
                "lower the pools, or raise max_connections",
                (CLOSE, CHECK),
                Status.WARN,
            ),
        )
    else:
        found.well(question, told)


def _judge_locks(found: Diagnosis, activity: Activity) -> None:
    question = "does anybody wait for a lock?"
    database = found.env.postgres.database
    status = worst_of(
        found.report, lambda: judge_blocked(found.report, activity, database), "postgres.sessions.blocked"
    )
    tree = tree_of(activity.sessions)
    if not tree or status is Status.OK:
        found.well(question, f"{len(activity.blocked)} sessions wait")
        return
    root = tree[0]
    who = "a prepared transaction"
    if root.session:
        who = f"process {root.pid} ({root.session.user}, {root.session.application or 'no name'}, {root.session.state})"
    waited = max(one.waited_seconds for one in activity.blocked)
    told = f"{len(activity.blocked)} sessions wait, the longest for {duration(waited)}, behind {who}"
    idle = root.session is not None and root.session.is_idle_in_transaction
    doing = "" if root.session is None else f"; its statement: {root.session.statement[:120]}"
    found.blame(
        question,
        told,
        Cause(
            f"a lock pile-up: {told}{doing}",
            "end it by close-idle-connections, its client forgot it"
            if idle
            else "the table “Who blocks whom” begins with who holds them up; pg_cancel_backend ends its statement",
            (CLOSE, CHECK) if idle else (CHECK,),
            status,
        ),
    )


def _judge_idle(found: Diagnosis, activity: Activity) -> None:
    question, database = "does anybody sit idle in a transaction?", found.env.postgres.database
    metric = "postgres.sessions.idle_in_transaction"
    status = worst_of(found.report, lambda: judge_idle(found.report, activity, database), metric)
    idle = [one for one in activity.clients if one.is_idle_in_transaction]
    many = len(idle) > max(5, len(activity.clients) / 2)
    told = f"{len(idle)} of {len(activity.clients)} sessions"
    if idle and (many or status is not Status.OK):
        longest = max(one.state_seconds for one in idle)
        found.blame(
            question,
            told,
            Cause(
                f"{told} are idle in a transaction, the longest for {duration(longest)}; they hold locks",
                "the code forgets to end its transactions; close them, and set idle_in_transaction_session_timeout",
                (CLOSE, CHECK),
                status if status is not Status.OK else Status.WARN,
            ),
        )
    else:
        found.well(question, told)


def _judge_standby(found: Diagnosis) -> None:
    """A dead standby does not lag: it is not there."""
    if not found.env.has("standby"):
        return
    node = found.env.standby
    question, greeting = f"does the other node at {node.host}:{node.port} answer?", read_greeting(node)
    if greeting.state == "ready":
        found.well(question, greeting.detail)
        return
    found.blame(
        question,
        greeting.detail,
        Cause(
            f"the standby at {node.host}:{node.port} does not answer ({greeting.state}: {greeting.detail})",
            "start it, or look at its log; until then nothing takes over, and a slot keeps WAL for it",
            (REPLICATION, Next("rejoin-standby", "make it follow again")),
            Status.WARN,
        ),
    )


def _judge_replication(found: Diagnosis, replication: Replication) -> None:
    if replication.settings.in_recovery:
        found.blame(
            "is it a primary?",
            "it is in recovery",
            Cause(
                "PostgreSQL is in recovery: it is a standby, and takes no writes",
                "promote it only when the primary is proven lost",
                (Next("postgres-failover", "promote it"), OPTIONS),
            ),
        )
        return
    question = "do commits wait for a standby?"
    if replication.waiting_commits and replication.waited_seconds > WAITED_SECONDS:
        told = f"{replication.waiting_commits} commits wait, the longest for {duration(replication.waited_seconds)}"
        found.blame(
            question,
            told,
            Cause(
                f"{told}, for the standby that synchronous_standby_names asks for",
                "bring the standby or the receiver back; never cancel what waits",
                (REPLICATION,),
            ),
        )
    else:
        found.well(question, f"{replication.waiting_commits} commits wait")
    lagging = [one for one in replication.standbys if one.lag_seconds > LAG_SECONDS]
    if lagging:
        told = ", ".join(f"{one.name} by {duration(one.lag_seconds)}" for one in lagging)
        found.blame(
            "does a standby lag?",
            told,
            Cause(
                f"replication lags: {told}",
                "look at the standby's host, and at long queries there",
                (REPLICATION,),
                Status.WARN,
            ),
        )
    else:
        found.well("does a standby lag?", f"{len(replication.standbys)} are connected")
    archiver = replication.archiver
    if archiver.is_failing:
        told = f"{archiver.waiting} files wait, the last failure was {archiver.last_failed}"
        found.blame(
            "is WAL archived?",
            told,
            Cause(
                f"archiving of WAL fails, and pg_wal grows: {told}",
                "the server's log says why archive_command fails",
                (REPLICATION,),
                Status.WARN,
            ),
        )
    lost = [one.name for one in replication.slots if one.wal_status == "lost"]
    if lost:
        found.blame(
            "are the slots whole?",
            ", ".join(lost),
            Cause(
                f"replication slots are lost: {', '.join(lost)}",
                "their standby needs a new base backup",
                (REPLICATION,),
                Status.WARN,
            ),
        )
