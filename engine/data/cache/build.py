"""Filling a pixel cache: several processes decode, this one writes, shard after shard."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...config import Resize
from ...utils.errors import UserError
from ...utils.files import replacing, sync, write_text
from ...utils.lock import LOCK, one_writer
from ..bad_image import MAX_MEGAPIXELS, BadImage
from ..decoding import DecoderPool
from ..images import resize as resize_image
from ..manifest import Sample
from ..strict import read_strictly
from .header import Header, Shard
from .pixel_cache import (
    Entry,
    check_pixels,
    find_entries,
    index_file,
    is_stale,
    pixels_file,
    read_index,
    read_sums,
    source_state,
    sums_file,
)

SHARD_IMAGES = 2048
"""103 MB at 224 pixels; a killed build loses less than this."""


def build_cache(
    folder: Path,
    samples: Sequence[Sample],
    filepaths: Sequence[str],
    *,
    size: int,
    resize: Resize,
    workers: int = 1,
    on_bad_image: Literal["error", "skip"] = "error",
    max_megapixels: float = MAX_MEGAPIXELS,
    bit_depth: int | None = None,
) -> dict[Path, str]:
    """Add every sample that the cache does not hold yet, could not read, or whose source changed.

    `cache` describes the format.

    Damaged shards are dropped and their images decoded again.

    Args:
        folder: made if it is not there.
        samples: unique by id and path.
        filepaths: of each sample, relative to its image root.
        size, resize: of the cached images.
        workers: decoding processes.
        on_bad_image: stop at an unreadable image, or keep it as unreadable, with its reason. Damage is looked for
            strictly.
        max_megapixels: million pixels that are still decoded.
        bit_depth: of 16-bit PNGs, see `read_image`.

    Returns:
        path → reason of the unreadable images among the samples.

    Raises:
        UserError: the folder holds a cache of another kind, or something else; an unreadable image.
    """
    decode = partial(_pixels, size=size, mode=resize, max_megapixels=max_megapixels, bit_depth=bit_depth)
    with one_writer(folder):
        for leftover in folder.glob(".*.tmp"):  # of a killed build
            leftover.unlink()
        header = _start(folder, size, resize, bit_depth)
        found = {row: entry for row, (_, entry) in find_entries(folder, header, samples).items()}
        todo = [row for row, sample in enumerate(samples) if row not in found or _again(found[row], sample.path)]
        if not todo and header.finished:
            return {}
        with DecoderPool(decode, workers) as pool:
            return _fill(folder, header, samples, filepaths, todo, pool, stop=on_bad_image == "error")


def _fill(
    folder: Path,
    header: Header,
    samples: Sequence[Sample],
    filepaths: Sequence[str],
    todo: Sequence[int],
    pool: DecoderPool[NDArray[np.uint8]],
    *,
    stop: bool,
) -> dict[Path, str]:
    """Decode the rows `todo` shard by shard; path → reason of the unreadable images."""
    bad: dict[Path, str] = {}
    size = header.size
    header.finished = False
    header.write(folder)
    done = len(samples) - len(todo)
    with tqdm(total=len(samples), initial=done, desc="caching", unit="img", disable=None) as bar:
        for start in range(0, len(todo), SHARD_IMAGES):
            rows = todo[start : start + SHARD_IMAGES]
            # Before the files are read: one that changes meanwhile is found stale.
            states = [source_state(samples[row].path) for row in rows]
            pixels = np.zeros((len(rows), size, size), dtype=np.uint8)
            entries: list[Entry] = []
            for place, result in enumerate(pool.map([samples[row].path for row in rows])):
                row, reason = rows[place], None
                if isinstance(result, BadImage):
                    reason = result.reason
                    if stop:
                        raise UserError(f"{samples[row].path}: {reason}; or set on_bad_image to skip")
                    bad[samples[row].path] = reason
                else:
                    pixels[place] = result
                entries.append(Entry(samples[row].id, filepaths[row], *states[place], reason))
                bar.update()
            number = max((shard.number for shard in header.shards), default=-1) + 1
            header.shards.append(_write_shard(folder, number, entries, pixels))
            header.write(folder)
    header.finished = True
    header.write(folder)
    return bad


def _start(folder: Path, size: int, resize: Resize, bit_depth: int | None) -> Header:
    """The header of the folder's cache without its damaged shards, or of an empty one."""
    if all(path.name == LOCK for path in folder.iterdir()):
        return Header(size, resize, bit_depth)
    if not (folder / "cache.json").exists():
        raise UserError(f"output: {folder} holds something else; choose another folder")
    header = Header.read(folder)
    if (header.size, header.resize) != (size, resize):
        raise UserError(
            f"{folder}: holds images of {header.size} pixels ({header.resize}), not {size} ({resize});"
            " choose another folder"
        )
    header.check_depth(folder, bit_depth)
    kept = [shard for shard in tqdm(header.shards, "verifying", delay=2, disable=None) if _is_whole(folder, shard)]
    if kept != header.shards:
        header.finished, header.shards = False, kept
    return header


def _again(entry: Entry, path: Path) -> bool:
    """The image must be decoded again: it has changed, or was unreadable, perhaps for want of a decoder only."""
    return entry.bad is not None or is_stale(entry, path)


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        check_pixels(folder, shard)
        read_index(folder, shard)
        read_sums(folder, shard)
    except UserError:
        return False
    return True


def _pixels(path: Path, *, size: int, mode: Resize, max_megapixels: float, bit_depth: int | None) -> NDArray[np.uint8]:
    image = read_strictly(path, max_megapixels=max_megapixels, bit_depth=bit_depth)
    return np.asarray(resize_image(image, size, mode))


def _write_shard(folder: Path, number: int, entries: Sequence[Entry], pixels: NDArray[np.uint8]) -> Shard:
    shard = Shard(number, len(entries), "", "")
    lines = "".join(json.dumps({k: v for k, v in asdict(e).items() if k != "bad" or v}) + "\n" for e in entries)
    write_text(index_file(folder, shard), lines)
    sums = np.array([zlib.crc32(image) for image in pixels], dtype="<u4").tobytes()
    with replacing(sums_file(folder, shard)) as file:
        file.write(sums)
    with replacing(pixels_file(folder, shard)) as file:
        np.lib.format.write_array(file, pixels, version=(1, 0))
        file.seek(0)
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    sync(folder)
    index = hashlib.sha256(lines.encode()).hexdigest()
    return Shard(number, len(entries), digest.hexdigest(), index, hashlib.sha256(sums).hexdigest())
