"""Plugin (`python -m pytest -p tests.bare_environment`) that hides all but torch, triton, numpy and pytest.

That is what a rented GPU has. The project is not installed there either: its own packages come from the checkout.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

HIDDEN = {
    *("PIL", "deepspeed", "jinja2", "jsonargparse", "matplotlib", "open_clip", "pydicom", "safetensors", "scipy"),
    *("simplejpeg", "sklearn", "tensorboard", "torchvision", "torchxrayvision", "tqdm", "transformers", "yaml"),
}


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
# An editable installation brings a finder of its own.
sys.meta_path[:] = [
    finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable")
]
