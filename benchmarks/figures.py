"""What a suite finds: two ways beside each other, and what the machine could do at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.rounds import Ratio


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do at most.

    Attributes:
        flops: floating-point operations a second in a large matrix product, by number format.
        bytes_per_second: read and written by a large copy.
        disk_bytes_per_second: written to a new file, with what it takes to have it on the disk.
    """

    flops: dict[str, float]
    bytes_per_second: float
    disk_bytes_per_second: float

    def products(self, dtype: str) -> float:
        """Of a format; one that was not measured has no hardware, and does float32's at most."""
        return self.flops.get(dtype, self.flops["float32"])


def best_of(measured: Sequence[Ceilings]) -> Ceilings:
    """The highest of several runs on one machine: other load takes away, and nothing adds."""
    dtypes = dict.fromkeys(dtype for ceilings in measured for dtype in ceilings.flops)
    return Ceilings(
        flops={dtype: max(c.flops.get(dtype, 0.0) for c in measured) for dtype in dtypes},
        bytes_per_second=max(c.bytes_per_second for c in measured),
        disk_bytes_per_second=max(c.disk_bytes_per_second for c in measured),
    )


@dataclass(frozen=True)
class Needs:
    """What one unit of work cannot do without.

    Attributes:
        flops: multiplications and additions.
        bytes: read from and written to main (or GPU) memory.
        dtype: number format of the products.
    """

    flops: float
    bytes: float
    dtype: str

    def seconds(self, ceilings: Ceilings) -> float:
        """The shortest time in which the machine could do it."""
        return max(
            self.flops / ceilings.products(self.dtype), self.bytes / ceilings.bytes_per_second
        )

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two takes longer."""
        computing = self.flops / ceilings.products(self.dtype)
        return "compute" if computing > self.bytes / ceilings.bytes_per_second else "memory"


@dataclass(frozen=True)
class Goal:
    """What a ratio has to reach: `at_least` a number, `at_most` a number, or both."""

    at_least: float | None = None
    at_most: float | None = None

    def reached(self, value: float) -> bool:
        """Whether the value is within both."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        """As a table shows it."""
        sides = {"≥": self.at_least, "≤": self.at_most}
        return ", ".join(f"{sign} {side:g}" for sign, side in sides.items() if side is not None)


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    Attributes:
        what: what was done.
        unit: of `ours` and `other`.
        ours: the figure of this library.
        against: what it is compared with; empty where there is nothing to compare with.
        other: its figure in the same unit.
        ratio: of the two, as the goal is put; None where only `ours` was measured.
        goal: what the ratio (or `ours`, without a ratio) has to reach.
        per_second: units of work a second, where that is what the machine's ceilings limit.
        needs: what one unit of work needs.
        details: settings and further figures.
    """

    what: str
    unit: str
    ours: float
    against: str = ""
    other: float | None = None
    ratio: Ratio | None = None
    goal: Goal = Goal()
    per_second: float | None = None
    needs: Needs | None = None
    details: dict[str, float | str] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal == Goal():
            return None
        return self.goal.reached(self.ratio.value if self.ratio else self.ours)

    def fraction(self, ceilings: Ceilings) -> float | None:
        """Share of what the machine could do at most."""
        if self.per_second is None or self.needs is None:
            return None
        return self.per_second * self.needs.seconds(ceilings)
