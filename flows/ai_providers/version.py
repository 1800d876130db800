"""The API version that the application uses (§5.1): tried, compared, switched, and switched back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.ai_providers import AIProviders
from blocks.environment import Environment
from flows.ai_providers.check import judge_dates, judge_retirement
from flows.ai_providers.steps import told
from runbook.errors import OpsError
from runbook.files.marker import Marker
from runbook.guard.permit import Act, Permit
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.ai import shape
from tasks.ai.answer import HINTS, Answer
from tasks.ai.azure import ask_azure
from tasks.ai.interview import ask_application, begin_interview
from tasks.ai.lifecycle import Dates, read_dates
from tasks.ai.sdks import KNOWN, is_behind, read_sdks
from tasks.application.env_file import SET, read_variable, set_variable
from tasks.application.health import wait_healthy
from tasks.host.services import start_services, stop_services

_VERSION = re.compile(r"20\d\d-\d\d-\d\d(-preview)?|v1")


@flow(name="update-ai-api-version", flow_run_name="update-ai-api-version {environment} {version}")
def update_ai_api_version(
    environment: str,
    version: str = "",
    staging: str = "",
    health_seconds: Annotated[float, Field(ge=5, le=600)] = 120,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """APIバージョン更新: Azure OpenAI (§5.1)

    Asks every Azure deployment the same canary on the API version in use and on the new one, compares the shapes of the
    answers, and shows the checklist of breaking changes, the new version's retirement date, and the SDKs of the
    application that are behind. With a permit it then writes the new version into the application's env_file, restarts
    the backend, and lets it answer an interview's question. For production it asks the staging environment's providers.

    What stops it: a deployment that does not answer on the new version, or answers without a field that the application
    reads. Undo: launch it with the old version, which the report names. Where the application is not healthy with the
    new one, the old one is put back at once. Killed in between, launch it again: it goes on. Evidence: the differences,
    the checklist.

    Departs from the manual: the version is written in config.py there; here in the env_file that it reads.

    Args:
        environment: 対象の環境
        version: 新しいAPIバージョン (必須。例 2024-10-21、v1)
        staging: カナリアを実行するステージング環境。本番環境では必須
        health_seconds: 切替後、アプリケーションが正常になるまで待つ秒数
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Update AI API version", env, confirm, plan, changes=True) as report:
        if not _VERSION.fullmatch(version):
            raise OpsError(f"“{version[:40]}” is no API version", "write it like 2024-10-21, 2025-04-01-preview or v1")
        env.services.name_of(BACKEND)
        tried = tried_in(env, staging)
        variable = env.ai_providers.azure_version_variable
        before = read_variable(env.application, variable, KEY)
        left = VersionMarker.find(env.reports_directory)
        if left:
            report.warn(
                "a switch that had not ended",
                "nothing to do: it is brought to its end",
                value=f"{left.before} → {left.after}, since {left.started}",
            )
        report.fact("API version", f"{before} → {version}, in {env.application.env_file}")
        compare(report, tried.ai_providers, before, version)
        _judge_dates(report, tried, version)
        judge_sdks(report, env)
        judge_variable(report, env, variable)
        if before == version and not left:
            report.outcome = f"{version} is in use already: nothing is switched"
            return report
        old = left.before if left else before
        report.plan(SET, f"{variable}: {before} → {version}", seconds=1)
        report.plan(RESTART, BACKEND, seconds=10)
        report.pin_state(variable, before)
        permit = report.permit(Act(SET, f"{variable} in {env.application.env_file}"), Act(RESTART, BACKEND))
        switch(report, permit, env, old, version, health_seconds)
        if old != version:
            report.fact("undo", f"launch it with version={old}")
        report.outcome = f"the application uses {version} (before: {old})"
    return report


def _judge_dates(report: Report, env: Environment, version: str) -> None:
    today, dates = datetime.now(env.zone).date(), dict[str, Dates]()
    with told(report, "the table of retirement dates"):
        dates = read_dates(env.ai_providers)
    judge_retirement(report, f"azure API version {version}", [version], dates.get("azure-api"), None, today)
    judge_dates(report, dates, ["azure-api"], today)


KEY = "[ai_providers] azure_version_variable"
RESTART, BACKEND = "restart", "backend"
RETURN_SECONDS = 120.0
DOCUMENTATION = "https://learn.microsoft.com/azure/ai-services/openai/api-version-deprecation"


@dataclass(frozen=True, kw_only=True)
class VersionMarker(Marker):
    """The marker of an unfinished switch: the version to return to, and the new one."""

    FILE = ".ai-api-version-half-done"
    HINT = "check which version the env_file has, then remove the file"

    before: str
    after: str


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
        report.require(f"{new.model} answers on {after}", new.ok, HINTS.get(new.kind, ""), value=new.told)
        report.prefer(
            f"{old.model} answers on {before}",
            old.ok,
            "the way back may not work: " + HINTS.get(old.kind, ""),
            value=old.told,
        )
    found = [
        (new.model, *one) for old, new in pairs if old.ok and new.ok for one in shape.differences(old.body, new.body)
    ]
    if found:
        report.table(
            f"Fields of the answers, {before} → {after}",
            ("deployment", "field", "before", "after"),
            [(model, path, was or "not there", now or "not there") for model, path, was, now in found],
        )
    lost = sorted({path for _, path, was, now in found if was and was != now})
    report.prefer(
        "no field went or changed its type",
        not lost,
        "see whether the application reads it, then go on",
        value=", ".join(lost[:5]) or f"{sum(not was for _, _, was, _ in found)} are new, none went",
    )
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

    report.table(
        "Checklist of breaking changes",
        ("check", "result"),
        [
            (
                "every deployment answers",
                ("☑ " if all(new.ok for new in news) else "☒ ") + ", ".join(f"{new.model}: {new.kind}" for new in news),
            ),
            (
                "the fields that the application reads are there",
                "☒ no"
                if any(new.kind == "shape" for new in news)
                else "☑ yes"
                if all(new.ok for new in news)
                else "☐ not known: no answer",
            ),
            ("no field went or changed its type", mark(not lost, ", ".join(lost) or "none")),
            ("about as quick", mark(not slower, ", ".join(slower) or "yes")),
            ("about as many tokens", mark(not tokens, ", ".join(tokens) or "yes")),
            ("breaking changes in the documentation", f"☐ to be read by a person, {before} → {after}: {DOCUMENTATION}"),
            ("streaming, tools, structured answers, content filters", "☐ to be tried by a person: no canary uses them"),
        ],
    )


def judge_sdks(report: Report, env: Environment) -> None:
    """The application's packages against what is needed; one that is not installed is told so."""
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
        [(name, installed[name] or "not installed", needed.get(name, "nothing is said")) for name in names],
    )
    behind = [
        f"{name} {installed[name]} < {least}" if installed[name] else f"{name} is not installed (needed: {least})"
        for name, least in needed.items()
        if not installed[name] or is_behind(installed[name], least) is not False
    ]
    report.prefer(
        "SDKs of the application",
        not behind,
        "update them first, with update-dependencies or by hand",
        value=", ".join(behind)
        or ", ".join(f"{name} {installed[name]}" for name in needed)
        or "none is named in [ai_providers] sdks",
    )


def judge_variable(report: Report, env: Environment, variable: str) -> None:
    """What the service manager itself gives the backend counts before the file, and is not read again by a restart: a
    container keeps the variables that it was made with."""
    what = f"a restart has the backend read {variable} again"
    with told(report, what, Status.WARN):
        given = variable in env.services.environment(BACKEND)
        report.require(
            what,
            not given,
            "a container: change its env_file, then deploy-application with recreate; a unit: take the "
            "variable out of its Environment",
            value="no: its container or unit has a value of its own" if given else "yes",
        )


def switch(report: Report, permit: Permit, env: Environment, before: str, after: str, seconds: float) -> None:
    """Write, restart, and see the application answer; else the old version again.

    Raises:
        OpsError: the old one could not be put back either.
    """
    variable = env.ai_providers.azure_version_variable
    VersionMarker(before=before, after=after).write(env.reports_directory)
    report.state_is(f"the switch {before} → {after} has begun", "launch it again with the version that you want")
    set_variable(permit, env.application, variable, after, KEY)
    problem = _restarted(permit, env, seconds)
    if problem:
        set_variable(permit, env.application, variable, before, KEY)
        again = _restarted(permit, env, RETURN_SECONDS)
        if again:
            raise OpsError(
                f"with {before} back the application is not well either: {again}",
                "look at the backend's log; the version is not what it lacks",
            )
        report.fail(
            f"the application is well with {after}",
            "look at the backend's log and at the table of differences; the old version is in use again",
            value=f"{problem}; returned to {before}, with which it is well",
        )
    else:
        report.passed(
            f"the application is well with {after}",
            value="healthy, and a user's question was answered"
            if env.application.ai.ask
            else "healthy; a user's question was not tried: [application.ai] ask is not configured",
        )
    VersionMarker.remove(env.reports_directory)
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
