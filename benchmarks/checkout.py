"""Commits, each in a temporary working tree whose benchmarks import its own code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pspg.engine.utils.errors import UserError

from .rows import Row, read_rows

MAPPED = ("engine", "kernels")
"""folders that are packages below pspg"""


@dataclass(frozen=True)
class Checkout:
    """A commit on disk."""

    ref: str
    """as the user named it"""
    commit: str
    folder: Path
    """holds the working tree, the links that make pspg of it, and results"""

    @property
    def tree(self) -> Path:
        """The working tree."""
        return self.folder / "tree"

    def jobs(self, device: str, only: Sequence[str]) -> list[str]:
        """Keys of the jobs of this commit.

        Raises:
            UserError: there are none, or they cannot be listed.
        """
        listing = ["-m", "benchmarks.suite", "--list", "--device", device]
        return self._finished(self._python([*listing, *_only(only)])).splitlines()

    def measure(self, device: str, jobs: Sequence[str], turn: int) -> list[Row]:
        """Rows of some jobs, measured in a fresh process.

        Raises:
            UserError: the suite of this commit cannot run, or writes other rows.
        """
        output, first = self.folder / f"results-{turn}", self.folder / "results-0"
        if turn:  # the peaks of the device are measured once
            output.mkdir()
            shutil.copy(first / "environment.json", output)
        command = ["-m", "benchmarks.suite", "--output", str(output), "--device", device, *_only(jobs)]
        done = self._python(command)
        rows = read_rows(output) if (output / "rows.json").is_file() else []
        if done.returncode > 1 or not {row.job for row in rows} >= set(jobs):  # 1 alone: a row FAILED
            self._finished(done)
        return [row for row in rows if row.job in set(jobs)]

    def check_imports(self) -> None:
        """Make sure that a process of this commit imports nothing of another.

        Raises:
            UserError: it does, or has no benchmarks.
        """
        names = ["benchmarks.suite", *(f"pspg.{name}" for name in MAPPED)]
        code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
        for name, path in zip(names, self._finished(self._python(["-c", code, *names])).splitlines(), strict=True):
            if not Path(path).resolve().is_relative_to(self.tree.resolve()):
                raise UserError(f"{self.ref}: {name} comes from {path}, which is not the commit's")

    def _python(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        paths = [str(self.folder / "links"), str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        if done.returncode == 130:
            raise KeyboardInterrupt
        return done

    def _finished(self, done: subprocess.CompletedProcess[str]) -> str:
        """What it printed."""
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"{self.ref}: its benchmarks do not run: {reason}")
        return done.stdout


def commit_of(repository: Path, ref: str) -> str:
    """Full name of a commit.

    Raises:
        UserError: no such commit, or one whose working tree has changes that it does not hold.
    """
    if ref.endswith("-dirty"):
        raise UserError(f"{ref}: had changes that no commit holds; commit them and give the commit")
    found = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found is None:
        raise UserError(f"{ref}: is neither a commit nor a folder of results")
    head = _git(repository, "rev-parse", "HEAD")
    if found == head and _git(repository, "status", "--porcelain", "--untracked-files=no"):
        raise UserError(f"{ref}: the working tree has changes that would not be measured; commit or stash them")
    if _git(repository, "cat-file", "-e", f"{found}:benchmarks/suite.py") is None:
        raise UserError(f"{ref}: has no benchmarks/suite.py; choose a later commit")
    return found


@contextmanager
def checked_out(repository: Path, ref: str, commit: str) -> Iterator[Checkout]:
    """A commit in a temporary working tree, removed at the end.

    Args:
        ref: what the user calls it.
        commit: see `commit_of`.

    Raises:
        UserError: see `Checkout.check_imports`.
    """
    checkout = Checkout(ref, commit, Path(tempfile.mkdtemp(prefix="benchmarks-")))
    try:
        if _git(repository, "worktree", "add", "--detach", str(checkout.tree), commit) is None:
            raise UserError(f"{ref}: git cannot check it out below {checkout.folder}; is the disk full?")
        links = checkout.folder / "links" / "pspg"
        links.mkdir(parents=True)
        for name in MAPPED:
            (links / name).symlink_to(checkout.tree / name)
        checkout.check_imports()
        yield checkout
    finally:
        # Forced twice: an interrupted checkout is locked.
        _git(repository, "worktree", "remove", "--force", "--force", str(checkout.tree))
        shutil.rmtree(checkout.folder, ignore_errors=True)


def _git(repository: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("git: is not installed; compare two folders of results instead") from None
    return done.stdout.strip() if done.returncode == 0 else None


def _only(texts: Sequence[str]) -> list[str]:
    return ["--only", *texts] if texts else []
