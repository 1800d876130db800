"""What check-ai-providers makes of answers, lifecycles and dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta

from blocks.ai_providers import AIProviders
from runbook.plots import Bar, bars
from runbook.report import Evidence, Report, Status
from tasks.ai.answer import HINTS, Answer
from tasks.ai.lifecycle import Dates, Lifecycle

SOON = timedelta(days=90)
OLD = timedelta(days=90)
SECTION_OF = "name it in the table of retirement dates ([ai_providers] retirements), with the page that says it"


def judge_answer(report: Report, ai: AIProviders, answer: Answer) -> None:
    """Whether it answers as the application needs it; how long it took, and how many tokens."""
    what = f"{answer.provider} {answer.model}"
    otherwise = Status.WARN if answer.kind == "throttled" else Status.CRITICAL
    report.expect(f"{what} answers", answer.ok, HINTS.get(answer.kind, ""), value=answer.told, otherwise=otherwise)
    if not answer.ok:
        return
    report.expect(f"{what} is quick", answer.seconds <= ai.slow_seconds,
                  "look at the provider's status page and at its quota; another region may be quicker",
                  value=f"{answer.seconds:.2f} s", expected=f"at most {ai.slow_seconds:g} s",
                  otherwise=Status.WARN)  # fmt: skip
    # The prompt has about 20.
    most = ai.canary_tokens + 60
    report.expect(f"{what} keeps to the token budget", answer.tokens <= most,
                  "it takes more than max_tokens allows (reasoning?): calls cost more than they seem",
                  value=answer.tokens, expected=f"at most {most}", otherwise=Status.WARN)  # fmt: skip


def judge_retirement(
    report: Report, what: str, names: Sequence[str], dates: Dates | None, found: Lifecycle | None, today: date
) -> None:
    """When it answers no more: by the service's own word, else by the table. `names`: what it may be called there."""
    told = next((dates.retires[name] for name in names if name in dates.retires), None) if dates else None
    by = dates.source if dates else ""
    day, by = (found.retires, "the service says so") if found and found.retires else (told, by)
    if found and found.status:
        report.expect(f"{what} is current", found.status.upper() in ("ACTIVE", "GENERALLY-AVAILABLE", "PREVIEW"),
                      "move to a newer one before it ends: accounts that did not use it for a while are refused",
                      value=found.status, otherwise=Status.WARN)  # fmt: skip
    if day is None:
        report.expect(f"{what} stays", False, f"look its retirement up, and {SECTION_OF}",
                      value="not known until when", otherwise=Status.WARN)  # fmt: skip
        return
    left = day - today
    hint = (
        "move to a newer one: update-ai-api-version for an API version, [ai_providers] and the application for a model"
    )
    report.expect(f"{what} stays", left > SOON, hint, value=f"until {day} ({left.days} days), {by}" if left.days > 0
                  else f"retired on {day}, {by}", expected=f"more than {SOON.days} days",
                  otherwise=Status.WARN if left.days > 0 else Status.CRITICAL)  # fmt: skip


def judge_dates(report: Report, dates: Mapping[str, Dates], used: Sequence[str], today: date) -> None:
    """Whether somebody has looked lately: a table of dates is right on the day on which it is written."""
    for section in used:
        if section not in dates:
            report.warn(f"retirement dates of {section}", f"add a section {section} with source, looked_at and retires",
                        value="the table has none")  # fmt: skip
            continue
        found = dates[section]
        age = today - found.looked_at
        report.expect(f"retirement dates of {section}", age <= OLD,
                      f"read {found.source}, then correct the dates and looked_at in the table",
                      value=f"looked at on {found.looked_at}, {age.days} days ago", expected=f"within {OLD.days} days",
                      otherwise=Status.WARN)  # fmt: skip


def tell_answers(report: Report, answers: Sequence[Answer]) -> None:
    """All of them, and how long they took."""
    report.table("Canaries", ("provider", "model", "answers", "as", "seconds", "tokens"),
                 [(one.provider, one.model, "yes" if one.ok else f"{one.kind}: {one.said}", one.version,
                   f"{one.seconds:.2f}", one.tokens or "") for one in answers])  # fmt: skip
    drawn = [Bar(f"{one.provider} {one.model}", (one.seconds,), f"{one.seconds:.2f} s" if one.ok else one.kind)
             for one in answers]  # fmt: skip
    report.attach(Evidence("Latency", svg=bars(drawn)))
