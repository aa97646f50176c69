"""How does a teacher teach without being there? `record_teacher` runs it once; a `Recording` hands out what it said, as tf.data."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _lineage
from keras_kd._progress import check_verbose
from keras_kd.recording._encodings import Encoding
from keras_kd.recording._fingerprints import changed_examples
from keras_kd.recording._recorder import EXAMPLES, Recorder, augmented_example, augmenter, compiled
from keras_kd.recording._shards import MANIFEST, CheckedFiles, Layout, damage_error, leaves_of, pack_as, read_manifest, suspicious
from keras_kd.recording._sources import ROLES, Source, as_folder, as_holder, as_names, check_count, check_settings, is_int
from keras_kd.teachers import RecordedBatch

__all__ = ["RecordedBatch", "Recording", "record_teacher"]

_BLOCK = 64  # samples that are decoded together where single samples are asked for
_SHUFFLE_SAMPLES, _SHUFFLE_BYTES = 16384, 256 * 2**20


def record_teacher(
    teacher: Any,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    layer_names: Sequence[str] = (),
    top_k: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    augment: Any = None,
    views: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    samples_per_shard: int | None = None,
    teacher_preprocessing: Any = None,
    verify: bool = False,
    verbose: Literal["auto"] | int = "auto",
) -> "Recording":
    """Runs a teacher once over a data set, and stores the data and what the teacher said of it.

    Every later epoch, trial and run reads that instead of running the teacher. Killed at any moment and called again with the
    same arguments, it goes on after the last complete shard, and the result is the same to the byte. Called for a complete
    recording it opens it, without a pass of the teacher, after checking that teacher, data and settings are those recorded: the
    teacher's architecture, weights and answers to the first samples (at most 8, or a batch); the structure, dtypes, shapes and
    number of the data, as far as it is known, and the first 8 samples. If arrays were recorded and are given again, so are 64
    samples at equal distances and the last one. Of a `tf.data.Dataset` nothing after the first 8 samples is compared, and of arrays
    nothing between those: where inputs, labels or weights may have changed there, pass `verify=True`, which compares them all.

    Softmax and sigmoid outputs are stored as logits, so that small probabilities survive half precision. With `top_k`, of each
    row the log-probabilities log p of the k largest classes are stored, and every other class is read as

    ```
    log((1 - sum of the k largest p) / (classes - k))
    ```

    Args:
        teacher: a built Keras model, or a holder of `keras_kd.teachers`.
        dataset: a batched `tf.data.Dataset` of `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, nested as Keras allows and in
            an order that does not change; or the same in arrays, which are read slice by slice (`np.load(mmap_mode="r")`).
            Samples must have one shape; they are stored in their own dtype.
        path: a folder, which is created.
        layer_names: names or paths of the teacher's layers whose outputs are recorded too, for feature losses.
        top_k: number of classes to keep, for large vocabularies. None keeps all.
        dtype: of the stored outputs and features, `"float16"` or `"float32"`.
        augment: function of one sample's `x` and of `seed`, an int32 tensor of shape `(2,)` for the `tf.random.stateless_*`
            functions. The teacher sees what it returns, and reading replays it, so that the student sees the same. Stored are
            the inputs as they came, once, and the seeds.
        views: number of views of each sample, each with its own seed.
        batch_size: samples per batch, for arrays.
        seed: where the seeds of the views come from.
        samples_per_shard: samples per file. None chooses at most 8192 and 64 MB. A recording that exists keeps its own.
        teacher_preprocessing: callable that turns a batch of inputs into the teacher's.
        verify: whether to read an existing recording and all of `dataset`, to compare every sample's inputs, labels and weights,
            and to record again the shards whose content is damaged; for the others the teacher does not run. Missing shards and
            those of another size are found, and recorded again, without.
        verbose: 0 is silent; 1 or `"auto"` shows progress.

    Returns:
        The complete `Recording`.

    Raises:
        TypeError: for a teacher that is no model, or data that are no dense numbers.
        ValueError: for an infinite or unbatched data set, outputs that are not finite or do not fit into `dtype`, logits of
            which rounding to float16 leaves too little (a warning where it leaves enough to go on), an augmentation
            that ignores its seed, settings out of range, or a `path` that holds something else (the message says what differs).
        RuntimeError: if another process records to `path`.

    Example:

    >>> import tempfile
    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> x, y = np.ones((10, 4), "float32"), np.arange(10) % 3
    >>> folder = tempfile.TemporaryDirectory()
    >>> recording = keras_kd.record_teacher(teacher, (x, y), folder.name, verbose=0)
    >>> recording.num_samples, recording.kinds
    (10, ['logits'])
    >>> batch, labels = next(iter(recording.dataset(batch_size=5, shuffle=True)))
    >>> batch.inputs.shape, batch.outputs.shape, labels.shape
    (TensorShape([5, 4]), TensorShape([5, 3]), TensorShape([5]))
    >>> folder.cleanup()
    """
    settings = {"layer_names": as_names(layer_names), "top_k": top_k, "dtype": dtype, "views": views, "seed": seed}
    check_settings(settings, augment, batch_size, samples_per_shard)
    check_verbose(verbose)
    holder = as_holder(teacher, teacher_preprocessing)
    folder = as_folder(path)
    source = Source(dataset, batch_size)
    recorder = Recorder(holder, source, folder, augment=augment, settings=settings, samples_per_shard=samples_per_shard)
    recorder.run(thorough=verify, verbose=verbose)
    recording = Recording(folder, augment=augment)
    if (model := getattr(holder, "original", None)) is not None:
        _lineage.remember_speaker(recording, model)
    return recording


class Recording:
    """What a teacher said of a data set, on disk.

    The folder is all there is: it can be moved, and read by other processes and machines, several at a time.

    Args:
        path: folder that `record_teacher` wrote.
        augment: the function that it was recorded with, if it was.

    Raises:
        FileNotFoundError: if there is no recording at `path`.
        ValueError: if it is not complete, or `augment` is missing or another one.

    Example:

    >>> import tempfile
    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="expert")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = keras_kd.record_teacher(teacher, np.ones((10, 4), "float32"), folder, verbose=0)
    ...     recording = keras_kd.Recording(folder)
    ...     recording.verify(), len(recording), recording.teacher_name
    ([], 10, 'expert')
    """

    def __init__(self, path: str | os.PathLike[str], *, augment: Any = None) -> None:
        self.path = as_folder(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise FileNotFoundError(
                f'No recording at "{self.path}". `path` must be a folder that keras_kd.record_teacher wrote: it has a {MANIFEST}.'
            )
        if not manifest["complete"]:
            done = sum(shard["samples"] for shard in manifest["shards"])
            raise ValueError(
                f'The recording "{self.path}" is not complete: {done} samples so far. Call record_teacher again with the same '
                "arguments: it goes on from there."
            )
        self._manifest = manifest
        self._layout = Layout.from_config(manifest["layout"])
        self._encodings = [Encoding(**{**config, "shape": tuple(config["shape"])}) for config in manifest["encodings"]]
        self._structure = manifest["structure"]
        self._sources = manifest["data"]["structure"]
        self._files = CheckedFiles(self.path, manifest["shards"])
        self._augment = augment and compiled(augment)
        self._check_augment()

    # What it holds

    @property
    def teacher_name(self) -> str:
        """The teacher's name."""
        return str(self._manifest["teacher"]["name"])

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Layers whose outputs were recorded."""
        return tuple(self._manifest["settings"]["layer_names"])

    @property
    def kinds(self) -> list[str | None]:
        """What each output holds as it is read, in `keras.tree.flatten` order: `"logits"`, or None if that was not known."""
        return [encoding.kind for encoding in self._output_encodings]

    @property
    def num_samples(self) -> int:
        """Number of samples, whatever the views."""
        return int(self._manifest["num_samples"])

    @property
    def views(self) -> int:
        """Number of views of each sample."""
        return self._layout.views

    @property
    def top_k(self) -> int | None:
        """Number of classes that were kept; None for all."""
        top_k = self._manifest["settings"]["top_k"]
        return None if top_k is None else int(top_k)

    @property
    def dtype(self) -> str:
        """Of the stored outputs; they are read in float32."""
        return str(self._manifest["settings"]["dtype"])

    @property
    def bytes(self) -> int:
        """Size on disk."""
        others = [self.path / MANIFEST, self.path / EXAMPLES]
        return sum(shard["bytes"] for shard in self._manifest["shards"]) + sum(f.stat().st_size for f in others if f.is_file())

    @property
    def output_structure(self) -> Any:
        """The teacher's outputs of a batch, as `tf.TensorSpec`s nested as it gave them."""
        specs = [tf.TensorSpec((None, *e.shape), "float32" if e.is_float else e.dtype) for e in self._output_encodings]
        return pack_as(self._structure["outputs"], specs)

    @property
    def feature_structure(self) -> dict[str, Any]:
        """The recorded layers' outputs of a batch, as `tf.TensorSpec`s by name."""
        encodings = self._encodings[len(self._output_encodings) :]
        specs = [tf.TensorSpec((None, *e.shape), "float32" if e.is_float else e.dtype) for e in encodings]
        return dict(pack_as(self._structure["features"], specs))

    def __len__(self) -> int:
        return self.num_samples * self.views

    def __repr__(self) -> str:
        parts = [f"teacher={self.teacher_name!r}", f"num_samples={self.num_samples}", f"views={self.views}"]
        parts += [f"layer_names={self.layer_names}"] if self.layer_names else []
        parts += [f"top_k={self.top_k}"] if self.top_k else []
        size = f"{self.bytes / 1e6:,.1f} MB" if self.bytes >= 1e6 else f"{self.bytes / 1e3:.1f} kB"
        return f"<Recording {str(self.path)!r}: {', '.join(parts)}, dtype={self.dtype!r}, {size}>"

    @property
    def _output_encodings(self) -> list[Encoding]:
        return self._encodings[: len(leaves_of(self._structure["outputs"]))]

    # Reading

    def verify(self) -> list[str]:
        """Reads all files in full.

        Returns:
            Names of the shards that are missing or damaged. `record_teacher(..., verify=True)` records just those again.
        """
        return suspicious(self.path, self._manifest["shards"], thorough=True)

    def dataset(
        self,
        batch_size: int | None = None,
        *,
        shuffle: bool | int = False,
        seed: int | None = None,
        view: int | None = None,
        targets: Literal["distiller", "teacher"] = "distiller",
        drop_remainder: bool = False,
        skip_damaged: bool = False,
    ) -> tf.data.Dataset:
        """Streams the recording.

        Memory does not grow with the recording: at most 256 MB, or 16384 samples, wait in the shuffle buffer. Without shuffling
        the order is the recorded one, view after view. Each file is compared with its hash when it is first opened.

        Args:
            batch_size: None gives single samples, to be shuffled and batched by the caller.
            shuffle: True shuffles the files and a buffer of samples, anew in each epoch; an int is the buffer's size.
            seed: of the shuffling; None takes TensorFlow's.
            view: which view of each sample; None for all of them, `num_samples * views` elements an epoch.
            targets: `"distiller"` gives what a Distiller trains on; `"teacher"` gives pairs for `model.fit` with a distillation
                loss as the loss.
            drop_remainder: whether to leave out a last smaller batch.
            skip_damaged: whether to leave out damaged files, with a warning, instead of stopping. It reads all files first.

        Returns:
            A data set of `(RecordedBatch,)`, `(RecordedBatch, y)` or `(RecordedBatch, y, sample_weight)`; for `targets="teacher"`
            of `(x, outputs)`, or `(x, outputs, sample_weight)` if weights were recorded. Lists have become tuples: tf.data takes
            a list for a tensor.

        Raises:
            ValueError: for arguments out of range, or if files are missing or have another size. While iterating, a file of other
                content is a `tf.errors.InvalidArgumentError` that names it.
        """
        self._check_reading(batch_size, shuffle, view, targets)
        shards = self._usable_shards(skip_damaged)
        views = range(self.views) if view is None else [view]
        count = sum(shard["samples"] for shard in shards) * len(views)
        files = [(os.fspath(self.path / shard["file"]), index) for index in views for shard in shards]
        records = self._records(files, shuffle, count, seed)
        fixed = 0 if self.views == 1 else view  # None: the view comes with the record

        def decoded(record: Any, index: Any = None) -> Any:
            parts = self._parts(*self._layout.unpack(record, index if fixed is None else fixed))
            return parts if self._augment else self._element(parts, targets)

        singly = batch_size is None or self._augment is not None
        data = records.batch(_BLOCK if singly else batch_size, drop_remainder=drop_remainder and not singly)
        data = data.map(decoded, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.unbatch() if singly else data
        if self._augment is not None:
            data = data.map(lambda parts: self._element(parts, targets), num_parallel_calls=tf.data.AUTOTUNE)
            data = data if batch_size is None else data.batch(batch_size, drop_remainder=drop_remainder)
        if batch_size is not None:
            count = count // batch_size if drop_remainder else -(-count // batch_size)
        # A file's samples cannot be divided among workers without the count of them going wrong.
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        return data.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE).with_options(options)

    def _records(self, files: list[tuple[str, int]], shuffle: bool | int, count: int, seed: int | None) -> tf.data.Dataset:
        """Serialised records, with their view if that differs."""
        names, views = [name for name, _ in files], np.asarray([view for _, view in files], "int32")
        several = len(set(views.tolist())) > 1

        def read(name: Any, view: Any) -> tf.data.Dataset:
            records = tf.data.TFRecordDataset(self._files.checked(name))
            return tf.data.Dataset.zip(records, tf.data.Dataset.from_tensors(view).repeat()) if several else records

        sources = tf.data.Dataset.from_tensor_slices((names, views))
        if shuffle is False or not files:
            return sources.flat_map(read) if files else sources.flat_map(read).take(0)
        default = min(_SHUFFLE_SAMPLES, _SHUFFLE_BYTES // max(self._layout.size, 1))
        buffer = default if shuffle is True else shuffle
        sources = sources.shuffle(len(files), seed=seed, reshuffle_each_iteration=True)
        records = sources.interleave(read, cycle_length=min(8, len(files)), block_length=16)
        return records.shuffle(max(1, min(buffer, count)), seed=seed, reshuffle_each_iteration=True)

    def _parts(self, sample: list[Any], view: list[Any]) -> dict[str, Any]:
        """The decoded tensors in their structures."""
        parts, begin = {}, 0
        for role, described in self._sources.items():
            parts[role] = pack_as(described, sample[begin:], lists=False)
            begin += len(leaves_of(described))
        if self._augment is not None:
            parts["seed"], view = view[0], view[1:]
        tensors, begin = [], 0
        for encoding in self._encodings:
            stored = view[begin : begin + len(encoding.fields)]
            tensors.append(encoding.decode(stored))
            begin += len(stored)
        outputs = len(self._output_encodings)
        parts["outputs"] = pack_as(self._structure["outputs"], tensors[:outputs], lists=False)
        parts["features"] = pack_as(self._structure["features"], tensors[outputs:], lists=False)
        return parts

    def _element(self, parts: dict[str, Any], targets: str) -> Any:
        x = self._augment(parts["x"], parts["seed"]) if self._augment else parts["x"]
        rest = tuple(parts[role] for role in ROLES[1:] if role in parts)
        if targets == "teacher":
            return (x, parts["outputs"], *rest[1:])
        return (RecordedBatch(inputs=x, outputs=parts["outputs"], features=parts["features"]), *rest)

    def _usable_shards(self, skip_damaged: bool) -> list[dict[str, Any]]:
        shards = self._manifest["shards"]
        damaged = suspicious(self.path, shards, thorough=skip_damaged)
        if not damaged:
            return list(shards)
        if not skip_damaged:
            raise damage_error(self.path, damaged)
        kept = [shard for shard in shards if shard["file"] not in damaged]
        lost = sum(shard["samples"] for shard in shards if shard["file"] in damaged)
        warnings.warn(
            f'Damaged files of the recording "{self.path}" are left out: {", ".join(damaged)}, {lost} of {self.num_samples} '
            "samples. record_teacher(..., verify=True) with the same arguments records them again.",
            stacklevel=3,
        )
        return kept

    def _check_augment(self) -> None:
        recorded = "augment" in self._manifest["settings"]["functions"]
        if recorded and self._augment is None:
            raise ValueError(
                f'"{self.path}" was recorded with an augmentation, which must be replayed. Pass it: '
                "Recording(path, augment=your_function)."
            )
        if self._augment is not None and not recorded:
            raise ValueError(
                f'"{self.path}" was recorded without an augmentation: another view than the teacher\'s cannot be learnt from. '
                "Leave out augment=, or record again with it."
            )
        if recorded and self._manifest["shards"][0]["file"] not in suspicious(self.path, self._manifest["shards"][:1]):
            self._replay_first()

    def _replay_first(self) -> None:
        """Compares what `augment` makes of the first samples with what was recorded."""
        with np.load(self.path / EXAMPLES) as file:
            count = len(file["augment-0"])
        shard = self.path / self._manifest["shards"][0]["file"]
        records = list(tf.data.TFRecordDataset(os.fspath(shard)).take(count))
        parts = self._parts(*self._layout.unpack(tf.stack(records), 0))
        fields = self._layout.sample[: len(leaves_of(self._sources["x"]))]
        augmented = augmenter(self._augment, self._sources["x"], fields)
        example = augmented_example(augmented, keras.tree.flatten(parts["x"]), parts["seed"].numpy())
        if changed_examples((self.path / EXAMPLES).read_bytes(), {"augment": example}):
            raise ValueError(
                f'`augment` must be the function that "{self.path}" was recorded with. Received: one that makes something else '
                "of the first samples. Pass the former one, or record again to another path."
            )

    def _check_reading(self, batch_size: Any, shuffle: Any, view: Any, targets: Any) -> None:
        check_count("batch_size", batch_size, none=True)
        if not isinstance(shuffle, bool):
            check_count("shuffle", shuffle)
        if view is not None and not (is_int(view) and 0 <= view < self.views):
            raise ValueError(f"`view` must be None or between 0 and {self.views - 1}. Received: view={view!r}.")
        if targets not in ("distiller", "teacher"):
            raise ValueError(f'`targets` must be "distiller" or "teacher". Received: targets={targets!r}.')
