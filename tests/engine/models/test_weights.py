"""What a weight file needs and how it is wrapped: set, undone or refused, never loaded into something else."""

import json

import open_clip
import pytest
import torch

from pspg.engine.models.any_clip import load_any_clip
from pspg.engine.models.clip import load_clip
from pspg.engine.models.weights import plain_state, read_weights
from pspg.engine.utils.errors import UserError

VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def architecture(vision=VIT, **changes):
    return {"embed_dim": 24, "vision_cfg": dict(vision), "text_cfg": dict(TEXT), "quick_gelu": True} | changes


def clip_of(config, seed=0):
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return clip


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def openai_file(path, clip):
    """Weights with the settings that OpenAI's archives hold among them, in half precision."""
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    settings = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    torch.save(state | {name: torch.tensor(value) for name, value in settings.items()}, path)
    return str(path)


@pytest.fixture
def quick(tmp_path):
    """A CLIP with QuickGELU, its OpenAI-like file, and images with their features."""
    clip, images = clip_of(architecture()), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return openai_file(tmp_path / "openai.pt", clip), images, clip.encode_image(images)


def test_weights_known_to_need_quick_gelu(tmp_path, quick):
    file, images, features = quick
    silent = {name: value for name, value in architecture().items() if name != "quick_gelu"}
    for config in (silent, architecture()):
        model = load_any_clip(write(tmp_path / "a.json", config), file).model
        torch.testing.assert_close(model.encode_image(images), features, atol=0.01, rtol=0)
    contrary = write(tmp_path / "b.json", architecture(quick_gelu=False))
    with pytest.raises(UserError, match=r"quick_gelu in clip: the weights .* were trained with QuickGELU"):
        load_any_clip(contrary, file)
    for backbone in (contrary, write(tmp_path / "c.json", silent)):
        with pytest.raises(UserError, match=r"model\.quick_gelu: the weights .* with QuickGELU; set .* to true"):
            load_clip(backbone, file, quick_gelu=False)
        with torch.no_grad():
            found = load_clip(backbone, file, quick_gelu=True).eval().encode_image(images)
        torch.testing.assert_close(found, features, atol=0.01, rtol=0)


@pytest.mark.parametrize("trained", [True, False])
def test_a_hub_folder_and_a_known_name_say_it_too(tmp_path, trained):
    folder = tmp_path / "models--laion--CLIP" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    state = clip_of(architecture()).state_dict()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    model = {"model_cfg": architecture(quick_gelu=trained), "preprocess_cfg": {}}
    write(folder / "open_clip_config.json", model)
    name = "vit_b_32-quickgelu-laion400m_e31-d867053b.pt" if trained else "vit_b_16-laion400m_e31-00efa78f.pt"
    torch.save(state, tmp_path / name)
    contrary = write(tmp_path / "a.json", architecture(quick_gelu=not trained))
    for file in (folder / "open_clip_pytorch_model.bin", tmp_path / name):
        with pytest.raises(UserError, match="trained with" if trained else "trained without"):
            load_any_clip(contrary, str(file))
        with pytest.raises(UserError, match="trained with" if trained else "trained without"):
            load_clip(contrary, str(file), quick_gelu=not trained)


def test_another_context_length_is_named(tmp_path):
    torch.save(clip_of(architecture()).state_dict(), tmp_path / "a.pt")
    other = write(tmp_path / "a.json", architecture(text_cfg=TEXT | {"context_length": 64}))
    for load in (load_any_clip, lambda *names: load_clip(*names, quick_gelu=True)):
        with pytest.raises(UserError, match=r"text_cfg\.context_length is 64, the weights have 77"):
            load(other, str(tmp_path / "a.pt"))


@pytest.mark.parametrize("vision", [VIT, RESNET])
def test_another_image_size(tmp_path, vision):
    """Trained towers follow data.image_size; a CLIP that is only scored keeps to its weights."""
    clip, size = clip_of(architecture(vision)), 2 * vision["image_size"]
    torch.save(clip.state_dict(), tmp_path / "a.pt")
    found = load_clip(write(tmp_path / "a.json", architecture(vision)), str(tmp_path / "a.pt"), quick_gelu=True,
                      image_size=size).eval()  # fmt: skip
    assert found.encode_image(torch.randn(1, 3, size, size)).shape == (1, 24)
    pool = (lambda visual: visual.attnpool) if vision is RESNET else (lambda visual: visual)
    old, new = (pool(model.visual).positional_embedding for model in (clip, found))
    torch.testing.assert_close(new[0], old[0])
    side = round((len(old) - 1) ** 0.5)
    shrunk = torch.nn.functional.adaptive_avg_pool2d(new[1:].T.unflatten(1, (2 * side, 2 * side)), side)
    assert (shrunk.flatten(1).T - old[1:]).abs().max() < 0.5 * old[1:].std()
    other = write(tmp_path / "b.json", architecture(vision | {"image_size": size}))
    with pytest.raises(UserError, match=r"vision_cfg\.image_size"):
        load_any_clip(other, str(tmp_path / "a.pt"))


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.module.")
NESTS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "two deep": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_weights(tmp_path, prefix, nest):
    state = {"visual.a": torch.ones(2), "logit_scale": torch.zeros(())}
    wrapped = NESTS[nest]({prefix + name: tensor for name, tensor in state.items()})
    torch.save(wrapped, tmp_path / "a.pt")
    found, _ = read_weights(tmp_path / "a.pt")
    assert found.keys() == state.keys()
    assert torch.equal(found["visual.a"], state["visual.a"])


def test_a_tower_that_was_wrapped_alone():
    found = plain_state({"visual._orig_mod.a": torch.ones(1), "visual.module.b": torch.ones(1)}, "here")
    assert set(found) == {"visual.a", "visual.b"}


def test_what_is_not_one_state_dict():
    one = {"a": torch.ones(1)}
    with pytest.raises(UserError, match=r"several state dicts .*state_dict, model"):
        plain_state({"state_dict": one, "model": one}, "here")
    with pytest.raises(UserError, match="holds a twice"):
        plain_state({"a": torch.ones(1), "module.a": torch.zeros(1)}, "here")
