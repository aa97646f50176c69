"""How does one keep what surgery reports? As plain JSON."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_kd import _files


class Report:
    """What reports of surgery have in common."""

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns all that the report holds as JSON, and writes it to `path` if there is one.

        Arrays are lists, and numbers that are not finite, which JSON does not know, strings: `"inf"`.
        """
        text = json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)  # type: ignore[call-overload]
        if path is not None:
            _files.write_atomically(_files.checked_path(path), f"{text}\n".encode())
        return text


def _plain(value: Any) -> Any:
    """The same in types that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
