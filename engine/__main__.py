"""The command `pspg-engine`, also as `python -m pspg.engine`, as launchers start it on each rank."""

import atexit
import os
import sys
from collections.abc import Callable

from .utils.interrupt import heard_interrupts


def start() -> int:
    """Run the command that the arguments of this process say; returns the exit status."""
    with heard_interrupts() as interrupts:
        try:
            from .cli import main
        except BaseException:
            if not interrupts.heard:
                raise
    if interrupts.heard:
        print("pspg-engine: interrupted", file=sys.stderr)
        return 130
    run: Callable[[], int | None] = main
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # Under torchrun: its report of the failed ranks then has the traceback of an error that nothing caught.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in `main`, but before torch is imported here
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(main)
    status = run() or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Under load a rank that had finished was seen to abort while the interpreter was torn down under threads of the
        # process group: everything that is to be closed is closed here, and the rest is left to the system.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(start())
