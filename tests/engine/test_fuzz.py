"""Files of any content: success or one line, nothing else. 21,850 inputs with a fixed seed (`test_how_many`)."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from pspg.engine.checkpoints.integrity import read_state
from pspg.engine.checkpoints.model_folder import FORMAT, read_description
from pspg.engine.cli import parse
from pspg.engine.data.cache.header import Header, Shard
from pspg.engine.data.cache.pixel_cache import open_pixels, read_index
from pspg.engine.data.images import read_image
from pspg.engine.data.manifest import load_label_names, load_manifest
from pspg.engine.data.tables import Table
from pspg.engine.evaluation.sources.predictions import read_predictions
from pspg.engine.models.weights import read_weights
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.metrics_log import read_metrics
from tests.engine.conftest import tiny_config

EXAMPLES = 1150
"""inputs for each reader"""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def objects(*keys: str, **fixed: Any) -> st.SearchStrategy[bytes]:
    """JSON objects with some of these keys."""
    found = st.dictionaries(st.sampled_from(keys), JSON, max_size=len(keys))
    return found.map(lambda value: json.dumps({**fixed, **value}).encode())


def mixed(good: bytes) -> st.SearchStrategy[bytes]:
    """A good file with bytes changed, put in or cut off."""
    edit = st.tuples(st.integers(0, len(good)), st.integers(0, 4), st.binary(max_size=6))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = good
        for place, length, new in edits:
            content = content[:place] + new + content[place + length :]
        return content

    return st.lists(edit, min_size=1, max_size=4).map(apply)


STATE = json.dumps({"step": 1, "best_step": None, "epoch": 0, "contract": {}, "scaler": None}).encode()
SHARD = {"number": 0, "images": 1, "pixels_sha256": "a", "index_sha256": "b"}
HEADER = {"format": "pspg-engine pixel cache", "version": 1, "size": 8, "resize": "pad", "finished": True}
TABLE = b"id,a,b\nx,0.5,1\ny,0,0.25\n"
LINE = b'{"id": "x", "filepath": "x.png", "labels": [1, 0]}\n'
YAML = b"seed: 1\nmodel: {prompt_length: 4, decoder: gru}\noptim:\n  lr: 1e-3\ndata:\n  class_names: [a, b]\n"
MODEL = ("kind", "clip", "head", "class_names", "pixels", "files", "training")


def predictions(path: Path) -> object:
    return read_predictions(path, ["x", "y"], np.zeros((2, 2), np.float32), ["a", "b"], skip=True)


def manifest(path: Path) -> object:
    return load_manifest(path, label_names=["a", "b"], need="labels")


READERS: dict[str, tuple[str, Callable[[Path], object], st.SearchStrategy[bytes]]] = {
    "manifest": ("a.jsonl", manifest, mixed(LINE * 2) | objects("id", "filepath", "labels", "text")),
    "table": ("a.csv", lambda path: list(Table(path, ["id"])), mixed(TABLE) | st.binary(max_size=80)),
    "predictions": ("a.csv", predictions, mixed(TABLE)),
    "classes": ("classes.txt", load_label_names, st.binary(max_size=60) | st.text(max_size=40).map(str.encode)),
    "metrics": ("metrics.jsonl", read_metrics, mixed(b'{"step": 1, "loss": 0.5}\n') | objects("step", "loss")),
    "state": (
        "state.json",
        lambda path: read_state(path.parent),
        mixed(STATE) | objects("step", "best_step", "epoch", "contract", "files", "sha256"),
    ),
    "cache": (
        "cache.json",
        lambda path: Header.read(path.parent),
        mixed(json.dumps({**HEADER, "shards": [SHARD]}).encode()) | objects("size", "shards", "version", **HEADER),
    ),
    "model": ("model.json", lambda path: read_description(path.parent), objects(*MODEL, format=FORMAT)),
    "settings": ("a.yaml", lambda path: parse(["train", "--config", str(path)]), mixed(YAML) | st.binary(max_size=60)),
    "override": (
        "a.txt",
        lambda path: parse(["train", "--model", path.read_bytes().decode("utf-8", "replace").replace("\0", "")]),
        mixed(b"{prompt_length: 4}"),
    ),
}


def encoded(kind: str) -> bytes:
    """A small image of a format."""
    out = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(out, kind)
    return out.getvalue()


READERS |= {
    kind: (f"a.{kind.lower()}", lambda path: read_image(path, max_megapixels=1), mixed(encoded(kind)))
    for kind in ("PNG", "JPEG")
}


def dicom(kind: str) -> bytes:
    """A DICOM file of 8 × 8 pixels with most of the attributes that are read."""
    pydicom = pytest.importorskip("pydicom")
    from tests.engine.data.dicom_files import dataset, lut

    ds = dataset(np.arange(64, dtype=np.uint16).reshape(8, 8) * 60, WindowCenter=2000, WindowWidth=3000)
    ds.RescaleSlope, ds.RescaleIntercept, ds.PixelPaddingValue = "2", "-10", 0
    ds.VOILUTSequence = lut(16, 0, 8, bytes(range(16)))
    if kind == "RLE":
        del ds.VOILUTSequence
        ds.compress(pydicom.uid.RLELossless)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def close(path: Path) -> None:
    os.close(open_pixels(path.parent, Shard(0, 2, "", ""), 4)[0])


def index(path: Path) -> object:
    """As if the checksum were right, so that the content is read."""
    return read_index(path.parent, Shard(0, 2, "", hashlib.sha256(path.read_bytes()).hexdigest()))


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(2), "module.b": torch.ones(1)}}, out)
    return out.getvalue()


def array_file() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((2, 4, 4), np.uint8))
    return out.getvalue()


def replaced(document: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A JSON document with some of its values, at any depth, replaced or left out."""

    def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [*([at] if at else []), *(place for key, part in inner for place in places(part, (*at, key)))]

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> bytes:
        changed = json.loads(json.dumps(document))
        for place, new in changes:
            parent = changed
            try:
                for key in place[:-1]:
                    parent = parent[key]
                parent[place[-1]] = deepcopy(new)
            except (KeyError, IndexError, TypeError):  # an earlier change took it away
                continue
        return json.dumps(changed).encode()

    change = st.tuples(st.sampled_from(places(document)), JSON | st.sampled_from([0, 1, -1, 0.5, "gru", [], {}, 2**40]))
    return st.lists(change, min_size=1, max_size=3).map(apply)


ENTRY = b'{"id": "x", "filepath": "a.png", "bytes": 9, "mtime_ns": 5}\n'
FOLDER = {
    "format": FORMAT,
    "kind": "pspg",
    "clip": tiny_config(),
    "head": {"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2, "decoder": "gru", "fusion": "gate_after_norm"},
    "class_names": ["edema", "no finding"],
    "pixels": {"size": 32, "resize": "pad", "mean": 0.5, "std": 0.25},
    "training": "1 image",
}
READERS |= {
    **{
        f"DICOM {kind}": ("a.dcm", lambda path: read_image(path, max_megapixels=1), mixed(dicom(kind)))
        for kind in ("native", "RLE")
    },
    "cache index": (
        "index-00000.jsonl",
        index,
        mixed(ENTRY * 2) | objects("id", "filepath", "bytes", "mtime_ns", "bad"),
    ),
    "cache pixels": ("pixels-00000.npy", close, mixed(array_file())),
    "weights": ("a.safetensors", read_weights, mixed(save({"a": torch.zeros(2), "b": torch.ones(1)}))),
    "pickled weights": ("a.pth", read_weights, mixed(torch_file())),
    "model folder": ("model.json", lambda path: read_description(path.parent), replaced(FOLDER)),
}


def check(tmp_path: Path, name: str, content: bytes) -> None:
    file, read, _ = READERS[name]
    path = tmp_path / file
    path.write_bytes(content)
    told = ""
    try:
        read(path)
    except UserError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_any_content_is_success_or_one_line(tmp_path: Path, name: str) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    @given(READERS[name][2])
    def run(content: bytes) -> None:
        check(tmp_path, name, content)

    run()


def test_how_many(tmp_path: Path) -> None:
    """At least 20,000, of every kind of file; and the folder whose values are replaced is good as it is."""
    assert EXAMPLES * len(READERS) >= 20_000
    assert f"{EXAMPLES * len(READERS):,} inputs" in str(__doc__)
    (tmp_path / "model.json").write_text(json.dumps(FOLDER))
    assert read_description(tmp_path)["kind"] == "pspg"
