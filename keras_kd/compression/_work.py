"""What does one compression do, and keep? Candidates in a folder, measured and trained, and the best one of them published."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import tempfile
import time
import weakref
from typing import Any

import keras
import numpy as np

from keras_kd import _files, export, losses, report
from keras_kd.callbacks import Quantization
from keras_kd.compression._card import write_card
from keras_kd.compression._data import Data
from keras_kd.compression._strategies import WAYS, Way, fitted
from keras_kd.compression.results import Attempt, Compression
from keras_kd.distiller import Distiller

_PROBES = 5  # files until the share of a strategy is found
_CLOSE, _AIM = 0.93, 0.97  # of the budget: nearer is not looked for
_STATE = "compression.json"


class Work:
    """One compression: its folder, and what is known so far.

    Args:
        model: what is compressed.
        data: for training, calibration and choice.
        settings: numbers that a folder is bound to, by name, the budget among them.
        loss: supervised loss, or None.
        folder: where everything is kept, or None for a temporary one.
        verbose: whether `say` prints.
    """

    def __init__(self, model: Any, data: Data, settings: dict[str, Any], loss: Any, folder: Any, verbose: Any) -> None:
        self.model, self.data, self.settings, self.loss = model, data, settings, loss
        self.verbose = verbose
        self.began = time.monotonic()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="keras_kd_") if folder is None else folder)
        self._end = None if folder is not None else weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = self._begun()
        self._check_file()
        self._measure_original()

    def _measure_original(self) -> None:
        """Begins with the model itself, says how good it is, and how many bytes the budget is."""
        data, count = self.data, len(keras.tree.flatten(self.data.validation[0])[0])
        if data.is_held_out:
            self.say(
                f"no validation data were given: {count:,} samples of the training data are held out; if the model was trained on "
                "these, scores are too good"
            )
        if not self.state["original"]:
            file = self.folder / "original.tflite"
            size = export.to_litert(self.model, file, quantization="float32", verbose=0).size
            score, self.state["what"], self.state["task"] = self._measured(file)
            self.state["original"] = {"size": size, "score": score}
            self._keep()
        known = self.state["original"]
        budget = self.settings["budget"]  # bytes, or a share as "20%"
        self.budget = int(float(budget[:-1]) / 100 * known["size"]) if isinstance(budget, str) else budget
        measured = f"{self.state['what']} {known['score']:.4f} on {count:,} validation samples"
        self.say(f"original, float32: {known['size']:,} bytes, {measured}; the budget is {self.budget:,} bytes")
        frequent = data.share_of_most_frequent(self.model.outputs[0].shape) if self.state["what"] == "accuracy" else None
        if frequent is not None and known["score"] <= frequent + 1e-9:
            self.say(
                f"warning: no better than the most frequent class ({frequent:.1%}): was the model trained, with a loss that fits "
                "its outputs?"
            )

    # What is kept

    def _check_file(self) -> None:
        """Candidates are kept in files, so that the model's layers must be such that a file brings back."""
        path = self.folder / "original.keras"
        if path.exists():
            return
        self.model.save(path)
        try:
            _loaded(path)
        except (TypeError, ValueError) as error:
            path.unlink()
            raise ValueError(
                f"`model` must be one that Keras can save and load. Received: {str(error).splitlines()[0]} Register classes of "
                "your own with @keras.saving.register_keras_serializable()."
            ) from error

    def _begun(self) -> dict[str, Any]:
        """The state of the folder, or a new one."""
        digest = hashlib.sha256(json.dumps([self.model.get_config()], default=str, sort_keys=True).encode())
        for value in [
            *self.model.get_weights(),
            *keras.tree.flatten(self.data.validation),
            *keras.tree.flatten(self.data.calibration),
        ]:
            digest.update(np.ascontiguousarray(value if value is not None else 0).tobytes())
        settings = self.settings | {"content": digest.hexdigest()}
        path = self.folder / _STATE
        if not path.exists():
            return {"settings": settings, "original": None, "what": "", "task": "", "attempts": {}}
        found: dict[str, Any] = json.loads(path.read_text())
        different = [name for name in settings if settings[name] != found["settings"].get(name)]
        if different:
            former = found["settings"]
            told = [f"{name}={former.get(name)}, now {name}={settings[name]}" for name in different if name != "content"]
            told += ["another model or other data"] * ("content" in different)
            raise ValueError(
                f'`folder` must be new, or that of the same compression. Received: "{self.folder}", begun with '
                f"{'; '.join(told)}. Take another folder, or delete it."
            )
        return found

    def _keep(self) -> None:
        _files.write_atomically(self.folder / _STATE, json.dumps(self.state, indent=1).encode())

    def _keep_card(self, written: dict[str, Any]) -> None:
        self.state["card"] = written
        self._keep()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.verbose:
            print(f"[{time.monotonic() - self.began:6.0f} s] {text}", flush=True)

    @property
    def attempts(self) -> dict[str, Attempt]:
        """By key: the files of an attempt have it as their name."""
        return {key: Attempt(**one) for key, one in self.state["attempts"].items()}

    # Without training

    def cut(self, deadline: float) -> None:
        """The whole model in integers, and each strategy at the largest share whose file is within the budget."""
        whole = self._attempt("whole", "int8", 1.0, 8, lambda: self.model)
        if whole.fits or not whole.size:
            return
        fine = self._attempt("whole_4_bits", "weights of 4 bits", 1.0, 4, lambda: self.model)
        ways = [(name, way, whole) for name, way in WAYS.items()]
        if fine.size and not fine.fits:
            ways.append(("channels, 4 bits", WAYS["channels"], fine))
        for name, way, uncut in ways:
            key = name.replace(",", "").replace(" ", "_")
            if key in self.state["attempts"]:
                continue
            if time.monotonic() >= deadline and any(one.fits for one in self.attempts.values()):
                self.say(f"{name}: not tried, the time is over")
                continue
            self.say(f"{name}: looking for the share that the budget allows")
            share, cut = self._cut(name, way, uncut)
            self._attempt(key, name, share, uncut.bits, cut)

    def _cut(self, name: str, way: Way, whole: Attempt) -> tuple[float, Any]:
        """The largest share whose file is within the budget, and what makes the model. Files are nearly linear in it."""
        calibration = self.data.calibration
        aim = _AIM * self.budget
        rest = max(whole.size - whole.parameters * whole.bits // 8, 0)  # of a file, besides the weights
        share = float(np.clip((aim - rest) / max(whole.size - rest, 1), 0.02, 0.98))
        low, high, best, known = 0.0, 1.0, None, {1.0: whole.size}
        for _ in range(_PROBES):
            try:
                probe = way(self.model, share, calibration)
                size = self._quantised(probe, self.folder / "probe.tflite", whole.bits)[0]
                self.say(f"{name}: {share:.1%} of the work, {size:,} bytes")
            except (ValueError, RuntimeError):  # cannot be cut so far
                low, share = share, (share + high) / 2
                continue
            if size <= self.budget:
                best, low = (share, probe), share
                if size >= _CLOSE * self.budget:
                    break
            else:
                high = share
            other = min(known, key=lambda one: abs(one - share))
            slope = (known[other] - size) / (other - share)
            known[share] = size
            guess = share + (aim - size) / slope if slope > 0 else 0.0
            share = guess if low < guess < high else (low + high) / 2
        (self.folder / "probe.tflite").unlink(missing_ok=True)
        if best is None:  # nothing is within the budget: what comes nearest, or says why not
            share = low or 0.02
            return share, lambda: fitted(way(self.model, share, calibration), self.model, calibration)
        return best[0], lambda: fitted(best[1], self.model, calibration)

    def _attempt(self, key: str, name: str, share: float, bits: int, make: Any) -> Attempt:
        """Makes a model without training, and measures its file."""
        if key in self.state["attempts"]:
            return self.attempts[key]
        began, parameters = time.monotonic(), 0
        try:
            made = make()
            parameters = made.count_params()
            if made is not self.model:
                made.save(self.folder / f"{key}.keras")
            size, quantised = self._quantised(made, self.folder / f"{key}.tflite", bits)
            quantised.save(self.folder / f"{key}.int8.keras")
            attempt = Attempt(name, share, 0, size, 0.0, parameters, 0.0, False, bits=bits)
        except (ValueError, RuntimeError) as error:
            note = str(error).splitlines()[0]
            attempt = Attempt(name, share, 0, 0, 0.0, parameters, 0.0, False, note, bits)
        return self._record(key, attempt, began)

    def _quantised(self, model: Any, path: pathlib.Path, bits: int) -> tuple[int, Any]:
        """The size of the file of a model in integers, after its ranges were measured; and the model that computes the same."""
        quantised = Quantization(bits, calibration_data=self.data.calibration).quantize(model)
        return export.to_litert(quantised, path, check_data=self.data.calibration, min_agreement=0.0, verbose=0).size, quantised

    def _record(self, key: str, attempt: Attempt, began: float) -> Attempt:
        """Measures the file of an attempt, and keeps what came of it."""
        score = 0.0
        try:
            score = self._measured(self.folder / f"{key}.tflite")[0] if attempt.size else 0.0
        except _NotFiniteError as error:
            attempt = dataclasses.replace(attempt, size=0, note=str(error))
        seconds, fits = round(time.monotonic() - began, 1), 0 < attempt.size <= self.budget
        found = dataclasses.replace(attempt, score=score, seconds=seconds, fits=fits)
        self.state["attempts"][key] = vars(found)
        if self._ranked()[:1] == [key]:
            self._publish(key)
        self._keep()
        over = "" if fits else f", {found.size - self.budget:,} bytes over the budget"
        trained = "" if found.epochs else " before any training"
        told = found.note or f"{found.size:,} bytes{over}, {self.state['what']} {score:.4f}{trained}"
        self.say(f"{found.name}: {told}")
        return found

    def _ranked(self) -> list[str]:
        """Keys of the files within the budget, the best one first; of equal ones the smaller, and then the earlier."""
        within = {key: one for key, one in self.attempts.items() if one.fits}
        return sorted(within, key=lambda key: (-within[key].score, within[key].size))

    def _publish(self, key: str) -> pathlib.Path:
        """Makes an attempt the folder's model."""
        for suffix, name in (("tflite", "model.tflite"), ("int8.keras", "model.keras")):
            shutil.copyfile(self.folder / f"{key}.{suffix}", self.folder / f"{name}.part")
            (self.folder / f"{name}.part").replace(self.folder / name)
        return self.folder / "model.tflite"

    def _measured(self, path: pathlib.Path) -> tuple[float, str, str]:
        """Score of a file, what it is, and the task.

        Raises:
            _NotFiniteError: if it gives NaN or infinity.
        """
        x, y = self.data.validation
        files = {"this": path} if y is not None else {"original": self.folder / "original.tflite", "this": path}
        found = report.compare(files, x, y, latency=False, verbose=0)
        row = found["this"]
        if row.accuracy is not None:
            return row.accuracy, "accuracy", found.task
        if y is None:
            return row.agreement if row.agreement is not None else 0.0, "agreement", found.task
        if row.loss is None:
            raise _NotFiniteError(
                f'`model` must give finite numbers for the validation data. Received: NaN or infinity from "{path.name}".'
            )
        return -row.loss, "minus the mean squared error", found.task

    # Training

    def train(self, max_trials: int, deadline: float) -> None:
        """Distils candidates, the best one first, and then the best one again."""
        while True:
            attempts = self.attempts
            done = [key for key, one in attempts.items() if one.epochs]
            within = self._ranked()
            new = [key for key in within if not attempts[key].epochs and f"{key}_trained" not in attempts]
            left = new or [key for key in within if attempts[key].epochs and f"{key}_again" not in attempts]
            if len(done) >= max_trials or not left or time.monotonic() >= deadline:
                return
            self._train(left[0], again=not new, deadline=deadline)

    def _train(self, key: str, *, again: bool, deadline: float) -> None:
        began, former = time.monotonic(), self.attempts[key]
        rate = self.settings["learning_rate"] * (0.3 if again else 1.0)
        epochs = self.settings["epochs"]
        target = f"{key}_trained" if not again else f"{key}_again"
        self.say(f"{former.name}: distilling for {epochs} epochs at a learning rate of {rate:.2g}")
        path = self.folder / f"{key}.keras"
        student = _loaded(path if path.exists() else self.folder / "original.keras")
        keras.utils.set_random_seed((self.settings["seed"] + len(self.attempts)) % (1 << 32))
        quantization, ran, stopped = self._fit(student, rate, epochs, deadline, former.bits)
        name = f"{former.name}, trained" if not again else f"{former.name} again"
        attempt = dataclasses.replace(former, name=name, epochs=former.epochs + ran, stopped=former.stopped or stopped)
        try:
            quantised = quantization.quantized_model()
            size = export.to_litert(
                quantised, self.folder / f"{target}.tflite", check_data=self.data.calibration, min_agreement=0.0, verbose=0
            ).size
            student.save(self.folder / f"{target}.keras")
            quantised.save(self.folder / f"{target}.int8.keras")
            attempt = dataclasses.replace(attempt, size=size)
        except (ValueError, RuntimeError) as error:
            attempt = dataclasses.replace(attempt, size=0, note=str(error).splitlines()[0])
        self._record(target, attempt, began)

    def _fit(self, student: Any, rate: float, epochs: int, deadline: float, bits: int) -> tuple[Quantization, int, bool]:
        """Trains; gives also how many epochs were begun, and whether the time ended them."""
        kd = {"classes": losses.KDLoss(temperature=4.0), "binary": losses.KDLoss(activation="sigmoid")}
        teaches = kd.get(self.state["task"]) or keras.losses.MeanSquaredError()
        weight = 0.3 if self.loss is not None else 0.0
        distiller = Distiller(self.model, student, teaches, student_loss_weight=weight)
        steps = epochs * self.data.steps()
        rates = keras.optimizers.schedules.CosineDecay(rate, steps)
        distiller.compile(keras.optimizers.Adam(rates), self.loss)
        quantization, watch = Quantization(bits), _Watch(deadline, epochs, self.say)
        history = distiller.fit(**self.data.fit_arguments(), epochs=epochs, verbose=0, callbacks=[quantization, watch])
        return quantization, len(history.epoch), watch.is_over and int(distiller.optimizer.iterations) < steps

    def result(self) -> Compression:
        """The best attempt within the budget.

        Raises:
            ValueError: if there is none.
        """
        attempts, ranked, known = self.attempts, self._ranked(), self.state["original"]
        if not ranked:
            made = [one for one in attempts.values() if one.size]
            least = min(made, key=lambda one: one.size) if made else None
            told = "No file could be made: " + "; ".join(one.note for one in attempts.values())
            if least is not None:
                more = least.size - self.budget
                told = f'The smallest file that was made has {least.size:,} bytes ("{least.name}"), {more:,} too many'
            raise ValueError(f"`budget` must be one that can be met. Received: {self.budget:,} bytes. {told}.")
        target = self._publish(ranked[0])
        model, best, several = _loaded(self.folder / "model.keras"), attempts[ranked[0]], tuple(attempts.values())
        found = Compression(model, target, best, several, self.budget, known["score"], known["size"], self.state["what"])
        if self._end is not None:  # a temporary folder lives as long as the result
            self._end.detach()
            weakref.finalize(found, shutil.rmtree, self.folder, ignore_errors=True)
        _files.write_atomically(self.folder / "report.json", found.to_json().encode())
        if self._end is None:
            rate, written, held = self.settings["learning_rate"], self.state.get("card"), self.data.is_held_out
            if not write_card(found, self.data.validation, rate, written, self._keep_card, is_held_out=held):
                self.say("README.md was edited, and stays as it is; delete it for a new one")
        self.say(f"chosen: {found.best.name}, {found.best.size:,} bytes, {found.what} {found.best.score:.4f}")
        return found


class _NotFiniteError(ValueError):
    """A file gives NaN or infinity."""


def _loaded(path: pathlib.Path) -> Any:
    """A model that was written here, so that code in its file is the user's own."""
    return keras.saving.load_model(path, compile=False, safe_mode=False)


class _Watch(keras.callbacks.Callback):
    """Says how far a training is, and ends it in time; what it has reached by then is measured."""

    def __init__(self, deadline: float, epochs: int, say: Any) -> None:
        super().__init__()
        self.deadline, self.epochs, self.say = deadline, epochs, say
        self.began, self.is_over = time.monotonic(), False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Says the loss, and how long it will take."""
        left = (time.monotonic() - self.began) / (epoch + 1) * (self.epochs - epoch - 1)
        self.say(f"  epoch {epoch + 1}/{self.epochs}, loss {(logs or {}).get('loss', math.nan):.4g}, {left:.0f} s left")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks at the clock."""
        if time.monotonic() >= self.deadline:
            self.model.stop_training = self.is_over = True
