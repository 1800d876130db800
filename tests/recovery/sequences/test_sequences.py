"""Random sequences of writes, backups, accidents, crashes and recoveries: each keeps its word, by a client's ledger.

`python -m tests.recovery.sequences --seed N` plays one of them. A failure prints the smallest sequence that still fails.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator

import pytest

from lab.servers.postgres import DATABASE
from tests.recovery.sequences import promises
from tests.recovery.sequences.checks import Broken, compare, see
from tests.recovery.sequences.confirmation import Carried, carry_out
from tests.recovery.sequences.ledger import Content, Ledger, Outcome, Write
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.rounds import VARIANTS, play, sequence_of, shrink, variant_of
from tests.recovery.sequences.settlement import settle
from tests.recovery.sequences.small_system import REPLICA, Variant
from tests.recovery.sequences.steps import NOT_POSSIBLE, STEPS
from tests.recovery.sequences.world import World, running_world

SEEDS = range(1, 301)
FIXED = (127, 245, 10, 190, 204, 260, 211, 283, 176, 298)
"""In CI: of every kind of system, with the rare steps among them."""


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One system for the rounds of its kind: each round begins from its cold copy."""
    with running_world(request.param) as running:
        yield running


def rounds(seeds: Iterator[int] | range | tuple[int, ...]) -> list[object]:
    """A case for each seed, with its system; neighbours share one."""
    ordered = sorted(seeds, key=lambda seed: (VARIANTS.index(variant_of(seed)), seed))
    return [pytest.param(variant_of(seed), seed, id=str(seed)) for seed in ordered]


def keep_their_word(world: World, seed: int) -> None:
    done = play(world, seed, sequence_of(seed))
    if done.failure:
        smallest = shrink(world, done, most=15)
        pytest.fail(f'{smallest.line}\n--seed {seed} --steps "{" ".join(smallest.words)}"\n{smallest.failure}')


@pytest.mark.parametrize(("world", "seed"), rounds(FIXED), indirect=["world"])
def test_ten_sequences_keep_their_word(world: World, seed: int) -> None:
    keep_their_word(world, seed)


@pytest.mark.parametrize(("world", "seed"), rounds(SEEDS), indirect=["world"])
def test_sequences_keep_their_word(world: World, seed: int) -> None:
    keep_their_word(world, seed)


@pytest.mark.parametrize("world", [Variant(standby=False)], indirect=True)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM kv WHERE attempt = {last}; DELETE FROM attempts WHERE attempt = {last}", "1 acknowledged writes"),
        ("DELETE FROM kv WHERE attempt = {last}", "keys differ"),
        ("UPDATE kv SET value = 'x' WHERE attempt = {last}", "not the client's"),
        ("INSERT INTO attempts VALUES (987654321)", "was never sent"),
        ("ALTER SYSTEM SET work_mem = '9MB'; SELECT pg_reload_conf()", "work_mem"),
    ],
    ids=["a write lost", "a row lost", "a row changed", "a row of nobody", "a setting"],
)
def test_a_recovery_that_breaks_its_word_is_found(world: World, damage: str, said: str) -> None:
    """A run that reports that nothing is lost, and something was changed behind its back."""
    world.reset()
    world.tokens["settings"] = {"work_mem": "4MB"}
    last = next(one for one in reversed(world.database.writes) if one.is_acknowledged and not one.deletes)
    seen = see(world)
    for statement in damage.format(last=last.attempt).split("; "):
        world.sql(statement, DATABASE)
    told = Ran("full-restore", "OK", effect="grc_db goes back; nothing is lost", lost="", started=seen.at)
    with pytest.raises(AssertionError, match=said):
        settle(world, Carried(seen, told, told))


@pytest.mark.parametrize("world", [Variant(standby=False)], indirect=True)
def test_a_stopped_service_and_a_hanging_commit_are_found(world: World) -> None:
    world.reset()
    seen = see(world)
    told = Ran("full-restore", "OK", effect="grc_db goes back; nothing is lost", lost="", started=seen.at)
    settle(world, Carried(seen, told, told))
    world.system.crash("receiver")  # commits wait for it
    with pytest.raises(Broken, match=r"stopped, although they ran before: receiver.*no write is acknowledged"):
        settle(world, Carried(seen, told, told))


@pytest.mark.parametrize("world", [Variant(standby=False, replica=True)], indirect=True)
def test_a_changed_file_slot_setting_and_replica_are_found(world: World) -> None:
    """Everything of a client that is no row."""
    world.reset()
    assert STEPS["logical-slot"].do(world, random.Random(1)) == "created"
    seen = see(world)
    told = Ran("full-restore", "OK", effect="grc_db goes back; nothing is lost", lost="", started=seen.at)
    settle(world, Carried(seen, told, told))
    next(world.uploads.iterdir()).unlink()
    world.sql("SELECT pg_drop_replication_slot('client_slot')")
    world.redis().config_set("appendonly", "no")
    world.redis(REPLICA).replicaof("NO", "ONE")
    with pytest.raises(Broken) as broken:
        settle(world, Carried(seen, told, told))
    for said in ("the files", "client_slot has vanished", "appendonly went from “yes” to “no”", "does not follow"):
        assert said in str(broken.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("world", [Variant(standby=False)], indirect=True)
def test_a_run_that_a_signal_ends_is_run_again(world: World, number: signal.Signals) -> None:
    world.reset()
    assert STEPS["drop-table"].do(world, random.Random(1)) != NOT_POSSIBLE
    world.tokens["interrupt"] = number, 1.0
    carried = carry_out(world, random.Random(1), "full-restore")
    settle(world, carried)
    plan, ended = carried.before
    assert (plan.status, ended.is_done, carried.ran.is_done) == ("PLANNED", False, True)


@pytest.mark.parametrize("world", [Variant(standby=False)], indirect=True)
def test_a_plan_for_a_dead_server_that_came_back_is_made_again(world: World) -> None:
    """The confirmed run is refused, since another server runs now than in the plan; its new plan is carried out."""
    world.reset()
    world.system.crash("postgres")
    world.tokens["starts"] = "postgres", 0.0
    started = world.launch("full-restore").started
    settle(world, carry_out(world, random.Random(1), "full-restore"))
    assert started < world.sql("SELECT extract(epoch FROM pg_postmaster_start_time())")[0][0]


class Nowhere:
    """A store of which a test gives the content."""

    name = "app"

    def send(self, write: Write) -> Outcome:
        return "acknowledged"

    def read(self) -> Content | None:
        return None


def ledger_of(*outcomes: Outcome, accident: int = 0) -> Ledger:
    """Attempts 1, 2 … each of a key of its own; `accident`: the number of the one that empties the table."""
    ledger = Ledger(Nowhere())
    for number, outcome in enumerate(outcomes, 1):
        write = ledger.note(None if number == accident else number)
        write.outcome = outcome
    return ledger


def test_an_indeterminate_write_may_be_there_or_not() -> None:
    ledger = ledger_of("acknowledged", "indeterminate", "acknowledged")
    for present in ({1, 3}, {1, 2, 3}):
        found = compare(ledger, ledger.writes, Content({one: one for one in present}, frozenset(present)))
        assert (found.lost, found.problems) == ([], [])
    found = compare(ledger, ledger.writes, Content({1: 1, 2: 2}, frozenset({1, 2})))
    assert [one.attempt for one in found.lost] == [3]


def test_a_write_of_a_branch_that_was_left_is_abandoned() -> None:
    ledger = ledger_of("acknowledged", "acknowledged")
    found = compare(ledger, ledger.writes[:1], Content({1: 1, 2: 2}, frozenset({1, 2})))
    assert found.abandoned == [2]


def test_an_accident_is_undone_or_not_but_never_half() -> None:
    ledger = ledger_of("acknowledged", "acknowledged", "acknowledged", accident=3)
    undone = compare(ledger, ledger.writes, Content({1: 1, 2: 2}, frozenset({1, 2})))
    there = compare(ledger, ledger.writes, Content({}, frozenset({1, 2})))
    half = compare(ledger, ledger.writes, Content({1: 1}, frozenset({1, 2})))
    assert [bool(one.problems) for one in (undone, there, half)] == [False, False, True]
    assert [one.branch[-1].is_accident for one in (undone, there)] == [False, True]


def plan(lost: str) -> Ran:
    return Ran("full-restore", "PLANNED", effect=f"app goes back; {lost}; no downtime", lost=lost, started=1000.0)


def writes(*answered: float) -> list[Write]:
    return [Write(number, number, False, outcome="acknowledged", answered=at) for number, at in enumerate(answered)]


@pytest.mark.parametrize(
    ("lost", "within", "beyond"),
    [
        ("", writes(), writes(999)),
        ("nothing is lost", writes(), writes(999)),
        ("3 commits after the statement are given up", writes(1, 2, 3), writes(1, 2, 3, 4)),
        ("2 commits of app are lost (14:02 to 14:03)", writes(1, 2), writes(1, 2, 3)),
        ("writes of the last 60 s are lost", writes(950, 999), writes(900)),
        ("the loss of app is unknown, because nothing answers", writes(1), None),
    ],
)
def test_what_a_headline_allows(lost: str, within: list[Write], beyond: list[Write] | None) -> None:
    allowed = promises.widest(promises.of_plan(plan(lost)), "app")
    assert not allowed.refuses(within)
    if beyond is not None:
        assert allowed.refuses(beyond)


def test_a_sequence_is_its_seed() -> None:
    assert [sequence_of(seed) for seed in SEEDS[:20]] == [sequence_of(seed) for seed in SEEDS[:20]]
    names = {word.partition(":")[0] for word in itertools.chain.from_iterable(map(sequence_of, SEEDS))}
    assert {"restore-files", "restore-redis-replica", "logical-slot", "starting", "standby-behind", "kill-run"} <= names
    assert {"full-restore", "failover", "undo-restore", "drop-database", "comes-back", "tablespace"} <= names
