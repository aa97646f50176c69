"""The architecture: who may import whom, and what every file owes its reader."""

import ast
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import keras_kd

ROOT = pathlib.Path(keras_kd.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
# Each floor imports from itself and from those below.
FLOORS = [
    {"_version", "_backend", "_tunable", "_progress", "_batching", "_lineage"},
    {"_outputs", "_mistakes", "_taps", "_calls", "_moments", "_tfmot", "schedules"},
    {"layers", "losses", "metrics", "regularizers", "quantized"},
    {"_terms", "teachers", "recording", "callbacks"},
    {"_finite", "_distribute", "_logs", "distiller", "mutual", "_agreement", "_files", "_pages", "_samples", "_litert", "export"},
    {"_macs", "analysis", "profile", "report"},
    {"surgery"},
    {"compression"},
    {"demo", "tuner"},
    {"cli", "__main__"},
]


def floor_of(name):
    return next(index for index, floor in enumerate(FLOORS) if name in floor)


def imports_of(path):
    """Names of the modules of keras_kd that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keras_kd":
            inner = node.module.split(".")[1:]
            yield from [inner[0]] if inner else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", [p for p in MODULES if p != ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards_only(path):
    relative = path.relative_to(ROOT).with_suffix("")
    own = floor_of(relative.parts[0])
    for name in imports_of(path):
        assert floor_of(name) <= own, f"{relative} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_question_it_answers_and_stays_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert len(text.splitlines()) <= 520
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "raise, do not assert"


def test_only_one_module_imports_tf_mot():
    found = [str(path.relative_to(ROOT)) for path in MODULES if '"tensorflow_model_optimization"' in path.read_text()]
    assert found == ["_tfmot.py"]


def public_objects():
    for info in pkgutil.walk_packages([str(ROOT)], "keras_kd."):
        if any(part.startswith("_") for part in info.name.split(".")[1:]):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            own = not name.startswith("_") and getattr(value, "__module__", None) == info.name
            if own and (inspect.isclass(value) or inspect.isfunction(value)):
                yield pytest.param(value, id=f"{info.name}.{name}")


@pytest.mark.parametrize("value", list(public_objects()))
def test_everything_public_is_documented_and_annotated(value):
    assert inspect.getdoc(value)
    function = value.__init__ if inspect.isclass(value) else value
    if inspect.isfunction(function):
        for parameter in list(inspect.signature(function).parameters.values())[inspect.isclass(value) :]:
            assert parameter.annotation is not inspect.Parameter.empty, parameter.name
