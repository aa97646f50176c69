"""What can be done from a shell? The command `keras-kd`."""

import argparse
import sys
from collections.abc import Sequence

from keras_kd._version import __version__
from keras_kd.cli import _parsers

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words after `keras-kd`; None takes those of the shell.

    Returns:
        The exit code: 0 is success, 1 an error, whose message is on stderr, 2 a wrong call, 130 an interruption (Ctrl-C).
    """
    parser = argparse.ArgumentParser(prog="keras-kd", description="Knowledge distillation and model compression for Keras 3.")
    parser.add_argument("--version", action="version", version=f"keras-kd {__version__}")
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
