"""Do wheel and sdist work? Looks inside, installs each into an empty environment, and does a small job there.

`python tools/check_packages.py dist` lends these environments the packages of its own, which takes a minute. Before a release
`--download` lets pip install what the files declare, and lends nothing.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import venv
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
NEEDED = ("keras_kd/__init__.py", "keras_kd/py.typed", "keras_kd/losses/response.py", "keras_kd/cli/__init__.py")
# The main job: distilled, pruned and quantised in one `fit`, exported, and profiled. Runs far from the sources.
JOB = """
    import importlib.metadata, pathlib, sys
    import keras, numpy as np
    import keras_kd

    here = pathlib.Path(keras_kd.__file__).resolve()
    assert here.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"keras_kd came from {here}"
    assert importlib.metadata.version("keras-kd") == keras_kd.__version__
    x, y = np.random.default_rng(0).normal(size=(64, 8)).astype("float32"), np.arange(64) % 3
    layers = keras.layers
    teacher, student = (keras.Sequential([keras.Input((8,)), layers.Dense(n, "relu"), layers.Dense(3)]) for n in (16, 8))
    distiller = keras_kd.Distiller(teacher, student, keras_kd.losses.KDLoss())
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(x, y, verbose=0, callbacks=[keras_kd.callbacks.Pruning(0.5), keras_kd.callbacks.Quantization()])
    report = keras_kd.export.to_litert(student, "student.tflite", check_data=x)
    assert report.quantization == "int8", report
    student.save("student.keras")
"""


def look(wheel: pathlib.Path, sdist: pathlib.Path) -> None:
    """Raises `SystemExit` with what is missing in the files."""
    expected = {str(path) for path in pathlib.Path("keras_kd").rglob("*.py")} | set(NEEDED)
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source_archive:
        in_wheel = set(archive.namelist())
        in_sdist = {name.split("/", 1)[-1] for name in source_archive.getnames()}
    for name, found in ((wheel.name, in_wheel), (sdist.name, in_sdist)):
        if missing := sorted(expected - found):
            sys.exit(f"{name} lacks {', '.join(missing)}")
        print(f"{name}: {len(found)} files, none missing")


def install_and_run(package: pathlib.Path, folder: pathlib.Path, same_as: zipfile.ZipFile | None, *, download: bool) -> None:
    """Installs one file into an empty environment and runs it there.

    Args:
        package: wheel or sdist.
        folder: for the environment and what the job writes.
        same_as: a wheel that did the job: where what is installed now has the same content, it need not do it again.
        download: whether pip installs what the package needs; else the packages of this environment are lent to it.
    """
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python, command = str(scripts / "python"), str(scripts / "keras-kd")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TF_CPP_MIN_LOG_LEVEL": "3"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{package.name}, installed: {' '.join(words)[:200]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", *(() if download else ("--no-deps",)), str(package.resolve()))
    own = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    if not download:  # behind its own packages; files that link to sources are not followed
        (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if same_as is not None:
        if other := differing(same_as, own):
            sys.exit(f"{package.name}, installed, differs from the wheel in {', '.join(other)}")
        print(f"{package.name}: installed, the same files as the wheel's; it says {run(command, '--version').strip()}")
        return
    run(python, "-c", textwrap.dedent(JOB))
    told = run(command, "inspect", "student.keras")
    if "MACs" not in told:
        sys.exit(f"{package.name}, installed: keras-kd inspect printed {told!r}")
    print(f"{package.name}: installed, a student distilled, pruned, quantised, exported; keras-kd inspect read it")


def differing(wheel: zipfile.ZipFile, folder: pathlib.Path) -> list[str]:
    """Modules of a wheel that are not the same in a folder of packages."""
    names = [name for name in wheel.namelist() if name.startswith("keras_kd/")]
    return [name for name in names if not (folder / name).exists() or (folder / name).read_bytes() != wheel.read(name)]


def main() -> None:
    """Raises `SystemExit` with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where `make wheel` put both")
    parser.add_argument("--download", action="store_true", help="install what they need, too, and borrow nothing")
    options = parser.parse_args()
    (wheel,), (sdist,) = (sorted(options.folder.glob(pattern))[-1:] for pattern in ("*.whl", "*.tar.gz"))
    look(wheel, sdist)
    with zipfile.ZipFile(wheel) as content:
        for package, same_as in ((wheel, None), (sdist, content)):
            with tempfile.TemporaryDirectory() as folder:
                install_and_run(package, pathlib.Path(folder), same_as, download=options.download)


if __name__ == "__main__":
    main()
