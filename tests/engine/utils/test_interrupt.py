"""Ctrl-C reaches the command, wherever the main thread was."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pspg.engine.cli import COMMANDS, Command, main
from pspg.engine.commands.phantom import DrawConfig
from pspg.engine.utils.interrupt import PAUSE, heard_interrupts


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # Python looks for signals here


class Thing:
    def __init__(self, last: Callable[[], None] | None = None) -> None:
        self.last = last

    def __del__(self) -> None:
        if self.last:
            self.last()


def bare_except() -> None:
    with suppress(BaseException):
        press()


def in_a_destructor() -> None:
    Thing(press)


def in_a_callback() -> None:
    """As importlib has one for the lock of each module."""
    thing = Thing()
    ref = weakref.ref(thing, lambda _: press())
    del thing
    assert ref() is None


def into_another_error() -> None:
    try:
        press()
    except BaseException:
        raise ImportError("cannot import name") from None


@pytest.mark.parametrize("swallow", [press, bare_except, in_a_destructor, in_a_callback, into_another_error])
def test_a_command_is_interrupted_once(
    swallow: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def command(_: Any) -> None:
        try:
            swallow()
            time.sleep(9)
        finally:
            time.sleep(5 * PAUSE)  # an interrupt that is on its way up is left to it
            cleaned.append(True)

    monkeypatch.setitem(COMMANDS, "phantom", Command(DrawConfig, command, "sleep"))
    start = time.monotonic()
    assert main(["phantom"]) == 130
    assert time.monotonic() - start < 8
    assert cleaned == [True]
    captured = capsys.readouterr()
    assert captured.out + captured.err == "pspg-engine phantom: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is not None


def test_what_is_swallowed_again_and_again_is_said_again() -> None:
    heard = 0
    with heard_interrupts() as interrupts:
        press_and_swallow: Callable[[], object] = bare_except
        while heard < 3:
            try:
                press_and_swallow()
                time.sleep(9)
                break
            except KeyboardInterrupt:
                heard += 1
                press_and_swallow = time.time
    assert interrupts.heard
    assert heard == 3


def test_nothing_changes_where_interrupts_are_ignored_or_in_another_thread() -> None:
    """As of a command that a script starts in the background."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heard_interrupts() as interrupts:
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not interrupts.heard
    finally:
        signal.signal(signal.SIGINT, old)

    def elsewhere() -> None:
        with heard_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers: list[Any] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
