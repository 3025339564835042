"""`python -m benchmarks.loading`: images per second of the loaders, from files and from the pixel cache.

Phantom films of `--size` pixels as JPEG and PNG, drawn once and read over and over, so from the system's page cache:
the disk is not measured. A row is the median of whole epochs of augmented training batches, moved to the device and
counted from the arrival of the first one; how long that takes is `start`. Only loaders whose pixels agree with Pillow's
are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pspg.engine.data.augment import Augmentation
from pspg.engine.data.batch import Batch
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.cache.pixel_cache import PixelCache
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders.choose import load_with, pick_loader
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.data.pixels import Pixels
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text

from .machine import commit, describe_machine, versions

JPEG_QUALITY = 90
SOURCES = ("jpeg", "png", "cache")
PACKAGES = ("pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def main() -> int:
    """Measure, print a table, write JSON; returns the exit status."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU")
        for loader in arguments.loader:
            pick_loader("--loader", loader, device)
        if arguments.json:
            check_output(arguments.json, folder=False)
        with tempfile.TemporaryDirectory() as folder:
            results = list(measure(arguments, device, Path(folder)))
    except UserError as error:
        print(f"benchmarks.loading: error: {error}", file=sys.stderr)
        return 2
    _print_table(results, arguments)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(arguments.json), json.dumps(results, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """Results of every source × loader × number of workers; films are drawn into `folder`."""
    films = draw(folder, arguments)
    about = {
        **{key: getattr(arguments, key) for key in ("size", "image_size", "batch", "batches", "device")},
        "machine": describe_machine(device),
        "versions": {**versions(), **_installed()},
        "commit": commit(),
    }
    rows = [(s, w, l) for s in arguments.source for w in arguments.workers for l in arguments.loader]
    for source, workers, loader in tqdm(rows, "loaders", disable=None, leave=False):
        form = "png" if source == "cache" else source
        samples = [Sample(path.stem, path) for path in films[form]]
        cache = _cache(folder / "cache", samples, arguments) if source == "cache" else None
        dataset = _repeated(samples, cache, arguments)
        batches = make_train_loader(
            dataset, batch_size=arguments.batch, workers=workers, load=load_with(loader, device)
        )
        check_pixels(dataset, next(batches.batches(0)))
        runs = [_epoch(batches.batches(epoch), device) for epoch in range(arguments.repeat)]
        low, seconds, high = (float(value) for value in np.percentile([run for _, run in runs], [20, 50, 80]))
        yield {
            "source": source,
            "loader": loader,
            "workers": workers,
            "images_per_s": arguments.batch / seconds,
            "batch_seconds": seconds,
            "batch_seconds_p20": low,
            "batch_seconds_p80": high,
            "start_seconds": statistics.median(start for start, _ in runs),
            "epochs": arguments.repeat,
            **({} if arguments.step_ms is None else {"keeps_up": 1000 * seconds <= arguments.step_ms}),
            **about,
        }


def check_pixels(dataset: ImageDataset, batch: Batch) -> None:
    """Compare the first batch of epoch 0 with what Pillow makes of it.

    Raises:
        UserError: more than 0.5 grey levels apart in the mean.
    """
    pillow = torch.stack([dataset.pixels(0, row) for row in batch.index.tolist()])
    off = (batch.pixels.cpu().int() - pillow.int()).abs().double().mean().item()
    if off > 0.5:
        raise UserError(f"pixels are {off:.2f} grey levels from Pillow's in the mean: nothing is timed")


def draw(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Path]]:
    """Films of each format that is asked for."""
    config = PhantomConfig(train=arguments.films, val=0, test=0, size=arguments.size)
    write_phantoms(config, folder / "phantoms")
    drawn = sorted((folder / "phantoms" / "images").rglob("*.png"))
    films = {"png": drawn}
    if "jpeg" in arguments.source:
        films["jpeg"] = [folder / f"{path.stem}.jpg" for path in drawn]
        for path, target in zip(drawn, films["jpeg"], strict=True):
            Image.open(path).save(target, quality=JPEG_QUALITY)
    return films


def _cache(folder: Path, samples: list[Sample], arguments: argparse.Namespace) -> PixelCache:
    settings = {"size": arguments.image_size, "resize": "stretch"}
    build_cache(folder, samples, [sample.path.name for sample in samples], **settings)
    return PixelCache.open(folder, samples, **settings)


def _repeated(samples: list[Sample], cache: PixelCache | None, arguments: argparse.Namespace) -> ImageDataset:
    """The films as often as an epoch needs them, each time with another id and so another augmentation."""
    times = -(-arguments.batch * arguments.batches // len(samples))
    dataset = ImageDataset(
        [Sample(f"{sample.id}/{number}", sample.path) for number in range(times) for sample in samples],
        Pixels(size=arguments.image_size, resize="stretch", mean=0.5, std=0.25),
        augmentation=Augmentation(flip=0.5),
    )
    if cache is not None:
        dataset.cache = PixelCache(cache.folder, cache.header, np.tile(cache.rows, times), {})
    return dataset


def _epoch(batches: Iterator[Batch], device: torch.device) -> tuple[float, float]:
    """Seconds to the first batch, and a batch from there on."""
    start, count = time.perf_counter(), 0
    next(batches).to(device)
    first = time.perf_counter()
    for batch in batches:
        batch.to(device, non_blocking=True)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return first - start, (time.perf_counter() - first) / count


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument(
        "--source", choices=SOURCES, nargs="+", default=list(SOURCES), help="what to read (default all)"
    )
    parser.add_argument(
        "--loader", choices=("torch", "dali"), nargs="+", default=["torch", "dali"], help="default both"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2], help="loader processes (default 2); several allowed"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where batches go, and DALI runs")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="images a batch (default 64)")
    parser.add_argument("--batches", type=int, default=32, help="batches an epoch (default 32)")
    parser.add_argument("--films", type=int, default=64, help="different films (default 64)")
    parser.add_argument("--size", type=int, default=1024, help="side of a film, pixels (default 1024)")
    parser.add_argument("--image_size", type=int, default=224, help="side of a batch's images, pixels (default 224)")
    parser.add_argument("--repeat", type=int, default=3, help="epochs (default 3)")
    parser.add_argument("--step_ms", type=float, help="milliseconds of a training step of B images to keep up with")
    parser.add_argument("--json", metavar="OUT", help="write the results")
    arguments = parser.parse_args()
    for name, least in {"batch": 1, "batches": 2, "films": 1, "image_size": 1, "repeat": 1}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: must be at least {least}, got {getattr(arguments, name)}")
    if min(arguments.workers) < 0:
        parser.error("--workers: must not be negative")
    return arguments


def _print_table(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    side = arguments.image_size
    print(f"{arguments.size}² phantom films to {side}², augmented, batches of {arguments.batch}, {arguments.device}")
    print(f"{'source':<8}{'loader':<8}{'workers':>7}{'images/s':>10}{'a batch':>11}{'start':>9}")
    for row in results:
        verdict = "" if "keeps_up" not in row else "  keeps up" if row["keeps_up"] else "  too slow"
        print(
            f"{row['source']:<8}{row['loader']:<8}{row['workers']:>7}{row['images_per_s']:>10.0f}"
            f"{1000 * row['batch_seconds']:>8.1f} ms{row['start_seconds']:>7.2f} s{verdict}"
        )


if __name__ == "__main__":
    sys.exit(main())
