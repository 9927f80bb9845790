"""Many pictures: the same rows wherever they come from and however often the run is killed."""
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_finetuning import count_calls, run_until

from paligemma_nb import load_model
from paligemma_nb.attention import answer_probs
from paligemma_nb.datasets import coco_mask
from paligemma_nb.generation import generate
from paligemma_nb.inference import main
from paligemma_nb.labelling import (
    Picture, _Worker, answer_with_probs, find_deadly, label, label_pictures, list_pictures,
    read_picture)
from paligemma_nb.opening import answer
from paligemma_nb.scenes import HELD_OUT, make_scene

PROMPTS = ["caption en", "segment blue ring", "detect blue ring"]
SCENES = [make_scene(HELD_OUT + k) for k in range(7)]


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", weights="packed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for k, scene in enumerate(SCENES): scene.image.save(folder / f"{k}.png")
    return folder


def rows_of(output):
    parts = sorted(output.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


# --- what a row holds

def test_rows_are_the_answers(shipped, folder):
    rows = label_pictures(*shipped, list_pictures([str(folder)]), PROMPTS, batch_size=3)
    expected = answer(*shipped, [scene.image for scene in SCENES], PROMPTS)
    names = [(str(folder / f"{k}.png"), prompt) for k in range(7) for prompt in PROMPTS]
    assert [(row["path"], row["prompt"]) for row in rows] == names
    for row, found in zip(rows, expected, strict=True):
        assert (row["text"], row["cut_off"], row["error"]) == (found.text, False, None)
        assert row["labels"] == [d.label for d in found.detections]
        assert np.allclose(row["boxes"], [d.box for d in found.detections], atol=.01)
        for mask, d in zip(row["masks"], found.detections, strict=True):
            if d.mask is None: assert mask is None
            else: assert np.array_equal(coco_mask(mask, (112, 112)), d.mask)
    assert any(row["masks"] and row["masks"][0] for row in rows)


def test_probabilities_are_those_of_a_second_reading(shipped):
    model, processor = shipped
    inputs = processor([s.image for s in SCENES[:3]], ["detect blue ring"] * 3)
    ids, probs = answer_with_probs(model, inputs, 100)
    assert torch.equal(ids, generate(model, inputs))
    expected = answer_probs(model, inputs, ids)
    torch.testing.assert_close(probs.nan_to_num(1.), expected, rtol=1e-4, atol=1e-5)
    assert probs.isnan().any() and len({len(p[~p.isnan()]) for p in probs}) > 1


def test_scores(shipped, folder):
    model, processor = shipped
    row, = label_pictures(model, processor, list_pictures([str(folder / "0.png")]),
                          ["segment blue ring"])
    inputs = processor([SCENES[0].image], ["segment blue ring"])
    probs = answer_probs(model, inputs, generate(model, inputs))[0]
    assert row["score"] == pytest.approx(probs.log().mean().exp().item(), abs=2e-4)
    assert row["scores"] == [pytest.approx(probs[:-1].log().mean().exp().item(), abs=2e-4)]
    cut, = label_pictures(model, processor, list_pictures([str(folder / "0.png")]),
                          ["segment blue ring"], max_new_tokens=3)
    assert cut["cut_off"] and cut["boxes"] == []


def test_a_picture_is_seen_once(shipped, folder):
    model, processor = shipped
    seen = []
    hook = model.vision_tower.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    with hook: label_pictures(model, processor, list_pictures([str(folder)]), PROMPTS,
                              batch_size=3)
    assert seen == [3, 3, 1]


# --- where pictures stand

def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def test_sources(folder, tmp_path):
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    (tmp_path / "mixed").mkdir()
    inside = {"0.json": b"{}", **files, ".hidden.png": b"", "notes.txt": b""}
    tar = write_tar(tmp_path / "mixed" / "shard.tar", inside)
    held = [dict(bytes=data, path=name) for name, data in files.items()]
    rows = write_parquet(tmp_path / "mixed" / "rows.parquet", text=["x"] * 7, image=held)
    plain = write_parquet(tmp_path / "plain.parquet", jpg=[*files.values()])
    (tmp_path / "mixed" / "notes.txt").touch()
    names = {
        str(folder): [str(folder / name) for name in files],
        f"{folder}/[0-3].png": [str(folder / name) for name in files][:4],
        str(folder / "3.png"): [str(folder / "3.png")],
        tar: [f"{tar}#{name}" for name in files],
        rows: [f"{rows}#{k}" for k in range(7)], plain: [f"{plain}#{k}" for k in range(7)]}
    names[str(tmp_path / "mixed")] = names[rows] + names[tar]
    for source, expected in names.items():
        pictures = list_pictures([source])
        assert [picture.name for picture in pictures] == expected
        for k, picture in enumerate(pictures[-7:]):
            if len(pictures) >= 7: assert read_picture(picture) == SCENES[k].image
    both = list_pictures([str(folder), f"{folder}/*.png", str(folder / "3.png")])
    assert both == list_pictures([str(folder)])  # each once


def test_sources_that_are_none(folder, tmp_path):
    data = {"0.png": (folder / "0.png").read_bytes()}
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "cut.tar", data)
    os.truncate(tmp_path / "cut.tar", 700)
    (tmp_path / "wrong.parquet").write_bytes(b"no parquet")
    write_parquet(tmp_path / "two.parquet", a=[b"", b""], b=[b"", b""])
    write_parquet(tmp_path / "none.parquet", a=[1, 2])
    for source, message in (
            ("empty", "no pictures in"), ("absent.png", "no pictures in"),
            ("*.gif", "no pictures in"), ("cut.tar", "expected a whole tar"),
            (write_tar(tmp_path / "z.tar", data, "w:gz"), "not compressed"),
            ("wrong.parquet", "wrong.parquet: "), ("two.parquet", "expected one column"),
            ("none.parquet", "expected one column")):
        with pytest.raises(ValueError, match=message) as caught:
            list_pictures([str(tmp_path / source)])
        assert len(str(caught.value).splitlines()) == 1


def test_a_bad_picture_is_a_row(shipped, folder, tmp_path):
    good = (folder / "0.png").read_bytes()
    bad = {"a.png": good[:300], "b.png": b"", "c.png": b"no picture", "d.png": good,
           "e.jpg": bytes(1000)}
    sources = [write_tar(tmp_path / "x.tar", bad),
               write_parquet(tmp_path / "x.parquet", png=[*bad.values(), None])]
    (tmp_path / "f.png").write_bytes(good[:300])
    pictures = list_pictures([*sources, str(tmp_path / "f.png")])
    pictures.append(Picture("gone.png", str(tmp_path / "gone.png")))
    rows = label_pictures(*shipped, pictures, ["caption en"])
    assert [row["path"] for row in rows] == [picture.name for picture in pictures]
    fine = [row for row in rows if row["error"] is None]
    expected, = answer(*shipped, [SCENES[0].image], ["caption en"])
    assert [row["text"] for row in fine] == [expected.text] * 2
    for row in rows:
        if row in fine: continue
        assert row["text"] is row["score"] is None and row["boxes"] == []
        assert len(row["error"].splitlines()) == 1


# --- a run, killed and continued

def run(folder, output, **settings):
    usual = dict(prompt=PROMPTS[:2], block_size=2, batch_size=2, device="cpu")
    return rows_of(label([str(folder)], str(output), **usual | settings))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("whole"))


def test_two_kinds_of_output(folder, whole, tmp_path):
    output = label([str(folder)], str(tmp_path / "out"), prompt=PROMPTS[:2], block_size=2,
                   batch_size=2, output_format="parquet", device="cpu")
    table = pa.concat_tables(map(pq.read_table, sorted(output.glob("part-*.parquet"))))
    assert table.to_pylist() == whole


@pytest.fixture
def one_thread(): # a forked child would wait for ever for the others
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.long)])
def test_killed_and_continued(kills, folder, tmp_path, one_thread):
    settings = dict(prompt=["caption en", "detect red circle"], block_size=1)
    def start(name): return run(folder / "[0-3].png", tmp_path / name, **settings)
    whole, rng = start("whole"), np.random.default_rng(kills)  # from here on the model is open
    total = count_calls(partial(start, "counted"))
    for k, moment in enumerate(rng.integers(total, size=kills)):
        call = partial(start, f"run{k}")
        assert run_until(moment, call)
        parts = {path: path.stat().st_mtime_ns for path in
                 (tmp_path / f"run{k}").glob("part-*.jsonl")}
        run_until(rng.integers(total), call)  # and a second time, if it is not over before
        assert call() == whole
        assert all(path.stat().st_mtime_ns == then for path, then in parts.items())
        names = [f"part-{i:06}.jsonl" for i in range(4)] + ["plan.json"]
        assert sorted(path.name for path in (tmp_path / f"run{k}").iterdir()) == names


def test_another_run_in_the_folder(folder, tmp_path):
    output = tmp_path / "out"
    run(folder / "[0-2].png", output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for other, message in ((dict(prompt="caption en"), "prompts was"),
                           (dict(block_size=3), "block_size was 2, not 3"),
                           (dict(dtype="bfloat16"), "dtype was None, not bfloat16"),
                           (dict(folder=folder), "pictures was")):
        with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
            run(other.pop("folder", folder / "[0-2].png"), output, **other)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    with pytest.raises(ValueError, match="holds other files"): run(folder, folder)


@pytest.mark.parametrize("flags, message", [
    (["--image_file_path", "absent"], "no pictures in absent"),
    (["--prompt", "a", "--prompt", "a"], "expected texts that differ"),
    (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
    (["--block_size", "-1"], "block_size: expected at least 1"),
    (["--workers", "-1"], "workers: expected 0 or more"),
    (["--model_path", "absent"], "absent"), (["--max_tokens_to_generate", "9999"], "context")])
def test_one_line_each(flags, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--output_path", "out", *flags]
    if "--image_file_path" not in flags: given += ["--image_file_path", str(folder)]
    assert main(["label", *given]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line and "picture/s" not in line]
    assert len(lines) == 1 and message in lines[0] and not said.out
    assert not list(tmp_path.glob("out/part*"))


def test_without_ray_it_runs_here(folder, whole, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    argv = ["--image_file_path", str(folder), "--output_path", str(tmp_path / "out"),
            "--block_size", "2", "--batch_size", "2", "--device", "cpu", "--workers", "2"]
    asked = [word for prompt in PROMPTS[:2] for word in ("--prompt", prompt)]
    assert main(["label", *argv, *asked]) == 0
    assert "pip install 'paligemma-nb[ray]'" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == whole


# --- pictures and workers that die

DEADLY = """
import os, signal
from PIL import Image

class Deadly: # as a decoder with a fault, or a picture too large for the memory
    def __init__(self, *_): os.kill(os.getpid(), signal.SIGKILL)

Image.register_open("DEADLY", Deadly, lambda head: head.startswith(b"DEADLY"))
"""


@pytest.fixture
def deadly(folder, tmp_path, monkeypatch):
    "A folder with seven pictures and a deadly one; in every new process it is deadly"
    code = tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(DEADLY)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in folder.iterdir(): (pictures / path.name).write_bytes(path.read_bytes())
    (pictures / "3a.png").write_bytes(b"DEADLY")
    monkeypatch.setenv("PYTHONPATH", f"{code}{os.pathsep}{Path(__file__).parents[1]}")
    return pictures


def command(pictures, output, *flags):
    asked = [word for prompt in PROMPTS[:2] for word in ("--prompt", prompt)]
    return [sys.executable, "-m", "paligemma_nb", "label", "--image_file_path", str(pictures),
            "--output_path", str(output), "--block_size", "2", "--batch_size", "2", "--device",
            "cpu", *asked, *flags]


def check_beside_the_deadly(output, folder, pictures, whole):
    rows = rows_of(output)
    lost = [row for row in rows if row["path"].endswith("3a.png")]
    assert [row["prompt"] for row in lost] == PROMPTS[:2]
    assert all("whoever opened it died" in row["error"] for row in lost)
    rest = [row | dict(path=row["path"].replace(str(pictures), str(folder)))
            for row in rows if row not in lost]
    for row, expected in zip(rest, whole, strict=True):
        assert row == expected | dict(score=row["score"], scores=row["scores"])
        assert row["score"] == pytest.approx(expected["score"], abs=1e-3)


def test_a_deadly_picture(deadly, folder, whole, tmp_path):
    output = tmp_path / "out"
    first = subprocess.run(command(deadly, output), capture_output=True)
    assert first.returncode == -signal.SIGKILL
    again = subprocess.run(command(deadly, output), capture_output=True, text=True)
    assert again.returncode == 0 and "1 of 8 pictures could not be read" in again.stderr
    check_beside_the_deadly(output, folder, deadly, whole)
    assert not list(output.glob("*.trying"))


def test_only_the_deadly_ones_are_found(deadly):
    (deadly / "0.png").write_bytes(b"DEADLY")
    (deadly / "1.png").write_bytes(b"merely broken")
    some = [str(deadly / f"{name}.png") for name in ("6", "0", "1", "3a")]
    found = {Path(picture.name).name for picture in find_deadly(list_pictures(some))}
    assert found == {"0.png", "3a.png"}


def family(process):
    try: return process.children(recursive=True)
    except psutil.NoSuchProcess: return []


def gone(processes): # waits for their end; a hang would be stopped by whoever runs the tests
    psutil.wait_procs(processes, timeout=600)
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def actors(process):
    for child in family(process):
        try:
            if "MapWorker" in child.name() + " ".join(child.cmdline()): yield child
        except psutil.NoSuchProcess: pass


def check_finished(output, folder, deadly, whole):
    check_beside_the_deadly(output, folder, deadly, whole)
    names = [f"part-{i:06}.jsonl" for i in range(4)] + ["plan.json"]
    assert sorted(path.name for path in output.iterdir()) == names


def test_an_actor_does_its_block(folder, whole, tmp_path):
    model = dict(model_path=None, adapter=None, weights="packed", device="cpu", dtype=None)
    settings = dict(prompts=PROMPTS[:2], batch_size=2, max_new_tokens=100)
    pictures = list_pictures([str(folder)])
    for k in range(2): # what Ray hands over, and what it gets back
        task = [str(tmp_path / f"part-{k}.jsonl"), pictures[2 * k:2 * k + 2], model, settings]
        assert _Worker()(dict(task=[json.dumps(task)])) == dict(count=[2], failed=[0])
    assert rows_of(tmp_path) == whole[:8]


# Ray starts only where its agent is up within 15 seconds, so not on an overloaded machine

@pytest.mark.long
def test_ray(deadly, folder, whole, tmp_path):
    "A picture takes an actor down, and so does this test"
    done = subprocess.Popen(command(deadly, output := tmp_path / "out", "--workers", "2"),
                            stderr=subprocess.PIPE, text=True)
    process, killed = psutil.Process(done.pid), None
    while killed is None and done.poll() is None:
        killed = next(actors(process), None)
        time.sleep(.05)
    if killed: killed.kill()
    processes = family(process)
    said = done.communicate()[1]
    assert done.returncode == 0, said
    assert killed and gone(processes)
    check_finished(output, folder, deadly, whole)


@pytest.mark.long
def test_ray_is_killed(deadly, folder, whole, tmp_path):
    words = command(deadly, output := tmp_path / "out", "--workers", "2")
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not list(output.glob("part-*.jsonl")):
        assert first.poll() is None
        time.sleep(.05)
    processes = family(psutil.Process(first.pid))
    first.kill()
    first.wait()
    assert processes and gone(processes)
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.jsonl")}
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    check_finished(output, folder, deadly, whole)
