"""Does the library work with the oldest versions that it asks for? Installs the lower bounds of pyproject.toml, and runs tests.

    python tools/check_oldest.py                       # the contracts of all public classes, and a test file of each part
    python tools/check_oldest.py tests/test_export_and_profile.py -x

A requirement `name>=1.2` is installed as `name==1.2`; what has no lower bound, and what these packages need themselves, is the
newest that fits. The environment is kept, and made anew when a bound changes. It takes some minutes and 3 GB.
"""

import argparse
import json
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-oldest"
EXTRAS = ("tuner", "onnx")  # what users install; the tools of developers are taken as they come
TOOLS = ("pytest", "pytest-xdist")
TESTS = (
    *("import", "contract_losses", "contract_callbacks", "contract_layers", "distiller", "distiller_saving", "recording"),
    *("export_and_profile", "cli", "surgery/test_pruning", "surgery/test_channels", "analysis/test_linear"),
    *("report/test_compare", "tuner/test_hypermodels", "tuner/test_fronts"),
)
# Old packages warn of newer ones beside them.
QUIET = ("-W", "ignore::DeprecationWarning")

_BOUND = re.compile(r"([\w.-]+)(?:\[[\w,.-]+\])?\s*>=\s*([\w.]+)\s*(;.*)?")


def bounds(project: Mapping[str, Any]) -> list[str]:
    """The lower bounds of a project as exact versions, such as `keras==3.12`.

    Args:
        project: the table `project` of a pyproject.toml.

    Raises:
        ValueError: where two requirements give one package different bounds.
    """
    wanted = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    found: dict[str, str] = {}
    for requirement in wanted:
        if match := _BOUND.fullmatch(requirement.strip()):
            name, version, marker = match.groups()
            pinned = f"{name}=={version}{' ' + marker if marker else ''}"
            if found.setdefault(name, pinned) != pinned:
                raise ValueError(f"{name} must have one lower bound. Received: {found[name]} and {pinned}.")
    return list(found.values())


def python_of(environment: pathlib.Path) -> pathlib.Path:
    """The interpreter of an environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(environment: pathlib.Path, pins: Sequence[str]) -> None:
    """Makes the environment, unless it is there with the same versions."""
    note = environment / "bounds.json"
    wanted = {"bounds": list(pins), "python": platform.python_version()}
    if note.exists() and json.loads(note.read_text()) == wanted:
        return
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    target = f"{ROOT}[{','.join(EXTRAS)}]"
    install = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, "--editable", target, *TOOLS], check=True)
    note.write_text(json.dumps(wanted))


def chosen() -> list[str]:
    """Paths of the tests."""
    return [f"tests/{name}.py" if "/" in name else f"tests/test_{name}.py" for name in TESTS]


def check_python(requires: str) -> None:
    """Says so where this is not the oldest Python."""
    if (match := re.fullmatch(r">=(\d+\.\d+)", requires)) and not platform.python_version().startswith(f"{match[1]}."):
        print(
            f"note: this is Python {platform.python_version()}; the oldest supported is {match[1]}: run this script with that one"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs, runs, and returns the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="test files and options of pytest in the place of those chosen")
    options = parser.parse_args(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    check_python(project["requires-python"])
    pins = bounds(project)
    print(f"oldest versions: {', '.join(pins)}", flush=True)
    make(ENVIRONMENT, pins)
    command = [str(python_of(ENVIRONMENT)), "-m", "pytest", *QUIET, *(options.pytest or ["-q", "-n", "auto", *chosen()])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
