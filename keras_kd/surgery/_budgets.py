"""Which ranks keep the most within a budget? The lower hull of each layer's costs, cheapest losses first."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence


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
    """Options of all layers with a small sum of what is lost, within a budget.

    From all layers as they are, the step with the lowest loss for what it saves is next, along the convex hull of each layer's
    options (Fox 1966). Where the last step saves more than it must, what is left of the budget goes to the steps back that gain
    most for what they cost.

    Args:
        options: of each layer, the one as it is included.
        room: multiply-accumulates that all of them may have together.

    Returns:
        An option of each layer; the cheapest ones where even these do not fit.
    """
    hulls = {name: _hull(several) for name, several in options.items()}
    steps = sorted(
        (
            ((after.lost - before.lost) / (before.macs - after.macs), name, after)
            for name, hull in hulls.items()
            for before, after in itertools.pairwise(hull)
        ),
        key=lambda step: step[0],
    )
    chosen = {name: hull[0] for name, hull in hulls.items()}
    whole = sum(one.macs for one in chosen.values())
    for _, name, option in steps:  # hulls are convex: a layer's steps come in order
        if whole <= room:
            break
        whole += option.macs - chosen[name].macs
        chosen[name] = option
    return _refilled(chosen, options, room - whole)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, from the most multiply-accumulates to the fewest."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (-one.macs, one.lost)):
        if hull and option.macs == hull[-1].macs:
            continue
        while hull and hull[-1].lost >= option.lost and len(hull) > 1:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (after.lost - before.lost) / (before.macs - after.macs)


def _refilled(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], room: float) -> dict[str, Option]:
    """Spends what is left of a budget."""
    while room > 0:
        better = [
            ((chosen[name].lost - one.lost) / (one.macs - chosen[name].macs), name, one)
            for name, several in options.items()
            for one in several
            if 0 < one.macs - chosen[name].macs <= room and one.lost < chosen[name].lost
        ]
        if not better:
            break
        _, name, one = max(better, key=lambda step: step[0])
        room -= one.macs - chosen[name].macs
        chosen[name] = one
    return chosen
