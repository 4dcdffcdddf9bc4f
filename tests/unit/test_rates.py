import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from app.ingestion.rates import counted, rate_anomalies


def times(days: Sequence[int]) -> np.ndarray:
    """Noon of some days, as many conversations as each number says, from a Monday on."""
    start = datetime(2025, 1, 6, 12)
    return np.array(
        [start + timedelta(days=day) for day, count in enumerate(days) for _ in range(count)], dtype="datetime64[us]"
    )


def test_a_burst_and_a_gap_are_found_on_their_days() -> None:
    draw = random.Random(1)
    days = [draw.randrange(90, 110) for _ in range(40)]
    days[10], days[20] = 300, 0
    burst, gap = rate_anomalies(counted(times(days)))
    assert (burst.start, burst.count) == (datetime(2025, 1, 16, tzinfo=UTC), 300)
    assert burst.expected == pytest.approx(100, abs=10)
    assert burst.z > 5
    assert (gap.start, gap.count) == (datetime(2025, 1, 26, tzinfo=UTC), 0)
    assert gap.z < -5


def test_weekends_are_not_found_where_there_are_weeks_to_compare() -> None:
    days = [400, 400, 400, 400, 400, 40, 40] * 6
    assert rate_anomalies(counted(times(days))) == []
    days[12] = 400  # a Saturday like a weekday
    [found] = rate_anomalies(counted(times(days)))
    assert (found.start.weekday(), found.count) == (5, 400)


def test_the_first_and_the_last_day_may_be_incomplete() -> None:
    assert rate_anomalies(counted(times([3, *[100] * 10, 5]))) == []
    assert [found.count for found in rate_anomalies(counted(times([300, *[100] * 10, 5])))] == [300]


def test_hours_are_compared_with_the_same_hour_of_other_days() -> None:
    found = np.repeat(times([1] * 10), 50).astype("datetime64[h]")
    assert rate_anomalies(counted(found, "hour"), "hour") == []
    night = np.full(60, np.datetime64("2025-01-09T03", "h"))
    [anomaly] = rate_anomalies(counted(np.concatenate([found, night]), "hour"), "hour")
    assert anomaly.start == datetime(2025, 1, 9, 3, tzinfo=UTC)


@pytest.mark.parametrize("seed", range(5))
def test_steady_traffic_has_no_anomalies(seed: int) -> None:
    assert rate_anomalies(counted(times(np.random.default_rng(seed).poisson(50, 365).tolist()))) == []


def test_without_times_there_is_nothing_to_say() -> None:
    assert rate_anomalies(counted(np.array(["NaT", "NaT"], dtype="datetime64[us]"))) == []
    assert rate_anomalies(counted(np.array([], dtype="datetime64[us]"))) == []
