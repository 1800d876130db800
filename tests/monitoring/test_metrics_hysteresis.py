"""When a metric is exceeded and when it is well again: on thousands of sequences, against what the words mean."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta

import pytest

from tasks.monitoring.hysteresis import AlarmBounds, Timing, changes

BOUNDS, TIMING = AlarmBounds.below(10.0), Timing(samples=3, seconds=120, most_seconds=120)
NOON = datetime(2026, 2, 15, 12, tzinfo=UTC)
WELL, BETWEEN, OVER = 3.0, 9.5, 11.0
Values = list[tuple[datetime, float | None]]


def minutes(*values: float | None) -> Values:
    return [(NOON + timedelta(minutes=number), value) for number, value in enumerate(values)]


def drawn(seed: int, *, steps: bool) -> Values:
    """A day of a restless metric; with `steps` the clock is set now and then, back and forth, by up to a day."""
    chosen, at, values = random.Random(seed), NOON, Values()
    level: float | None = WELL
    for _ in range(120):
        if chosen.random() < 0.25:
            level = chosen.choice([WELL, WELL, BETWEEN, OVER, OVER, None])
        at += timedelta(seconds=chosen.choice([20, 60, 60, 60, 75, 3000]))
        if steps and chosen.random() < 0.1:
            at += timedelta(seconds=chosen.uniform(-86400, 86400))
        values.append((at, level))
    return values


def sides(values: Values) -> list[str]:
    return ["bad" if value is None or value > 10 else "well" if value <= 9 else "between" for _, value in values]


@pytest.mark.parametrize("steps", [False, True], ids=["a clock", "a clock that is set"])
def test_changes_alternate_and_each_has_a_whole_run_of_values_behind_it(steps: bool) -> None:
    seen = 0
    for seed in range(300):
        values = drawn(seed, steps=steps)
        found, side = changes(values, BOUNDS, TIMING), sides(values)
        assert [change for _, change in found] == list(
            itertools.islice(itertools.cycle(["exceeded", "recovered"]), len(found))
        )
        for position, change in found:
            wanted = "bad" if change == "exceeded" else "well"
            assert side[position - 2 : position + 1] == [wanted] * 3, f"seed {seed}: not three in a row"
            if not steps:
                first = next(n for n in range(position, -1, -1) if n == 0 or side[n - 1] != wanted)
                assert (values[position][0] - values[first][0]).total_seconds() >= 120, f"seed {seed}"
        seen += len(found)
    assert seen > 300, "the sequences do come to something"


@pytest.mark.parametrize("steps", [False, True], ids=["a clock", "a clock that is set"])
def test_what_stays_bad_is_told_and_what_stays_well_is_well_again(steps: bool) -> None:
    """However the clock is set meanwhile: no alarm is hidden for ever, none stays for ever."""
    for seed in range(100):
        before = drawn(seed, steps=steps)
        last = before[-1][0]
        for value, wanted in ((OVER, "exceeded"), (None, "exceeded"), (WELL, "recovered")):
            after = [(last + timedelta(minutes=number), value) for number in range(1, 8)]
            start = [(NOON, OVER), (NOON + timedelta(minutes=1), OVER), (NOON + timedelta(minutes=2), OVER)]
            found = changes([*start, *before, *after], BOUNDS, TIMING)
            assert found[-1][1] == wanted, f"seed {seed}"


def test_what_moves_between_the_limits_changes_nothing() -> None:
    assert changes(minutes(*[9.1, 9.9] * 50), BOUNDS, TIMING) == []
    assert changes(minutes(OVER, OVER, OVER, *[9.1, 11.0] * 50), BOUNDS, TIMING) == [(2, "exceeded")]


def test_what_flaps_is_no_alarm() -> None:
    assert changes(minutes(*[OVER, WELL] * 50), BOUNDS, TIMING) == []
    assert changes(minutes(*[OVER, OVER, WELL] * 50), BOUNDS, TIMING) == []


def test_three_values_within_a_moment_are_no_duration_and_two_far_apart_are_no_three() -> None:
    near = [(NOON + timedelta(seconds=number), OVER) for number in range(3)]
    assert changes(near, BOUNDS, TIMING) == []
    far = [(NOON + timedelta(hours=number), OVER) for number in range(2)]
    assert changes(far, BOUNDS, TIMING) == []


def test_nan_is_no_good_value() -> None:
    assert changes(minutes(*[float("nan")] * 3), BOUNDS, TIMING) == [(2, "exceeded")]


def test_a_limit_of_nothing_is_recovered_by_nothing() -> None:
    assert changes(minutes(1, 1, 1, 0, 0, 0), AlarmBounds.below(0), TIMING) == [(2, "exceeded"), (5, "recovered")]
