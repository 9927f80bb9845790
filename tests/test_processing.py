"""Pictures and prompts as tensors: equal to transformers', any picture (modes, layouts,
files), any text there and back, clear errors."""
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from paligemma_nb.processing import (
    BYTE_TOKENS, EXTRA_TOKENS, SPECIAL_TOKENS, BatchFeature, PaliGemmaProcessor, TextProcessor,
    image_to_tensor, left_pad, open_image, place_images, to_rgb, train_tokenizer)
from paligemma_nb.scenes import COLORS, SHAPES, make_scene

SCENES = [make_scene(seed) for seed in range(200)]
TEXTS = [s.caption for s in SCENES]
TEXTS += [t for s in SCENES for q, a, _ in s.questions() for t in (f"answer en {q}\n", a)]
NAMES = [*SPECIAL_TOKENS, *EXTRA_TOKENS, "<image>"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ODD = ["<0x41>", "<loc", "red circle", " ", "\n", "\r\n", "▁", "👩‍👩‍👧"]
PIECES = st.lists(TEXT | st.sampled_from([*NAMES, *ODD]), max_size=6)

# warnings: transformers' of numpy's new rules, Pillow's of damaged EXIF, which it skips
pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
              pytest.mark.filterwarnings("ignore:Truncated File Read")]


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor(train_tokenizer(TEXTS), image_size=28, num_image_tokens=4)


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(folder)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal(ours, hf):
    assert list(ours)[:4] == ["pixel_values", "input_ids", "attention_mask", "token_type_ids"]
    for name, tensor in ours.items():
        assert tensor.dtype == hf[name].dtype and torch.equal(tensor, hf[name]), name


# --- the tokenizer

def test_layout(processor):
    tokenizer, n = processor.tokenizer, processor.vocab_size
    names = [tokenizer.id_to_token(i) for i in range(n)]
    assert names[:262] == [*SPECIAL_TOKENS, "\n", *BYTE_TOKENS]
    assert names[-1153:] == [*EXTRA_TOKENS, "<image>"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(n))
    ids = [getattr(processor, f"{name}_token_id") for name in ("pad", "eos", "bos", "image")]
    assert ids == [0, 1, 2, n - 1]


def test_words_of_the_scenes_are_whole(processor):
    words = [w for s in SHAPES for w in (f"▁{s}", s)] + [f"▁{c}" for c in COLORS]
    for word in words:
        assert processor.tokenizer.encode(word.replace("▁", " ")).tokens == [word]
    assert processor.tokenizer.encode("a red circle, a blue star?\n").tokens == [
        "a", "▁red", "▁circle", ",", "▁a", "▁blue", "▁star", "?", "\n"]


@given(TEXT)
@example("  two  spaces ")
@example("\x00\x7f\r\n\t\u2028\ufeff\U0010ffff")
@example("日本 😀 👩‍👩‍👧 e\u0301 ﷽ <0x41> <loc <image")
def test_any_text_comes_back_whole(processor, text):
    back = processor.decode(processor.encode(text))
    assert back == text.replace("▁", " ")  # as in SentencePiece, both are one sign
    assert "<unk>" not in processor.tokenizer.encode(text).tokens


@given(PIECES)
def test_names_of_tokens_are_tokens_and_leave_as_promised(processor, pieces):
    text = "".join(pieces)
    ids = processor.encode(text)
    assert processor.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
    left = re.sub("|".join([*SPECIAL_TOKENS, "<image>"]), "", text)  # <loc> and <seg> stay
    assert processor.decode(ids) == left.replace("▁", " ")


@given(PIECES)
def test_encodes_and_decodes_as_transformers(processor, theirs, pieces):
    text = "".join(pieces)
    ids = processor.encode(text)
    assert ids == theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        assert processor.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 3000), max_size=20))
def test_any_ids_can_be_decoded(processor, theirs, ids):
    "Also broken bytes and ids past the end."
    assert processor.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_training_is_repeatable_and_takes_any_texts():
    assert train_tokenizer(iter(TEXTS)).to_str() == train_tokenizer(TEXTS).to_str()
    for texts in ([], [""], ["\n"], ["日本 日本 😀"], ["<loc0001><image><seg001>"]):
        tokenizer = TextProcessor(train_tokenizer(texts))
        assert tokenizer.decode(tokenizer.encode("a 日本 😀")) == "a 日本 😀"
    assert "▁日本" not in train_tokenizer(["日本 日本 日本"], 1418).get_vocab()
    assert "▁日本" in train_tokenizer(["日本 日本 日本"]).get_vocab()


def test_vocabulary_size_is_a_limit():
    full = train_tokenizer(TEXTS).get_vocab_size()
    assert train_tokenizer(TEXTS, full).get_vocab_size() == full
    assert train_tokenizer(TEXTS, full - 50).get_vocab_size() == full - 50
    with pytest.raises(ValueError, match=r"need a vocab_size of (\d+), got 100") as e:
        train_tokenizer(TEXTS, 100)
    least = int(re.search(r"of (\d+)", str(e.value))[1])
    assert train_tokenizer(TEXTS, least).get_vocab_size() == least
    with pytest.raises(ValueError, match=f"of {least}, got"): train_tokenizer(TEXTS, least - 1)


def test_merges_stay_within_words_and_digits_stay_single():
    texts = ["snow-white, 1234 snow-white; 1234", "12 12 12", "a\nb\nc <loc0001>x<loc0001>x"]
    vocab = train_tokenizer(texts).get_vocab()
    learnt = [t for t, i in vocab.items() if i >= 262 and t not in NAMES]
    assert {"▁snow", "white"} <= {*learnt}
    assert not [t for t in learnt if "▁" in t[1:] or "\n" in t]
    assert not [t for t in learnt if len(t) > 1 and any(c.isdigit() for c in t)]


def test_tokenizer_of_transformers_is_taken_and_completed():
    from transformers import GemmaTokenizer
    vocab = json.loads(train_tokenizer(TEXTS).to_str())["model"]
    bare = GemmaTokenizer(vocab=vocab["vocab"], merges=[tuple(m) for m in vocab["merges"]])
    n = len(bare)
    processor = PaliGemmaProcessor(bare, 28, 4)
    for i, name in (0, "<loc0000>"), (1024, "<seg000>"), (1152, "<image>"):
        assert processor.tokenizer.id_to_token(n + i) == name
    assert processor.vocab_size == n + 1153
    assert PaliGemmaProcessor(bare, 28, 4).vocab_size == n + 1153
    ids = processor(noise(9, 9), "detect red circle", "<loc0007> red circle")["input_ids"]
    assert ids[0, :5].tolist() == [n + 1152] * 4 + [2] and n + 7 in ids[0]


def test_decode_takes_what_models_give(processor):
    ids = processor.encode("<loc0001> red star")
    row = [0, 2, *ids, 1]
    two = torch.tensor([row, row])
    for rows in (two, two.numpy(), two.tolist(), [two[0], row], (row, tuple(row)), two.int()):
        for decode in (processor.decode, processor.batch_decode):
            assert decode(rows, skip_special_tokens=True) == ["<loc0001> red star"] * 2
    for one in (two[0], row, np.array(row), list(two[0]), tuple(np.array(row))):
        assert processor.decode(one) == "<loc0001> red star"
    assert processor.decode([]) == "" and processor.decode(two[:, :0]) == ["", ""]
    with pytest.raises(ValueError, match="negative.*-100"):
        processor.decode(torch.tensor([-100, 5]))


# --- equality with transformers

ANSWERS = ["yes", "<loc0001><loc0002><loc0003><loc1023> red circle ; <seg000>", "",
           "日本 😀 \n and a long answer"]
PROMPTS = ["caption en", "answer en how many circles are there?", "",
           "  detect\nred circle ; star  ", "😀"]
SIDES = [(28, 28), (1, 1), (1, 300), (301, 2), (640, 427), (29, 27), (56, 56)]


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("image_size", [28, 112, 33])
def test_pixels_equal(theirs, size, image_size):
    image = noise(*size)
    size = dict(height=image_size, width=image_size)
    want = theirs.image_processor(image, size=size, return_tensors="pt")["pixel_values"][0]
    got = image_to_tensor(image, image_size)
    assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, want)
    if 1 not in image.size:  # else the shape does not tell where the channels are
        assert torch.equal(image_to_tensor(np.asarray(image), image_size), want)


LAYOUTS = {"channels last": lambda x: x, "channels first": lambda x: x.transpose(2, 0, 1),
           "floats": lambda x: x / 255, "float32, channels first": lambda x: np.float32(
               x.transpose(2, 0, 1) / 255), "float16": lambda x: np.float16(x / 255),
           "strided": lambda x: np.repeat(x, 2, axis=0)[::2]}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_arrays_and_tensors_are_the_picture(processor, mode, how):
    image = MODES["RGBA"].convert(mode)
    array = LAYOUTS[how](np.asarray(image).reshape(*image.size[::-1], -1))
    tensor = torch.tensor(array, requires_grad=array.dtype != np.uint8)
    for same in (array, tensor): assert to_rgb(same).tobytes() == to_rgb(image).tobytes()
    want = processor(image, "a")["pixel_values"]
    for images in (array, tensor, [tensor], [[array]]):
        assert torch.equal(processor(images, "a")["pixel_values"], want)


def test_two_axes_are_a_grey_picture():
    for same in (np.asarray(GREY), torch.tensor(np.asarray(GREY)) / 255):
        assert to_rgb(same).tobytes() == GREY.convert("RGB").tobytes()
    assert to_rgb(torch.ones(3, 1)).size == (1, 3)  # rows, columns
    assert to_rgb(torch.full((2, 2), .5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128,) * 3


def test_paths_are_opened(processor, tmp_path):
    path = tmp_path/"a.png"
    RGB.save(path)
    want = processor([RGB] * 2, ["a", "b"])["pixel_values"]
    assert torch.equal(processor([path, str(path)], ["a", "b"])["pixel_values"], want)
    assert torch.equal(processor(str(path), "a")["pixel_values"], want[:1])


# --- what it returns

def test_inputs_are_a_mapping_with_attributes(processor):
    inputs = processor(noise(9, 9), "caption en")
    assert isinstance(inputs, BatchFeature) and inputs.input_ids is inputs["input_ids"]
    assert {**inputs} == dict(inputs) and copy.copy(inputs) == inputs
    for again in (copy.deepcopy(inputs), pickle.loads(pickle.dumps(inputs))):
        assert type(again) is BatchFeature
        assert torch.equal(again.pixel_values, inputs.pixel_values)
    assert not hasattr(inputs, "labels")
    with pytest.raises(AttributeError, match="one of pixel_values, .*got 'label'"):
        inputs.label


@pytest.mark.parametrize("move", [
    lambda x: x.to("cpu", torch.float16), lambda x: x.to(torch.float16),
    lambda x: x.to(torch.device("cpu")).to(dtype=torch.float16),
    lambda x: x.to(device="cpu", dtype=torch.float16)])
def test_moving_is_transformers(processor, theirs, move):
    image = noise(9, 9)
    ours = processor(image, "caption en", "a star")
    hf = theirs(images=image, text="caption en", suffix="a star", return_tensors="pt")
    assert move(ours) is ours  # in place, as a module is
    assert ours.pixel_values.dtype == torch.float16
    assert_equal(ours, move(hf))


def test_moving_nowhere_changes_nothing(processor):
    inputs = processor(noise(9, 9), "a")
    before = dict(inputs)
    assert all(inputs.to()[name] is x for name, x in before.items())


def test_moving_to_a_device(processor):
    inputs = processor(noise(9, 9), "a", "b").to("meta")
    assert {x.device.type for x in inputs.values()} == {"meta"}


@settings(max_examples=40)
@given(data=st.data())
def test_batches_equal(processor, theirs, data):
    b, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS) | TEXT, min_size=b, max_size=b))
    answers = st.lists(st.sampled_from(ANSWERS) | TEXT, min_size=b, max_size=b)
    suffix, sides = data.draw(st.none() | answers), st.sampled_from(SIDES)
    images = [[noise(*data.draw(sides), seed=i) for i in range(k)] for _ in range(b)]
    if k == 1 and data.draw(st.booleans()): images = [image for image, in images]
    want = theirs(images=images, text=prompts, suffix=suffix, padding=True,
                  return_tensors="pt")
    assert_equal(processor(images, prompts, suffix), want)


@pytest.mark.parametrize("suffix", [None, ["yes", "no <loc0001>"]])
@pytest.mark.parametrize("prompts", [
    ["<image>caption en", "<image> what?"], ["<image><image> which is red?", "<image>"],
    ["old: <image> new: <image>!", "<image>\n<image><image>"]])
def test_placeholders_equal(processor, theirs, prompts, suffix):
    counts = [p.count("<image>") for p in prompts]
    flat = [noise(9 + i, 20, seed=i) for i in range(sum(counts))]
    nested = [flat[:counts[0]], flat[counts[0]:]]
    want = theirs(images=nested, text=prompts, suffix=suffix, padding=True,
                  return_tensors="pt")
    for images in (flat, nested): assert_equal(processor(images, prompts, suffix), want)


def test_one_prompt_may_be_a_str(processor, theirs):
    image = noise(40, 30)
    want = theirs(images=image, text="caption en", suffix="a star", return_tensors="pt")
    for images in (image, [image], [[image]], np.asarray(image)):
        for text in ("caption en", ["caption en"], ("caption en",)):
            for suffix in ("a star", ["a star"]):
                assert_equal(processor(images, text, suffix), want)


def test_rows_of_a_batch_are_the_rows_alone(processor):
    images, prompts = [noise(20, 30, seed=i) for i in range(3)], PROMPTS[:3]
    batch = processor(images, prompts, ANSWERS[:3])
    for i in range(3):
        alone = processor(images[i], prompts[i], ANSWERS[i])
        t = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
            assert torch.equal(batch[name][i, -t:], alone[name][0]), name
        assert batch["input_ids"][i, :-t].eq(0).all()
        assert batch["attention_mask"][i, :-t].eq(0).all()
        assert batch["labels"][i, :-t].eq(-100).all()
        assert torch.equal(batch["pixel_values"][i], alone["pixel_values"][0])


def test_labels_are_the_suffix_and_eos_only(processor):
    inputs = processor([noise(9, 9)] * 2, ["a", "answer en is it?"], ["yes", "a red star"])
    for row, answer in enumerate(("yes", "a red star")):
        labels = inputs["labels"][row]
        assert labels[labels >= 0].tolist() == processor.encode(answer + "<eos>")
        assert torch.equal(labels >= 0, inputs["token_type_ids"][row] == 1)


IDS = st.lists(st.integers(5, 99), min_size=1, max_size=9)
ROWS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4)


@given(ROWS, st.booleans())
def test_left_pad(rows, training):
    prefixes, suffixes = [p for p, _ in rows], [s for _, s in rows] if training else None
    padded = left_pad(prefixes, suffixes, pad_token_id=3)
    assert ("labels" in padded) == training
    for i, (prefix, suffix) in enumerate(rows):
        suffix = suffix if training else []
        real = padded["attention_mask"][i].bool()
        assert padded["input_ids"][i][real].tolist() == prefix + suffix
        assert (padded["input_ids"][i][~real] == 3).all()
        assert real.tolist() == sorted(real.tolist())  # padding on the left only
        types = padded["token_type_ids"][i][real].tolist()
        assert types == [0] * len(prefix) + [1] * len(suffix)


@pytest.mark.parametrize("prefixes, suffixes, message", [
    ([[5], [6], [7]], [[8, 1], [9, 1]], "got 2 suffixes for 3 rows"),
    ([[5]], [[8, 1], [9, 1]], "got 2 suffixes for 1 rows"),
    ([[5], [6]], [], "got 0 suffixes for 2 rows"),
    ([], [], "no rows"), ([], None, "no rows"), ([], [[1]], "got 1 suffixes for 0 rows"),
    ([[5], []], None, "every row needs a prefix: row 1 has none"),
    ([[], [5]], [[1], [1]], "every row needs a prefix: row 0 has none"),
    ([[5], [6], [7]], [[1], [], []], "every row needs a suffix: row 1 has none")])
def test_left_pad_empties_no_row(prefixes, suffixes, message):
    with pytest.raises(ValueError, match=message): left_pad(prefixes, suffixes)


def test_left_pad_adds_no_tensors_up(processor):
    "Two tensors joined by + would be a sum."
    rows, answers = [[5, 6], [7, 8, 9]], [[10, 1], [11, 1]]
    expected = left_pad(rows, answers)
    got = left_pad([*map(torch.tensor, rows)], [*map(torch.tensor, answers)])
    for name, tensor in expected.items(): assert torch.equal(got[name], tensor)


# --- prompts as people type them

TYPED = ["detect red ring", "detect red ring\n", "detect red ring\r\n", " detect red ring ",
         "\n", "\tdetect", "a\n\nb", " ", "detect red ring\u00a0"]


@pytest.mark.parametrize("prompt", TYPED)
def test_a_prompt_is_taken_as_it_stands(processor, theirs, prompt):
    image = noise(30, 20)
    def ids(text): return processor(image, text)["input_ids"]
    want = theirs(images=image, text=prompt, return_tensors="pt")["input_ids"]
    assert torch.equal(ids(prompt), want)
    assert processor.decode(want[0], skip_special_tokens=False).endswith(f"<bos>{prompt}\n")
    assert torch.equal(ids(prompt.strip()), want) == (prompt == prompt.strip())


def test_it_says_so(): assert "strip()" in PaliGemmaProcessor.__doc__


# --- files

def test_saved_folder_opens_everywhere(processor, folder, theirs, tmp_path):
    from transformers import AutoTokenizer, PaliGemmaProcessor as Theirs
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert isinstance(theirs, Theirs) and theirs.image_seq_length == 4
    assert theirs.tokenizer.padding_side == "left"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()
    theirs.save_pretrained(tmp_path/"hf")  # transformers 5 writes processor_config.json
    for source in (folder, str(folder), tmp_path/"hf"):
        again = PaliGemmaProcessor.from_pretrained(source)
        assert (again.image_size, again.num_image_tokens) == (28, 4)
        example = noise(9, 9), "a <image> 日本", "yes"
        assert_equal(again(*example), processor(*example))
    again.save_pretrained(tmp_path/"again"/"deeper")
    third = PaliGemmaProcessor.from_pretrained(tmp_path/"again"/"deeper")
    assert third.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_saving_is_stable(folder, tmp_path):
    PaliGemmaProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    for path in folder.iterdir(): assert (tmp_path/path.name).read_bytes() == path.read_bytes()


def test_padding_and_truncation_in_the_file_are_ignored(processor, folder, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path/"tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path/"tokenizer.json"))
    again, text = PaliGemmaProcessor.from_pretrained(tmp_path), "a red star and a cross"
    assert again.encode(text) == processor.encode(text)


def test_bos_is_not_put_in_front_though_gemmas_file_asks_for_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path/"tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B",
                                                  special_tokens=[("<bos>", 2)])
    assert tokenizer.encode("a star").tokens[0] == "<bos>"
    tokenizer.save(str(tmp_path/"tokenizer.json"))
    again = PaliGemmaProcessor.from_pretrained(tmp_path)
    example = noise(9, 9), "caption en", "a star"
    assert_equal(again(*example), processor(*example))


def image_file(**changes):
    return json.dumps(dict(size=dict(height=28, width=28), image_seq_length=4) | changes)


BROKEN = {
    "tokenizer.json": [
        (None, "no tokenizer.json"),
        *((text, "tokenizer.json cannot be read") for text in ("", "{", "{}", "\0"))],
    "preprocessor_config.json": [
        (None, "no preprocessor_config.json"),
        ("", "is not JSON"), ("[]", "a JSON object, got list"),
        ('{"size": 224}', "broken or incomplete"),
        ('{"size": {"height": 28, "width": 28}}', "image_seq_length"),
        (image_file(size=dict(height=28, width=14)), "a square, got .*'width': 14"),
        (image_file(image_seq_length="x"), "broken or incomplete"),
        (image_file(size=dict(height=0, width=0)), "positive"),
        (image_file(resample=2), "resample must be 3, got 2"),
        (image_file(image_mean=[.48, .45, .4]), "image_mean must be")]}


@pytest.mark.parametrize("name, content, expected",
                         [(name, *case) for name in BROKEN for case in BROKEN[name]])
def test_broken_folders(processor, tmp_path, name, content, expected):
    processor.save_pretrained(tmp_path)
    (tmp_path/name).unlink()
    if content is not None: (tmp_path/name).write_text(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=expected):
        PaliGemmaProcessor.from_pretrained(tmp_path)


def test_foreign_tokenizers_and_missing_folders(tmp_path):
    from tokenizers.models import BPE
    with pytest.raises(ValueError, match="with <pad>"):
        PaliGemmaProcessor(Tokenizer(BPE()), 28, 4)
    names = {tmp_path/"none": "no model folder", "owner/name": "no folder owner"}
    for name, message in names.items():
        with pytest.raises(FileNotFoundError, match=message):
            PaliGemmaProcessor.from_pretrained(name)


def test_a_name_on_the_hub_is_a_folder(processor, folder, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from test_checkpoint import put_in_cache
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    put_in_cache(folder, tmp_path, "someone/reader")
    for settings in ({}, dict(revision="main"), dict(pictures=folder)):
        again = PaliGemmaProcessor.from_pretrained("someone/reader", **settings)
        assert_equal(again(noise(9, 9), "a", "yes"), processor(noise(9, 9), "a", "yes"))
    shutil.copytree(folder, tmp_path/"half")
    (tmp_path/"half"/"preprocessor_config.json").unlink()
    put_in_cache(tmp_path/"half", tmp_path, "someone/half")
    again = PaliGemmaProcessor.from_pretrained("someone/half", pictures=folder)
    assert again.image_size == processor.image_size
    with pytest.raises(FileNotFoundError, match="preprocessor_config|not be fetched"):
        PaliGemmaProcessor.from_pretrained("someone/half")
    with pytest.raises(FileNotFoundError, match="revision v2"):
        PaliGemmaProcessor.from_pretrained("someone/reader", revision="v2")
    with pytest.raises(ValueError, match="revision 'v2' needs a name"):
        PaliGemmaProcessor.from_pretrained(folder, revision="v2")


def test_needs_neither_transformers_nor_the_network(folder):
    code = """
import socket, sys
from paligemma_nb.processing import PaliGemmaProcessor
from PIL import Image
socket.socket = None
PaliGemmaProcessor.from_pretrained(sys.argv[1])(Image.new("RGB", (9, 9)), "caption en")
print(*{"transformers", "huggingface_hub", "torchvision", "matplotlib"} & set(sys.modules))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# --- pictures

GREY = np.add.outer(np.arange(0, 160, 10), np.arange(0, 96, 4)).astype(np.uint8)
GREY = Image.fromarray(GREY)
RGB = Image.merge("RGB", (GREY, ImageOps.mirror(GREY), ImageOps.flip(GREY)))
DEEP = np.asarray(GREY).astype(np.uint16) * 257


def with_info(image, **info):
    image = image.copy()
    image.info.update(info)
    return image


def samples():
    for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"):
        yield mode, RGB.convert(mode)
    la, rgba = GREY.copy(), RGB.copy()
    la.putalpha(ImageOps.flip(GREY))
    rgba.putalpha(ImageOps.mirror(GREY))
    yield from (("LA", la), ("RGBA", rgba), ("PA", la.convert("PA")), ("La", la.convert("La")))
    yield "RGBa", rgba.convert("RGBa")
    yield "L transparent", with_info(GREY, transparency=20)
    yield "P transparent", with_info(RGB.convert("P"), transparency=3)
    yield "P alphas", with_info(RGB.convert("P"), transparency=bytes(range(256)))
    yield "RGB transparent", with_info(RGB, transparency=RGB.getpixel((3, 3)))
    for mode, order in (("I;16", "<"), ("I;16L", "<"), ("I;16B", ">"), ("I;16N", "=")):
        yield mode, Image.frombytes(mode, GREY.size, DEEP.astype(order + "u2").tobytes())
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    yield "LAB", ImageCms.profileToProfile(RGB, srgb, lab, outputMode="LAB")


MODES = dict(samples())
DEEP_MODES = [name for name in MODES if name.startswith("I;16")]


def test_no_mode_is_forgotten():
    assert {image.mode for image in MODES.values()} == set(Image.MODES)


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name):
    image = MODES[name]
    before = image.tobytes()
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == GREY.size and len(rgb.getcolors(10**6)) > 1
    assert image.tobytes() == before  # the caller's picture is left alone
    tensor = image_to_tensor(image, 14)
    assert tensor.shape == (3, 14, 14) and tensor.abs().max() <= 1


@pytest.mark.parametrize("name", sorted(
    {*MODES} - {"La", "RGBa", "LAB", "F", *DEEP_MODES}))
def test_modes_equal_transformers(theirs, name):
    want = theirs.image_processor(MODES[name], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(image_to_tensor(MODES[name], 28), want)


def test_premultiplied_alpha_is_alpha():
    for plain, premultiplied in (("LA", "La"), ("RGBA", "RGBa")):
        one, other = (to_rgb(MODES[name]) for name in (plain, premultiplied))
        assert abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    half = to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 128))).getpixel((0, 0))
    assert half[0] == 255 and abs(half[1] - 127) <= 1


def test_lab_is_the_colour_it_was():
    assert abs(np.asarray(to_rgb(MODES["LAB"])).astype(int) - np.asarray(RGB)).mean() < 6


@pytest.mark.parametrize("name", DEEP_MODES)
def test_16_bits_are_scaled(name):
    assert (np.asarray(to_rgb(MODES[name])) == np.asarray(GREY)[..., None]).all()


@pytest.mark.parametrize("values, expected", [
    ([0, 128, 255], [0, 128, 255]), ([0, 32896, 65535], [0, 128, 255]),
    ([0, 2570, 5140], [0, 10, 20]), ([-50, 0, 200], [0, 0, 200]), ([0, 0, 0], [0, 0, 0]),
    ([0, 2**19, 2**20], [0, 128, 255]), ([7, 7, 7], [7, 7, 7]),
    # around each threshold
    ([0, 128, 256], [0, 128, 255]), ([-3, 128, 300], [0, 128, 255]),
    ([0, 128, 510], [0, 128, 255]),
    ([0, 257, 4096], [0, 1, 16]), ([0, 32896, 65536], [0, 128, 255]),
    ([-191, 0, 255], [0, 0, 255]),
    ([0, 32896, 131070], [0, 128, 255]), ([0, 65535, 131072], [0, 127, 255])])
def test_32_bit_greys(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I" and np.asarray(to_rgb(image))[..., 0].ravel().tolist() == expected


@pytest.mark.parametrize("values, expected", [
    ([0, 0.5, 1], [0, 128, 255]), ([0, 128.4, 255], [0, 128, 255]),
    ([0, 1e6, 2e6], [0, 128, 255]), ([0, .02, .04], [0, 5, 10]),
    ([0, 0, 0], [0, 0, 0]), ([1, 1, 1], [255, 255, 255]),
    ([.5, .5, .5], [128, 128, 128]), ([1.001] * 3, [255] * 3), ([90, 90, 90], [90, 90, 90]),
    # around each threshold
    ([0, .5, .999], [0, 128, 255]), ([0, .5, 1.001], [0, 128, 255]),
    ([-.1, .5, 2], [0, 128, 255]),
    ([-.75, 0, 1], [0, 0, 255]), ([-1e-7, 0, 0], [0, 0, 0]), ([0, 8, 16], [0, 8, 16]),
    ([0, 128, 254.6], [0, 128, 255]), ([0, 128, 255.1], [0, 128, 255]),
    ([-100, 128, 510], [0, 128, 255]), ([0, 257, 4096], [0, 1, 16]),
    ([0, 32896, 65534], [0, 128, 255]), ([0, 32896, 65536], [0, 128, 255])])
def test_float_greys(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F" and np.asarray(to_rgb(image))[..., 0].ravel().tolist() == expected


OPEN = [("F", [0, 1, 2.001]), ("F", [0, 5, 15.9]), ("F", [0, 1, 511]), ("F", [0, 1, 4095]),
        ("I", [0, 1, 511]), ("I", [0, 1, 1023]), ("I", [0, 1, 4095]),
        ("F", [-1, 0, 1]), ("F", [-.76, 0, 1]), ("F", [-2.1, 0, 2.6]), ("F", [-3, -2, -1]),
        ("F", [-.3, -.2, -.1]), ("I", [-192, 0, 255]), ("I", [-5, -5, -5]),
        ("F", [0, 1, np.nan]), ("F", [0, 1, np.inf]), ("F", [0, 1, -np.inf])]


@pytest.mark.parametrize("mode, values", OPEN)
def test_greys_that_do_not_say_what_is_white(processor, tmp_path, mode, values):
    image = Image.fromarray(np.array([values], dtype=dict(F=np.float32, I=np.int32)[mode]))
    finite = np.isfinite(values).all()
    message = "do not tell what is black and what is white" if finite else "NaN or infinity"
    with pytest.raises(ValueError, match=f"^the picture.*{message}"): to_rgb(image)
    with pytest.raises(ValueError, match=message): processor(image, "caption en")
    image.save(tmp_path/"open.tif")
    message = f"^{re.escape(str(tmp_path/'open.tif'))}: the picture.*{message}"
    with pytest.raises(ValueError, match=message): open_image(tmp_path/"open.tif")


@settings(max_examples=60)
@given(st.sampled_from([1, 255, 65535]), st.integers(0, 9999), st.integers(9, 60),
       st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]))
def test_overshoot_is_clipped_as_in_bytes(white, seed, size, how):
    "A float picture of black and white that was enlarged, by either kernel that overshoots."
    levels = np.random.default_rng(seed).choice([0, 255], size=(8, 8)).astype(np.uint8)
    soft = Image.fromarray((levels / 255 * white).astype(np.float32))
    soft, hard = (x.resize((size, size), how) for x in (soft, Image.fromarray(levels)))
    got = np.asarray(to_rgb(soft))[..., 0]
    assert abs(got - (np.asarray(soft) / white).clip(0, 1) * 255).max() <= .501
    # bytes are clipped after each of the two passes
    assert abs(got - np.asarray(hard).astype(float)).mean() < 10


@pytest.mark.parametrize("how, row, least", [
    (Image.Resampling.BICUBIC, [0, 0, 1, 1, 0, 0], 1.25),
    (Image.Resampling.LANCZOS, [1, 0, 1, 1, 0, 1], 1.6)])
def test_the_worst_overshoot_is_clipped(how, row, least):
    row = np.float32([row])
    worst = Image.fromarray(1 - abs(row.T - row)).resize((600, 600), how)
    assert np.asarray(worst).max() > least and to_rgb(worst).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_orientation_is_obeyed(tmp_path, format, orientation):
    plain, turned = tmp_path/"plain", tmp_path/"turned"
    RGB.save(plain, format)
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(turned, format, exif=exif)
    want, turn = open_image(plain), {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    if turn is not None: want = want.transpose(Image.Transpose(turn))  # 6: clockwise to view
    got = open_image(turned)
    assert got.size == want.size and (np.asarray(got) == np.asarray(want)).all()
    assert torch.equal(image_to_tensor(Image.open(turned), 28), image_to_tensor(want, 28))
    assert (np.asarray(to_rgb(got)) == np.asarray(got)).all()  # turned once, not twice


@pytest.mark.parametrize("exif", [
    b"garbage", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"])
def test_damaged_exif_is_no_reason_to_refuse(tmp_path, exif):
    RGB.save(tmp_path/"a.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(tmp_path/"a.jpg").size == RGB.size
        assert to_rgb(with_info(RGB, exif=exif)).size == RGB.size


def save_all(tmp_path):
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm"):
        RGB.save(tmp_path/name)
    MODES["RGBA"].save(tmp_path/"alpha.png")
    MODES["I;16"].save(tmp_path/"deep.png")
    RGB.convert("CMYK").save(tmp_path/"ink.jpg")
    RGB.save(tmp_path/"moving.gif", save_all=True, append_images=[ImageOps.flip(RGB)])
    return sorted(tmp_path.iterdir())


def test_files_of_many_formats(tmp_path):
    for path in save_all(tmp_path):
        for given in (path, str(path)):
            image = open_image(given)
            assert image.mode == "RGB" and image.size == RGB.size
            for same in (given, Image.open(path)):
                assert torch.equal(image_to_tensor(image, 28), image_to_tensor(same, 28))
    assert (np.asarray(open_image(tmp_path/"deep.png")) == np.asarray(GREY)[..., None]).all()
    assert open_image(tmp_path/"a.png").tobytes() == RGB.tobytes()
    picture = open_image(tmp_path/"a.png")
    (tmp_path/"a.png").unlink()
    picture.resize((5, 5))  # the file is not needed any more


def test_truncated_files_are_refused_or_whole(tmp_path):
    big = noise(120, 90)
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.bmp", "a.ppm"):
        big.save(tmp_path/name)
        data = (tmp_path/name).read_bytes()
        for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9):
            (tmp_path/name).write_bytes(data[:int(share * len(data))])
            with pytest.raises(ValueError, match="that Pillow can read|damaged or cut short"):
                open_image(tmp_path/name)


DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]), DAMAGE)
def test_damaged_files_give_a_picture_or_a_clear_error(tmp_path_factory, format, damage):
    path = tmp_path_factory.getbasetemp()/"damaged"
    RGB.save(path, format)
    data = bytearray(path.read_bytes())
    for place, value in damage: data[int(place * (len(data) - 1))] = value
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: assert open_image(path).mode == "RGB"
        except ValueError as e: assert str(path) in str(e)


def test_what_is_no_picture(tmp_path, monkeypatch):
    (tmp_path/"notes.png").write_text("just some words")
    (tmp_path/"empty.png").touch()
    RGB.save(tmp_path/"big.png")
    for name in ("notes.png", "empty.png"):
        with pytest.raises(ValueError, match=f"not a picture that Pillow can read: .*{name}"):
            open_image(tmp_path/name)
    with pytest.raises(FileNotFoundError, match="no such picture: .*none.png"):
        open_image(tmp_path/"none.png")
    for folder in (tmp_path, ""):
        with pytest.raises(ValueError, match="not a picture file"): open_image(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large: .*decompression bomb"):
        open_image(tmp_path/"big.png")


# --- bad calls

PICTURE = noise(9, 9)


BAD_VALUES = [
    ([PICTURE] * 2, ["a"], None, "got 2 for 1 prompts"),
    (PICTURE, ["a", "b"], None, "got 1 for 2 prompts"),
    ([], "a", None, "got 0 for 1 prompts"),
    ([], [], None, "no prompt"),
    ([[PICTURE], []], ["a", "b"], None, "needs an image"),
    (PICTURE, "<image><image>", None, r"\[2\] <image>.* 1"),
    ([PICTURE] * 2, ["<image>", "a"], None, "in every prompt or in none"),
    ([[PICTURE], [PICTURE] * 2], ["<image><image>", "<image>"], None,
     r"\[2, 1\] <image>.*\[1, 2\]"),
    (PICTURE, "a", ["b", "c"], "2 suffixes for 1 prompts"),
    (PICTURE, "a", [], "0 suffixes for 1 prompts"),
    (PICTURE, "a", "<image>", "cannot be in a suffix"),
    (PICTURE, "\ud800", None, "valid Unicode"),
    (PICTURE, "a", "\udcff", "valid Unicode"),
    (np.zeros((9, 9, 3), bool), "a", None, r"or float \(0 … 1\), got bool \[9, 9, 3\]$"),
    (np.zeros((9, 9), np.uint16), "a", None, r"uint8 \(0 … 255\) or .* got uint16 \[9, 9\]$"),
    (torch.zeros(3, 9, 9, dtype=torch.long), "a", None, r"uint8.* got int64 \[3, 9, 9\]$"),
    (np.full((9, 9, 3), 255.), "a", None, r"in 0 … 1: .*float64 \[9, 9, 3\] from 255 to 255$"),
    (torch.full((3, 9, 9), -.1), "a", None, r"0 … 1.*float32 \[3, 9, 9\] from -0.1 to -0.1$"),
    (np.full((9, 9), np.nan), "a", None, r"must lie in 0 … 1.* from nan to nan$"),
    (np.zeros((9, 9, 2), np.uint8), "a", None, r"1, 3 or 4 channels first or last.*9, 2\]$"),
    (np.zeros((3, 9, 4), np.uint8), "a", None, r"where both would fit, give.*3, 9, 4\]$"),
    (torch.zeros(1, 9, 3), "a", None, r"where both would fit, give.*float32 \[1, 9, 3\]$"),
    (np.zeros(9, np.uint8), "a", None, r"must be \[height, width\], or.*uint8 \[9\]$"),
    (np.zeros((2, 9, 9, 3), np.uint8), "a", None, r"pictures, list\(array\).*9, 3\]$"),
    (np.zeros((0, 5, 3), np.uint8), "a", None, r"no pixels: its size is \(5, 0\)"),
    (Image.new("RGB", (0, 5)), "a", None, r"no pixels: its size is \(0, 5\)")]
BAD_TYPES = [
    (PICTURE, None, None, "text must be a str.*None"),
    (PICTURE, ["a", 3], None, "text must be a str"),
    (PICTURE, b"a", None, "text must be a str"),
    (PICTURE, "a", [None], "suffix must be a str"),
    (None, "a", None, "expected image, array, tensor or path, got NoneType"),
    (b"cat.jpg", "a", None, "expected image.* got bytes"),
    ([[["x"]]], "a", None, "expected image.* got list")]
MISSING = [(name("cat.jpg"), "a", None, "no such picture: cat.jpg") for name in (str, Path)]
CASES = {ValueError: BAD_VALUES, TypeError: BAD_TYPES, FileNotFoundError: MISSING}


@pytest.mark.parametrize("error, case", [(e, case) for e in CASES for case in CASES[e]])
def test_bad_calls_say_what_is_wrong(processor, error, case):
    images, text, suffix, expected = case
    with pytest.raises(error, match=expected): processor(images, text, suffix)


def test_place_images_by_hand():
    assert place_images("p", ["x"]) == (["p"], ["<image><bos>x\n"])
    assert place_images([["p", "q"], "r"], ["x", "y"]) == (
        ["p", "q", "r"], ["<image><image><bos>x\n", "<image><bos>y\n"])
    assert place_images(["p", "q"], ["a<image>b<image>c"]) == (
        ["p", "q"], ["a<image>b<image><bos>c\n"])


@pytest.mark.parametrize("image_size, num_image_tokens", [(0, 4), (28, 0), (-1, 4)])
def test_sizes_must_be_positive(image_size, num_image_tokens):
    with pytest.raises(ValueError, match="must be positive"):
        PaliGemmaProcessor(train_tokenizer([]), image_size, num_image_tokens)
