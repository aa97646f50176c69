"""Runs the command line: `python -m keras_kd`."""

import sys

from keras_kd.cli import main

sys.exit(main())
