"""Rehearse the fallback from one AI provider to the next (§5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from blocks.ai_providers import Provider
from blocks.environment import Environment
from runbook.change import Carrier, Change, State, carrying_out
from runbook.errors import OpsError
from runbook.files.marker import Marker
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.ai.interview import (
    Interview,
    InterviewReply,
    ask_application,
    begin_interview,
    read_stored,
    require_question,
)
from tasks.application.health import wait_healthy
from tasks.faults.disposable import BREAK, Fault, require_disposable
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

AGAIN = "run rehearse-fallback again: it first ends the faults"
UNAVAILABLE = 503
RehearsedFault = Literal["500", "429", "timeout", "refused"]


@dataclass(frozen=True, kw_only=True)
class RehearsalMarker(Marker):
    """The marker of an unfinished rehearsal: the providers that can still fail."""

    FILE = ".fallback-half-done"
    HINT = "end the faults by hand, then delete the file"

    providers: tuple[str, ...]


@flow(name="rehearse-fallback", flow_run_name=RunName("rehearse-fallback {environment} {fault}"))
def rehearse_fallback(environment: str, fault: RehearsedFault = "500", plan: str = "", confirm: str = "") -> Report:
    """フォールバック設定: マルチプロバイダーフォールバックの訓練 (§5.4)

    Makes the AI providers fail one by one, in the order of the application's chain, and asks the application a question
    like a user after each: the next provider must answer. With all providers failing, the user must get a clear refusal
    (503) in time, with nothing half stored, while everything else works. Then it ends the faults, and the first
    provider must answer again. Run it every quarter and after every change of the chain, in a `disposable` environment.

    What it changes: providers fail for some seconds, and the operators' user gets one interview. The faults end with
    the run; after a kill, the next run ends them. Evidence: which provider answered each question, and its latency.

    Real providers cannot be made to fail, but a proxy in front of them can (`[ai_providers] proxy`). Without a proxy,
    or the providers' own control address, the plan is CRITICAL: the fallback cannot be rehearsed.

    Departs from the manual: if all providers fail, its chain raises a bare Exception, which users see as 500.

    Args:
        environment: Environment; only a disposable one
        fault: Fault (500, 429, timeout, refused). All but 500 need the proxy
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Rehearse fallback", env, confirm, plan, changes=True) as report:
        require_disposable(env)
        chain = list(env.ai_providers.chain)
        _judge_control(report, env, fault)
        left = RehearsalMarker.find(env.reports_directory)
        earlier = list(dict.fromkeys([*left.providers, *chain])) if left else []
        before = [_ending(report, env, earlier, f"of the interrupted rehearsal: {', '.join(earlier)}")] if left else []
        asking = Change(
            partial(begin_interview, env.application),
            "begin an interview",
            f"of the operators' user, for {len(chain) + 2} questions",
            needs=[
                lambda report: _judge_states(report, env, chain),
                lambda _: require_question(env.application),
            ],
        )
        ending = replace(_ending(report, env, chain, ", ".join(chain)), is_final=True)
        breaking = [_breaking(env, name, fault, ending) for name in chain]
        effect = Effect(
            f"the AI providers {', '.join(chain)} fail on purpose, one after the other",
            "not needed, the run ends every fault",
            down="AI answers come from the next provider, or fail",
        )
        pins = [lambda report: report.pin_state("providers", ", ".join(chain))]
        with carrying_out(report, *before, asking, *breaking, ending, effect=effect, pins=pins) as carry:
            for one in before:
                carry(one)
            wait_healthy(env.application, seconds=30, in_a_row=1)
            interview = carry(asking)
            replies = _rehearse(report, carry, env, breaking, interview)
            carry(ending)
            replies.append(("none again", ask_application(interview)))
            _judge_reply(report, "after the faults", replies[-1][1], chain[0])
        _attach_replies(report, replies)
        report.outcome = f"{len(chain)} providers failed and recovered"
    return report


def _judge_control(report: Report, env: Environment, fault: RehearsedFault) -> None:
    """Check that the providers can be made to fail with this fault.

    Raises:
        RunbookFailed: they cannot.
    """
    ai = env.ai_providers
    report.require(
        "control of the providers",
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
            expected="500: the only fault of the providers' own control",
        )
    report.fail_if_critical()


def _judge_use(report: Report, env: Environment, before: Mapping[str, int], first: Provider) -> None:
    """Check that the application's requests use the proxy: otherwise a fault has no effect.

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


def _breaking(env: Environment, name: str, fault: RehearsedFault, ending: Change[[], None]) -> Change[[], Fault]:
    """Plan the fault of one provider. If the run fails, the reverse of the first one ends the faults of all."""
    return Change(
        fail_provider.bind(env, name, fault),
        BREAK,
        f"{provider(env, name)}: {MEANING[fault]}",
        seconds=1,
        begun=State("AI providers fail on purpose", AGAIN),
        reverse=ending.work if name == env.ai_providers.chain[0] else None,
    )


def _ending(report: Report, env: Environment, names: Sequence[str], detail: str) -> Change[[], None]:
    def end() -> None:
        heal_providers(env, names)
        RehearsalMarker.remove(env.reports_directory)
        report.state_is("the faults are ended", "run rehearse-fallback again")

    return Change(end, "end the faults", detail, seconds=1)


def _judge_states(report: Report, env: Environment, chain: Sequence[str]) -> None:
    """All providers must answer, unless a killed rehearsal made them fail."""
    states = read_provider_states(env)
    if unknown := [name for name in chain if name not in states]:
        raise OpsError(
            f"[ai_providers] chain names {', '.join(unknown)}, but the providers are {', '.join(states)}",
            "correct chain",
        )
    failing = [name for name in chain if states[name] == FAILING]
    if left := RehearsalMarker.find(env.reports_directory):
        report.warn(
            "interrupted rehearsal",
            "nothing to do: a confirmed run ends its faults first",
            value=f"{left.run}, {left.started}; failing: {', '.join(failing) or 'none'}",
        )
        return
    report.require(
        "every provider answers",
        not failing,
        "end their faults first, or wait until they answer",
        value=f"{', '.join(failing)}: {FAILING}" if failing else ", ".join(chain),
    )


def _rehearse(
    report: Report, carry: Carrier, env: Environment, breaking: Sequence[Change[[], Fault]], interview: Interview
) -> list[tuple[str, InterviewReply]]:
    """The failing providers and the application's reply, step by step."""
    chain, received = list(env.ai_providers.chain), read_received(env)
    replies = [("none", ask_application(interview))]
    _judge_reply(report, "with all providers", replies[0][1], chain[0])
    report.fail_if_critical()
    _judge_use(report, env, received, chain[0])
    RehearsalMarker(providers=tuple(chain)).write(env.reports_directory)
    for number, fails in enumerate(breaking, 1):
        carry(fails)
        broken = ", ".join(chain[:number])
        replies.append((broken, ask_application(interview)))
        if number < len(chain):
            _judge_reply(report, f"without {broken}", replies[-1][1], chain[number], stops=False)
    _judge_without_any(report, env, interview, [one for _, one in replies])
    return replies


def _judge_reply(report: Report, when: str, reply: InterviewReply, expected: str, *, stops: bool = True) -> None:
    report.require(
        f"{when} the user gets an answer",
        reply.answered and reply.provider == expected,
        "check the application's log for “Provider … failed”, and the order of its chain",
        value=reply.text,
        expected=expected,
        stops=stops,
    )


def _judge_without_any(
    report: Report, env: Environment, interview: Interview, replies: Sequence[InterviewReply]
) -> None:
    """The question without any provider: a clear refusal, and nothing half stored. No finding stops the run: the faults
    still have to be ended."""
    reply = replies[-1]
    report.fact("without any provider", reply.text)
    clear = reply.status == UNAVAILABLE and bool(reply.said)
    report.require(
        "without any provider the user gets a clear refusal",
        clear,
        "make the application answer 503 with a sentence: 500 looks like a bug, and a hang like an outage",
        value=reply.text,
        expected=UNAVAILABLE,
        stops=False,
    )
    stored = read_stored(interview)
    if stored is None:
        report.fact("nothing is half stored", "not checked: [application.ai] stored is not configured")
    else:
        halves = stored.halves(replies)
        report.require(
            "nothing is half stored",
            not halves,
            "store question and reply in one transaction, after the reply arrived",
            value=f"{len(halves)} of {len(replies)} questions are half stored",
            expected="answered questions with their answers, refused questions not at all",
            stops=False,
        )
    try:
        health = wait_healthy(env.application, seconds=30, in_a_row=1)
    except OpsError as error:
        report.fail("everything else works", error.hint, value=error.message, stops=False)
    else:
        if health.configured:
            report.passed("everything else works", value=health.answer)
        else:
            report.fact("health", health.answer)


def _attach_replies(report: Report, replies: Sequence[tuple[str, InterviewReply]]) -> None:
    report.table(
        "Replies to the user",
        ("failing", "answer by", "status", "seconds"),
        [
            (failing, f"{one.provider} {one.model}".strip() or f"none: {one.said}", one.status, f"{one.seconds:.2f}")
            for failing, one in replies
        ],
    )
    drawn = [
        Bar(f"failing: {failing}", (one.seconds,), f"{one.seconds:.2f} s, {one.provider or one.status}")
        for failing, one in replies
    ]
    report.attach(Evidence("Latency of the replies", svg=bars(drawn, "s")))
