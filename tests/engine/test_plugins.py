"""Parts of one's own from a module that the user names: used, shown, recorded, and never imported by a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.cli import main, parse
from pspg.engine.data.datasets import register_dataset
from pspg.engine.data.preparation.dataset import DataSet, PrepareConfig
from pspg.engine.evaluation import metrics
from pspg.engine.evaluation.report import evaluation
from pspg.engine.evaluation.report.evaluation import register_metric
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.plugins import load_plugins

EXAMPLE = Path(__file__).parents[2] / "configs/plugins/example.py"
CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"encoder": "patches", "image_size": 64, "patch": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is imported from it is forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
def test_the_example_prepares_trains_evaluates_and_ships(settings: Callable[[str], list[str]], tmp_path: Path) -> None:
    """In processes of their own: what is registered stays registered."""
    shutil.copy(EXAMPLE, tmp_path / "own_parts.py")
    (tmp_path / "clip.json").write_text(json.dumps(CLIP))
    films = tmp_path / "films"
    films.mkdir()
    noise = np.random.default_rng(0)
    for number in range(24):
        film = noise.integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(film).save(films / f"p{number // 2:03}-{('effusion', 'edema')[number % 2]}.png")

    data = ["--data.train", "data/train.jsonl", "--data.val", "data/train.jsonl"]
    short = ["--optim.epochs", "1", "--optim.warmup_epochs", "0", "--output", "run"]
    training = [*settings("prompt"), "--model.backbone", "clip.json", *data, *short]
    own = ["--model.decoder", "mean", "--loss.classification", "squared"]
    evaluation = ["evaluate", "--checkpoint", "run", "--manifest", "data/train.jsonl", "--workers", "0"]
    prediction = ["predict", "--input", "films", "--workers", "0"]
    said = in_a_process(
        tmp_path,
        (0, ["prepare", "clinic", "--source", "films", "--output", "data", "--image_size", "64"]),
        (2, [*training, "--model.decoder", "meen"]),
        (0, [*training, *own]),
        (0, [*evaluation, "--evaluation.bootstrap", "0", "--output", "report"]),
        (0, ["export-checkpoint", "--checkpoint", "run", "--output", "shipped", "--layout", "classifier"]),
        (0, [*prediction, "--checkpoint", "shipped", "--output", "a.csv"]),
        (0, [*prediction, "--checkpoint", "run", "--output", "b.csv"]),
        plugins=["--plugins", "own_parts"],
    )
    assert "model.decoder: 'meen' is not one of context, gru, lstm, mean, mlp, transformer" in said
    assert (tmp_path / "data/classes.txt").read_text().split() == ["edema", "effusion"]
    assert json.loads((tmp_path / "run/model.json").read_text())["plugins"] == ["own_parts"]
    found = json.loads((tmp_path / "report/metrics.json").read_text())["results"]["PsPG"]["all"]
    assert found["brier_skill"] < 1
    assert "Brier skill" in (tmp_path / "report/report.html").read_text()
    tables = [np.genfromtxt(tmp_path / name, delimiter=",", skip_header=1)[:, 1:] for name in ("a.csv", "b.csv")]
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-6)
    said = in_a_process(
        tmp_path,
        (2, [*prediction, "--checkpoint", "run", "--output", "c.csv"]),
        (2, [*prediction, "--checkpoint", "shipped", "--output", "c.csv"]),
        then="import own_parts, pspg.engine as pspg, pathlib\n"
        "model = pspg.load_model('run', device='cpu')\n"
        "print(model.probabilities(sorted(pathlib.Path('films').glob('*.png'))).shape)\n",
    )
    assert said.count("modules that are not loaded: give --plugins own_parts, or import them before\n") == 2
    assert said.endswith("(24, 2)\n")


def in_a_process(folder: Path, *commands: tuple[int, list[str]], plugins: Sequence[str] = (), then: str = "") -> str:
    """Run commands in one new process and check how each ends; what was said."""
    words = [(status, [*arguments, *plugins]) for status, arguments in commands]
    script = "import sys, json\nfrom pspg.engine.cli import main\n"
    script += "for status, words in json.loads(sys.argv[1]):\n    assert main(words) == status, words\n" + then
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_checkpoint_imports_nothing_by_itself(model_folder: Callable[..., Path], here: Path) -> None:
    folder = model_folder()
    (here / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    description = json.loads((folder / "model.json").read_text())
    description["plugins"] = ["evil"]
    description["head"]["decoder"] = "mean"
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"model\.decoder: 'mean' is not one of .*: give --plugins evil, or import"):
        load_model(folder)
    assert not (here / "ran").exists()
    assert "evil" not in sys.modules


def test_modules_and_files_are_found_from_the_current_folder_and_imported_once(here: Path) -> None:
    (here / "first_plugin.py").write_text("import pathlib; pathlib.Path('first').open('a').write('x')")
    (here / "code").mkdir()
    (here / "code/second_plugin.py").write_text("import pathlib; pathlib.Path('second').open('a').write('x')")
    (here / "own.yaml").write_text("plugins: [first_plugin, code/second_plugin.py]\n")
    config = parse(["train", "own.yaml"])[1]
    assert config.plugins == ["first_plugin", "code/second_plugin.py"]
    load_plugins(config.plugins)
    assert parse(["train", "--plugins", "[first_plugin, code/second_plugin.py]"])[1].plugins == config.plugins
    assert parse(["predict", "--plugins=first_plugin"])[1].plugins == "first_plugin"
    assert (here / "first").read_text() == (here / "second").read_text() == "x"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("brokn_plugin", "plugins: there is no module brokn_plugin, also not in .*; did you mean broken_plugin"),
        ("gone.py", "plugins: gone.py: no such file"),
        ("broken_plugin", r"plugins: broken_plugin: .*broken_plugin\.py:2: ZeroDivisionError: division by zero"),
        ("wrong_plugin", r"plugins: wrong_plugin: .*wrong_plugin\.py:1: SyntaxError: "),
        ("needs_plugin", r"plugins: needs_plugin: .*needs_plugin\.py:1: ModuleNotFoundError: .*no_such_module_at_all"),
        ("code/json.py", "plugins: code/json.py: there is another module json; give the file another name"),
        ("taken_plugin", "plugins: taken_plugin: .*: ValueError: model.decoder: 'gru' is registered twice"),
    ],
)
def test_mistakes_in_plugins_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], plugin: str, message: str
) -> None:
    (here / "broken_plugin.py").write_text("x = 1\n1 / 0\n")
    (here / "wrong_plugin.py").write_text("def (:\n")
    (here / "needs_plugin.py").write_text("import no_such_module_at_all\n")
    (here / "taken_plugin.py").write_text(
        "from pspg.engine import DECODERS\n@DECODERS.register\nclass Own:\n    name = 'gru'\n"
    )
    (here / "code").mkdir()
    (here / "code/json.py").touch()
    assert main(["train", "--plugins", plugin, "--data.train", "x.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_metric_of_ones_own_is_a_metric_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "OWN", {})
    monkeypatch.setattr(evaluation, "OWN", metrics.OWN)
    monkeypatch.setattr(evaluation, "SUMMARY", dict(evaluation.SUMMARY))
    labels, scores = np.array([[1, 0], [0, -1]]), np.array([[0.9, 0.2], [0.4, 0.7]])
    assert not metrics.evaluate(labels, scores, ["a", "b"]).own

    @register_metric("masked", "Masked")
    def masked(labels: np.ndarray, probabilities: np.ndarray) -> float:
        probabilities[:] = 0  # what it does to its arrays stays with it
        return (labels < 0).mean()

    found = metrics.evaluate(labels, scores, ["a", "b"])
    assert found.masked == 0.25
    assert found.macro_auc == 1
    assert evaluation.SUMMARY["masked"] == "Masked"
    with pytest.raises(AttributeError):
        found.unmasked  # noqa: B018
    register_metric("wrong")(lambda labels, probabilities: labels[7])
    with pytest.raises(UserError, match=r"^metric wrong: tests\..*: IndexError: index 7 is out of bounds[^\n]*$"):
        metrics.evaluate(labels, scores, ["a", "b"])
    for name in ("macro_auc", "per class"):
        with pytest.raises(ValueError, match="choose another name"):
            register_metric(name)


@pytest.mark.parametrize("name", ["folder", "mimic-cxr", "check"])
def test_a_data_set_of_ones_own_takes_no_word_of_the_engine(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is '{name}' already"):
        register_dataset(DataSet(name, "mine", PrepareConfig, lambda config, journal: ([], [])))
