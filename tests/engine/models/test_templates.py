"""Fixed templates: names that do not fit are refused, never cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from pspg.engine.models.clip import tokenize
from pspg.engine.models.templates import NEGATIVE, POSITIVE, _whole, sentences, template_texts
from pspg.engine.utils.errors import UserError

MakeClip = Callable[..., open_clip.CLIP]
LONGEST = 77 - 2 - max(len(SimpleTokenizer().encode(template.format(""))) for template in (POSITIVE, NEGATIVE))
"""words of one token in a name that just fits"""


@pytest.mark.parametrize("tokenizer", [None, SimpleTokenizer(context_length=77), partial(tokenize, context_length=77)])
def test_a_name_is_used_whole_or_refused(make_clip: MakeClip, tokenizer: Callable[..., torch.Tensor] | None) -> None:
    clip, device = make_clip().float(), torch.device("cpu")
    fits, too_long = (" ".join(["heart"] * count) for count in (LONGEST, LONGEST + 1))
    shorter = " ".join(["heart"] * (LONGEST - 1)) + " left"
    texts = template_texts(clip, [fits, shorter, "!!!"], device, tokenizer=tokenizer)
    assert not torch.equal(texts.negative[0], texts.negative[1])
    for name in (too_long, f"{fits} without effusion", " ".join(["heart"] * 200)):
        with pytest.raises(UserError, match=r"class names: 'heart heart .* context of 77 holds; shorten it"):
            template_texts(clip, ["edema", name], device, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("No Finding", "abnormality"),
        ("No finding", "abnormality"),
        ("no_finding", "abnormality"),
        ("NO  FINDINGS", "abnormality"),
        ("normal", "abnormality"),
        ("Healthy", "abnormality"),
        ("unchanged", "change"),
        ("no change", "change"),
        ("No Pleural Effusion", "Pleural Effusion"),
        ("no evidence of edema", "edema"),
        ("without edema", "edema"),
        ("absence of edema", "edema"),
        ("normal heart size", "abnormal heart size"),
    ],
)
def test_an_absence_is_not_negated_twice(name: str, absent: str) -> None:
    turned = (f"No evidence of {absent}.", f"Findings suggesting {absent}.")
    assert sentences(name) == turned
    assert sentences(name, "literal") == (f"Findings suggesting {name}.", f"No evidence of {name}.")


@pytest.mark.parametrize(
    "name", ["Edema", "nodule", "Nontuberculous mycobacteria", "abnormal", "no", "Norma", "exclude", "suboptimal study"]
)
def test_other_classes_are_in_the_templates_as_they_are(name: str) -> None:
    assert sentences(name) == sentences(name, "literal") == (POSITIVE.format(name), NEGATIVE.format(name))


def test_features_of_an_absence_change_places(make_clip: MakeClip) -> None:
    clip, device = make_clip().float(), torch.device("cpu")
    texts = template_texts(clip, ["edema", "no edema"], device)
    torch.testing.assert_close(texts.positive, texts.negative.flip(0))
    literal = template_texts(clip, ["edema", "no edema"], device, absences="literal")
    torch.testing.assert_close(literal.positive[0], texts.positive[0])
    assert not torch.allclose(literal.positive[1], texts.positive[1])


def test_tokenizers_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "heart", "edema"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    check_at_twelve(HFTokenizer(str(tmp_path), context_length=12), longest=10)


class LastTokenBehindPadding:
    """As open_clip's tokenizer mode "clips"."""

    tokenizer_mode = "clips"

    def __call__(self, texts: list[str], context_length: int = 12) -> torch.Tensor:
        rows = [[7] * len(text.split()) for text in texts]
        return torch.tensor([[*(row + [0] * context_length)[: context_length - 1], 9] for row in rows])


def test_a_last_token_behind_the_padding() -> None:
    check_at_twelve(LastTokenBehindPadding(), longest=11)


def check_at_twelve(tokenizer: Callable[..., torch.Tensor], longest: int) -> None:
    names = ["edema", " ".join(["heart"] * longest)]
    assert _whole(tokenizer, names, names).shape == (2, 12)
    for count in (longest + 1, 40):
        with pytest.raises(UserError, match="'heart"):
            _whole(tokenizer, ["edema", " ".join(["heart"] * count)], names)
