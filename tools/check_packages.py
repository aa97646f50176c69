"""Do wheel and sdist hold what they must? Looks inside the files that `make wheel` made."""

import pathlib
import sys
import tarfile
import zipfile

NEEDED = ("keras_kd/__init__.py", "keras_kd/py.typed", "keras_kd/losses/response.py", "keras_kd/cli/__init__.py")


def main(folder: str) -> None:
    """Raises `SystemExit` with what is missing."""
    source = pathlib.Path("keras_kd")
    expected = {str(path) for path in source.rglob("*.py")} | set(NEEDED)
    (wheel,), (sdist,) = (sorted(pathlib.Path(folder).glob(pattern))[-1:] for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source_archive:
        in_wheel = set(archive.namelist())
        in_sdist = {name.split("/", 1)[-1] for name in source_archive.getnames()}
    for name, found in ((wheel.name, in_wheel), (sdist.name, in_sdist)):
        if missing := sorted(expected - found):
            sys.exit(f"{name} lacks {', '.join(missing)}")
        print(f"{name}: {len(found)} files, none missing")


if __name__ == "__main__":
    main(sys.argv[1])
