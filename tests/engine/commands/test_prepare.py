"""`prepare check` and `prepare cache` as commands: what they find, say and write, and training from what they wrote."""

import csv
import json
import multiprocessing
import shutil
from concurrent.futures import process
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.cli import main
from pspg.engine.data import decoding, images
from pspg.engine.training.telemetry import read_metrics

SECRET = "Doe^Jane"


@pytest.fixture
def folder(tmp_path):
    """Ten sound images of every kind, in good.jsonl; the same and one of every kind of damage in all.jsonl."""
    rng = np.random.default_rng(0)
    grey = (128 + 100 * np.sin(np.arange(40000) / 700) + rng.normal(0, 2, 40000)).astype(np.uint8).reshape(200, 200)
    film = Image.fromarray(grey)
    for mode in ("L", "RGB", "RGBA", "P", "LA", "1"):
        film.convert("RGB").convert(mode).save(tmp_path / f"good_{mode}.png")
    for mode in ("L", "RGB", "CMYK"):
        film.convert("RGB").convert(mode).save(tmp_path / f"good_{mode}.jpg", quality=90)
    Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / "good_12bit.png")
    jpeg, png = (tmp_path / "good_L.jpg").read_bytes(), bytearray((tmp_path / "good_L.png").read_bytes())
    middle = len(jpeg) // 2
    png[len(png) // 2] ^= 1
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("No acute process.")
    (tmp_path / "cut.jpg").write_bytes(jpeg[:middle])
    (tmp_path / "damaged.jpg").write_bytes(jpeg[:middle] + bytes(range(1, 200)) + jpeg[middle + 199 :])
    (tmp_path / "damaged.png").write_bytes(png)
    bad = ["missing.png", "empty.jpg", "text.jpg", "cut.jpg", "damaged.jpg", "damaged.png"]
    good = sorted(path.name for path in tmp_path.glob("good_*"))
    assert len(good) == 10
    write_manifest(tmp_path / "good.jsonl", good)
    write_manifest(tmp_path / "all.jsonl", good + bad)
    return tmp_path


def write_manifest(path, names):
    rows = [{"id": f"id {name}", "filepath": name, "text": SECRET, "patient_id": SECRET} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


REASONS = {
    "missing.png": "no such file",
    "empty.jpg": "the file is empty",
    "text.jpg": "not a PNG, JPEG or DICOM image",
    "cut.jpg": "cannot be decoded: ",
    "damaged.jpg": "damaged within the image data",
    "damaged.png": "cannot be decoded: ",
}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_unusable_files_are_counted_by_reason_and_listed(folder, capsys, kind):
    output = folder / f"out/bad.{kind}"
    command = ["prepare", "check", "--manifest", str(folder / "all.jsonl"), "--output", str(output)]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "pspg-engine prepare check: error: 6 of 16 images cannot be used"
    lines = out.splitlines()
    assert lines[0].split() == ["reason", "images", "first"]
    for name, reason in REASONS.items():
        (line,) = [line for line in lines[1:] if line.endswith(f"  {folder / name}")]
        assert line.startswith(reason)
    with output.open() as file:
        rows = list(csv.DictReader(file)) if kind == "csv" else [json.loads(line) for line in file]
    assert [(row["id"], row["file"]) for row in rows] == [(f"id {name}", str(folder / name)) for name in REASONS]
    assert all(row["reason"].startswith(REASONS[Path(row["file"]).name]) for row in rows)
    assert SECRET not in out + err + output.read_text()


def test_dicom_files_are_checked_and_nothing_of_them_is_printed(tmp_path, capfd):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("data_store", reason="pydicom-data holds the real radiograph")
    for name, source in {"film.dcm": "RG3_J2KR.dcm", "colour.dcm": "SC_rgb.dcm"}.items():
        ds = pydicom.dcmread(pydicom.data.get_testdata_file(source, download=False))
        ds.PatientName = ds.StudyDescription = SECRET
        ds.save_as(tmp_path / name)
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "film.dcm").read_bytes()[:100_000])
    write_manifest(tmp_path / "m.jsonl", ["film.dcm", "colour.dcm", "cut.dcm"])
    output = tmp_path / "bad.csv"
    assert main(["prepare", "check", "--manifest", str(tmp_path / "m.jsonl"), "--output", str(output)]) == 2
    out, err = capfd.readouterr()
    assert "2 of 3 images cannot be used" in err
    assert "a DICOM file that is not monochrome" in out
    assert SECRET not in out + err + output.read_text()


def test_sound_files_pass_and_several_manifests_are_one(folder, capsys):
    assert main(["prepare", "check", "--manifest", str(folder / "good.jsonl")]) == 0
    assert "10 images: all can be used" in capsys.readouterr().err
    both = f"[{folder / 'good.jsonl'}, {folder / 'all.jsonl'}]"
    assert main(["prepare", "check", "--manifest", both, "--max_megapixels", "0.03"]) == 2
    assert "16 of 16 images cannot be used" in capsys.readouterr().err


def test_equal_reasons_are_one_line(folder, capsys):
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"")
    write_manifest(folder / "three.jsonl", ["0.png", "1.png", "2.png", "missing.png"])
    assert main(["prepare", "check", "--manifest", str(folder / "three.jsonl")]) == 2
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["3", str(folder / "0.png")],
        ["1", str(folder / "missing.png")],
    ]


def test_a_cache_is_verified_whole(folder, capsys):
    cache, all_of_them = folder / "cache", str(folder / "all.jsonl")
    build = ["prepare", "cache", "--manifest", all_of_them, "--output", str(cache), "--image_size", "32"]
    check = ["prepare", "check", "--manifest", all_of_them, "--cache", str(cache)]
    assert main(build) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("missing.png: no such file; or set on_bad_image to skip")
    assert main(check) == 2
    assert "the cache is not finished" in capsys.readouterr().err
    assert main([*build, "--on_bad_image", "skip"]) == 0
    assert "6 unreadable images were left out" in capsys.readouterr().err
    assert main(check) == 2  # it says what the files would have said
    assert "6 of 16 images cannot be used" in capsys.readouterr().err
    sound = ["prepare", "check", "--manifest", str(folder / "good.jsonl"), "--cache", str(cache)]
    assert main(sound) == 0
    pixels = cache / "pixels-00000.npy"
    content = bytearray(pixels.read_bytes())
    content[5000] ^= 1
    pixels.write_bytes(content)
    capsys.readouterr()
    assert main(sound) == 2
    assert capsys.readouterr().err.endswith(f"{pixels}: wrong checksum; run pspg-engine prepare cache again\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["check"], "manifest: is required"),
        (["check", "--manifest", "GOOD", "--workers", "0"], "workers: must be > 0, got 0"),
        (["check", "--manifest", "GOOD", "--output", "x.txt"], "must end in .csv or .jsonl"),
        (["check", "--manifest", "GOOD", "--cache", "none"], "holds no cache"),
        (["check", "--manifest", "none.jsonl"], "none.jsonl: no such file"),
        (["cache", "--manifest", "GOOD"], "output: is required"),
        (["cache", "--manifest", "GOOD", "--output", "c", "--image_size", "0"], "image_size: must be > 0, got 0"),
        (
            ["cache", "--manifest", "GOOD", "--output", "c", "--max_megapixels", "0"],
            "max_megapixels: must be > 0, got 0",
        ),
        (["cache", "--manifest", "GOOD", "--output", "FOLDER"], "holds something else"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(folder)
    names = {"GOOD": str(folder / "good.jsonl"), "FOLDER": str(folder)}
    assert main(["prepare", *(names.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err
    assert not (folder / "c").exists()


@pytest.mark.parametrize("task", ["contrastive", pytest.param("prompt", marks=pytest.mark.slow)])
def test_training_and_evaluation_from_a_cache_are_the_same(phantoms, settings, tmp_path, monkeypatch, task):
    both = f"[{phantoms / 'train.jsonl'}, {phantoms / 'val.jsonl'}]"
    assert (
        main(["prepare", "cache", "--manifest", both, "--output", str(tmp_path / "cache"), "--image_size", "64"]) == 0
    )

    def run(name, *more):
        command = [*settings(task), "--optim.epochs", "1", "--loss.pair_samples", "2", "--output", str(tmp_path / name)]
        assert main([*command, *more]) == 0
        clock = {"images_per_s", "loader_wait", "peak_bytes"}
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: value for key, value in row.items() if key not in clock} for row in rows]

    def evaluate(name, *more):
        command = ["evaluate", "--checkpoint", str(tmp_path / "decoded"), "--manifest", str(phantoms / "val.jsonl")]
        command += [
            "--output",
            str(tmp_path / name),
            "--evaluation.bootstrap",
            "0",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
        assert main([*command, *more]) == 0
        return (tmp_path / name / "predictions.csv").read_text()

    decoded = run("decoded")
    afresh = evaluate("afresh") if task == "prompt" else ""
    monkeypatch.setattr(images, "read_image", None)  # nothing is decoded from here on
    cache = str(tmp_path / "cache")
    assert run("cached", "--data.cache", cache) == decoded
    assert task != "prompt" or evaluate("stored", "--cache", cache) == afresh


def test_copies_are_told_and_listed_and_the_set_stays_usable(folder, capsys):
    shutil.copy(folder / "good_L.png", folder / "other.png")
    shutil.copy(folder / "cut.jpg", folder / "cut too.jpg")  # which is unusable, and listed as that
    write_manifest(folder / "val.jsonl", ["other.png"])
    command = ["prepare", "check", "--output", str(folder / "out.csv"), "--overwrite", "true", "--manifest"]
    assert main([*command, f"[{folder / 'good.jsonl'}, {folder / 'val.jsonl'}]"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the same image" in line]
    assert "val.jsonl:1 and " in line
    assert "'other.png' has the bytes of 'good_L.png'" in line
    (row,) = list(csv.DictReader((folder / "out.csv").open()))
    assert row == {
        "id": "id other.png",
        "file": str(folder / "other.png"),
        "reason": f"a copy of {folder / 'good_L.png'}",
    }
    write_manifest(folder / "bad.jsonl", ["cut.jpg", "cut too.jpg"])
    assert main([*command, str(folder / "bad.jsonl")]) == 2
    assert "the same image" not in capsys.readouterr().err


def no_thread(*_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("where", ["child", "parent"])
def test_a_pool_without_threads_is_one_line_and_leaves_no_process(folder, capfd, monkeypatch, where):
    """As under a small limit of memory, where the processes would print their tracebacks, or be waited for in vain."""
    if where == "child":
        monkeypatch.setattr(decoding, "die_with_parent", no_thread)
    else:
        monkeypatch.setattr(process._ExecutorManagerThread, "start", no_thread)
    assert main(["prepare", "check", "--manifest", str(folder / "good.jsonl")]) == 2
    err = capfd.readouterr().err
    assert "can't start new thread" in err
    assert "lower" in err
    assert len(err.splitlines()) == 1
    assert not multiprocessing.active_children()


def no_memory(*_, **__):
    raise MemoryError


def test_a_child_without_memory_for_its_result_prints_nothing(folder, capfd, monkeypatch):
    monkeypatch.setattr(process, "_sendback_result", no_memory)
    with decoding.DecoderPool(Path.stat, 1) as pool:
        (result,) = pool.map([folder / "good_L.png"])
    assert "more memory than there is" in str(result)
    assert capfd.readouterr().err == ""
