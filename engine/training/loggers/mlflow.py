"""MLflow. Its own variables say where: MLFLOW_TRACKING_URI (else the run's folder), MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from . import LOGGERS
from ._base import Logger, RunStart, remember, remembered

log = logging.getLogger(__name__)

LONGEST = 500
"""characters of a parameter's value that every server takes"""


@LOGGERS.register
class MlflowLogger(Logger):
    name = package = "mlflow"
    remote = True

    def __init__(self, start: RunStart) -> None:
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(start.folder / 'mlflow.db').resolve()}"
        self._client = client = MlflowClient(place)
        identity = remembered(start, self.name)
        if identity is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pspg")
            experiment = client.get_experiment_by_name(name)
            # Pictures would else lie below the folder that the command runs in.
            files = None if "MLFLOW_TRACKING_URI" in os.environ else (start.folder / "mlflow").resolve().as_uri()
            key = client.create_experiment(name, files) if experiment is None else experiment.experiment_id
            identity = client.create_run(key, run_name=start.folder.resolve().name).info.run_id
            for setting, value in start.settings.items():
                client.log_param(identity, setting, str(value)[:LONGEST])
            remember(start, self.name, identity)
        else:
            client.update_run(identity, status="RUNNING")
        self._identity = identity
        log.info(f"MLflow: run {identity} in {place.rpartition('@')[2]}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._client.log_metric(self._identity, key, value, step=step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._identity, pixels, f"{name}-{step:08}.png")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._identity, "FAILED" if failed else "FINISHED")
