"""Days and hours in which unusually many or few conversations began."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np

Unit = Literal["day", "hour"]
SECONDS: Mapping[Unit, int] = {"day": 86_400, "hour": 3_600}
PERIODS: Mapping[Unit, int] = {"day": 7, "hour": 24}


@dataclass(frozen=True)
class Rate:
    """A day or an hour whose number of conversations is unusual."""

    start: datetime
    count: int
    expected: float
    z: float
    """Robust standard deviations from what is expected, of square roots; negative: too few."""


def counted(times: np.ndarray, unit: Unit = "day") -> Counter[int]:
    """How many times fall into each day or hour, numbered from 1970.

    Args:
        times: (conversations,) datetime64, UTC; NaT where there is none.
        unit: What is counted by.
    """
    places = times[~np.isnat(times)].astype("datetime64[s]").astype(np.int64) // SECONDS[unit]
    return Counter(dict(zip(*(column.tolist() for column in np.unique(places, return_counts=True)), strict=True)))


def rate_anomalies(counts: Mapping[int, int], unit: Unit = "day", threshold: float = 5.0) -> list[Rate]:
    """The days, or hours, with far more or far fewer conversations than the others, in order.

    Expected is the median of the same weekday, or the same hour of the day, where there are four of them; else of
    all. The first and the last may be incomplete, so they cannot have too few.

    Args:
        counts: From `counted`.
        unit: What it was counted by.
        threshold: Robust standard deviations.
    """
    if not counts:
        return []
    first = min(counts)
    each = np.zeros(max(counts) - first + 1, np.int64)
    each[np.array([*counts]) - first] = [*counts.values()]
    roots = 2 * np.sqrt(each + 0.375)  # vary alike, with a standard deviation of 1, whatever the Poisson mean
    usual = np.full(len(roots), np.median(roots))
    period = PERIODS[unit]
    for phase in range(period if len(roots) >= 4 * period else 0):
        usual[phase::period] = np.median(roots[phase::period])
    deviations = (roots - usual) / max(1.0, 1.4826 * float(np.median(np.abs(roots - usual))))
    deviations[[0, -1]] = np.maximum(0.0, deviations[[0, -1]])
    return [
        Rate(start_of(first + place, unit), int(each[place]), mean, float(z))
        for place, (mean, z) in enumerate(zip((usual**2 / 4 - 0.375).tolist(), deviations, strict=True))
        if abs(z) > threshold
    ]


def start_of(number: int, unit: Unit = "day") -> datetime:
    """When a day or an hour begins, UTC."""
    return datetime.fromtimestamp(number * SECONDS[unit], UTC)
