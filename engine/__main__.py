"""`python -m pspg.engine`: the command `pspg-engine`."""

import sys

from .cli import main

sys.exit(main())
