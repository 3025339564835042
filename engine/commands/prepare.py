"""`pspg-engine prepare check` and `prepare cache`: every image of the manifests once, before training needs it."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..data.bad_image import report_bad
from ..data.cache.build import build_cache
from ..data.cache.header import Header
from ..data.cache.pixel_cache import PixelCache, check_pixels
from ..data.copies import Place, find_copies, tell_copies
from ..data.decoding import DecoderPool
from ..data.images import BadImage
from ..data.manifest import Manifest, Sample, image_folder, load_manifest
from ..data.strict import read_strictly
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.tables import write_csv
from ..utils.text import printable
from . import settings
from .settings import CacheConfig, CheckConfig

log = logging.getLogger(__name__)

GROUP = 1024
"""images whose results may wait for their turn"""


def check_images(config: CheckConfig) -> None:
    """Decode everything and look for copies, or verify the cache; print a table of what is unusable.

    Raises:
        UserError: wrong settings or manifest, a damaged cache, or any unusable image.
    """
    settings.check_images(config)
    manifests = _manifests(config)
    samples = list(_samples(manifests, config))
    bad = _decode(config, samples) if config.cache is None else _verify(Path(config.cache), samples)
    copies = [] if config.cache else [pair for pair in find_copies(manifests) if pair[1].sample.path not in bad]
    tell_copies(copies)
    if config.output is not None:
        _write(Path(config.output), samples, bad, copies)
    if bad:
        for line in table(bad):
            print(printable(line))
        raise UserError(f"{len(bad)} of {len(samples)} images cannot be used")
    log.info(f"{len(samples)} images: all can be used")


def make_cache(config: CacheConfig) -> None:
    """Build the cache, go on with one that is not finished, or add to one.

    Raises:
        UserError: wrong settings or manifest, a folder that holds something else, or an unreadable image.
    """
    settings.check_cache(config)
    samples = _samples(_manifests(config), config)
    bad = build_cache(
        Path(config.output),
        list(samples),
        list(samples.values()),
        size=config.image_size,
        resize=config.resize,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        max_megapixels=config.max_megapixels,
        bit_depth=config.bit_depth,
    )
    log.info(f"{len(samples)} images of {config.image_size} pixels ({config.resize}): {config.output}")
    report_bad({str(path): f"{path}: {reason}" for path, reason in bad.items()})


def table(bad: dict[Path, str]) -> list[str]:
    """Reason, count and first file, the most frequent reason first."""
    first: dict[str, Path] = {}
    for path, reason in bad.items():
        first.setdefault(reason, path)
    rows = [(reason, str(count), str(first[reason])) for reason, count in Counter(bad.values()).most_common()]
    width = max(len(reason) for reason in first)
    return [f"{reason:{width}}  {count:>8}  {path}" for reason, count, path in [("reason", "images", "first"), *rows]]


def _manifests(config: CheckConfig | CacheConfig) -> list[Manifest]:
    names = dict.fromkeys([config.manifest] if isinstance(config.manifest, str) else config.manifest)
    return [load_manifest(name, image_root=config.image_root, need="image") for name in names]


def _samples(manifests: Sequence[Manifest], config: CheckConfig | CacheConfig) -> dict[Sample, str]:
    """Samples of all manifests, each once, and their file paths relative to the image root."""
    found: dict[Sample, str] = {}
    for manifest in manifests:
        root = os.path.realpath(image_folder(manifest.path, config.image_root))
        for sample in manifest.samples:
            found[Sample(sample.id, sample.path)] = os.path.relpath(sample.path, root)
    return found


def _decode(config: CheckConfig, samples: list[Sample]) -> dict[Path, str]:
    paths = list(dict.fromkeys(sample.path for sample in samples))
    bad: dict[Path, str] = {}
    read = partial(_readable, max_megapixels=config.max_megapixels, bit_depth=config.bit_depth)
    with DecoderPool(read, config.workers) as pool, tqdm(total=len(paths), unit="img", disable=None) as bar:
        for start in range(0, len(paths), GROUP):
            for result in pool.map(paths[start : start + GROUP]):
                if isinstance(result, BadImage):
                    bad[result.path] = result.reason
                bar.update()
    return bad


def _readable(path: Path, *, max_megapixels: float, bit_depth: int | None) -> None:
    read_strictly(path, max_megapixels=max_megapixels, bit_depth=bit_depth)


def _verify(folder: Path, samples: list[Sample]) -> dict[Path, str]:
    header = Header.read(folder)
    cache = PixelCache.open(folder, samples, size=header.size, resize=header.resize, bit_depth=header.bit_depth)
    for shard in tqdm(header.shards, "verifying", unit="shard", disable=None):
        check_pixels(folder, shard)
    return {error.path: error.reason for error in cache.bad.values()}


def _write(path: Path, samples: list[Sample], bad: dict[Path, str], copies: list[tuple[Place, Place]]) -> None:
    rows = [(sample.id, str(sample.path), bad[sample.path]) for sample in samples if sample.path in bad]
    rows += [(copy.sample.id, str(copy.sample.path), f"a copy of {first.sample.path}") for first, copy in copies]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_csv(path, ["id", "file", "reason"], rows)
    else:
        keys = ("id", "file", "reason")
        write_text(path, "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
