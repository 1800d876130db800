"""Estimates of a recovery's time from past ones: a pure function."""

from __future__ import annotations

import random

import pytest

from tasks.recovery_points.estimate import DurationSample, estimate

GB = 1_000_000_000


def seconds(samples: list[DurationSample], bytes_: int) -> float:
    found = estimate(samples, bytes_)
    assert found
    return found.seconds


def test_nothing_measured_is_no_estimate() -> None:
    assert estimate([], GB) is None
    assert estimate([DurationSample(GB, 0.0)], GB) is None


def test_a_fixed_part_and_one_for_each_byte() -> None:
    samples = [DurationSample(size, 8 + size / 50e6) for size in (GB // 10, GB // 2, GB)]
    assert seconds(samples, 10 * GB) == pytest.approx(208)
    assert seconds(samples, GB // 20) == pytest.approx(9)


@pytest.mark.parametrize("wanted", [GB, 10 * GB])
def test_measured_with_noise_it_is_within_a_quarter_at_one_and_at_ten_gigabytes(wanted: int) -> None:
    for seed in range(200):
        chance = random.Random(seed)
        sizes = [chance.uniform(0.3, 2) * wanted for _ in range(8)]
        samples = [DurationSample(int(size), (10 + size / 80e6) * chance.uniform(0.9, 1.1)) for size in sizes]
        assert seconds(samples, wanted) == pytest.approx(10 + wanted / 80e6, rel=0.25), f"seed {seed}"


def test_one_that_was_disturbed_changes_nothing_much() -> None:
    samples = [DurationSample(size * GB, 10 + 20 * size) for size in range(1, 6)]
    disturbed = [*samples[:2], DurationSample(3 * GB, 2000), *samples[3:]]
    assert seconds(disturbed, 6 * GB) == pytest.approx(130, rel=0.1)


@pytest.mark.parametrize("power", [1.0, 1.1, 1.2])
def test_from_a_tenth_and_three_tenths_it_is_within_a_quarter_although_the_first_run_found_cold_caches(
    power: float,
) -> None:
    """Restores of whole databases: the more rows, the longer each index takes."""

    def truth(part: float) -> float:
        return 3 + 22 * part**power

    samples = [
        DurationSample(int(part * GB), truth(part) * disturbed)
        for part, disturbed in ((0.1, 2.1), (0.1, 1.02), (0.1, 1.0), (0.3, 1.0), (0.3, 1.3), (0.3, 1.25))
    ]
    assert seconds(samples, GB) == pytest.approx(truth(1), rel=0.25)


def test_of_one_size_it_goes_with_the_bytes_and_is_never_less() -> None:
    samples = [DurationSample(GB, 30), DurationSample(GB, 34), DurationSample(GB + 1000, 32), DurationSample(GB, 32)]
    assert seconds(samples, GB) == pytest.approx(32)
    assert seconds(samples, 3 * GB) == pytest.approx(96, rel=0.01)
    assert seconds(samples, GB // 100) == pytest.approx(32)


def test_what_does_not_go_by_bytes() -> None:
    assert seconds([DurationSample(0, 9), *[DurationSample(0, 10)] * 2, DurationSample(0, 11)], 0) == 10


def test_more_bytes_in_less_time_is_never_a_negative_time() -> None:
    assert seconds([DurationSample(GB, 50), DurationSample(10 * GB, 40)], 100 * GB) > 0
    assert seconds([DurationSample(GB, 1), DurationSample(2 * GB, 50)], 1000) > 0


def test_the_last_ones_count() -> None:
    old, new = [DurationSample(GB, 500)] * 30, [DurationSample(GB, 20)] * 20
    assert seconds([*old, *new], GB) == 20
