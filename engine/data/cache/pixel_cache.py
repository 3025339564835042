"""The pixel cache: images decoded, windowed and resized once, read back through memory maps.

A folder holds

- `cache.json`: format, version, `finished`, side `size` in pixels, `resize`, `bit_depth`, and one entry a shard: its
  `number`, how many `images` it has, and the SHA-256 of its two files;
- `pixels-NNNNN.npy`: a shard's pixels, uint8 (images, size, size), one grey channel, a plain NumPy array;
- `index-NNNNN.jsonl`: a line for each of them, in order: `id`, `filepath` (relative to the image root), `bytes` and
  `mtime_ns` of the source file (null: it was not there), and `bad`, the reason, where the image could not be read (its
  pixels are 0).

Where shards hold the same (id, filepath) twice, the later one counts: a file that changed is added again, not replaced.
Files are written beside and renamed, and `cache.json` names only what is complete, so a killed build loses the shard
that it was at. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...utils.errors import UserError
from ...utils.files import write_text
from ...utils.text import printable
from ..bad_image import BadImage
from ..images import Resize
from ..manifest import Sample

FORMAT = "pspg-engine pixel cache"
VERSION = 2
"""Raised when the layout, or the pixels that `images` makes of a file, change."""
AGAIN = "run pspg-engine prepare cache again"


@dataclass(frozen=True)
class Entry:
    """One cached image: a line of the index."""

    id: str
    filepath: str
    bytes: int | None
    mtime_ns: int | None
    bad: str | None = None


@dataclass(frozen=True)
class Shard:
    """Two complete files of the cache."""

    number: int
    images: int
    pixels_sha256: str
    index_sha256: str


@dataclass
class Header:
    """`cache.json`."""

    size: int
    resize: Resize
    bit_depth: int | None = None
    finished: bool = False
    shards: list[Shard] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the folder's header in one step."""
        counts = {"images": sum(shard.images for shard in self.shards)}
        document = {"format": FORMAT, "version": VERSION, **counts, **asdict(self)}
        write_text(folder / "cache.json", json.dumps(document, indent=1) + "\n")

    def check_depth(self, folder: Path, bit_depth: int | None) -> None:
        """
        Raises:
            UserError: the images were read with another bit_depth.
        """
        if self.bit_depth != bit_depth:
            raise UserError(
                f"{folder}: holds images read with bit_depth {_said(self.bit_depth)}, asked for is {_said(bit_depth)};"
                " build another cache, or set bit_depth so"
            )

    @classmethod
    def read(cls, folder: Path) -> Header:
        """
        Raises:
            UserError: no cache there, or one of another version.
        """
        path = folder / "cache.json"
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != FORMAT:
                raise ValueError
            if document["version"] != VERSION:
                raise UserError(
                    f"{path}: of version {document['version']}, not {VERSION}; build the cache in a new folder"
                )
            shards = [
                Shard(int(shard["number"]), int(shard["images"]), shard["pixels_sha256"], shard["index_sha256"])
                for shard in document["shards"]
            ]
            depth = document["bit_depth"]
            depth = None if depth is None else int(depth)
            return cls(int(document["size"]), document["resize"], depth, bool(document["finished"]), shards)
        except FileNotFoundError:
            raise UserError(f"{folder}: holds no cache; make it with pspg-engine prepare cache") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is not the header of a pixel cache; build it in a new folder") from None


def _said(bit_depth: int | None) -> str:
    return "unset" if bit_depth is None else str(bit_depth)


def pixels_file(folder: Path, shard: Shard) -> Path:
    """The shard's pixels."""
    return folder / f"pixels-{shard.number:05d}.npy"


def index_file(folder: Path, shard: Shard) -> Path:
    """The shard's index."""
    return folder / f"index-{shard.number:05d}.jsonl"


def map_pixels(folder: Path, shard: Shard, size: int) -> NDArray[np.uint8]:
    """A shard's pixels, uint8 (images, size, size), as a read-only memory map.

    Raises:
        UserError: missing, cut short, or an array of another kind.
    """
    path = pixels_file(folder, shard)
    try:
        pixels = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, a shard of the cache; {AGAIN}") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: a shard cut short or damaged; {AGAIN}") from None
    if pixels.shape != (shard.images, size, size) or pixels.dtype != np.uint8:
        raise UserError(f"{path}: not a shard of {shard.images} images of {size} × {size} pixels; {AGAIN}")
    return np.asarray(pixels)


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
    return [Entry(**json.loads(line)) for line in content.splitlines()]


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
    """The cached pixels of a list of samples; picklable, and every process maps the shards when it first reads."""

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
        if not header.finished:
            raise UserError(f"{folder}: the cache is not finished; {AGAIN}, it goes on where it was")
        if (header.size, header.resize) != (size, resize):
            raise UserError(
                f"{folder}: holds images of {header.size} pixels ({header.resize}), the run needs {size} ({resize});"
                " build another cache"
            )
        header.check_depth(folder, bit_depth)
        for shard in header.shards:
            map_pixels(folder, shard, size)
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
        return cls(folder, header, np.array([found[row][0] for row in range(len(samples))], dtype=np.int64), bad)

    def __init__(self, folder: Path, header: Header, rows: NDArray[np.int64], bad: dict[int, BadImage]) -> None:
        """Use `open`."""
        self.folder, self.header, self.rows, self.bad = folder, header, rows, bad
        self._starts = np.cumsum([0, *(shard.images for shard in header.shards)])
        self._shards: list[NDArray[np.uint8]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the pixels.
        return {**vars(self), "_shards": None}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """uint8 (size,size), a read-only view of the memory map, of row `row` of the samples.

        Raises:
            BadImage: the image could not be read when it was cached.
            UserError: a shard is gone or cut short.
        """
        if row in self.bad:
            raise self.bad[row]
        if self._shards is None:
            self._shards = [map_pixels(self.folder, shard, self.header.size) for shard in self.header.shards]
        number = self.rows[row]
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._shards[shard][number - self._starts[shard]]

    def image(self, row: int) -> Image.Image:
        """The same as a mode "L" image."""
        return Image.fromarray(self[row])

    def batch(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (len(rows),size,size), a copy; raises like `[]`."""
        pixels = np.empty((len(rows), self.header.size, self.header.size), dtype=np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = self[row]
        return pixels
