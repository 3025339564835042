"""Watch over the ranks of a run: when one is lost or stuck, the others end in time, with one line that names it.

torch has no such thing (README.md compares): torchrun sees only processes that end, a group's timeout names nobody, and
`monitored_barrier` runs where the main thread comes by, on gloo alone, and names a lost rank to rank 0 only.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ..utils.errors import UserError
from .world import World

INTERVAL = 0.5
"""seconds between two signs of life"""
PATIENCE = 4.0
"""seconds without a sign of life after which a rank is lost, once something has failed"""
LINGER = 2 * INTERVAL
"""seconds in which the others read why the run ends, before the one that may serve the store leaves"""
LOST = 1
"""exit status of a rank that lost another"""

_FAILED, _STOP = b"\x00", b"\x01"  # beside them, the signal numbers that Python writes


@dataclass
class _Peer:
    """Another rank, as far as this one knows it."""

    beat: str
    """last sign of life"""
    since: float
    """when that changed, on this process's monotonic clock"""
    progress: int = 0
    host: str = ""
    left: str | None = None
    """why it has ended; empty: its work was done; None: it has not"""


def advance() -> None:
    """Tell the others that this rank has come further, a batch for instance; they may be waiting for it."""
    if _watch is not None:
        _watch.progress += 1


def watch(world: World, timeout: float, report: Callable[[str], None]) -> AbstractContextManager[Any]:
    """A `Watch` over what the ranks do together; nothing for one process."""
    if world.store is None or world.size == 1:
        return nullcontext()
    alone = world.rank == 1 or world.local_rank == 0
    return Watch(world.store, world.rank, world.size, speaks_alone=alone, timeout=timeout, report=report)


class Watch:
    """Context of the work of one rank among several.

    - The beats thread writes to the store every half second that this process lives and how far it is (`advance`), and
      reads what the others wrote. It names a rank that was killed or stopped, whatever the main threads wait for.
    - The judge thread decides. A rank is lost that has been silent for `timeout` seconds; it is stuck if it has stayed
      behind the others for so long while none of them moved. After a failed collective, or SIGTERM (what launchers
      send to the rest once a rank has died), a few seconds of silence do.
    - The verdict is a key of the store: the first rank to write it prints the line, and no other does.
    - All processes then leave at once, with status 1: their main threads may never return from a collective.
    - SIGTERM is read from a wakeup descriptor, as Python runs no handler while the main thread is in a collective.

    A rank that fails by itself prints its own error, and the others leave without a word, even where each has met a
    mistake of its own. A mistake that all ranks meet is left to rank 0 to tell; where it turns out that only others
    have met it, those that go on tell it.

    Args:
        store: shared by all ranks, from `launcher.rendezvous`.
        rank, size: this process and how many there are.
        speaks_alone: whether to speak where the store is gone, so that nobody knows who else does.
        timeout: seconds.
        report: prints a line about what happened.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        speaks_alone: bool,
        timeout: float,
        report: Callable[[str], None],
    ) -> None:
        self._rank, self._timeout, self._report, self._speaks_alone = rank, timeout, report, speaks_alone
        # A connection a thread: one that waits for an answer holds up all that share it.
        self._store, self._for_beats, self._for_verdicts = store, store.clone(), store.clone()
        now = time.monotonic()
        self._others = {other: _Peer("", now) for other in range(size) if other != rank}
        self.progress = 0
        self._moved = self._answered = now
        self._verdict = ""
        self._cleared = threading.Event()
        self._closing = threading.Event()
        self._ears, self._alarm = socket.socketpair()
        self._alarm.setblocking(False)

    def __enter__(self) -> Self:
        global _watch
        _watch = self
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        # Python writes a signal's number there at once, also while the main thread is held in a collective.
        self._old_descriptor = signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        self._beats = threading.Thread(target=self._beat, name="watch: beats", daemon=True)
        self._beats.start()
        threading.Thread(target=self._judge, name="watch: judge", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            try:
                dist.barrier()  # the one that serves the store leaves when no other needs it
            except RuntimeError as late:
                error = late
        if isinstance(error, RuntimeError):
            # A collective fails when another rank is lost; the judge ends this process, or finds nobody missing.
            self._alarm.send(_FAILED)
            self._cleared.wait()
        self._leave(error)
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = " ".join(str(error).split())
            failure = UserError(f"the ranks could not exchange data, though all are alive: {reason}")
            failure.local = True
            raise failure from error

    def _leave(self, error: BaseException | None) -> None:
        global _watch
        _watch = None
        self._closing.set()
        self._beats.join(PATIENCE)  # else its last sign of life might come after the word that this rank has left
        self._alarm.send(_STOP)
        if error is None:
            # After an error SIGTERM stays without effect: what is to be said comes after this.
            signal.set_wakeup_fd(self._old_descriptor)
            signal.signal(signal.SIGTERM, self._old_handler)
        spoken = error is not None and (not isinstance(error, UserError) or error.local or self._rank == 0)
        with suppress(RuntimeError):  # the store may have gone with another rank, and then nobody is left to read this
            if spoken:
                mine = f"rank {self._rank} has told its own error"
                first = self._store.compare_set("verdict", "", mine).decode() == mine
                time.sleep(LINGER)
                if not first and isinstance(error, UserError):
                    os._exit(LOST)  # another rank has told one of its own; a second line would only confuse
            self._store.set(f"beat/{self._rank}", f"left {error or ''}")

    def _beat(self) -> None:
        keys = [f"beat/{other}" for other in self._others]
        number, host = 0, socket.gethostname()
        while not self._closing.is_set():
            number += 1
            try:
                self._for_beats.set(f"beat/{self._rank}", f"{number} {self.progress} {host}")
                *beats, verdict = (value.decode() for value in self._for_beats.multi_get([*keys, "verdict"]))
            except RuntimeError:
                self._alarm.send(_FAILED)
                return
            now = time.monotonic()
            self._answered, self._verdict = now, verdict
            for peer, beat in zip(self._others.values(), beats, strict=True):
                if beat != peer.beat:
                    self._read_beat(peer, beat, now)
            self._closing.wait(INTERVAL)

    def _read_beat(self, peer: _Peer, beat: str, now: float) -> None:
        peer.beat, peer.since = beat, now
        if beat.startswith("left "):
            peer.left = beat.removeprefix("left ")
            return
        _, progress, peer.host = beat.split(" ", 2)
        if int(progress) != peer.progress:
            peer.progress, self._moved = int(progress), now

    def _judge(self) -> None:
        failed: float | None = None
        terminated = False
        last, own = time.monotonic(), 0
        while True:
            alarms = self._ears.recv(64) if select.select([self._ears], [], [], INTERVAL)[0] else b""
            if _STOP in alarms:
                return
            now = time.monotonic()
            terminated |= signal.SIGTERM in alarms
            if failed is None and (terminated or _FAILED in alarms):
                failed = now
            if now - last > PATIENCE:
                # This process itself stood still: the others may have spoken meanwhile.
                self._answered = self._moved = now
                for peer in self._others.values():
                    peer.since = now
            last = now
            if own != self.progress:
                own, self._moved = self.progress, now
            limit = self._timeout if failed is None else min(PATIENCE, self._timeout)
            if self._verdict:
                # Its main thread may be about to end by itself, with something to say.
                time.sleep(PATIENCE / 2)
                self._end()
            elif found := self._lost(now, limit):
                self._tell(found)
            elif failed is not None and now - failed > 1.5 * PATIENCE:
                if terminated:
                    self._tell("stopped by SIGTERM")
                failed = None
                self._cleared.set()

    def _lost(self, now: float, limit: float) -> str | None:
        """Line about ranks that are lost or stuck; None: all are well."""
        silent = [other for other, peer in self._others.items() if peer.left != "" and now - peer.since > limit]
        if silent and now - self._answered > PATIENCE / 2:
            return f"rank 0 or its launcher is lost: no answer for {now - self._answered:.0f} s"
        for other in silent:
            if reason := self._others[other].left:
                return f"rank {other}: {reason}"
        if silent:
            quiet = now - max(self._others[other].since for other in silent)
            return f"{self._names(silent)} lost: no sign of life for {quiet:.0f} s"
        furthest = max(self.progress, *(peer.progress for peer in self._others.values()))
        behind = [other for other, peer in self._others.items() if peer.left is None and peer.progress < furthest]
        if behind and now - self._moved > self._timeout:
            return f"{self._names(behind)} stuck: no progress for over {self._timeout:g} s while the others wait"
        return None

    def _names(self, ranks: list[int]) -> str:
        names = [f"rank {rank} ({self._others[rank].host or 'starting'})" for rank in ranks]
        listing = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"{listing} {'is' if len(names) == 1 else 'are'}"

    def _tell(self, line: str) -> None:
        """End all ranks; the first that comes here says why."""
        mine = f"rank {self._rank}: {line}"
        if time.monotonic() - self._answered > PATIENCE / 2:
            first = self._speaks_alone
        else:
            try:
                first = self._for_verdicts.compare_set("verdict", "", mine).decode() == mine
            except RuntimeError:
                first = self._speaks_alone
        if first:
            self._report(line)
            time.sleep(LINGER)
        self._end()

    def _end(self) -> None:
        if not self._closing.is_set():
            os._exit(LOST)


_watch: Watch | None = None
"""watch of this process"""
