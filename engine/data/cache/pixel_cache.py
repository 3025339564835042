"""The pixel cache: images decoded, windowed and resized once.

A folder holds

- `cache.json`: format, version, `finished`, side `size` in pixels, `resize`, `bit_depth`, and one entry a shard: its
  `number`, how many `images` it has, and the SHA-256 of its two files;
- `pixels-NNNNN.npy`: a shard's pixels, uint8 (images, size, size), one grey channel, a plain NumPy array;
- `index-NNNNN.jsonl`: a line for each of them, in order: `id`, `filepath` (relative to the image root), `bytes` and
  `mtime_ns` of the source file (null: it was not there), and `bad`, the reason, where the image could not be read (its
  pixels are 0);
- `sums-NNNNN.bin`: the CRC-32 of each of them, uint32, little-endian; every reading verifies it.

Where shards hold the same (id, filepath) twice, the later one counts: a file that changed is added again, not replaced.
Files are written beside and renamed, and `cache.json` names only what is complete, so a killed build loses the shard
that it was at. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...config import Resize
from ...utils.documents import Within, as_schema, parse_json
from ...utils.errors import UserError
from ...utils.files import naming
from ...utils.text import printable
from ..bad_image import BadImage
from ..manifest import Sample
from .header import AGAIN, Header, Shard

MOST_OPEN = 128
"""shards that a process holds open"""


@dataclass(frozen=True)
class Entry:
    """One cached image: a line of the index."""

    id: str
    filepath: str
    bytes: Annotated[int, Within(0)] | None
    mtime_ns: Annotated[int, Within(-(2**63), 2**63 - 1)] | None
    bad: str | None = None


def pixels_file(folder: Path, shard: Shard) -> Path:
    """The shard's pixels."""
    return folder / f"pixels-{shard.number:05d}.npy"


def index_file(folder: Path, shard: Shard) -> Path:
    """The shard's index."""
    return folder / f"index-{shard.number:05d}.jsonl"


def sums_file(folder: Path, shard: Shard) -> Path:
    """The checksums of the shard's images."""
    return folder / f"sums-{shard.number:05d}.bin"


def open_pixels(folder: Path, shard: Shard, size: int) -> tuple[int, int]:
    """A shard's pixels, uint8 (images, size, size): a descriptor to read from, and where the first image begins, bytes.

    Not a memory map: of a file that is cut short while it is mapped, reading kills the process.

    Raises:
        UserError: missing, cut short, or an array of another kind.
    """
    path = pixels_file(folder, shard)
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
            start, length = file.tell(), os.fstat(file.fileno()).st_size
            descriptor = os.dup(file.fileno())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, a shard of the cache; {AGAIN}") from None
    except Exception:  # numpy's parser of a damaged header raises almost any type
        raise UserError(f"{path}: a shard cut short or damaged; {AGAIN}") from None
    if shape != (shard.images, size, size) or dtype != np.uint8 or transposed:
        os.close(descriptor)
        raise UserError(f"{path}: not a shard of {shard.images} images of {size} × {size} pixels; {AGAIN}")
    if length != start + shard.images * size * size:
        os.close(descriptor)
        raise UserError(f"{path}: a shard cut short or damaged; {AGAIN}")
    return descriptor, start


def read_index(folder: Path, shard: Shard) -> list[Entry]:
    """A shard's index, its checksum verified.

    Raises:
        UserError: missing or damaged.
    """
    path = index_file(folder, shard)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise UserError(f"{path}: wrong checksum; {AGAIN}")
    try:
        entries = [as_schema(Entry, parse_json(line)) for line in content.splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not an index of the cache ({error}); {AGAIN}") from None
    if len(entries) != shard.images:
        raise UserError(f"{path}: {len(entries)} images, the shard has {shard.images}; {AGAIN}")
    return entries


def read_sums(folder: Path, shard: Shard) -> NDArray[np.int64]:
    """CRC-32 of each image of a shard; -1: an older version wrote none.

    Raises:
        UserError: missing or damaged.
    """
    if shard.sums_sha256 is None:
        return np.full(shard.images, -1, dtype=np.int64)
    path = sums_file(folder, shard)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != shard.sums_sha256 or len(content) != 4 * shard.images:
        raise UserError(f"{path}: wrong checksum; {AGAIN}")
    return np.frombuffer(content, dtype="<u4").astype(np.int64)


def check_pixels(folder: Path, shard: Shard) -> None:
    """Verify the checksum of a shard's pixels.

    Raises:
        UserError: missing or damaged.
    """
    path = pixels_file(folder, shard)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from None
    if found != shard.pixels_sha256:
        raise UserError(f"{path}: wrong checksum; {AGAIN}")


def source_state(path: str | Path) -> tuple[int | None, int | None]:
    """Size (bytes) and modification time (ns) of a source file; None, None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def is_stale(entry: Entry, path: Path) -> bool:
    """The source has changed since it was cached. One that is gone has not: a cache outlives its sources."""
    state = source_state(path)
    return state != (None, None) and state != (entry.bytes, entry.mtime_ns)


def find_entries(folder: Path, header: Header, samples: Sequence[Sample]) -> dict[int, tuple[int, Entry]]:
    """Row of `samples` → its row of the cache (counted over all shards) and its entry, for those it holds."""
    rows_of: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows_of.setdefault(sample.id, []).append(row)
    found: dict[int, tuple[int, Entry]] = {}
    for number, entry in enumerate(_entries(folder, header)):
        for row in rows_of.get(entry.id, ()):
            if f"/{samples[row].path}".endswith(f"/{entry.filepath}"):
                found[row] = number, entry
    return found


def _entries(folder: Path, header: Header) -> Iterator[Entry]:
    for shard in tqdm(header.shards, f"reading {printable(folder.name)}", delay=2, disable=None, leave=False):
        yield from read_index(folder, shard)


class PixelCache:
    """The cached pixels of a list of samples; picklable, and every process opens a shard when it first reads it."""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        samples: Sequence[Sample],
        *,
        size: int,
        resize: Resize,
        bit_depth: int | None = None,
    ) -> PixelCache:
        """Find every sample in a cache; reads the index and the headers of the shards, not the pixels.

        Args:
            folder: what `pspg-engine prepare cache` wrote.
            samples: N samples; ids must be unique.
            size, resize, bit_depth: what the run needs.

        Raises:
            UserError: no cache, unfinished, damaged index, shard cut short, another size or resize, samples that are
                not in it, or whose source changed since.
        """
        folder = Path(folder)
        header = Header.read(folder)
        header.check_use(folder, size=size, resize=resize, bit_depth=bit_depth)
        for shard in header.shards:
            os.close(open_pixels(folder, shard, size)[0])
        found = find_entries(folder, header, samples)
        missing = [sample.id for row, sample in enumerate(samples) if row not in found]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(samples)} images are not in the cache, the first is {missing[0]!r};"
                f" {AGAIN} with their manifest"
            )
        progress = tqdm(found.items(), "checking sources", delay=2, disable=None, leave=False)
        stale = [row for row, (_, entry) in progress if is_stale(entry, samples[row].path)]
        if stale:
            first = samples[min(stale)].path
            raise UserError(
                f"{folder}: {len(stale)} images changed since they were cached, the first is {first}; {AGAIN}"
            )
        bad = {
            row: BadImage(samples[row].path, entry.bad) for row, (_, entry) in found.items() if entry.bad is not None
        }
        entries = [found[row] for row in range(len(samples))]
        return cls(folder, header, np.array([number for number, _ in entries], dtype=np.int64), bad)

    def __init__(self, folder: Path, header: Header, rows: NDArray[np.int64], bad: dict[int, BadImage]) -> None:
        """Use `open`."""
        self.folder, self.header, self.rows, self.bad = folder, header, rows, bad
        self._sums = np.concatenate([np.empty(0, np.int64), *(read_sums(folder, shard) for shard in header.shards)])
        self._starts = np.cumsum([0, *(shard.images for shard in header.shards)])
        self._shards: dict[int, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}

    def __del__(self) -> None:
        for descriptor, _ in self.__dict__.get("_shards", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """uint8 (size,size), read-only, of row `row` of the samples.

        Raises:
            BadImage: the image could not be read when it was cached.
            UserError: a shard is gone, cut short or garbled.
        """
        if row in self.bad:
            raise self.bad[row]
        number, side = self.rows[row], self.header.size
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        if shard not in self._shards:
            if len(self._shards) == MOST_OPEN:
                os.close(self._shards.pop(next(iter(self._shards)))[0])
            self._shards[shard] = open_pixels(self.folder, self.header.shards[shard], side)
        descriptor, start = self._shards[shard]
        place = pixels_file(self.folder, self.header.shards[shard])
        with naming(place):
            content = os.pread(descriptor, side * side, start + int(number - self._starts[shard]) * side * side)
        if len(content) < side * side:
            raise UserError(f"{place}: was cut short while it was read; {AGAIN}")
        if self._sums[number] not in (-1, zlib.crc32(content)):
            raise UserError(f"{place}: wrong checksum of image {int(number - self._starts[shard])}; {AGAIN}")
        return np.frombuffer(content, dtype=np.uint8).reshape(side, side)

    def image(self, row: int) -> Image.Image:
        """The same as a mode "L" image."""
        return Image.fromarray(self[row])

    def batch(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (len(rows),size,size), a copy; raises like `[]`."""
        pixels = np.empty((len(rows), self.header.size, self.header.size), dtype=np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = self[row]
        return pixels
