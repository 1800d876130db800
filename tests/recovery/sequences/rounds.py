"""Random sequences, one round of one, and the smallest part of it that still fails."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.recovery.sequences import (  # noqa: F401 - their steps
    accidents,
    administration,
    file_steps,
    recoveries,
    redis_steps,
)
from tests.recovery.sequences.checks import Broken
from tests.recovery.sequences.confirmation import Stuck
from tests.recovery.sequences.small_system import Variant
from tests.recovery.sequences.steps import NOT_POSSIBLE, STEPS
from tests.recovery.sequences.world import World

VARIANTS = (
    Variant(),
    Variant(standby=False),
    Variant(standby=False, other=True),
    Variant(standby=False, owner="postgres"),
    Variant(standby=True, other=True, owner="postgres"),
    Variant(standby=False, replica=True),
)
AFTER = {
    "crash-postgres": ("full-restore", "full-restore", "failover"),
    "comes-back": ("full-restore",),
    "remove-data": ("full-restore", "full-restore", "failover"),
    "remove-pg-wal": ("full-restore", "full-restore", "failover"),
    "starting": ("full-restore", "full-restore", "full-restore-cluster"),
    "standby-behind": ("failover", "failover", "full-restore"),
    "flush-redis": ("full-restore", "restore-redis"),
    "kill-redis": ("full-restore", "full-restore", "restore-redis", "full-restore-replica", "restore-redis-replica"),
    "remove-redis-data": ("full-restore", "restore-redis", "full-restore-replica", "restore-redis-replica"),
    "delete-files": ("full-restore", "restore-files"),
    "remove-files": ("full-restore", "restore-files"),
    "wrong-port": ("full-restore",),
}
"""What mends an accident; others are mended by any of the following."""
MEND_ROWS = (
    *("full-restore", "full-restore-dump", "full-restore-cluster", "restore-database"),
    *("restore-to-point", "restore-tables", "tables-to-point"),
)
HINTS = {"logical slot": "drop-slot", "prepared transaction": "end-prepared"}
UNDO = {
    "restore-database": "undo-restore",
    "restore-to-point": "undo-full-restore",
    "full-restore-cluster": "undo-full-restore",
    "restore-tables": "undo-restore-tables",
    "tables-to-point": "undo-restore-tables",
    "restore-redis": "undo-restore-redis",
    "restore-redis-replica": "undo-restore-redis",
    "full-restore-replica": "undo-restore-redis",
    "restore-files": "undo-restore-files",
}


@dataclass
class Round:
    """What one round came to. `failure`: the broken promise, with the reports."""

    seed: int
    variant: Variant
    words: Sequence[str]
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    stuck: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """One line."""
        end = "BROKEN" if self.failure else "refused" if self.stuck else "kept"
        return f"seed {self.seed:5} {end:8} {self.seconds:5.1f} s  {self.variant.name}: {' → '.join(self.notes)}"


def variant_of(seed: int) -> Variant:
    """The system of a seed: neighbours share one, since making it takes longer than a round."""
    return VARIANTS[seed // 10 % len(VARIANTS)]


def is_possible(name: str, variant: Variant) -> bool:
    """Whether a variant has what a step needs."""
    needed = STEPS[name].needs
    return not needed or bool(getattr(variant, needed))


def sequence_of(seed: int) -> list[str]:
    """The steps of a seed: some quiet ones, an accident or none, a recovery; twice or three times."""
    chance, variant = random.Random(seed), variant_of(seed)

    def pick(kind: str) -> str:
        steps = [one for one in STEPS.values() if one.kind == kind and is_possible(one.name, variant)]
        return chance.choices(steps, [one.weight for one in steps])[0].name

    names = list[str]()
    for _ in range(chance.randint(2, 3)):
        names += [pick("quiet") for _ in range(chance.randint(2, 5))]
        names.append("write")
        accident = pick("accident") if chance.random() < 0.75 else ""
        if accident:
            names.append(accident)
            if chance.random() < 0.25:
                names.append(pick("quiet"))
        recovery = pick("recovery")
        if allowed := [one for one in AFTER.get(accident, ()) if is_possible(one, variant)]:
            recovery = chance.choice(allowed)
        elif accident and recovery not in MEND_ROWS:
            recovery = "full-restore"
        names.append(recovery)
        if (undo := UNDO.get(recovery)) and chance.random() < 0.5:
            names += ["write", undo]
        if variant.standby and chance.random() < 0.5:
            names += ["rejoin-standby", *["backup-cluster"] * (chance.random() < 0.5)]
    return [f"{name}:{chance.randrange(1000)}" for name in names]


def play(world: World, seed: int, words: Sequence[str]) -> Round:
    """Play a sequence from the beginning."""
    done = Round(seed, world.variant, words)
    world.reset()
    began = time.monotonic()
    try:
        for word in words:
            name, _, number = word.partition(":")
            done.notes.append(word)
            try:
                note = STEPS[name].do(world, random.Random(int(number)))
            except Stuck as refused:
                done.stuck, note = str(refused), f"refused{_follow_hint(world, refused)}"
                if not world.is_writable:
                    break
            done.notes[-1] = f"{word}({note})" if note and note != NOT_POSSIBLE else f"{word}{note}"
    except Broken as broken:
        done.failure = str(broken)
    except AssertionError as wrong:
        done.failure = str(wrong) or traceback.format_exc()
    done.seconds = time.monotonic() - began
    return done


def _follow_hint(world: World, refused: Stuck) -> str:
    """Do what a refusal asks for, so that the next recovery need not be refused too."""
    for words, name in HINTS.items():
        if words in str(refused) and STEPS[name].do(world, random.Random(0)) != NOT_POSSIBLE:
            return f", {name}"
    return ""


def kind_of(failure: str) -> str:
    """What a failure is about, without its numbers: a shorter sequence must fail for the same reason."""
    first = failure.partition("\n")[0]
    return "".join(letter for letter in first if not letter.isdigit())[:50]


def shrink(world: World, failed: Round, most: int = 25) -> Round:
    """Drop steps as long as the rest fails for the same reason: first halves, then quarters, at last single ones. The
    last step is the one that fails, and stays."""
    best, tries = replace(failed, words=failed.words[: len(failed.notes)]), 0
    size = max(len(best.words) // 2, 1)
    while True:
        index = 0
        while index < len(best.words) - 1 and tries < most:
            end = min(index + size, len(best.words) - 1)
            tries += 1
            again = play(world, failed.seed, [*best.words[:index], *best.words[end:]])
            if again.failure and kind_of(again.failure) == kind_of(failed.failure):
                best = again
            else:
                index = end
        if size == 1 or tries >= most:
            return best
        size //= 2
