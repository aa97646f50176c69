"""Which words does the command line know? Each command with its options, its help and an example."""

import argparse
from typing import Any

from keras_kd.cli import _commands

_NPZ = "an .npz file with x, or an array for each input by its name, and y, the labels, if there are any"


def add_commands(commands: Any) -> None:
    """Adds all commands to a parser."""
    _demo(commands)
    _inspect(commands)
    _compare(commands)
    _prune(commands)
    _export(commands)
    _compress(commands)
    _search(commands)


def _command(commands: Any, name: str, run: Any, words: str, description: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=description,
        epilog=f"example: keras-kd {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _common(parser: argparse.ArgumentParser, *, needs_data: bool, json: bool = True) -> None:
    parser.add_argument("--data", metavar="NPZ", required=needs_data, help=_NPZ)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON in the place of a table, and nothing else")
    parser.add_argument(
        "--unsafe", action="store_true", help="load files that hold Python code (Lambda layers): only of people you trust"
    )


def at_least_1(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def at_least_0(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, not {text}")
    return int(text)


def _demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        _commands.demo,
        "train a teacher, a student alone and a distilled student, and compare them",
        "Trains a teacher, then a small student alone and distilled, same steps and seeds; exports and compares.",
        "--dataset fashion_mnist --epochs 10 --out runs/fashion",
    )
    demo.add_argument("--dataset", default="digits", choices=("digits", "fashion_mnist", "mnist", "cifar10"))
    demo.add_argument("--epochs", type=at_least_1, help="epochs of each student (60 on digits, 20 elsewhere; --search: 15 and 5)")
    demo.add_argument("--seeds", type=at_least_1, default=3, help="number of seeds (3)")
    demo.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    demo.add_argument("--out", default="runs/demo", help="folder for report.png, results.json and student.tflite (runs/demo)")
    demo.add_argument(
        "--search",
        action="store_true",
        help="search how far the teacher can be compressed, and show the front of accuracy and bytes",
    )
    demo.add_argument("--trials", type=at_least_1, default=8, help="of --search (8)")
    demo.add_argument("--quiet", action="store_true", help="print nothing")


def _inspect(commands: Any) -> None:
    inspect = _command(
        commands,
        "inspect",
        _commands.inspect,
        "show weights, multiply-accumulates and memory by layer; with data, what the network can lose",
        "Measures a model layer by layer. With --data, a linear analysis follows: which channels are linear combinations\n"
        "of others, which layers are nearly linear, how sensitive the outputs are to each.",
        "model.keras --data train.npz",
    )
    inspect.add_argument("model", help="a .keras file")
    _common(inspect, needs_data=False)


def _compare(commands: Any) -> None:
    compare = _command(
        commands,
        "compare",
        _commands.compare,
        "measure .keras and .tflite files side by side",
        "Measures files side by side on the same data: how right, how alike, how large, how fast. The first is the reference.",
        "teacher.keras student.tflite --data test.npz --html report.html",
    )
    compare.add_argument("models", nargs="+", metavar="model", help=".keras or .tflite files; name=path gives them names")
    compare.add_argument("--html", metavar="FILE", help="write one self-contained page, too")
    _common(compare, needs_data=True)


def _prune(commands: Any) -> None:
    prune = _command(
        commands,
        "prune",
        _commands.prune,
        "remove channels until a budget holds, and fit the others; no labels, no training",
        "Writes a smaller model. Channels go that the others stand for best; what is left is fitted to what the model gave before.",
        "model.keras smaller.keras --macs 0.5 --data train.npz",
    )
    prune.add_argument("model", help="a .keras file")
    prune.add_argument("out", help="where the smaller model is written, a .keras file")
    prune.add_argument("--macs", type=float, help="multiply-accumulates to keep: a number, or a share up to 1")
    prune.add_argument("--parameters", type=float, help="weights to keep: a number, or a share up to 1")
    prune.add_argument("--latency", type=float, help="share of the LiteRT file's time on this machine to keep")
    prune.add_argument("--criterion", default="redundancy", help="redundancy (default), magnitude, taylor, fisher, batch_norm")
    prune.add_argument("--round-to", type=at_least_1, default=1, help="widths are multiples of this (1)")
    _common(prune, needs_data=True)


def _export(commands: Any) -> None:
    export = _command(
        commands,
        "export",
        _commands.export,
        "write a LiteRT file that is known to compute what the model does",
        "Writes a LiteRT file after running it against the model. Integers without training need --data for their ranges.",
        "model.keras model.tflite --quantization int8 --data train.npz",
    )
    export.add_argument("model", help="a .keras file")
    export.add_argument("out", help="where the .tflite file is written")
    choices = ("auto", "float32", "float16", "dynamic", "int8", "int4")
    export.add_argument("--quantization", default="auto", choices=choices, help="auto: int8 with --data, float32 without")
    export.add_argument("--card", metavar="FILE", help="write a model card, too: README.md for the Hugging Face Hub")
    export.add_argument("--test", metavar="NPZ", help="data that the card's numbers are measured on, beside the model's")
    _common(export, needs_data=False)


def _compress(commands: Any) -> None:
    compress = _command(
        commands,
        "compress",
        _commands.compress,
        "make a model fit into a file of so many bytes, and lose as little as it can",
        "Cuts, thins, distils and quantises; measures every file on validation data and keeps the best one within the budget.\n"
        "Labels are learned from, too, where the file says what loss the model was compiled with.\n"
        "Started again with the same --out, it goes on where it was interrupted.",
        "model.keras --data train.npz --validation validation.npz --budget 100KB --out small",
    )
    compress.add_argument("model", help="a .keras file")
    compress.add_argument("--budget", required=True, help="bytes: 100000, 100KB, 98KiB, 1.5MB, 20%% (of the float32 file)")
    compress.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for model.tflite, model.keras, report.json and a card, README.md"
    )
    compress.add_argument(
        "--validation",
        metavar="NPZ",
        help="data that the choice is made by, and that the model was not trained on (a tenth of --data, with scores too good)",
    )
    compress.add_argument("--max-trials", type=at_least_0, default=6, help="trainings (6); 0 is none")
    compress.add_argument("--max-minutes", type=float, help="no training goes on after so many minutes")
    compress.add_argument("--epochs", type=at_least_1, default=5, help="epochs of each training (5)")
    _common(compress, needs_data=True)


def _search(commands: Any) -> None:
    search = _command(
        commands,
        "search",
        _commands.search,
        "run a KerasTuner script as the chief or a worker of a search on many machines",
        "Runs a Python script that makes a tuner and calls its search(), the same one on all machines, which share the tuner's\n"
        "folder. The chief hands out trials and trains nothing; each worker has a name of its own, and gets its trial again if it\n"
        "is started again by the same name. Without --chief and --worker the script runs as it does without keras-kd: on this\n"
        "machine alone, or as KERASTUNER_* in the environment say.\n"
        "Options stand before the script; what stands behind it is the script's.",
        "--chief --address 10.0.0.1:8000 search.py           (on 10.0.0.1)\n"
        "         keras-kd search --worker tuner0 --address 10.0.0.1:8000 search.py   (on another machine)",
    )
    role = search.add_mutually_exclusive_group()
    role.add_argument("--chief", action="store_true", help="be the chief")
    role.add_argument("--worker", metavar="NAME", help="be the worker of this name")
    search.add_argument("--address", metavar="HOST:PORT", help="the chief's, as all machines reach it")
    search.add_argument("--timeout", type=float, default=60.0, help="seconds that a worker waits for the chief to begin (60)")
    search.add_argument("script", help="a Python file")
    search.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
