"""The fallback from one AI provider to the next, rehearsed (§5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prefect import flow

from blocks.ai_providers import Provider
from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.files.marker import Marker
from runbook.guard.permit import Act, Permit
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.ai.interview import Interview, Reply, ask_application, begin_interview, read_stored, require_question
from tasks.application.health import wait_healthy
from tasks.faults.disposable import BREAK, require_disposable
from tasks.faults.providers import (
    FAILING,
    MEANING,
    PROXY_HINT,
    fail_provider,
    heal_providers,
    provider,
    read_provider_states,
    read_received,
)

AGAIN = "launch rehearse-fallback again: it gives the providers back first"
UNAVAILABLE = 503
RehearsedFault = Literal["500", "429", "timeout", "refused"]


@dataclass(frozen=True, kw_only=True)
class RehearsalMarker(Marker):
    """The marker of an unfinished rehearsal: the providers that it may have made fail."""

    FILE = ".fallback-half-done"
    HINT = "restore the providers by hand, then remove the file"

    providers: tuple[str, ...]


@flow(name="rehearse-fallback", flow_run_name="rehearse-fallback {environment}")
def rehearse_fallback(environment: str, fault: RehearsedFault = "500", plan: str = "", confirm: str = "") -> Report:
    """フォールバック設定: マルチプロバイダーフォールバックの訓練 (§5.4)

    Takes the AI providers away, one by one in the order in which the application asks them, and asks it as a user does
    after each: the next provider must answer. When all are gone it looks at what the user gets: a clear refusal (503),
    in time, with nothing half stored, while all else goes on. Then they are given back, and the first answers again.
    Run it every quarter and after every change of the chain, in an environment that is `disposable`.

    What it changes: providers that fail for some seconds, and one interview of the operators' user. They are given back
    however the run ends; after a kill, by the next launch. Evidence: who answered each question, and how long it took.

    Real providers cannot be made to fail; a proxy in front of them can (`[ai_providers] proxy`). Without a proxy, or a
    control of the providers' own, the plan is CRITICAL: the fallback cannot be rehearsed here.

    Departs from the manual: its chain raises a bare Exception when all fail, which users see as 500.

    Args:
        environment: 対象の環境。disposable な環境のみ
        fault: 障害の種類 (500、429、timeout、refused)。500 以外はプロキシが必要
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するには環境名を入力。空なら計画のみ表示
    """
    env = Environment.find(environment)
    with runbook("Rehearse fallback", env, confirm, plan, changes=True) as report:
        require_disposable(env)
        chain = list(env.ai_providers.chain)
        _judge_means(report, env, fault)
        left = RehearsalMarker.find(env.reports_directory)
        _judge_states(report, env, chain, left)
        require_question(env.application)
        for name in chain:
            report.plan(BREAK, f"{provider(env, name)}: {MEANING[fault]}", seconds=1)
        report.plan("give back", ", ".join(chain), seconds=1)
        report.pin_state("providers", ", ".join(chain))
        permit = report.permit(*(Act(BREAK, provider(env, name)) for name in chain))
        if left:
            heal_providers(env, list(dict.fromkeys([*left.providers, *chain])))
            RehearsalMarker.remove(env.reports_directory)
        wait_healthy(env.application, seconds=30, in_a_row=1)
        interview = begin_interview(env.application)
        replies = _rehearse(report, permit, env, fault, interview)
        _report_results(report, replies)
        report.outcome = f"{len(chain)} providers taken away and given back"
    return report


def _judge_means(report: Report, env: Environment, fault: RehearsedFault) -> None:
    """Whether providers can be made to fail here, in this way.

    Raises:
        RunbookFailed: they cannot.
    """
    ai = env.ai_providers
    report.require(
        "means to make a provider fail",
        bool(ai.control),
        PROXY_HINT,
        value="the proxy"
        if ai.proxy
        else f"the providers' own control at {ai.control}"
        if ai.control
        else "none: the fallback cannot be rehearsed here",
    )
    if ai.control and not ai.proxy:
        report.require(
            "kind of fault",
            fault == "500",
            PROXY_HINT,
            value=f"{fault}, without the proxy",
            expected="500: the providers' own control knows no other",
        )
    report.fail_if_critical()


def _judge_use(report: Report, env: Environment, before: Mapping[str, int], first: Provider) -> None:
    """Whether the application's requests go through the proxy: else a fault would reach nobody.

    Raises:
        RunbookFailed: they do not.
    """
    if not env.ai_providers.proxy:
        return
    passed = read_received(env).get(first, 0) - before.get(first, 0)
    report.require(
        "the application uses the proxy",
        passed > 0,
        f"set the base URL of {first} in the application to http://{env.ai_providers.proxy[first]} and restart it",
        value=f"{passed} requests for {first}",
        expected="at least 1 for one question",
    )
    report.fail_if_critical()


def _judge_states(report: Report, env: Environment, chain: Sequence[str], left: RehearsalMarker | None) -> None:
    """All there, or taken away by a rehearsal that was killed."""
    states = read_provider_states(env)
    if unknown := [name for name in chain if name not in states]:
        raise OpsError(
            f"[ai_providers] chain names {', '.join(unknown)}, and the providers are {', '.join(states)}",
            "correct chain",
        )
    gone = [name for name in chain if states[name] == FAILING]
    if left:
        report.warn(
            "a rehearsal that had not ended",
            "nothing to do: they are given back when this is carried out",
            value=f"{left.run}, {left.started}; {', '.join(gone) or 'none'} away",
        )
        return
    report.require(
        "every provider answers before it",
        not gone,
        "give them back first, or wait until they answer",
        value=f"{', '.join(gone)}: {FAILING}" if gone else ", ".join(chain),
    )


def _rehearse(
    report: Report, permit: Permit, env: Environment, fault: RehearsedFault, interview: Interview
) -> list[tuple[str, Reply]]:
    """Who was away, and what the user got."""
    chain, received = list(env.ai_providers.chain), read_received(env)
    replies = [("nobody", ask_application(interview))]
    _judge_reply(report, "with all providers", replies[0][1], chain[0])
    report.fail_if_critical()
    _judge_use(report, env, received, chain[0])
    RehearsalMarker(providers=tuple(chain)).write(env.reports_directory)
    report.state_is("AI providers are away", AGAIN)
    try:
        for number, name in enumerate(chain, 1):
            fail_provider(permit, env, name, fault)
            away = ", ".join(chain[:number])
            replies.append((away, ask_application(interview)))
            if number < len(chain):
                _judge_reply(report, f"without {away}", replies[-1][1], chain[number])
        _judge_all_gone(report, env, interview, [one for _, one in replies])
    finally:
        heal_providers(env, chain)
        RehearsalMarker.remove(env.reports_directory)
        report.state = None
    replies.append(("nobody again", ask_application(interview)))
    _judge_reply(report, "when they are back", replies[-1][1], chain[0])
    return replies


def _judge_reply(report: Report, when: str, reply: Reply, expected: str) -> None:
    report.require(
        f"{when} the user gets an answer",
        reply.answered and reply.provider == expected,
        "look at the application's log for “Provider … failed”, and at the order of its chain",
        value=reply.told,
        expected=expected,
    )


def _judge_all_gone(report: Report, env: Environment, interview: Interview, replies: Sequence[Reply]) -> None:
    """The last question: refused, and neither it nor half of it stored."""
    reply = replies[-1]
    report.fact("without any provider", reply.told)
    clear = reply.status == UNAVAILABLE and bool(reply.said)
    report.require(
        "without any provider the user gets a clear refusal",
        clear,
        "answer 503 with a sentence: 500 looks like a bug, and a client that waits looks like nothing",
        value=reply.told,
        expected=UNAVAILABLE,
    )
    stored = read_stored(interview)
    if stored is None:
        report.fact("nothing is half stored", "not checked: [application.ai] stored is not configured")
    else:
        halves = stored.halves(replies)
        report.require(
            "nothing is half stored",
            not halves,
            "store question and reply in one transaction, after the reply is there",
            value=f"{len(halves)} of {len(replies)} questions are half stored",
            expected="answered ones with their answers, refused ones not at all",
        )
    try:
        health = wait_healthy(env.application, seconds=30, in_a_row=1)
    except OpsError as error:
        report.fail("all else goes on", error.hint, value=error.message)
    else:
        if health.configured:
            report.passed("all else goes on", value=health.answer)
        else:
            report.fact("health", health.answer)


def _report_results(report: Report, replies: Sequence[tuple[str, Reply]]) -> None:
    report.table(
        "What the user got",
        ("away", "answer by", "status", "seconds"),
        [
            (away, f"{one.provider} {one.model}".strip() or f"nobody: {one.said}", one.status, f"{one.seconds:.2f}")
            for away, one in replies
        ],
    )
    drawn = [
        Bar(f"without {away}", (one.seconds,), f"{one.seconds:.2f} s, {one.provider or one.status}")
        for away, one in replies
    ]
    report.attach(Evidence("How long an answer took", svg=bars(drawn, "s")))
