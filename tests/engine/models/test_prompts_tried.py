"""The variants that configs/studies/phantom/prompts.yaml compares: they build, learn, and differ from plain ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[3] / "configs/plugins/prompts_tried.py"
SCRIPT = """
import sys
import torch
import pspg.engine as pspg
pspg.load_plugins([sys.argv[1]])
from pspg.engine.models.decoders import DECODERS
from pspg.engine.models.pspg import PromptHead
from pspg.engine.training.losses.classification import CLASSIFICATION_LOSSES
from pspg.engine.training.losses.pair import PAIR_LOSSES
from types import SimpleNamespace as Given

features, images, table = torch.randn(5, 24), torch.randn(7, 24), torch.randn(49408, 16)
prompts = {}
for name in ("gru", "gru_centred", "gru_bank", "gru_template"):
    torch.manual_seed(0)
    config = pspg.ModelConfig(decoder=name, prompt_length=4, hidden_size=8, decoder_heads=2, dropout=0.0)
    learner = PromptHead(24, 16, config).prompt_learner.train()
    learner.start(table)
    prompts[name] = learner(features, images, impl="eager")
    prompts[name].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters()), name
    again = learner.eval()(features, torch.randn(7, 24), impl="eager")
    assert torch.allclose(again, prompts[name], atol=1e-6) == (name == "gru_bank"), name
words = prompts["gru_template"] - prompts["gru"]
assert torch.allclose(words, words[:, :1].expand_as(words), atol=1e-5) and words.abs().max() > 1
logits, labels = torch.randn(6, 2, 5, requires_grad=True), torch.randint(-1, 2, (6, 5))
plain = CLASSIFICATION_LOSSES["asl"](pspg.LossConfig())(logits, labels, reduction="sum", impl="eager")
for name in ("asl_adjusted", "asl_balanced"):
    found = CLASSIFICATION_LOSSES[name](pspg.LossConfig())(logits, labels, reduction="sum", impl="eager")
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all() and not gradient.movedim(1, 2)[labels < 0].any() and found != plain, name
one = torch.nn.functional.normalize(torch.randn(5, 24), dim=-1)
apart = PAIR_LOSSES["apart"]()
def loss(positive, negative):
    return apart(Given(output=Given(positive_features=positive, negative_features=negative)))
assert loss(one, one) > loss(one, -one.roll(1, 0)) > 0
assert loss(torch.eye(5), torch.eye(5).roll(1, 0)) == 0
print("fine")
"""


@pytest.mark.slow
def test_variants_build_and_learn() -> None:
    """In a process of its own: what is registered stays registered."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(PLUGIN)], capture_output=True, text=True, timeout=200)
    assert done.stdout.endswith("fine\n"), done.stderr[-2000:]
