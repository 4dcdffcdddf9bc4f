"""What the benchmark of searches searches: three functions that are made small."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.settings.tuning import DimensionConfig

Values = dict[str, Any]


def number(low: float, high: float) -> DimensionConfig:
    """A continuous dimension."""
    return DimensionConfig(kind="float", low=low, high=high)


def whole(low: int, high: int, **when: Any) -> DimensionConfig:
    """An int dimension, there where `when` holds."""
    return DimensionConfig(kind="int", low=low, high=high, when=when)


def branin(values: Values) -> float:
    """Lowest 0.398, at three places."""
    x, y = values["x"], values["y"]
    bend = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return float(bend**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10)


HARTMANN_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
HARTMANN_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)
HARTMANN_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])


def hartmann6(values: Values) -> float:
    """Lowest -3.322."""
    x = np.array([values[f"x{index}"] for index in range(6)])
    return -float(HARTMANN_ALPHA @ np.exp(-(HARTMANN_A * (x - HARTMANN_P) ** 2).sum(axis=1)))


SHIFTS = {"left": -3.0, "none": 1.5, "right": 4.0}


def mixed_ackley(values: Values) -> float:
    """Ackley's function of two numbers, a whole number and a choice; lowest 1.5 from 0, at choice none."""
    x = np.array([values["x"] - 1.3, values["y"] + 2.1, values["n"] - 2, SHIFTS[values["c"]]])
    hill = -20 * math.exp(-0.2 * math.sqrt(float((x**2).mean())))
    return hill - math.exp(float(np.cos(2 * math.pi * x).mean())) + 20 + math.e


@dataclass(frozen=True)
class Problem:
    """Something to be made small."""

    name: str
    value: Callable[[Values], float]
    space: dict[str, DimensionConfig]

    @property
    def is_continuous(self) -> bool:
        return all(each.kind == "float" for each in self.space.values())


def problems() -> dict[str, Problem]:
    """Those that the table is about."""
    mixed = {
        "x": number(-5, 5), "y": number(-5, 5), "n": whole(-5, 5),
        "c": DimensionConfig(kind="choice", choices=tuple(SHIFTS)),
    }  # fmt: skip
    listed = [
        Problem("Branin", branin, {"x": number(-5, 10), "y": number(0, 15)}),
        Problem("Hartmann6", hartmann6, {f"x{index}": number(0, 1) for index in range(6)}),
        Problem("mixed Ackley", mixed_ackley, mixed),
    ]
    return {problem.name: problem for problem in listed}
