"""Writers of one file and of one folder: links, crowds, full disks, dead processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pspg.engine.cli import main
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, new_folder, replacing, write_text
from pspg.engine.utils.lock import LOCK, one_writer

HOLD = """
import sys, time
from pspg.engine.utils.lock import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", [".a.csv.tmp", "a.csv.tmp", ".a.csv.partial"])
def test_no_planted_link_is_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "victim")
    write_text(tmp_path / "a.csv", "new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.csv").read_text() == "new"


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "standard output"])
def test_devices_and_pipes_are_never_replaced(tmp_path: Path, kind: str) -> None:
    """As root, an output of /dev/null would otherwise be a plain file from then on, for the whole machine."""
    path, pipe = tmp_path / "output", tmp_path / "pipe"
    os.mkfifo(path if kind == "pipe" else pipe)
    if kind != "pipe":
        targets = {"link to a pipe": pipe, "link to a device": "/dev/null", "standard output": "/proc/self/fd/1"}
        path.symlink_to(targets[kind])
    before = path.lstat()
    for attempt in (lambda: write_text(path, "scores"), lambda: check_output(path, folder=False)):
        with pytest.raises(UserError, match="is a device or a pipe"):
            attempt()
    assert path.lstat() == before


def test_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    texts = [str(number) * 200_000 for number in range(8)]
    writers = [threading.Thread(target=write_text, args=(tmp_path / "a", text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "a").read_text() in texts
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "a", "")
    with new_folder(tmp_path / "folder"):
        pass
    (tmp_path / "usual folder").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "usual folder").stat().st_mode


def test_two_new_folders_of_one_name(tmp_path: Path) -> None:
    def both() -> None:
        with new_folder(tmp_path / "a") as one:
            (one / "mine").write_text("")
            with new_folder(tmp_path / "a") as other:
                (other / "theirs").write_text("")

    with pytest.raises(UserError, match="filled by another process"):
        both()
    assert os.listdir(tmp_path / "a") == ["theirs"]
    assert os.listdir(tmp_path) == ["a"]


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_writer_is_told_of_the_first_and_takes_over_from_the_dead(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    told = f"output: .*run is in use by another process \\(host .*, process {holder.pid}\\)"
    with pytest.raises(UserError, match=told), one_writer(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    run = tmp_path / "run"
    with one_writer(run), pytest.raises(UserError, match="by this process"), one_writer(run):
        pass
    assert not os.listdir(tmp_path / "run")


@pytest.mark.parametrize("age", [0, 100])
def test_another_machines_lock_counts_while_it_is_fresh(tmp_path: Path, age: int) -> None:
    """As where NFS is mounted without locks."""
    lock = tmp_path / LOCK
    lock.write_text('{"host": "elsewhere\\u001b", "process": 7}')
    os.utime(lock, (lock.stat().st_mtime - age,) * 2)
    if age:
        with one_writer(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match=r"host elsewhere\\x1b, process 7"), one_writer(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 1}', '{"host": "a", "process": []}', "\x00" * 50])
def test_a_garbled_lock_of_nobody_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with one_writer(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_nothing_written_leaves_no_folder(tmp_path: Path) -> None:
    with one_writer(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())


def test_commands_are_refused_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(tmp_path)
    try:
        (tmp_path / "train.jsonl").write_text("")
        manifest = str(tmp_path / "train.jsonl")
        train = ["train", "--data.train", manifest, "--model.pretrained", "random"]
        for words in (train, ["evaluate", "--clip", "RN50", "--manifest", manifest]):
            assert main([*words, "--device", "cpu", "--output", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert "in use by another process" in error
            assert error.count("\n") == 1
    finally:
        holder.kill()
        holder.wait()
