"""``python -m largemargin``: the command line, for launchers such as torchrun."""

import sys

from .lab.cli import main

sys.exit(main())
