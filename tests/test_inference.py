"The command: what it answers and draws, and one clear line with exit code 2 for everything that is wrong with its input."
import contextlib
import hashlib
import io
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

from paligemma_nb import generation, inference
from paligemma_nb.checkpoint import load_model, save_model
from paligemma_nb.detection import Detection, box_iou, draw_detections, format_detections, parse_boxes
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.attention import answer_probs
from paligemma_nb.generation import generate
from paligemma_nb.inference import (
    FLAGS, SAMPLE, answer_batch, as_json, as_prompt, as_table, as_words, find_pictures, main,
    parse_flags, prepare, print_stream, read_objects, save_drawing)
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, open_image, train_tokenizer
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import encode_mask, load_mask_vae
from paligemma_nb.siglip import SiglipVisionConfig

SCENE = make_scene(HELD_OUT + 2738)  # what SAMPLE shows
CIRCLE = SCENE.things()["red circle"][0]
OPENED = "device: cpu, weights: float32\n"  # what comes before the answers
CUT_OFF = "… cut off: raise --max_tokens_to_generate"


@pytest.fixture(scope="module")
def source(tmp_path_factory): # a model with random weights, small and quick
    torch.manual_seed(0)
    processor = PaliGemmaProcessor(train_tokenizer(["caption en a red circle", "detect square"], 1600), 28, 4)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        SiglipVisionConfig(36, 52, 1, 3, 14, 28), image_token_index=processor.image_token_id, eos_token_id=-1,
        text_config=GemmaConfig(40, 56, 1, 4, 2, processor.vocab_size, head_dim=12, max_position_embeddings=128)))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)  # as it comes from torch it would repeat itself
    folder = tmp_path_factory.mktemp("source")/"model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def folder(source, tmp_path): return Path(shutil.copytree(source, tmp_path/"model"))  # one to break


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
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        for words in [says] if isinstance(says, str) else says: assert words in err, err
    return fails


def process(*flags, env={}, stdout=subprocess.PIPE, **kwargs):
    here = dict(PYTHONPATH=str(Path(inference.__file__).parents[1]), PYTHONUNBUFFERED="")
    env = os.environ | here | env  # its output is buffered, as it is for most users
    command = [sys.executable, "-m", "paligemma_nb.inference", *map(str, flags)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, **kwargs)


# --- answers

def test_shipped_model_describes_the_sample():
    done = process("--only_cpu")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == f"device: cpu, weights: float32\n{SCENE.caption}\n"


def test_sample_is_a_held_out_scene():
    with Image.open(SAMPLE) as image: assert image.mode == "RGB" and image.tobytes() == SCENE.image.tobytes()
    assert len({o.color for o in SCENE.objects}) == len({o.shape for o in SCENE.objects}) == 3


def test_answer_is_generate(command, source, tmp_path):
    picture = tmp_path/"a picture.jpg"
    SCENE.image.convert("L").save(picture)
    code, out, err = command("--model_path", source, "--prompt", "caption en", "--image_file_path", picture,
                             "--max_tokens_to_generate=7", "--only_cpu")
    model, processor = load_model(source, device="cpu")
    ids = generate(model, processor(Image.open(picture), "caption en"), max_new_tokens=7)
    words = f"{processor.decode(ids)[0]}\n{CUT_OFF}\n"  # this model knows no end
    assert (code, err, out) == (0, "", OPENED + words)


def test_sampling(command, source):
    def draw(*more): return command("--model_path", source, "--only_cpu", "--do_sample", "--top_p=1", *more)[1]
    assert draw() != draw()
    assert draw("--temperature", "0") == draw("--temperature=0") == command("--model_path", source, "--only_cpu")[1]


def test_as_a_process(source):
    "One run of the real thing, on a terminal that knows ASCII alone."
    done = process("--model_path", source, "--only_cpu", "--do_sample", "--top_p=1", env={"PYTHONIOENCODING": "ascii"}, cwd=source)
    assert done.returncode == 0 and done.stdout.startswith(OPENED.encode())
    assert all(line.startswith(b"note: ") for line in done.stderr.splitlines())  # of codes
    done = process("--model_path", source.parent)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1 and b"config.json" in done.stderr


def test_nobody_reads(source):
    reader, writer = os.pipe()
    os.close(reader)
    for flags in (["--help"], ["--model_path", source]):
        done = process(*flags, stdout=writer)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("flag", ["--help", "--only_cpu", "--output_format=json"])
def test_a_full_disk_is_one_line(flag):
    with open("/dev/full", "wb") as full: done = process(flag, stdout=full)
    *notices, error = done.stderr.decode().splitlines()
    assert error == "error: cannot write to stdout: No space left on device"
    assert done.returncode == 2 and len(notices) == ("json" in flag)


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
    assert command("--only_cpu") == (130, "device: cpu, weights: float32\na ", "")
    monkeypatch.setattr(inference, "prepare", pressed)
    assert command() == (130, "", "")


def test_a_caption_waits_for_nothing_of_boxes_and_masks():
    script = "import sys, paligemma_nb.inference as i; i.main(['--only_cpu']); print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parents[1])}
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout.split()
    assert "paligemma_nb.generation" in loaded
    assert not {"paligemma_nb.detection", "paligemma_nb.segmentation", "paligemma_nb.scenes", "matplotlib"} & set(loaded)


# --- objects: from an answer's text to a table, JSON, a picture

def pixels(path):
    with Image.open(path) as image: return np.asarray(image.convert("RGB")).astype(int)


def mask_of(rle):
    height, width = rle["size"]
    return np.repeat(np.arange(len(rle["counts"])) % 2 == 1, rle["counts"]).reshape(width, height).T


def iou(a, b): return (a & b).sum() / (a | b).sum()


def rows(table): return [re.split("  +", line.strip()) for line in table.splitlines()]


def test_detect_prints_a_table_and_draws(command, tmp_path):
    code, out, err = command("--only_cpu", "--prompt=detect red circle", "--output_image", tmp_path/"drawn.png")
    device, table, written = re.fullmatch(r"(.*?)\n(.*)\n(.*)\n", out, re.DOTALL).groups()
    head, (label, *box) = rows(table)
    assert (code, err, device, written) == (0, "", "device: cpu, weights: float32", f"written: {tmp_path/'drawn.png'}")
    assert (head, label) == (["label", "x1", "y1", "x2", "y2"], "red circle")
    assert box_iou([[int(x) for x in box]], [CIRCLE.box])[0, 0] > .8
    answer = command("--only_cpu", "--prompt=detect red circle", "--output_format=json")[1]
    objects = parse_boxes(json.loads(answer)["answer"], SCENE.image.size)
    assert np.array_equal(pixels(tmp_path/"drawn.png"), np.asarray(draw_detections(SCENE.image, objects)))
    assert [p.name for p in tmp_path.iterdir()] == ["drawn.png"]


def test_segment_end_to_end(command, tmp_path):
    "The shipped model segments the sample's red circle, and the drawing differs from the picture on the circle."
    flags = "--only_cpu", "--prompt=segment red circle", "--output_image", tmp_path/"drawn.png"
    code, out, err = command(*flags, "--output_format=json")
    [found] = json.loads(out)["objects"]
    assert code == 0 and found["label"] == "red circle"
    assert iou(mask_of(found["mask"]), CIRCLE.mask) > .6
    changed = (pixels(tmp_path/"drawn.png") != SCENE.pixels).any(axis=-1)
    assert changed[CIRCLE.mask].mean() > .6


@pytest.mark.parametrize("size", [(112, 112), (400, 112), (90, 250)])
def test_perfect_segment_answer(size):
    "The plumbing without the model: true boxes and codes in, the same objects out, in JSON and on the picture."
    picture = SCENE.image.resize(size)
    masks = {o.name: np.asarray(Image.fromarray(o.mask).resize(size)) for o in SCENE.objects}
    scale = np.array(size * 2) / 112
    boxes = {o.name: tuple(scale * o.box) for o in SCENE.objects}
    truth = [Detection(name, boxes[name], encode_mask(mask, boxes[name])) for name, mask in masks.items()]
    answer = format_detections(truth, size)
    objects = read_objects(answer, size)
    record = json.loads(as_json("a picture.png", "segment things", answer, objects))
    assert {k: record[k] for k in ("image", "prompt", "answer", "cut_off")} == dict(
        image="a picture.png", prompt="segment things", answer=answer, cut_off=False)
    assert [o["label"] for o in record["objects"]] == [o.name for o in SCENE.objects]
    for found, d in zip(record["objects"], truth):
        assert found.keys() == {"label", "box", "score", "mask"} and found["score"] is None
        assert np.allclose(found["box"], d.box, atol=max(size) / 1023)
        assert found["mask"]["size"] == [size[1], size[0]] and iou(mask_of(found["mask"]), masks[d.label]) > .8
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
    objects = [Detection("a red circle", (3.6, 7.4, 41.2, 100.0)), Detection("", (0, 0, 1000, 5))]
    assert as_table(objects).splitlines() == [
        "label         x1  y1    x2   y2",
        "a red circle   4   7    41  100",
        "               0   0  1000    5"]
    assert as_table([Detection("star", (1, 2, 3, 4), score=.875)]) == "label  x1  y1  x2  y2  score\nstar    1   2   3   4   0.88"


@pytest.mark.parametrize("prompt, answer, says", [
    ("detect cat", "", "nothing found"),
    ("  <image>\nsegment cat", " ", "nothing found"),
    ("detect cat", "no cat", "nothing found: the answer is 'no cat'"),
    ("detect cat", "<loc0001><loc0002>", "nothing found: the answer is '<loc0001><loc0002>'"),
    ("caption en", "", ""),
    ("caption en", "<loc0001><loc0002>", "<loc0001><loc0002>"),
    ("detector", "a cat", "a cat"),
    ("where is it?", "<loc0000><loc0000><loc1023><loc1023> cat", "label  x1  y1  x2  y2\ncat     0   0  10  10"),
])
def test_words(prompt, answer, says): assert as_words(prompt, answer, read_objects(answer, (10, 10))) == says


@given(st.lists(st.sampled_from(["a", " ", "<", "<loc0001>", "loc0001>", "字", ""])))
def test_stream_shows_all_before_the_first_loc(pieces):
    with contextlib.redirect_stdout(io.StringIO()) as screen: print_stream(iter(pieces))
    words = "".join(pieces).partition("<loc")[0]  # a "<" at the end may begin one
    assert screen.getvalue() in (words, words.removesuffix("<"))


@pytest.mark.parametrize("answer, shows", [
    ("here <loc0000><loc0000><loc1023><loc1023> it", "here \nlabel  x1  y1   x2   y2\nit      0   0  112  112\n"),
    ("<loc0000><loc0000><loc1023><loc1023> it", "label  x1  y1   x2   y2\nit      0   0  112  112\n"),
    ("l<loc0000><loc0000><loc1023><loc1023>", "l\nlabel  x1  y1   x2   y2\n        0   0  112  112\n"),
    ("here <loc0000> it", "here <loc0000> it\n"),
    ("2 <", "2 <\n"),
    ("2 < 3", "2 < 3\n"),
    ("a <lo", "a <lo\n"),
    ("a <loc", "a <loc\n"),
    ("", "\n"),
])
def test_objects_in_a_streamed_answer(command, monkeypatch, answer, shows):
    answers(monkeypatch, answer)
    assert command("--only_cpu") == (0, "device: cpu, weights: float32\n" + shows, "")


def test_nothing_found(command):
    assert command("--only_cpu", "--prompt=detect pink ring") == (0, "device: cpu, weights: float32\nnothing found\n", "")
    code, out, err = command("--only_cpu", "--prompt=detect pink ring", "--output_format=json")
    assert (code, err) == (0, "device: cpu, weights: float32\n") and json.loads(out) == dict(
        image=str(SAMPLE), prompt="detect pink ring", answer="", cut_off=False, objects=[])


def test_json_of_a_caption(command):
    code, out, err = command("--only_cpu", "--output_format", "json", "--prompt=caption en")
    assert (code, err, out.count("\n")) == (0, "device: cpu, weights: float32\n", 1)
    assert json.loads(out) == dict(
        image=str(SAMPLE), prompt="caption en",
        answer=SCENE.caption, cut_off=False, objects=[])


def test_scores_when_sampling(command):
    flags = "--only_cpu", "--prompt=detect red circle", "--do_sample", "--temperature=0"
    [found] = json.loads(command(*flags, "--output_format=json")[1])["objects"]
    model, processor = load_model(device="cpu")
    inputs = processor(SCENE.image, "detect red circle")
    ids = generate(model, inputs)
    assert len(ids[0]) == 7 and ids[0, -1] == processor.eos_token_id  # four places, two words, the end
    score = answer_probs(model, inputs, ids)[0, :6].log().mean().exp().item()
    assert 0 < score < 1 and found["score"] == pytest.approx(score, abs=1e-4)
    head, row = rows(command(*flags)[1].removeprefix("device: cpu, weights: float32\n"))
    assert head[-1] == "score" and row[-1] == f"{score:.2f}"


def test_scores_of_a_batch_are_those_of_each():
    "Answers of unequal lengths: what stands behind an answer's end has no part in its score."
    job = prepare(parse_flags(["--only_cpu", "--prompt=detect red circle", "--do_sample", "--temperature=0"]))
    images = [SCENE.image, make_scene(HELD_OUT + 1).image, SCENE.image.rotate(180)]
    together = answer_batch(job, images)
    assert len({answer for answer, *_ in together}) > 1
    for image, (answer, cut_off, token_probs) in zip(images, together):
        [(same, _, probs)] = answer_batch(job, [image])
        assert not cut_off
        assert same == answer and [d.score for d in read_objects(answer, image.size, token_probs)] == pytest.approx(
            [d.score for d in read_objects(answer, image.size, probs)], rel=1e-4)


@pytest.mark.parametrize("name", ["drawn.png", "drawn.jpg", "drawn.JPEG", "drawn.webp", "drawn.gif", "a drawing.tiff", "drawn.bmp"])
def test_formats(command, tmp_path, name):
    flags = "--only_cpu", "--prompt=detect red circle", "--output_image", tmp_path/name
    assert command(*flags)[0] == 0
    with Image.open(tmp_path/name) as drawn: assert drawn.size == SCENE.image.size
    assert np.abs(pixels(tmp_path/name) - SCENE.pixels).mean() < 15 and len(list(tmp_path.iterdir())) == 1


def test_a_caption_leaves_the_picture_as_it_is(command, tmp_path):
    assert command("--only_cpu", "--output_image", tmp_path/"drawn.png") == (
        0, f"device: cpu, weights: float32\n{SCENE.caption}\nwritten: {tmp_path/'drawn.png'}\n", "")
    assert np.array_equal(pixels(tmp_path/"drawn.png"), SCENE.pixels)


def test_boxes_are_those_of_the_upright_picture(command, tmp_path):
    turned, exif = SCENE.image.resize((300, 112)).rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90 degrees
    turned.save(tmp_path/"on its side.png", exif=exif)
    code, out, _ = command("--only_cpu", "--prompt=detect red circle", "--output_format=json", "--image_file_path",
                           tmp_path/"on its side.png", "--output_image", tmp_path/"drawn.png")
    [found] = json.loads(out)["objects"]
    x1, y1, x2, y2 = CIRCLE.box
    assert code == 0 and box_iou([found["box"]], [(x1 * 300 / 112, y1, x2 * 300 / 112, y2)])[0, 0] > .8
    with Image.open(tmp_path/"drawn.png") as drawn: assert drawn.size == (300, 112)


def test_codes_are_decoded_by_the_models_own_decoder(command, folder):
    "A published checkpoint with vae-oid.npz beside it: its codes mean other masks than those of the shipped decoder."
    assert prepare(parse_flags(["--model_path", str(folder), "--only_cpu"])).vae is None
    tensors = {name: x.numpy() for name, x in load_mask_vae().state_dict().items()}
    [book] = [name for name, x in tensors.items() if x.shape == (128, 512)]
    tensors[book] = tensors[book][::-1].copy()
    np.savez(folder/"vae-oid.npz", **tensors)
    vae = prepare(parse_flags(["--model_path", str(folder), "--only_cpu"])).vae
    codes = encode_mask(CIRCLE.mask, CIRCLE.box)
    answers = [format_detections([Detection("", CIRCLE.box, c)], (112, 112)) for c in (codes, [127 - c for c in codes])]
    [[plain], [turned]] = read_objects(answers[0], (112, 112)), read_objects(answers[1], (112, 112), vae=vae)
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
    assert (code, out, err.count("\n")) == (2, OPENED, 1) and "vae-oid.npz is broken" in err
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
    answers(monkeypatch, "<loc0000><loc0000><loc1023><loc1023> a box without codes")
    assert command(*flags)[2] == ""
    answers(monkeypatch, perfect_answer("red circle"))
    code, out, err = command(*flags)
    assert (code, err) == (0, "note: whose codes are these? (here: --mask_vae FILE)\n")
    assert out.count("red circle") == 3
    save_file(load_mask_vae().state_dict(), tmp_path/"named.safetensors")
    assert command(*flags, "--mask_vae", tmp_path/"named.safetensors")[2] == ""


def test_where_the_model_and_its_parts_come_from(command, monkeypatch, folder):
    asked = {}
    def opens(model_path, **parts):
        asked.update(parts, model_path=model_path)
        return load_model(device="cpu")
    def finds(folder, config):
        asked["decoder_of"] = folder
        return None, None
    monkeypatch.setattr("paligemma_nb.speed.open_model", opens)
    monkeypatch.setattr("paligemma_nb.segmentation.find_mask_vae", finds)
    answers(monkeypatch, perfect_answer("red circle"))
    flags = "--processor_path=some", "--only_cpu", "--quantize=int8", "--dtype=float32"
    assert command("--model_path", folder, *flags)[0] == 0
    assert asked == dict(model_path=str(folder), revision=None, processor_path="some",
                         device="cpu", weights="int8", dtype="float32", decoder_of=folder)
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
    _, *table, cut, _ = out.splitlines()
    assert (code, err, cut) == (0, "", CUT_OFF)
    if whole: assert [row[0] for row in rows("\n".join(table))] == ["label", *TWO[:whole]]
    else: assert table == [answer]
    objects = read_objects(perfect_answer(*TWO[:whole]), SCENE.image.size)
    drawn = np.asarray(draw_detections(SCENE.image, objects))
    assert np.array_equal(pixels(tmp_path/"drawn.png"), drawn)
    code, out, err = command(*flags, "--output_format=json")
    record = json.loads(out)
    assert record["cut_off"] is True and record["answer"] == answer
    assert [d["label"] for d in record["objects"] if d["mask"]] == list(TWO[:whole])
    assert err == OPENED + f"note: {SAMPLE}: the answer is {CUT_OFF[2:]}\n"


def test_scores_of_a_cut_answer(command):
    "The probabilities belong to the whole text, of which the last object is left out."
    greedy = "--only_cpu", "--do_sample", "--temperature=0"
    flags = *greedy, "--prompt=detect red circle ; blue star"
    _, *whole = command(*flags)[1].splitlines()
    _, *cut = command(*flags, "--max_tokens_to_generate=12")[1].splitlines()
    assert len(whole) == 3 and rows("\n".join(whole))[1] == rows("\n".join(cut))[1]
    assert len(cut) == 3 and cut[2] == CUT_OFF


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_cut_caption_says_so(command, pictures):
    "Streamed, and among several. With one token more it comes to its end."
    tokens = len(load_model(device="cpu")[1].encode(SCENE.caption))
    flags = "--only_cpu", "--image_file_path", *[SAMPLE] * pictures
    name = f"{SAMPLE}:\n" * (pictures > 1)
    assert command(*flags, f"--max_tokens_to_generate={tokens}") == (
        0, OPENED + f"{name}{SCENE.caption}\n{CUT_OFF}\n" * pictures, "")
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
    assert [out.strip(), *notices].count(OPENED.strip()) == 1 and len(out) <= len(OPENED) + 1
    assert not (tmp_path/"drawn.png").exists()


def test_a_model_that_breaks_on_the_way(command, monkeypatch):
    "What was streamed ends its line; of several pictures, those that were answered count."
    def breaks(processor, steps):
        yield from ("a ", "blue")
        raise ValueError("logits are not finite")
    said = "error: logits are not finite\n"
    with monkeypatch.context() as m:
        m.setattr(generation, "_pieces", breaks)
        assert command("--only_cpu") == (2, OPENED + "a blue\n", said)
    calls, generate_tokens = [], generation.generate_tokens
    def third(*args, **kwargs):  # the first call is the check of the prompt
        calls.append(args)
        if len(calls) == 3: raise ValueError("logits are not finite")
        return generate_tokens(*args, **kwargs)
    monkeypatch.setattr(generation, "generate_tokens", third)
    pictures = "--image_file_path", SAMPLE, SAMPLE, SAMPLE, "--batch_size=1"
    first = f"{OPENED}{SAMPLE}: {SCENE.caption}\n"
    assert command("--only_cpu", *pictures) == (1, first, said) and len(calls) == 3


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
def test_prompts_as_people_type_them(typed, asked): assert as_prompt(typed) == asked


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
    from paligemma_nb import speed
    open_model = speed.open_model
    def opens(*args, **kwargs):
        warnings.warn("bfloat16 is slow here:\n  float32 would be faster")
        return open_model(*args, **kwargs)
    monkeypatch.setattr(speed, "open_model", opens)
    note = "note: bfloat16 is slow here: float32 would be faster\n"
    for _ in range(2): assert command("--only_cpu") == (0, OPENED + SCENE.caption + "\n", note)


def test_sampling_flags_without_sampling(command):
    code, out, err = command("--only_cpu", "--temperature=0.5", "--top_p=0.5")
    assert (code, out) == (0, OPENED + SCENE.caption + "\n")
    assert err == "note: without --do_sample no use is made of --temperature and --top_p\n"
    for flags in (["--temperature=0", "--do_sample"], ["--do_sample=False"]):
        assert command("--only_cpu", *flags)[2] == ""


@pytest.mark.parametrize("name", ["moves.gif", "moves.png", "moves.webp", "pages.tiff"])
def test_of_several_frames_the_first_is_answered(command, tmp_path, name):
    others = [make_scene(HELD_OUT + i).image for i in (1, 2)]
    SCENE.image.save(tmp_path/name, save_all=True, append_images=others)
    flags = "--only_cpu", "--prompt=detect red circle", "--image_file_path", tmp_path/name
    code, out, err = command(*flags)
    assert code == 0 and "red circle" in out
    assert err == f"note: {tmp_path/name} holds several frames: the first is answered\n"
    SCENE.image.save(tmp_path/name)
    assert command(*flags)[2] == ""


def test_the_previews_of_a_camera_are_no_frames(command, tmp_path):
    preview = SCENE.image.resize((28, 28))
    SCENE.image.save(tmp_path/"a.mpo", save_all=True, append_images=[preview])
    assert command("--only_cpu", "--image_file_path", tmp_path/"a.mpo")[2] == ""


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
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{OPENED}{SCENE.caption}\n")


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
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("\nwritten: answer.png\n")
        with Image.open(tmp_path/"answer.png") as drawn: assert drawn.size == SCENE.image.size
        (tmp_path/"answer.png").unlink()


def test_the_script_knows_every_flag():
    text = (Path(inference.__file__).parents[1]/"launch_inference.sh").read_text()
    set_above = re.findall(r'^([A-Z_]+)="\$\{\1:-\}"', text, re.M)
    passed_on = re.search(r"for name in ([A-Z_ \\\n]+);", text)[1].replace("\\", "").split()
    assert sorted(set_above) == sorted(passed_on) == sorted(name.upper() for name in FLAGS)


def test_a_flag_and_its_variable_are_given_twice(launch):
    done = launch("--prompt=detect red circle", PROMPT="caption en")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --prompt is given twice\n"


# --- where the drawing goes

@pytest.fixture
def refuses(fails, monkeypatch):
    "Refused before the model is opened"
    def opened(*args, **kwargs): raise AssertionError("the model was opened")
    monkeypatch.setattr("paligemma_nb.checkpoint.load_model", opened)
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
    refuses("--output_image", tmp_path/name, says=["--output_image: ", *([says] if isinstance(says, str) else says)])
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path/"locked.png").read_text() == "precious"


def test_unwritable_folder(refuses, tmp_path, monkeypatch): # the superuser, too, is refused on a disk that is read-only
    def denied(dir): raise OSError(30, "Read-only file system")
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    refuses("--output_image", tmp_path/"drawn.png", says=[f"cannot write in the folder {tmp_path}", "Read-only file system"])


def test_pictures_are_not_drawn_over(refuses, tmp_path):
    SCENE.image.save(tmp_path/"a.png")
    (tmp_path/"link.png").symlink_to(tmp_path/"a.png")
    before = (tmp_path/"a.png").read_bytes()
    for name in ("a.png", "link.png"): refuses("--image_file_path", tmp_path/"a.png", "--output_image", tmp_path/name, says="to read")
    refuses("--image_file_path", tmp_path, "--output_image", tmp_path, says="to read")
    (tmp_path/"b").mkdir()
    SCENE.image.save(tmp_path/"b"/"a.jpg")
    refuses("--image_file_path", tmp_path/"a.png", tmp_path/"b", "--output_image", tmp_path/"drawn", says="two of the pictures")
    assert (tmp_path/"a.png").read_bytes() == before and not (tmp_path/"drawn").exists()


def test_several_drawings_want_a_folder(refuses, tmp_path):
    (tmp_path/"notes").touch()
    for name in ("notes", "drawn.png"):
        refuses("--image_file_path", SAMPLE, SAMPLE, "--output_image", tmp_path/name, says="expected a folder")
    refuses("--image_file_path", SAMPLE, SAMPLE, "--output_image", tmp_path/"no"/"drawn", says=["two of", "sample.png"])
    refuses("--image_file_path", SAMPLE, "none.png", "--output_image", tmp_path/"no"/"drawn", says="no folder")


def test_an_old_file_is_replaced_whole_or_not_at_all(command, tmp_path, monkeypatch):
    (tmp_path/"kept.png").write_bytes(b"old")
    (tmp_path/"link.png").symlink_to("kept.png")
    def breaks(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(Image.Image, "save", breaks)
        with pytest.raises(ValueError, match="kept.png cannot be written: .*No space"): save_drawing(tmp_path/"kept.png", SCENE.image, [])
    assert (tmp_path/"kept.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    save_drawing(tmp_path/"link.png", SCENE.image, [])
    assert (tmp_path/"link.png").is_symlink() and np.array_equal(pixels(tmp_path/"kept.png"), SCENE.pixels)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room_for_the_drawing(command, monkeypatch, tmp_path):
    def full(path, image, objects): raise ValueError(f"{path} cannot be written: No space left on device")
    monkeypatch.setattr(inference, "save_drawing", full)
    code, out, err = command("--only_cpu", "--output_image", tmp_path/"drawn.png")
    assert code == 2 and out == f"device: cpu, weights: float32\n{SCENE.caption}\n" and err.startswith("error: ") and err.count("\n") == 1


# --- several pictures

@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    for i, name in enumerate(("d.png", "a.jpg", "c.png", "b.webp", "e[1].png")):
        make_scene(HELD_OUT + i, 112).image.save(folder/name, quality=95)
    (folder/"f.png").write_bytes(SAMPLE.read_bytes()[:5000])
    for name in ("notes.txt", ".hidden.png", "noextension"): (folder/name).write_text("no picture")
    return folder


def test_find_pictures(album):
    def found(*values):
        paths, alone = find_pictures([str(v) for v in values])
        return [os.path.relpath(p, album) for p in paths], alone
    assert found(album) == (["a.jpg", "b.webp", "c.png", "d.png", "e[1].png", "f.png"], False)
    assert found(album/"[cd].png") == (["c.png", "d.png"], False)
    assert found(album/"c*") == (["c.png"], False)                     # a pattern is one even with a single match
    assert found(album/"e[1].png") == (["e[1].png"], True)             # it exists: no pattern
    assert found(album/"d.png", album/"a.jpg") == (["d.png", "a.jpg"], False)
    assert found(album/"d.png", album/"*.web?", album/"none.png") == (["d.png", "b.webp", "none.png"], False)
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
    answers = [processor.decode(generate(model, processor(open_image(album/name), "caption en")))[0] for name in names]
    assert out == "device: cpu, weights: float32\n" + "".join(f"{album/name}: {answer}\n" for name, answer in zip(names, answers))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "f.png" in err


def test_several_tables_records_and_drawings(command, album, tmp_path):
    flags = "--only_cpu", "--prompt=detect red circle", "--image_file_path", album/"d.png", SAMPLE
    code, out, err = command(*flags, "--output_image", tmp_path/"drawn")
    assert (code, err) == (0, "") and f"{SAMPLE}:\nlabel " in out and out.endswith(f"\nwritten: {tmp_path/'drawn'}\n")
    assert sorted(p.name for p in (tmp_path/"drawn").iterdir()) == ["d.png", "sample.png"]
    code, out, err = command(*flags, "--output_format=json", "--output_image", tmp_path/"drawn")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "device: cpu, weights: float32\n") and [r["image"] for r in records] == [str(album/"d.png"), str(SAMPLE)]
    assert np.array_equal(pixels(tmp_path/"drawn"/"sample.png"),
                          np.asarray(draw_detections(SCENE.image, parse_boxes(records[1]["answer"], (112, 112)))))


def test_exit_codes_of_several(command, tmp_path):
    (tmp_path/"bad.png").write_bytes(b"")
    code, out, err = command("--only_cpu", "--image_file_path", tmp_path/"bad.png", tmp_path/"none.png", "--output_image", tmp_path/"drawn")
    assert (code, out) == (2, "device: cpu, weights: float32\n") and [line[:7] for line in err.splitlines()] == ["error: "] * 2
    assert not (tmp_path/"drawn").exists()
    code, out, err = command("--only_cpu", "--image_file_path", tmp_path/"none.png", SAMPLE)
    assert (code, out) == (1, f"device: cpu, weights: float32\n{SAMPLE}: {SCENE.caption}\n") and "no such picture" in err


def test_progress_is_for_terminals(command, monkeypatch):
    flags = "--only_cpu", "--image_file_path", SAMPLE, SAMPLE
    assert command(*flags)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code = main([str(flag) for flag in flags])
    assert code == 0 and "2/2" in sys.stderr.getvalue()


# --- flags

def test_help_names_every_flag_and_waits_for_nothing():
    script = "import sys, paligemma_nb.inference as i; i.main(['--prompt', 'x', '--help']); assert 'torch' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parents[1])}
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert all(f"--{name} " in text for name in FLAGS) and max(map(len, text.splitlines())) <= 120


def test_defaults():
    assert parse_flags([]) == dict(
        model_path=None, revision=None, processor_path=None, prompt="caption en",
        image_file_path=[str(SAMPLE)], max_tokens_to_generate=100, temperature=.8, top_p=.9,
        do_sample=False, only_cpu=False, device=None, dtype=None, quantize=None, mask_vae=None,
        output_image=None, output_format="text", batch_size=8)


@pytest.mark.parametrize("argv, name, value", [
    (["--prompt", "7"], "prompt", "7"),
    (["--prompt", "[1, 2]"], "prompt", "[1, 2]"),
    (["--prompt=--x y"], "prompt", "--x y"),
    (["--prompt", "détecte 字 ✨"], "prompt", "détecte 字 ✨"),
    (["--prompt", "a=b"], "prompt", "a=b"),
    (["--prompt", "--"], "prompt", "--"),
    (["--prompt", "-5 apples"], "prompt", "-5 apples"),
    (["-prompt", "x"], "prompt", "x"),
    (["--max-tokens-to-generate", "5"], "max_tokens_to_generate", 5),
    (["--top_p", "1"], "top_p", 1.0),
    (["--temperature", "1e-2"], "temperature", .01),
    (["--do_sample"], "do_sample", True),
    (["--do_sample", "--only_cpu"], "do_sample", True),
    (["--do_sample", "False"], "do_sample", False),
    (["--do_sample=true"], "do_sample", True),
    (["--do_sample", "0"], "do_sample", False),
    (["--revision", "bfloat16"], "revision", "bfloat16"),
    (["--processor-path=google/some"], "processor_path", "google/some"),
    (["--mask_vae", "vae-oid.npz"], "mask_vae", "vae-oid.npz"),
    (["--only_cpu", "--device", "cpu"], "device", "cpu"),
    (["--output_format=json"], "output_format", "json"),
    (["--batch-size", "2"], "batch_size", 2),
    (["--output_image", "a b.png"], "output_image", "a b.png"),
    (["--image_file_path", "a.png"], "image_file_path", ["a.png"]),
    (["--image_file_path=a b.png"], "image_file_path", ["a b.png"]),
    (["--image_file_path", "7", "[7]", "a=b.png"], "image_file_path", ["7", "[7]", "a=b.png"]),
    (["--image-file-path", "a.png", "b.png", "--prompt", "x"], "image_file_path", ["a.png", "b.png"]),
    (["--do_sample", "--image_file_path", "a.png", "b.png", "c.png"], "image_file_path", ["a.png", "b.png", "c.png"]),
])
def test_flags(argv, name, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of --top_p without --do_sample
        values = parse_flags(argv)
    assert values[name] == value and values.keys() == FLAGS.keys()
    untouched = [n for n in FLAGS if n not in " ".join(argv).replace("-", "_")]
    assert untouched and all(values[n] == FLAGS[n][1] for n in untouched)


@pytest.mark.parametrize("argv, says", [
    (["--frobnicate"], ["unknown flag --frobnicate", "--max_tokens_to_generate"]),
    (["--Prompt", "x"], ["unknown flag --Prompt", "--prompt"]),
    (["--prompts=x"], ["unknown flag --prompts"]),
    (["--no_sample"], ["unknown flag"]),
    (["--nodo_sample"], ["unknown flag --nodo_sample"]),
    (["--no-only-cpu=True"], ["unknown flag --no-only-cpu"]),
    (["--p=x"], ["unknown flag --p:"]),
    (["--image_file", "a.png"], ["unknown flag --image_file:"]),
    (["--prompt=a", "--prompt=b"], ["--prompt is given twice"]),
    (["--prompt", "a", "--prompt=a"], ["--prompt is given twice"]),
    (["--top-p", "1", "--top_p", "1", "--do_sample"], ["--top_p is given twice"]),
    (["-top_p=1", "--top_p=1"], ["--top_p is given twice"]),
    (["--do_sample", "--do_sample=False"], ["--do_sample is given twice"]),
    (["--image_file_path", "a.png", "--image_file_path", "b.png"],
     ["--image_file_path is given twice: list all pictures behind one"]),
    (["--image_file_path=a.png", "--image-file-path", "b.png"],
     ["--image_file_path is given twice: list all pictures behind one"]),
    (["-x"], ["unknown flag", "x"]),
    (["-p", "detect"], ["unknown flag", "--prompt"]),
    (["detect red circle"], ["unexpected argument 'detect red circle'"]),
    (["--prompt", "detect", "red circle"], ["unexpected argument 'red circle'"]),
    (["--", "--interactive"], ["unexpected argument '--'"]),
    (["--prompt", "x", "-", "y"], ["unexpected argument '-'"]),
    (["--do_sample", "True", "False"], ["unexpected argument 'False'"]),
    (["--do_sample", "a.png"], ["--do_sample: expected True or False, got 'a.png'"]),
    (["--prompt", "-x"], ["unknown flag -x"]),
    (["–prompt", "x"], ["unexpected argument '–prompt'"]),  # a dash that a word processor made
    (["--prompt"], ["--prompt needs a value"]),
    (["--model_path", "--do_sample"], ["--model_path needs a value"]),
    (["--prompt", ""], ["--prompt: expected some text in UTF-8, got ''"]),
    (["--prompt= \n"], ["--prompt: expected some text"]),
    (["--prompt", "<image>"], ["--prompt: expected some text"]),
    (["--prompt", "<image><bos>\n"], ["--prompt: expected some text"]),
    (["--prompt", "\udcff"], ["--prompt: expected some text in UTF-8, got '\\udcff'"]),
    (["--revision="], ["--revision: expected some text"]),
    (["--image_file_path="], ["--image_file_path: expected some text"]),
    (["--image_file_path", "a.png", ""], ["--image_file_path: expected some text"]),
    (["--image_file_path"], ["--image_file_path needs a value"]),
    (["--image_file_path=a.png", "b.png"], ["unexpected argument 'b.png'"]),
    (["--image_file_path", "--prompt", "x", "a.png"], ["unexpected argument 'a.png'"]),
    (["--image_file_path", "a.png", "--prompt", "x", "b.png"], ["unexpected argument 'b.png'"]),
    (["--output_format=xml"], ["--output_format: expected text or json, got 'xml'"]),
    (["--quantize=int2"], ["--quantize: expected int8 or int4, got 'int2'"]),
    (["--dtype=int8"], ["--dtype: expected float32 or bfloat16 or float16, got 'int8'"]),
    (["--output_image="], ["--output_image: expected some text"]),
    (["--output_image"], ["--output_image needs a value"]),
    (["--batch_size=0"], ["--batch_size: expected a whole number of at least 1, got '0'"]),
    (["--top_p=0"], ["--top_p: expected more than 0 and at most 1, got '0'"]),
    (["--top_p=-0.5"], ["--top_p", "'-0.5'"]),
    (["--top_p", "-0.5"], ["--top_p", "'-0.5'"]),
    (["--top_p=1.5"], ["--top_p", "'1.5'"]),
    (["--top_p=nan"], ["--top_p", "'nan'"]),
    (["--top_p=much"], ["--top_p: expected more than 0 and at most 1, got 'much'"]),
    (["--temperature=-1"], ["--temperature: expected 0 or more, got '-1'"]),
    (["--temperature=inf"], ["--temperature", "'inf'"]),
    (["--temperature=hot"], ["--temperature: expected 0 or more, got 'hot'"]),
    (["--temperature=nan"], ["--temperature: expected 0 or more, got 'nan'"]),
    (["--max_tokens_to_generate=0"], ["--max_tokens_to_generate: expected a whole number of at least 1, got '0'"]),
    (["--max_tokens_to_generate=-3"], ["'-3'"]),
    (["--max_tokens_to_generate=2.5"], ["'2.5'"]),
    (["--max_tokens_to_generate=many"], ["'many'"]),
    (["--do_sample=maybe"], ["--do_sample: expected True or False, got 'maybe'"]),
    (["--only_cpu", "perhaps"], ["--only_cpu", "'perhaps'"]),
    (["--only_cpu", "--device=cuda"], ["--only_cpu and --device cuda exclude each other"]),
])
def test_bad_flags(fails, argv, says): fails(*argv, says=says)


def test_bad_devices(fails, source):
    for name in ("abacus", "cuda:", "CPU", "cpu:1"): fails(f"--device={name}", says=["--device: expected cpu, cuda", repr(name)])
    if not torch.cuda.is_available(): fails("--model_path", source, "--device=cuda", says="device 'cuda' cannot be used")


def test_past_the_context(fails, source):
    fails("--model_path", source, "--only_cpu", "--max_tokens_to_generate=128", says=["128 new ones do not fit", "the context holds 128"])
    fails("--model_path", source, "--only_cpu", "--prompt=" + "red " * 130, "--max_tokens_to_generate=1", says="do not fit")


# --- pictures

def png_that_claims(width, height):
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, says", [
    (b"", "not a picture"),
    (b"a letter, and no picture", "not a picture"),
    (SAMPLE.read_bytes()[:5000], "damaged or cut short"),
    (png_that_claims(50_000, 50_000), "too large"),
], ids=["empty", "text", "truncated", "enormous"])
def test_bad_pictures(fails, source, tmp_path, content, says):
    (tmp_path/"picture.png").write_bytes(content)
    fails("--model_path", source, "--image_file_path", tmp_path/"picture.png", says=[says, "picture.png"])


def test_no_picture(fails, source, tmp_path):
    fails("--model_path", source, "--image_file_path", tmp_path/"none.png", says="no such picture")
    fails("--model_path", source, "--prompt", "<image> <image> which?", says=["2", "images"])


# --- models

def test_bad_model_folders(fails, tmp_path):
    fails("--model_path", tmp_path/"none", says="no model folder")
    fails("--model_path", tmp_path, says="no config.json")
    fails("--model_path", SAMPLE, says=["folder", "file"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_missing_files(fails, folder, name):
    (folder/name).unlink()
    fails("--model_path", folder, says=name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of another kind", None], ids=["empty", "foreign", "truncated"])
def test_bad_weights(fails, folder, content):
    path = folder/"model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    fails("--model_path", folder, says=["model.safetensors", "not a whole safetensors file"])


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
    (folder/"config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="gptq"))))
    fails("--model_path", folder, says=[str(folder/"config.json"), "expected a quantization_config", "'gptq'"])


def test_name_that_is_not_in_the_cache(tmp_path):
    cache = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub")}
    done = process("--model_path", "google/paligemma-3b-mix-224", env=cache)
    line, = done.stderr.decode().splitlines()
    assert done.returncode == 2 and done.stdout == b"" and line.startswith("error: no folder google/paligemma-3b-mix-224")
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


@pytest.mark.parametrize("content, says", [("{", "not JSON"), ("[]", "object"), ("{}", "lacks")])
def test_bad_configs(fails, folder, content, says):
    (folder/"config.json").write_text(content)
    fails("--model_path", folder, says=["config.json", says])


def test_config_of_other_sizes(fails, folder):
    config = json.loads((folder/"config.json").read_text())
    config["text_config"]["intermediate_size"] = 57
    (folder/"config.json").write_text(json.dumps(config))
    fails("--model_path", folder, says=["does not fit the config", "mlp"])
