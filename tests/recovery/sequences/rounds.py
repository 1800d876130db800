"""Random sequences, one round of one, and the smallest part of it that still fails."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.recovery.sequences import recoveries  # noqa: F401 - its steps
from tests.recovery.sequences.checks import Broken
from tests.recovery.sequences.recoveries import Stuck
from tests.recovery.sequences.steps import NOT_POSSIBLE, STEPS
from tests.recovery.sequences.world import Variant, World

VARIANTS = (
    Variant(),
    Variant(standby=False),
    Variant(standby=False, other=True),
    Variant(standby=False, owner="postgres"),
    Variant(standby=True, other=True, owner="postgres"),
)
AFTER = {
    "crash-postgres": ("full-restore", "full-restore", "failover"),
    "comes-back": ("full-restore",),
    "remove-data": ("full-restore", "full-restore", "failover"),
    "remove-pg-wal": ("full-restore", "full-restore", "failover"),
    "flush-redis": ("full-restore",),
    "remove-redis-data": ("full-restore",),
    "wrong-port": ("full-restore",),
}
"""What mends an accident; others are mended by any recovery."""


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


def sequence_of(seed: int) -> list[str]:
    """The steps of a seed: some quiet ones, an accident or none, a recovery; twice or three times."""
    chance = random.Random(seed)

    def pick(kind: str) -> str:
        steps = [one for one in STEPS.values() if one.kind == kind]
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
        if allowed := AFTER.get(accident):
            recovery = chance.choice(allowed)
        elif accident and recovery in ("failover", "undo-restore", "undo-full-restore", "restore-unrelated"):
            recovery = "full-restore"
        names.append(recovery)
        if chance.random() < 0.5:
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
                done.stuck, note = str(refused), "refused"
                if not any(map(world.takes_writes, world.roles)):
                    break
            done.notes[-1] = f"{word}({note})" if note and note != NOT_POSSIBLE else f"{word}{note}"
    except Broken as broken:
        done.failure = str(broken)
    except AssertionError as wrong:
        done.failure = str(wrong) or traceback.format_exc()
    done.seconds = time.monotonic() - began
    return done


def kind_of(failure: str) -> str:
    """What a failure is about, without its numbers: a shorter sequence must fail for the same reason."""
    first = failure.partition("\n")[0]
    return "".join(letter for letter in first if not letter.isdigit())[:50]


def shrink(world: World, failed: Round, most: int = 40) -> Round:
    """Drop steps as long as the rest fails for the same reason."""
    best, tries, index = failed, 0, 0
    while index < len(best.words) and tries < most:
        words = [*best.words[:index], *best.words[index + 1 :]]
        tries += 1
        again = play(world, failed.seed, words)
        if again.failure and kind_of(again.failure) == kind_of(failed.failure):
            best = again
        else:
            index += 1
    return best
