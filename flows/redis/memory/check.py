"""What fills a Redis, and how near it is to its limit (§2.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.redis.master import judge_master, judge_same_master
from flows.redis.memory.findings import (
    about,
    judge_coverage,
    judge_explained,
    judge_memory,
    judge_policy,
    judge_without_expiry,
    tell_activity,
)
from flows.redis.memory.tables import tell_databases, tell_keys, tell_pattern, tell_prefixes
from runbook.report import Report
from runbook.run import runbook
from runbook.units import duration, size
from tasks.redis.memory.estimates import ZERO
from tasks.redis.memory.info import Afterwards, Memory, read_activity, read_afterwards, read_memory
from tasks.redis.memory.listing import find_first_keys
from tasks.redis.memory.sweep import Survey, survey_keys
from tasks.redis.sentinels import read_sentinels

MANUAL_KEYS = 100
# Of the time budget, for the pattern.
PATTERN_SHARE = 0.25


@flow(name="check-redis-memory", flow_run_name="check-redis-memory {environment}")
def check_redis_memory(
    environment: str, pattern: str = "", budget_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
) -> Report:
    """メモリ使用量監視: メモリ情報確認と可視化 (§2.1)

    Says how near the master's memory is to its limit, what happens there, and what fills it: bytes and keys of each
    database, the biggest prefixes and keys by memory, types, TTLs, keys that never expire, hot spots. Run it daily, and
    first when writes are refused or the memory alarm rings.

    It reads all keys in pages so small that other clients' calls wait no longer than their slowest ones do anyway, and
    stops when the time is over: then the numbers are estimates, with their errors. It changes no data (the server keeps
    its read-only script until its next start, and counts its reads in keyspace_hits and commandstats); there is nothing
    to undo. Evidence: the tables and two pictures.

    Departs from the manual: biggest means bytes (MEMORY USAGE), not elements; the biggest keys are measured exactly
    (up to 50,000 elements), and data that no key explains is a finding; TTL −1 is told as "no expiry"; the
    fragmentation ratio is not judged where it tells nothing; no command is started for each key. There is no hit rate:
    reports like this one make most of it.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        pattern: 最初の100件を表示するキーのパターン (例 session:*。バイトは \\xNN)。空なら表示しない
        budget_seconds: キーの走査に使う最大秒数。超えるとサンプルからの推定値 (誤差つき) になる
    """
    env = Environment.find(environment)
    with runbook("Check Redis memory", env) as report:
        server = judge_master(report, env.redis, read_sentinels(env.redis), changes=False)
        memory = read_memory(server)
        report.fact("server", f"{server.address}, {memory.role}, {memory.version}, up {duration(memory.up_seconds)}")
        judge_memory(report, memory)
        activity = read_activity(server)
        spent = 0.0
        if pattern:
            listing = find_first_keys(server, pattern, MANUAL_KEYS, budget_seconds * PATTERN_SHARE)
            tell_pattern(report, pattern, listing, MANUAL_KEYS)
            spent = listing.seconds
        survey = survey_keys(server, max(budget_seconds - spent, 0.0), memory.counts_hits)
        after = read_afterwards.after(survey)(server)
        judge_role(report, memory, after)
        judge_same_data(report, memory, after, survey)
        judge_policy(report, memory, survey, env.redis.protected_prefixes, after.evicted)
        judge_coverage(report, memory, survey, budget_seconds)
        judge_explained(report, (memory.dataset, after.dataset), survey)
        judge_without_expiry(report, survey, env.redis.drop_prefixes)
        tell_databases(report, survey)
        tell_prefixes(report, survey)
        tell_keys(report, survey)
        tell_activity(report, memory, survey, activity)
        judge_same_master(report, server.address, read_sentinels.after(survey)(env.redis))
        measured = sum((found.size for found in survey.databases), ZERO)
        held = about(measured, size(measured.value), size(measured.error))
        limit = f" of {size(memory.limit)}" if memory.limit else ", no limit set"
        report.outcome = f"{size(memory.used)} used{limit}; {memory.keys:,} keys hold {held}"
    return report


# Applications delete keys too. More than this part of all, and so many, went in another way.
MOST_MISSING_SHARE, MOST_MISSING = 0.1, 100


def judge_role(report: Report, memory: Memory, after: Afterwards) -> None:
    """A replica evicts and expires as its master does: what is judged here is the master's."""
    hint = "launch it in the environment of its master, or name the Sentinels in [redis]"
    report.prefer("role", memory.role == "master", hint, value=memory.role, expected="master")
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
