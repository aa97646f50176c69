"""A user's type checker knows what the library takes and gives."""

import inspect
import os
import pathlib
import shutil
import site
import subprocess
import sys
import typing
import venv

import pytest

import keras_kd
from keras_kd import surgery

ROOT = pathlib.Path(keras_kd.__file__).parent
PROGRAM = pathlib.Path(__file__).with_name("user_program.py")


def test_mypy_strict_accepts_a_users_program(tmp_path, request):
    """In an environment where the package is installed, which mypy sees by its marker, py.typed."""
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    shutil.copytree(ROOT, packages / "keras_kd", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # NumPy
    (tmp_path / "mypy.ini").write_text("[mypy]\n")  # none of this project's settings
    shutil.copy(PROGRAM, tmp_path)
    words = ["--strict", "--config-file", "mypy.ini", "--python-executable", str(tmp_path / "venv/bin/python"), PROGRAM.name]
    cache = ["--cache-dir", str(request.config.cache.mkdir("mypy"))] if hasattr(request.config, "cache") else []
    environment = {key: value for key, value in os.environ.items() if key not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, *cache], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Success: no issues found in 1 source file" in done.stdout


@pytest.mark.parametrize("name", sorted(name for name in surgery.__all__ if typing.get_overloads(getattr(surgery, name))))
def test_overloads_take_what_the_function_takes(name):
    function = getattr(surgery, name)
    overloads = typing.get_overloads(function)
    assert len(overloads) == 2
    for one in overloads:
        assert list(inspect.signature(one).parameters) == list(inspect.signature(function).parameters)
