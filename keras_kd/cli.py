"""What can be done from a shell? The command `keras-kd`."""

import argparse
import sys
from collections.abc import Sequence

from keras_kd._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return _demo(options)
    except (ValueError, OSError) as error:
        print(f"keras-kd: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keras-kd", description="Knowledge distillation and model compression for Keras 3.")
    parser.add_argument("--version", action="version", version=f"keras-kd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a teacher, a student alone and a distilled student, and compare them",
        description="Trains a teacher, then a small student alone and distilled, same steps and seeds; exports and compares.",
        epilog="example: keras-kd demo --dataset fashion_mnist --epochs 10 --out runs/fashion",
    )
    demo.add_argument("--dataset", default="digits", choices=("digits", "fashion_mnist", "mnist", "cifar10"))
    demo.add_argument("--epochs", type=_at_least_1, help="epochs of each student (60 on digits, 20 elsewhere)")
    demo.add_argument("--seeds", type=_at_least_1, default=3, help="number of seeds (3)")
    demo.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    demo.add_argument("--out", default="runs/demo", help="folder for report.png, results.json and student.tflite (runs/demo)")
    demo.add_argument("--quiet", action="store_true", help="print nothing")
    return parser


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text}")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from keras_kd import demo

    small = options.dataset == "digits"
    settings = demo.Settings(
        dataset=options.dataset,
        epochs=options.epochs or (60 if small else 20),
        teacher_epochs=25 if small else 6,
        seeds=options.seeds,
        seed=options.seed,
    )
    demo.run(settings, options.out, verbose=not options.quiet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
