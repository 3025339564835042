"""Choices are files: found without an import, imported when asked for, refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pspg.engine.models.decoders import DECODERS
from pspg.engine.models.fusions import FUSIONS
from pspg.engine.training.losses.classification import CLASSIFICATION_LOSSES
from pspg.engine.training.losses.pair import PAIR_LOSSES
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.registry import Registry, choices

ALL = [DECODERS, FUSIONS, CLASSIFICATION_LOSSES, PAIR_LOSSES]


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.setting)
def test_every_file_registers_one_class_under_its_name(registry: Registry) -> None:
    assert registry.names() == choices(registry._folder)
    assert [registry[name].name for name in registry.names()] == list(registry.names())
    assert [registry[name].__module__.rpartition(".")[2] for name in registry.names()] == list(registry.names())


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"^model.fusion: 'gated' is not one of gate_after_norm, .*, ungated$"):
        FUSIONS["gated"]


def test_a_class_of_ones_own_is_registered_once(tmp_path: Path) -> None:
    (tmp_path / "listed.py").touch()
    (tmp_path / "_helper.py").touch()
    registry: Registry = Registry("model.thing", "things", str(tmp_path / "__init__.py"))

    @registry.register
    class Own:
        name = "own"

    assert registry["own"] is Own
    assert registry.names() == ("listed", "own")
    with pytest.raises(ValueError, match="'own' is registered twice"):
        registry.register(type("Other", (), {"name": "own"}))
