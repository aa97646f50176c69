"""How do samples become bytes on disk and tensors again? Records of fixed length in shards that appear whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

MANIFEST, LOCK = "manifest.json", ".lock"
FORMAT, VERSION = "keras_kd recording", 2
# decode_raw and bitcast know these; strings and variants have no fixed length.
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
           "float64", "complex64", "complex128")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """One tensor of a sample.

    Attributes:
        name: what messages call it: `x`, `y["digit"]`.
        dtype: as it is stored.
        shape: of one sample.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in a record."""
        return int(tf.as_dtype(self.dtype).size * math.prod(self.shape))

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Turns `(batch, ...)` into bytes `(batch, size)`."""
        if not self.size:
            return np.zeros((len(array), 0), np.uint8)
        return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)

    def unpack(self, rows: Any) -> Any:
        """Turns bytes `(batch, size)` back into a tensor `(batch, ...)`."""
        batch = rows.shape[0] or -1
        dtype = tf.as_dtype(self.dtype)
        if dtype == tf.bool:
            return tf.reshape(tf.cast(rows, tf.bool), (batch, *self.shape))
        if not self.size:
            return tf.zeros((tf.shape(rows)[0], *self.shape), dtype)
        if dtype.size > 1:
            rows = tf.reshape(rows, (batch, self.size // dtype.size, dtype.size))  # (batch, values, bytes of a value)
        return tf.reshape(tf.bitcast(rows, dtype), (batch, *self.shape))


def field_of(name: str, dtype: Any, shape: Any) -> Field:
    """A `Field`.

    Raises:
        TypeError: for a dtype without a fixed length.
        ValueError: for an unknown length of an axis.
    """
    dtype = tf.as_dtype(dtype).name
    if dtype not in _DTYPES:
        raise TypeError(f"A recording holds numbers. Received: {name} of dtype {dtype}. Turn it into numbers in the data set.")
    if any(length is None for length in shape):
        raise ValueError(f"A recording needs samples of one shape. Received: {name} of shape {tuple(shape)}, where None is free.")
    return Field(name, dtype, tuple(int(length) for length in shape))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a record holds: a sample, and for each of its views what the teacher said.

    Attributes:
        sample: the fields that are stored once: inputs, labels, sample weights.
        view: the fields that are stored for each view.
        views: number of views.
    """

    sample: list[Field]
    view: list[Field]
    views: int

    @property
    def sample_size(self) -> int:
        """Bytes of the first part."""
        return sum(field.size for field in self.sample)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self.sample_size + self.views * self.view_size

    @property
    def view_size(self) -> int:
        """Bytes of one view."""
        return sum(field.size for field in self.view)

    def unpack(self, records: Any, view: Any) -> tuple[list[Any], list[Any]]:
        """Decodes a batch of records.

        Args:
            records: strings `(batch,)`.
            view: which view, an int for all or a tensor `(batch,)`.

        Returns:
            The tensors of the sample and of the view, in the order of the fields.
        """
        rows = tf.reshape(tf.io.decode_raw(records, tf.uint8), (records.shape[0] or -1, self.size))
        sample, views = rows[:, : self.sample_size], rows[:, self.sample_size :]
        if isinstance(view, int):
            chosen = views[:, view * self.view_size : (view + 1) * self.view_size]
        else:
            stacked = tf.reshape(views, (rows.shape[0] or -1, self.views, self.view_size))
            chosen = tf.gather(stacked, view, batch_dims=1)  # (batch, view_size)
        return _split(sample, self.sample), _split(chosen, self.view)

    def get_config(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Layout":
        """From JSON."""
        parts = {
            key: [Field(field["name"], field["dtype"], tuple(field["shape"])) for field in config[key]]
            for key in ("sample", "view")
        }
        return cls(**parts, views=config["views"])


def pack(fields: list[Field], arrays: list[np.ndarray]) -> np.ndarray:
    """Lays the bytes of all fields side by side: `(batch, size)`."""
    return np.concatenate([field.pack(array) for field, array in zip(fields, arrays, strict=True)], axis=1)


def _split(rows: Any, fields: list[Field]) -> list[Any]:
    tensors, begin = [], 0
    for field in fields:
        tensors.append(field.unpack(rows[:, begin : begin + field.size]))
        begin += field.size
    return tensors


# Nested structures as JSON, with the index of each leaf in `keras.tree.flatten` order


def skeleton(tree: Any) -> Any:
    """A nested structure as JSON."""
    leaves = keras.tree.flatten(tree)
    return _as_json(keras.tree.pack_sequence_as(tree, list(range(len(leaves)))))


def _as_json(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {"dict": [[key, _as_json(value)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list" if isinstance(tree, list) else "tuple": [_as_json(value) for value in tree]}
    return tree


def pack_as(described: Any, leaves: list[Any], *, lists: bool = True) -> Any:
    """Undoes `skeleton`; without `lists` they become tuples, since tf.data takes a list for a tensor."""
    if isinstance(described, dict):
        if "dict" in described:
            return {key: pack_as(value, leaves, lists=lists) for key, value in described["dict"]}
        values = [pack_as(value, leaves, lists=lists) for value in next(iter(described.values()))]
        return values if "list" in described and lists else tuple(values)
    return leaves[described]


def leaves_of(described: Any) -> list[int]:
    """Indices of the leaves of a `skeleton`."""
    if not isinstance(described, dict):
        return [described]
    values = [value for _, value in described["dict"]] if "dict" in described else next(iter(described.values()))
    return [leaf for value in values for leaf in leaves_of(value)]


# Files


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever happens to process and machine."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move_into_place(part, path)


def move_into_place(part: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a file whose content is on disk, and sees that the new name is too."""
    os.replace(part, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def file_hash(path: pathlib.Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard under a temporary name; `close` moves it into place."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.writer = tf.io.TFRecordWriter(os.fspath(self.part))

    def write(self, rows: np.ndarray) -> None:
        """Writes one record per row of bytes."""
        for row in rows:
            self.writer.write(row.tobytes())

    def close(self) -> dict[str, Any]:
        """Puts the shard on disk and in place; returns its size and hash."""
        self.writer.close()
        with open(self.part, "rb+") as file:
            os.fsync(file.fileno())
        described = {"bytes": self.part.stat().st_size, "sha256": file_hash(self.part)}
        move_into_place(self.part, self.path)
        return described

    def discard(self) -> None:
        """Leaves nothing."""
        self.writer.close()
        self.part.unlink(missing_ok=True)


def read_manifest(path: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of the recording at `path`; None if there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        text = (path / MANIFEST).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(text)
        version = manifest["version"] if manifest["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise ValueError(f'"{path / MANIFEST}" is no manifest of a recording. Delete the folder "{path}" and record again.')
    if version < VERSION:
        raise ValueError(
            f'The recording "{path}" is of format {version}; this keras_kd reads {VERSION}. Delete that folder and record again.'
        )
    if version > VERSION:
        raise ValueError(
            f'The recording "{path}" is of format {version}; this keras_kd reads up to {VERSION}. Install a newer '
            "keras_kd, or record again."
        )
    return dict(manifest)


def write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, atomically."""
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())


def suspicious(path: pathlib.Path, shards: list[dict[str, Any]], *, thorough: bool = False) -> list[str]:
    """Names of the shards that are missing or of another size; with `thorough`, or of another content."""
    found = []
    for shard in shards:
        file = path / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"] or (thorough and file_hash(file) != shard["sha256"]):
            found.append(shard["file"])
    return found


class CheckedFiles:
    """Compares files with their hashes, each when it is first read: TensorFlow's own errors do not say which file is damaged."""

    def __init__(self, path: pathlib.Path, shards: list[dict[str, Any]]) -> None:
        self.path = path
        self.hashes = {shard["file"]: shard["sha256"] for shard in shards}
        self.good: set[str] = set()
        self.lock = threading.Lock()

    def checked(self, name: Any) -> Any:
        """The name of a file, as a tensor, after a look at the file."""
        result = tf.numpy_function(self._check, [name], tf.string, stateful=False)
        return tf.ensure_shape(result, ())

    def _check(self, name: bytes) -> bytes:
        file = pathlib.Path(os.fsdecode(name))
        with self.lock:
            known = file.name in self.good
        if not known:
            if not file.is_file() or file_hash(file) != self.hashes[file.name]:
                raise damage_error(self.path, [file.name])
            with self.lock:
                self.good.add(file.name)
        return name


def damage_error(path: pathlib.Path, names: list[str]) -> ValueError:
    """The error for damaged shards."""
    return ValueError(
        f'Damaged or missing files of the recording "{path}": {", ".join(names)}. Call record_teacher(..., verify=True) with the '
        "same arguments: it records just these again. Or leave them out: dataset(skip_damaged=True)."
    )


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from recording into `path`.

    The kernel drops the lock with the process, so that a killed one blocks nobody. The file says who holds it, for people and
    for file systems that several machines share without sharing locks.

    Raises:
        RuntimeError: if another process records there.
    """
    file = path / LOCK
    handle = _open_locked(file)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(handle)


def remove_stale_lock(path: pathlib.Path) -> None:
    """Removes what a process that was killed at its very end has left."""
    if (path / LOCK).exists():
        with contextlib.suppress(OSError, RuntimeError), lock(path):
            pass


def _open_locked(file: pathlib.Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _try_lock(handle)
            owner = _owner(file)
            if not free or owner.get("host", socket.gethostname()) != socket.gethostname():
                who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"
                raise RuntimeError(
                    f'"{file.parent}" is being recorded by {who}. Wait until it has finished and call again: its '
                    "recording is then opened. Or record to another path. If that process has died on another machine, delete "
                    f"{file}."
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(file)):  # not one that its holder has just deleted
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(file: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):  # fresh, or just being written
        return {}
