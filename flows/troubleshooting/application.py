"""Why the application does not start, or is not healthy (appendix A)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from prefect import flow

from blocks.environment import Environment
from blocks.services.service import ServiceState
from flows.troubleshooting.database import judge_own_login
from flows.troubleshooting.diagnosis import Cause, Diagnosis, read_state, tell_service
from runbook.errors import OpsError
from runbook.guard import containment
from runbook.guard.lock import hold
from runbook.next import Next
from runbook.page.markdown import code, escaped, fenced
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.units import duration
from runbook.wait import until
from tasks.application.health import NO_HEALTH, health_checks, read_problems
from tasks.application.start_trial import (
    HOOKS,
    Listener,
    Reason,
    Trial,
    find_listener,
    find_reason,
    is_local,
    listens,
    port_of,
    start_in_foreground,
)
from tasks.migrations.alembic import read_revision
from tasks.migrations.scripts import read_heads
from tasks.postgres.server.greeting import read_greeting
from tasks.redis.greeting import read_answer
from tasks.redis.sentinels import master_by, read_sentinels


@flow(name="diagnose-application", flow_run_name="diagnose-application {environment}")
def diagnose_application(environment: str) -> Report:
    """アプリケーション起動エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: database and Redis behind it, whether backend and frontend
    run and answer, who has their ports, what the last 100 lines of their logs say, whether the database has the
    migrations that the code wants; and, where the backend does not run, a start in the foreground on a free port with
    its traceback. Run it first when the application does not start or its health check fails.

    It changes nothing: what is started here has a port of its own, runs none of uvicorn's start-up hooks (migrations,
    queues, schedules) unless `start_variables` in [application] say so, and is ended here with all that it started;
    what runs is left alone. For those seconds it holds the environment's lock, and it starts nothing beside a run that
    holds it, or where the environment is contained. It must run on the application's host. Evidence: the answers in
    their order, logs and environment by names, masked. It ends with links to the runbooks that help.

    Departs from the manual: `uvicorn --reload` on the live port would be in its way; `systemctl show
    --property=Environment` prints secrets.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose application", env) as report:
        found = Diagnosis(report, env)
        walk(found)
        found.close("backend and frontend run and answer well")
    return report


QUESTION = "does it start in the foreground?"


def start_beside(found: Diagnosis) -> Trial | None:
    """Under the environment's lock: what is started here must not meet a restore, which stopped the service on purpose,
    nor do anything in an environment that is contained. None where it was not to be."""
    env = found.env
    if not env.application.start_command:
        found.told(QUESTION, "not tried: [application] start_command is not configured")
        return None
    with found.asking(QUESTION):
        if contained := containment.read(env.name, env.reports_directory):
            raise contained.refusal(env.name)
        with hold(env.name, env.reports_directory, found.report.runbook, "maintenance"):
            trial = start_in_foreground(env.application)
        _report_results(found, trial)
        return trial
    return None


def _report_results(found: Diagnosis, trial: Trial) -> None:
    how = (
        "it serves"
        if trial.served
        else f"it ended with exit code {trial.code}"
        if trial.code is not None
        else "it neither served nor ended"
    )
    hooks = "" if trial.hooks else f", without its start-up hooks ({HOOKS}=off)"
    told = f"{how} after {duration(trial.seconds)}{hooks}, with these variables: {trial.variables}"
    down = (
        "what keeps the service down is not in its code"
        if trial.hooks
        else "its code and settings load; its hooks, its unit or its user keep the service down"
    )
    found.told(QUESTION, f"{told}: {down}" if trial.served else told)
    head = f"{code(trial.command)} — {escaped(told)}\n\n"
    found.report.attach(Evidence("Foreground start on a free port", text=head + fenced(trial.output or "(nothing)")))


DATABASE = Next("diagnose-database", "find out why")
REDIS = Next("diagnose-redis", "find out why")
LOGS = Next("summarise-errors", "see the errors of its log")
DEPLOY = Next("deploy-application", "bring a version that starts")
PACKAGES = Next("check-dependencies", "compare what is installed with what is locked")
MIGRATE = Next("apply-migrations", "bring the database to the code's revision (plan first)")
FREE_DISK = Next("free-disk-emergency", "make room")
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
    """From what everything else depends on."""
    env = found.env
    answers = _judge_database(found)
    _judge_redis(found)
    problems = found.ask("does it answer its health check?", lambda: read_problems(env.application)) or {}
    if not health_checks(env.application):
        found.report.fact("health", NO_HEALTH)
    for role, url in (("backend", env.application.url), ("frontend", env.application.frontend_url)):
        if role in problems:
            _judge_role(found, role, url, problems[role])
        elif role in env.services.names:
            _judge_service(found, role, url)
    if answers:
        _judge_migrations(found)


def _judge_database(found: Diagnosis) -> bool:
    """Whether it answers. A stale password of the application's is its own to correct, not the database's."""
    env, question = found.env, "does the database behind it answer?"
    if not env.has("postgres"):
        return False
    greeting, where = read_greeting(env.postgres), f"{env.postgres.host}:{env.postgres.port}"
    if greeting.state == "ready":
        found.well(question, greeting.detail)
        judge_own_login(found)
        return True
    found.blame(
        question,
        greeting.detail,
        Cause(
            f"the database behind it at {where} does not take connections ({greeting.state}: {greeting.detail})",
            "diagnose-database says why; the application recovers by itself, or is restarted then",
            (DATABASE,),
        ),
    )
    return False


def _judge_redis(found: Diagnosis) -> None:
    env, question = found.env, "does Redis behind it answer?"
    redis = found.ask(question, lambda: master_by(env.redis, read_sentinels(env.redis))) if env.has("redis") else None
    if not redis:
        return
    answer = read_answer(redis)
    if answer.state == "well":
        found.well(question, answer.said)
        return
    found.blame(
        question,
        answer.said,
        Cause(
            f"Redis behind it at {redis.address} does not answer well ({answer.state}: {answer.said})",
            "diagnose-redis says why; the application recovers by itself, or is restarted then",
            (REDIS,),
        ),
    )


def _judge_role(found: Diagnosis, role: str, url: str, problem: str) -> None:
    log = tell_service(found, role)
    state, told = read_state(found, role)
    listener, reason = find_listener(url), find_reason(log)
    stranger = listener if listener and listener.pid and state and not listener.is_of(state.pid) else None
    if not problem:
        found.well(f"is {role} healthy?", f"{url} answers well")
        if stranger and state and (not state.comes_back or (reason and reason.kind == "port")):
            found.blame(f"who has the port of {role}?", f"process {stranger.pid}", _unattended(role, stranger, told))
        return
    runs = bool(listener) or not is_local(url) if state is None else _stays(found.env, role, url, state)
    if stranger and (not runs or (reason and reason.kind == "port")):
        found.blame(f"who has the port of {role}?", f"process {stranger.pid}", _taken(role, stranger))
        return
    found.told(f"is {role} healthy?", problem)
    trial = start_beside(found) if role == "backend" and not runs else None
    reason = _reason_of(reason, trial)
    if runs and (listener or not reason or reason.kind in ("unknown", "database", "redis")):
        found.blame(f"why is {role} not healthy?", problem, _unhealthy_cause(role, problem, reason))
        return
    found.blame(
        f"why does {role} not start?",
        reason.line if reason else "its log does not say",
        _start_cause(role, told, problem, reason),
    )


def _judge_service(found: Diagnosis, role: str, url: str) -> None:
    """No health check is configured for it: only whether its service runs can be judged."""
    log = tell_service(found, role)
    state, told = read_state(found, role)
    question = f"does {role} run?"
    if state and state.pid and _stays(found.env, role, url, state):
        found.well(question, told)
        return
    trial = start_beside(found) if role == "backend" else None
    reason = _reason_of(find_reason(log), trial)
    found.blame(question, told, _start_cause(role, told, "its service does not run", reason))


def _stays(env: Environment, role: str, url: str, state: ServiceState) -> bool:
    """Whether its process lives, and not only until its manager starts the next one."""
    if not state.pid or not is_local(url) or listens(port_of(url)):
        return bool(state.pid)

    def decided() -> bool:
        return listens(port_of(url)) or env.services.state(role).pid != state.pid

    with contextlib.suppress(OpsError):
        until(decided, what="its start or its end", seconds=SETTLED_SECONDS)
    with contextlib.suppress(OpsError):
        return env.services.state(role).pid == state.pid
    return True


def _reason_of(logged: Reason | None, trial: Trial | None) -> Reason | None:
    """The start that was just made knows best; but what its unit sets is missing there."""
    tried = find_reason(trial.output) if trial and not trial.served else None
    return logged if tried and tried.kind == "variable" and logged else tried or logged


def _taken(role: str, listener: Listener) -> Cause:
    who = f"process {listener.pid} ({listener.name})"
    return Cause(
        f"the port of {role} is taken: {who} listens on {listener.port}, and is not its service",
        f"look what that is (ps -fp {listener.pid}); end it, then start {role}",
    )


def _unattended(role: str, listener: Listener, told: str) -> Cause:
    return Cause(
        f"{role} answers, and not by its service ({told}): process {listener.pid} ({listener.name}) has its port "
        f"{listener.port}",
        f"nobody starts that again: look what it is (ps -fp {listener.pid}); end it, then start {role}",
        status=Status.WARN,
    )


def _unhealthy_cause(role: str, problem: str, reason: Reason | None) -> Cause:
    """What it logged since its start is of requests, and yet it may say which part fails."""
    said = f"; its log says: {reason.what}" if reason and reason.kind != "unknown" else ""
    return Cause(
        f"{role} runs and is not healthy: {problem}{said}",
        "look at the errors of its log, and at what its answer names",
        (LOGS, *(_FOLLOW.get(reason.kind, ()) if said and reason else ())),
    )


def _start_cause(role: str, told: str, problem: str, reason: Reason | None) -> Cause:
    if reason is None:
        return Cause(
            f"{role} does not run ({told}): {problem}", f"start it; the log of {role} says why it ended", (LOGS,)
        )
    hint = {
        "import": "install what is missing (check-dependencies names it), or go back to the version before",
        "syntax": "go back to the version before",
        "variable": "add it to the env file or the unit, and restart it",
        "migration": "apply-migrations",
        "port": "end what listens there (ss -ltnp names it), then start it",
    }.get(reason.kind, "correct what that line says, then start it")
    return Cause(f"{role} does not start: {reason.what}", hint, _FOLLOW.get(reason.kind, (LOGS,)))


def _judge_migrations(found: Diagnosis) -> None:
    env, question = found.env, "has the database the migrations of the code?"
    with found.asking(question):
        directory = env.application.backend_directory
        if not directory or not (Path(directory) / "alembic.ini").is_file():
            return
        heads, node = read_heads(env.application), env.postgres
        revision = read_revision(node, node.database)
        wanted = ", ".join(sorted(heads.names))
        if set(filter(None, revision.split(","))) == set(heads.names):
            found.well(question, revision)
            return
        cause = Cause(
            f"a migration is missing: the database is at {revision or 'none'}, the code wants {wanted}",
            "apply-migrations rehearses and applies them",
            (MIGRATE,),
        )
        found.blame(question, revision or "none", cause)
