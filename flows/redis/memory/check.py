"""Which keys use a Redis server's memory, and how close it is to its limit (§2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.redis.master import judge_master, judge_same_master
from flows.redis.memory.limits import CLEAR, judge_memory
from flows.redis.memory.tables import about, report_databases, report_keys, report_pattern, report_prefixes
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.redis.memory.estimates import ZERO
from tasks.redis.memory.info import Afterwards, Memory, read_afterwards, read_memory
from tasks.redis.memory.listing import find_first_keys
from tasks.redis.memory.sweep import Survey, survey_keys
from tasks.redis.sentinels import read_sentinels

MANUAL_KEYS = 100
# The pattern's share of the time limit.
PATTERN_SHARE = 0.25
LEAST_EXPIRING_SHARE = 0.1
# The keys' sum differs from the server's count by some percent: tables, and the guesses of MEMORY USAGE.
LEAST_REST_SHARE, LEAST_REST_BYTES = 0.1, 2_000_000
UNEXPLAINED, SAMPLE_UNEXPLAINED = "data that the keys do not explain", "data that the sample does not explain"
# Applications delete keys too. A larger share than this, and more than this number, is a finding.
MOST_MISSING_SHARE, MOST_MISSING = 0.1, 100


@flow(name="check-redis-memory", flow_run_name=RunName("check-redis-memory {environment} {pattern}"))
def check_redis_memory(
    environment: str, pattern: str = "", budget_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
) -> Report:
    """メモリ使用量監視: メモリ情報確認と可視化 (§2.1)

    Reports how close the master's memory is to its limit, what happens at the limit, and which keys use it: keys and
    bytes of each database, the biggest prefixes and keys by memory, types, TTLs, and keys that never expire. Run it
    daily, and first if writes are refused or the memory alarm fires.

    It reads all keys in pages of about 0.3 ms. After budget_seconds it stops; the totals are then estimates with their
    errors. It changes no data. The server caches its read-only script until the next start, and counts its reads in
    keyspace_hits and commandstats. The user needs +eval_ro and +evalsha_ro. Undo: nothing to undo. Evidence: the tables
    and two pictures.

    Departs from the manual: “biggest” means bytes (MEMORY USAGE), not elements. The biggest keys are measured exactly
    up to 50,000 elements, and data that no key explains is a finding. TTL −1 is shown as “no expiry”. The fragmentation
    ratio is judged only where it is meaningful. No process is started for each key. There is no hit rate: this report's
    own reads would be most of it.

    Args:
        environment: Environment (lab, staging, production …)
        pattern: Show the first 100 keys that match (e.g. session:*; bytes as \\xNN). Empty: show none
        budget_seconds: Longest scan of the keys, in seconds. Beyond it, the result is an estimate from a sample, with
            its error
    """
    env = Environment.find(environment)
    with runbook("Check Redis memory", env) as report:
        server = judge_master(report, env.redis, read_sentinels(env.redis), changes=False)
        memory = read_memory(server)
        report.fact("server", f"{server.address}, {memory.role}, {memory.version}, up {duration(memory.up_seconds)}")
        judge_memory(report, memory)
        spent = 0.0
        if pattern:
            listing = find_first_keys(server, pattern, MANUAL_KEYS, budget_seconds * PATTERN_SHARE)
            report_pattern(report, pattern, listing, MANUAL_KEYS)
            spent = listing.seconds
        survey = survey_keys(server, max(budget_seconds - spent, 0.0))
        after = read_afterwards.after(survey)(server)
        judge_same_data(report, memory, after, survey)
        judge_policy(report, memory, survey, env.redis.protected_prefixes, after.evicted)
        judge_coverage(report, survey, budget_seconds)
        judge_explained(report, (memory.dataset, after.dataset), survey)
        judge_without_expiry(report, survey, env.redis.drop_prefixes)
        report_databases(report, survey)
        report_prefixes(report, survey)
        report_keys(report, survey)
        judge_same_master(report, server.address, read_sentinels.after(survey)(env.redis))
        measured = sum((found.size for found in survey.databases), ZERO)
        keys = about(measured, size(measured.value), size(measured.error))
        limit = f" of {size(memory.limit)}" if memory.limit else ", no limit set"
        report.outcome = f"{size(memory.used)} used{limit}; {memory.keys:,} keys use {keys}"
    return report


def judge_same_data(report: Report, memory: Memory, after: Afterwards, survey: Survey) -> None:
    """The server kept its role and its keys during the report."""
    hint = "run it in the environment of its master, or name the Sentinels in [redis]: a replica does not evict"
    report.prefer("role", memory.role == "master", hint, value=memory.role, expected="master")
    if after.role != memory.role:
        hint = "run it again: the server became a master, or its data was replaced by its master's"
        report.warn("the role changed during this report", hint, value=after.role, expected=memory.role)
    if after.run_id != memory.run_id:
        report.warn(
            "the server was restarted during this report",
            "run it again: this report mixes the keys before and after the restart",
            value=f"{survey.read:,} keys read",
            expected=f"{memory.keys:,} keys at the beginning",
            follow=[Next("check-redis-persistence", "see which data a start loads")],
        )
    elif survey.is_complete and memory.role == after.role == "master":
        expired, evicted = max(after.expired - memory.expired, 0), max(after.evicted - memory.evicted, 0)
        seen = survey.read + sum(found.missing + found.denied for found in survey.databases)
        missing = max(memory.keys, survey.expected) - seen
        if missing - expired - evicted > max(MOST_MISSING_SHARE * memory.keys, MOST_MISSING):
            report.warn(
                "keys were deleted during this report",
                "find the client that deletes or flushes keys, then run it again: only the remaining keys are counted",
                value=f"{missing:,} of {memory.keys:,}; {expired:,} expired and {evicted:,} were evicted",
                expected="all keys read",
            )


def judge_policy(
    report: Report, memory: Memory, survey: Survey, protected_prefixes: Sequence[str], evicted_since: int
) -> None:
    """What the server does at its limit, and whether it evicted keys."""
    existing = {found.prefix for found in survey.prefixes}
    protected = [prefix for prefix in protected_prefixes if prefix.encode() in existing]
    share = memory.expiring_keys / memory.keys if memory.keys else 1.0
    ok, hint = True, ""
    if not memory.limit:
        effect = "no effect without maxmemory"
    elif memory.policy == "noeviction":
        effect = "writes are refused at the limit"
    elif memory.policy.startswith("volatile-"):
        effect, ok = f"{share:.0%} of the keys have a TTL and can be evicted", share >= LEAST_EXPIRING_SHARE
        hint = "set a TTL where keys are written: without evictable keys, writes are refused at the limit"
    else:
        effect, ok = "evicts any key", not protected
        hint = f"it evicts {', '.join(protected)} too: set maxmemory-policy volatile-lru, or use a separate server"
    report.prefer("eviction policy", ok, hint, value=f"{memory.policy}: {effect}", expected="fits the keys")
    now = max(evicted_since - memory.evicted, 0)
    report.prefer(
        "evicted keys",
        not evicted_since,
        "raise maxmemory, shorten TTLs or delete cached keys: the data does not fit",
        value=f"{evicted_since:,} since its start {duration(memory.up_seconds)} ago, {now:,} during this report",
        expected="0",
        follow=[CLEAR],
    )


def judge_coverage(report: Report, survey: Survey, budget_seconds: float) -> None:
    """Whether all keys were read."""
    read = f"{survey.read:,} of {survey.expected:,} keys"
    longest = f"the longest took {survey.longest_worked_seconds * 1000:.1f} ms of the server's processor"
    report.fact("sweep", f"{read} in {duration(survey.seconds)}, {survey.pages:,} pages; {longest}")
    if not survey.is_complete:
        wanted = max(survey.seconds / max(survey.read, 1) * survey.expected * 1.5, budget_seconds + 1)
        report.warn(
            "a sample, not all keys",
            "raise budget_seconds to read all keys. Totals are estimates: ± is a 95 % confidence interval, without the "
            "big keys that were not read",
            value=f"{read} were read in {budget_seconds:g} s",
            expected="all keys",
            follow=[Next("check-redis-memory", "read all keys", {"budget_seconds": round(wanted)})],
        )
    if denied := sum(found.denied for found in survey.databases):
        hint = "permit the user to read all keys: ACL SETUSER <user> %R~*"
        report.warn("not measured", hint, value=f"{denied:,} keys that the user may not read", expected="0")


def judge_explained(report: Report, dataset: tuple[int, int], survey: Survey) -> None:
    """The keys' sum equals the server's own count of its data, before or after the sweep. They differ if MEMORY USAGE
    guessed a collection wrong, or if a big key is outside the sample."""
    measured = sum((found.size for found in survey.databases), ZERO)
    least, most = min(dataset), max(dataset)
    rest, excess = least - measured.value, measured.value - most
    limit = f"{LEAST_REST_SHARE:.0%}"
    if rest > max(measured.error, LEAST_REST_SHARE * least, LEAST_REST_BYTES):
        report.warn(
            UNEXPLAINED if survey.is_complete else SAMPLE_UNEXPLAINED,
            "measure the biggest collections with MEMORY USAGE key SAMPLES 0: some are larger than estimated"
            if survey.is_complete
            else "raise budget_seconds: probably some big keys were not read",
            value=f"{size(rest)} of the {size(least)} that the server counts; the keys use {size(measured.value)}",
            expected=f"less than {limit}",
        )
    elif excess > max(measured.error, LEAST_REST_SHARE * most, LEAST_REST_BYTES):
        report.warn(
            "the keys' sum is more than the server counts",
            "measure the biggest collections with MEMORY USAGE key SAMPLES 0: some are smaller than estimated",
            value=f"{size(measured.value)}, {size(excess)} more than the server's {size(most)}",
            expected=f"at most {limit} more",
        )


def judge_without_expiry(report: Report, survey: Survey, transient: Sequence[str]) -> None:
    """Keys without a TTL are a finding only under prefixes that the application creates again (`transient`)."""
    keys = sum(found.persistent_keys for found in survey.databases)
    total = sum(found.keys.value for found in survey.databases)
    report.fact("keys without expiry", f"{keys:,.0f} of {total:,.0f}" + (f" ({keys / total:.1%})" if total else ""))
    for prefix in transient:
        wrong = [found for found in survey.prefixes if found.prefix == prefix.encode() and found.persistent_keys]
        count, used = sum(found.persistent_keys for found in wrong), sum(found.persistent_size for found in wrong)
        wanted = {"prefixes": [prefix], "only_without_ttl": True}
        report.prefer(
            f"{prefix} keys expire",
            not wrong,
            "set a TTL where they are written",
            value=f"{count:,.0f} never expire, {size(used)}",
            expected="0",
            follow=[Next("clear-cache", "delete those that never expire", wanted)],
        )
