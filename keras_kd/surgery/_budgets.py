"""Which ranks keep the most within a budget? One option for each layer, by dynamic programming over what is spent."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

_UNITS = 20000  # steps in which a budget is spent


@dataclasses.dataclass(frozen=True)
class Option:
    """What a layer can be.

    Attributes:
        method: "channel" or "spatial"; "" for the layer as it is.
        rank: of the two layers.
        macs: multiply-accumulates of it.
        lost: share of its output that is lost.
    """

    method: str
    rank: int
    macs: int
    lost: float


def choose(options: Mapping[str, Sequence[Option]], room: float) -> dict[str, Option]:
    """Options of all layers with the smallest sum of what is lost within a budget (Sinha, Zoltners 1979).

    ```
    least_k(u) = min over options of layer k of  least_{k-1}(u - macs) + lost
    ```

    Multiply-accumulates are rounded up to 1 / 20000 of the budget; what that leaves is spent on the steps that gain most for what
    they cost.

    Args:
        options: of each layer, the one as it is included.
        room: multiply-accumulates that all of them may have together.

    Returns:
        An option of each layer; the cheapest ones where nothing else fits.
    """
    unit = max(room / _UNITS, 1.0)
    units = math.floor(room / unit)
    fronts = {name: _front(several) for name, several in options.items()}
    least, taken = np.zeros(units + 1), []
    for several in fronts.values():
        now, which = np.full(units + 1, np.inf), np.zeros(units + 1, "int32")
        for number, option in enumerate(several):
            spent = math.ceil(option.macs / unit)
            if spent <= units:
                sums = least[: units + 1 - spent] + option.lost
                better = np.flatnonzero(sums < now[spent:]) + spent
                now[better], which[better] = sums[better - spent], number
        least = now
        taken.append(which)
    if not np.isfinite(least[-1]):
        chosen = {name: several[-1] for name, several in fronts.items()}
    else:
        chosen, left = {}, units
        for name, which in zip(reversed(fronts), reversed(taken), strict=True):
            chosen[name] = fronts[name][which[left]]
            left -= math.ceil(chosen[name].macs / unit)
    return _refilled(chosen, fronts, room - sum(one.macs for one in chosen.values()))


def _front(options: Sequence[Option]) -> list[Option]:
    """Those that no other one beats in both, from the most multiply-accumulates to the fewest."""
    front: list[Option] = []
    for option in sorted(options, key=lambda one: (-one.macs, -one.lost)):
        while front and front[-1].lost >= option.lost:
            front.pop()
        front.append(option)
    return front


def _refilled(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], room: float) -> dict[str, Option]:
    """Spends what is left of a budget."""
    while room > 0:
        better = [
            ((chosen[name].lost - one.lost) / (one.macs - chosen[name].macs), name, one)
            for name, several in options.items()
            for one in several
            if 0 < one.macs - chosen[name].macs <= room
        ]
        if not better:
            break
        _, name, one = max(better, key=lambda step: step[0])
        room -= one.macs - chosen[name].macs
        chosen[name] = one
    return chosen
