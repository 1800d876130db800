"""Check the AI providers: answers, latency, and retirement dates (§5.1, §5.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import get_args

from pydantic import SecretStr

from blocks.ai_providers import AIProviders, Provider
from blocks.environment import Environment
from flows.ai_providers.errors import report_errors
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.kinds import Pending
from runbook.next import Next
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.ai.answer import HINTS, ProviderAnswer
from tasks.ai.azure import ask_azure, read_azure_models
from tasks.ai.bedrock import ask_bedrock, model_of, read_bedrock_models
from tasks.ai.lifecycle import Dates, Lifecycle, read_dates
from tasks.ai.vertex import ask_vertex, find_vertex_token, read_vertex_endpoints
from tasks.application.env_file import read_variable


@flow(name="check-ai-providers", flow_run_name=RunName("check-ai-providers {environment}"))
def check_ai_providers(environment: str) -> Report:
    """AIプロバイダー確認: Azure OpenAI・AWS Bedrock・GCP Vertex AI (§5.1, §5.3)

    Sends one short question (a canary, with a token budget) to every deployment and model of the environment, all at
    the same time. Checks latency, tokens, and whether the answer has the fields that the application reads. Also checks
    the retirement dates: Bedrock's lifecycle (LEGACY), Azure's own deprecation dates, and the table of retirement dates
    for API versions and models, which states the source of each date and the day of its last review. Run it daily.

    It changes nothing; a canary costs a few tokens. A model that does not answer is CRITICAL; a used-up quota is WARN.
    A retirement within 90 days, and unknown dates, are WARN.

    Departs from the manual: it lists Bedrock's models without their lifecycle. A listed model is not always accessible;
    here each one must answer.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check AI providers", env) as report:
        ai, today = env.ai_providers, datetime.now(env.zone).date()
        dates = dict[str, Dates]()
        with report_errors(report, "the table of retirement dates"):
            dates = read_dates(ai)
        wanted = _configured(report, ai)
        version = _azure_version(report, env) if "azure" in wanted else ""
        token = _token(report, ai) if "vertex" in wanted else SecretStr("")
        answers = [one.result() for one in _send_canaries(ai, wanted, version, token)]
        for answer in answers:
            judge_answer(report, ai, answer)
        if version:
            _judge_azure(report, ai, version, dates, answers, today)
        if "bedrock" in wanted:
            _judge_bedrock(report, ai, dates, today)
        if token.get_secret_value():
            _judge_vertex(report, ai, token, dates, answers, today)
        judge_dates(report, dates, _used(wanted, dates), today)
        if answers:
            attach_answers(report, answers)
        report.outcome = f"{sum(one.ok for one in answers)} of {_number_of(ai, wanted)} deployments and models answer"
    return report


def _models(ai: AIProviders, provider: Provider) -> list[str]:
    return {"azure": ai.azure_deployments, "bedrock": ai.bedrock_models, "vertex": ai.vertex_models}[provider]


def _number_of(ai: AIProviders, wanted: list[Provider]) -> int:
    return sum(len(_models(ai, provider)) for provider in wanted)


def _configured(report: Report, ai: AIProviders) -> list[Provider]:
    """The providers with a complete configuration; an incomplete one of the application's chain is a WARN."""
    known: tuple[Provider, ...] = get_args(Provider)
    found = list[Provider]()
    for provider in known:
        lacks = _lacks(ai, provider)
        if not lacks:
            found.append(provider)
        elif provider in ai.chain:
            report.warn(
                f"{provider} is checked",
                f"add {', '.join(lacks)} to [ai_providers], or remove {provider} from chain",
                value=f"no: {', '.join(lacks)} is empty",
            )
    report.require(
        "a provider is configured",
        bool(found),
        "configure the providers in [ai_providers]",
        value=", ".join(found) or "none",
    )
    return found


def _lacks(ai: AIProviders, provider: Provider) -> list[str]:
    needed: dict[Provider, tuple[str, ...]] = {
        "azure": ("azure_deployments", "azure_endpoint", "azure_key"),
        "bedrock": ("bedrock_models",),
        "vertex": ("vertex_models", "vertex_project"),
    }
    given = {**vars(ai), "azure_key": ai.azure_key.get_secret_value()}
    return [name for name in needed[provider] if not given[name]]


def _azure_version(report: Report, env: Environment) -> str:
    """The API version that the application uses; "" if it is not known."""
    ai, version = env.ai_providers, env.ai_providers.azure_api_version
    if not version:
        with report_errors(report, "azure: the API version in use"):
            version = read_variable(env.application, ai.azure_version_variable, "[ai_providers] azure_version_variable")
    report.fact("Azure API version", version or "not known")
    return version


def _token(report: Report, ai: AIProviders) -> SecretStr:
    with report_errors(report, "vertex: an access token"):
        return find_vertex_token(ai)
    return SecretStr("")


def _send_canaries(
    ai: AIProviders, wanted: list[Provider], version: str, token: SecretStr
) -> list[Pending[ProviderAnswer]]:
    asked = list[Pending[ProviderAnswer]]()
    if version:
        asked += [ask_azure.submit(ai, deployment, version) for deployment in ai.azure_deployments]
    if "bedrock" in wanted:
        asked += [ask_bedrock.submit(ai, model) for model in ai.bedrock_models]
    if token.get_secret_value():
        asked += [ask_vertex.submit(ai, model, token) for model in ai.vertex_models]
    return asked


def _judge_azure(
    report: Report,
    ai: AIProviders,
    version: str,
    dates: Mapping[str, Dates],
    answers: list[ProviderAnswer],
    today: date,
) -> None:
    judge_retirement(report, f"azure API version {version}", [version], dates.get("azure-api"), None, today)
    models = dict[str, Lifecycle]()
    with report_errors(report, "azure: deprecation of its models", Status.WARN):
        models = read_azure_models(ai, version)
    for answer in (one for one in answers if one.provider == "azure" and one.ok):
        what = f"azure {answer.model} ({answer.version})"
        judge_retirement(report, what, [answer.version], dates.get("azure"), models.get(answer.version), today)


def _judge_bedrock(report: Report, ai: AIProviders, dates: Mapping[str, Dates], today: date) -> None:
    try:
        models = read_bedrock_models(ai)
    except OpsError as error:
        report.fail("bedrock: lifecycle of its models", error.hint, value=f"not known: {error.message}")
        return
    for name in ai.bedrock_models:
        model = model_of(name)
        report.prefer(
            f"bedrock {name} is listed",
            model in models,
            "correct [ai_providers]: the model was retired, or belongs to another region",
            value="yes" if model in models else f"no, {len(models)} others are",
        )
        found = models.get(model)
        if found and found.status == "ACTIVE" and not found.retires:
            report.passed(f"lifecycle of bedrock {name}", value=found.status)
            continue  # AWS announces a retirement at least 6 months before, with LEGACY
        judge_retirement(report, f"bedrock {name}", [model], dates.get("bedrock"), found, today)


def _judge_vertex(
    report: Report,
    ai: AIProviders,
    token: SecretStr,
    dates: Mapping[str, Dates],
    answers: list[ProviderAnswer],
    today: date,
) -> None:
    with report_errors(report, f"vertex: {ai.vertex_project} in {ai.vertex_location}"):
        endpoints = read_vertex_endpoints(ai, token)
        report.passed(
            f"vertex: {ai.vertex_project} in {ai.vertex_location}",
            value=f"reachable; {len(endpoints)} own endpoints",
        )
        if endpoints:
            report.table(
                "Vertex AI: the project's own endpoints", ("endpoint and models",), [(one,) for one in endpoints]
            )
    for model in ai.vertex_models:
        reported = [one.version for one in answers if one.provider == "vertex" and one.model == model and one.version]
        judge_retirement(report, f"vertex {model}", [*reported, model], dates.get("vertex"), None, today)


def _used(wanted: list[Provider], dates: Mapping[str, Dates]) -> list[str]:
    """The sections of the table that are needed: Azure and Bedrock report dates of models themselves."""
    needed = {"azure": "azure-api", "vertex": "vertex"}
    return [*(needed[one] for one in wanted if one in needed), *(one for one in ("azure", "bedrock") if one in dates)]


SOON = timedelta(days=90)
OLD = timedelta(days=90)
IN_TABLE = "add it to the table of retirement dates ([ai_providers] retirements), with its source"


def judge_answer(report: Report, ai: AIProviders, answer: ProviderAnswer) -> None:
    """Judge one canary: the answer, its latency, its tokens."""
    what = f"{answer.provider} {answer.model}"
    worst = Status.WARN if answer.kind == "throttled" else Status.CRITICAL
    report.require(f"{what} answers", answer.ok, HINTS.get(answer.kind, ""), value=answer.text, worst=worst)
    if not answer.ok:
        return
    report.prefer(
        f"latency of {what}",
        answer.seconds <= ai.slow_seconds,
        "check the provider's status page and its quota; another region can be faster",
        value=f"{answer.seconds:.2f} s",
        expected=f"≤ {ai.slow_seconds:g} s",
    )
    # The prompt has about 20 tokens.
    most = ai.canary_tokens + 60
    report.prefer(
        f"tokens of {what}",
        answer.tokens <= most,
        "check whether it is a reasoning model: it uses more than max_tokens, so calls cost more than planned",
        value=answer.tokens,
        expected=f"≤ {most}",
    )


def judge_retirement(
    report: Report, what: str, names: Sequence[str], dates: Dates | None, found: Lifecycle | None, today: date
) -> None:
    """Judge its retirement date: of the service itself, else of the table. `names`: its possible names there."""
    listed = next((dates.retires[name] for name in names if name in dates.retires), None) if dates else None
    source = dates.source if dates else ""
    day, source = (found.retires, "by the service") if found and found.retires else (listed, source)
    if found and found.status:
        report.prefer(
            f"lifecycle of {what}",
            found.status.upper() in ("ACTIVE", "GENERALLY-AVAILABLE", "PREVIEW"),
            "move to a newer model before its retirement; accounts that have not used it recently are refused already",
            value=found.status,
        )
    if day is None:
        report.warn(f"retirement of {what}", f"look up the date, and {IN_TABLE}", value="not known")
        return
    left = day - today
    hint = "move to a newer one: a model in [ai_providers] and the application, an API version by its runbook"
    report.require(
        f"retirement of {what}",
        left > SOON,
        hint,
        value=f"{day} (in {left.days} days), {source}" if left.days > 0 else f"retired on {day}, {source}",
        expected=f"in more than {SOON.days} days",
        worst=Status.WARN if left.days > 0 else Status.CRITICAL,
        follow=[Next("update-ai-api-version")] if "API version" in what else (),
    )


def judge_dates(report: Report, dates: Mapping[str, Dates], used: Sequence[str], today: date) -> None:
    """Whether each section of the table was reviewed recently."""
    for section in used:
        if section not in dates:
            report.warn(
                f"retirement dates of {section}",
                f"add a section {section} with source, looked_at and retires",
                value="not in the table",
            )
            continue
        found = dates[section]
        age = today - found.looked_at
        report.prefer(
            f"retirement dates of {section}",
            age <= OLD,
            f"read {found.source}, then correct the dates and looked_at in the table",
            value=f"reviewed on {found.looked_at}, {age.days} days ago",
            expected=f"≤ {OLD.days} days ago",
        )


def attach_answers(report: Report, answers: Sequence[ProviderAnswer]) -> None:
    """A table of the canaries, and a plot of their latency."""
    report.table(
        "Canaries",
        ("provider", "model", "answers", "version", "seconds", "tokens"),
        [
            (
                one.provider,
                one.model,
                "yes" if one.ok else f"{one.kind}: {one.said}",
                one.version,
                f"{one.seconds:.2f}",
                one.tokens or "",
            )
            for one in answers
        ],
    )
    drawn = [
        Bar(f"{one.provider} {one.model}", (one.seconds,), f"{one.seconds:.2f} s" if one.ok else one.kind)
        for one in answers
    ]
    report.attach(Evidence("Latency", svg=bars(drawn, "s")))
