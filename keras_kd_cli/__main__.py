"""`python -m keras_kd_cli` is `keras-kd`."""

import sys

from keras_kd_cli import main

sys.exit(main())
