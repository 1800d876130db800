"""Update the application's Azure API version: test, compare, switch, and roll back (§5.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from pydantic import Field

from blocks.ai_providers import AIProviders
from blocks.environment import Environment
from flows.ai_providers.check import judge_dates, judge_retirement
from flows.ai_providers.errors import report_errors
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError
from runbook.files.marker import Marker
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.ai import shape
from tasks.ai.answer import HINTS, ProviderAnswer
from tasks.ai.azure import ask_azure
from tasks.ai.interview import ask_application, begin_interview
from tasks.ai.lifecycle import Dates, read_dates
from tasks.ai.sdks import KNOWN, is_behind, read_sdks
from tasks.application.env_file import SET, read_variable, set_variable
from tasks.application.health import wait_healthy
from tasks.host.services import RESTART, restart_service, started_if_cancelled

_VERSION = re.compile(r"20\d\d-\d\d-\d\d(-preview)?|v1")


@flow(name="update-ai-api-version", flow_run_name=RunName("update-ai-api-version {environment} {version}"))
def update_ai_api_version(
    environment: str,
    version: str = "",
    staging: str = "",
    health_seconds: Annotated[float, Field(ge=5, le=600)] = 120,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """APIバージョン更新: Azure OpenAI (§5.1)

    Sends the same canary to every Azure deployment on the current and on the new API version, and compares the fields
    of the answers. Shows the checklist of breaking changes, the new version's retirement date, and outdated SDKs of the
    application. With `confirm` it then writes the new version into the application's env_file, restarts the backend,
    and asks it an interview question. For production it uses the staging environment's providers.

    It stops if a deployment does not answer on the new version, or if the answer lacks a field that the application
    reads. If the application is not healthy with the new version, the old one is restored at once. To undo: run it with
    the old version, which the report names. It is safe to run again after a kill. Evidence: the differences, the
    checklist.

    Departs from the manual: it writes the version into config.py; here it is in the env_file that config.py reads.

    Args:
        environment: Environment (lab, staging, production …)
        version: New API version (required; e.g. 2024-10-21, v1)
        staging: Staging environment for the canary. Required for production
        health_seconds: Seconds to wait until the application is healthy after the change
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Update AI API version", env, confirm, plan, changes=True) as report:
        if not _VERSION.fullmatch(version):
            raise OpsError(f"“{version[:40]}” is no API version", "enter it as 2024-10-21, 2025-04-01-preview or v1")
        env.services.name_of(BACKEND)
        tried = canary_environment(env, staging)
        variable = env.ai_providers.azure_version_variable
        before = read_variable(env.application, variable, KEY)
        left = VersionMarker.find(env.reports_directory)
        if left:
            report.warn(
                "interrupted switch",
                "nothing to do: a confirmed run completes it",
                value=f"{left.before} → {left.after}, since {left.started}",
            )
        report.fact("API version", f"{before} → {version}, in {env.application.env_file}")
        compare(report, tried.ai_providers, before, version)
        _judge_dates(report, tried, version)
        judge_sdks(report, env)
        judge_variable(report, env, variable)
        if before == version and not left:
            report.outcome = f"{version} is already in use: nothing to switch"
            return report
        old = left.before if left else before
        setting = _setting(env, before, old, version)
        restarting = _restarting(report, env, old, version, health_seconds)
        back = Next("update-ai-api-version", parameters={"version": old})
        effect = Effect(f"the application uses {version} instead of {before}", back, down=11.0)
        with carrying_out(report, setting, restarting, effect=effect) as carry:
            VersionMarker(before=old, after=version).write(env.reports_directory)
            carry(setting)
            in_use = carry(restarting)
            VersionMarker.remove(env.reports_directory)
        if in_use != old:
            report.fact("undo", back)
        report.outcome = f"the application uses {in_use} (before: {old})"
    return report


def _judge_dates(report: Report, env: Environment, version: str) -> None:
    today, dates = datetime.now(env.zone).date(), dict[str, Dates]()
    with report_errors(report, "the table of retirement dates"):
        dates = read_dates(env.ai_providers)
    judge_retirement(report, f"azure API version {version}", [version], dates.get("azure-api"), None, today)
    judge_dates(report, dates, ["azure-api"], today)


KEY = "[ai_providers] azure_version_variable"
BACKEND = "backend"
AGAIN = "run this again with the version that you want"
RETURN_SECONDS = 120.0
DOCUMENTATION = "https://learn.microsoft.com/azure/ai-services/openai/api-version-deprecation"


@dataclass(frozen=True, kw_only=True)
class VersionMarker(Marker):
    """The marker of an unfinished switch: the old version, and the new one."""

    FILE = ".ai-api-version-half-done"
    HINT = "check which version the env_file has, then delete the file"

    before: str
    after: str


def canary_environment(env: Environment, staging: str) -> Environment:
    """The environment whose providers get the canaries: never production.

    Raises:
        OpsError: the environment is production, or has no deployment.
    """
    if env.tier == "production" and not staging:
        raise OpsError(f"{env.name} is production: it gets no canaries", "enter the staging environment in staging")
    chosen = Environment.find(staging) if staging else env
    if chosen.tier == "production":
        raise OpsError(f"{chosen.name} is production: it gets no canaries", "enter another environment in staging")
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
    """Send the same canary on both versions to every deployment; only the new version must answer."""
    asked = [(ask_azure.submit(ai, name, before), ask_azure.submit(ai, name, after)) for name in ai.azure_deployments]
    pairs = [(old.result(), new.result()) for old, new in asked]
    for old, new in pairs:
        report.require(f"{new.model} answers on {after}", new.ok, HINTS.get(new.kind, ""), value=new.text)
        report.prefer(
            f"{old.model} answers on {before}",
            old.ok,
            f"{HINTS.get(old.kind, '')} (a rollback to it can fail)",
            value=old.text,
        )
    found = [
        (new.model, *one) for old, new in pairs if old.ok and new.ok for one in shape.differences(old.body, new.body)
    ]
    if found:
        report.table(
            f"Fields of the answers, {before} → {after}",
            ("deployment", "field", "before", "after"),
            [(model, path, was or "missing", now or "missing") for model, path, was, now in found],
        )
    lost = sorted({path for _, path, was, now in found if was and was != now})
    report.prefer(
        "fields removed or with another type",
        not lost,
        "check whether the application reads them, then continue",
        value=", ".join(lost[:5]) or f"none; {sum(not was for _, _, was, _ in found)} are new",
    )
    _attach_checklist(report, pairs, lost, before, after)


def _attach_checklist(
    report: Report, pairs: Sequence[tuple[ProviderAnswer, ProviderAnswer]], lost: Sequence[str], before: str, after: str
) -> None:
    """The checklist of §5.1; points that only a person can check are marked."""
    news = [new for _, new in pairs]
    slower = [new.model for old, new in pairs if old.ok and new.ok and new.seconds > 2 * old.seconds + 1]
    tokens = [new.model for old, new in pairs if old.ok and new.ok and new.tokens > 2 * old.tokens]
    both = all(old.ok and new.ok for old, new in pairs)

    def mark(ok: bool, text: str) -> str:
        return ("☑ " if ok else "☒ ") + text if both else "☐ not compared: one version does not answer"

    report.table(
        "Checklist of breaking changes",
        ("check", "result"),
        [
            (
                "every deployment answers",
                ("☑ " if all(new.ok for new in news) else "☒ ") + ", ".join(f"{new.model}: {new.kind}" for new in news),
            ),
            (
                "the answer has the fields that the application reads",
                "☒ no"
                if any(new.kind == "shape" for new in news)
                else "☑ yes"
                if all(new.ok for new in news)
                else "☐ not known: no answer",
            ),
            ("no field removed or with another type", mark(not lost, ", ".join(lost) or "none")),
            ("similar latency", mark(not slower, ", ".join(slower) or "yes")),
            ("similar number of tokens", mark(not tokens, ", ".join(tokens) or "yes")),
            ("breaking changes in the documentation", f"☐ read it by hand, {before} → {after}: {DOCUMENTATION}"),
            ("streaming, tools, structured answers, content filters", "☐ test them by hand: no canary uses them"),
        ],
    )


def judge_sdks(report: Report, env: Environment) -> None:
    """The application's installed SDKs against the required versions."""
    needed: Mapping[str, str] = env.ai_providers.sdks
    names = list(dict.fromkeys([*needed, *KNOWN]))
    try:
        installed = read_sdks(env.application, names)
    except OpsError as error:
        report.warn("SDKs of the application", error.hint, value=f"not known: {error.message}")
        return
    report.table(
        "SDKs of the application",
        ("package", "installed", "needed"),
        [(name, installed[name] or "not installed", needed.get(name, "any")) for name in names],
    )
    behind = [
        f"{name} {installed[name]} < {least}" if installed[name] else f"{name} is not installed (needed: {least})"
        for name, least in needed.items()
        if not installed[name] or is_behind(installed[name], least) is not False
    ]
    report.prefer(
        "SDKs of the application",
        not behind,
        "update them first",
        value=", ".join(behind)
        or ", ".join(f"{name} {installed[name]}" for name in needed)
        or "none is configured in [ai_providers] sdks",
        follow=[Next("update-dependencies")],
    )


def judge_variable(report: Report, env: Environment, variable: str) -> None:
    """A value from the service manager overrides the file, and a restart does not change it: a container keeps the
    variables of its creation."""
    what = f"a restart makes the backend read {variable} again"
    with report_errors(report, what, Status.WARN):
        given = variable in env.services.environment(BACKEND)
        report.require(
            what,
            not given,
            "container: change its env_file and deploy it again (recreate); unit: remove the variable from its "
            "Environment",
            value="no: its container or unit sets another value" if given else "yes",
        )


def _setting(env: Environment, found: str, before: str, after: str) -> Change[[], str]:
    """Plan the new value. `found`: the value now; `before`: the version before an interrupted switch, or `found`."""
    variable = env.ai_providers.azure_version_variable
    return Change(
        set_variable.bind(env.application, variable, KEY, after),
        SET,
        f"{variable}: {found} → {after}",
        seconds=1,
        pins=[lambda report: report.pin_state(variable, found)],
        begun=State(f"the switch {before} → {after} is not complete", AGAIN),
    )


def _restarting(report: Report, env: Environment, before: str, after: str, seconds: float) -> Change[[], str]:
    """Plan the restart. If the application is unhealthy with the new version, the old one is restored. Returns the
    version in use."""
    restart = restart_service.bind(env.services, BACKEND)
    set_back = set_variable.bind(env.application, env.ai_providers.azure_version_variable, KEY, before)

    def switch() -> str:
        problem = _restart(env, restart, seconds)
        if not problem:
            report.passed(
                f"the application is healthy with {after}",
                value="a user's question was answered"
                if env.application.ai.ask
                else "a user's question was not tested: [application.ai] ask is not configured",
            )
            return after
        set_back()
        if again := _restart(env, restart, RETURN_SECONDS):
            raise OpsError(
                f"the application is also unhealthy with the old version {before}: {again}",
                "check the backend's log: the version is not the cause",
            )
        report.fail(
            f"the application is healthy with {after}",
            "check the backend's log and the table of differences; the old version is in use again",
            value=f"{problem}; rolled back to {before}, with which it is healthy",
        )
        return before

    return Change(
        switch,
        RESTART,
        BACKEND,
        seconds=10,
        by=[restart, set_back],
        done=lambda version: State(f"the application uses {version}", AGAIN),
    )


def _restart(env: Environment, restart: Callable[[], object], seconds: float) -> str:
    """Restart the backend. Returns the problem, "" if it answers a user's question. If Azure is first in the chain,
    Azure must answer: a fallback would hide a version that does not work."""
    try:
        with started_if_cancelled(env.services, [BACKEND]):
            restart()
        wait_healthy(env.application, seconds=seconds)
        if env.application.ai.ask is None:
            return ""
        reply = ask_application(begin_interview(env.application))
    except OpsError as error:
        return error.message
    if not reply.answered:
        return f"a user's question gets no answer: {reply.text}"
    first = env.ai_providers.chain[0]
    if first == "azure" and reply.provider and reply.provider != first:
        return f"{reply.provider} answered a user's question: the application fell back from {first}"
    return ""
