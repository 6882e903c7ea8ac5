"""`python -m engram`: the same as the `engram` script."""

import sys

from engram.cli import main

sys.exit(main())
