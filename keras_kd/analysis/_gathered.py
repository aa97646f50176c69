"""What did all batches show together? Sums and moments of every place, and what follows from them."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd._moments import Moments, ridge
from keras_kd.analysis import _flows, _places, probes
from keras_kd.analysis._places import Place
from keras_kd.analysis.results import BlockAnalysis, FlowAnalysis, LayerAnalysis, LinearReport, Response
from keras_kd.analysis.statistics import (
    duplicate_channels,
    effective_rank,
    errors_in_order,
    rank_at,
    redundancy,
    removal_order,
)


class Gathered:
    """What all batches showed."""

    def __init__(self, places: list[Place], skipped: list[str], classes: int | None, seed: int) -> None:
        self.places, self.skipped, self.samples = places, skipped, 0
        self.moments: dict[str, Moments] = {}
        self.sums: dict[str, dict[str, Any]] = {place.name: {} for place in places}
        self.by_name = {place.name: place for place in places}
        self.names = [place.name for place in places if " .. " not in place.name]
        self.probes = None if classes is None else probes.Gathered(self.names, classes, 0.2, 5000, seed)

    def add(self, found: dict[str, Any], labels: Any) -> None:
        """Takes a batch in."""
        final = found.pop("")["output"]
        found = {name: {key: _numpy(value) for key, value in one.items()} for name, one in found.items()}
        for place in self.places:
            one = found[place.name]
            rows = one.pop("rows")
            if not (np.isfinite(rows).all() and np.isfinite(one.pop("norm", 0.0)).all()):
                raise ValueError(f'The layer "{place.name}" gives or reads NaN or infinite values on `data`.')
            moments = self.moments.setdefault(place.name, Moments.empty(rows.shape[1]))
            moments.add(Moments.of(rows, one.pop("weights", None)))
            _take(self.sums[place.name], {key: value for key, value in one.items() if key != "pooled"})
        self.samples += len(next(iter(found.values()))["pooled"]) if self.names else 0
        if self.probes is not None:
            features = {name: found[name]["pooled"] for name in self.names}
            self.probes.add(features, probes.checked_labels(labels, self.probes.classes), final)

    def output_moments(self, name: str) -> Moments:
        """Of a place's channels."""
        place = self.by_name[name]
        joint = self.moments[name]
        return joint.part(slice(len(joint.mean) - place.channels, None))

    def input_second_moment(self, name: str) -> np.ndarray | None:
        """Mean of z z' over what a place reads; None where that is not known."""
        place, joint = self.by_name[name], self.moments[name]
        columns = len(joint.mean) - place.channels
        if not columns or len(place.readings) != 1:
            return None
        read = joint.part(slice(columns))
        return np.asarray(read.scatter / read.weight + np.outer(read.mean, read.mean))

    def layer(self, name: str) -> Any:
        """The layer at a place."""
        return self.by_name[name].layer

    def report(
        self, model: keras.Model, levels: list[float], l2: float, costs: dict[str, Any], flows: dict[str, Any]
    ) -> LinearReport:
        """Solves."""
        for place in self.places:
            number = self.moments[place.name].rows
            if number <= place.channels:
                raise ValueError(
                    f'`data` must give more rows than the layer "{place.name}" has channels, {place.channels}. Received: {number}. '
                    "Give more samples, raise `max_positions`, or name other `layers`."
                )
        rows = self._probed()
        padded = {flow.place: flow.padded for flow in flows.values() if not flow.reason}
        layers = [place for place in self.places if " .. " not in place.name]
        made = [self._layer(place, levels, l2, costs, rows, padded.get(place.name, 0.0)) for place in layers]
        blocks = [self._block(place, l2) for place in self.places if " .. " in place.name]
        routes = {name: FlowAnalysis(f.place, f.readers, f.between, f.padded, f.reason) for name, f in flows.items()}
        return LinearReport(
            model=model.name,
            kind="functional" if getattr(model, "inputs", None) else "subclassed",
            samples=self.samples,
            noise=tuple(levels),
            layers=tuple(made),
            blocks=tuple(blocks),
            flows=routes,
            macs=int(sum(value or 0 for value in costs.values())),
            parameters=int(sum(np.prod(weight.shape) for weight in model.weights)),
            skipped=tuple(self.skipped),
        )

    def _probed(self) -> dict[str, Any]:
        if self.probes is None:
            return {}
        solved = next(iter(self.probes.moments.values())).rows if self.probes.moments else 0
        if solved <= self.probes.classes or not self.probes.kept:
            self.skipped.append("probes: too few samples")
            return {}
        return {row.name: row for row in self.probes.report(dict.fromkeys(self.names, ""), list(probes.PENALTIES), []).rows}

    def _linearity(self, place: Place, l2: float) -> tuple[float | None, float | None, str]:
        """Share of the variance that the best linear map gives, what its errors cost, and why it is not known, or a lower bound."""
        moments = self.moments[place.name]
        columns = len(moments.mean) - place.channels
        if not place.readings:
            return None, None, place.reason
        if moments.rows <= columns + 1:
            return None, None, f"{moments.rows} rows do not do for {columns} features"
        fit = ridge(moments, columns, [l2])
        spread = np.diag(moments.scatter)[columns:]
        if not spread.sum():
            return None, None, "its output is constant"
        lost = (1 - fit.r2) * spread * (moments.rows - 1) / (moments.rows - 1 - columns)
        cost = float(0.5 * np.sum(self._gradient(place) * lost) / moments.weight)
        reason = "its window was cut to the middle: a lower bound" if place.cut else ""
        return float(1 - lost.sum() / spread.sum()), cost, reason

    def _bypass(self, place: Place) -> tuple[float | None, float | None]:
        """How much of the output's variance the input as it is gives, where they have the same shape, and what the rest costs."""
        at = _places.middle(place)
        if at is None:
            return None, None
        moments, count = self.moments[place.name], place.channels
        read, given = np.arange(at, at + count), np.arange(len(moments.mean) - count, len(moments.mean))
        spread = np.diag(moments.scatter)[given]
        missed = spread + np.diag(moments.scatter)[read] - 2 * moments.scatter[read, given]
        missed = np.maximum(missed, 0.0) + moments.weight * (moments.mean[given] - moments.mean[read]) ** 2
        if not spread.sum():
            return None, None
        cost = 0.5 * np.sum(self._gradient(place) * missed) / moments.weight
        return float(1 - missed.sum() / spread.sum()), float(cost)

    def _gradient(self, place: Place) -> np.ndarray:
        """Mean of the summed squares of the gradient, of each channel."""
        sums = self.sums.get(place.name.split(" .. ")[-1], {})
        return np.asarray(sums.get("gradients", np.zeros(place.channels)) / self.samples)

    def _block(self, place: Place, l2: float) -> BlockAnalysis:
        first, last = place.name.split(" .. ")
        linearity, linearity_cost, reason = self._linearity(place, l2)
        bypass, bypass_cost = self._bypass(place)
        return BlockAnalysis(
            first=first,
            last=last,
            linearity=linearity,
            linearity_cost=linearity_cost,
            bypass=bypass,
            bypass_cost=bypass_cost,
            rows=self.moments[place.name].rows,
            members=place.members,
            escapes=place.escapes,
            columns=sum(reading.columns for reading in place.readings),
            window=_window(place),
            reason=reason,
        )

    def _layer(
        self, place: Place, levels: list[float], l2: float, costs: dict[str, Any], probed: dict[str, Any], padded: float
    ) -> LayerAnalysis:
        sums = self.sums[place.name]
        moments = self.output_moments(place.name)
        linearity, linearity_cost, reason = self._linearity(place, l2)
        bypass, bypass_cost = self._bypass(place)
        eigenvalues, vectors = np.linalg.eigh(moments.scatter)
        spectrum = np.maximum(eigenvalues[::-1], 0.0) / moments.weight
        gradient = self._gradient(place)
        plain = moments.with_mean(padded)
        weighted = plain.scaled(np.sqrt(gradient))
        order = removal_order(weighted)
        singular = _weight_spectrum(place.layer)
        constant = np.flatnonzero(sums["low"] == sums["high"])
        row = probed.get(place.name)
        n = self.samples
        return LayerAnalysis(
            name=place.name,
            path=place.path,
            kind=type(place.layer).__name__,
            channels=place.channels,
            positions=place.positions,
            macs=costs.get(place.path),
            parameters=int(sum(np.prod(w.shape) for w in getattr(place.layer, "weights", ()))),
            responses=tuple(_response(sums, index, level, n) for index, level in enumerate(levels)) if "gain" in sums else (),
            gain=float(sums["gain"][0] / n) if "gain" in sums else None,
            calls=sum(other.path == place.path for other in self.places if " .. " not in other.name),
            fan_in=_fan_in(place.layer),
            linear=_flows.is_linear(place.layer),
            rows=moments.rows,
            linearity=linearity,
            linearity_cost=linearity_cost,
            bypass=bypass,
            bypass_cost=bypass_cost,
            window=_window(place),
            linearity_reason=reason,
            redundancy=_floats(_adjusted(redundancy(moments), moments.rows, place.channels - 1)),
            removal=removal_order(moments),
            removal_by_cost=order,
            removal_by_cost_variance=errors_in_order(plain, order.keep),
            cost=float(0.5 * np.trace(weighted.scatter) / moments.weight),
            spectrum=_floats(spectrum),
            spectrum_cost=_floats(0.5 * spectrum * (gradient @ vectors[:, ::-1] ** 2)),
            effective_rank=effective_rank(spectrum),
            rank_99=rank_at(spectrum),
            weight_spectrum=_floats(singular) if singular is not None else None,
            weight_effective_rank=effective_rank(singular**2) if singular is not None else None,
            weight_rank_99=rank_at(singular**2) if singular is not None else None,
            taylor=_floats(sums["removed"][0] / n) if "removed" in sums else (),
            fisher=_floats(sums["removed"][1] / n / 2) if "removed" in sums else (),
            gradient=_floats(gradient),
            dead=tuple(int(c) for c in constant),
            duplicates=_equal(sums["bits"], constant),
            proportional=duplicate_channels(moments),
            accuracy=row.accuracy if row else None,
            accuracy_error=row.standard_error if row else None,
        )


def _adjusted(r2: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """R^2 as it is expected on other rows; 1 stays 1."""
    return np.asarray(1 - (1 - r2) * (rows - 1) / max(rows - 1 - columns, 1))


def _fan_in(layer: Any) -> int | None:
    kernel = getattr(layer, "kernel", None)
    if kernel is None or not isinstance(layer, _flows.MIXERS) or getattr(layer, "groups", 1) != 1:
        return None
    return int(np.prod(kernel.shape[:-1]))


def _take(sums: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds what a batch gave: sums of values and squares of what is there for each sample."""
    for key, value in found.items():
        if key in ("low", "high"):
            choose = np.minimum if key == "low" else np.maximum
            sums[key] = choose(sums.get(key, value), value)
            continue
        if key == "bits":
            value = value.astype("int64")
        elif key == "removed":
            value = np.stack([np.abs(value, dtype="float64").sum(0), np.square(value, dtype="float64").sum(0)])
        elif key in ("gain", "gains"):
            value = np.asarray(value, "float64")
            value = np.stack([value.sum(-1), np.square(value).sum(-1)])
        else:
            value = np.asarray(value, "float64")
        sums[key] = sums.get(key, 0) + value


def _response(sums: dict[str, Any], index: int, level: float, n: int) -> Response:
    total, squares = sums["gains"][0][index], sums["gains"][1][index]
    mean = total / n
    error = np.sqrt(max(squares / n - mean**2, 0.0) / (n - 1)) if n > 1 else 0.0
    changed = sums["changed"][index]
    return Response(level, float(mean), float(error), float(1 - sums["left"][index] / changed) if changed else 1.0)


def _numpy(value: Any) -> Any:
    return [ops.convert_to_numpy(one) for one in value] if isinstance(value, list) else ops.convert_to_numpy(value)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(one) for one in values)


def _window(place: Place) -> tuple[int, ...] | None:
    windows = [reading.window for reading in place.readings if reading.window is not None]
    return windows[0].size if windows else None


def _equal(bits: np.ndarray, constant: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Groups of channels whose sums of bits are the same."""
    groups: dict[int, list[int]] = {}
    for channel, value in enumerate(bits):
        if channel not in set(constant):
            groups.setdefault(int(value), []).append(channel)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _weight_spectrum(layer: Any) -> np.ndarray | None:
    """Singular values of a layer's kernel as the matrix from what it reads to its channels."""
    kernel = getattr(layer, "kernel", getattr(layer, "embeddings", None))
    if kernel is None or len(kernel.shape) < 2 or isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return None
    matrix = ops.convert_to_numpy(kernel).astype("float64").reshape(-1, kernel.shape[-1])
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)))
