"""``python -m sharpscope`` is the command line."""

import sys

from sharpscope.cli import main

sys.exit(main())
