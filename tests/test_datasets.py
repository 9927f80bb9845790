"Data sets: every format read, every fault named by file and line, and what the report finds."
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import paligemma_nb
from paligemma_nb.datasets import (check_texts, coco_mask, collate, from_mask, in_order,
                                   open_dataset, polygon_mask, report)
from paligemma_nb.detection import Detection, format_detections, mask_iou, parse_boxes
from paligemma_nb.processing import PaliGemmaProcessor
from paligemma_nb.scenes import make_scene
from paligemma_nb.segmentation import decode_mask, find_objects, load_mask_vae, mask_to_rle

ROW = dict(image="a.png", prefix="caption en", suffix="a cat")
BOX, LOW = "<loc0100><loc0200><loc0300><loc0400>", "<loc0500><loc0600><loc0700><loc0800>"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))
SIZE = 64, 48


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained(Path(paligemma_nb.__file__).parent/"tiny")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The current folder, with pictures a, b, c in it, of 64 x 48 pixels, each different"
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abc"):
        pixels = np.random.default_rng(i).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    return tmp_path


def write(path, rows):
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    return path


def box(x, y, w, h, **more): return dict(image_id=1, category_id=1, bbox=[x, y, w, h]) | more


def coco(annotations, images="ab", categories=("cat", "dog", "emu")):
    images = [dict(file_name=f"{name}.png", width=64, height=48) for name in images]
    lists = dict(images=images, annotations=annotations,
                 categories=[dict(name=name) for name in categories])
    return {key: [dict(id=i) | x for i, x in enumerate(xs, 1)] for key, xs in lists.items()}


def write_coco(*annotations, path="coco.json", **kwargs):
    Path(path).write_text(json.dumps(coco(annotations, **kwargs)))
    return path


def fails(message): return pytest.raises(ValueError, match=message)


def texts(dataset): return [(prefix, suffix) for _, prefix, suffix in dataset]


# --- formats

def test_json_lines_of_maestro(folder):
    rows = [ROW, ROW | dict(image="b.png", prefix="detect cat", suffix=""), ROW | dict(note=1)]
    dataset = open_dataset(write("x.jsonl", rows))
    assert [(row.picture, row.prefix, row.suffix, row.place) for row in dataset.rows] == [
        (row["image"], row["prefix"], row["suffix"], f"x.jsonl line {i}")
        for i, row in enumerate(rows, 1)]
    picture, prefix, suffix = dataset[1]
    assert (picture.mode, picture.size, prefix, suffix) == ("RGB", SIZE, "detect cat", "")
    assert (np.asarray(picture) == np.asarray(Image.open("b.png"))).all()


def test_pictures_may_lie_elsewhere(folder):
    os.makedirs("data/pictures")
    shutil.move("a.png", "data/pictures/a.png")
    write("data/x.jsonl", [ROW | dict(image="pictures/a.png")])
    write("y.jsonl", [ROW | dict(image="pictures\\a.png")])  # as Windows writes it
    write("z.jsonl", [ROW | dict(image=str(folder/"data"/"pictures"/"a.png"))])
    assert len(open_dataset("data/x.jsonl")) == len(open_dataset(Path("z.jsonl"))) == 1
    assert open_dataset("y.jsonl", images="data").rows[0].picture == "data/pictures/a.png"


def test_json_lines_of_big_vision_get_their_prefix_from_the_caller(folder):
    os.makedirs("lists")
    bare = dict(image="a.png", suffix="a cat")
    write("lists/x.jsonl", [bare, ROW | dict(prefix="caption de")])
    assert texts(open_dataset("lists/x.jsonl", images=".", prompt="caption en")) == [
        ("caption en", "a cat"), ("caption de", "a cat")]


LINE = json.dumps(ROW)


@pytest.mark.parametrize("data", [
    json.dumps([ROW, ROW]), json.dumps([ROW, ROW], indent=2), f"{LINE}\r\n\r\n{LINE}\r\n",
    f"\ufeff{LINE}\n{LINE}", f"{LINE}\n{LINE.replace('cat', 'cat ')}\n"])
def test_harmless_ways_to_write_it(folder, data):
    Path("x.jsonl").write_bytes(data.encode())
    assert texts(open_dataset("x.jsonl")) == [("caption en", "a cat")] * 2


def test_a_line_separator_within_a_text_ends_no_line(folder):
    line = json.dumps(ROW | dict(suffix="a\u2028cat"), ensure_ascii=False)
    Path("x.jsonl").write_text(line, encoding="utf-8")
    assert texts(open_dataset("x.jsonl")) == [("caption en", "a\u2028cat")]


def test_a_folder_for_each_class(folder):
    for name, picture in (("house_cat", "a"), ("dog", "b")):
        os.makedirs(f"animals/{name}")
        shutil.copy(f"{picture}.png", f"animals/{name}/1.PNG")
    Path("animals/.hidden").mkdir(); Path("animals/readme.txt").write_text("no picture")
    dataset = open_dataset("animals")
    assert texts(dataset) == [("answer en what is this?", s) for s in ("dog", "house cat")]
    places = [row.place for row in dataset.rows]
    assert places == ["animals/dog/1.PNG", "animals/house_cat/1.PNG"]
    assert open_dataset("animals", prompt="caption en")[0][1] == "caption en"


@pytest.mark.parametrize("name", ["annotations.jsonl", "_annotations.coco.json"])
def test_a_folder_with_a_known_file_in_it(folder, name):
    if name.endswith("jsonl"): write(name, [ROW])
    else: write_coco(box(1, 2, 3, 4), path=name)
    assert open_dataset(folder).rows == open_dataset(folder/name).rows


class Lazy:
    "As Hugging Face's datasets: rows are decoded when they are asked for"
    def __init__(self): self.asked = []
    def __len__(self): return 2
    def __getitem__(self, i):
        self.asked.append(i)
        return ROW | dict(image=Image.new("L", (10 + i, 5)))


def test_a_sequence_of_dicts_with_pictures(folder):
    images = Image.open("a.png"), "b.png", Path("c.png")
    rows = [ROW | dict(image=image) for image in images]
    assert [picture.size for picture, *_ in open_dataset(rows)] == [SIZE] * 3
    lazy = Lazy()
    dataset = open_dataset(lazy, check=False)
    del lazy.asked[:]
    picture, *_ = dataset[1]
    assert picture.size == (11, 5) and picture.mode == "RGB" and lazy.asked == [1]
    with fails("row 1: .*image is no path: 3"):
        open_dataset([rows[0], ROW | dict(image=3)])


# --- COCO

def test_coco_boxes_in_order_and_absent_names(folder):
    path = write_coco(box(30, 5, 10, 20), box(2, 3, 20, 10),
                      box(10, 10, 5, 5, image_id=2, category_id=2))
    dataset = open_dataset(path)
    found = [parse_boxes(row.suffix, SIZE) for row in dataset.rows]
    assert [(row.picture, row.prefix, len(f)) for row, f in zip(dataset.rows, found)] == [
        ("a.png", "detect cat", 2), ("a.png", "detect dog", 0),
        ("b.png", "detect dog", 1), ("b.png", "detect cat", 0)]
    wanted = [("cat", 2, 3, 22, 13), ("cat", 30, 5, 40, 25)]  # from left to right
    for d, (label, *true) in zip(found[0], wanted, strict=True):
        assert d.label == label and np.allclose(d.box, true, atol=0.04)


@pytest.mark.parametrize("absent, rows", [(0, 2), (1, 4), (2, 4)])
def test_how_many_absent_names(folder, absent, rows):  # emu is nowhere: it is not asked for
    path = write_coco(box(1, 2, 3, 4), box(1, 2, 3, 4, image_id=2, category_id=2))
    assert len(open_dataset(path, absent=absent)) == rows


def test_absent_names_have_equal_shares(folder):
    names = [f"thing {i}" for i in range(7)]
    objects = [box(1, 2, 3, 4, category_id=i % 7 + 1, image_id=i + 1) for i in range(21)]
    dataset = open_dataset(write_coco(*objects, images="abc" * 7, categories=names), absent=2)
    asked = [row.prefix for row in dataset.rows if not row.suffix]
    assert len(asked) == 42 and {asked.count(f"detect {name}") for name in names} <= {5, 6, 7}


def test_coco_outlines_become_segment_rows(folder, random_vae):
    polygon, runs = [10, 10, 40, 10, 40, 30, 10, 30], np.zeros(SIZE[::-1], dtype=bool)
    runs[20:40, 5:25] = True
    dog = box(5, 20, 20, 20, image_id=2, category_id=2, segmentation=mask_to_rle(runs))
    path = write_coco(box(10, 10, 30, 20, segmentation=[polygon]),
                      dog, box(1, 1, 9, 9, image_id=2))  # this cat has no outline
    for vae in (random_vae, load_mask_vae()):
        rows = {(r.picture, r.prefix): r.suffix for r in open_dataset(path, vae=vae).rows}
        assert {key for key in rows if "segment" in key[1]} == {
            ("a.png", "segment cat"), ("a.png", "segment dog"), ("b.png", "segment dog")}
        cat, = parse_boxes(rows["a.png", "segment cat"], SIZE)
        assert cat.codes == from_mask("cat", polygon_mask([polygon], SIZE), vae).codes
        assert rows["a.png", "segment dog"] == "" and "<seg" not in rows["a.png", "detect cat"]
    dog, = find_objects(rows["b.png", "segment dog"], SIZE)
    assert mask_iou([dog.mask], [runs]).item() > 0.9


def test_names_without_any_outline_are_never_absent_from_segment(folder):
    path = write_coco(box(1, 2, 30, 40), box(1, 2, 30, 40, image_id=2, category_id=2))
    rows = open_dataset(path, vae=load_mask_vae()).rows
    assert {row.prefix.split()[0] for row in rows} == {"detect"}


def test_a_crowd_is_not_asked_for_and_is_mentioned(folder):
    path = write_coco(box(1, 2, 3, 4), box(1, 2, 30, 40, iscrowd=1),
                      box(4, 4, 4, 4, category_id=2))
    dataset = open_dataset(path, absent=3)
    assert [row.prefix for row in dataset.rows if row.picture == "a.png"] == ["detect dog"]
    assert dataset.skipped == ["coco.json annotations[1]: a crowd: cat is not asked for"]


BAD_ANNOTATIONS = {
    "corners": (dict(bbox=[40, 20, 60, 40]), r"are these two corners\?"),
    "fractions": (dict(bbox=[.1, .2, .3, .4]), "fractions of the picture"),
    "no area": (dict(bbox=[1, 2, 0, 4]), "is empty or leaves"),
    "negative": (dict(bbox=[9, 9, -4, 4]), "no side below 0"),
    "no box": (dict(bbox=None), "expected a box of four numbers"),
    "words": (dict(bbox=list("abcd")), "could not convert|expected a box"),
    "no name": (dict(category_id=9), "category_id 9 has no name"),
    "an empty name": (dict(category_id=4), "category_id 4 has no name"),
    "no picture": (dict(image_id=7), "image_id 7 is the id of no image"),
    "two points": (dict(segmentation=[[1, 2, 3, 4]]), "three points or more"),
    "an odd number": (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "three points or more"),
    "one flat polygon": (dict(segmentation=[1, 2, 30, 4, 5, 60]), "three points or more"),
    "another size": (dict(segmentation=dict(size=[64, 48], counts=[3072])), "for 64 x 48"),
    "short runs": (dict(segmentation=dict(size=[48, 64], counts=[5, 5])), "runs for 64 x 48"),
    "negative runs": (dict(segmentation=dict(size=[48, 64], counts=[-5, 5])), "negative"),
    "broken runs": (dict(segmentation=dict(size=[48, 64], counts="abc")), "Invalid RLE"),
    "outside its box": (dict(segmentation=[[40, 30, 60, 30, 60, 40]]), "no pixel of the mask")}


@pytest.mark.parametrize("changes, message", BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_bad_annotations(folder, changes, message):
    good = box(30, 5, 10, 20, category_id=2), box(30, 5, 10, 20, image_id=2)
    bad = box(2, 3, 20, 10) | changes
    path = write_coco(good[0], bad, *good, categories=("cat", "dog", "emu", " "))
    with fails(rf"^coco.json annotations\[1\]: .*({message})"):
        open_dataset(path, vae=load_mask_vae())
    rest = open_dataset(path, vae=load_mask_vae(), strict=False)
    assert len(rest.skipped) == 1 and "annotations[1]" in rest.skipped[0]
    # a picture without one of its objects would teach that it is not there
    assert ("a.png" in {row.picture for row in rest.rows}) == ("image_id" in changes)


def test_boxes_a_little_over_the_edge_are_cut_off(folder):
    row = open_dataset(write_coco(box(-1, -1, 66, 50), images="a")).rows[0]
    assert row.suffix == "<loc0000><loc0000><loc1023><loc1023> cat"


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_duplicate_and_missing_ids(folder, key):
    data = coco([box(1, 2, 3, 4), box(2, 3, 4, 5, image_id=2)])
    first, second = data[key][:2]
    for number, message in ((first["id"], rf"{key}\[0\] too"), (None, "no id")):
        Path("x.json").write_text(json.dumps(data | {key: [first, second | dict(id=number)]}))
        for strict in (True, False):  # nobody can tell which one is meant
            with fails(rf"^x.json {key}\[1\]: .*{message}"):
                open_dataset("x.json", strict=strict)
    Path("x.json").write_text(json.dumps(data | {key: None}))
    with fails(f"^x.json: no list of {key}"): open_dataset("x.json")


@pytest.mark.parametrize("changes, message", [
    (dict(width=None), "width and height"), (dict(height="48"), "width and height"),
    (dict(width=-64), "width and height"),
    (dict(file_name="z.png"), "no picture z.png"), (dict(file_name=None), "is no path"),
    (dict(width=48, height=64), "64 x 48 pixels, but its boxes were measured in 48 x 64")])
def test_bad_images_of_coco(folder, changes, message):
    data = coco([box(1, 2, 3, 4), box(2, 3, 4, 5, image_id=2)])
    data["images"][0] |= changes
    Path("x.json").write_text(json.dumps(data))
    with fails(rf"^x.json images\[0\]: .*{message}"): open_dataset("x.json")
    rest = open_dataset("x.json", strict=False)
    assert {row.picture for row in rest.rows} == {"b.png"} and rest.skipped


def test_boxes_measured_before_a_picture_was_turned_upright(folder):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("RGB", SIZE).save("a.png", exif=exif)
    with fails("48 x 64 pixels, but its boxes were measured in 64 x 48"):
        open_dataset(write_coco(box(1, 2, 3, 4), images="a"))


# --- faults of rows

BAD_ROWS = {name: (ROW | changes, message) for name, changes, message in (
    ("another machine", dict(image="/elsewhere/a.png"), r"another machine\? .*: write a.png"),
    ("another system", dict(image="C:\\data\\a.png"), r"another machine\? a.png is there"),
    ("an address", dict(image="https://example.org/a.png"), "download the pictures first"),
    ("missing picture", dict(image="z.png"), "no picture z.png: it is looked for beside"),
    ("no path", dict(image=None), "image is no path: None"),
    ("truncated picture", dict(image="cut.png"), "damaged or cut short"),
    ("no picture", dict(image="x.txt"), "not a picture"),
    ("empty suffix", dict(suffix=" "), "suffix is empty"),
    ("empty prefix", dict(prefix="\n"), "prefix is empty"),
    ("a number", dict(suffix=3), "suffix is no text: 3"),
    ("<image> in the prefix", dict(prefix="<image>caption en"), "prefix holds <image>: take"),
    ("<eos> in the suffix", dict(suffix="a cat<eos>"), "suffix holds <eos>: take it out"))}
BAD_ROWS |= {
    "wrong column": (dict(image="a.png", prefix="caption en", label="a cat"),
                     "no suffix: .*got image, prefix, label"),
    "no prefix": (dict(image="a.png", suffix="a cat"), "no prefix: .*prompt="),
    "no dict": ([1, 2], r"expected a dict, got \[1, 2\]")}
BAD_ANSWERS = {
    "a <loc> too high": ("detect cat", f"{BOX[:27]}<loc1024> cat", "holds <loc1024>"),
    "a <loc> cut short": ("detect cat", "<loc01 cat", "holds <loc01 cat"),
    "width and height": ("detect cat", f"{LOW[:18]}{BOX[:18]} cat", r"height and width\?"),
    "swapped x": ("detect cat", "<loc0100><loc0600><loc0500><loc0200> cat", "is no box"),
    "three <loc>": ("detect cat", f"{BOX[:27]} cat", "expected four <loc> tokens"),
    "words for boxes": ("detect cat", "0.1 0.2 0.3 0.4 cat", "expected four <loc> tokens"),
    "a box without a name": ("detect cat", f"{BOX} cat ; {LOW}", "no name behind it"),
    "no mask": ("segment cat", f"{BOX} cat", "16 <seg> tokens"),
    "half a mask": ("segment cat", f"{BOX}{CODES[:80]} cat", "16 <seg> tokens")}
BAD_ROWS |= {name: (ROW | dict(prefix=prefix, suffix=suffix), message)
             for name, (prefix, suffix, message) in BAD_ANSWERS.items()}


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(folder, row, message):
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:2000])
    Path("x.txt").write_text("no picture")
    path = write("x.jsonl", [ROW, ROW, row, ROW])
    with fails(f"^x.jsonl line 3: .*{message}"): open_dataset(path)
    rest = open_dataset(path, strict=False)
    assert [r.place[-1] for r in rest.rows] == list("124")
    assert len(rest.skipped) == 1 and rest.skipped[0].startswith("x.jsonl line 3: ")


@pytest.mark.parametrize("prefix, suffix", [
    ("detect cat", ""), ("segment cat", ""), ("detect cat", f"{BOX} cat"),
    ("detect cat ; dog", f"{BOX} cat ; {LOW} dog"), ("segment cat", f"{BOX}{CODES} cat"),
    ("answer en where is it?", BOX), (f"describe {BOX}", "a cat"),
    ("caption en", "x < y"), ("detection of what?", "words")])
def test_good_texts(prefix, suffix):
    assert check_texts(f" {prefix}\n", f"{suffix}  ") == (prefix, suffix)


@pytest.mark.parametrize("data, message", [
    (b"", "x.jsonl is empty"), (b"\n \r\n", "x.jsonl is empty"),
    (b"\xef\xbb\xbf", "x.jsonl is empty"),
    (b"[]", "no row is left"),
    (LINE.encode() + b'\n{"image": "a.png",', "line 2: expected one JSON object"),
    (LINE.encode() + b"\na.png,caption en,a cat", "line 2: expected one JSON object"),
    (json.dumps(ROW, indent=1).encode(), "x.jsonl line 1: expected one JSON object a line"),
    (LINE.encode("utf-16"), "line 1: not UTF-8"),
    (b'\n\n{"image": "a.png", "prefix": "", "suffix": "caf\xe9"}', "line 3: not UTF-8"),
    (json.dumps([ROW, ROW | dict(suffix="")]).encode(), "x.jsonl row 2: the suffix is empty")])
def test_bad_files(folder, data, message):
    Path("x.jsonl").write_bytes(data)
    with fails(message): open_dataset("x.jsonl")


def test_bad_sources(folder):
    with pytest.raises(FileNotFoundError, match="no such file or folder: z"): open_dataset("z")
    for source in (dict(train=[ROW]), 3, iter([ROW])):
        with pytest.raises(TypeError, match="a path or a list of dicts"): open_dataset(source)
    with fails("no row is left"): open_dataset([])
    with fails("no row is left: x.jsonl line 1: no suffix"):
        open_dataset(write("x.jsonl", [dict(image="a.png", prefix="caption")]), strict=False)


def test_bad_folders(folder):
    os.makedirs("empty"); os.makedirs("sets/train"); os.makedirs("sets/valid")
    for name in ("empty", "sets"):
        with fails(f"^{name}: expected annotations.jsonl"): open_dataset(name)
    os.makedirs("some/cat"); os.makedirs("some/dog"); shutil.copy("a.png", "some/cat")
    with fails("^some/dog: expected pictures in each class"): open_dataset("some")
    assert len(open_dataset("some", strict=False)) == 1
    shutil.copy("b.png", "some/dog"); shutil.copy("c.png", "some")
    with fails("^some: expected pictures in each class"): open_dataset("some")
    Path("some/c.png").unlink(); Path("some/dog/b.png").write_bytes(b"nothing")
    with fails("^some/dog/b.png: not a picture"): open_dataset("some")


# --- pictures when they are asked for, workers, batches

def test_pictures_are_read_when_they_are_asked_for(folder):
    dataset = open_dataset(write("x.jsonl", [ROW, ROW | dict(image="b.png")]), check=False)
    assert not dataset.hashes and len(pickle.dumps(dataset)) < 1000
    Path("b.png").write_bytes(b"nothing")
    assert dataset[0][0].size == SIZE
    with fails("^x.jsonl line 2: not a picture"): dataset[1]
    Path("b.png").unlink()
    with fails("^x.jsonl line 2: no such picture"): dataset[-1]


def test_each_picture_is_checked_once(folder, monkeypatch):
    import paligemma_nb.datasets as module
    opened, really = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda path: opened.append(path) or really(path))
    open_dataset(write("x.jsonl", [ROW, ROW | dict(image="b.png"), ROW]))
    assert opened == ["a.png", "b.png"]


def test_batches_are_the_same_from_workers(folder, processor):
    rows = [ROW | dict(image=f"{name}.png", suffix=name * n) for name in "abc" for n in (1, 5)]
    held = [row | dict(image=Image.open(row["image"])) for row in rows]
    for source in (write("x.jsonl", rows), held):
        load = partial(DataLoader, open_dataset(source, strict=False), 3,
                       collate_fn=partial(collate, processor))
        workers = load(num_workers=2, multiprocessing_context="spawn")
        for alone, shared in zip(load(), workers, strict=True):
            assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_labels_are_the_answer_and_its_end(folder, processor):
    rows = [(Image.new("RGB", SIZE), "detect star", suffix) for suffix in ("", f"{BOX} star")]
    batch = collate(processor, rows)
    for labels, ids, (_, _, suffix) in zip(batch["labels"], batch["input_ids"], rows):
        kept = labels != -100
        assert labels[kept].tolist() == [*processor.encode(suffix), processor.eos_token_id]
        assert torch.equal(ids[kept], labels[kept])


# --- masks, and the order of objects

COORDINATES = st.floats(-10, 40).map(lambda x: round(x, 3))
POLYGON = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=8)


@given(POLYGON)
def test_polygons_hold_the_pixels_whose_centre_is_inside(corners):
    def inside(x, y):  # an odd number of edges lies to the left
        crossed = [x1 + (y - y1) / (y2 - y1) * (x2 - x1) for (x1, y1), (x2, y2)
                   in zip(corners, corners[1:] + corners[:1]) if (y1 <= y) != (y2 <= y)]
        return sum(place <= x for place in crossed) % 2 == 1
    wanted = [[inside(x + 0.5, y + 0.5) for x in range(30)] for y in range(20)]
    assert (polygon_mask([np.ravel(corners).tolist()], (30, 20)) == wanted).all()


def test_masks_agree_with_pycocotools():
    from pycocotools import mask as rle
    for seed in range(20):
        for o in make_scene(seed, 112).objects:
            packed = rle.encode(np.asfortranarray(o.mask, dtype=np.uint8))
            packed["counts"] = packed["counts"].decode()
            assert (coco_mask(packed, (112, 112)) == o.mask).all()
            assert (coco_mask(mask_to_rle(o.mask), (112, 112)) == o.mask).all()
    polygon = [20.3, 30.2, 90.1, 41.7, 60.6, 99.9, 33.3, 80.8]
    theirs = rle.decode(rle.frPyObjects([polygon], 112, 112))[..., 0].astype(bool)
    assert mask_iou([polygon_mask([polygon], (112, 112))], [theirs]).item() > 0.97


def test_several_polygons_are_one_mask():
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 8, 2, 8, 6, 2, 6]]
    wanted = np.zeros((8, 10), dtype=bool)
    wanted[:4, :4] = wanted[2:6, 2:8] = True
    assert (polygon_mask(parts, (10, 8)) == wanted).all()


def test_the_box_around_a_mask():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:7, 10:25] = True
    assert from_mask("cat", mask).box == (10, 3, 25, 7)


def test_masks_become_text_and_come_back():
    for seed in range(6):
        for o in make_scene(seed, 224).objects:
            d = from_mask(o.name, o.mask)
            text = format_detections([d], (224, 224))
            again, = find_objects(text, (224, 224))
            assert again.codes == d.codes and again.label == o.name
            assert (decode_mask(d.codes, d.box, (224, 224)) == again.mask).mean() > 0.99
            assert mask_iou([again.mask], [o.mask]).item() > 0.8
    with fails("mask of 'cat' is empty"): from_mask("cat", np.zeros((5, 5), dtype=bool))


def test_in_order():
    boxes = [(5, 10, 15, 30), (0, 50, 20, 70), (6, 0, 16, 20), (60, 0, 80, 20)]
    found = [Detection(str(i), box) for i, box in enumerate(boxes)]
    assert in_order(found[::-1]) == found


# --- the report

def rows_of(*pairs): return [dict(image=Image.new("RGB", SIZE, (i, 0, 0)), prefix=p, suffix=s)
                             for i, (p, s) in enumerate(pairs)]


def warnings_of(processor, *pairs, **kwargs):
    return report(open_dataset(rows_of(*pairs)), processor, **kwargs).warnings


def test_report_counts(folder, processor):
    two = dict(image="b.png", prefix="detect red star ; cat", suffix=f"{BOX} red star")
    rows = [ROW, ROW | dict(prefix="detect red star", suffix=""), two, ROW | dict(suffix="")]
    found = report(open_dataset(write("x.jsonl", rows), strict=False), processor)
    assert (found.rows, found.pictures) == (3, 2)
    assert found.tasks == dict(caption=1, detect=2) and found.prefixes["detect red star"] == 1
    assert found.asked == {"detect red star": 2, "detect cat": 1}
    assert found.absent == {"detect red star": 1, "detect cat": 1}
    lengths = [len(processor.encode(row["suffix"])) + 1 for row in rows[:3]]
    assert found.suffix_tokens.tolist() == lengths
    assert list(found.warnings) == ["skipped"]
    first, *_, last = str(found).splitlines()
    assert first == "3 rows, 2 pictures; tasks: detect 2, caption 1"
    assert last.startswith("! 1 left out: x.jsonl line 4")


def test_report_of_things_that_are_never_absent(processor):
    cat, dog = ("detect cat", f"{BOX} cat"), ("segment dog", f"{BOX}{CODES} dog")
    assert "detect cat, segment dog" in warnings_of(processor, cat, dog)["absent"]
    found = warnings_of(processor, cat, dog, ("detect cat ; dog", f"{BOX} dog"))
    assert "segment dog, detect dog" in found["absent"]
    assert "absent" not in warnings_of(processor, cat, ("detect cat", ""))
    assert "absent" not in warnings_of(processor, ("caption en", "a cat"))


SIDE = "<loc0700><loc0100><loc0800><loc0150>"  # left of BOX, and below it
AT = "<loc0500><loc0200><loc0700><loc0400>"    # below BOX


@pytest.mark.parametrize("suffixes, ordered", [
    ([f"{SIDE} cat ; {BOX} cat"], True),  # left to right
    ([f"{BOX} cat ; {SIDE} cat"], True),  # top to bottom
    ([f"{SIDE} cat ; {BOX} cat", f"{BOX} cat ; {SIDE} cat"], False),
    ([f"{SIDE} cat ; {BOX} cat"] * 9 + [f"{LOW} cat ; {BOX} cat"], False),
    ([f"{LOW} cat ; {BOX} dog", f"{BOX} cat ; {LOW} dog"], True),  # name by name
    ([f"{BOX} dog ; {SIDE} cat", f"{SIDE} cat ; {LOW} dog", f"{LOW} cat ; {SIDE} dog"], False),
    ([f"{AT} cat ; <loc0100><loc0199><loc0300><loc0399> cat"], True),
    ([f"{AT} cat ; <loc0100><loc0198><loc0300><loc0398> cat"], False),
    ([f"{BOX} cat", ""], True)])
def test_report_of_the_order(processor, suffixes, ordered):
    found = warnings_of(processor, *(("detect cat ; dog", s) for s in suffixes))
    assert ("order" not in found) == ordered


def test_report_of_scenes_in_their_own_order(processor):
    def answer(s):
        things = [Detection(o.name, o.box) for o in s.objects]
        return format_detections(things, (s.size, s.size))
    scenes = [make_scene(seed) for seed in range(200)]
    pairs = [("detect " + " ; ".join(s.things()), answer(s)) for s in scenes]
    assert "order" not in warnings_of(processor, *pairs)
    rng = np.random.default_rng(0)
    mixed = [(p, " ; ".join(rng.permutation(s.split(" ; ")))) for p, s in pairs]
    assert "use in_order" in warnings_of(processor, *mixed)["order"]


def test_report_of_repeated_objects(processor):
    found = warnings_of(processor, ("detect cat", f"{BOX} cat ; {LOW} cat"),
                        ("detect cat", f"{BOX} cat ; {BOX} cat"))
    assert found["repeated"] == "an object stands twice in one answer: row 1"
    both = "detect cat ; dog", f"{BOX} cat ; {BOX} dog"
    assert "repeated" not in warnings_of(processor, both)


def test_report_of_lengths_and_words(processor):
    pairs = ("caption en", "red " * 9), ("caption en", "red " * 10)  # and <eos>
    assert warnings_of(processor, *pairs, limit=10) == {
        "long": "50.0% of the suffixes are longer than 10 tokens"}
    assert warnings_of(processor, ("caption en", "a red zebra"))["split"].endswith(": zebra 6")
    assert "split" not in warnings_of(processor, ("segment star", f"{BOX}{CODES} star"))


def test_report_of_pictures_in_both_sets(folder, processor):
    Image.open("b.png").save("copy.bmp")  # other bytes, equal pixels
    b = ROW | dict(image="b.png")
    train = open_dataset(write("train.jsonl", [ROW, b, b]))
    places = "train.jsonl line 2 = valid.jsonl line 1"
    for name, places in (("copy.bmp", places), ("c.png", None)):
        valid = open_dataset(write("valid.jsonl", [ROW | dict(image=name)]), check=False)
        found = report(train, processor, valid).warnings.get("shared")
        assert found == (places and f"1 pictures are in both sets: {places}")


def test_pictures_of_other_shapes_differ_though_their_bytes_agree():
    same = [ROW | dict(image=Image.new("RGB", size)) for size in ((4, 6), (6, 4), (4, 6))]
    dataset = open_dataset(same)
    a, b, c = map(dataset.fingerprint, dataset.rows)
    assert a == c != b
