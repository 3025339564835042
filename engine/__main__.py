"""`python -m pspg.engine`: the command `pspg-engine`."""

import atexit
import os
import sys

from .cli import main

status = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    # Under load a rank that had finished was seen to abort while the interpreter was torn down under threads of the
    # process group: everything that is to be closed is closed here, and the rest is left to the system.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
