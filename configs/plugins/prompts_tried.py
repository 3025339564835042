"""Ways to better prompts on seen classes, as plugins: what configs/studies/phantom/prompts.yaml compares.

None earned a place in the engine; the table is configs/studies/phantom/results/prompts.md.
"""

import torch
import torch.nn.functional as F

import pspg.engine as pspg
from pspg.engine.models.clip import tokenizer
from pspg.engine.models.decoders import PromptDecoder
from pspg.engine.models.decoders._base import PromptLearner
from pspg.engine.models.decoders.gru import GRUDecoder
from pspg.engine.models.templates import NEGATIVE, POSITIVE
from pspg.engine.training.losses.classification.asl import AsymmetricLoss
from pspg.engine.training.losses.pair import PairLoss


class CentredLearner(PromptLearner):
    """A GRU that sees class features minus the training classes' mean."""

    def __init__(self, width, text_width, config):
        super().__init__(GRUDecoder, width, text_width, config)
        self.register_buffer("centre", torch.zeros(width))

    def forward(self, class_features, context, *, impl="auto"):
        if self.training:
            self.centre.copy_(class_features.mean(dim=0))
        return super().forward(class_features - self.centre, context, impl=impl)


class BankLearner(PromptLearner):
    """A GRU that attends to one batch of training images, the first, in training and ever after."""

    def __init__(self, width, text_width, config):
        super().__init__(GRUDecoder, width, text_width, config)
        self.register_buffer("bank", torch.zeros(128, width))

    def forward(self, class_features, context, *, impl="auto"):
        if self.training and not self.bank.any():
            self.bank.copy_(context[torch.arange(len(self.bank), device=context.device) % len(context)])
        return super().forward(class_features, self.bank, impl=impl)


class TemplateLearner(PromptLearner):
    """A GRU whose output is added to the templates' words, before the class name; it starts near the templates."""

    def __init__(self, width, text_width, config):
        super().__init__(GRUDecoder, width, text_width, config)
        self.register_buffer("words", torch.zeros(2, config.prompt_length, text_width))

    @torch.no_grad()
    def start(self, token_embedding):
        for words, template in zip(self.words, (POSITIVE, NEGATIVE), strict=True):
            tokens = tokenizer().encode(template.partition("{}")[0].strip())
            words[-len(tokens) :] = token_embedding[tokens]

    def forward(self, class_features, context, *, impl="auto"):
        return self.words[:, None] + super().forward(class_features, context, impl=impl)


def _decoder(title, learner_class, prefix=False):
    class Variant(PromptDecoder):
        name = title
        output = "output_proj"
        needs_prefix = prefix

        @classmethod
        def learner(cls, width, text_width, config):
            return learner_class(width, text_width, config)

    pspg.DECODERS.register(Variant)


_decoder("gru_centred", CentredLearner)
_decoder("gru_bank", BankLearner)
_decoder("gru_template", TemplateLearner, prefix=True)


class _Counting(AsymmetricLoss):
    """Asymmetric loss that keeps each class's share of positives so far."""

    def __init__(self, config):
        super().__init__(config)
        self._positives, self._known = 0.0, 0.0

    def _count(self, labels):
        self._positives = self._positives + (labels == 1).sum(dim=0)
        self._known = self._known + (labels >= 0).sum(dim=0)
        return ((self._positives + 1) / (self._known + 2)).float()


@pspg.CLASSIFICATION_LOSSES.register
class LogitAdjusted(_Counting):
    """Log-odds plus those of the class's prevalence, in training only (Menon et al. 2021)."""

    name = "asl_adjusted"

    def __call__(self, logits, labels, *, reduction, impl):
        prior = torch.logit(self._count(labels))
        logits = torch.stack([logits[:, 0] + prior, logits[:, 1]], dim=1)
        return super().__call__(logits, labels, reduction=reduction, impl=impl)


@pspg.CLASSIFICATION_LOSSES.register
class Balanced(_Counting):
    """An image's classes weighted by how rare they are among those it has (Wu et al. 2020), smoothed to 0.1 … 1.1."""

    name = "asl_balanced"

    def __call__(self, logits, labels, *, reduction, impl):
        share, known = self._count(labels), labels >= 0
        wanted = (1 / share) / ((labels == 1) / share).sum(dim=1, keepdim=True).clamp(min=1)
        weights = 0.1 + torch.sigmoid(10 * (wanted - 0.2))  # (B,C)
        p = torch.softmax(logits.float(), dim=1)[:, 0]
        p = torch.where(labels == 1, p, (1 - p + self.config.clip).clamp(max=1)).clamp(min=1e-6)
        gamma = torch.where(labels == 1, self.config.gamma_positive, self.config.gamma_negative)
        losses = -weights / weights.mean() * (1 - p).detach() ** gamma * p.log()
        total = torch.where(known, losses, 0).sum()
        return total if reduction == "sum" else total / known.sum().clamp(min=1)


@pspg.PAIR_LOSSES.register
class Apart(PairLoss):
    """Positive features of different classes, and both features of a class, lie apart: the mean squared cosine."""

    name = "apart"

    def __call__(self, inputs):
        positive, negative = inputs.output.positive_features, inputs.output.negative_features
        classes = len(positive)
        between = (positive @ positive.T).square().fill_diagonal_(0).sum() / (classes * (classes - 1))
        return classes * (between + F.cosine_similarity(positive, negative).square().mean())
