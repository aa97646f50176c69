"""How does a file appear whole or not at all? Checks where it is to be before the work, and moves it there after it."""

import contextlib
import hashlib
import os
import pathlib
import uuid
from typing import Any


def digest(content: bytes) -> str:
    """What tells a content from any other: its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def checked_path(path: Any) -> pathlib.Path:
    """A path to which a file can be written.

    Raises:
        TypeError: if it is no path.
        ValueError: if something else than a file is there, such as a device.
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if it is a folder.
        PermissionError: if the folder cannot be written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be a path. Received: path={path!r} of type {type(path).__name__}.")
    path = pathlib.Path(path)
    target = _target(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f'`path` must lie in a folder that exists. Received: path="{path}". Create "{target.parent}" first.'
        )
    if target.is_dir():
        raise IsADirectoryError(f'`path` must be a file. Received: path="{path}", a folder.')
    if target.exists() and not target.is_file():
        raise ValueError(f'`path` must be a file. Received: path="{path}", which is a device, pipe or socket.')
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f'`path` must lie in a folder that can be written to. Received: path="{path}".')
    return path


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes beside the file, and moves it to its place when it is whole.

    Raises:
        OSError: if it cannot be written; what was at `path` is still there.
    """
    target = _target(path)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # full disks may say so here first
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError):
            raise
        message = f"{error.strerror or error}: {len(content):,} bytes were not written, and what was there before still is"
        raise OSError(error.errno, message, os.fspath(path)) from error


def _target(path: pathlib.Path) -> pathlib.Path:
    """The file itself: a link to it stays one."""
    return pathlib.Path(os.path.realpath(path))
