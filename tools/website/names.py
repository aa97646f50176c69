"""Which names are public, and on which page of the API reference does each stand?"""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import keras_kd


def modules() -> dict[str, ModuleType]:
    """The public modules by their full name, `keras_kd` first: those that it lists, and those that list names themselves."""
    found = sorted(info.name for info in pkgutil.iter_modules(keras_kd.__path__, "keras_kd.") if info.name.split(".")[1][0] != "_")
    own = {name: importlib.import_module(name) for name in found if not name.endswith("__main__")}
    listed = {name: module for name, module in own.items() if name.split(".")[1] in keras_kd.__all__ or hasattr(module, "__all__")}
    return {"keras_kd": keras_kd, **listed}


def names_of(module: ModuleType) -> list[str]:
    """Public names of a module: its `__all__`, or what is defined there; without modules and `__version__`."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        listed += getattr(module, "_OF_TFMOT", ())  # imported when asked for
    values = {name: getattr(module, name) for name in listed if name[0] != "_"}
    return sorted((name for name, value in values.items() if not inspect.ismodule(value)), key=str.lower)


def documented() -> dict[str, Any]:
    """Full name and value of everything public; a name of `keras_kd` itself comes before the same thing in a module."""
    return {f"{name}.{key}": getattr(module, key) for name, module in modules().items() for key in names_of(module)}


def homes() -> dict[int, str]:
    """Under which full name a thing is described, by its id: things with several names are described once."""
    found: dict[int, str] = {}
    for name, value in documented().items():
        found.setdefault(id(value), name)
    return found


def links() -> dict[str, str]:
    """What a name in a text stands for: full names, names without `keras_kd.`, and names that only one thing has."""
    found: dict[str, str] = {}
    shorts: dict[str, set[str]] = {}
    where = homes()
    for name, value in documented().items():
        home = where[id(value)]
        found |= {name: home, name.removeprefix("keras_kd."): home}
        shorts.setdefault(name.rsplit(".", 1)[1], set()).add(home)
    unique = {short: min(full) for short, full in shorts.items() if len(full) == 1 and short[0].isupper()}
    return unique | found


def target(code: str, known: dict[str, str]) -> str | None:
    """What `code` in a text links to: a name of `links()`, also with arguments (`KDLoss(temperature=4.0)`); None for no link."""
    name = code.split("(")[0]
    sure = "." in name or name[:1].isupper()
    return known.get(name) if sure and not set(code) & set("<>\\|`\n") else None
