"""What check-redis-memory says of a server's memory and limits (§2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from runbook import metrics
from runbook.report import Report
from runbook.units import duration, size
from tasks.redis.content.reading import shown
from tasks.redis.memory.estimates import ZERO, Estimate
from tasks.redis.memory.info import Activity, Memory
from tasks.redis.memory.sweep import Survey

# Below this the ratio compares the program's own pages with nearly nothing (https://valkey.io/topics/memory-optimization/).
LEAST_FRAGMENTABLE = 100_000_000
MOST_FRAGMENTATION = 1.5
LEAST_EXPIRING_SHARE = 0.1
# Of the server's data: tables and rounding make a sample's sum differ by some percent from the server's own count.
LEAST_REST_SHARE, LEAST_REST_BYTES = 0.1, 2_000_000
UNEXPLAINED, SAMPLE_UNEXPLAINED = "data that the keys do not explain", "data that the sample does not explain"
RAISE = "apply-redis-settings with override=“maxmemory …gb” for a time, its configuration file for good"
FREE = f"clear-cache for what is made anew, or raise it: {RAISE}"


def judge_memory(report: Report, memory: Memory) -> None:
    """Used memory against its limit, or the host's where there is none; fragmentation; swap."""
    if memory.limit:
        used = memory.used - memory.not_counted
        of = f"{size(used)} of maxmemory {size(memory.limit)}"
        report.judge(metrics.REDIS_MEMORY, used / memory.limit, FREE, of=of)
    else:
        report.warn(
            "maxmemory is 0",
            f"only the host bounds it, by killing it: {RAISE} (three quarters of the host's memory leave room for a "
            "BGSAVE)",
            value=f"{size(memory.used)} used",
            expected="a limit",
        )
    if memory.limit > memory.host:
        hint = "lower it: apply-redis-settings with override=“maxmemory …gb”, three quarters of the host's at most"
        report.warn("maxmemory is more than the host has", hint, value=size(memory.limit), expected=size(memory.host))
    if not 0 < memory.limit <= memory.host:
        of = f"{size(memory.resident)} resident of the host's {size(memory.host)}"
        hint = "clear-cache for what is made anew, or give the host more memory"
        report.judge(metrics.REDIS_HOST_MEMORY, memory.resident / memory.host, hint, of=of)
    _judge_fragmentation(report, memory)
    report.table("Memory", ("", "value"), _memory_rows(memory))


def _judge_fragmentation(report: Report, memory: Memory) -> None:
    """The ratio is resident ÷ used: it tells of fragmentation only where all of much is resident."""
    told = f"ratio {memory.fragmentation:.2f}, allocator {memory.allocator_fragmentation:.2f}"
    if memory.swapped > 0 or (memory.fragmentation < 1 and memory.used >= LEAST_FRAGMENTABLE):
        what = size(memory.swapped) if memory.swapped > 0 else f"at most {size(memory.used - memory.resident)}"
        hint = "free memory on the host: every access to a swapped page waits for the disk (the ratio tells nothing)"
        report.warn("memory is swapped out", hint, value=f"{what} ({told})", expected="none")
        return
    if memory.used < LEAST_FRAGMENTABLE:
        report.fact("fragmentation", f"{told}: tells nothing below {size(LEAST_FRAGMENTABLE)}")
        return
    report.prefer(
        "fragmentation",
        memory.fragmentation <= MOST_FRAGMENTATION,
        "CONFIG SET activedefrag yes, where the server has it; else MEMORY PURGE, or a failover and a restart",
        value=f"{told}, {size(memory.fragmentation_bytes)}",
        expected=f"≤ {MOST_FRAGMENTATION}",
    )


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    swapped = size(memory.swapped) if memory.swapped >= 0 else "not measured (the server is on another host)"
    return [
        ("used", size(memory.used)),
        ("peak", size(memory.peak)),
        ("resident", size(memory.resident)),
        ("swapped out", swapped),
        ("data", size(memory.dataset)),
        ("overhead (tables, buffers, the program)", size(memory.overhead)),
        ("of it clients' buffers", size(memory.client_buffers)),
        ("of it replicas' buffers", size(memory.replica_buffers)),
        ("scripts", size(memory.scripts)),
        ("maxmemory", size(memory.limit) if memory.limit else "0 (none)"),
        ("maxmemory-policy", memory.policy),
        ("host", size(memory.host)),
        ("expired keys since its start", f"{memory.expired:,}"),
        ("evicted keys since its start", f"{memory.evicted:,}"),
    ]


def judge_policy(
    report: Report, memory: Memory, survey: Survey, protected_prefixes: Sequence[str], evicted_since: int
) -> None:
    """What happens at the limit, and whether it happens."""
    there = {found.prefix for found in survey.prefixes}
    protected = [prefix for prefix in protected_prefixes if prefix.encode() in there]
    share = memory.expiring_keys / memory.keys if memory.keys else 1.0
    ok, hint = True, ""
    if not memory.limit:
        told = f"{memory.policy}: does nothing without a maxmemory"
    elif memory.policy == "noeviction":
        told = "noeviction: writes are refused at the limit"
    elif memory.policy.startswith("volatile-"):
        told, ok = (
            f"{memory.policy}: {share:.0%} of the keys have a TTL and can be evicted",
            share >= LEAST_EXPIRING_SHARE,
        )
        hint = "with so few of them writes are refused at the limit: give keys a TTL where they are written"
    else:
        told, ok = f"{memory.policy}: evicts any key", not protected
        hint = (
            f"it evicts {', '.join(protected)} too: CONFIG SET maxmemory-policy volatile-lru, or a server of their own"
        )
    report.prefer("eviction policy", ok, hint, value=told, expected="fits the keys")
    now = max(evicted_since - memory.evicted, 0)
    report.prefer(
        "evicted keys",
        not evicted_since,
        "the data does not fit: raise maxmemory, shorten TTLs, or clear-cache",
        value=f"{evicted_since:,} since its start {duration(memory.up_seconds)} ago, {now:,} during this report",
        expected="0",
    )


def judge_coverage(report: Report, memory: Memory, survey: Survey, budget_seconds: float) -> None:
    """Whether all keys were read; a sample says that it is one."""
    read = f"{survey.read:,} of {survey.expected:,} keys"
    worked = f", {survey.longest_worked_seconds * 1000:.1f} ms of the server's processor" if not survey.why_slow else ""
    longest = f"the longest took {survey.longest_seconds * 1000:.1f} ms there and back{worked}"
    report.fact("sweep", f"{read} in {duration(survey.seconds)}, {survey.pages:,} pages; {longest}")
    if survey.why_slow:
        report.fact("sweep without a script", f"slower, because: {survey.why_slow}")
    if not survey.is_complete:
        wanted = survey.seconds / max(survey.read, 1) * survey.expected * 1.5
        report.warn(
            "a sample, not all keys",
            f"numbers of keys and bytes are estimates (± is a 95 % confidence interval; a big key that was not read is "
            f"in none); for all: budget_seconds={max(wanted, budget_seconds + 1):.0f}",
            value=f"{read} were read when the {budget_seconds:g} s were over",
            expected="all keys",
        )
    if denied := sum(found.denied for found in survey.databases):
        hint = "give the user all keys: ACL SETUSER <user> %R~*"
        report.warn("not measured", hint, value=f"{denied:,} keys that the user may not read", expected="0")
    if survey.slow_calls < 0:
        report.fact("this report's own calls in the slow log", "not measured: this user may not read it (SLOWLOG GET)")
    elif survey.slow_calls > 0:
        report.warn(
            "this report's own calls in the slow log",
            "look at SLOWLOG GET: the host is overloaded, or a type of a module is slow to measure",
            value=survey.slow_calls,
            expected="0",
        )


def judge_explained(report: Report, dataset: tuple[int, int], survey: Survey) -> None:
    """Whether the keys' sum is the server's own count of its data, before and after the sweep: MEMORY USAGE guesses a
    collection by its first elements, and a big key that no page has seen is in no estimate."""
    told = sum((found.size for found in survey.databases), ZERO)
    least, most = min(dataset), max(dataset)
    rest, excess = least - told.value, told.value - most
    bound = max(told.error, LEAST_REST_SHARE * least, LEAST_REST_BYTES)
    if rest > bound:
        report.warn(
            UNEXPLAINED if survey.is_complete else SAMPLE_UNEXPLAINED,
            "the bytes of some prefixes are too low: measure their biggest collections with MEMORY USAGE key SAMPLES 0"
            if survey.is_complete
            else "big keys that were not read, most likely: launch it with more budget_seconds",
            value=f"{size(rest)} of the {size(least)} that the server counts; the keys hold {size(told.value)}",
            expected=f"less than {LEAST_REST_SHARE:.0%}",
        )
    elif excess > max(told.error, LEAST_REST_SHARE * most, LEAST_REST_BYTES):
        report.warn(
            "the keys' sum is more than the server counts",
            "the bytes of some prefixes are too high: MEMORY USAGE key SAMPLES 0 measures their biggest collections",
            value=f"{size(told.value)}, {size(excess)} more than the server's {size(most)}",
            expected=f"at most {LEAST_REST_SHARE:.0%} more",
        )


def judge_without_expiry(report: Report, survey: Survey, transient: Sequence[str]) -> None:
    """Keys that nothing but a client removes. Wrong in itself only where they are made anew anyway."""
    keys = sum(found.persistent_keys for found in survey.databases)
    total = sum(found.keys.value for found in survey.databases)
    report.fact("keys without expiry", f"{keys:,.0f} of {total:,.0f}" + (f" ({keys / total:.1%})" if total else ""))
    for prefix in transient:
        wrong = [found for found in survey.prefixes if found.prefix == prefix.encode() and found.persistent_keys]
        report.prefer(
            f"{prefix} keys expire",
            not wrong,
            f"set a TTL where they are written; clear-cache removes those of {prefix} that never expire",
            value=f"{sum(found.persistent_keys for found in wrong):,.0f} never do, "
            f"{size(sum(found.persistent_size for found in wrong))}",
            expected="0",
        )


def tell_activity(report: Report, memory: Memory, survey: Survey, activity: Activity) -> None:
    """Hot spots: keys, commands, latency events."""
    if not memory.counts_hits:
        needs = "volatile-lfu" if memory.policy.startswith("volatile-") else "allkeys-lfu"
        report.fact("hot keys", f"not available: needs maxmemory-policy {needs} (it is {memory.policy})")
    else:
        rows = [(f"db {key.database}", shown(key.key)[:100], key.hits) for key in survey.hot]
        report.table("Hot keys (LFU counter, 0 to 255, logarithmic)", ("database", "key", "counter"), rows)
    rows_of_commands = [
        (command.name, f"{command.calls:,}", duration(command.seconds), f"{command.microseconds_per_call:.1f}")
        for command in activity.commands
    ]
    columns = ("command", "calls", "time", "µs per call")
    report.table("Busiest commands since its start (a script's time includes its calls')", columns, rows_of_commands)
    if activity.problem:
        report.fact("latency events", activity.problem)
    else:
        events = [
            (event.name, f"{event.last:%Y-%m-%d %H:%M:%S}", event.last_ms, event.longest_ms)
            for event in activity.events
        ]
        report.table("Latency events", ("event", "last (UTC)", "last, ms", "longest, ms"), events)


def about(estimate: Estimate, text: str, error: str) -> str:
    """A total for people, with its error where it is an estimate."""
    if estimate.error == 0:
        return text
    return f"{text} ± {error}" if estimate.error == estimate.error else f"{text} ± unknown"
