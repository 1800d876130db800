"""The decision tree of the application: what is behind it, whether it runs, why it does not start, how it is."""

from __future__ import annotations

from pathlib import Path

from flows.troubleshooting.diagnosis import Cause, Diagnosis, Next, fenced, read_state, tell_service
from runbook.render import duration
from runbook.report import Evidence
from tasks.application import read_problems, require_address
from tasks.migrations.alembic import read_revision
from tasks.migrations.scripts import read_heads
from tasks.postgres.greeting import read_greeting
from tasks.redis.greeting import read_answer
from tasks.redis.sentinels import master_by, read_sentinels
from tasks.start_reasons import Reason, find_reason
from tasks.start_trial import Listener, Trial, find_listener, is_local, start_in_foreground

DATABASE = Next("diagnose-database", "find out why")
REDIS = Next("diagnose-redis", "find out why")
LOGS = Next("summarise-errors", "see the errors of its log")
DEPLOY = Next("deploy-application", "bring a version that starts")
PACKAGES = Next("check-dependencies", "compare what is installed with what is locked")
MIGRATE = Next("apply-migrations", "bring the database to the code's revision (plan first)")
FREE_DISK = Next("free-disk-emergency", "make room")


def walk(found: Diagnosis) -> None:
    """From what everything else depends on."""
    env = found.env
    require_address(env.application)
    _judge_behind(found)
    problems = found.ask("does it answer its health check?", lambda: read_problems(env.application)) or {}
    for role, url in (("backend", env.application.url), ("frontend", env.application.frontend_url)):
        if url:
            _judge_role(found, role, url, problems.get(role, ""))
    _judge_migrations(found)


def _judge_behind(found: Diagnosis) -> None:
    env = found.env
    if env.has("postgres"):
        greeting, where = read_greeting(env.postgres), f"{env.postgres.host}:{env.postgres.port}"
        question = "does the database behind it answer?"
        if greeting.state != "ready":
            found.blame(question, greeting.detail, Cause(
                f"the database behind it at {where} does not take connections ({greeting.state}: {greeting.detail})",
                "diagnose-database says why; the application recovers by itself, or is restarted then", (DATABASE,),
            ))  # fmt: skip
        else:
            found.well(question, greeting.detail)
    question = "does Redis behind it answer?"
    redis = found.ask(question, lambda: master_by(env.redis, read_sentinels(env.redis))) if env.has("redis") else None
    if redis:
        answer = read_answer(redis)
        if answer.state != "well":
            found.blame(question, answer.said, Cause(
                f"Redis behind it at {redis.address} does not answer well ({answer.state}: {answer.said})",
                "diagnose-redis says why; the application recovers by itself, or is restarted then", (REDIS,),
            ))  # fmt: skip
        else:
            found.well(question, answer.said)


def _judge_role(found: Diagnosis, role: str, url: str, problem: str) -> None:
    log = tell_service(found.report, found.env, role)
    state, told = read_state(found, role)
    runs = state is None or bool(state.pid)
    question = f"is {role} healthy?"
    if not problem:
        found.well(question, f"{url} answers well")
        return
    listener = find_listener(url)
    if state is not None and (cause := _taken(role, listener, state.pid)):
        found.blame(f"who has the port of {role}?", f"process {listener.pid if listener else 0}", cause)
        return
    found.told(question, problem)
    reason = find_reason(log)
    if role == "backend" and (not runs or (listener is None and is_local(url))):
        trial = found.ask("does it start in the foreground?", lambda: start_in_foreground(found.env.application))
        if trial:
            _tell_trial(found, trial)
            reason = (find_reason(trial.output) if not trial.served else None) or reason
    if runs and not (reason and reason.kind not in ("unknown", "database", "redis")):
        found.blame(f"why is {role} not healthy?", problem, Cause(
            f"{role} runs and is not healthy: {problem}", "look at the errors of its log, and at what its answer names",
            (LOGS,),
        ))  # fmt: skip
        return
    found.blame(f"why does {role} not start?", reason.line if reason else "its log does not say", _start_cause(
        role, told, problem, reason))  # fmt: skip


def _taken(role: str, listener: Listener | None, pid: int) -> Cause | None:
    """Somebody else listens where it should."""
    if listener is None or not listener.pid or listener.is_of(pid):
        return None
    who = f"process {listener.pid} ({listener.name})"
    return Cause(f"the port of {role} is taken: {who} listens on {listener.port}, and is not its service",
                 f"look what that is (ps -fp {listener.pid}); end it, then start {role}")  # fmt: skip


def _start_cause(role: str, told: str, problem: str, reason: Reason | None) -> Cause:
    if reason is None:
        return Cause(
            f"{role} does not run ({told}): {problem}", f"start it; the log of {role} says why it ended", (LOGS,)
        )
    follow = {
        "import": (PACKAGES, DEPLOY), "syntax": (DEPLOY,), "migration": (MIGRATE,), "database": (DATABASE,),
        "redis": (REDIS,), "disk": (FREE_DISK,),
    }.get(reason.kind, (LOGS,))  # fmt: skip
    hint = {
        "import": "install what is missing (check-dependencies names it), or go back to the version before",
        "syntax": "go back to the version before", "variable": "add it to the env file or the unit, and restart it",
        "migration": "apply-migrations", "port": "end what listens there (ss -ltnp names it), then start it",
    }.get(reason.kind, "correct what that line says, then start it")  # fmt: skip
    return Cause(f"{role} does not start: {reason.what}", hint, follow)


def _tell_trial(found: Diagnosis, trial: Trial) -> None:
    how = "it serves" if trial.served else f"it ended with exit code {trial.code}" if trial.code is not None \
        else "it neither served nor ended"  # fmt: skip
    question = "does it start in the foreground?"
    told = f"{how} after {duration(trial.seconds)}, with these variables: {trial.variables}"
    if trial.served:
        found.told(question, f"{told}: what keeps the service down is not in its code")
    else:
        found.told(question, told)
    head = f"`{trial.command}` — {told}\n\n"
    found.report.attach(Evidence("Foreground start on a free port", text=head + fenced(trial.output or "(nothing)")))


def _judge_migrations(found: Diagnosis) -> None:
    env, question = found.env, "has the database the migrations of the code?"
    if not env.has("postgres") or not (Path(env.application.backend_directory) / "alembic.ini").is_file():
        return
    with found.asking(question):
        heads, node = read_heads(env.application), env.postgres
        revision = read_revision(node, node.database)
        wanted = ", ".join(sorted(heads.names))
        if set(filter(None, revision.split(","))) == set(heads.names):
            found.well(question, revision)
            return
        cause = Cause(
            f"a migration is missing: the database is at {revision or 'none'}, the code wants {wanted}",
            "apply-migrations rehearses and applies them", (MIGRATE,),
        )  # fmt: skip
        found.blame(question, revision or "none", cause)
