"""Models, data, training and evaluation of PsPG: `import pspg.engine as pspg`. The names below are the public API."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch reads this at its first large allocation. On a CPU every large tensor comes in fresh pages; in huge pages a step
# of the full-size model took a sixth less.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# libgomp reads these when torch is loaded. Threads that wait for one another hold their cores, so a step beside other
# work, whose threads are sometimes off their cores, burns them; this bound on the turns lasts less than a millisecond.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from .checkpoints.classifier import Classifier, load_classifier
    from .checkpoints.published import import_published
    from .commands.bench import bench
    from .commands.evaluate import evaluate
    from .commands.predict import predict
    from .commands.settings import PredictConfig
    from .commands.train import train
    from .config import DataConfig, EvaluationConfig, LossConfig, ModelConfig
    from .data.datasets import register_dataset
    from .data.preparation.dataset import DataSet
    from .evaluation.config import EvaluateConfig
    from .evaluation.model import Model, load_model
    from .evaluation.report.evaluation import register_metric
    from .evaluation.report.tables import data_tables
    from .models.decoders import DECODERS
    from .models.encoders import ENCODERS
    from .models.fusions import FUSIONS
    from .models.pspg import PsPG
    from .training.config import OptimConfig, TrainConfig
    from .training.losses.classification import CLASSIFICATION_LOSSES
    from .training.losses.pair import PAIR_LOSSES
    from .utils.errors import UserError
    from .utils.plugins import load_plugins

_HOME = {
    "register_metric": "evaluation.report.evaluation",
    "ENCODERS": "models.encoders",
    "load_plugins": "utils.plugins",
    "PAIR_LOSSES": "training.losses.pair",
    "CLASSIFICATION_LOSSES": "training.losses.classification",
    "DataSet": "data.preparation.dataset",
    "register_dataset": "data.datasets",
    "Classifier": "checkpoints.classifier",
    "load_classifier": "checkpoints.classifier",
    "import_published": "checkpoints.published",
    "bench": "commands.bench",
    "evaluate": "commands.evaluate",
    "predict": "commands.predict",
    "PredictConfig": "commands.settings",
    "train": "commands.train",
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "LossConfig": "config",
    "ModelConfig": "config",
    "EvaluateConfig": "evaluation.config",
    "Model": "evaluation.model",
    "load_model": "evaluation.model",
    "data_tables": "evaluation.report.tables",
    "DECODERS": "models.decoders",
    "FUSIONS": "models.fusions",
    "PsPG": "models.pspg",
    "OptimConfig": "training.config",
    "TrainConfig": "training.config",
    "UserError": "utils.errors",
}
"""name → module; imported when it is asked for, so that settings can be read without torch"""

__all__ = [
    "CLASSIFICATION_LOSSES",
    "DECODERS",
    "ENCODERS",
    "FUSIONS",
    "PAIR_LOSSES",
    "Classifier",
    "DataConfig",
    "DataSet",
    "EvaluateConfig",
    "EvaluationConfig",
    "LossConfig",
    "Model",
    "ModelConfig",
    "OptimConfig",
    "PredictConfig",
    "PsPG",
    "TrainConfig",
    "UserError",
    "bench",
    "data_tables",
    "evaluate",
    "import_published",
    "load_classifier",
    "load_model",
    "load_plugins",
    "predict",
    "register_dataset",
    "register_metric",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pspg-engine")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
