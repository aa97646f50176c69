"""Runs the command line: `python -m keras_kd`."""

import sys

from keras_kd_cli import main

sys.exit(main())
