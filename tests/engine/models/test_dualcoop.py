"""The baseline DualCoOp: two learned contexts before the class names, and logits pooled over regions for each class."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.checkpoints.published import published_state
from pspg.engine.checkpoints.run import best_checkpoint, last_checkpoint, load_tensors
from pspg.engine.cli import main
from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.clip import tokenize, tokenizer
from pspg.engine.models.fusions.regions import region_logits
from pspg.engine.models.pspg import PromptHead, PsPG
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import PromptTask
from pspg.engine.training.telemetry import read_metrics
from pspg.engine.utils.errors import UserError

DUALCOOP: dict[str, Any] = {"decoder": "context", "fusion": "regions"}
MakeClip = Callable[..., Any]


def make(clip: Any, names: list[str], **config: Any) -> PsPG:
    torch.manual_seed(3)
    return PsPG(clip, ModelConfig(**{**DUALCOOP, "prompt_length": 3, **config}), names)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()


@pytest.fixture
def clip(make_clip: MakeClip) -> Any:
    """Four local tokens of a ViT: with one, as of a ResNet on 32 pixels, there is nothing to pool."""
    return make_clip(vit=True)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("init", ["random", "template"])
def test_parameter_count_of_the_paper(init: Any) -> None:
    """0.02 M at n = 16 and W = 512, and nothing else trains."""
    with torch.device("meta"):
        head = PromptHead(1024, 512, ModelConfig(**DUALCOOP, context_init=init))
    trained = {name: p.numel() for name, p in head.named_parameters() if p.requires_grad}
    assert trained == {"prompt_learner.contexts": 16_384}
    assert head.state_dict().keys() == {"prompt_learner.contexts", "logit_scale"}


def test_contexts_start_random_with_deviation_002() -> None:
    torch.manual_seed(0)
    contexts = PromptHead(1024, 512, ModelConfig(**DUALCOOP)).prompt_learner.contexts
    assert contexts.std().item() == pytest.approx(0.02, rel=0.05)
    assert contexts.mean().abs() < 0.001


def test_region_logits_are_those_of_a_loop() -> None:
    """z = cosine, w = softmax over places of 20·z⁺, logit± = 5·Σ w·20·z±, element by element."""
    torch.manual_seed(0)
    local = torch.randn(2, 5, 8).double()
    positive, negative = (normalize(torch.randn(3, 8).double(), dim=-1) for _ in range(2))
    got = region_logits(local, positive, negative)
    assert got.shape == (2, 2, 3)
    for b in range(2):
        for c in range(3):
            fit = [[(x @ text[c] / x.norm()).item() for text in (positive, negative)] for x in local[b]]
            total = sum(math.exp(20 * plus) for plus, _ in fit)
            for sign in (0, 1):
                expected = 5 * sum(math.exp(20 * pair[0]) / total * 20 * pair[sign] for pair in fit)
                assert got[b, sign, c].item() == pytest.approx(expected, rel=1e-10)


def test_region_logits_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    local, texts = torch.randn(2, 5, 8).bfloat16(), normalize(torch.randn(2, 3, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = region_logits(local, *texts)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, region_logits(local.float(), *texts))


def test_logits_are_those_of_the_local_tokens(clip: Any, names: list[str]) -> None:
    """The global feature and the temperature of PsPG have no part in them."""
    model = make(clip, names).eval()
    output = model(images())
    features = model.image_features(images())
    assert features.tokens.shape[1] == 5
    close(output.logits, region_logits(features.tokens[:, 1:], output.positive_features, output.negative_features))
    with torch.no_grad():
        model.logit_scale.zero_()
    assert torch.equal(model(images()).logits, output.logits)


def test_templates_are_the_start(clip: Any, names: list[str]) -> None:
    """Token embeddings of their words right before the class name; the places before stay as they were drawn."""
    n, table = 7, clip.token_embedding.weight
    contexts = make(clip, names, prompt_length=n, context_init="template").prompt_learner.contexts.detach()
    drawn = make(clip, names, prompt_length=n).prompt_learner.contexts.detach()
    for got, random, words in zip(contexts, drawn, ("Findings suggesting", "No evidence of"), strict=True):
        tokens = tokenizer().encode(words)
        assert 0 < len(tokens) < n
        assert torch.equal(got[-len(tokens) :], table[tokens])
        assert torch.equal(got[: -len(tokens)], random[: -len(tokens)])
    with pytest.raises(UserError, match=r"^model\.prompt_length: 2 vectors .* the 3 tokens of 'No evidence of'"):
        make(clip, names, prompt_length=2, context_init="template")


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_a_context_of_words_is_a_sentence(clip: Any, names: list[str], impl: str) -> None:
    """As long as its template, a context and the class name read as the CLIP reads the sentence."""
    model = make(clip, names, prompt_length=3, context_init="template").eval()
    model.head.impl = impl
    text = model.head.text_features(torch.empty(0, 24).double(), model.class_set, model.tower)
    sentences = clip.encode_text(tokenize([f"No evidence of {name}." for name in names]))
    close(text.negative, normalize(sentences, dim=-1))


def test_other_classes_and_other_images_change_nothing(clip: Any, names: list[str]) -> None:
    model, pixels = make(clip, names).eval(), images()
    logits = model(pixels).logits
    assert not torch.allclose(logits[..., 0], logits[..., 1])
    close(model(pixels[:1]).logits, logits[:1])
    close(model(pixels, context=torch.randn(2, 24).double()).logits, logits)
    model.set_classes([names[2], "pneumonia"])
    close(model(pixels).logits[..., 0], logits[..., 2])


@pytest.mark.parametrize("pair", ["none", "ranking"])
def test_a_few_steps_lower_the_loss_and_move_the_contexts_only(clip: Any, names: list[str], pair: Any) -> None:
    model = make(clip, names).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0], [0, 0, 1, 1]])
    losses = []
    for _ in range(3):
        output = model(images())
        loss, _ = PromptLoss(LossConfig(pair=pair))(output, labels, model.tower)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > 0, losses
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"prompt_learner.contexts"}
    assert (model.prompt_learner.contexts != before["prompt_learner.contexts"]).all()


def test_contexts_go_with_other_fusions_and_regions_with_other_decoders(clip: Any, names: list[str]) -> None:
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0], [0, 0, 1, 1]])
    for settings, loss in (
        ({"fusion": "gate_after_norm"}, LossConfig()),
        ({"decoder": "gru", "hidden_size": 8, "decoder_heads": 2, "dropout": 0.0}, LossConfig(pair="ranking")),
    ):
        model = make(clip, names, **settings).train()
        found = {}
        for impl in ("eager", "reference"):
            model.zero_grad()
            model.head.impl = impl
            output = model(images())
            total, _ = PromptLoss(loss)(output, labels, model.tower, impl=impl)
            total.backward()
            found[impl] = [total.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
        for one, other in zip(*found.values(), strict=True):
            assert one is not None
            assert one.any()
            close(one, other)


def test_pairs_need_an_image_vector(clip: Any, names: list[str]) -> None:
    model = make(clip, names).eval()
    with pytest.raises(ValueError, match="no image vector"):
        model(images(), pairs=True)
    output = model(images())
    assert output.image_vectors is None
    with pytest.raises(ValueError, match="no image vectors"):
        PromptLoss(LossConfig(pair="pcl"))(output, torch.ones(3, 4), model.tower)


def test_refusals(clip: Any, names: list[str]) -> None:
    for prompts in ("shared", "positive"):
        with pytest.raises(UserError, match=r"^model\.prompts: .*; use dual$"):
            make(clip, names, prompts=prompts)
    with pytest.raises(UserError, match=r"^layout: .* has no model\.decoder context"):
        published_state(make(clip, names, fusion="global"))
    with pytest.raises(UserError, match=r"^layout: .* has no model\.fusion regions"):
        published_state(make(clip, names, decoder="mlp"))


@pytest.fixture(scope="module")
def command(phantoms: Path, settings: Callable[[str], list[str]]) -> list[str]:
    """`train` for the seen classes of the phantoms, all but --output."""
    model = ["--model.decoder", "context", "--model.fusion", "regions", "--loss.pair", "none"]
    seen = ["--data.class_names", str(phantoms / "seen.txt"), "--data.augment", "false", "--data.flip", "0"]
    return [*settings("prompt"), *model, *seen, "--optim.lr", "1e-2", "--save_every", "1"]


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dualcoop") / "run"
    assert main([*command, "--optim.epochs", "4", "--output", str(folder)]) == 0
    return folder


def scores(checkpoint: Path, phantoms: Path, output: Path, *arguments: str) -> np.ndarray:
    """Probabilities that `predict` writes, (N,C)."""
    words = ["predict", "--checkpoint", str(checkpoint), "--input", str(phantoms / "test.jsonl"), "--workers", "0"]
    assert main([*words, "--output", str(output), "--overwrite", "true", *arguments]) == 0
    with output.open(newline="") as file:
        return np.array([[float(v) for k, v in row.items() if k != "id"] for row in csv.DictReader(file)])


def test_training_on_phantoms_lowers_the_loss(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    epochs = [np.mean([row["loss"] for row in rows if row["epoch"] == e and "loss" in row]) for e in range(4)]
    assert epochs[-1] < epochs[0]
    assert max(row["val_macro_auc"] for row in rows if "val_macro_auc" in row) > 0.5
    best = best_checkpoint(run)
    assert best is not None
    kept = load_tensors(best / "model.safetensors")
    assert kept.keys() == {"prompt_learner.contexts", "logit_scale"}
    assert kept["logit_scale"].item() == pytest.approx(math.log(100))
    optimizer = load_tensors(best / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in optimizer} == {"prompt_learner.contexts"}


def test_resume_is_exact(run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second epoch."""
    cut, words = tmp_path / "cut", [*command, "--optim.epochs", "4", "--output", str(tmp_path / "cut")]
    loss, seen = PromptTask.loss, []

    def counted(*arguments: Any) -> Any:
        seen.append(0)
        if len(seen) > 8:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTask, "loss", counted)
        assert main(words) == 130
    assert main([*words, "--resume", "latest"]) == 0
    ends = [last_checkpoint(folder) for folder in (run, cut)]
    for name in ("model", "optimizer"):
        one, other = (load_tensors(end / f"{name}.safetensors") for end in ends if end is not None)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_scores_through_the_commands(
    run: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same under either context, and after an export; classes never trained on too."""
    assert load_model(run).bank is not None
    bank = scores(run, phantoms, tmp_path / "x.csv")
    assert bank.std(axis=0).min() > 0
    batch = scores(run, phantoms, tmp_path / "x.csv", "--context", "batch", "--batch_size", "7")
    # Other batches, other products: logits, scaled by 100, differ by float32's rounding.
    np.testing.assert_allclose(batch, bank, atol=1e-5)
    export = ["export-checkpoint", "--checkpoint", str(run), "--output"]
    assert main([*export, str(tmp_path / "model")]) == 0
    assert (scores(tmp_path / "model", phantoms, tmp_path / "x.csv") == bank).all()
    unseen = scores(run, phantoms, tmp_path / "x.csv", "--class_names", str(phantoms / "unseen.txt"))
    assert unseen.shape[1] == len((phantoms / "unseen.txt").read_text().splitlines())

    capsys.readouterr()
    assert main([*export, str(tmp_path / "published"), "--layout", "published"]) == 2
    error = capsys.readouterr().err
    assert "layout: the published layout has no model.decoder context" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "published").exists()


@pytest.mark.slow
def test_evaluation_names_the_baseline(run: Path, phantoms: Path, tmp_path: Path) -> None:
    lists = {name: str(phantoms / f"{name}.txt") for name in ("seen", "unseen")}
    words = ["evaluate", "--checkpoint", str(run), "--manifest", str(phantoms / "test.jsonl"), "--workers", "0"]
    results = {}
    for context in ("batch", "bank"):
        output = tmp_path / context
        more = ["--output", str(output), "--evaluation.context", context, "--evaluation.bootstrap", "5"]
        assert main([*words, *more, "--class_lists", json.dumps(lists)]) == 0
        results[context] = json.loads((output / "metrics.json").read_text())["results"]
        assert next(iter(results[context])) == "DualCoOp"
        assert list(results[context]["DualCoOp"]) == ["all", "seen", "unseen"]
        card = (output / "MODEL_CARD.md").read_text()
        assert "DualCoOp classifies" in card
        assert "decoder" not in card.partition("## Settings")[0]
        assert "Scores depend on the image and the class alone." in card
    assert results["batch"] == results["bank"]
