"""How is a recording made, and continued after a kill? One pass of the teacher, shard by shard, each checked against the data."""

import hashlib
import pathlib
import zipfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd._outputs import flatten_outputs
from keras_kd._progress import Progress
from keras_kd.recording._encodings import Checks, Encoding, Rounding, encoding_of
from keras_kd.recording._fingerprints import (
    changed_examples,
    differences_of_data,
    differences_of_settings,
    differences_of_teacher,
    digest,
    same_answers,
    save_examples,
    teacher_fingerprint,
)
from keras_kd.recording._shards import (
    FORMAT,
    VERSION,
    Field,
    Layout,
    ShardWriter,
    lock,
    pack,
    pack_as,
    read_manifest,
    remove_stale_lock,
    skeleton,
    suspicious,
    write_atomically,
    write_manifest,
)
from keras_kd.recording._sources import Source, as_array

EXAMPLES = "examples.npz"
_FIRST = 8  # samples that are looked at to recognise the data and the functions
_SPREAD = 64  # samples of arrays that are looked at besides, over the whole length
_ANSWERS = 1024  # numbers of an output of a sample that are kept to recognise the teacher
_SHARD_BYTES, _SHARD_SAMPLES = 64 * 2**20, 8192


_TEACHER = "teacher"  # its answers among the examples
_STACK = 7  # calls from the user's line to TeacherPass.__call__


def view_seeds(seed: int, first: int, count: int, views: int) -> np.ndarray:
    """Seeds `(count, views, 2)` of samples `first`, `first + 1`, ...: a mix of seed, sample and view, the same everywhere."""
    mixed = _mix(np.full((1, 1), seed % 2**64, np.uint64))
    mixed = _mix(mixed ^ np.arange(first, first + count, dtype=np.uint64)[:, None])
    mixed = _mix(mixed ^ np.arange(views, dtype=np.uint64))
    return mixed[..., None].view(np.int32)  # (count, views, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 step (Steele, Lea, Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.ascontiguousarray(x ^ (x >> np.uint64(31)))


def compiled(augment: Any) -> Any:
    """The user's function as a graph, with AutoGraph: in recording and in reading the same one."""
    return tf.function(lambda x, seed: augment(x, seed))


def augmenter(augment: Any, structure: Any, fields: list[Field]) -> Any:
    """A function of flat batches and seeds `(batch, 2)` that gives augmented batches.

    It runs `augment` sample by sample inside tf.data, as reading does, so that both compute the same bits.
    """
    function = compiled(augment)
    signature = [tf.TensorSpec((None, *field.shape), field.dtype) for field in fields]

    @tf.function(input_signature=[signature, tf.TensorSpec((None, 2), tf.int32)])
    def augmented(flat: Any, seeds: Any) -> Any:
        samples = tf.data.Dataset.from_tensor_slices((tuple(flat), seeds))
        samples = samples.map(lambda x, seed: function(pack_as(structure, list(x)), seed), num_parallel_calls=tf.data.AUTOTUNE)
        return samples.batch(tf.shape(seeds, tf.int64)[0]).get_single_element()

    return augmented


def augmented_example(augmented: Any, flat: list[Any], seeds: np.ndarray) -> list[np.ndarray]:
    """What `augment` makes of the first samples.

    Raises:
        ValueError: if it makes something else of them each time.
    """
    # A second time in another order: a generator with a state starts anew with each call, and says the same in the same order.
    twice = augmented([tf.concat([leaf, leaf[::-1]], 0) for leaf in flat], np.concatenate([seeds, seeds[::-1]]))
    once, again = zip(*[np.split(_plain(leaf), 2) for leaf in keras.tree.flatten(twice)], strict=True)
    if not all(np.array_equal(a, b[::-1]) for a, b in zip(once, again, strict=True)):
        raise ValueError(
            "`augment` must give the same view for the same seed, so that it can be replayed. Received: a function that does not. "
            "Use tf.random.stateless_uniform(..., seed=seed), tf.image.stateless_random_crop(..., seed=seed) and the like."
        )
    return list(once)


def _plain(tensor: Any) -> np.ndarray:
    array = np.asarray(tensor)
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


class TeacherPass:
    """Runs the teacher on a batch, and gives what is stored of it.

    Args:
        teacher: a holder.
        settings: of the recording.
        example: a batch of inputs, as the teacher sees them.
    """

    def __init__(self, teacher: Any, settings: dict[str, Any], example: Any) -> None:
        self.teacher = teacher
        self.settings = settings
        self.encodings: list[Encoding] = []
        self.structure: dict[str, Any] = {}
        self.input_structure = skeleton(example)
        specs = [tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype) for leaf in keras.tree.flatten(example)]
        self.run = tf.function(self._run, autograph=False).get_concrete_function(specs)
        self.roundings = [Rounding() for _ in self.encodings]

    def _run(self, flat: list[Any]) -> Any:
        outputs, features = self.teacher(pack_as(self.input_structure, flat), self.settings["layer_names"])
        self.structure = {"outputs": skeleton(outputs), "features": skeleton(features)}
        self.encodings = self._output_encodings(outputs) + self._feature_encodings(features)
        tensors = keras.tree.flatten(outputs) + keras.tree.flatten(features)
        encoded = [encoding.encode(tensor) for encoding, tensor in zip(self.encodings, tensors, strict=True)]
        return [part for stored, _ in encoded for part in stored], tf.stack([checks for _, checks in encoded])

    def _output_encodings(self, outputs: Any) -> list[Encoding]:
        flat = flatten_outputs(outputs)
        kinds = list(self.teacher.kinds)
        kinds = kinds if len(kinds) == len(flat) else [None] * len(flat)  # a subclassed model says nothing
        options = {"dtype": self.settings["dtype"], "top_k": self.settings["top_k"]}
        names = [f'output "{path}"' if path else "output" for path in flat]
        return [
            encoding_of(name, tensor, kind=kind, **options) for name, tensor, kind in zip(names, flat.values(), kinds, strict=True)
        ]

    def _feature_encodings(self, features: dict[str, Any]) -> list[Encoding]:
        tensors = [(path[0], tensor) for path, tensor in keras.tree.flatten_with_path(features)]
        return [encoding_of(f'layer "{name}"', tensor, dtype=self.settings["dtype"]) for name, tensor in tensors]

    def __call__(self, x: Any, where: str) -> list[np.ndarray]:
        """The stored arrays of a batch.

        Raises:
            ValueError: if a number is NaN, infinite, or too large for the dtype.
        """
        flat = [tf.convert_to_tensor(leaf) for leaf in keras.tree.flatten(x)]
        stored, found = self.run(flat)
        for encoding, rounding, numbers in zip(self.encodings, self.roundings, found.numpy().tolist(), strict=True):
            checks = Checks(*numbers)
            if not checks.finite:
                raise ValueError(
                    f"The teacher's {encoding.what} must be finite. Received: NaN or infinite values for {where}. Look at the "
                    "data and the teacher's weights; a student cannot learn from them."
                )
            if not checks.fits:
                raise ValueError(
                    f"The teacher's {encoding.what} must fit into float16, up to 65504. Received: larger values for {where}. "
                    'Record with dtype="float32".'
                )
            rounding.check(encoding, checks, len(flat[0]), where, stacklevel=_STACK)
        arrays = [tensor.numpy() for tensor in stored]
        for encoding, array in zip(self.encodings, arrays, strict=False):
            if len(array) != len(flat[0]):
                raise ValueError(
                    f"The teacher's {encoding.what} must have one row per sample. Received: {len(array)} rows for {len(flat[0])} "
                    "samples."
                )
        return arrays

    @property
    def fields(self) -> list[Field]:
        """What a view holds after its seed."""
        return [field for encoding in self.encodings for field in encoding.fields]


class Recorder:
    """Makes, continues, mends or recognises the recording at `path`.

    Args:
        teacher: a holder.
        source: the data.
        path: the folder.
        augment: see `record_teacher`.
        settings: see `record_teacher`.
        samples_per_shard: None chooses.
    """

    def __init__(
        self,
        teacher: Any,
        source: Source,
        path: pathlib.Path,
        *,
        augment: Any,
        settings: dict[str, Any],
        samples_per_shard: int | None,
    ) -> None:
        self.teacher = teacher
        self.source = source
        self.path = path
        self.settings = settings
        self.samples_per_shard = samples_per_shard
        self.inputs = source.field_roles.count("x")
        first = source.first(_FIRST)
        self.first = self._digests(first)
        spread = source.spread(_SPREAD)
        self.spread = spread and self._digests(spread)
        self.augmented = augment and augmenter(augment, source.structure["x"], source.fields[: self.inputs])
        self.example = self._view(first[: self.inputs], view_seeds(settings["seed"], 0, len(first[0]), 1)[:, 0])
        self.examples = self._make_examples(first[: self.inputs])

    def _digests(self, leaves: list[np.ndarray]) -> dict[str, str]:
        return {role: self._digest(leaves, role) for role in self.source.structure}

    def _digest(self, leaves: list[np.ndarray], role: str) -> str:
        chosen = [index for index, other in enumerate(self.source.field_roles) if other == role]
        return digest(pack([self.source.fields[i] for i in chosen], [leaves[i] for i in chosen]))

    def _view(self, flat: list[Any], seeds: np.ndarray) -> Any:
        """A batch as the teacher sees it."""
        if self.augmented:
            return self.augmented([tf.convert_to_tensor(leaf) for leaf in flat], seeds)
        return pack_as(self.source.structure["x"], flat)

    def _make_examples(self, first: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        examples = {}
        if self.augmented:
            seeds = view_seeds(self.settings["seed"], 0, len(first[0]), 1)[:, 0]
            examples["augment"] = augmented_example(self.augmented, [tf.convert_to_tensor(leaf) for leaf in first], seeds)
        several = getattr(self.teacher, "preprocessing", None)
        if functions := [one for one in (several if isinstance(several, list | tuple) else [several]) if one is not None]:
            inputs = keras.tree.map_structure(tf.convert_to_tensor, self.example)
            results = [function(inputs) for function in functions]
            examples["teacher_preprocessing"] = [_plain(leaf) for leaf in keras.tree.flatten(results)]
        return examples

    def _answers(self) -> list[np.ndarray]:
        """Some of what the teacher says of the first samples, which tells models apart that differ in code alone."""
        count = self.source.first_batch_size  # no more at once than in recording
        inputs = keras.tree.map_structure(lambda leaf: tf.convert_to_tensor(leaf)[:count], self.example)
        outputs, features = self.teacher(inputs, self.settings["layer_names"])
        found = []
        for tensor in keras.tree.flatten(outputs) + [features[name] for name in sorted(features)]:
            array = _plain(tensor)
            array = np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array
            rows = array.astype("float32" if array.dtype.kind == "f" else array.dtype).reshape(len(array), -1)
            width = rows.shape[1]
            chosen = np.linspace(0, width - 1, _ANSWERS).astype(int) if width > _ANSWERS else np.arange(width)
            found.append(rows[:, chosen])
        return found

    def identity(self) -> dict[str, Any]:
        """What must be the same in every call for one path."""
        return {
            "teacher": {"name": str(self.teacher.name), **teacher_fingerprint(self.teacher)},
            "data": {
                "samples": self.source.samples,
                "batches": self.source.batches,
                "batch_size": self.source.first_batch_size,
                "structure": self.source.structure,
                "fields": [[field.name, field.dtype, list(field.shape)] for field in self.source.fields],
                "first": self.first,
                "spread": self.spread,
            },
            "settings": {**self.settings, "functions": sorted(self.examples)},
        }

    def check(self, manifest: dict[str, Any]) -> None:
        """Raises a `ValueError` that names all that differs from the recording."""
        identity = self.identity()
        data = differences_of_data(manifest["data"], identity["data"])
        found = [*differences_of_teacher(manifest["teacher"], identity["teacher"]), *data]
        found += differences_of_settings(manifest["settings"], identity["settings"])
        found = found or self._differences_of_examples()
        if found:
            hint = " If the data set shuffles, switch that off: a recording is shuffled when it is read." if data else ""
            raise ValueError(
                f'"{self.path}" holds another recording. What differs: {"; ".join(found)}.{hint} Record to another path, or delete '
                "that folder."
            )

    def _differences_of_examples(self) -> list[str]:
        try:
            content = (self.path / EXAMPLES).read_bytes()
            if changed := changed_examples(content, self.examples):
                return [f"{function}: it makes something else of the first samples" for function in changed]
            same = same_answers(content, _TEACHER, self._answers())
        except (FileNotFoundError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f'"{self.path / EXAMPLES}" is missing or damaged: it tells whether teacher and functions are those of the '
                "recording. keras_kd.Recording(path) may still open it; to record again, delete the folder."
            ) from error
        return [] if same else ["the teacher computes something else of the first samples, with the same layers and weights"]

    # Recording

    def run(self, *, thorough: bool, verbose: Any) -> None:
        """Makes sure that the recording is there and whole; if `thorough`, that all the data is what was recorded."""
        manifest = self._found(thorough)
        if manifest is not None:
            remove_stale_lock(self.path)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            with lock(self.path):
                manifest = self._found(thorough)  # another process may just have finished it
                if manifest is None:
                    manifest = read_manifest(self.path)
                    teacher_pass = TeacherPass(self.teacher, self.settings, self.example)
                    _Run(self, teacher_pass, manifest or self._begin(teacher_pass), thorough=thorough).run(verbose)
                    return
        if thorough:
            _Run(self, None, manifest, thorough=False).run(verbose)

    def _found(self, thorough: bool) -> dict[str, Any] | None:
        """The manifest of a recording that is complete and not damaged."""
        manifest = read_manifest(self.path)
        if manifest is None:
            others = (
                [file.name for file in self.path.iterdir() if file.name not in (".lock", EXAMPLES)] if self.path.exists() else []
            )
            if [name for name in others if not name.endswith(".part")]:
                raise ValueError(
                    f'`path` must be a new or empty folder, or a recording. Received: path="{self.path}" with {sorted(others)[0]} '
                    "in it and no manifest.json."
                )
            return None
        self.check(manifest)
        is_whole = manifest["complete"] and not suspicious(self.path, manifest["shards"], thorough=thorough)
        return manifest if is_whole else None

    def _begin(self, teacher_pass: TeacherPass) -> dict[str, Any]:
        seed = [Field("seed", "int32", (2,))] if self.augmented else []
        layout = Layout(self.source.fields, [*seed, *teacher_pass.fields], self.settings["views"])
        chosen = self.samples_per_shard or max(1, min(_SHARD_SAMPLES, _SHARD_BYTES // max(layout.size, 1)))
        write_atomically(self.path / EXAMPLES, save_examples({**self.examples, _TEACHER: self._answers()}))
        manifest = {
            "format": FORMAT, "version": VERSION, "complete": False, "num_samples": 0, **self.identity(),
            "structure": teacher_pass.structure,
            "encodings": [vars(encoding) for encoding in teacher_pass.encodings],
            "layout": layout.get_config(), "samples_per_shard": chosen, "shards": [],
        }  # fmt: skip
        write_manifest(self.path, manifest)
        return manifest


class _Run:
    """One run over the data, which compares it with the shards that are there and writes those that are not.

    Without a `teacher_pass` it compares only, and leaves the folder alone.
    """

    def __init__(self, recorder: Recorder, teacher_pass: TeacherPass | None, manifest: dict[str, Any], *, thorough: bool) -> None:
        self.recorder, self.teacher_pass, self.manifest = recorder, teacher_pass, manifest
        self.path, self.shards = recorder.path, manifest["shards"]
        self.layout = Layout.from_config(manifest["layout"])
        self.length = manifest["samples_per_shard"]
        self.thorough = thorough
        damaged = suspicious(self.path, self.shards, thorough=thorough) if teacher_pass else []
        self.wanted = {index for index, shard in enumerate(self.shards) if shard["file"] in damaged}
        self.position = 0
        self.hash = hashlib.sha256()
        self.writer: ShardWriter | None = None

    def run(self, verbose: Any) -> None:
        for left_over in self.path.glob("*.part") if self.teacher_pass else ():
            left_over.unlink()
        title = "Recording" if self.teacher_pass else "Comparing"
        try:
            with Progress(self.recorder.source.expected_samples, title=title, verbose=verbose) as progress:
                for leaves in self.recorder.source:
                    self._add(leaves)
                    progress.advance(len(leaves[0]))
                    if self.teacher_pass and self.manifest["complete"] and not self.wanted and not self.thorough:  # mended
                        return
            if self.position % self.length:
                self._finish_shard()
        finally:
            if self.writer is not None:
                self.writer.discard()
        if self.position != sum(shard["samples"] for shard in self.shards) or self.wanted:
            self._other_data(f"it ends after {self.position} samples")
        if not self.manifest["complete"]:
            self.manifest.update(complete=True, num_samples=self.position)
            self.manifest["data"]["spread"] = self.recorder.spread  # of the data that was read to its end
            write_manifest(self.path, self.manifest)

    def _is_wanted(self, shard: int) -> bool:
        return shard in self.wanted or (shard >= len(self.shards) and not self.manifest["complete"])

    def _add(self, leaves: list[Any]) -> None:
        """Writes a batch into the shards that it belongs to; the teacher runs if one of them is wanted."""
        sample = pack(self.layout.sample, [as_array(leaf) for leaf in leaves])
        end = self.position + len(sample)
        shards = range(self.position // self.length, (end - 1) // self.length + 1)
        views = self._views(leaves) if any(map(self._is_wanted, shards)) else None
        begin = self.position
        for shard in shards:
            stop = min(end, (shard + 1) * self.length)
            rows = slice(self.position - begin, stop - begin)
            self.hash.update(sample[rows].data)
            if views is not None and self._is_wanted(shard):
                self.writer = self.writer or ShardWriter(self.path / _shard_name(shard))
                self.writer.write(np.concatenate([sample[rows], views[rows]], axis=1))
            self.position = stop
            if stop == (shard + 1) * self.length:
                self._finish_shard()

    def _views(self, leaves: list[Any]) -> np.ndarray:
        """The bytes of all views of a batch."""
        recorder, teacher_pass, count = self.recorder, self.teacher_pass, len(leaves[0])
        if teacher_pass is None:
            raise RuntimeError("Nothing is recorded without a teacher.")
        flat = leaves[: recorder.inputs]
        where = f"samples {self.position} to {self.position + count - 1}"
        seeds = view_seeds(recorder.settings["seed"], self.position, count, self.layout.views)
        found = []
        for view in range(self.layout.views):
            arrays = teacher_pass(recorder._view(flat, seeds[:, view]), where)
            found.append(pack(self.layout.view, [seeds[:, view], *arrays] if recorder.augmented else arrays))
        return np.concatenate(found, axis=1)

    def _finish_shard(self) -> None:
        """Compares the data with a shard that was there; closes and registers one that was not."""
        shard, source = (self.position - 1) // self.length, self.hash.hexdigest()
        first = shard * self.length
        self.hash = hashlib.sha256()
        known = self.shards[shard] if shard < len(self.shards) else None
        if known is not None and (known["source"] != source or known["samples"] != self.position - first):
            self._other_data(
                f"inputs, labels or weights of samples {first} to {self.position - 1} are not those of {known['file']}"
            )
        if self.writer is None:
            return
        described = {"file": self.writer.path.name, "samples": self.position - first, "source": source}
        writer, self.writer = self.writer, None
        described |= writer.close()
        self.shards[shard : shard + 1] = [described]
        self.wanted.discard(shard)
        write_manifest(self.path, self.manifest)

    def _other_data(self, what: str) -> None:
        raise ValueError(
            f'The data is not what "{self.path}" was begun with: {what}. A recording needs the same samples in the same order in '
            "every call: switch off shuffling (`.shuffle`, `shuffle_files`) and random augmentation in the data set. Shuffle when "
            "reading: recording.dataset(shuffle=True). To record this data, choose another path, or delete that folder."
        )


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.tfrecord"
