"""The DALI loader: the torch loader's samples, order, augmentation and errors; pixels within a rounding of it."""

import io
import os
import random
import signal
import struct
import threading
import weakref
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from nvidia.dali import Pipeline, fn

from pspg.engine.cli import main
from pspg.engine.data.augment import OPERATIONS, Augmentation, Plan, apply
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders import dali_input, dali_loader
from pspg.engine.data.loaders.choose import load_with, pick_loader, pixel_source
from pspg.engine.data.loaders.dali_input import steps_of
from pspg.engine.data.loaders.dali_loader import dali_batches, graph
from pspg.engine.data.loaders.evaluation import make_eval_loader
from pspg.engine.data.loaders.torch_loader import TorchBatches
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.data.pixels import Pixels, Reading
from pspg.engine.data.plain_files import plain_size
from pspg.engine.utils.errors import UserError

N, SIDE = 13, 96
CPU = torch.device("cpu")
DALI = partial(dali_batches, device=CPU)


def film(number):
    """A smooth drawing, 260 × 300, with edges that every operation moves."""
    y, x = np.mgrid[0:300, 0:260]
    lung = 150 * np.exp(-((x - 80 - number) ** 2 + (y - 120) ** 2) / 4000)
    heart = 90 * np.exp(-((x - 170) ** 2 + (y - 200 + 2 * number) ** 2) / 2500)
    return Image.fromarray((lung + heart + 12 * np.sin(x / 9) + 14).astype(np.uint8))


def encode(image, form, **settings):
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# Form of a file → image to bytes. The first ones DALI decodes.
PLAIN = {
    "jpeg": lambda image: encode(image, "JPEG", quality=95),
    "jpeg of colour": lambda image: encode(image.convert("RGB"), "JPEG", quality=95),
    "progressive jpeg": lambda image: encode(image, "JPEG", quality=95, progressive=True),
    "png": lambda image: encode(image, "PNG"),
    "png of colour": lambda image: encode(image.convert("RGB"), "PNG"),
}
OTHER = {
    "16-bit png of 12 bits": lambda image: encode(Image.fromarray(np.asarray(image).astype(np.uint16) * 16), "PNG"),
    "palette": lambda image: encode(image.convert("P"), "PNG"),
    "transparent": lambda image: encode(image.convert("LA"), "PNG"),
    "turned": lambda image: encode(image, "JPEG", exif=turned()),
    "cmyk": lambda image: encode(image.convert("RGB").convert("CMYK"), "JPEG"),
    "rgb jpeg": lambda image: encode(image.convert("RGB"), "JPEG", keep_rgb=True),
    "bytes after the end": lambda image: encode(image, "JPEG") + b"\0\0",
}


@pytest.fixture
def samples(tmp_path):
    made = []
    for number, (form, write) in zip(range(N), [*PLAIN.items(), *OTHER.items(), *PLAIN.items()], strict=False):
        path = tmp_path / f"{number} {form}"
        path.write_bytes(write(film(number)))
        made.append(Sample(id=f"s{number}", path=path, text=f"report {number}"))
    return made


def tokenize(texts):
    return torch.tensor([[len(text), int(text.split()[1])] for text in texts])


def make(samples, *, size=SIDE, resize="stretch", augment=True, flip=0.5, seed=3, **reading):
    return ImageDataset(
        samples,
        Pixels(size=size, resize=resize, mean=0.4, std=0.2),
        Reading(**reading),
        labels=np.arange(2 * len(samples), dtype=np.float32).reshape(-1, 2),
        tokenize=tokenize,
        augmentation=Augmentation(augment=augment, flip=flip, seed=seed),
    )


def train(samples, load=DALI, workers=0, sampling=None, **settings):
    sampling = {"batch_size": 4, "seed": 5} | (sampling or {})
    return make_train_loader(make(samples, **settings), workers=workers, load=load, **sampling)


def evaluation(samples, load=DALI, batch_size=4, **settings):
    return make_eval_loader(
        make(samples, **{"augment": False, "flip": 0.0} | settings), batch_size=batch_size, load=load
    )


def assert_same(left, right):
    """Everything alike, pixels bit for bit."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.ids, a.bad) == (b.ids, b.bad)
        for name in ("index", "pixels", "labels", "tokens"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def difference(left, right):
    """Absolute difference of pixels, grey levels."""
    return (left.int() - right.int()).abs().double()


def assert_close(left, right):
    """Everything alike, pixels to 0.3 grey levels in the mean of a batch and 2 in 995 of 1000.

    The rest are pixels at which nearest neighbours were chosen differently by rounding."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.ids, a.bad) == (b.ids, b.bad)
        for name in ("index", "labels", "tokens"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert (a.pixels.shape, a.pixels.dtype) == (b.pixels.shape, torch.uint8)
        off = difference(a.pixels, b.pixels)
        assert off.mean() < 0.3
        assert off.quantile(0.995) <= 2


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": False, "flip": 0.0},
        {"augment": False, "flip": 0.5},
        {"augment": False, "flip": 0.0, "resize": "pad"},
        {},
        {"resize": "pad"},
    ],
)
def test_batches_of_the_torch_loader(samples, settings):
    ours, theirs = train(samples, **settings), train(samples, TorchBatches, **settings)
    for epoch in (0, 1):
        assert_close(ours.batches(epoch), theirs.batches(epoch))
    assert_close(evaluation(samples, **settings), evaluation(samples, TorchBatches, **settings))


def test_phantom_films_agree(tmp_path):
    write_phantoms(PhantomConfig(train=12, val=0, test=0, image_size=256, classes=20), tmp_path / "phantoms", workers=1)
    files = sorted((tmp_path / "phantoms" / "images").rglob("*.png"))
    made = [Sample(id=path.stem, path=path, text="report 1") for path in files]
    assert len(made) == 12
    assert_close(train(made).batches(0), train(made, TorchBatches).batches(0))


@pytest.mark.parametrize("form", [*PLAIN, *OTHER])
def test_every_form_of_file(tmp_path, form):
    """Plain files are decoded by DALI, within the rounding of a bicubic resize; others by Pillow, bit for bit."""
    path = tmp_path / "film"
    path.write_bytes((PLAIN | OTHER)[form](film(0)))
    assert (plain_size(path.read_bytes()) is not None) == (form in PLAIN)
    (ours,), (theirs,) = (evaluation([Sample("a", path, "report 1")], load) for load in (DALI, TorchBatches))
    off = difference(ours.pixels, theirs.pixels)
    assert off.max() <= (2 if form in PLAIN else 0)
    assert off.mean() < 0.2


def test_dicom(tmp_path):
    path = pytest.importorskip("pydicom.data").get_testdata_file("CT_small.dcm")
    (ours,), (theirs,) = (evaluation([Sample("a", path, "report 1")], load) for load in (DALI, TorchBatches))
    assert torch.equal(ours.pixels, theirs.pixels)


class Planned(ImageDataset):
    """With given plans instead of drawn ones."""

    plans: list[Plan]

    def plan(self, epoch, row):
        return self.plans[row]


def both_ways(tmp_path, plans):
    """Pixels of one film under each plan, by DALI and by Pillow; the film from a cache, so that only plans count."""
    path = tmp_path / "film.png"
    film(0).resize((SIDE, SIDE)).save(path)
    made = [Sample(f"s{number}", path) for number in range(len(plans))]
    build_cache(tmp_path / "cache", made, [path.name] * len(made), size=SIDE, resize="stretch")
    pixels = Pixels(size=SIDE, resize="stretch", mean=0.4, std=0.2)
    data = Planned(made, pixels, Reading(cache=tmp_path / "cache"), augmentation=Augmentation(flip=0.5))
    data.plans = plans
    (batch,) = make_eval_loader(data, batch_size=len(plans), load=DALI)
    pillow = [np.asarray(apply(Image.open(path), plan)) for plan in plans]
    return difference(batch.pixels, torch.from_numpy(np.stack(pillow)))


def drawn(operation, seed):
    return operation(torch.Generator().manual_seed(seed), SIDE)


@pytest.mark.parametrize(
    ("operation", "largest", "share"),
    # Grey levels, and the share of pixels that may be further off: nearest neighbours chosen differently by rounding.
    zip(OPERATIONS, (1, 0, 0, 1), (0, 1e-3, 1e-3, 0), strict=True),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_operation_is_pillows(tmp_path, operation, largest, share):
    off = both_ways(tmp_path, [Plan((drawn(operation, seed),), seed % 2 == 1) for seed in range(24)])
    assert (off > largest).double().mean() <= share
    assert off.mean() < 0.2


def test_every_pair_of_operations_in_its_order(tmp_path):
    pairs = [(a, b) for a in OPERATIONS for b in OPERATIONS if a is not b]
    steps = [(drawn(a, 1), drawn(b, 2)) for a, b in pairs]
    assert both_ways(tmp_path, [Plan(pair) for pair in steps]).mean((1, 2)).max() < 0.3
    wrong = [apply(film(0), Plan(pair)).tobytes() == apply(film(0), Plan(pair[::-1])).tobytes() for pair in steps]
    assert not any(wrong)


def test_no_operation_leaves_pixels_as_they_are(tmp_path):
    assert both_ways(tmp_path, [Plan(), Plan()]).max() == 0


def cached(tmp_path, samples):
    names = [sample.path.name for sample in samples]
    build_cache(tmp_path / "cache", samples, names, size=SIDE, resize="stretch", on_bad_image="skip")
    return tmp_path / "cache"


def test_from_the_cache(tmp_path, samples):
    samples[2].path.write_bytes(b"")
    cache = cached(tmp_path, samples)
    settings = {"cache": cache, "on_bad_image": "skip"}
    assert_same(evaluation(samples, **settings), evaluation(samples, TorchBatches, **settings))
    assert_close(train(samples, **settings).batches(0), train(samples, TorchBatches, **settings).batches(0))
    with pytest.raises(UserError, match=r"the file is empty \(sample 's2'\)"):
        list(evaluation(samples, cache=cache, flip=0.5))


def test_ranks_share_exact_epochs(samples):
    (whole,) = (list(train(samples).batches(1)),)
    split = [list(train(samples, sampling={"rank": rank, "world_size": 2}).batches(1)) for rank in range(2)]
    assert len(whole) == len(split[0]) == 3
    assert len({i for batch in whole for i in batch.ids}) == 12
    for batch, *parts in zip(whole, *split, strict=True):
        assert batch.ids == [i for part in parts for i in part.ids]
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))


def test_an_epoch_starts_anywhere(samples):
    loader, whole = train(samples), list(train(samples).batches(7))
    for started in range(len(whole) + 1):
        assert_same(loader.batches(7, start_batch=started), whole[started:])
    left = loader.batches(2)
    next(left)
    left.close()
    assert_same(loader.batches(7), whole)


def test_evaluation_in_order_with_a_partial_last_batch(samples):
    loader = evaluation(samples, batch_size=5)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [5, 5, 3]
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(N))


@pytest.mark.slow
def test_workers_change_nothing(samples):
    assert_same(train(samples).batches(0), train(samples, workers=2).batches(0))


def kill(texts):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(samples):
    dataset = make(samples)
    dataset.tokenize = kill
    with pytest.raises(UserError, match="loader process was killed"):
        next(make_train_loader(dataset, batch_size=2, workers=1, load=DALI).batches(0))


def test_global_generators_are_left_alone(samples):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(train(samples).batches(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def broken_png(deflated, depth=8, colour=0):
    """A PNG with every chunk whole, whose pixels are not."""
    header = struct.pack(">IIBBBBB", 260, 300, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


JPEG, PNG = PLAIN["jpeg"](film(0)), PLAIN["png"](film(0))
BAD = {
    "empty": b"",
    "text": b"an invoice, not a film",
    "gif": encode(film(0).convert("P"), "GIF"),
    "jpeg cut short": JPEG[: len(JPEG) // 2],
    "jpeg without its last bytes": JPEG[:-2],
    "jpeg of a header only": JPEG[:20] + b"\xff\xd9",
    "png cut short": PNG[: len(PNG) // 2],
    "png with wrong bytes": PNG[: len(PNG) // 2] + b"XX" + PNG[len(PNG) // 2 + 2 :],
    "16-bit png of colour": PNG[:24] + b"\x10\x02" + PNG[26:],
    # These pass for plain, and DALI fails on them.
    "png of garbage": broken_png(b"\x78\x9cgarbage" * 20),
    "png with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 260) * 299)),
    "png of colour with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 780) * 150), colour=2),
    "16-bit png with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 520) * 150), depth=16),
    "missing": None,
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(samples, kind):
    """The torch loader's messages; skipping leaves the other samples as they are."""
    whole = list(train(samples).batches(0))
    lost = whole[1].ids[2]
    path = next(sample.path for sample in samples if sample.id == lost)
    path.unlink() if BAD[kind] is None else path.write_bytes(BAD[kind])
    messages = []
    for load in (TorchBatches, DALI):
        with pytest.raises(UserError) as caught:
            list(train(samples, load).batches(0))
        messages.append(str(caught.value))
        skipping = train(samples, load, on_bad_image="skip")
        batches = list(skipping.batches(0))
        messages.append(str(skipping.bad))
    assert messages[:2] == messages[2:]
    assert messages[0].startswith(f"{path}: ")
    assert f"(sample {lost!r})" in messages[0]
    assert "\n" not in messages[0]
    assert batches[1].bad == list(skipping.bad.items())
    assert batches[1].ids == [*whole[1].ids[:2], *whole[1].ids[3:]]
    assert torch.equal(batches[1].pixels, whole[1].pixels[[0, 1, 3]])
    assert_same([batches[0], *batches[2:]], [whole[0], *whole[2:]])


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30_000), (30_000, 1), (3, 9000), (SIDE, SIDE)])
def test_elongated_films(tmp_path, shape, resize):
    """Beyond an image's edge DALI repeats its last pixel, Pillow does without; in a film of three rows it shows."""
    path = tmp_path / "film.png"
    Image.fromarray(np.linspace(40, 250, shape[0] * shape[1]).reshape(shape).astype(np.uint8)).save(path)
    films = [Sample("a", path, "report 1")]
    (ours,), (theirs,) = (evaluation(films, load, resize=resize) for load in (DALI, TorchBatches))
    assert difference(ours.pixels, theirs.pixels).max() <= (5 if shape == (3, 9000) else 1)


def test_too_large_a_file(samples):
    for load in (DALI, TorchBatches):
        with pytest.raises(UserError, match="260 × 300 pixels, more than max_megapixels"):
            list(evaluation(samples, load, max_megapixels=0.01))


@pytest.mark.parametrize(
    "form", ["jpeg", "jpeg of colour", "progressive jpeg", "png", "png of colour", "palette", "cmyk"]
)
def test_too_much_memory_for_its_kind(samples, form, monkeypatch):
    """Both loaders refuse the same files with the same words, those that DALI would decode included."""
    monkeypatch.setattr("pspg.engine.data.bounds.BESIDE", 0)
    samples[0].path.write_bytes((PLAIN | OTHER)[form](film(0)))
    messages = []
    for load in (DALI, TorchBatches):
        try:
            list(evaluation(samples[:1], load, max_megapixels=0.0781))
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert ("to decode, more than 3 bytes" in messages[0]) == (form not in ("jpeg", "png", "palette"))


def blind_to(monkeypatch, *rows):
    """A DALI that decodes these images only where Pillow has decoded them for it."""
    first = dali_loader._Runner.pixels

    def pixels(runner, prepared):
        files = prepared.inputs().get("files", [])
        for (_, row), file in zip(prepared.keys, files, strict=True):
            if row in rows and bytes(file[:2]) != b"P5":
                return "cannot decode"
        return first(runner, prepared)

    monkeypatch.setattr(dali_loader._Runner, "pixels", pixels)


def test_what_pillow_alone_decodes_is_used_and_told(samples, caplog, monkeypatch):
    blind_to(monkeypatch, 0)
    ours, theirs = (list(evaluation(samples, load, batch_size=N)) for load in (DALI, TorchBatches))
    assert_close(ours, theirs)
    assert torch.equal(ours[0].pixels[0], theirs[0].pixels[0])
    assert f"{samples[0].path}: DALI cannot decode this file" in caplog.text


def test_decoding_nothing_is_not_the_fault_of_the_files(samples, monkeypatch):
    blind_to(monkeypatch, *range(4))
    with pytest.raises(UserError, match="DALI decodes none of 4 files that Pillow decodes"):
        list(evaluation(samples))


def test_a_failure_that_no_file_is_to_blame_for_is_raised(samples, monkeypatch):
    first = dali_loader._Runner.pixels

    def fail(runner, prepared):
        if len(prepared.keys) > 1:
            return "out of memory"
        return first(runner, prepared)

    monkeypatch.setattr(dali_loader._Runner, "pixels", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(evaluation(samples))


def test_batches_without_readable_images(samples):
    whole = list(train(samples).batches(0))
    for sample in samples:
        if sample.id in whole[1].ids:
            sample.path.unlink()
    ours, theirs = (train(samples, load, on_bad_image="skip") for load in (DALI, TorchBatches))
    batches = list(ours.batches(0))
    assert_close(batches, theirs.batches(0))
    assert [len(batch) for batch in batches] == [4, 1, 4]
    assert ours.bad == theirs.bad
    left = evaluation([sample for sample in samples if sample.id in whole[1].ids], on_bad_image="skip")
    assert list(left) == []
    assert set(left.bad) == set(whole[1].ids)


@pytest.mark.parametrize("end", [None, "break", ValueError, KeyboardInterrupt, UserError])
def test_nothing_is_left_running(samples, monkeypatch, end):
    pipelines, make_pipeline = [], dali_loader._Runner.make_pipeline

    def remember(*arguments):
        pipelines.append(weakref.ref(pipeline := make_pipeline(*arguments)))
        return pipeline

    monkeypatch.setattr(dali_loader._Runner, "make_pipeline", remember)
    if end is UserError:
        samples[list(train(samples).batches(0))[2].index[0]].path.unlink()
    threads = []

    class Recorded(threading.Thread):
        def start(self):
            threads.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Recorded)
    batches, kept = train(samples, sampling={"batch_size": 1}).batches(0), None
    try:
        for _ in batches:
            if end == "break":
                break
            if end in (ValueError, KeyboardInterrupt):
                raise end
    except BaseException as error:
        kept = error
    assert type(kept) is (type(None) if end in (None, "break") else end)
    batches.close()
    (ahead,) = [thread for thread in threads if thread.name == "prefetch"]
    assert not ahead.is_alive()
    assert pipelines
    assert not any(pipeline() for pipeline in pipelines)


def test_a_bug_in_preparation_keeps_its_traceback(samples, monkeypatch):
    def fail(plans, side):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dali_input, "steps_of", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(train(samples).batches(0))


def test_which_loader(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert [pick_loader("loader", loader, CPU) for loader in ("auto", "torch", "dali")] == ["torch", "torch", "dali"]
    assert [pick_loader("loader", loader, cuda) for loader in ("auto", "torch", "dali")] == ["dali", "torch", "dali"]
    assert load_with("torch", cuda) is TorchBatches
    monkeypatch.setattr("pspg.engine.data.loaders.choose.find_spec", lambda name: None)
    assert pick_loader("loader", "auto", cuda) == "torch"
    with pytest.raises(UserError, match=r"^data.loader: .*pip install 'pspg-engine\[dali-cuda13\]'"):
        pick_loader("data.loader", "dali", CPU)


@pytest.mark.slow
def test_commands(tmp_path, phantoms, settings, capsys, monkeypatch):
    """A run keeps to its loader; evaluation and prediction take one, too."""
    run, dali = tmp_path / "run", ["--data.loader", "dali", "--optim.epochs", "1"]
    assert main([*settings("prompt"), *dali, "--output", str(run)]) == 0
    assert "loader: dali" in (run / "config.yaml").read_text()
    assert main([*settings("prompt"), "--optim.epochs", "1", "--output", str(run), "--resume", "latest"]) == 2
    assert "data.loader: " in (message := capsys.readouterr().err)
    assert "was made with 'dali', this run asks for 'torch'" in message
    assert main([*settings("prompt"), *dali, "--output", str(run), "--resume", "latest"]) == 0
    seen, dali_batches = [], dali_loader.DaliBatches
    monkeypatch.setattr(dali_loader, "DaliBatches", lambda *a, **k: seen.append(k["device"]) or dali_batches(*a, **k))
    model = ["--checkpoint", str(run), "--device", "cpu", "--workers", "0"]
    films, output = str(phantoms / "test.jsonl"), str(tmp_path / "output")
    assert main(["evaluate", "--manifest", films, "--output", output, *model, "--loader", "dali"]) == 0
    assert main(["predict", "--input", films, "--output", f"{output}.csv", *model, "--loader", "dali"]) == 0
    assert seen == [CPU, CPU]
    # These films have the size of the model's input, so that not even resizing rounds.
    assert main(["predict", "--input", films, "--output", f"{output}.torch.csv", *model]) == 0
    assert (tmp_path / "output.csv").read_bytes() == (tmp_path / "output.torch.csv").read_bytes()


def test_pixels_that_a_run_keeps_to():
    assert {pixel_source("torch", cached=cached, augmented=True) for cached in (True, False)} == {"torch"}
    assert pixel_source("dali", cached=False, augmented=False) == "dali"
    assert pixel_source("dali", cached=True, augmented=True) == "dali, from a cache"
    assert pixel_source("dali", cached=True, augmented=False) == "torch"


@pytest.mark.parametrize("head", ["files", "pixels"])
def test_the_pipeline_for_a_gpu_can_be_written_down(head):
    """Without a GPU only that: operators exist on it and take each other's results."""
    with Pipeline(4, 1, 0):
        names = [head, *steps_of([], SIDE), "flip", "shape", "corner"]
        assert graph({name: fn.external_source(name=name) for name in names}, SIDE, True).device == "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{"augment": False, "flip": 0.0}, {}, {"resize": "pad"}])
def test_on_a_gpu(samples, tmp_path, settings):
    """The CPU's pixels, JPEG decoding to one more grey level, from files and from the cache."""
    gpu = partial(dali_batches, device=torch.device("cuda", 0))
    for extra in ({}, {"cache": cached(tmp_path, samples)} if "resize" not in settings else {}):
        settings = settings | extra
        ours, theirs = list(train(samples, gpu, **settings).batches(0)), train(samples, TorchBatches, **settings)
        if settings.get("augment", True) or not extra:
            assert {batch.pixels.device.type for batch in ours} == {"cuda"}
        for a, b in zip(ours, theirs.batches(0), strict=True):
            assert a.ids == b.ids
            off = difference(a.pixels.cpu(), b.pixels)
            assert off.mean() < 0.5
            assert off.quantile(0.995) <= 3
        assert_same([a.to("cpu") for a in ours], [a.to("cpu") for a in train(samples, gpu, **settings).batches(0)])
