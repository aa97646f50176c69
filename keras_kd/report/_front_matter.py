"""How does a card begin? The metadata of a model card as YAML."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # which YAML does not read as text
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")  # which JSON lets stand, and YAML does not


def front_matter(values: Mapping[str, Any]) -> str:
    """The block of YAML at the top of a card.

    Args:
        values: what it holds: text, numbers, None, and lists and dicts of these.

    Raises:
        TypeError: for values of other types; the message names the field.
    """
    return "\n".join(["---", *_lines(values, 0, "metadata"), "---", ""])


def _lines(value: Any, depth: int, where: str) -> list[str]:
    pad, found = "  " * depth, []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f'{where}["{key}"]'
            if isinstance(inner, Mapping | list | tuple) and inner:
                found += [f"{pad}{_key(key, where)}:", *_lines(inner, depth + 1, place)]
            else:
                found.append(f"{pad}{_key(key, where)}: {_scalar(inner, place)}")
        return found
    for index, inner in enumerate(value):
        place = f"{where}[{index}]"
        if isinstance(inner, Mapping | list | tuple) and inner:
            first, *rest = _lines(inner, depth + 1, place)
            found += [f"{pad}- {first.lstrip()}", *rest]
        else:
            found.append(f"{pad}- {_scalar(inner, place)}")
    return found


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"`{where}` must have text as names. Received: {key!r} of type {type(key).__name__}.")
    return key if _PLAIN_KEY.fullmatch(key) and key.lower() not in _WORDS else _scalar(key, where)


def _scalar(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _UNSAFE.sub(lambda one: f"\\u{ord(one[0]):04x}", json.dumps(value, ensure_ascii=False))
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        text = repr(float(value))
        return text if "." in text else text.replace("e", ".0e")  # YAML takes 1e-05 for text
    if value is None or isinstance(value, bool | int | Mapping | list | tuple):  # of these, only empty ones get here
        return json.dumps(value)
    raise TypeError(
        f"`{where}` must be text, a number, or a list or dict of these. Received: {value!r} of type {type(value).__name__}."
    )
