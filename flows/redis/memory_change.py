"""Whether all that check-redis-memory tells is of one server and of one set of keys (§2.1)."""

from __future__ import annotations

from runbook.report import Report, Status
from tasks.redis.memory.info import Afterwards, Memory
from tasks.redis.memory.sweep import Survey

# Applications delete keys too. More than this part of all, and so many, went in another way.
MOST_MISSING_SHARE, MOST_MISSING = 0.1, 100


def judge_role(report: Report, memory: Memory, after: Afterwards) -> None:
    """A replica evicts and expires as its master does: what is judged here is the master's."""
    hint = "launch it in the environment of its master, or name the Sentinels in [redis]"
    report.expect("role", memory.role == "master", hint, value=memory.role, expected="master", otherwise=Status.WARN)
    if after.role != memory.role:
        hint = "launch it again: its data was replaced by its master's, or it took over from it"
        report.warn("the role changed during this report", hint, value=after.role, expected=memory.role)


def judge_same_data(report: Report, memory: Memory, after: Afterwards, survey: Survey) -> None:
    """A restart, a flush: then these are numbers of two sets of keys, or of what was left."""
    if after.run_id != memory.run_id:
        report.warn(
            "the server was restarted during this report",
            "launch it again: this mixes what it held before and after (check-redis-persistence: what a start loads)",
            value=f"{survey.expected:,} keys when its keys were counted",
            expected=f"{memory.keys:,} as at the beginning",
        )
    elif survey.is_complete and memory.role == after.role == "master":
        _judge_missing(report, memory, after, survey)


def _judge_missing(report: Report, memory: Memory, after: Afterwards, survey: Survey) -> None:
    expired, evicted = max(after.expired - memory.expired, 0), max(after.evicted - memory.evicted, 0)
    seen = survey.read + sum(found.gone + found.denied for found in survey.databases)
    missing = max(memory.keys, survey.expected) - seen
    if missing - expired - evicted > max(MOST_MISSING_SHARE * memory.keys, MOST_MISSING):
        report.warn(
            "keys went away during this report",
            "somebody deleted or flushed them (see the busiest commands): launch it again, this tells of what was left",
            value=f"{missing:,} of {memory.keys:,}, of which {expired:,} expired and {evicted:,} were evicted",
            expected="all there were are read",
        )
