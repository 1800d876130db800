"""Steps of update-ai-api-version: the comparison, the checklist, and the switch with its way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.ai_providers import AIProviders
from blocks.environment import Environment
from flows.ai_providers.steps import told
from runbook import record
from runbook.errors import OpsError
from runbook.permit import Permit
from runbook.report import Report, Status
from tasks.ai import shape
from tasks.ai.answer import HINTS, Answer
from tasks.ai.azure import ask_azure
from tasks.ai.interview import ask_application, begin_interview
from tasks.ai.sdks import KNOWN, is_behind, read_sdks
from tasks.application import wait_healthy
from tasks.env_file import set_variable
from tasks.services import start_services, stop_services

FILE = ".ai-api-version-half-done"
KEY = "[ai_providers] azure_version_variable"
RESTART, BACKEND = "restart", "backend"
RETURN_SECONDS = 120.0
DOCUMENTATION = "https://learn.microsoft.com/azure/ai-services/openai/api-version-deprecation"


@dataclass(frozen=True)
class HalfDone:
    """A switch that has begun: the version to go back to, and the new one."""

    before: str
    after: str
    since: str


def tried_in(env: Environment, staging: str) -> Environment:
    """Whose providers are asked: never production's own.

    Raises:
        OpsError: that environment is production, or names no deployment.
    """
    if env.tier == "production" and not staging:
        raise OpsError(f"{env.name} is production: nothing is tried there", "name the staging environment in staging")
    chosen = Environment.find(staging) if staging else env
    if chosen.tier == "production":
        raise OpsError(f"{chosen.name} is production: nothing is tried there", "name another environment in staging")
    ai = chosen.ai_providers
    needed = {
        "azure_endpoint": ai.azure_endpoint,
        "azure_deployments": ai.azure_deployments,
        "azure_key": ai.azure_key.get_secret_value(),
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise OpsError(f"{chosen.name} has no {', '.join(missing)}", "add it to [ai_providers] of its TOML")
    return chosen


def compare(report: Report, ai: AIProviders, before: str, after: str) -> None:
    """The same canary on both versions, of every deployment; the new one must answer, the old one need not any more."""
    asked = [(ask_azure.submit(ai, name, before), ask_azure.submit(ai, name, after)) for name in ai.azure_deployments]
    pairs = [(old.result(), new.result()) for old, new in asked]
    for old, new in pairs:
        report.expect(f"{new.model} answers on {after}", new.ok, HINTS.get(new.kind, ""), value=new.told)
        report.expect(f"{old.model} answers on {before}", old.ok,
                      "the way back may not work: " + HINTS.get(old.kind, ""),
                      value=old.told, otherwise=Status.WARN)  # fmt: skip
    found = [(new.model, *one) for old, new in pairs if old.ok and new.ok
             for one in shape.differences(old.body, new.body)]  # fmt: skip
    if found:
        report.table(f"Fields of the answers, {before} → {after}", ("deployment", "field", "before", "after"),
                     [(model, path, was or "not there", now or "not there")
                      for model, path, was, now in found])  # fmt: skip
    lost = sorted({path for _, path, was, now in found if was and was != now})
    report.expect("no field went or changed its type", not lost, "see whether the application reads it, then go on",
                  value=", ".join(lost[:5]) or f"{sum(not was for _, _, was, _ in found)} are new, none went",
                  otherwise=Status.WARN)  # fmt: skip
    _tell_checklist(report, pairs, lost, before, after)


def _tell_checklist(
    report: Report, pairs: Sequence[tuple[Answer, Answer]], lost: Sequence[str], before: str, after: str
) -> None:
    """§5.1's three points; what no program can look at is left to a person, and says so."""
    news = [new for _, new in pairs]
    slower = [new.model for old, new in pairs if old.ok and new.ok and new.seconds > 2 * old.seconds + 1]
    tokens = [new.model for old, new in pairs if old.ok and new.ok and new.tokens > 2 * old.tokens]
    both = all(old.ok and new.ok for old, new in pairs)

    def mark(ok: bool, text: str) -> str:
        return ("☑ " if ok else "☒ ") + text if both else "☐ not compared: one of the two does not answer"

    report.table("Checklist of breaking changes", ("check", "result"), [
        ("every deployment answers", ("☑ " if all(new.ok for new in news) else "☒ ")
         + ", ".join(f"{new.model}: {new.kind}" for new in news)),
        ("the fields that the application reads are there", "☒ no" if any(new.kind == "shape" for new in news)
         else "☑ yes" if all(new.ok for new in news) else "☐ not known: no answer"),
        ("no field went or changed its type", mark(not lost, ", ".join(lost) or "none")),
        ("about as quick", mark(not slower, ", ".join(slower) or "yes")),
        ("about as many tokens", mark(not tokens, ", ".join(tokens) or "yes")),
        ("breaking changes in the documentation", f"☐ to be read by a person, {before} → {after}: {DOCUMENTATION}"),
        ("streaming, tools, structured answers, content filters", "☐ to be tried by a person: no canary uses them"),
    ])  # fmt: skip


def judge_sdks(report: Report, env: Environment) -> None:
    """The application's packages against what is needed; one that is not installed is told so."""
    needed: Mapping[str, str] = env.ai_providers.sdks
    names = list(dict.fromkeys([*needed, *KNOWN]))
    try:
        installed = read_sdks(env.application, names)
    except OpsError as error:
        report.warn("SDKs of the application", error.hint, value=f"not known: {error.message}")
        return
    report.table("SDKs of the application", ("package", "installed", "needed"),
                 [(name, installed[name] or "not installed", needed.get(name, "nothing is said"))
                  for name in names])  # fmt: skip
    behind = [
        f"{name} {installed[name]} < {least}" if installed[name] else f"{name} is not installed (needed: {least})"
        for name, least in needed.items() if not installed[name] or is_behind(installed[name], least) is not False
    ]  # fmt: skip
    report.expect("SDKs of the application", not behind, "update them first, with update-dependencies or by hand",
                  value=", ".join(behind) or ", ".join(f"{name} {installed[name]}" for name in needed) or
                  "none is named in [ai_providers] sdks", otherwise=Status.WARN)  # fmt: skip


def judge_variable(report: Report, env: Environment, variable: str) -> None:
    """What the service manager itself gives the backend counts before the file, and is not read again by a restart: a
    container keeps the variables that it was made with."""
    what = f"a restart has the backend read {variable} again"
    with told(report, what, Status.WARN):
        given = variable in env.services.environment(BACKEND)
        report.expect(what, not given,
                      "a container: change its env_file, then deploy-application with recreate; a unit: take the "
                      "variable out of its Environment",
                      value="no: its container or unit has a value of its own" if given else "yes")  # fmt: skip


def switch(
    report: Report, permit: Permit, env: Environment, before: str, after: str, path: Path, seconds: float
) -> None:
    """Write, restart, and see the application answer; else the old version again.

    Raises:
        OpsError: the old one could not be put back either.
    """
    variable = env.ai_providers.azure_version_variable
    record.write(path, HalfDone(before, after, datetime.now(UTC).isoformat(timespec="seconds")))
    report.state_is(f"the switch {before} → {after} has begun", "launch it again with the version that you want")
    set_variable(permit, env.application, variable, after, KEY)
    problem = _restarted(permit, env, seconds)
    if problem:
        set_variable(permit, env.application, variable, before, KEY)
        again = _restarted(permit, env, RETURN_SECONDS)
        if again:
            raise OpsError(f"with {before} back the application is not well either: {again}",
                           "look at the backend's log; the version is not what it lacks")  # fmt: skip
        report.expect(f"the application is well with {after}", False,
                      "look at the backend's log and at the table of differences; the old version is in use again",
                      value=f"{problem}; returned to {before}, with which it is well")  # fmt: skip
    else:
        report.expect(f"the application is well with {after}", True, "",
                      value="healthy, and a user's question was answered" if env.application.ai.ask else
                      "healthy; a user's question was not tried: [application.ai] ask is not configured")  # fmt: skip
    path.unlink()
    report.state = None


def _restarted(permit: Permit, env: Environment, seconds: float) -> str:
    """What is wrong after it, "" where a user's question is answered; by Azure, where that is asked first: a fallback
    would hide that the application cannot use the version."""
    permit.require(RESTART, BACKEND)
    try:
        stop_services(env.services, [BACKEND])
        start_services(env.services, [BACKEND])
        wait_healthy(env.application, seconds=seconds)
        if env.application.ai.ask is None:
            return ""
        reply = ask_application(begin_interview(env.application))
    except OpsError as error:
        return error.message
    if not reply.answered:
        return f"a user's question gets no answer: {reply.told}"
    first = env.ai_providers.chain[0]
    if first == "azure" and reply.provider and reply.provider != first:
        return f"a user's question is answered by {reply.provider}: the application fell back from {first}"
    return ""
