"""Classifiers: what open_clip loads, what they score, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

from pspg.engine.checkpoints.classifier import Classifier, load_classifier
from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.checkpoints.run import load_tensors, write_tensors
from pspg.engine.cli import main
from pspg.engine.commands.evaluate import evaluate_model
from pspg.engine.commands.predict import predict
from pspg.engine.commands.settings import PredictConfig
from pspg.engine.config import EvaluationConfig
from pspg.engine.evaluation.config import EvaluateConfig
from pspg.engine.models.clip import tokenize
from pspg.engine.models.pspg import probabilities
from pspg.engine.utils.errors import UserError
from tests.engine.seal import seal

Make = Callable[..., Path]
FILES = {"README.md", "open_clip_config.json", "open_clip_model.safetensors", "classifier.safetensors"}


@pytest.fixture
def export(tmp_path: Path, model_folder: Make) -> Callable[..., tuple[Path, Path]]:
    """Function → a model folder and the classifier exported from it."""

    def make(*arguments: str, **settings: Any) -> tuple[Path, Path]:
        source, folder = model_folder(**settings), tmp_path / "classifier"
        command = ["export-checkpoint", "--checkpoint", str(source), "--output", str(folder), "--layout", "classifier"]
        assert main([*command, *arguments]) == 0
        return source, folder

    return make


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def live(source: Path, images: Tensor, names: list[str] | None = None) -> Tensor:
    """Probabilities of the model under its bank."""
    loaded = load_model(source)
    loaded.set_classes(names)
    with torch.no_grad():
        return probabilities(loaded.model(images, context=loaded.bank).logits)


@pytest.mark.parametrize("vit", [False, True])
def test_open_clip_loads_the_towers(export: Callable[..., tuple[Path, Path]], vit: bool) -> None:
    source, folder = export(vit=vit)
    assert {path.name for path in folder.iterdir()} == FILES
    expected = load_model(source).model.clip
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images()), expected.encode_image(images()))
        torch.testing.assert_close(model.encode_text(tokenize(["edema"])), expected.encode_text(tokenize(["edema"])))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    open_clip.CLIP(**config).load_state_dict(load_tensors(folder / "open_clip_model.safetensors"), strict=True)


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_open_clip_makes_the_same_pixels(export: Callable[..., tuple[Path, Path]], tmp_path: Path, resize: str) -> None:
    _, folder = export(resize=resize)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    noise = np.random.default_rng(0).integers(0, 256, (90, 61), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "film.png")
    film = load_classifier(folder).read(tmp_path / "film.png")
    assert film.shape == (3, 32, 32)
    torch.testing.assert_close(preprocess(Image.open(tmp_path / "film.png")), film)


@pytest.mark.parametrize(
    "head",
    [
        {"fusion": "gate_after_norm"},
        {"fusion": "gate_before_norm"},
        {"fusion": "ungated", "prompts": "positive"},
        {"fusion": "global", "prompts": "shared"},
        {"prefix": True},
    ],
    ids=lambda head: ",".join(map(str, head.values())),
)
@pytest.mark.parametrize("classes", [None, ["gallstone", "edema", "a mass"]])
def test_a_classifier_scores_like_the_live_model(
    export: Callable[..., tuple[Path, Path]], head: dict[str, Any], classes: list[str] | None
) -> None:
    source, folder = export(
        *([] if classes is None else ["--class_names", json.dumps(classes), "--blend", "none"]), vit=True, **head
    )
    classifier = load_classifier(folder)
    expected = live(source, images(), classes)
    assert classifier.class_names == (classes or load_model(source).class_names)
    assert expected.std(dim=0).min() > 1e-4  # images differ
    torch.testing.assert_close(classifier(images()), expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # under another context they would not agree
        model = load_model(source).model
        assert (probabilities(model(images()).logits) - live(source, images())).abs().max() > 1e-4


def test_scores_depend_on_the_image_alone(export: Callable[..., tuple[Path, Path]]) -> None:
    classifier: Classifier = load_classifier(export(vit=True)[1])
    together = classifier(images())
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(classifier(images()[order]), together[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([classifier(image[None]) for image in images()]), together, rtol=0, atol=1e-6)


def test_predict_scores_with_a_classifier(
    export: Callable[..., tuple[Path, Path]], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = export(vit=True)
    # A classifier has no text tower to run.
    monkeypatch.setattr("pspg.engine.models.pspg.encode_prompts", None)

    def scores(**settings: Any) -> dict[str, np.ndarray]:
        config = PredictConfig(
            checkpoint=str(folder), output=str(tmp_path / "x.csv"), overwrite=True, workers=0, **settings
        )
        found = predict(config)
        return dict(zip(found.ids, found.probabilities, strict=True))

    everything = scores(input=str(image_folder))
    lines = [json.dumps({"id": name, "filepath": name}) for name in reversed(everything)]
    (image_folder / "all.jsonl").write_text("\n".join(lines))
    shuffled = scores(input=str(image_folder / "all.jsonl"), batch_size=2)
    assert list(shuffled) == list(reversed(everything))
    monkeypatch.undo()
    config = PredictConfig(checkpoint=str(source), input=str(image_folder), output=str(tmp_path / "y.csv"), workers=0)
    expected = predict(config)
    for name, row in zip(expected.ids, expected.probabilities, strict=True):
        np.testing.assert_allclose(everything[name], row, atol=1e-6)
        np.testing.assert_allclose(shuffled[name], row, atol=1e-6)
    some = scores(input=str(image_folder), class_names=["no finding", "edema"])
    for name, row in some.items():
        np.testing.assert_allclose(row, everything[name][[3, 2]], atol=1e-6)


def test_evaluate_scores_a_classifier_and_compares_it_with_its_templates(
    export: Callable[..., tuple[Path, Path]], image_folder: Path, tmp_path: Path
) -> None:
    source, folder = export(vit=True)
    names = ["edema", "cardiomegaly"]
    rows = [
        {"id": name, "filepath": name, "labels": {"edema": n % 2, "cardiomegaly": n // 2 % 2}}
        for n, name in enumerate(["a.png", "A_.png", "b/a.png", "b/c d.png"])
    ]
    manifest = image_folder / "test.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (image_folder / "classes.txt").write_text("\n".join(names))
    found = {
        checkpoint: evaluate_model(
            EvaluateConfig(
                checkpoint=str(checkpoint),
                manifest=str(manifest),
                output=str(tmp_path / f"report-{checkpoint.name}"),
                workers=0,
                device="cpu",
                evaluation=EvaluationConfig(bootstrap=0, context="batch" if checkpoint == folder else "bank"),
            )
        )
        for checkpoint in (source, folder)
    }
    frozen, live = found[folder], found[source]
    assert frozen is not None
    assert live is not None
    classifier = load_classifier(folder)
    classifier.set_classes(names)
    pixels = torch.stack([classifier.read(image_folder / row["filepath"]) for row in rows])
    np.testing.assert_allclose(frozen.probabilities, classifier(pixels).numpy(), atol=1e-6)
    assert [method.name for method in frozen.methods] == ["frozen classifier", *(m.name for m in live.methods[1:])]
    for one, other in zip(frozen.methods[1:], live.methods[1:], strict=True):  # the templates of the same CLIP
        assert one.metrics["all"].macro_auc == other.metrics["all"].macro_auc
    assert frozen.settings["context"] == "none"
    assert frozen.training_data == "trained on noise"
    assert "frozen" in (tmp_path / "report-classifier" / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("vit", [False, True])
def test_torch_exports_a_classifier_for_any_number_of_images(
    export: Callable[..., tuple[Path, Path]], tmp_path: Path, vit: bool
) -> None:
    classifier = load_classifier(export("--class_names", '["edema", "a mass"]', vit=vit)[1])
    batch = torch.export.Dim("images", min=1, max=64)
    program = torch.export.export(classifier, (images(2),), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, tmp_path / "classifier.pt2")
    module = torch.export.load(tmp_path / "classifier.pt2").module()
    for count in (1, 5):
        torch.testing.assert_close(module(images(count)), classifier(images(count)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["pspg-engine", "published", "classifier"])
def test_an_export_can_be_pushed_to_the_hub_as_it_is(model_folder: Make, tmp_path: Path, layout: str) -> None:
    """A card that the Hub's client takes, and no file that runs code or names a place on this machine."""
    source, folder = model_folder(vit=True), tmp_path / "out"
    command = ["export-checkpoint", "--checkpoint", str(source), "--output", str(folder), "--layout", layout]
    assert main(command) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "pspg-engine"
    assert card.data.license is None
    assert "pleural effusion" in card.text
    assert "trained on noise" in card.text
    assert {path.suffix for path in folder.iterdir()} <= {".md", ".json", ".safetensors"}
    assert not [path.name for path in folder.glob("*.[mj]*") if str(tmp_path) in path.read_text()]


def test_what_the_json_holds(export: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = export(vit=True, fusion="ungated")
    description = json.loads((folder / "open_clip_config.json").read_text())
    assert description["format"] == "pspg-classifier/1"
    assert description["class_names"] == ["cardiomegaly", "pleural effusion", "edema", "no finding"]
    assert description["pixels"] == {"size": 32, "resize": "stretch", "mean": 0.4, "std": 0.2}
    assert (description["fusion"], description["bank_size"]) == ("ungated", 6)
    assert description["training"] == "trained on noise"
    assert set(description["versions"]) == {"pspg-engine", "torch", "open_clip_torch"}
    tensors = load_tensors(folder / "classifier.safetensors")
    assert tensors["text_features"].shape == (2, 4, 24)
    torch.testing.assert_close(tensors["text_features"].norm(dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "--class_names", "[edema, gallstone]"],
            "class_names: unknown class name 'gallstone' (the classes",
        ),
        (["predict", "--class_names", "[edema, odema, edema]"], "did you mean 'edema'?"),
        (["predict", "--context", "batch"], "context: "),
        (["evaluate", "--manifest", "gallstone.jsonl"], "class_lists: unknown class name 'gallstone' (the classes"),
        (["evaluate", "--manifest", "x.jsonl", "--evaluation.context", "bank"], "only PsPG's scores have a context"),
        (["evaluate", "--manifest", "x.jsonl", "--evaluation.blend", "fixed"], "only learned prompts are blended"),
        (["export-checkpoint", "--layout", "classifier"], "holds a frozen classifier, which evaluate and predict read"),
    ],
)
def test_what_a_classifier_cannot_do_is_one_line(
    export: Callable[..., tuple[Path, Path]],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    _, folder = export(vit=True)
    (tmp_path / "x.jsonl").write_text('{"id": "a", "filepath": "a.png", "labels": [1]}\n')
    (tmp_path / "classes.txt").write_text("edema\n")
    capsys.readouterr()
    shutil.copy(image_folder / "a.png", tmp_path)
    (tmp_path / "gallstone.jsonl").write_text('{"id": "a", "filepath": "a.png", "labels": {"gallstone": 1}}\n')
    if "gallstone.jsonl" in arguments:
        (tmp_path / "classes.txt").write_text("gallstone\n")
    arguments = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in arguments]
    source = ["--input", str(image_folder)] if arguments[0] == "predict" else []
    assert main([*arguments, *source, "--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"bank": False}, ["--layout", "classifier"], "holds no context bank"),
        ({}, ["--class_names", "[a, b]"], "class_names: only layout classifier"),
        ({}, ["--layout", "published", "--class_names", "[a, b]"], "class_names: only layout classifier"),
        ({}, ["--layout", "classifier", "--class_names", "[a, A]"], "duplicates: 'a', 'A'"),
    ],
)
def test_exports_that_cannot_be_are_one_line(
    model_folder: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    source = model_folder(vit=True, **settings)
    output = tmp_path / "out"
    assert main(["export-checkpoint", "--checkpoint", str(source), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: change(folder / "open_clip_config.json", format="x"), "not of the format pspg-classifier/1"),
        (lambda folder: change(folder / "open_clip_config.json", pixels={}), "is damaged"),
        (lambda folder: change(folder / "open_clip_config.json", class_names=["a"]), "other shape: text_features"),
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "no such file"),
        (lambda folder: (write_tensors(folder / "classifier.safetensors", {}), seal(folder)), "missing: "),
        (lambda folder: write_tensors(folder / "classifier.safetensors", {}), "wrong checksum"),
    ],
)
def test_damaged_classifiers_are_one_line(
    export: Callable[..., tuple[Path, Path]], damage: Callable[[Path], object], message: str
) -> None:
    _, folder = export(vit=True)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
