"""Tables and pictures of check-redis-memory: databases, prefixes, keys (§2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from runbook.page.plots import Bar, bars, shares
from runbook.report import Evidence, Report
from runbook.units import duration, size
from tasks.redis.content.reading import shown
from tasks.redis.memory.estimates import ZERO, PrefixSum, SizeEstimate
from tasks.redis.memory.listing import KeyListing
from tasks.redis.memory.script import TTL_NAMES, TYPES
from tasks.redis.memory.sweep import MEASURED_ELEMENTS, BigKey, Survey

MOST_ROWS = 30
MOST_BARS = 15
MOST_LETTERS = 100


def report_databases(report: Report, survey: Survey) -> None:
    """Keys and bytes of each database."""
    rows = [
        (
            f"db {found.database}",
            _keys(found.keys),
            _size(found.size),
            f"{found.persistent_keys:,.0f}",
            ", ".join(f"{name} {size(number)}" for name, number in _descending(found.sizes_by_type)),
            "all" if found.is_complete else f"{found.read / max(found.expected, 1):.0%}",
        )
        for found in survey.databases
    ]
    report.table("Databases", ("database", "keys", "bytes", "without expiry", "bytes by type", "read"), rows)


def report_prefixes(report: Report, survey: Survey) -> None:
    """The biggest prefixes by memory, with types, TTLs and keys without expiry; two pictures."""
    total = sum((found.size for found in survey.databases), ZERO)
    biggest = survey.prefixes[:MOST_ROWS]
    rows = [_prefix_row(found, total.value) for found in biggest]
    if rest := _others(survey, biggest):
        rows.append(rest)
    columns = ("database", "prefix", "keys", "bytes", "share", "bytes per key", "types")
    report.table("Biggest prefixes by memory", columns, rows)
    drawn = [Bar(_name(f), (f.size.value,), _size(f.size)) for f in survey.prefixes[:MOST_BARS]]
    report.attach(Evidence("Memory by prefix", svg=bars(drawn, "B")))
    _report_ttls(report, survey)
    found = sorted((f for f in survey.prefixes if f.persistent_keys), key=lambda f: -f.persistent_size)
    persistent = [
        (f"db {f.database}", _prefix(f.prefix), f"{f.persistent_keys:,.0f}", size(f.persistent_size)) for f in found
    ]
    report.table("Keys without expiry", ("database", "prefix", "keys", "bytes"), persistent, most=MOST_ROWS)


def _report_ttls(report: Report, survey: Survey) -> None:
    rows = [
        (f"db {found.database}", _prefix(found.prefix), *(_share(count, found.keys_read) for count in found.ttls))
        for found in survey.prefixes[:MOST_ROWS]
    ]
    report.table("TTL by prefix", ("database", "prefix", *TTL_NAMES), rows)
    lines = [Bar(_name(f), tuple(map(float, f.ttls)), f"{f.keys.value:,.0f} keys") for f in survey.prefixes[:MOST_BARS]]
    report.attach(Evidence("TTL distribution", svg=shares(lines, TTL_NAMES)))


def report_keys(report: Report, survey: Survey) -> None:
    """The biggest keys, in all and of each type."""
    columns = ("database", "key", "type", "bytes", "elements", "TTL")
    note = "" if survey.is_complete else " of those read"
    if survey.why_uncounted:
        why = f"not counted: it would change their idle times without CLIENT NO-TOUCH ({survey.why_uncounted})"
        report.fact("elements of the biggest keys", why)
    report.table(f"Biggest keys{note}", columns, [_key_row(key) for key in survey.biggest])
    report.table(f"Biggest keys of each type{note}", columns, [_key_row(key) for key in survey.biggest_by_type])


def report_pattern(report: Report, pattern: str, listing: KeyListing, most: int) -> None:
    """The first keys of a pattern, as the manual lists them."""
    rows = [
        (f"db {number}", key_name(facts.key), TYPES[facts.type], ttl(facts.ttl_ms), size(facts.size))
        for number, facts in listing.keys
    ]
    report.table(f"First {most} keys of {pattern}", ("database", "key", "type", "TTL", "bytes"), rows)
    if not listing.is_complete:
        value = f"{len(rows)} keys found in {duration(listing.seconds)}, a quarter of budget_seconds"
        report.warn(f"incomplete search for {pattern}", "raise budget_seconds", value=value, expected=f"{most}, or all")
    if listing.denied:
        hint = "permit the user to read all keys: ACL SETUSER <user> %R~*"
        report.warn(f"not measured of {pattern}", hint, value=f"{listing.denied} keys that the user may not read")


def about(estimate: SizeEstimate, text: str, error: str) -> str:
    """A total for people, with its error if it is an estimate."""
    if estimate.error == 0:
        return text
    return f"{text} ± {error}" if estimate.error == estimate.error else f"{text} ± unknown"


def ttl(milliseconds: int) -> str:
    """A TTL for people; −1: no expiry."""
    return "no expiry" if milliseconds < 0 else duration(milliseconds / 1000)


def key_name(key: bytes) -> str:
    """A key for people: unprintable bytes are escaped, a long key is cut."""
    text = shown(key[: 2 * MOST_LETTERS])
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}… ({len(key):,} bytes)"


def _key_row(key: BigKey) -> tuple[str, ...]:
    elements = f"{key.elements:,}" if key.elements >= 0 else ""
    guess = "" if key.is_exact else f"about (by its first {MEASURED_ELEMENTS:,} elements) "
    return f"db {key.database}", key_name(key.key), key.type, guess + size(key.size), elements, ttl(key.ttl_ms)


def _prefix_row(found: PrefixSum, total: float) -> tuple[str, ...]:
    each = size(found.size.value / found.keys.value) if found.keys.value else ""
    types = ", ".join(f"{name} {_share(count, found.keys_read)}" for name, count in _descending(found.types))
    share = _share(found.size.value, total)
    return f"db {found.database}", _prefix(found.prefix), _keys(found.keys), _size(found.size), share, each, types


def _others(survey: Survey, listed: Sequence[PrefixSum]) -> tuple[str, ...] | None:
    """All other prefixes in one row, including those that were dropped to bound this report's memory."""
    keys = sum(found.keys.value for found in survey.databases) - sum(found.keys.value for found in listed)
    number = len(survey.prefixes) - len(listed) + survey.dropped_prefixes
    if number <= 0:
        return None
    whole = sum(found.size.value for found in survey.databases)
    rest = max(whole - sum(found.size.value for found in listed), 0)
    at_least = "about " if survey.dropped_prefixes else ""
    name = f"others ({at_least}{number:,} prefixes)"
    return "", name, f"{max(keys, 0):,.0f}", size(rest), _share(rest, whole), "", ""


def _name(found: PrefixSum) -> str:
    return f"db {found.database} {_prefix(found.prefix)}"


def _prefix(prefix: bytes) -> str:
    return shown(prefix) if prefix else "(no colon)"


def _keys(estimate: SizeEstimate) -> str:
    return about(estimate, f"{estimate.value:,.0f}", f"{estimate.error:,.0f}")


def _size(estimate: SizeEstimate) -> str:
    return about(estimate, size(estimate.value), size(estimate.error))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _descending(counts: dict[str, int] | dict[str, float]) -> list[tuple[str, float]]:
    return sorted(counts.items(), key=lambda item: -item[1])
