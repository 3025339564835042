"""Small images of noise for the loaders."""

import numpy as np
import pytest


@pytest.fixture
def samples(tmp_path):
    from PIL import Image

    from pspg.engine.data.manifest import Sample

    noise = np.random.default_rng(0)
    made = []
    for number in range(11):
        path = tmp_path / f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (20, 24), dtype=np.uint8)).save(path)
        made.append(Sample(id=f"s{number}", path=path, text=f"report {number}"))
    return made
