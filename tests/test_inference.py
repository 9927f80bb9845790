"The command: what it answers and draws, and one clear line for each thing that is wrong."
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from paligemma_nb import generation, inference, load_model, save_model
from paligemma_nb.attention import answer_probs
from paligemma_nb.command import read_flags
from paligemma_nb.detection import (
    Detection, box_iou, draw_detections, format_detections, parse_boxes)
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.generation import generate
from paligemma_nb.hub import find_folder
from paligemma_nb.inference import (
    COMMANDS, SAMPLE, answer, answer_batch, as_json, as_table, as_words, clean_prompt,
    find_pictures, main, prepare, print_stream, save_drawing)
from paligemma_nb.lora import save_adapter
from paligemma_nb.opening import read_objects
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, open_image, train_tokenizer
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import encode_mask, load_mask_vae
from paligemma_nb.siglip import SiglipVisionConfig
from test_lora import adapted

SCENE = make_scene(HELD_OUT + 2738)  # what SAMPLE shows
CIRCLE = SCENE.things()["red circle"][0]
OPENED = "device: cpu, weights: float32\n"  # on stderr
CUT_OFF = "… cut off: raise --max_tokens_to_generate"


@pytest.fixture(scope="module")
def source(tmp_path_factory): # a model with random weights, small and quick
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["caption en a red circle", "detect square"], 1600)
    processor = PaliGemmaProcessor(tokenizer, 28, 4)
    text = GemmaConfig(
        40, 56, 1, 4, 2, processor.vocab_size, head_dim=12, max_position_embeddings=128)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        SiglipVisionConfig(36, 52, 1, 3, 14, 28), text_config=text, eos_token_id=-1,
        image_token_index=processor.image_token_id))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)  # else it would repeat itself
    folder = tmp_path_factory.mktemp("source")/"model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def folder(source, tmp_path): # one to break
    return Path(shutil.copytree(source, tmp_path/"model"))


@pytest.fixture
def command(capsys):
    def command(*flags):
        capsys.readouterr()
        code = main([str(flag) for flag in flags])
        return code, *capsys.readouterr()
    return command


@pytest.fixture
def fails(command):
    def fails(*flags, says=()):
        code, out, err = command(*flags)
        assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1), (code, out, err)
        for words in [says] if isinstance(says, str) else says: assert words in err, err
    return fails


def job_of(*flags): return prepare(read_flags(answer, ["--only_cpu", *map(str, flags)]))


def process(*flags, env={}, stdout=subprocess.PIPE, **kwargs):
    here = dict(PYTHONPATH=str(Path(inference.__file__).parents[1]), PYTHONUNBUFFERED="")
    env = os.environ | here | env  # its output is buffered, as it is for most users
    command = [sys.executable, "-m", "paligemma_nb.inference", *map(str, flags)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, **kwargs)


def python(*words): # -> what it prints
    env = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parents[1])}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


# --- answers

def test_shipped_model_describes_the_sample():
    done = process("--only_cpu")
    assert (done.returncode, done.stderr) == (0, OPENED.encode())
    assert done.stdout.decode() == f"{SCENE.caption}\n"


def test_sample_is_a_held_out_scene():
    with Image.open(SAMPLE) as image:
        assert image.mode == "RGB" and image.tobytes() == SCENE.image.tobytes()
    assert len({o.color for o in SCENE.objects}) == len({o.shape for o in SCENE.objects}) == 3


def test_answer_is_generate(command, source, tmp_path):
    picture = tmp_path/"a picture.jpg"
    SCENE.image.convert("L").save(picture)
    code, out, err = command("--model_path", source, "--prompt", "caption en", "--only_cpu",
                             "--image_file_path", picture, "--max_tokens_to_generate=7")
    model, processor = load_model(source, device="cpu")
    ids = generate(model, processor(Image.open(picture), "caption en"), max_new_tokens=7)
    words = f"{processor.decode(ids)[0]}\n{CUT_OFF}\n"  # this model knows no end
    assert (code, err, out) == (0, OPENED, words)


def test_an_adapter(command, fails, source, tmp_path):
    base, mine = find_folder(None), tmp_path/"mine"
    save_adapter(adapted(load_model(device="cpu")[0], std=.5), mine, base)
    flags = "--only_cpu", "--max_tokens_to_generate=9"
    before = command(*flags)[1]
    for dtype, given in itertools.product(("float32", "bfloat16"), (
            ("--model_path", base, "--adapter", mine), ("--adapter", mine),
            ("--model_path", mine))):
        code, out, _ = command(*given, *flags, "--dtype", dtype)
        model, processor = load_model(mine, device="cpu", dtype=dtype, weights="packed")
        ids = generate(model, processor(Image.open(SAMPLE), "caption en"), max_new_tokens=9)
        assert code == 0 and before != out and out.startswith(processor.decode(ids)[0])
    code, out, err = command("--model_path", mine, "--quantize=int8", *flags)
    assert code == 0 and "weights: int8" in err and out != before
    fails("--adapter", source, says="no adapter_config.json")
    fails("--adapter", mine, "--revision=main", says="needs a name on the hub")


def test_masks_of_an_adapter_are_those_of_its_base(tmp_path):
    model, processor = load_model(device="cpu")
    model.config.mask_vae = None
    save_model(model, processor, tmp_path/"base")
    np.savez(tmp_path/"base"/"vae-oid.npz",
             **{name: x.numpy() for name, x in load_mask_vae().state_dict().items()})
    save_adapter(adapted(model, rank=2), tmp_path/"mine", tmp_path/"base")
    assert isinstance(job_of("--model_path", tmp_path/"mine").vae, type(load_mask_vae()))


def test_sampling(command, source):
    flags = "--model_path", source, "--only_cpu"
    def draw(*more): return command(*flags, "--do_sample", "--top_p=1", *more)[1]
    assert draw() != draw()
    assert draw("--temperature", "0") == draw("--temperature=0") == command(*flags)[1]


def test_as_a_process(source):
    "One run of the real thing, on a terminal that knows ASCII alone."
    flags = "--model_path", source, "--only_cpu", "--do_sample", "--top_p=1"
    done = process(*flags, env={"PYTHONIOENCODING": "ascii"}, cwd=source)
    opened, *notes = done.stderr.splitlines(keepends=True)
    assert done.returncode == 0 and done.stdout and opened == OPENED.encode()
    assert all(line.startswith(b"note: ") for line in notes)  # of codes
    done = process("--model_path", source.parent)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert b"config.json" in done.stderr


def test_nobody_reads(source):
    reader, writer = os.pipe()
    os.close(reader)
    for flags, said in (["--help"], ""), (["--model_path", source, "--only_cpu"], OPENED):
        done = process(*flags, stdout=writer)
        assert (done.returncode, done.stderr.decode()) == (141, said)
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("flag", ["--help", "--only_cpu", "--output_format=json"])
def test_a_full_disk_is_one_line(flag):
    with open("/dev/full", "wb") as full: done = process(flag, stdout=full)
    *notices, error = done.stderr.decode().splitlines()
    assert error == "error: cannot write to stdout: No space left on device"
    assert done.returncode == 2 and len(notices) == (flag != "--help")


def test_closed_outputs():
    "Without stdout there is no answer; without stderr no complaint gets among the answers."
    done = process("--only_cpu", stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr == b"error: cannot write to stdout: it is closed\n"
    flags = "--only_cpu", "--output_format=json", "--image_file_path", SAMPLE, "none.png"
    done = process(*flags, preexec_fn=lambda: os.close(2))
    assert done.returncode == 1 and json.loads(done.stdout)["answer"] == SCENE.caption


def test_interrupt_is_quiet(command, monkeypatch):
    def pressed(*args, **kwargs): raise KeyboardInterrupt
    def late(*args, **kwargs):
        yield "a "
        pressed()
    monkeypatch.setattr(generation, "_pieces", late)
    assert command("--only_cpu") == (130, "a ", OPENED)
    monkeypatch.setattr(inference, "prepare", pressed)
    assert command() == (130, "", "")


def test_a_caption_waits_for_nothing_of_boxes_and_masks():
    script = "i.main(['--only_cpu']); print(*sys.modules)"
    loaded = python("-c", f"import sys, paligemma_nb.inference as i; {script}").split()
    assert "paligemma_nb.generation" in loaded
    heavy = {f"paligemma_nb.{name}" for name in ("detection", "segmentation", "scenes")}
    assert not (heavy | {"matplotlib"}) & set(loaded)


# --- objects: from an answer's text to a table, JSON, a picture

def pixels(path):
    with Image.open(path) as image: return np.asarray(image.convert("RGB")).astype(int)


def mask_of(rle):
    height, width = rle["size"]
    inside = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(inside, rle["counts"]).reshape(width, height).T


def iou(a, b): return (a & b).sum() / (a | b).sum()


def rows(table): return [re.split("  +", line.strip()) for line in table.splitlines()]


def test_detect_prints_a_table_and_draws(command, tmp_path):
    flags = "--only_cpu", "--prompt=detect red circle"
    code, out, err = command(*flags, "--output_image", tmp_path/"drawn.png")
    head, (label, *box) = rows(out)
    assert (code, err) == (0, f"{OPENED}written: {tmp_path/'drawn.png'}\n")
    assert (head, label) == (["label", "x1", "y1", "x2", "y2"], "red circle")
    assert box_iou([[int(x) for x in box]], [CIRCLE.box])[0, 0] > .8
    line = command(*flags, "--output_format=json")[1]
    objects = parse_boxes(json.loads(line)["answer"], SCENE.image.size)
    drawn = np.asarray(draw_detections(SCENE.image, objects))
    assert np.array_equal(pixels(tmp_path/"drawn.png"), drawn)
    assert [p.name for p in tmp_path.iterdir()] == ["drawn.png"]


def test_segment_end_to_end(command, tmp_path):
    "The shipped model finds the sample's red circle, and the drawing changes the circle."
    flags = "--only_cpu", "--prompt=segment red circle", "--output_image", tmp_path/"drawn.png"
    code, out, err = command(*flags, "--output_format=json")
    [found] = json.loads(out)["objects"]
    assert code == 0 and found["label"] == "red circle"
    assert iou(mask_of(found["mask"]), CIRCLE.mask) > .6
    changed = (pixels(tmp_path/"drawn.png") != SCENE.pixels).any(axis=-1)
    assert changed[CIRCLE.mask].mean() > .6


@pytest.mark.parametrize("size", [(112, 112), (400, 112), (90, 250)])
def test_perfect_segment_answer(size):
    "Without the model: true boxes and codes in, the same objects out, in JSON and drawn."
    picture = SCENE.image.resize(size)
    masks = {o.name: np.asarray(Image.fromarray(o.mask).resize(size)) for o in SCENE.objects}
    scale = np.array(size * 2) / 112
    boxes = {o.name: tuple(scale * o.box) for o in SCENE.objects}
    truth = [Detection(name, boxes[name], encode_mask(mask, boxes[name]))
             for name, mask in masks.items()]
    text = format_detections(truth, size)
    objects = read_objects(text, size)
    record = json.loads(as_json("a picture.png", "segment things", text, objects))
    assert {k: record[k] for k in ("image", "prompt", "answer", "cut_off")} == dict(
        image="a picture.png", prompt="segment things", answer=text, cut_off=False)
    assert [o["label"] for o in record["objects"]] == [o.name for o in SCENE.objects]
    for found, d in zip(record["objects"], truth):
        assert found.keys() == {"label", "box", "score", "mask"} and found["score"] is None
        assert np.allclose(found["box"], d.box, atol=max(size) / 1023)
        assert found["mask"]["size"] == [size[1], size[0]]
        assert iou(mask_of(found["mask"]), masks[d.label]) > .8
    drawn = np.asarray(draw_detections(picture, objects)).astype(int)
    covered = np.logical_or.reduce([o.mask for o in objects])
    assert (drawn != np.asarray(picture)).any(axis=-1)[covered].mean() > .9


def test_rle_is_cocos():
    from pycocotools import mask
    circle = Detection("circle", CIRCLE.box, encode_mask(CIRCLE.mask, CIRCLE.box))
    [found] = read_objects(format_detections([circle], (112, 112)), (112, 112))
    rle = json.loads(as_json("", "", "", [found]))["objects"][0]["mask"]
    assert np.array_equal(mask.decode(mask.frPyObjects(rle, *rle["size"])), found.mask)


def test_table():
    circle = Detection("a red circle", (3.6, 7.4, 41.2, 100.0))
    assert as_table([circle, Detection("", (0, 0, 1000, 5))]).splitlines() == [
        "label         x1  y1    x2   y2",
        "a red circle   4   7    41  100",
        "               0   0  1000    5"]
    assert as_table([Detection("star", (1, 2, 3, 4), score=.875)]).splitlines() == [
        "label  x1  y1  x2  y2  score",
        "star    1   2   3   4   0.88"]


@pytest.mark.parametrize("prompt, answer, says", [
    ("detect cat", "", "nothing found"),
    ("  <image>\nsegment cat", " ", "nothing found"),
    ("detect cat", "no cat", "nothing found: the answer is 'no cat'"),
    ("detect cat", "<loc0001><loc0002>", "nothing found: the answer is '<loc0001><loc0002>'"),
    ("caption en", "", ""),
    ("caption en", "<loc0001><loc0002>", "<loc0001><loc0002>"),
    ("detector", "a cat", "a cat"),
    ("where is it?", "<loc0000><loc0000><loc1023><loc1023> cat",
     "label  x1  y1  x2  y2\ncat     0   0  10  10"),
])
def test_words(prompt, answer, says):
    assert as_words(prompt, answer, read_objects(answer, (10, 10))) == says


@given(st.lists(st.sampled_from(["a", " ", "<", "<loc0001>", "loc0001>", "字", ""])))
def test_stream_shows_all_before_the_first_loc(pieces):
    with contextlib.redirect_stdout(io.StringIO()) as screen: print_stream(iter(pieces))
    words = "".join(pieces).partition("<loc")[0]  # a "<" at the end may begin one
    assert screen.getvalue() in (words, words.removesuffix("<"))


WHOLE = "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize("answer, shows", [
    ("here " + WHOLE + " it", "here \nlabel  x1  y1   x2   y2\nit      0   0  112  112\n"),
    (WHOLE + " it", "label  x1  y1   x2   y2\nit      0   0  112  112\n"),
    ("l" + WHOLE, "l\nlabel  x1  y1   x2   y2\n        0   0  112  112\n"),
    ("here <loc0000> it", "here <loc0000> it\n"),
    ("2 <", "2 <\n"),
    ("2 < 3", "2 < 3\n"),
    ("a <lo", "a <lo\n"),
    ("a <loc", "a <loc\n"),
    ("", "\n"),
])
def test_objects_in_a_streamed_answer(command, monkeypatch, answer, shows):
    answers(monkeypatch, answer)
    assert command("--only_cpu") == (0, shows, OPENED)


def test_nothing_found(command):
    flags = "--only_cpu", "--prompt=detect pink ring"
    assert command(*flags) == (0, "nothing found\n", OPENED)
    code, out, err = command(*flags, "--output_format=json")
    assert (code, err) == (0, OPENED) and json.loads(out) == dict(
        image=str(SAMPLE), prompt="detect pink ring", answer="", cut_off=False, objects=[])


def test_json_of_a_caption(command):
    code, out, err = command("--only_cpu", "--output_format", "json", "--prompt=caption en")
    assert (code, err, out.count("\n")) == (0, OPENED, 1)
    assert json.loads(out) == dict(
        image=str(SAMPLE), prompt="caption en",
        answer=SCENE.caption, cut_off=False, objects=[])


def test_scores_when_sampling(command):
    flags = "--only_cpu", "--prompt=detect red circle", "--do_sample", "--temperature=0"
    [found] = json.loads(command(*flags, "--output_format=json")[1])["objects"]
    model, processor = load_model(device="cpu")
    inputs = processor(SCENE.image, "detect red circle")
    ids = generate(model, inputs)
    assert len(ids[0]) == 7 and ids[0, -1] == processor.eos_token_id  # box, words, end
    score = answer_probs(model, inputs, ids)[0, :6].log().mean().exp().item()
    assert 0 < score < 1 and found["score"] == pytest.approx(score, abs=1e-4)
    head, row = rows(command(*flags)[1])
    assert head[-1] == "score" and row[-1] == f"{score:.2f}"


def test_scores_of_a_batch_are_those_of_each():
    "Answers of unequal lengths: what follows an answer's end has no part in its score."
    job = job_of("--prompt=detect red circle", "--do_sample", "--temperature=0")
    images = [SCENE.image, make_scene(HELD_OUT + 1).image, SCENE.image.rotate(180)]
    together = answer_batch(job, images)
    assert len({text for [(text, *_)] in together}) > 1
    for image, [(text, cut_off, token_probs)] in zip(images, together):
        [[(same, _, probs)]] = answer_batch(job, [image])
        assert not cut_off and same == text
        scores = [d.score for d in read_objects(text, image.size, token_probs)]
        alone = [d.score for d in read_objects(text, image.size, probs)]
        assert scores == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", ["drawn.png", "drawn.jpg", "drawn.JPEG", "drawn.webp",
                                  "drawn.gif", "a drawing.tiff", "drawn.bmp"])
def test_formats(command, tmp_path, name):
    flags = "--only_cpu", "--prompt=detect red circle", "--output_image", tmp_path/name
    assert command(*flags)[0] == 0
    with Image.open(tmp_path/name) as drawn: assert drawn.size == SCENE.image.size
    assert np.abs(pixels(tmp_path/name) - SCENE.pixels).mean() < 15
    assert len(list(tmp_path.iterdir())) == 1


def test_a_caption_leaves_the_picture_as_it_is(command, tmp_path):
    assert command("--only_cpu", "--output_image", tmp_path/"drawn.png") == (
        0, f"{SCENE.caption}\n", f"{OPENED}written: {tmp_path/'drawn.png'}\n")
    assert np.array_equal(pixels(tmp_path/"drawn.png"), SCENE.pixels)


def test_boxes_are_those_of_the_upright_picture(command, tmp_path):
    turned, exif = SCENE.image.resize((300, 112)).rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90 degrees
    turned.save(tmp_path/"on its side.png", exif=exif)
    flags = "--only_cpu", "--prompt=detect red circle", "--output_format=json"
    picture = "--image_file_path", tmp_path/"on its side.png"
    code, out, _ = command(*flags, *picture, "--output_image", tmp_path/"drawn.png")
    [found] = json.loads(out)["objects"]
    (x1, y1, x2, y2), wider = CIRCLE.box, 300 / 112
    assert code == 0
    assert box_iou([found["box"]], [(x1 * wider, y1, x2 * wider, y2)])[0, 0] > .8
    with Image.open(tmp_path/"drawn.png") as drawn: assert drawn.size == (300, 112)


def test_codes_are_decoded_by_the_models_own_decoder(command, folder):
    "With vae-oid.npz beside a checkpoint, its codes mean other masks than those of ours."
    assert job_of("--model_path", folder).vae is None
    tensors = {name: x.numpy() for name, x in load_mask_vae().state_dict().items()}
    [book] = [name for name, x in tensors.items() if x.shape == (128, 512)]
    tensors[book] = tensors[book][::-1].copy()
    np.savez(folder/"vae-oid.npz", **tensors)
    vae = job_of("--model_path", folder).vae
    codes = encode_mask(CIRCLE.mask, CIRCLE.box)
    texts = [format_detections([Detection("", CIRCLE.box, c)], (112, 112))
             for c in (codes, [127 - c for c in codes])]
    [plain] = read_objects(texts[0], (112, 112))
    [turned] = read_objects(texts[1], (112, 112), vae=vae)
    assert np.array_equal(plain.mask, turned.mask) and plain.mask.any()


def perfect_answer(*things): # the true boxes and codes of the sample's objects
    found = [SCENE.things()[thing][0] for thing in things]
    found = [Detection(o.name, o.box, encode_mask(o.mask, o.box)) for o in found]
    return format_detections(found, SCENE.image.size)


def answers(monkeypatch, answer, whole=True):
    "The command's model writes these words; in a stream each letter is a piece of its own."
    def decode(self, ids, *_): return [answer] * len(ids)
    def is_finished(ids, config): return torch.full((len(ids),), whole)
    def pieces(processor, steps): return list(steps) and iter(answer)
    monkeypatch.setattr(generation, "_pieces", pieces)
    monkeypatch.setattr(PaliGemmaProcessor, "decode", decode)
    monkeypatch.setattr(generation, "is_finished", is_finished)


def test_broken_decoders(command, folder, monkeypatch):
    "A named one is opened before anything is answered, the model's own for the first codes."
    (folder/"vae-oid.npz").write_bytes(b"no archive")
    pictures = "--image_file_path", SAMPLE, SAMPLE, "--batch_size=1"
    flags = "--model_path", folder, "--only_cpu", *pictures
    for name, says in (("vae-oid.npz", "is broken"), ("none.npz", "no file")):
        code, out, err = command(*flags, "--mask_vae", folder/name)
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err and name in err
    answers(monkeypatch, perfect_answer("red circle"))
    code, out, err = command(*flags)
    assert (code, out, err.count("\n")) == (2, "", 2) and "vae-oid.npz is broken" in err
    answers(monkeypatch, "a caption needs no decoder")
    assert command(*flags)[0] == 0


def test_a_decoder_can_be_named(command, tmp_path, monkeypatch):
    tensors = {name: x.numpy() for name, x in load_mask_vae().state_dict().items()}
    [book] = [name for name, x in tensors.items() if x.shape == (128, 512)]
    np.savez(tmp_path/"turned.npz", **tensors | {book: tensors[book][::-1]})
    answer = perfect_answer("red circle")
    turned = re.sub(r"<seg(\d+)>", lambda found: f"<seg{127 - int(found[1]):03}>", answer)
    masks = {}
    for text in (answer, turned):
        answers(monkeypatch, text)
        for flags in ((), ("--mask_vae", tmp_path/"turned.npz")):
            out = command("--only_cpu", "--output_format=json", *flags)[1]
            masks[text, flags != ()] = json.loads(out)["objects"][0]["mask"]
    assert masks[answer, False] == masks[turned, True] != masks[turned, False]
    assert iou(mask_of(masks[turned, True]), CIRCLE.mask) > .9


def test_a_doubt_about_the_decoder_is_said_once(command, monkeypatch, tmp_path):
    "And only where there are codes, and nobody has named a decoder."
    def doubts(folder, config): return None, "whose codes\nare these?"
    monkeypatch.setattr("paligemma_nb.segmentation.find_mask_vae", doubts)
    flags = "--only_cpu", "--image_file_path", SAMPLE, SAMPLE, SAMPLE, "--batch_size=2"
    answers(monkeypatch, f"{WHOLE} a box without codes")
    assert command(*flags)[2] == OPENED
    answers(monkeypatch, perfect_answer("red circle"))
    code, out, err = command(*flags)
    note = "note: whose codes are these? (here: --mask_vae FILE)\n"
    assert (code, err) == (0, OPENED + note)
    assert out.count("red circle") == 3
    save_file(load_mask_vae().state_dict(), tmp_path/"named.safetensors")
    assert command(*flags, "--mask_vae", tmp_path/"named.safetensors")[2] == OPENED


def test_where_the_model_and_its_parts_come_from(command, monkeypatch, folder):
    asked, opened = {}, load_model(device="cpu")
    def opens(model_path, **parts):
        asked.update(parts, model_path=model_path)
        return opened
    def finds(folder, config):
        asked["decoder_of"] = folder
        return None, None
    monkeypatch.setattr("paligemma_nb.opening.load_model", opens)
    monkeypatch.setattr("paligemma_nb.segmentation.find_mask_vae", finds)
    answers(monkeypatch, perfect_answer("red circle"))
    flags = "--processor_path=some", "--only_cpu", "--quantize=int8", "--dtype=float32"
    assert command("--model_path", folder, *flags)[0] == 0
    assert asked == dict(model_path=str(folder), revision=None, processor_path="some",
                         adapter=None, device="cpu", weights="int8", dtype="float32",
                         decoder_of=folder)
    monkeypatch.setattr("paligemma_nb.hub.find_folder", lambda *args, **parts: (args, parts))
    assert command("--model_path=some/name", "--revision=bfloat16")[0] == 0
    assert (asked["revision"], asked["device"]) == ("bfloat16", None)
    assert asked["decoder_of"] == (("some/name", "bfloat16"), dict(parts=("weights",)))


# --- answers that are not whole, and models that give none

TWO = "red circle", "blue star"
BOX = "<loc0100>" * 4


@pytest.mark.parametrize("answer, whole", [
    (perfect_answer(*TWO)[:-5], 1),              # half of the second's name
    (perfect_answer(*TWO), 1),                   # is a name at the end whole? Nobody knows
    (perfect_answer(*TWO) + " ;", 2),
    (perfect_answer(*TWO) + " ; " + BOX[:18], 2),
    (perfect_answer("red circle") + " ; " + BOX, 1),
    (perfect_answer("red circle") + " ; " + BOX + "<seg001>" * 7, 1),
    (perfect_answer("red circle"), 0),
    (BOX[:18], 0),
])
def test_what_a_cut_left_unfinished(command, monkeypatch, tmp_path, answer, whole):
    "It is no object, in the table, in JSON and on the picture."
    answers(monkeypatch, answer, whole=False)
    flags = "--only_cpu", "--prompt=segment things", "--output_image", tmp_path/"drawn.png"
    code, out, err = command(*flags)
    *table, cut = out.splitlines()
    written = f"written: {tmp_path/'drawn.png'}\n"
    assert (code, err, cut) == (0, OPENED + written, CUT_OFF)
    if whole: assert [row[0] for row in rows("\n".join(table))] == ["label", *TWO[:whole]]
    else: assert table == [answer]
    objects = read_objects(perfect_answer(*TWO[:whole]), SCENE.image.size)
    drawn = np.asarray(draw_detections(SCENE.image, objects))
    assert np.array_equal(pixels(tmp_path/"drawn.png"), drawn)
    code, out, err = command(*flags, "--output_format=json")
    record = json.loads(out)
    assert record["cut_off"] is True and record["answer"] == answer
    assert [d["label"] for d in record["objects"] if d["mask"]] == list(TWO[:whole])
    assert err == f"{OPENED}note: {SAMPLE}: the answer is {CUT_OFF[2:]}\n{written}"


def test_scores_of_a_cut_answer(command):
    "The probabilities belong to the whole text, of which the last object is left out."
    greedy = "--only_cpu", "--do_sample", "--temperature=0"
    flags = *greedy, "--prompt=detect red circle ; blue star"
    whole = command(*flags)[1].splitlines()
    cut = command(*flags, "--max_tokens_to_generate=12")[1].splitlines()
    assert len(whole) == 3 and rows("\n".join(whole))[1] == rows("\n".join(cut))[1]
    assert len(cut) == 3 and cut[2] == CUT_OFF


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_cut_caption_says_so(command, pictures):
    "Streamed, and among several. With one token more it comes to its end."
    tokens = len(load_model(device="cpu")[1].encode(SCENE.caption))
    flags = "--only_cpu", "--image_file_path", *[SAMPLE] * pictures
    name = f"{SAMPLE}:\n" * (pictures > 1)
    assert command(*flags, f"--max_tokens_to_generate={tokens}") == (
        0, f"{name}{SCENE.caption}\n{CUT_OFF}\n" * pictures, OPENED)
    assert command(*flags, f"--max_tokens_to_generate={tokens + 1}") == command(*flags)
    assert CUT_OFF not in command(*flags)[1]
    out = command(*flags, "--output_format=json", f"--max_tokens_to_generate={tokens}")[1]
    assert [json.loads(line)["cut_off"] for line in out.splitlines()] == [True] * pictures


@pytest.fixture
def broken(folder): # infinity in its last norm
    tensors = load_file(folder/"model.safetensors")
    tensors["language_model.model.norm.weight"] *= float("inf")
    save_file(tensors, folder/"model.safetensors")
    return folder


@pytest.mark.parametrize("flags", [
    [], ["--do_sample"], ["--prompt=detect x"], ["--prompt=detect x", "--do_sample"],
    ["--output_format=json"], ["--image_file_path", SAMPLE, SAMPLE, SAMPLE, "--batch_size=1"],
], ids=lambda flags: "-".join(map(str, flags[:2])))
def test_logits_that_are_no_numbers(command, broken, tmp_path, flags):
    if len(flags) < 3: flags = [*flags, "--output_image", tmp_path/"drawn.png"]
    code, out, err = command("--model_path", broken, "--only_cpu", *flags)
    *notices, error = err.splitlines()
    assert code == 2 and error.startswith("error: ") and "not finite" in error
    assert notices.count(OPENED.strip()) == 1 and len(out) <= 1
    assert not (tmp_path/"drawn.png").exists()


def test_a_model_that_breaks_on_the_way(command, monkeypatch):
    "What was streamed ends its line; of several pictures, those that were answered count."
    def breaks(processor, steps):
        yield from ("a ", "blue")
        raise ValueError("logits are not finite")
    said = "error: logits are not finite\n"
    with monkeypatch.context() as m:
        m.setattr(generation, "_pieces", breaks)
        assert command("--only_cpu") == (2, "a blue\n", OPENED + said)
    calls, generate_tokens = [], generation.generate_tokens
    def third(*args, **kwargs):  # the first call is the check of the prompt
        calls.append(args)
        if len(calls) == 3: raise ValueError("logits are not finite")
        return generate_tokens(*args, **kwargs)
    monkeypatch.setattr(generation, "generate_tokens", third)
    pictures = "--image_file_path", SAMPLE, SAMPLE, SAMPLE, "--batch_size=1"
    first = f"{SAMPLE}: {SCENE.caption}\n"
    assert command("--only_cpu", *pictures) == (1, first, OPENED + said) and len(calls) == 3


# --- prompts as people type them

@pytest.mark.parametrize("typed, asked", [
    ("detect red circle\n", "detect red circle"),
    (" \t detect red circle \r\n\n", "detect red circle"),
    ("detect\nred circle", "detect red circle"),
    ("detect \r\n \n red circle", "detect red circle"),
    ("detect\rred circle", "detect red circle"),
    ("detect  red circle", "detect  red circle"),  # inside a line nothing changes
    ("<image>detect red circle", "<image>detect red circle"),
    ("<image> detect red circle", "<image>detect red circle"),
    ("<image><bos>detect red circle\n", "<image>detect red circle"),
    ("<image>\n<bos> detect red circle", "<image>detect red circle"),
    ("what is <image> this", "what is<image>this"),
])
def test_prompts_as_people_type_them(typed, asked): assert clean_prompt(typed) == asked


@pytest.mark.parametrize("typed", ["{}\n", "\n{}", " {} ", "<image> {}", "<image><bos>{}\n"])
def test_blanks_and_line_ends_change_no_answer(command, typed):
    plain = "detect red circle"
    typed = "--only_cpu", "--prompt", typed.format(plain)
    code, out, err = command("--only_cpu", "--prompt", plain)
    assert command(*typed) == (code, out, err) and "\nred circle" in out
    record = json.loads(command(*typed, "--output_format=json")[1])
    assert record["prompt"].removeprefix("<image>") == plain


# --- notes

def test_warnings_are_notes_of_one_line(command, monkeypatch):
    def opens(*args, **kwargs):
        warnings.warn("bfloat16 is slow here:\n  float32 would be faster")
        return load_model(*args, **kwargs)
    monkeypatch.setattr("paligemma_nb.opening.load_model", opens)
    note = "note: bfloat16 is slow here: float32 would be faster\n"
    for _ in range(2):
        assert command("--only_cpu") == (0, f"{SCENE.caption}\n", note + OPENED)


def test_sampling_flags_without_sampling(command):
    code, out, err = command("--only_cpu", "--temperature=0.5", "--top_p=0.5")
    assert (code, out) == (0, f"{SCENE.caption}\n")
    note = "note: without --do_sample no use is made of --temperature and --top_p\n"
    assert err == note + OPENED
    for flags in (["--temperature=0", "--do_sample"], ["--do_sample=False"]):
        assert command("--only_cpu", *flags)[2] == OPENED


@pytest.mark.parametrize("name", ["moves.gif", "moves.png", "moves.webp", "pages.tiff"])
def test_of_several_frames_the_first_is_answered(command, tmp_path, name):
    others = [make_scene(HELD_OUT + i).image for i in (1, 2)]
    SCENE.image.save(tmp_path/name, save_all=True, append_images=others)
    flags = "--only_cpu", "--prompt=detect red circle", "--image_file_path", tmp_path/name
    code, out, err = command(*flags)
    assert code == 0 and "red circle" in out
    note = f"note: {tmp_path/name} holds several frames: the first is answered\n"
    assert err == note + OPENED
    SCENE.image.save(tmp_path/name)
    assert command(*flags)[2] == OPENED


def test_the_previews_of_a_camera_are_no_frames(command, tmp_path):
    preview = SCENE.image.resize((28, 28))
    SCENE.image.save(tmp_path/"a.mpo", save_all=True, append_images=[preview])
    assert command("--only_cpu", "--image_file_path", tmp_path/"a.mpo")[2] == OPENED


# --- the original road: a folder as `git clone` of the hub leaves it, and the script

@pytest.fixture
def launch(tmp_path):
    "The script itself, in an environment that looks set up: its Python is this one."
    root, env = Path(inference.__file__).parents[1], tmp_path/"env"
    (env/"bin").mkdir(parents=True)
    (env/"bin"/"python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (env/"bin"/"python").chmod(0o755)
    env = os.environ | dict(VIRTUAL_ENV=str(env), PYTHONPATH=str(root), HF_HUB_OFFLINE="1")
    stamp = f"root='{root}'; . '{root}/.ci/setup.sh'; install() {{ :; }}; set_up inference"
    subprocess.run(["bash", "-c", stamp], env=env, check=True, capture_output=True)
    def launch(*flags, **variables):
        script = ["bash", root/"launch_inference.sh", *map(str, flags)]
        given = env | {name: str(value) for name, value in variables.items()}
        return subprocess.run(script, env=given, capture_output=True, text=True, cwd=tmp_path)
    return launch


@pytest.fixture
def cloned(tmp_path):
    "The shipped model in the files of a published one: shards, and what lies beside them."
    folder = tmp_path/"paligemma-3b-mix-224"
    save_model(*load_model(device="cpu"), folder, max_shard_size=6_000_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    (folder/".git").mkdir()
    (folder/".git"/"HEAD").write_text("ref: refs/heads/main\n")
    (folder/".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder/"README.md").write_text("---\nlibrary_name: transformers\n---\n# Model card\n")
    (folder/"generation_config.json").write_text('{"bos_token_id": 2, "eos_token_id": 1}\n')
    (folder/"special_tokens_map.json").write_text('{"bos_token": "<bos>"}\n')
    (folder/"added_tokens.json").write_text('{"<image>": 257152}\n')
    (folder/"tokenizer.model").write_bytes(b"\n\x0e\n\x05<pad>")
    return folder


def as_pointer(path): # what git leaves of a large file where git-lfs is not installed
    head = "version https://git-lfs.github.com/spec/v1"
    digest = hashlib.sha256(path.read_bytes())
    path.write_text(f"{head}\noid sha256:{digest.hexdigest()}\nsize {path.stat().st_size}\n")


def test_the_original_road(launch, cloned):
    "MODEL_PATH=… ./launch_inference.sh"
    done = launch(MODEL_PATH=cloned)
    assert (done.returncode, done.stderr, done.stdout) == (0, OPENED, f"{SCENE.caption}\n")


@pytest.mark.parametrize("pattern", ["model-*.safetensors", "model-00002*", "tokenizer.json"])
def test_the_original_road_with_pointer_files(launch, cloned, pattern):
    for path in cloned.glob(pattern): as_pointer(path)
    done = launch(MODEL_PATH=cloned, PROMPT="detect red circle")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {cloned}") and "git lfs pull" in done.stderr
    assert pattern.partition("*")[0] in done.stderr


def test_the_script_draws_what_is_pointed_at(launch, tmp_path):
    "In answer.png; a blank that was typed too much changes nothing."
    for prompt in ("segment red circle", " segment red circle\n"):
        done = launch(PROMPT=prompt)
        assert done.returncode == 0 and done.stderr.endswith("\nwritten: answer.png\n")
        with Image.open(tmp_path/"answer.png") as drawn: assert drawn.size == SCENE.image.size
        (tmp_path/"answer.png").unlink()


def test_the_script_knows_every_flag():
    text = (Path(inference.__file__).parents[1]/"launch_inference.sh").read_text()
    set_above = re.findall(r'^([A-Z_]+)="\$\{\1:-\}"', text, re.M)
    passed_on = re.search(r"for name in ([A-Z_ \\\n]+);", text)[1].replace("\\", "").split()
    flags = [name.upper() for name in inspect.signature(answer).parameters]
    assert sorted(set_above) == sorted(passed_on) == sorted(flags)


def test_a_flag_and_its_variable_are_given_twice(launch):
    done = launch("--top_p=0.5", TOP_P="0.6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --top_p is given twice\n"


# --- where the drawing goes

@pytest.fixture
def refuses(fails, monkeypatch):
    "Refused before the model is opened"
    def opened(*args, **kwargs): raise AssertionError("the model was opened")
    monkeypatch.setattr("paligemma_nb.opening.load_model", opened)
    return fails


@pytest.mark.parametrize("name, says", [
    ("none/drawn.png", ["no folder", "none"]),
    ("drawn", "extension"),
    ("drawn.txt", ["extension", "drawn.txt"]),
    ("drawn.xbm", "colour"),  # black and white alone
    ("drawn.psd", "extension"),  # Pillow reads it, and does not write it
    ("folder", "not a file"),
    ("folder.png", "not a file"),
    ("folder/none/drawn.png", "no folder"),
    ("notes.txt/drawn.png", "no folder"),
    ("locked.png", "read-only"),
])
def test_bad_places(refuses, tmp_path, name, says):
    for folder in ("folder", "folder.png"): (tmp_path/folder).mkdir()
    (tmp_path/"notes.txt").touch()
    (tmp_path/"locked.png").write_text("precious")
    (tmp_path/"locked.png").chmod(0o444)
    before = sorted(tmp_path.rglob("*"))
    says = [says] if isinstance(says, str) else says
    refuses("--output_image", tmp_path/name, says=["--output_image: ", *says])
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path/"locked.png").read_text() == "precious"


def test_unwritable_folder(refuses, tmp_path, monkeypatch): # as on a disk that is read-only
    def denied(dir): raise OSError(30, "Read-only file system")
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    says = f"cannot write in the folder {tmp_path}", "Read-only file system"
    refuses("--output_image", tmp_path/"drawn.png", says=says)


def test_pictures_are_not_drawn_over(refuses, tmp_path):
    SCENE.image.save(tmp_path/"a.png")
    (tmp_path/"link.png").symlink_to(tmp_path/"a.png")
    before = (tmp_path/"a.png").read_bytes()
    picture = "--image_file_path", tmp_path/"a.png"
    for name in ("a.png", "link.png"):
        refuses(*picture, "--output_image", tmp_path/name, says="to read")
    refuses("--image_file_path", tmp_path, "--output_image", tmp_path, says="to read")
    (tmp_path/"b").mkdir()
    SCENE.image.save(tmp_path/"b"/"a.jpg")
    both = *picture, tmp_path/"b"
    refuses(*both, "--output_image", tmp_path/"drawn", says="two of the pictures")
    assert (tmp_path/"a.png").read_bytes() == before and not (tmp_path/"drawn").exists()


def test_several_drawings_want_a_folder(refuses, tmp_path):
    (tmp_path/"notes").touch()
    pictures = "--image_file_path", SAMPLE
    nowhere = "--output_image", tmp_path/"no"/"drawn"
    for name in ("notes", "drawn.png"):
        refuses(*pictures, SAMPLE, "--output_image", tmp_path/name, says="expected a folder")
    refuses(*pictures, SAMPLE, *nowhere, says=["two of", "sample.png"])
    refuses(*pictures, "none.png", *nowhere, says="no folder")


def test_an_old_file_is_replaced_whole_or_not_at_all(command, tmp_path, monkeypatch):
    (tmp_path/"kept.png").write_bytes(b"old")
    (tmp_path/"link.png").symlink_to("kept.png")
    def breaks(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(Image.Image, "save", breaks)
        with pytest.raises(ValueError, match="kept.png cannot be written: .*No space"):
            save_drawing(tmp_path/"kept.png", SCENE.image, [])
    assert (tmp_path/"kept.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    save_drawing(tmp_path/"link.png", SCENE.image, [])
    assert (tmp_path/"link.png").is_symlink()
    assert np.array_equal(pixels(tmp_path/"kept.png"), SCENE.pixels)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room_for_the_drawing(command, monkeypatch, tmp_path):
    def full(path, image, objects): raise ValueError(f"{path} cannot be written: it is full")
    monkeypatch.setattr(inference, "save_drawing", full)
    code, out, err = command("--only_cpu", "--output_image", tmp_path/"drawn.png")
    assert (code, out) == (2, f"{SCENE.caption}\n")
    assert err.startswith(f"{OPENED}error: ") and err.count("\n") == 2


# --- several pictures

@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    for i, name in enumerate(("d.png", "a.jpg", "c.png", "b.webp", "e[1].png")):
        make_scene(HELD_OUT + i, 112).image.save(folder/name, quality=95)
    (folder/"f.png").write_bytes(SAMPLE.read_bytes()[:5000])
    for name in ("notes.txt", ".hidden.png", "noextension"): (folder/name).write_text("hello")
    return folder


def test_find_pictures(album):
    def found(*values):
        paths, alone = find_pictures([str(v) for v in values])
        return [os.path.relpath(p, album) for p in paths], alone
    assert found(album) == (["a.jpg", "b.webp", "c.png", "d.png", "e[1].png", "f.png"], False)
    assert found(album/"[cd].png") == (["c.png", "d.png"], False)
    assert found(album/"c*") == (["c.png"], False)          # a pattern, with a single match
    assert found(album/"e[1].png") == (["e[1].png"], True)  # it exists: no pattern
    assert found(album/"d.png", album/"a.jpg") == (["d.png", "a.jpg"], False)
    mixed = album/"d.png", album/"*.web?", album/"none.png"
    assert found(*mixed) == (["d.png", "b.webp", "none.png"], False)
    assert found(album/"**"/"[cd].png") == (["c.png", "d.png"], False)
    assert found(album/"none.png") == (["none.png"], True)


def test_no_pictures(fails, tmp_path):
    fails("--image_file_path", tmp_path, says="no picture in the folder")
    fails("--image_file_path", tmp_path/"*.png", says=["no picture matches", "*.png"])
    fails("--image_file_path", SAMPLE, tmp_path/"*.png", says="no picture matches")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_folder_in_order_with_a_bad_picture(command, album, size):
    code, out, err = command("--only_cpu", "--image_file_path", album, "--batch_size", size)
    model, processor = load_model(device="cpu")
    names = "a.jpg", "b.webp", "c.png", "d.png", "e[1].png"
    images = [open_image(album/name) for name in names]
    texts = [processor.decode(generate(model, processor(image, "caption en")))[0]
             for image in images]
    assert out == "".join(f"{album/name}: {text}\n" for name, text in zip(names, texts))
    assert code == 1 and err.startswith(f"{OPENED}error: ") and err.count("\n") == 2
    assert "f.png" in err


def test_several_tables_records_and_drawings(command, album, tmp_path):
    flags = ("--only_cpu", "--prompt=detect red circle", "--output_image", tmp_path/"drawn",
             "--image_file_path", album/"d.png", SAMPLE)
    code, out, err = command(*flags)
    written = f"written: {tmp_path/'drawn'}\n"
    assert (code, err) == (0, OPENED + written) and f"{SAMPLE}:\nlabel " in out
    assert sorted(p.name for p in (tmp_path/"drawn").iterdir()) == ["d.png", "sample.png"]
    code, out, err = command(*flags, "--output_format=json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, OPENED + written)
    assert [r["image"] for r in records] == [str(album/"d.png"), str(SAMPLE)]
    boxes = parse_boxes(records[1]["answer"], (112, 112))
    drawn = np.asarray(draw_detections(SCENE.image, boxes))
    assert np.array_equal(pixels(tmp_path/"drawn"/"sample.png"), drawn)


def test_exit_codes_of_several(command, tmp_path):
    (tmp_path/"bad.png").write_bytes(b"")
    files = "--only_cpu", "--image_file_path", tmp_path/"none.png"
    code, out, err = command(*files, tmp_path/"bad.png", "--output_image", tmp_path/"drawn")
    assert (code, out) == (2, "")
    assert [line[:7] for line in err.splitlines()] == ["device:", "error: ", "error: "]
    assert not (tmp_path/"drawn").exists()
    code, out, err = command(*files, SAMPLE)
    assert (code, out) == (1, f"{SAMPLE}: {SCENE.caption}\n") and "no such picture" in err


def test_progress_is_for_terminals(command, monkeypatch):
    flags = "--only_cpu", "--image_file_path", SAMPLE, SAMPLE
    assert command(*flags)[2] == OPENED
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code = main([str(flag) for flag in flags])
    assert code == 0 and "2/2" in sys.stderr.getvalue()


# --- several prompts

PROMPTS = "detect red circle", "caption en", "answer en how many objects are there?"
ASKED = "--only_cpu", *(f"--prompt={prompt}" for prompt in PROMPTS)


def test_every_prompt_about_every_picture(command, album):
    "Picture by picture, whatever the size of a batch, and each as if it were asked alone."
    pictures = album/"a.jpg", SAMPLE, album/"none.png", album/"d.png"
    def records(*flags): return [json.loads(line) for line in command(*flags)[1].splitlines()]
    for size in (1, 2, 3, 4, 8):
        batch = "--output_format=json", f"--batch_size={size}"
        found = records(*ASKED, *batch, "--image_file_path", *pictures)
        assert [(r["image"], r["prompt"]) for r in found] == [
            (str(path), prompt) for path in pictures if path.exists() for prompt in PROMPTS]
        if size == 1: alone = found
        assert found == alone
    one = "--image_file_path", SAMPLE, "--output_format=json"
    assert alone[3:6] == [
        r for prompt in PROMPTS for r in records("--only_cpu", f"--prompt={prompt}", *one)]


@pytest.mark.parametrize("size, looks", [
    (2, [1, 1, 1]), (3, [1, 1, 1]), (6, [2, 1]), (9, [3])])
def test_the_vision_tower_looks_once_at_each_picture(size, looks):
    job, seen = job_of(*ASKED[1:], f"--batch_size={size}"), []
    tower = job.model.vision_tower
    tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    job.image, job.paths, job.targets = None, [str(SAMPLE)] * 3, [None] * 3
    with contextlib.redirect_stdout(io.StringIO()): assert inference.answer_pictures(job) == 3
    assert seen == looks


def test_several_prompts_are_named_and_share_a_drawing(command, tmp_path):
    draws = "--output_image", tmp_path/"drawn.png"
    two = "--prompt=detect red circle", "--prompt=detect blue star"
    code, out, err = command("--only_cpu", *two, "--prompt=caption en", *draws)
    assert (code, err) == (0, f"{OPENED}written: {tmp_path/'drawn.png'}\n")
    assert re.fullmatch(r"detect red circle:\nlabel .*\nred circle .*\ndetect blue star:\n"
                        rf"label .*\nblue star .*\ncaption en: {SCENE.caption}\n", out)
    lines = command("--only_cpu", *two, "--output_format=json")[1].splitlines()
    texts = [json.loads(line)["answer"] for line in lines]
    objects = [d for text in texts for d in parse_boxes(text, (112, 112))]
    assert len(objects) == 2
    drawn = np.asarray(draw_detections(SCENE.image, objects))
    assert np.array_equal(pixels(tmp_path/"drawn.png"), drawn)
    out = command("--only_cpu", *two, "--image_file_path", SAMPLE, SAMPLE)[1]
    assert out.count(f"{SAMPLE}: detect red circle:\nlabel ") == 2


def test_a_single_prompt_is_streamed(command, monkeypatch):
    "Words of one prompt about one picture come as they are written; those of several at once."
    pieces, streamed = generation._pieces, []
    def counts(*args):
        streamed.append(1)
        return pieces(*args)
    monkeypatch.setattr(generation, "_pieces", counts)
    assert command("--only_cpu", "--prompt=caption en")[1] == f"{SCENE.caption}\n" and streamed
    streamed.clear()
    both = command("--only_cpu", "--prompt=caption en", "--prompt=caption en")[1]
    assert both == f"caption en: {SCENE.caption}\n" * 2 and not streamed


# --- commands

@pytest.mark.parametrize("name", [name for name in COMMANDS if name])
def test_each_command_helps_and_is_strict(command, fails, name):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"Usage: paligemma-nb {name} ")
    fails(name, "--stepz", "3", says="unknown flag --stepz: the flags are --")


@pytest.mark.parametrize("way", [["-m", "paligemma_nb"], ["-m", "paligemma_nb.inference"]])
def test_both_modules_are_the_command(way):
    assert re.fullmatch(r"paligemma-nb \d+\.\d+\.\d+\n", python(*way, "--version"))
    assert python(*way, "train", "--help").startswith("Usage: paligemma-nb train ")


# --- flags

def test_help_names_every_flag_and_waits_for_nothing():
    script = "i.main(['--prompt', 'x', '--help']); assert 'torch' not in sys.modules"
    text = python("-c", f"import sys, paligemma_nb.inference as i; {script}")
    assert all(f"--{name} " in text for name in inspect.signature(answer).parameters)
    assert all(name in text for name in COMMANDS if name)
    assert max(map(len, text.splitlines())) <= 100


def test_defaults():
    assert read_flags(answer, []) == dict(
        model_path=None, revision=None, processor_path=None, adapter=None,
        prompt="caption en", image_file_path=None, max_tokens_to_generate=100,
        temperature=.8, top_p=.9, do_sample=False, only_cpu=False, device=None, dtype=None,
        quantize=None, mask_vae=None,
        output_image=None, output_format="text", batch_size=8)


@pytest.mark.parametrize("argv, name, value", [
    (["--prompt", "7"], "prompt", ["7"]),
    (["--prompt", "a=b", "--prompt=-x"], "prompt", ["a=b", "-x"]),
    (["--max-tokens-to-generate", "5"], "max_tokens_to_generate", 5),
    (["--top_p", "1"], "top_p", 1.0),
    (["--temperature", "1e-2"], "temperature", .01),
    (["--do_sample", "False"], "do_sample", False),
    (["--revision", "bfloat16"], "revision", "bfloat16"),
    (["--processor-path=google/some"], "processor_path", "google/some"),
    (["--mask_vae", "vae-oid.npz"], "mask_vae", "vae-oid.npz"),
    (["--only_cpu", "--device", "cpu"], "device", "cpu"),
    (["--output_format=json"], "output_format", "json"),
    (["--batch-size", "2"], "batch_size", 2),
    (["--output_image", "a b.png"], "output_image", "a b.png"),
    (["--image_file_path", "7", "[7]", "a=b.png"], "image_file_path", ["7", "[7]", "a=b.png"]),
    (["--image_file_path", "a", "b", "-image-file-path=c"], "image_file_path", [*"abc"]),
])
def test_flags(argv, name, value):
    values, usual = read_flags(answer, argv), read_flags(answer, [])
    assert values[name] == value and type(values[name]) is type(value)
    untouched = [n for n in usual if n not in " ".join(argv).replace("-", "_")]
    assert untouched and all(values[n] == usual[n] for n in untouched)


@pytest.mark.parametrize("argv, says", [
    (["--frobnicate"], ["unknown flag --frobnicate", "--max_tokens_to_generate"]),
    (["--image_file", "a.png"], "unknown flag --image_file:"),
    (["-top_p=1", "--top-p=1"], "--top_p is given twice"),
    (["detect red circle"], "unexpected argument 'detect red circle'"),
    (["--prompt", "detect", "red circle"], "unexpected argument 'red circle'"),
    (["--image_file_path", "a.png", "--prompt", "x", "b.png"], "unexpected argument 'b.png'"),
    (["trian"], "unexpected argument 'trian'"),
    (["--prompt", ""], "--prompt: expected some text in UTF-8, got ''"),
    (["--prompt", "<image>"], "--prompt: expected some text"),
    (["--prompt=a", "--prompt", "<image><bos>\n"], "--prompt: expected some text"),
    (["--image_file_path", "a.png", ""], "--image_file_path: expected some text"),
    (["--image_file_path", "--prompt", "x"], "--image_file_path needs a value"),
    (["--output_format=xml"], "--output_format: expected text or json, got 'xml'"),
    (["--quantize=int2"], "--quantize: expected int8 or int4, got 'int2'"),
    (["--dtype=int8"], "--dtype: expected float32 or bfloat16 or float16, got 'int8'"),
    (["--batch_size=0"], "--batch_size: expected at least 1, got 0"),
    (["--top_p=0"], "--top_p: expected more than 0 and at most 1, got 0.0"),
    (["--top_p", "-0.5"], "--top_p: expected more than 0 and at most 1, got -0.5"),
    (["--top_p=1.5"], "--top_p: expected more than 0 and at most 1, got 1.5"),
    (["--top_p=nan"], "--top_p: expected more than 0 and at most 1, got nan"),
    (["--top_p=much"], "--top_p: expected a number, got 'much'"),
    (["--temperature=-1"], "--temperature: expected 0 or more, got -1.0"),
    (["--temperature=inf"], "--temperature: expected 0 or more, got inf"),
    (["--temperature=nan"], "--temperature: expected 0 or more, got nan"),
    (["--max_tokens_to_generate=0"], "--max_tokens_to_generate: expected at least 1, got 0"),
    (["--max_tokens_to_generate=2.5"], "expected a whole number, got '2.5'"),
    (["--do_sample=maybe"], "--do_sample: expected True or False, got 'maybe'"),
    (["--only_cpu", "--device=cuda"], "--only_cpu and --device cuda exclude each other"),
    *[([f"--device={name}"], f"--device: expected cpu, cuda, cuda:0 or mps, got {name!r}")
      for name in ("abacus", "cuda:", "CPU", "cpu:1")],
])
def test_bad_flags(refuses, argv, says): refuses(*argv, says=says)


def test_a_device_that_is_not_there(fails, source):
    if torch.cuda.is_available(): pytest.skip("it is there")
    fails("--model_path", source, "--device=cuda", says="device 'cuda' cannot be used")


def test_past_the_context(fails, source):
    flags = "--model_path", source, "--only_cpu"
    says = "128 new ones do not fit", "the context holds 128"
    fails(*flags, "--max_tokens_to_generate=128", says=says)
    long = "--prompt=" + "red " * 130
    fails(*flags, "--prompt=red", long, "--max_tokens_to_generate=1", says="do not fit")


# --- pictures

def png_that_claims(width, height):
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize("content, says", [
    (b"", "not a picture"),
    (b"a letter, and no picture", "not a picture"),
    (SAMPLE.read_bytes()[:5000], "damaged or cut short"),
    (png_that_claims(50_000, 50_000), "too large"),
], ids=["empty", "text", "truncated", "enormous"])
def test_bad_pictures(fails, source, tmp_path, content, says):
    (tmp_path/"picture.png").write_bytes(content)
    picture = "--image_file_path", tmp_path/"picture.png"
    fails("--model_path", source, *picture, says=[says, "picture.png"])


def test_no_picture(fails, source, tmp_path):
    picture = "--image_file_path", tmp_path/"none.png"
    fails("--model_path", source, *picture, says="no such picture")
    fails("--model_path", source, "--prompt", "<image> <image> which?", says=["2", "images"])


# --- models

def test_bad_model_folders(fails, tmp_path):
    fails("--model_path", tmp_path/"none", says="no model folder")
    fails("--model_path", tmp_path, says="no config.json")
    fails("--model_path", SAMPLE, says=["folder", "file"])


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_missing_files(fails, folder, name):
    (folder/name).unlink()
    fails("--model_path", folder, says=name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of another kind", None],
                         ids=["empty", "foreign", "truncated"])
def test_bad_weights(fails, folder, content):
    path = folder/"model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    says = "model.safetensors", "not a whole safetensors file"
    fails("--model_path", folder, says=says)


def test_flipped_bit_in_the_header(fails, folder):
    path = folder/"model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"norm.weight")] ^= 1
    path.write_bytes(whole)
    fails("--model_path", folder, says=[str(path), "missing 1"])


def test_bad_shards(fails, source, tmp_path):
    save_model(*load_model(source, device="cpu"), tmp_path/"shards", max_shard_size=50_000)
    first, *_, last = sorted((tmp_path/"shards").glob("*.safetensors"))
    save_file(load_file(last) | {"foreign.weight": torch.ones(3)}, last)
    fails("--model_path", tmp_path/"shards", says=[str(last), "surplus 1 (foreign.weight)"])
    first.unlink()
    fails("--model_path", tmp_path/"shards", says=["missing weights", str(first)])


def test_quantised_weights(fails, folder):
    config = json.loads((folder/"config.json").read_text())
    config["quantization_config"] = dict(quant_method="gptq")
    (folder/"config.json").write_text(json.dumps(config))
    says = str(folder/"config.json"), "expected a quantization_config", "'gptq'"
    fails("--model_path", folder, says=says)


def test_name_that_is_not_in_the_cache(tmp_path):
    cache = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub")}
    done = process("--model_path", "google/paligemma-3b-mix-224", env=cache)
    line, = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert line.startswith("error: no folder google/paligemma-3b-mix-224")
    assert "give a folder or try again when online" in line


def test_tensors_that_do_not_fit(fails, folder):
    path, norm = folder/"model.safetensors", "language_model.model.norm.weight"
    tensors = load_file(path)
    save_file({name: x for name, x in tensors.items() if name != norm}, path)
    fails("--model_path", folder, says=["missing", norm])
    save_file(tensors | {"language_model.extra": torch.zeros(2)}, path)
    fails("--model_path", folder, says=["surplus", "language_model.extra"])
    save_file(tensors | {norm: torch.zeros(41)}, path)
    fails("--model_path", folder, says=[norm, "[41]", "expected [40]"])


@pytest.mark.parametrize("content, says", [
    ("{", "not JSON"), ("[]", "object"), ("{}", "lacks")])
def test_bad_configs(fails, folder, content, says):
    (folder/"config.json").write_text(content)
    fails("--model_path", folder, says=["config.json", says])


def test_config_of_other_sizes(fails, folder):
    config = json.loads((folder/"config.json").read_text())
    config["text_config"]["intermediate_size"] = 57
    (folder/"config.json").write_text(json.dumps(config))
    fails("--model_path", folder, says=["does not fit the config", "mlp"])
