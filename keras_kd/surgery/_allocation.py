"""How many channels does each group keep within a budget? The cheapest for what they save go first."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from keras_kd.surgery._costs import Costs


@dataclasses.dataclass(frozen=True)
class Limits:
    """Budgets; None where there is none."""

    macs: float | None
    parameters: float | None

    def hold(self, macs: float, parameters: float) -> bool:
        """Whether a model is within all of them."""
        return (self.macs is None or macs <= self.macs) and (self.parameters is None or parameters <= self.parameters)

    def worth(self, macs: float, parameters: float, over: tuple[float, float]) -> float:
        """What a saving counts, in shares of the budgets that are still exceeded."""
        found = 0.0
        if self.macs is not None and over[0] > self.macs:
            found += macs / self.macs
        if self.parameters is not None and over[1] > self.parameters:
            found += parameters / self.parameters
        return found


class Allocation:
    """Channels kept by each group, taken away step by step.

    Args:
        costs: of the model by the channels kept.
        sizes: channels of each group.
        curves: for each group, what the outputs lose after 1, 2, ... channels have gone.
        limits: budgets.
        least: fewest channels that each group may keep.
        steps: for each group, what the number of channels kept is a multiple of, unless it keeps all; 1 each where not given.
        by_worth: whether the loss is divided by what is saved; or the channel of the lowest loss goes.
    """

    def __init__(
        self,
        costs: Costs,
        sizes: Sequence[int],
        curves: Sequence[np.ndarray],
        limits: Limits,
        least: Sequence[int],
        *,
        steps: Sequence[int] | None = None,
        by_worth: bool = True,
    ) -> None:
        self.costs, self.sizes, self.limits, self.least, self.by_worth = costs, list(sizes), limits, list(least), by_worth
        self.steps = list(steps or [1] * len(self.sizes))
        self.curves = [np.concatenate([[0.0], curve]) for curve in curves]
        self.kept = list(sizes)
        self.now = costs.of(self.kept)

    def greedy(self) -> bool:
        """Takes the step of the lowest price until the budgets hold; whether they do."""
        prices = [self._price(group) for group in range(len(self.sizes))]
        while not self.limits.hold(*self.now):
            if not prices or min(prices) == math.inf:
                return False
            group = int(np.argmin(prices))
            over = [self._is_over(index) for index in (0, 1)]
            self._keep(group, self._next(group))
            changed = over != [self._is_over(index) for index in (0, 1)]  # what counts is another budget now
            for other in range(len(prices)) if changed else self.costs.neighbours[group]:
                prices[other] = self._price(other)
        self._give_back()
        return True

    def even(self) -> bool:
        """The same share of each group, as small as needed; whether the budgets hold then."""
        low, high = 0.0, 1.0
        if not self._at_share(low):
            return False
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self._at_share(middle) else (low, middle)
        self._at_share(low)
        self._give_back()
        return True

    def smallest(self) -> tuple[float, float]:
        """Costs where each group keeps what it must."""
        return self.costs.of([self._rounded(least, group) for group, least in enumerate(self.least)])

    def _at_share(self, share: float) -> bool:
        self.kept = [self._rounded(max(round(share * size), self.least[group]), group) for group, size in enumerate(self.sizes)]
        self.now = self.costs.of(self.kept)
        return self.limits.hold(*self.now)

    def _rounded(self, count: int, group: int) -> int:
        """The next number above that a group may keep."""
        return min(-(-count // self.steps[group]) * self.steps[group], self.sizes[group])

    def _next(self, group: int) -> int:
        """The next smaller number of channels that a group may keep; what it keeps where there is none."""
        fewer = (self.kept[group] - 1) // self.steps[group] * self.steps[group]
        return fewer if fewer >= max(self.least[group], 1) else self.kept[group]

    def _keep(self, group: int, count: int) -> None:
        macs, parameters = self.costs.saving(self.kept, group, count)
        self.kept[group] = count
        self.now = self.now[0] - macs, self.now[1] - parameters

    def _is_over(self, index: int) -> bool:
        limit = (self.limits.macs, self.limits.parameters)[index]
        return limit is not None and self.now[index] > limit

    def _lost(self, group: int, count: int) -> float:
        """What a group loses more, or less, with another number of channels."""
        curve, size = self.curves[group], self.sizes[group]
        return float(curve[size - count] - curve[size - self.kept[group]])

    def _price(self, group: int) -> float:
        count = self._next(group)
        if count == self.kept[group]:
            return math.inf
        saved = self.costs.saving(self.kept, group, count)
        worth = self.limits.worth(*saved, self.now)
        if worth <= 0:
            return math.inf
        return self._lost(group, count) / (worth if self.by_worth else self.kept[group] - count)

    def _give_back(self) -> None:
        """Takes back steps that were more than needed, the dearest first, as long as the budgets hold."""
        while True:
            found: list[tuple[float, int, int]] = []
            for group, size in enumerate(self.sizes):
                more = min((self.kept[group] // self.steps[group] + 1) * self.steps[group], size)
                if more == self.kept[group]:
                    continue
                saved = self.costs.saving(self.kept, group, more)
                if self.limits.hold(self.now[0] - saved[0], self.now[1] - saved[1]):
                    found.append((-self._lost(group, more), group, more))
            if not found:
                return
            _, group, more = max(found)
            self._keep(group, more)
