"""Why the application does not start, or is unhealthy (appendix A)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blocks.environment import Environment
from blocks.services.service import ServiceState
from flows.troubleshooting.database import judge_own_login
from flows.troubleshooting.diagnosis import (
    Cause,
    Diagnosis,
    Impact,
    attach_service,
    read_state,
    start_hint,
    stopped_process,
)
from flows.troubleshooting.restarts import WINDOW_MINUTES, Window, judge_restart, long_log, previous_end
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard import containment
from runbook.guard.lock import hold
from runbook.next import Next
from runbook.page.markdown import code, escaped, fenced
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration
from runbook.wait import until
from tasks.application.health import NO_HEALTH, ROLES, health_checks, read_problems
from tasks.application.start_trial import (
    HOOKS,
    Listener,
    StartReason,
    StartTrial,
    find_listener,
    find_reason,
    is_local,
    listens,
    port_of,
    start_in_foreground,
)
from tasks.host.restarts import read_process, uvicorn_end
from tasks.migrations.alembic import read_revision
from tasks.migrations.scripts import read_heads
from tasks.postgres.server.greeting import read_greeting
from tasks.redis.greeting import read_answer
from tasks.redis.sentinels import master_by, read_sentinels


@flow(name="diagnose-application", flow_run_name=RunName("diagnose-application {environment}"))
def diagnose_application(environment: str, window_minutes: Window = WINDOW_MINUTES) -> Report:
    """アプリケーション起動エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first:

    - Do the database and Redis answer? Does PostgreSQL accept the application's own login?
    - Do backend and frontend run and answer? Which process uses their ports?
    - What do the last 100 lines of their logs report?
    - If the backend is stopped: a start in the foreground on a free port, with its traceback.
    - Does the database have the migrations that the code needs?
    - Have the processes been running for longer than `window_minutes`, or did one restart after it was killed?

    Run it on the application's host, first when the application does not start or its health check fails. It changes
    nothing. The trial start uses its own port and skips uvicorn's start-up hooks (migrations, queues, schedules). If
    `start_variables` in [application] enable the hooks, they run. The run ends every process of the trial. During the
    trial it holds the environment's lock. It starts nothing while another run holds the lock, or in a contained
    environment.

    Evidence: every answer, the logs, and the names of the services' variables; secrets are masked. Each cause links the
    runbooks that help, with their forms filled in.

    Departs from the manual: `uvicorn --reload` on the live port would conflict with the service; `systemctl show
    --property=Environment` prints secrets.

    Args:
        environment: Environment (lab, staging, production …)
        window_minutes: Unplanned restarts within this many minutes are possible causes
    """
    env = Environment.find(environment)
    with runbook("Diagnose application", env) as report:
        found = Diagnosis(report, env)
        walk(found)
        for role in ROLES:
            _judge_restart(found, role, window_minutes)
        found.close("backend and frontend run and are healthy")
    return report


QUESTION = "does it start in the foreground?"


def try_start(found: Diagnosis) -> StartTrial | None:
    """Start the backend in the foreground, under the environment's lock: a restore may have stopped the service.

    None if no start command is configured, another run holds the lock, or the environment is contained."""
    env = found.env
    if not env.application.start_command:
        found.note(QUESTION, "not tried: [application] start_command is not configured")
        return None
    with found.asking(QUESTION):
        if contained := containment.read(env.name, env.reports_directory):
            raise contained.refusal(env.name)
        with hold(env.name, env.reports_directory, found.report.runbook, "maintenance"):
            trial = start_in_foreground(env.application)
        _attach_trial(found, trial)
        return trial
    return None


def _attach_trial(found: Diagnosis, trial: StartTrial) -> None:
    took = duration(trial.seconds)
    ended = f"it exited with code {trial.code} after {took}"
    if trial.served:
        ended = f"it serves after {took}"
    elif trial.code is None:
        ended = f"it neither served nor exited within {took}"
    parts = [ended, "" if trial.hooks else f"without its start-up hooks ({HOOKS}=off)", f"variables: {trial.variables}"]
    if trial.served:
        parts += [
            "the code starts: the fault is in the service"
            if trial.hooks
            else "code and settings load: the fault is in its hooks, its unit or its user"
        ]
    result = "; ".join(filter(None, parts))
    found.note(QUESTION, result)
    head = f"{code(trial.command)} — {escaped(result)}\n\n"
    found.report.attach(Evidence("Foreground start on a free port", text=head + fenced(trial.output or "(nothing)")))


DATABASE = Next("diagnose-database", "find the cause")
REDIS = Next("diagnose-redis", "find the cause")
LOGS = Next("summarise-errors", "see the errors in its log")
DEPLOY = Next("deploy-application", "deploy a version that starts")
PACKAGES = Next("check-dependencies", "compare the installed packages with the lock file")
MIGRATE = Next("apply-migrations", "migrate the database to the code's revision (plan first)")
FREE_DISK = Next("free-disk-emergency", "free disk space")
_FOLLOW: dict[str, tuple[Next, ...]] = {
    "import": (PACKAGES, DEPLOY),
    "syntax": (DEPLOY,),
    "migration": (MIGRATE,),
    "database": (DATABASE,),
    "redis": (REDIS,),
    "disk": (FREE_DISK,),
}
SETTLED_SECONDS = 10.0


def walk(found: Diagnosis) -> None:
    """Ask every question, beginning with what the others depend on."""
    env = found.env
    database_answers = _judge_database(found)
    _judge_redis(found)
    problems = found.ask("does it pass its health check?", lambda: read_problems(env.application)) or {}
    if not health_checks(env.application):
        found.report.fact("health", NO_HEALTH)
    for role, url in (("backend", env.application.url), ("frontend", env.application.frontend_url)):
        if role in problems:
            _judge_role(found, role, url, problems[role])
        elif role in env.services.names:
            _judge_service(found, role, url)
    if database_answers:
        _judge_migrations(found)


def _effects(part: str) -> tuple[str, ...]:
    """The kinds of causes that a failing part explains: an unhealthy service, and one that does not start for it."""
    return (*ROLES, *(f"{role}:{part}" for role in ROLES))


def _judge_database(found: Diagnosis) -> bool:
    """Whether the database answers. A stale password of the application is the application's fault."""
    env, question = found.env, "does its database answer?"
    if not env.has("postgres"):
        return False
    greeting = read_greeting(env.postgres)
    if greeting.state == "ready":
        found.record(question, greeting.detail)
        judge_own_login(found)
        return True
    where = f"{env.postgres.host}:{env.postgres.port}"
    what = f"the database of the application at {where} refuses connections ({greeting.state}: {greeting.detail})"
    hint = "fix the database first; the application then recovers by itself, or restart it"
    found.record(question, greeting.detail, Cause(what, hint, (DATABASE,), explains=_effects("database")))
    return False


def _judge_redis(found: Diagnosis) -> None:
    env, question = found.env, "does its Redis answer?"
    redis = found.ask(question, lambda: master_by(env.redis, read_sentinels(env.redis))) if env.has("redis") else None
    if not redis:
        return
    answer, cause = read_answer(redis), None
    if answer.state != "well":
        what = f"the Redis of the application at {redis.address} does not answer PING ({answer.state}: {answer.said})"
        hint = "fix Redis first; the application then recovers by itself, or restart it"
        cause = Cause(what, hint, (REDIS,), explains=_effects("redis"))
    found.record(question, answer.said, cause)


def _judge_role(found: Diagnosis, role: str, url: str, problem: str) -> None:
    log = attach_service(found, role)
    state, described = read_state(found, role)
    listener, reason = find_listener(url), find_reason(log)
    stranger = listener if listener and listener.pid and state and not listener.is_of(state.pid) else None
    port_question = f"which process uses the port of {role}?"
    if not problem:
        found.record(f"is {role} healthy?", f"{url} passes the health check")
        if stranger and state and (not state.comes_back or (reason and reason.kind == "port")):
            found.record(port_question, f"process {stranger.pid}", _unattended(role, stranger, described))
        return
    if stopped_process(found, role)[0]:
        found.record(f"is {role} healthy?", problem, _halted_cause(found, role, problem))
        return
    if stranger:  # its port says nothing about the service: one that cannot start is tried again and again
        runs = bool(state and state.pid) and not reason
    else:
        runs = bool(listener) or not is_local(url) if state is None else _stays(found.env, role, url, state)
    found.note(f"is {role} healthy?", problem)
    if stranger and runs and not (reason and reason.kind == "port"):
        stranger = None
    if stranger:
        found.record(port_question, f"process {stranger.pid}", _taken(role, stranger))
    trial = try_start(found) if role == "backend" and (not runs or stranger) else None
    reason = _reason_of(reason, trial)
    if stranger and (not trial or trial.served or not reason or reason.kind == "port"):
        return  # on a free port it starts
    if runs and (listener or not reason or reason.kind in ("unknown", "database", "redis")):
        found.record(f"why is {role} unhealthy?", problem, _unhealthy_cause(found, role, problem, reason))
        return
    answer = reason.line if reason else "its log does not show it"
    found.record(f"why does {role} not start?", answer, _start_cause(found, role, described, problem, reason))


def _judge_service(found: Diagnosis, role: str, url: str) -> None:
    """Without a configured health check, only whether the service runs can be judged."""
    log = attach_service(found, role)
    state, described = read_state(found, role)
    question = f"does {role} run?"
    if state and state.pid and _stays(found.env, role, url, state):
        found.record(question, described)
        return
    trial = try_start(found) if role == "backend" else None
    reason = _reason_of(find_reason(log), trial)
    found.record(question, described, _start_cause(found, role, described, "its service is stopped", reason))


def _stays(env: Environment, role: str, url: str, state: ServiceState) -> bool:
    """Whether its process runs for longer than until the service manager starts the next one."""
    if not state.pid or not is_local(url) or listens(port_of(url)):
        return bool(state.pid)

    def decided() -> bool:
        return listens(port_of(url)) or env.services.state(role).pid != state.pid

    with contextlib.suppress(OpsError):
        until(decided, what="its start or its end", seconds=SETTLED_SECONDS)
    with contextlib.suppress(OpsError):
        return env.services.state(role).pid == state.pid
    return True


def _reason_of(logged: StartReason | None, trial: StartTrial | None) -> StartReason | None:
    """The trial's reason is the newest. A missing variable is an exception: the trial lacks those of the unit."""
    tried = find_reason(trial.output) if trial and not trial.served else None
    return logged if tried and tried.kind == "variable" and logged else tried or logged


def _taken(role: str, listener: Listener) -> Cause:
    what = f"the port of {role} is taken: process {listener.pid} ({listener.name}) listens on {listener.port}"
    return Cause(
        f"{what}, and is not its service",
        f"find out what it is (ps -fp {listener.pid}); stop it, then start {role}",
    )


def _unattended(role: str, listener: Listener, described: str) -> Cause:
    what = f"{role} answers, but its service is not the one that answers ({described}): process {listener.pid} "
    return Cause(
        f"{what}({listener.name}) listens on its port {listener.port}. No service manager restarts that process",
        f"find out what it is (ps -fp {listener.pid}); stop it, then start {role}",
        status=Status.WARN,
        impact=Impact.THREATENS,
    )


def _halted_cause(found: Diagnosis, role: str, problem: str) -> Cause:
    seen, hint = stopped_process(found, role)
    return Cause(f"{role} runs but answers nothing: {seen}; {problem}", hint, (LOGS,), kind=f"{role}:halted")


def _unhealthy_cause(found: Diagnosis, role: str, problem: str, reason: StartReason | None) -> Cause:
    """What it logged since its start is about requests, but can name the part that fails."""
    known = reason if reason and reason.kind != "unknown" else None
    logged = f"; its log reports: {known.what}" if known else ""
    follow = [*_FOLLOW.get(known.kind, ())] if known else []
    named = ((DATABASE, ("database", "postgres")), (REDIS, ("redis",)))
    words = problem.lower()
    follow += [one for one, parts in named if one not in follow and any(part in words for part in parts)]
    hint = "check the errors in its log, and the components that its health check names"
    what = f"{role} runs but is unhealthy: {problem}{logged}"
    explains = ("frontend",) if role == "backend" else ()
    return Cause(what, hint, (*follow, LOGS), kind=role, explains=explains)


def _start_cause(found: Diagnosis, role: str, described: str, problem: str, reason: StartReason | None) -> Cause:
    explains = ("frontend",) if role == "backend" else ()
    if reason is None:
        what = f"{role} is stopped ({described}): {problem}"
        hint = f"{start_hint(found, role)}. Its log shows why it stopped"
        return Cause(what, hint, (LOGS,), kind=f"{role}:stopped", explains=explains)
    hint = {
        "import": "install the missing package, or go back to the previous version",
        "syntax": "go back to the previous version",
        "variable": "add it to the env file or the unit, then restart the service",
        "migration": "migrate the database",
        "port": "stop the process that listens there (find it with ss -ltnp), then start the service",
    }.get(reason.kind, "fix what this line reports, then start the service")
    what, follow = f"{role} does not start: {reason.what}", _FOLLOW.get(reason.kind, (LOGS,))
    return Cause(what, hint, follow, kind=f"{role}:{reason.kind}", explains=explains)


def _judge_restart(found: Diagnosis, role: str, minutes: int) -> None:
    """A process that its manager started again answers as before: only its age shows why users had errors."""
    is_down = any(one.kind.startswith(f"{role}:") and one.kind != f"{role}:halted" for one in found.causes)
    question = f"since when has {role} been running?"
    process = None if is_down else found.ask(question, lambda: read_process(found.env.services, role))
    if not process:
        return
    end = previous_end(found, role, uvicorn_end(long_log(found, role), process.pid))
    judge_restart(
        found,
        role,
        process.seconds,
        end,
        minutes=minutes,
        consequence="Requests in progress failed",
        follow=(LOGS,),
    )


def _judge_migrations(found: Diagnosis) -> None:
    env, question = found.env, "does the database have the code's migrations?"
    with found.asking(question):
        directory = env.application.backend_directory
        if not directory or not (Path(directory) / "alembic.ini").is_file():
            return
        heads, node = read_heads(env.application), env.postgres
        revision = read_revision(node, node.database)
        cause = None
        if set(filter(None, revision.split(","))) != set(heads.names):
            wanted = ", ".join(sorted(heads.names))
            what = f"a migration is missing: the database is at {revision or 'none'}, the code needs {wanted}"
            hint = "rehearse and apply the migrations"
            cause = Cause(what, hint, (MIGRATE,), explains=_effects("migration"))
        found.record(question, revision or "none", cause)
