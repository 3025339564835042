"""`pspg.bench`: the checkout's benchmarks, which are no part of an installation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..utils.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
"""beside the engine's own folder are the benchmarks, where there are any"""


def bench(op: str, **settings: Any) -> list[Any]:
    """Measure an operator, a step or a loader behind a correctness gate: `pspg.bench("spcl", C=28)`.

    Args:
        op: name, as `python -m benchmarks.run --list` in a checkout shows them.
        settings: of `benchmarks.bench`: impl, direction, dtype, device, seconds, and letter = size or sizes.

    Returns:
        A `benchmarks.rows.Row` each shape, implementation and direction.

    Raises:
        UserError: the engine does not come from a checkout, another package is called benchmarks, or a name or size
            that is not possible.
    """
    package = CHECKOUT / "benchmarks"
    if not (package / "__init__.py").is_file():
        raise UserError(
            "bench: the benchmarks come with a checkout of the repository, and this engine was installed without one;"
            " call it in the checkout, or after pip install --editable CHECKOUT"
        )
    if "benchmarks" not in sys.modules and str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))  # processes that are started import it by its name, too
    found = importlib.import_module("benchmarks")
    if found.__file__ is None or Path(found.__file__).resolve().parent != package:
        other = found.__file__ or "a folder"
        raise UserError(f"bench: {other} is called benchmarks, too, and hides those of {CHECKOUT}")
    rows: list[Any] = found.bench(op, **settings)
    return rows
