"""What a recovery made of every part, compared with its plan and its report."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import psycopg

from lab.servers.postgres import DATABASE
from tests.recovery.sequences.checks import Found, check_losses, check_system, compare
from tests.recovery.sequences.confirmation import Carried, raise_broken
from tests.recovery.sequences.ledger import Content, Ledger, Write
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.promises import APART, FILES, REDIS
from tests.recovery.sequences.steps import TIMELINE, Mark
from tests.recovery.sequences.world import World

MENDS = {
    REDIS: ("full-restore", "restore-redis", "undo-restore-redis"),
    FILES: ("full-restore", "restore-files", "undo-restore-files"),
}
MEND_DATABASES = ("full-restore", "restore-database", "restore-to-point", "undo-restore", "undo-full-restore")
"""Who restores a part that was missing before."""


def settle(
    world: World,
    carried: Carried,
    *,
    back_to: dict[str, list[Write]] | None = None,
    more: list[str] | None = None,
) -> None:
    """Compare everything, and go on with the branches that are live now. `back_to`: the branches that were asked for.

    Raises:
        Broken: a promise was broken.
    """
    seen, ran = carried.seen, carried.ran
    problems, found, lost = list(more or ()), dict[str, Found](), dict[str, list[Write]]()
    for name, ledger in world.ledgers.items():
        wanted = back_to.get(name) if back_to else None
        content = ledger.store.read()
        if wanted is not None and content and content.attempts is not None:
            # A client went on writing on that branch until it was replaced, or since it is back.
            last = max((one.attempt for one in wanted), default=0)
            ids = [
                one for one in sorted(content.attempts) if one > last and one in set(ledger.known) - set(ledger.refused)
            ]
            wanted = [*wanted, *(replace(ledger.known[one]) for one in ids)]
        if name == DATABASE and content is not None:
            world.tokens.pop("dropped", None)
        if content is None and seen.content[name] is None and not _mends(world, carried, name):
            continue  # as it was found
        part = compare(ledger, ledger.copy() if wanted is None else wanted, content)
        found[name] = part
        lost[name] = part.lost if wanted is None else _given_up(ledger, wanted, content)
        problems += part.problems
        if wanted is not None and part.lost:
            problems.append(f"{name}: {len(part.lost)} writes of the branch that was asked for are missing")
        if wanted is None and part.abandoned:
            shown = [f"{one} {ledger.refused.get(one, '')}" for one in part.abandoned[:3]]
            problems.append(
                f"{name}: {len(part.abandoned)} writes of a branch that was left are there again: {'; '.join(shown)}"
            )
    problems += check_losses(lost, carried.plans, ran)
    problems += _check_accidents(found, ran)
    for name, part in found.items():
        world.ledgers[name].restart(part.branch)
    problems += check_system(world, seen, ran, carried.texts)
    raise_broken(world, problems, carried.log)
    world.tokens["marks"] = [one for one in world.tokens.get("marks", []) if _is_on(world, one)]


def _given_up(ledger: Ledger, wanted: list[Write], content: Content | None) -> list[Write]:
    """What the branch that is left had more than the one that was asked for. A part without a list of attempts may have
    been emptied on that one: that is what was asked for."""
    branch = ledger.copy()
    if content is None or content.attempts is not None:
        return compare(ledger, branch, content).lost
    last = max((one.attempt for one in wanted), default=0)
    return [one for one in branch if one.is_acknowledged and one.attempt > last]


def _mends(world: World, carried: Carried, name: str) -> bool:
    """Whether it is the recovery's task to restore a part; every database is a failover's where no server answers, but
    one that was dropped before."""
    flow, is_dropped = carried.ran.flow, name == DATABASE and world.tokens.get("dropped")
    brings_server = flow == "postgres-failover" and not carried.seen.is_writable and not is_dropped
    return flow in MENDS.get(name, MEND_DATABASES) or (name not in APART and brings_server)


def _check_accidents(found: dict[str, Found], ran: Ran) -> list[str]:
    """A table that an accident emptied, and that is empty still, is named."""
    problems = list[str]()
    for name, part in found.items():
        if part.branch and part.branch[-1].is_accident and name not in APART:
            words = ("without rows", "emptied", "TRUNCATE", "DELETE", "DROP TABLE", "missing", "→ 0 rows")
            if ran.flow == "full-restore" and not any(word in ran.text for word in words):
                problems.append(f"{name}: the accident is still there, and no word says so")
    return problems


def _is_on(world: World, mark: Mark) -> bool:
    """Whether the branches that are live have everything that a mark has, and its place in WAL."""
    if not _is_in_history(world, mark):
        return False
    for name, number in mark.at.items():
        ids = {write.attempt for write in world.ledgers[name].writes}
        if any(write.is_acknowledged and write.attempt < number for write in world.ledgers[name].writes) and (
            max(ids, default=0) < number - 1
        ):
            return False
    return True


_HISTORY = f"""
SELECT timeline, CASE WHEN timeline > 1
       THEN pg_read_file(format('pg_wal/%s.history', lpad(upper(to_hex(timeline)), 8, '0'))) ELSE '' END
FROM (SELECT {TIMELINE} AS timeline) now
"""


def _is_in_history(world: World, mark: Mark) -> bool:
    with contextlib.suppress(psycopg.Error):
        ((timeline, history),) = world.sql(_HISTORY)
        lines = [line.split() for line in history.splitlines() if line.strip()]
        ends = [min(_bytes(words[1]) for words in lines[index:]) for index in range(len(lines))]
        left = {int(words[0]): end for words, end in zip(lines, ends, strict=True)}  # as tasks.wal.format.names
        return timeline == mark.timeline or _bytes(mark.lsn) < left.get(mark.timeline, 0)
    return True


def _bytes(lsn: str) -> int:
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def newest_kept(path: Path) -> Path | None:
    """What a restore has put aside last."""
    return max(path.parent.glob(f"{path.name}.superseded_*"), default=None)
