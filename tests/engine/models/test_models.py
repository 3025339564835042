from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.class_set import make_class_set
from pspg.engine.models.clip import build_clip, clip_config, image_features, tokenize
from pspg.engine.models.decoders import DECODERS
from pspg.engine.models.decoders._base import PromptLearner
from pspg.engine.models.fusions import FUSIONS
from pspg.engine.models.pspg import PromptHead, PsPG, probabilities
from pspg.engine.training.losses import PromptLoss
from pspg.engine.utils.errors import UserError

MakeClip = Callable[..., Any]
KINDS = ("gru", "lstm", "mlp", "transformer")
SPATIAL = ("gate_after_norm", "gate_before_norm", "global", "ungated")
SMALL = {"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2}


def learner_of(decoder: str, *, width: int, text_width: int, **settings: Any) -> PromptLearner:
    config = ModelConfig(decoder=decoder, prompts="shared", **settings)
    learner = DECODERS[decoder].learner(width, text_width, config)
    assert isinstance(learner, PromptLearner)
    return learner


def spatial(name: str) -> Any:
    return FUSIONS[name]()


def make(clip: Any, names: list[str], **config: Any) -> PsPG:
    torch.manual_seed(3)
    return PsPG(clip, ModelConfig(**{**SMALL, **config}), names)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("decoder", "prompts", "count"),
    [
        ("gru", "dual", 12_604_416),
        ("transformer", "dual", 19_440_640),
        ("mlp", "dual", 9_454_592),
        ("gru", "positive", 12_604_416 // 2),
        ("gru", "shared", 12_604_416 // 2 + 1024 * 512 + 512),
        ("lstm", "dual", 12_604_416 + 2 * 512 * (1024 + 512 + 2)),
    ],
)
def test_parameter_count_of_the_paper(decoder: Any, prompts: Any, count: int) -> None:
    """12.60 M, 19.44 M and 9.45 M at n = 16 and the widths of RN50; beside them 3 of the fusion and the temperature."""
    with torch.device("meta"):
        head = PromptHead(1024, 512, ModelConfig(decoder=decoder, prompts=prompts))
    assert sum(parameter.numel() for parameter in head.prompt_learner.parameters()) == count
    assert sum(parameter.numel() for parameter in head.parameters()) == count + 4


def test_parameter_count_of_the_papers_clip() -> None:
    """102.01 M, all of which phase 1 trains."""
    with torch.device("meta"):
        clip = build_clip(clip_config("RN50"))
    assert sum(parameter.numel() for parameter in clip.parameters()) == 102_007_137


def test_what_trains_has_the_published_names(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names)
    decoder = [
        *("gru.weight_ih", "gru.weight_hh", "gru.bias_ih", "gru.bias_hh"),
        *(f"{layer}.{kind}" for layer in ("encoder_proj", "fc", "output_proj") for kind in ("weight", "bias")),
        *(f"self_attention.{layer}.{kind}" for layer in ("fc", "layer_norm") for kind in ("weight", "bias")),
        *(
            f"{attention}.{name}"
            for attention in ("self_attention.self_attention", "encoder_attention")
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        ),
    ]
    published = {f"prompt_learner.{side}_decoder.{name}" for side in ("pos", "neg") for name in decoder}
    published |= {"channel_attention.conv.weight", "logit_scale"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == published
    assert model.head.state_dict().keys() == published
    assert all(dict(model.head.named_parameters())[name] is parameter for name, parameter in trained.items())
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation(kind: str) -> None:
    torch.manual_seed(0)
    learner = learner_of(kind, width=64, text_width=64, hidden_size=64, decoder_heads=4, prompt_length=1, dropout=0)
    for name, parameter in learner.named_parameters():
        if "gru" in name or "lstm" in name:
            assert parameter.abs().max() <= 64**-0.5
        elif "norm.weight" in name or ("ln_" in name and name.endswith("weight")):
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif "bias" in name:
            assert not parameter.any()
        elif "in_proj" in name:
            assert parameter.std().item() == pytest.approx((2 / (64 + 192)) ** 0.5, rel=0.1)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_clip_stays_frozen_and_in_eval_mode(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names).train()
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    assert model.head.training
    assert model.prompt_learner.training
    assert not any(module.training for module in model.clip.modules())
    output = model(images())
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0], [0, 0, 1, 1]])
    PromptLoss(LossConfig())(output, labels, model.tower)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.clip.state_dict().items())


def test_head_follows_the_model_and_copies_with_it(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names).eval()
    twin = deepcopy(model)
    assert twin.head.logit_scale is twin.logit_scale is not model.logit_scale
    with torch.no_grad():
        twin.logit_scale.fill_(0.0)
    assert model.logit_scale.item() > 2
    model.float()
    assert model.head.logit_scale.dtype == model.class_set.class_features.dtype == torch.float32
    assert model(images().float()).logits.dtype == torch.float32


@pytest.mark.parametrize("vit", [False, True], ids=["resnet", "vit"])
@pytest.mark.parametrize("prefix", [False, True], ids=["whole", "prefix"])
def test_scores(make_clip: MakeClip, names: list[str], vit: bool, prefix: bool) -> None:
    model = make(make_clip(vit), names, prefix=prefix).eval()
    output = model(images(), pairs=True)
    assert output.logits.shape == (3, 2, 4)
    assert output.pair_logits is not None
    assert output.pair_logits.shape == (3, 6)
    assert output.prompts.vectors.shape == (4, 3, 16)
    close(output.positive_features.norm(dim=-1), torch.ones(4).double())
    p = probabilities(output.logits)
    close(p, torch.sigmoid(output.logits[:, 0] - output.logits[:, 1]))
    assert model(images()).pair_logits is None


def test_one_class(make_clip: MakeClip) -> None:
    model = make(make_clip(), ["edema"]).train()
    output = model(images(), pairs=True)
    assert output.logits.shape == (3, 2, 1)
    assert output.pair_logits is not None
    assert output.pair_logits.shape == (3, 0)
    loss, parts = PromptLoss(LossConfig())(output, torch.ones(3, 1), model.tower)
    loss.backward()
    assert parts["pair"].item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("decoder", KINDS)
@pytest.mark.parametrize("prompts", ["dual", "shared", "positive"])
@pytest.mark.parametrize("prefix", [False, True], ids=["whole", "prefix"])
def test_every_decoder_in_every_prompt_mode(
    make_clip: MakeClip, names: list[str], decoder: str, prompts: str, prefix: bool
) -> None:
    model = make(make_clip(), names, decoder=decoder, prompts=prompts, prefix=prefix).eval()
    output = model(images(), pairs=True)
    assert output.pair_logits is not None
    assert output.prompts.vectors.shape == (4, 3, 16)
    close(output.positive_features.norm(dim=-1), torch.ones(4).double())
    positive, negative = output.logits.unbind(dim=1)
    close(probabilities(output.logits), torch.sigmoid(positive - negative))
    if prompts == "positive":
        assert not negative.any()
    else:
        assert not torch.allclose(positive, negative)
    looks_at_images = (model(images()[:1]).logits - output.logits[:1]).abs().max() > 1e-12
    assert looks_at_images == (decoder != "mlp")
    model.head.impl = "reference"
    literal = model(images(), pairs=True)
    close(literal.logits, output.logits)
    close(literal.pair_logits, output.pair_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prompts_are_two_projections_of_one_decoder(kind: str) -> None:
    torch.manual_seed(0)
    learner = learner_of(kind, width=6, text_width=5, hidden_size=4, decoder_heads=2, prompt_length=3, dropout=0.5)
    assert learner.neg_output is not None
    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = getattr(learner.pos_decoder.projection, name)
            getattr(learner.neg_output, name).copy_(2 * parameter)
    positive, negative = learner.train()(torch.randn(4, 6), torch.randn(2, 6))  # one dropout for both
    torch.testing.assert_close(negative, 2 * positive)


def test_drop_path_only_in_training(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names, decoder="transformer", dropout=0, drop_path=0.5)
    assert torch.equal(model.eval()(images()).logits, model(images()).logits)
    assert not torch.equal(model.train()(images()).logits, model(images()).logits)
    model = make(make_clip(), names, decoder="transformer", dropout=0, drop_path=0).train()
    assert torch.equal(model(images()).logits, model(images()).logits)
    factors = DECODERS["transformer"].random_factors(0.5, 2, 100, torch.zeros(8, 6))["branches"]
    assert factors.shape == (2, 100, 2, 3, 8)
    assert torch.equal(factors[:, :, 0], torch.ones(2, 100, 3, 8))
    assert set(factors[:, :, 1].unique().tolist()) == {0.0, 2.0}
    assert factors[:, :, 1].mean().item() == pytest.approx(1, abs=0.1)


def test_dropout_only_in_training(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names, dropout=0.5)
    assert torch.equal(model.eval()(images()).logits, model(images()).logits)
    assert not torch.equal(model.train()(images()).logits, model(images()).logits)
    model = make(make_clip(), names, dropout=0).train()
    assert torch.equal(model(images()).logits, model(images()).logits)


def test_a_fixed_context_makes_scores_independent_of_the_batch(make_clip: MakeClip, names: list[str]) -> None:
    model, bank = make(make_clip(), names).eval(), torch.randn(5, 24).double()
    whole = model(images(), context=bank).logits
    close(model(images()[:1], context=bank).logits, whole[:1])
    assert (model(images()[:1]).logits - model(images()).logits[:1]).abs().max() > 1e-9
    features = image_features(model.clip, images())
    text = model.head.text_features(bank, model.class_set, model.tower)
    assert torch.equal(model.head(features, model.class_set, model.tower, text=text).logits, whole)


def test_other_classes(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names).eval()
    model.set_classes(["pneumonia", "edema"])
    assert model(images()).logits.shape == (3, 2, 2)
    close(model.class_set.class_features[1], make(make_clip(), names).class_set.class_features[2])


@pytest.mark.parametrize("fusion", SPATIAL)
def test_summing_positions_first_is_exact(fusion: str) -> None:
    """Per-position logits, summed at the end, and the one vector an image give the same logits."""
    torch.manual_seed(0)
    module, tokens, text = spatial(fusion).double(), torch.randn(2, 5, 8).double(), torch.randn(3, 8).double()
    gate = module.gate(tokens)[..., None]
    rows = {
        "gate_after_norm": gate * normalize(tokens, dim=-1),
        "gate_before_norm": normalize(gate * tokens, dim=-1),
        "ungated": normalize(tokens, dim=-1),
        "global": normalize(tokens, dim=-1)[:, :1],
    }[fusion]
    close(module(tokens) @ text.T, torch.einsum("bsd,cd->bsc", rows, text).sum(dim=1))


def test_gate_is_a_convolution_over_positions() -> None:
    module, tokens = spatial("gate_after_norm").double(), torch.randn(1, 4, 3).double()
    a, b, c = module.conv.weight.flatten()
    pooled = torch.cat([torch.zeros(1), tokens[0].mean(-1) + tokens[0].max(-1).values, torch.zeros(1)])
    close(module.gate(tokens)[0], torch.sigmoid(a * pooled[:-2] + b * pooled[1:-1] + c * pooled[2:]))


def test_the_published_order_cancels_the_gate() -> None:
    tokens = torch.randn(2, 5, 8).double()
    gradients = {}
    for fusion in ("gate_before_norm", "gate_after_norm"):
        torch.manual_seed(0)
        module = spatial(fusion).double()
        module(tokens).square().sum().backward()
        assert module.conv.weight.grad is not None
        gradients[fusion] = module.conv.weight.grad.abs().max().item()
    assert gradients["gate_before_norm"] < 1e-13
    assert gradients["gate_after_norm"] > 1e-3
    close(spatial("gate_before_norm").double()(tokens), spatial("ungated")(tokens))


def test_ungated_orders_train_no_gate() -> None:
    assert not spatial("ungated").conv.weight.requires_grad
    assert not spatial("global").conv.weight.requires_grad


def test_fusion_is_float32_under_autocast() -> None:
    tokens = torch.randn(2, 5, 8).bfloat16()
    module = spatial("gate_after_norm")
    with torch.autocast("cpu", torch.bfloat16):
        vectors = module(tokens)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, module(tokens.float()))


def test_head_under_autocast_stays_close(make_clip: MakeClip, names: list[str]) -> None:
    model = make(make_clip(), names).float().eval()
    exact = model(images().float()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images().float(), pairs=True)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, exact, rtol=0.1, atol=1.0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "empty"),
        (["edema", " "], "number 2"),
        (["edema", "nodule", "edema"], "duplicates"),
        (["Edema", "edema"], "upper and lower case"),
        (["edema", "long " * 80], "tokens"),
    ],
)
def test_bad_class_names(make_clip: MakeClip, bad: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        make(make_clip(), bad)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_must_fit_the_context(make_clip: MakeClip, names: list[str]) -> None:
    clip = make_clip()
    for length in (8, 16, 32):  # the paper's, table 6
        assert make(clip, names, prompt_length=length).class_set.names == names
    with pytest.raises(UserError, match=r"32 vectors make pair prompts of 78 tokens.*shorten the class names") as error:
        make(clip, ["a b c d e f", "g h i j k l"], prompt_length=32, prefix=True)
    assert "\n" not in str(error.value)
    assert make(clip, names, prompt_length=37)(images(), pairs=True).logits.isfinite().all()
    with pytest.raises(UserError, match="78 tokens"):
        make(clip, names, prompt_length=38)
    with pytest.raises(UserError, match="shorten the class names"):
        make(clip, names, prompt_length=36, prefix=True)


def test_vocabulary_is_cut_exactly_and_not_saved(make_clip: MakeClip, names: list[str]) -> None:
    clip = make_clip()
    class_set = make_class_set(clip, names)
    close(class_set.class_features, clip.encode_text(tokenize(names)))
    assert not class_set.state_dict()


def test_head_alone_has_no_tower() -> None:
    head = PromptHead(24, 16, ModelConfig(**SMALL))  # type: ignore[arg-type]
    assert not list(head.buffers())
    assert sum(p.numel() for p in head.parameters()) == sum(t.numel() for t in head.state_dict().values())
