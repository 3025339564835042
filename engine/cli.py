"""The command `pspg-engine`: settings from YAML and dotted overrides, one line for every mistake."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from .config import plain_range
from .data.datasets import all_datasets
from .data.preparation.build import build
from .utils.errors import DAMAGED, UserError
from .utils.logging import Heard, show_messages
from .utils.workers import loader_deaths
from .utils.yaml_text import bounded, read_yaml

log = logging.getLogger(__name__)

OUT_OF_MEMORY = r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory"

YAML = get_loader("yaml")
set_loader("yaml", bounded(YAML), exceptions=(yaml.YAMLError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings and its function, or where they are, so that --help imports no torch."""

    settings: str | type
    function: str | Callable[[Any], Any]
    help: str
    takes_file: bool = False
    """whether its YAML file may be given without --config"""

    def load(self, what: str | Callable[[Any], Any]) -> Any:
        if not isinstance(what, str):
            return what
        module, _, name = what.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)


def prepare_commands() -> dict[str, Command]:
    """A command for each data set of `data/datasets/`."""
    return {
        f"prepare {dataset.name}": Command(dataset.settings, partial(build, dataset), dataset.help)
        for dataset in all_datasets()
    }


COMMANDS = {
    "train": Command("training.config:TrainConfig", "commands.train:train", "train either phase"),
    "evaluate": Command(
        "evaluation.config:EvaluateConfig", "commands.evaluate:evaluate_model", "metrics, tables and a report"
    ),
    "predict": Command(
        "commands.settings:PredictConfig", "commands.predict:predict", "score images, DICOM files included"
    ),
    "phantom": Command("commands.phantom:DrawConfig", "commands.phantom:draw", "draw a phantom data set"),
    "import-checkpoint": Command(
        "commands.settings:ImportConfig", "commands.convert:import_checkpoint", "read the authors' weights"
    ),
    "export-checkpoint": Command(
        "commands.settings:ExportConfig", "commands.convert:export_checkpoint", "write a model folder"
    ),
    "study": Command(
        "commands.study.config:StudyConfig",
        "commands.study.run:study",
        "run and write a paper's table",
        takes_file=True,
    ),
    **prepare_commands(),
    "prepare check": Command(
        "commands.settings:CheckConfig", "commands.prepare:check_images", "find unreadable images"
    ),
    "prepare cache": Command(
        "commands.settings:CacheConfig", "commands.prepare:make_cache", "decode and resize images once"
    ),
}
# A command of two words, such as "prepare folder", belongs to the group of its first word.
GROUPS = {
    "prepare": "Get a data set ready for training.",
}


@cache
def make_parser(commands: tuple[tuple[str, Command], ...]) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The whole parser, and those of the commands."""
    root = ArgumentParser(
        prog="pspg-engine",
        description="Train, evaluate and use Pseudo-Prompt Generating (PsPG) for chest radiographs.",
        version=version("pspg-engine"),
        exit_on_error=False,
        allow_abbrev=False,
    )
    branches = {"": root.add_subcommands(required=True, dest="command")}
    parsers: dict[str, ArgumentParser] = {}
    for name, command in commands:
        group, _, word = name.rpartition(" ")
        if group not in branches:
            branches[group] = _add_group(branches[""], group)
        settings = command.load(command.settings)
        parser = parsers[name] = ArgumentParser(
            description=(settings.__doc__ or "").strip(),
            epilog="Nested settings are given as --group.key VALUE or in a YAML file; later ones win.",
            exit_on_error=False,
            allow_abbrev=False,
        )
        parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
        parser.add_class_arguments(settings)
        branches[group].add_subcommand(word, parser, help=command.help)
        parser.prog = f"pspg-engine {name}"
        file = "FILE" if command.takes_file else "[--config FILE]"
        parser.usage = f"%(prog)s {file} [--key VALUE ...]"
    return root, parsers


def _add_group(branch: Any, group: str) -> Any:
    """Add the parser of `group`; return the subcommands that its second words go to."""
    parser = ArgumentParser(description=GROUPS[group], exit_on_error=False, allow_abbrev=False)
    branch.add_subcommand(group, parser, help=GROUPS[group][0].lower() + GROUPS[group][1:].rstrip("."))
    parser.prog = f"pspg-engine {group}"
    parser.usage = "%(prog)s COMMAND [--config FILE] [--key VALUE ...]"
    return parser.add_subcommands(required=True, dest="command")


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Name and typed settings of the command.

    Raises:
        UserError: unknown key, wrong type, unreadable file; one line.
    """
    root, parsers = make_parser(tuple(COMMANDS.items()))
    try:
        arguments = _with_config(list(arguments))
        for file in _configs(arguments):
            read_yaml(file, YAML, "config")  # its errors name the file
        values = root.parse_args(arguments)
        name = values.command
        values = values[name]
        if name in GROUPS:
            word = values.command
            name, values = f"{name} {word}", values[word]
        values.pop("config", None)
        settings = COMMANDS[name].load(COMMANDS[name].settings)
        for field in dataclasses.fields(settings):
            if dataclasses.is_dataclass(field.default_factory) and not hasattr(values[field.name], "keys"):
                raise UserError(f"{field.name}: is a group of settings, got {values[field.name]!r}")
        _refuse_null(settings, values)
        return name, plain_numbers(settings(**vars(parsers[name].instantiate(values))))
    except ArgumentError as error:
        raise UserError(one_line(error)) from None
    except UnicodeDecodeError:
        raise UserError("config: is not a UTF-8 text file") from None


def _with_config(arguments: list[str]) -> list[str]:
    """Put --config before a command's bare file.

    Raises:
        UserError: a command that takes a file is given nothing.
    """
    if len(arguments) == 1 and arguments[0] in COMMANDS and COMMANDS[arguments[0]].takes_file:
        raise UserError("give FILE, a YAML file with its settings")
    if len(arguments) > 1 and not arguments[1].startswith("-"):
        command = COMMANDS.get(arguments[0])
        if command is not None and command.takes_file:
            return [arguments[0], "--config", *arguments[1:]]
    return arguments


def _configs(arguments: Sequence[str]) -> list[Path]:
    """The files of --config."""
    given = [b for a, b in pairwise(arguments) if a == "--config"]
    given += [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    return [path for path in map(Path, given) if path.is_file()]


def _refuse_null(settings: type, values: Any, prefix: str = "") -> None:
    """The parser lets null pass for every type."""
    for field in dataclasses.fields(settings):
        value = values[field.name]
        if dataclasses.is_dataclass(field.default_factory):
            _refuse_null(field.default_factory, value, f"{prefix}{field.name}.")
        elif value is None and "None" not in str(field.type):
            raise UserError(f"{prefix}{field.name}: must not be null")


def plain_numbers(settings: Any) -> Any:
    """The settings with int and float in place of the parser's numbers of a limited range, which YAML cannot write."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            plain_numbers(value)
        for kind in (int, float):
            if isinstance(value, kind) and type(value) not in (int, float, bool):
                setattr(settings, field.name, kind(value))
    return settings


def one_line(error: Exception) -> str:
    """Message of a parser error in one line; of the types that a setting may have, what its range refuses."""
    text = str(error)
    key, refused = re.search(r'key "([^"]+)"', text), re.search(r"Not of type \w+: (.*)", text)
    if key and refused:
        value = re.search(r"Given value: (.*)", text) or re.search(r"^(\S+) does not|'(.*)'$", refused[1])
        return f"{key[1]}: {plain_range(refused[1], next(filter(None, value.groups()), '') if value else '')}"
    choice = re.search(r"Expected a typing.Literal\[(.*)\]\. Got value: (.*)", text)
    if key and choice:
        return f"{key[1]}: {choice[2]!r} is not one of {choice[1].replace(chr(39), '')}"
    if "but it was not provided" in text:
        return "give a command; --help lists them"
    return " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 2 after a user's mistake; 3 if all was done, and a damaged checkpoint was met; 130 after Ctrl-C.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Read when torch is imported. Where a rank is lost its store would log C++ traces beside the one line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    show_messages()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = {" ".join(arguments[:words]) for words in (1, 2)} & (COMMANDS.keys() | GROUPS.keys())
    program = " ".join(["pspg-engine", max(known, key=len, default="")]).strip()
    try:
        name, config = parse(arguments)
        if name not in ("train", "evaluate") and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("runs as one process; start it without a launcher")
        function: Callable[[Any], Any] = COMMANDS[name].load(COMMANDS[name].function)
        with loader_deaths(), Heard("pspg.engine.checkpoints") as damage:
            function(config)
        return DAMAGED if damage.warned else 0
    except UserError as error:
        rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if error.local or rank == "0":
            where = f"rank {rank}: " if error.local and ranks != "1" else ""
            log.error("%s: error: %s%s", program, where, error)
        return 2
    except OSError as error:
        log.error("%s: error: %s: %s", program, _file_of(error), error.strerror or error)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        advice = "lower batch_size, data.workers or max_megapixels, or take a machine with more"
        log.error("%s: error: out of memory%s; %s", program, f" ({reason})" if reason else "", advice)
        return 2
    except KeyboardInterrupt:
        log.error("%s: interrupted", program)
        return 130


def _file_of(error: OSError) -> str:
    """The file that an error of the system is about; where the system does not say, what was being written."""
    if error.filename is not None:
        return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    if error.errno == errno.EPIPE:
        return "standard output"
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = (value for names in reversed(frames) for value in names.values())
    return str(next((value for value in values if isinstance(value, Path)), "a file of this command"))


if __name__ == "__main__":
    sys.exit(main())
