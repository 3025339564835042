"""`pspg-engine evaluate` on several gloo processes: the files of one, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from pspg.engine.checkpoints.model_folder import describe, load_clip_folder, write_model
from pspg.engine.cli import main

SCRIPT = Path(__file__).parents[1] / "ranks" / "train.py"
FILES = ("metrics.json", "per_class.csv", "predictions.csv")
# name → settings; 40 images
WAYS: dict[str, dict[str, object]] = {
    "batch context, probe": {"evaluation.batch_size": 16, "evaluation.context": "batch", "probe": "train.jsonl"},
    "bank": {"evaluation.batch_size": 12, "evaluation.context": "bank"},
    # One image of the first batch is missing, and the whole second one.
    "bad images": {"evaluation.batch_size": 3, "manifest": "test_bad.jsonl", "on_bad_image": "skip", "workers": 1},
    "fewer batches than ranks": {"evaluation.batch_size": 40},
    # Other sources, of which each run has one.
    "adapter": {"evaluation.batch_size": 3, "checkpoint": "", "adapter": "half.py"},
    "predictions": {"checkpoint": "", "predictions": "given.csv"},
    "phase 1": {"evaluation.batch_size": 3, "checkpoint": "clip", "probe": "train.jsonl"},
}

ADAPTER = """
from torchvision.transforms.v2.functional import pil_to_tensor
def load(device):
    return None
def preprocess(image):
    return pil_to_tensor(image).double() / 255
def score(model, images, class_names):
    return images.mean((1, 2, 3))[:, None].expand(-1, len(class_names))
"""


@pytest.fixture(scope="module")
def model(phantoms: Path, settings: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phase-2 run, and manifests of the test images of which some or all are unreadable."""
    run = tmp_path_factory.mktemp("model") / "run"
    assert main([*settings("prompt"), "--optim.epochs", "1", "--output", str(run)]) == 0
    clip, pixels = load_clip_folder(run)
    write_model(run.parent / "clip", describe("clip", clip, pixels), {"model": dict(clip.state_dict())})
    (phantoms / "half.py").write_text(ADAPTER)
    rows = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    for i in range(len(rows)):
        (phantoms / "images" / f"empty{i}.png").write_bytes(b"")
    names = (phantoms / "classes.txt").read_text().splitlines()
    table = [[row["id"], *(f"{(i * 7 + j) % 11 / 10}" for j in range(len(names)))] for i, row in enumerate(rows)]
    (phantoms / "given.csv").write_text("".join(",".join(cells) + "\n" for cells in [["id", *names], *table]))
    for name, bad in (("test_bad", {1, 3, 4, 5, 8}), ("test_one", {4}), ("test_none", set(range(40)))):
        broken = [{**row, "filepath": f"images/empty{i}.png"} if i in bad else row for i, row in enumerate(rows)]
        (phantoms / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    return run


@pytest.fixture
def arguments(model: Path, phantoms: Path) -> Callable[..., list[str]]:
    def of(output: Path, **more: object) -> list[str]:
        values = {
            "checkpoint": model,
            "output": output,
            "manifest": "test.jsonl",
            "workers": 0,
            "device": "cpu",
            "evaluation.bootstrap": 5,
            **more,
        }
        if values["checkpoint"] == "clip":
            values["checkpoint"] = model.parent / "clip"
        for key in ("manifest", "probe", "adapter", "predictions"):
            if key in values:
                values[key] = phantoms / str(values[key])
        return ["evaluate", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]

    return of


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_files(
    tmp_path: Path, arguments: Callable[..., list[str]], ranks: Callable[..., list[Popen[str]]]
) -> None:
    said = {}
    for count in (1, 2, 3):
        commands = tmp_path / f"{count}.json"
        commands.write_text(json.dumps([arguments(tmp_path / str(count) / way, **WAYS[way]) for way in WAYS]))
        processes = ranks([str(SCRIPT), str(commands)], count)
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)[-3000:]
        said[count] = outputs[0].replace(str(tmp_path / str(count)), "")
        assert outputs[1:] == [""] * (count - 1)
    assert "5 unreadable images were left out" in said[1]
    assert said[1] == said[2] == said[3]
    for way in WAYS:
        for file in FILES:
            expected = (tmp_path / "1" / way / file).read_bytes()
            assert expected
            for count in (2, 3):
                assert (tmp_path / str(count) / way / file).read_bytes() == expected, (way, file, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "line"),
    [
        # Each rank meets one.
        ({"manifest": "test_bad.jsonl", "evaluation.batch_size": 3}, "rank [01]: {images}/empty"),
        # The second rank's only one.
        ({"manifest": "test_one.jsonl", "evaluation.batch_size": 3}, "rank 1: {images}/empty"),
        ({"manifest": "test_none.jsonl", "on_bad_image": "skip"}, "{images}/empty"),
        ({"manifest": "missing.jsonl"}, "manifest: {folder}/missing.jsonl: no such file"),
    ],
)
def test_error_of_a_rank_ends_all_with_one_line(
    tmp_path: Path, phantoms: Path, arguments, ranks, more: dict[str, object], line: str
) -> None:
    processes = ranks(["-m", "pspg.engine", *arguments(tmp_path / "report", **more)], 2)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode for process in processes), outputs
    (said,) = [line for output in outputs for line in output.splitlines()]
    expected = line.format(images=phantoms / "images", folder=phantoms)
    assert re.match(f"pspg-engine evaluate: error: {expected}", said), said
    assert not (tmp_path / "report").exists()
