"""What can be done from a shell? The command `keras-kd`.

It stands beside the package `keras_kd`, whose import takes seconds, for TensorFlow comes with it: help and wrong calls need none
of it, and each command imports what it needs when it runs.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from keras_kd_cli import _parsers

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


class _Version(argparse.Action):
    """Prints the version of what is installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"keras-kd {importlib.metadata.version('keras-kd')}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words after `keras-kd`; None takes those of the shell.

    Returns:
        The exit code: 0 is success, 1 an error, whose message is on stderr, 2 a wrong call, 130 an interruption (Ctrl-C).
    """
    parser = argparse.ArgumentParser(prog="keras-kd", description="Knowledge distillation and model compression for Keras 3.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _parsers.add_commands(parser.add_subparsers(dest="command", metavar="command"))
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return _USAGE
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"keras-kd {options.command}: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print(f"keras-kd {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
