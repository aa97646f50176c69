"""Is one commit slower than another? The same steps on both, in turn, in a process for each; ratios with their spread.

    python benchmarks/compare_commits.py main .                    # the files as they are, against main
    python benchmarks/compare_commits.py v0.1.0 HEAD --only distiller quantization --limit 1.05
    python benchmarks/compare_commits.py main . --script mine.py   # mine.py: def prepare(): ... return a function to time

Each revision is checked out into a worktree of its own, which is removed at the end. Both processes run this file's benchmarks, so
that they do the same; while one is timed the other waits. Rounds are short and many, so that a busy moment meets both, and the one
that begins changes. New pairs of processes are started --pairs times: a process can be lucky for as long as it lives.

The exit code is 1 where a benchmark is slower: the median of the ratios above --limit, and the whole 95 % interval of this median
above 1, of 6 rounds or more: fewer are all on one side too often by chance. It is 2 where nothing could be compared: there is no
such revision, or a process died. What a revision cannot run is named, and compared with nothing. HEAD against HEAD shows how noisy
the machine is.
"""

import argparse
import contextlib
import json
import os
import pathlib
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps before anything is timed; one call of a function
SAMPLES = 640
ENOUGH = 6  # rounds: 5 of 5 are slower by chance in 3 % of cases
SLOW = {"linear_analysis": 3, "prune_channels": 3}  # so many times fewer rounds, of one call


# The worker: one revision. It is told "NAME" and says {"ready": true} or {"error": ...}; at each "go" it says {"seconds": ...}.


class Turns:
    """What a worker hears from its chief, and says to it."""

    def __init__(self, told: Any, say: Callable[[dict[str, Any]], None], steps: int) -> None:
        self.told, self.say, self.steps = told, say, steps

    def go_on(self) -> bool:
        """Waits; whether another round is wanted."""
        return self.told.readline().strip() == "go"

    def time(self, function: Callable[[], Any], calls: int) -> None:
        """Times a function for as many rounds as the chief wants."""
        function()
        self.say({"ready": True})
        while self.go_on():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            self.say({"seconds": time.perf_counter() - start})


def data_and_net(width: int) -> tuple[Any, Any, Any]:
    """Images, labels and a small network."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(SAMPLES, 14, 14, 1)).astype("float32"), rng.integers(0, 10, SAMPLES)
    layers = [keras.Input((14, 14, 1))]
    for factor in (1, 2):
        convolution = keras.layers.Conv2D(factor * width, 3, strides=2, padding="same", use_bias=False)
        layers += [convolution, keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return x, y, keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])


def fit_in_turns(model: Any, x: Any, y: Any, callbacks: Sequence[Any], turns: Turns) -> None:
    """Steps of `fit`, which stops between two rounds and waits."""
    import keras

    class Rounds(keras.callbacks.Callback):
        """Times `turns.steps` steps after each go."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.start = WARM_UP, None

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float((logs or {})["loss"])  # the step is over where this is known
            self.left -= 1
            if self.left > 0:
                return
            turns.say({"ready": True} if self.start is None else {"seconds": time.perf_counter() - self.start})
            if not turns.go_on():
                self.model.stop_training = True
                self.left = sys.maxsize
                return
            self.left, self.start = turns.steps, time.perf_counter()

    import tensorflow as tf

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).cache().repeat()
    model.fit(dataset, epochs=10**6, steps_per_epoch=1000, shuffle=False, verbose=0, callbacks=[*callbacks, Rounds()])


def distiller(turns: Turns) -> None:
    """A step of distillation from logits."""
    import keras_kd

    x, y, student = data_and_net(8)
    fit_in_turns(keras_kd.Distiller(data_and_net(24)[2], student, keras_kd.losses.KDLoss(4.0)), x, y, [], turns)


def pruning(turns: Turns) -> None:
    """A step with zeros, whose masks change every fifth step."""
    import keras_kd

    x, y, model = data_and_net(8)
    schedule = keras_kd.schedules.ConstantSparsity(0.5, begin_step=0, frequency=5)
    fit_in_turns(model, x, y, [keras_kd.callbacks.Pruning(schedule)], turns)


def quantization(turns: Turns) -> None:
    """A step with fake quantization."""
    import keras_kd

    x, y, model = data_and_net(8)
    fit_in_turns(model, x, y, [keras_kd.callbacks.Quantization()], turns)


def linear_analysis(turns: Turns) -> None:
    """An analysis, with what it compiles."""
    import keras_kd

    x, _, model = data_and_net(8)
    turns.time(lambda: keras_kd.analysis.linear_analysis(model, x, verbose=0), 1)


def prune_channels(turns: Turns) -> None:
    """Surgery to half the multiply-accumulates, with its refit."""
    import keras_kd

    x, _, model = data_and_net(8)
    turns.time(lambda: keras_kd.surgery.prune_channels(model, macs=0.5, data=x, reconstruct="layers", verbose=0), 1)


BENCHMARKS: dict[str, Callable[[Turns], None]] = {
    one.__name__: one for one in (distiller, pruning, quantization, linear_analysis, prune_channels)
}


def work(root: pathlib.Path, script: str | None, steps: int) -> None:
    """Does what the chief says, until there is nothing more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    turns = Turns(sys.stdin, lambda answer: print(json.dumps(answer), file=answers), steps)
    if script is not None:
        BENCHMARKS[pathlib.Path(script).stem] = lambda turns: turns.time(runpy.run_path(script)["prepare"](), turns.steps)
    while name := sys.stdin.readline().strip():
        try:
            import keras_kd

            found = pathlib.Path(keras_kd.__file__).resolve()
            if not found.is_relative_to(root.resolve()):
                raise ImportError(f"keras_kd came from {found}, not from {root}")
            BENCHMARKS[name](turns)
        except Exception as error:
            turns.say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
            while turns.go_on():
                turns.say({"error": "stopped"})


# The chief: two workers.


class Worker:
    """A process with one revision.

    Args:
        root: folder of its files.
        options: of the command line.
    """

    def __init__(self, root: pathlib.Path, options: argparse.Namespace) -> None:
        words = [sys.executable, str(pathlib.Path(__file__).resolve()), "--worker", str(root), "--steps", str(options.steps)]
        words += [] if options.script is None else ["--script", str(options.script.resolve())]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        environment = os.environ | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(words, cwd=root, env=environment, text=True, bufsize=1, **pipes)  # type: ignore[call-overload]

    def ask(self, word: str) -> dict[str, Any]:
        """Says a word and waits for the answer."""
        self.tell(word)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Waits for an answer.

        Raises:
            RuntimeError: if the process ended.
        """
        if line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.errors.seek(0)
        raise RuntimeError(f"A process ended. Its last words:\n{self.errors.read()[-2000:]}")

    def tell(self, word: str) -> None:
        """Says a word."""
        with contextlib.suppress(BrokenPipeError):
            print(word, file=self.process.stdin, flush=True)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # what was said to a process that is gone
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@contextlib.contextmanager
def checked_out(revisions: Sequence[str]) -> Iterator[list[pathlib.Path]]:
    """Folders with the files of revisions; "." is the folder of this script as it is."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"git {' '.join(words)}: {done.stderr.strip()}")  # such as: a revision that is not there
        return done.stdout.strip()

    with tempfile.TemporaryDirectory() as folder:
        roots: list[pathlib.Path] = []
        try:
            for number, revision in enumerate(revisions):
                if revision == ".":
                    roots.append(ROOT)
                    continue
                commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
                roots.append(pathlib.Path(folder) / str(number))
                git("worktree", "add", "--detach", "--force", str(roots[-1]), commit)
            yield roots
        finally:
            for root in roots:
                if root != ROOT and root.exists():
                    git("worktree", "remove", "--force", str(root))


def compare(roots: Sequence[pathlib.Path], names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each round, in the old and the new revision, by benchmark; a text where one of them cannot run it."""
    found: dict[str, Any] = {name: [] for name in names}
    for pair in range(options.pairs):
        workers = [Worker(root, options) for root in roots]
        try:
            for name in names:
                if not isinstance(found[name], str):
                    print(f"pair {pair + 1} of {options.pairs}: {name}", file=sys.stderr, flush=True)
                    measured = measure(workers, name, -(-options.rounds // SLOW.get(name, 1)))
                    found[name] = measured if isinstance(measured, str) else found[name] + measured
        finally:
            for worker in workers:
                worker.close()
    return found


def measure(workers: Sequence[Worker], name: str, rounds: int) -> list[list[float]] | str:
    """Rounds in turn."""
    for worker in workers:  # both get ready at the same time
        worker.tell(name)
    answers = [worker.hear() for worker in workers]
    errors = [f"{which} revision: {a['error']}" for which, a in zip(("old", "new"), answers, strict=True) if "error" in a]
    times: list[list[float]] = []
    for number in range(0 if errors else rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            answer = workers[which].ask("go")
            if "error" in answer:
                errors.append(f"{('old', 'new')[which]} revision: {answer['error']}")
                break
            seconds[which] = answer["seconds"]
        if errors:
            break
        times.append(seconds)
    for worker in workers:
        worker.tell("enough")
    return "; ".join(errors) or times


def summary(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median of the ratios new / old with its 95 % interval, their quartiles, and the medians of both in milliseconds."""
    import numpy as np

    ratios = np.asarray([new / old for old, new in times])
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)  # the bootstrap
    names = ("ratio", "low", "high", "quartile_1", "quartile_3")
    numbers = (np.median(ratios), *np.percentile(medians, (2.5, 97.5)), *np.percentile(ratios, (25, 75)))
    found = {name: float(value) for name, value in zip(names, numbers, strict=True)}
    return (
        found
        | {"rounds": len(ratios)}
        | {name: 1e3 * statistics.median(one) for name, one in zip(("old_ms", "new_ms"), zip(*times, strict=True), strict=True)}
    )


def is_slower(found: dict[str, float], limit: float) -> bool:
    """Whether it is surely slower, and by more than the limit."""
    return found["rounds"] >= ENOUGH and found["ratio"] > limit and found["low"] > 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="a revision, or . for the files as they are (HEAD)")
    parser.add_argument("new", nargs="?", default=".", help="the same (.)")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=tuple(BENCHMARKS), help="benchmarks (all)")
    parser.add_argument("--script", type=pathlib.Path, help="a Python file with prepare() in the place of these benchmarks")
    parser.add_argument("--rounds", type=int, default=15, help="of each benchmark in each pair of processes (15)")
    parser.add_argument("--steps", type=int, default=20, help="training steps, or calls of a script's function, a round (20)")
    parser.add_argument("--pairs", type=int, default=2, help="of processes, one after the other (2)")
    parser.add_argument("--limit", type=float, default=1.05, help="ratio above which a benchmark counts as slower (1.05)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.pairs) < 1:
        parser.error("--rounds, --steps and --pairs must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, prints, and returns the exit code."""
    options = parse(arguments)
    if options.worker is not None:
        work(options.worker, options.script, options.steps)
        return 0
    names = list(options.only) if options.script is None else [options.script.stem]
    try:
        with checked_out([options.old, options.new]) as roots:
            found = compare(roots, names, options)
    except (ValueError, RuntimeError) as error:
        print(f"compare_commits.py: {error}", file=sys.stderr)
        return 2
    numbers = {name: times if isinstance(times, str) else summary(times) for name, times in found.items()}
    if options.json:
        print(json.dumps(numbers, indent=1))
    for name, one in numbers.items() if not options.json else ():
        if isinstance(one, str):
            print(f"{name:<16} not compared: {one}")
            continue
        spread = f"{one['low']:.3f} to {one['high']:.3f}; half of the rounds {one['quartile_1']:.3f} to {one['quartile_3']:.3f}"
        told = f"; {one['rounds']} rounds are too few to tell" if one["rounds"] < ENOUGH else ""
        told += "  SLOWER" if is_slower(one, options.limit) else ""
        print(f"{name:<16} new/old {one['ratio']:.3f} ({spread}); {one['old_ms']:.1f} -> {one['new_ms']:.1f} ms a round{told}")
    compared = [one for one in numbers.values() if not isinstance(one, str)]
    return int(any(is_slower(one, options.limit) for one in compared)) if compared else 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worktrees and processes go then, too
    sys.exit(main())
