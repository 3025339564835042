"""Files with the same bytes under several names: one image, which counts twice or is in two splits."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .manifest import Manifest, Sample

log = logging.getLogger(__name__)

START = 64 * 1024
"""bytes that are compared before whole files are"""


@dataclass(frozen=True)
class Place:
    """An image where a manifest has it."""

    manifest: Path
    sample: Sample

    def __str__(self) -> str:
        return f"{self.manifest}:{self.sample.line}"


def find_copies(manifests: Sequence[Manifest]) -> list[tuple[Place, Place]]:
    """Every image whose bytes an earlier file of the manifests has, and where that is; in the manifests' order.

    Files of one size are compared by their start, those that still agree as a whole (SHA-256). A file under two ids is
    no copy; one that cannot be read is left out.
    """
    places: dict[Path, Place] = {}
    for manifest in manifests:
        for sample in manifest.samples:
            places.setdefault(sample.path, Place(manifest.path, sample))
    groups: Iterable[list[Path]] = [list(places)]
    for key in (_size, _start, _digest):
        groups = _split(list(groups), key)
    order = {path: number for number, path in enumerate(places)}
    pairs = [(places[group[0]], places[other]) for group in groups for other in group[1:]]
    return sorted(pairs, key=lambda pair: order[pair[1].sample.path])


def tell_copies(copies: Sequence[tuple[Place, Place]]) -> None:
    """One warning for each pair of manifests, or one manifest, with the first copy and how many there are."""
    found: dict[tuple[Path, Path], list[tuple[Place, Place]]] = defaultdict(list)
    for pair in copies:
        found[pair[0].manifest, pair[1].manifest].append(pair)
    for (one, other), pairs in found.items():
        first, copy = pairs[0]
        what = "count twice" if one == other else "are in both manifests, so that neither tests what learned the other"
        log.warning(
            f"{copy} and {first}: the same image, {copy.sample.path.name!r} has the bytes of "
            f"{first.sample.path.name!r}; {len(pairs):,} such copies {what}"
        )


def _split(groups: Sequence[list[Path]], key: Callable[[Path], Hashable]) -> Iterator[list[Path]]:
    """Of each group the files that agree in `key`, where there are several."""
    total = sum(map(len, groups))
    with tqdm(total=total, desc="comparing files", unit="file", delay=2, disable=None, leave=False) as bar:
        for group in groups:
            same: dict[Hashable, list[Path]] = defaultdict(list)
            for path in group:
                bar.update()
                try:
                    same[key(path)].append(path)
                except OSError:
                    continue
            yield from (paths for paths in same.values() if len(paths) > 1)


def _size(path: Path) -> int:
    """Bytes of a file; a pipe or device, which reading may never end, counts as unreadable."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise OSError
    return status.st_size


def _start(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.sha256(file.read(START)).digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
