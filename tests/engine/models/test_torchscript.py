"""TorchScript archives and tokenizer options: tensors and words, and nothing that runs."""

from __future__ import annotations

import importlib.util
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pspg.engine.models.any_clip import HF_OPTIONS, OPTIONS, _options
from pspg.engine.models.clip import build_clip, check_config
from pspg.engine.models.weights import read_weights
from pspg.engine.utils.errors import UserError
from tests.engine.conftest import tiny_config

EVIL = """
import torch
from typing import Tuple
class M(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.w = torch.zeros(1)
    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return (torch.zeros(1), self.training)
    @torch.jit.export
    def __setstate__(self, s: Tuple[torch.Tensor, bool]) -> None:
        x = torch.from_file("WRITTEN_HERE", True, 4, dtype=torch.uint8)
        self.w = x.float(); self.training = s[1]
    def forward(self, x):
        return x
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An archive with a shared tensor, a buffer, and a tensor that belongs to no state dict."""
    inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    inner[0].loose = torch.ones(4)
    torch.jit.script(inner).save(tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def test_the_tensors_are_those_that_torch_loads(plain: Path) -> None:
    expected = torch.jit.load(plain).state_dict()
    found, _ = read_weights(plain, scripted=True)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_setstate_does_not_run(tmp_path: Path) -> None:
    written = tmp_path / "WRITTEN"
    (tmp_path / "evil_module.py").write_text(EVIL.replace("WRITTEN_HERE", str(written)))
    spec = importlib.util.spec_from_file_location("evil_module", tmp_path / "evil_module.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.jit.script(module.M()).save(tmp_path / "w.pt")
    written.unlink(missing_ok=True)
    with pytest.raises(UserError, match="__setstate__"):
        read_weights(tmp_path / "w.pt", scripted=True)
    assert not written.exists()


def rewritten(source: Path, target: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


class Calls:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickles(tmp_path: Path) -> dict[str, bytes]:
    endless = io.BytesIO()
    pickle.Pickler(endless, 2).dump([])
    return {
        "a call": pickle.dumps(Calls(tmp_path / "RAN"), 2),
        "a large memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "a long string": b"\x80\x02X\xff\xff\xff\x7fa.",
        "no module": pickle.dumps([1], 2),
        "half": b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00",
        "empty": b"",
        "eval": b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    }


@pytest.mark.parametrize("kind", ["a call", "a large memo", "a long string", "no module", "half", "empty", "eval"])
def test_hostile_pickles_are_one_line(plain: Path, tmp_path: Path, kind: str) -> None:
    content = pickles(tmp_path)[kind]
    file = rewritten(plain, tmp_path / "w.pt", lambda name, old: content if name.endswith("/data.pkl") else old)
    with pytest.raises(UserError, match=r"w\.pt: not read") as caught:
        read_weights(file, scripted=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("scripted", [True, False])
def test_archives_that_unpack_to_more_are_refused(plain: Path, tmp_path: Path, scripted: bool) -> None:
    source = plain
    if not scripted:
        source = tmp_path / "plain.pth"
        torch.save({"w": torch.zeros(100)}, source)
    file = rewritten(source, tmp_path / "bomb.pth", lambda _, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_weights(file, scripted=True)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9), torch.zeros(3).to_sparse(), torch.zeros(1).as_strided((1000, 1000), (0, 0))],
)
def test_tensors_without_all_their_values_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"w": tensor}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a plain tensor"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"bpe_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"revision": "main"},
        {"clean": {"a": 1}},
        {"use_auth_token": "x"},
        [],
        "clean",
    ],
)
@pytest.mark.parametrize("known", [OPTIONS, HF_OPTIONS])
def test_only_known_tokenizer_options_are_passed_on(options: Any, known: set[str]) -> None:
    with pytest.raises(UserError, match="tokenizer_kwargs"):
        _options(options, known, "a.json")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_cfg", {"hf_model_name": "folder"}),
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}),
        ("vision_cfg", {"timm_model_name": "local-dir:x"}),
        ("vision_cfg", {"width": 10**9}),
        ("vision_cfg", {"layers": "4"}),
        ("text_cfg", {"layers": 10**6}),
        ("text_cfg", {"width": -1}),
        ("text_cfg", {"context_length": 10**12}),
        ("text_cfg", {"width": 65536, "layers": 1000}),
    ],
)
def test_architectures_that_no_model_has(part: str, changes: dict[str, Any]) -> None:
    config = tiny_config()
    config[part] = {**config[part], **changes}
    with pytest.raises(UserError, match=r"model\.backbone: "):
        check_config(config, "a.json")
    with pytest.raises(UserError):
        build_clip(config)
