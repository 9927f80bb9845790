"Boxes as text: what is written comes back, any text can be read, any picture can be drawn on."
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from paligemma_nb.detection import (
    Detection, average_precision, bin_to_coordinate, box_iou, check_box, coordinate_to_bin,
    draw_detections, format_box, format_detections, from_coco_box, from_yolo_box, mask_iou,
    parse_boxes)

SIDES = st.integers(1, 10_000)
SIZES = st.tuples(SIDES, SIDES)
UNIT = st.floats(0, 1)
LABELS = st.text(st.characters(exclude_characters=";<", exclude_categories=["C", "Z"]),
                 max_size=12)
CODES = st.none() | st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)
FRAGMENTS = [
    "<loc0000>", "<loc0512>", "<loc1023>", "<loc1024>", "<loc9999>", "<loc12>", "<loc",
    "loc0001>", "<loc0100><loc0200>", "<loc0001><loc0002><loc0003><loc0004>", "<loc٠١٢٣>",
    "<seg000>", "<seg127>", "<seg128>",
    "<seg", "<seg007>" * 16,
    " ; ", ";", " ", "\n", "\t", "cat", "red circle", "<eos>", "<", ">", "é", "\x00", "\ud800"]


L, S = "<loc0100>", "<seg007>"


@st.composite
def boxes(draw, size):
    (x1, x2), (y1, y2) = (sorted(draw(UNIT) * length for _ in range(2)) for length in size)
    assume(max(x2, y2) > 1 or max(x2, y2) == 0)  # a part of a pixel in the corner is refused
    return x1, y1, x2, y2


@st.composite
def answers(draw):
    size = draw(SIZES)
    detections = draw(st.lists(st.builds(Detection, LABELS, boxes(size), CODES), max_size=5))
    return detections, size


@given(answers())
def test_round_trip_within_half_a_bin(case):
    detections, size = case
    text = format_detections(detections, size)
    back = parse_boxes(text, size)
    assert [(d.label, d.codes) for d in back] == [(d.label, d.codes) for d in detections]
    for one, other in zip(detections, back):
        off = np.abs(np.subtract(one.box, other.box)) / (size * 2)
        assert off.max() <= 0.5 / 1023 + 1e-9
    assert format_detections(back, size) == text
    assert parse_boxes(format_detections(back, size), size) == back


@given(SIDES)
@example(1)
@example(112)
@example(1023)
@example(4000)
@settings(max_examples=20)
def test_every_bin_is_its_own_nearest(length):
    assert [coordinate_to_bin(bin_to_coordinate(i, length), length)
            for i in range(1024)] == list(range(1024))


def test_the_order_and_the_rounding():
    box = format_box((250, 125, 875, 750), (1023, 1023))
    assert box == "<loc0125><loc0250><loc0750><loc0875>"
    assert format_box((0, 0, 640, 427), (640, 427)) == "<loc0000><loc0000><loc1023><loc1023>"
    found, = parse_boxes("<loc0000><loc1023><loc1023><loc1023>", (640, 427))
    assert found.box == (640, 0, 640, 427)
    # 0.49 and 0.51 of a gap; a floor or a 1024 in either direction would give other numbers
    assert [coordinate_to_bin(x / 1023 * 112, 112)
            for x in (0.49, 0.51, 1022.49, 1022.51)] == [0, 1, 1022, 1023]


@given(SIZES, st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4))
def test_boxes_are_clipped_to_the_picture(size, corners):
    x1, y1, x2, y2 = (*np.minimum(corners[:2], corners[2:]),
                      *np.maximum(corners[:2], corners[2:]))
    # one that lies outside is refused
    assume(x1 <= size[0] and y1 <= size[1] and x2 >= 0 and y2 >= 0)
    assume(max(x2, y2) > 1 or min(x1, y1) < 0)
    found, = parse_boxes(format_box((x1, y1, x2, y2), size), size)
    inside = np.clip((x1, y1, x2, y2), 0, size * 2)
    assert np.abs(found.box - inside).max() <= max(size) / 1023 / 2 + 1e-6


def check_any(text, size):
    found = parse_boxes(text, size)
    assert len(found) <= len(re.findall(r"<loc[0-9]{4}>", text)) / 4
    for d in found:
        x1, y1, x2, y2 = d.box
        assert 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]
        assert d.codes is None or len(d.codes) == 16 and all(0 <= c < 128 for c in d.codes)
        assert d.label == " ".join(d.label.split()) and not re.search(";|<loc|<seg", d.label)
    assert parse_boxes(format_detections(found, size), size) == found


@given(st.text(), SIZES)
def test_any_text_is_read(text, size): check_any(text, size)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), SIZES)
@settings(max_examples=300)
def test_any_fragments_are_read(text, size): check_any(text, size)


def test_ten_thousand_strings_are_read():
    rng, counts = random.Random(0), [0] * 11
    whole = [f"<loc{i:04d}>" for i in (0, 1, 511, 1023)] * 8  # so many that boxes come about
    for _ in range(10_000):
        parts = rng.choices(whole + FRAGMENTS + [chr(rng.randrange(0x110000))],
                            k=rng.randrange(40))
        text = "".join(parts)[rng.randrange(3):]
        ends = sorted(rng.choices(range(len(text) + 1), k=10)) + [len(text)]
        size = rng.randint(1, 5000), rng.randint(1, 5000)
        found = parse_boxes(text, size, [(end, rng.random()) for end in ends])
        assert [(d.label, d.box, d.codes) for d in found] == [
            (d.label, d.box, d.codes) for d in parse_boxes(text, size)]
        assert all(d.score is None or 0 <= d.score <= 1 for d in found)
        counts[len(found)] += 1
    assert min(counts[:6]) > 100  # they are not all empty


# --- scores

@st.composite
def token_lists(draw):
    "An answer's text in pieces, each with its probability, and the pieces of each object"
    detections, size = draw(answers())
    probability = st.floats(0, 1)
    tokens, own = [], []
    for d in detections:
        text = format_detections([d], size)
        pieces = re.findall(r"<loc[0-9]{4}>|<seg[0-9]{3}>|\s*\S", text)
        tokens += [(" ", draw(probability)), (";", draw(probability)),
                   (" ", draw(probability))] if tokens else []
        own.append([(p, draw(probability)) for p in pieces])
        tokens += own[-1]
    return tokens, own, size


@given(token_lists())
def test_a_score_is_the_geometric_mean_of_its_objects_tokens(case):
    tokens, own, size = case
    text = "".join(p for p, _ in tokens)
    ends = np.cumsum([len(p) for p, _ in tokens]).tolist()
    found = parse_boxes(text, size, [(end, p) for end, (_, p) in zip(ends, tokens)])
    assert len(found) == len(own)
    for d, pieces in zip(found, own):
        root = 1 / len(pieces)
        assert d.score == pytest.approx(np.prod([p ** root for _, p in pieces]), rel=1e-9)


def test_tokens_belong_to_the_object_in_which_they_begin():
    text = f"x {L * 4} cat ; {L * 4}{S * 16} dog"
    first, second = text.index(L), text.rindex(L * 4)
    probs = [(first, 0.0), (first + 9, 0.5), (first + 36, 0.5), (first + 40, 0.25),  # " cat"
             (second, 0.0), (second + 30, 0.9), (len(text), 0.4)]  # " ; ", …
    a, b = parse_boxes(text, (112, 112), probs)
    assert a.score == pytest.approx((0.5 * 0.5 * 0.25) ** (1 / 3))
    assert b.score == pytest.approx(0.6)
    assert [d.score for d in parse_boxes(text, (112, 112))] == [None, None]
    # one token for all of the text begins in no object that stands later in it
    assert [d.score for d in parse_boxes(text, (112, 112), [(len(text), 0.5)])] == [None, None]
    assert parse_boxes("", (112, 112), []) == []
    ends = [*range(9, 37, 9), *range(44, 165, 8)]
    many, = parse_boxes(L * 4 + S * 16, (112, 112), [(end, 1e-30) for end in ends])
    assert many.score == pytest.approx(1e-30)  # their product is too small for a float


@pytest.mark.parametrize("wrong", [
    [], [(8, 0.5)], [(10, 0.5)], [(9, 0.5), (8, 0.5)], [(5, 0.5), (3, 0.5), (9, 0.5)],
    [(-1, 0.5), (9, 0.5)], [(9, 1.1)], [(9, -0.1)], [(9, float("nan"))],
    [(float("nan"), 0.5), (9, 0.5)], [9], [(9, 0.5, 1)], 0.5, [0.5, 9],
    [("a", 0.5)], [(9, None)], "no list"])
def test_wrong_token_probs_are_named(wrong):
    with pytest.raises(ValueError, match="token_probs as a list of"):
        parse_boxes(L, (112, 112), wrong)


@given(answers(), st.integers(0, 2000))
def test_a_cut_keeps_what_is_complete(case, end):
    detections, size = case
    text = format_detections(detections, size)
    whole, part = parse_boxes(text, size), parse_boxes(text[:end], size)
    assert [d.box for d in part] == [d.box for d in whole[:len(part)]]
    assert part[:-1] == whole[:max(len(part) - 1, 0)]
    assert len(part) == len(re.findall(r"(?:<loc[0-9]{4}>){4}", text[:end]))


@pytest.mark.parametrize("text, labels", [
    (L * 4 + " cat", ["cat"]), (f"{L} {L}\n{L}  {L}   big \t cat  ", ["big cat"]),
    (f"{L * 4}cat;{L * 4}dog", ["cat", "dog"]), (f"{L * 4} ; {L * 4} dog", ["", "dog"]),
    (f"{L * 3} cat ; {L * 4} dog", ["dog"]), (L * 4, [""]), (L * 5 + " cat", [""]),
    (L * 8 + " cat", ["", "cat"]),
    (f"{L * 2} cat {L * 2}", []), ("<loc1024>" + L * 3 + " cat", []), ("cat", []), ("", []),
    (f"sure: {L * 4} cat", ["cat"]), (f"{L * 4} a < b", ["a < b"]),
    (f"{L * 4} cat {S * 16}", ["cat"])])
def test_decisions(text, labels):
    assert [d.label for d in parse_boxes(text, (112, 112))] == labels


@pytest.mark.parametrize("count, kept", [(0, False), (1, False), (15, False), (16, True),
                                         (17, False), (32, False)])
def test_a_mask_is_sixteen_codes(count, kept):
    found, = parse_boxes(L * 4 + S * count + " cat", (112, 112))
    assert found.label == "cat" and found.codes == ((7,) * 16 if kept else None)


def test_swapped_corners_span_the_same_box():
    text = ("<loc0001><loc0002><loc0003><loc0004> a ; "
            "<loc0003><loc0004><loc0001><loc0002> a")
    a, b = parse_boxes(text, (300, 200))
    assert a == b


def test_long_damaged_text_is_read_in_linear_time():
    text = (L * 3 + " " * 1000) * 300 + (L * 4 + S * 15) * 2000
    assert len(parse_boxes(text, (112, 112))) > 2000


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (float("nan"), 5), 112, (112,), (1, 2, 3)])
def test_a_wrong_size_is_named(size):
    for call in (lambda: parse_boxes("", size), lambda: format_box((0, 0, 1, 1), size)):
        with pytest.raises(ValueError, match="width, height"): call()


@pytest.mark.parametrize("wrong, message", [
    (Detection("cat", (5, 0, 1, 1)), "x1 <= x2"),
    (Detection("cat", (0, 0, float("nan"), 1)), "x1 <= x2"),
    (Detection("cat", (0, 0, 1)), "x1 <= x2"), (Detection("cat ; dog", (0, 0, 1, 1)), "label"),
    (Detection("<loc0001>", (0, 0, 1, 1)), "label"),
    (Detection("cat", (0, 0, 1, 1), (1, 2, 3)), "16 codes"),
    (Detection("cat", (0, 0, 1, 1), ()), "16 codes"),
    (Detection("cat", (0, 0, 1, 1), (128,) * 16), "16 codes")])
def test_a_wrong_detection_is_named(wrong, message):
    with pytest.raises(ValueError, match=message): format_detections([wrong], (10, 10))


whole = st.lists(st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))),
    max_size=4)


@given(whole, whole)
def test_iou_counts_pixels(a, b):
    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    expected = [[len(pixels(p) & pixels(q)) / max(len(pixels(p) | pixels(q)), 1) for q in b]
                for p in a]
    iou = box_iou(a, b)
    assert iou.shape == (len(a), len(b))
    assert np.allclose(iou, np.reshape(expected, iou.shape))


@pytest.mark.parametrize("wrong", [[(5, 0, 1, 1)], [(0, 5, 1, 1)], [(0, 0, float("nan"), 1)]])
def test_iou_wants_corners_in_order(wrong):
    with pytest.raises(ValueError, match="x1 <= x2"): box_iou(wrong, wrong)


# --- average precision, against lists worked out by hand; COCO takes precision at 101 recalls

SIZE = (100, 100)
def cat(x, score=None, label="cat", mask=None):
    return Detection(label, (x, 0, x + 10, 10), score=score, mask=mask)


@pytest.mark.parametrize("images, iou, expected", [
    ([([cat(0)], [cat(0)], SIZE)], 0.5, 1), ([([], [cat(0)], SIZE)], 0.5, 0),
    ([([cat(50)], [cat(0)], SIZE)], 0.5, 0),
    ([([cat(0)], [cat(0), cat(50)], SIZE)], 0.5, 51 / 101),         # half is found: 0 … 0.50
    ([([cat(0, 0.1), cat(50, 0.9)], [cat(0)], SIZE)], 0.5, 1 / 2),  # a false one comes first
    ([([cat(0, 0.9), cat(50, 0.1)], [cat(0)], SIZE)], 0.5, 1),      # … or last
    # found twice
    ([([cat(0, 0.9), cat(1, 0.8), cat(30, 0.7)], [cat(0), cat(30)], SIZE)], 0.5,
     (51 + 50 * 2 / 3) / 101),
    # IoU 9 / 11
    ([([cat(1)], [cat(0)], SIZE)], 9 / 11, 1), ([([cat(1)], [cat(0)], SIZE)], 0.82, 0),
    ([([cat(0)], [cat(0)], SIZE)], 1.0, 1),
    # one list for all pictures
    ([([cat(50, 0.9)], [cat(0)], SIZE), ([cat(0, 0.8)], [cat(0)], SIZE)], 0.5, 51 / 202),
    ([([cat(0)], [], SIZE), ([], [cat(0)], SIZE)], 0.5, 0),            # in the wrong picture
    ([([cat(0)], [cat(0), cat(50, label="dog")], SIZE)], 0.5, 1 / 2),  # the mean over labels
    ([([cat(0, label="dog")], [cat(0)], SIZE)], 0.5, 0),               # a wrong name
    ([([cat(0), cat(50, label="dog")], [cat(0)], SIZE)], 0.5, 1),      # nothing true has it
    ([([cat(0, 0.99), cat(50)], [cat(0)], SIZE)], 0.5, 1 / 2),         # no score counts as 1
])
def test_average_precision_by_hand(images, iou, expected, capsys):
    assert average_precision(images, iou=iou) == pytest.approx(expected)
    assert capsys.readouterr() == ("", "")


def strip(first, last):
    mask = np.zeros((20, 60), dtype=bool)
    mask[:10, first:last] = True
    return mask


@pytest.mark.parametrize("found, iou, expected", [
    ((0, 10), 0.5, 1), ((5, 15), 0.5, 0), ((5, 15), 1 / 3, 1), ((0, 5), 0.5, 1),
    ((0, 0), 0.01, 0),
    ((40, 50), 0.01, 0)])
def test_average_precision_of_masks(found, iou, expected):
    case = [([cat(0, mask=strip(*found))], [cat(0, mask=strip(0, 10))], (60, 20))]
    assert average_precision(case, iou=iou, masks=True) == pytest.approx(expected)
    # the boxes are right in any case
    assert average_precision(case, iou=iou) == pytest.approx(1)


@given(st.lists(st.tuples(whole, whole), min_size=1, max_size=3), st.floats(0.01, 1),
       st.randoms())
@settings(max_examples=40)
def test_average_precision_is_a_number(images, iou, rng):
    names = "cat", "dog"
    def things(boxes):
        return [Detection(rng.choice(names), box, score=rng.choice([None, 0.2, 0.7]))
                for box in boxes]
    images = [(things(found), things(true), (12, 12)) for found, true in images]
    if not any(true for _, true, _ in images):
        with pytest.raises(ValueError, match="at least one true object"):
            average_precision(images, iou)
        return
    ap = average_precision(images, iou)
    assert 0 <= ap <= 1 and isinstance(ap, float)
    # scores do nothing but order the list, and a picture without anything changes nothing
    def half(d):
        return Detection(d.label, d.box, score=(1.0 if d.score is None else d.score) / 2)
    assert average_precision([([half(d) for d in f], t, s) for f, t, s in images]
                             + [([], [], (5, 5))], iou) == ap
    perfect = [(t, t, s) for _, t, s in images
               if all(d.box[0] < d.box[2] and d.box[1] < d.box[3] for d in t)]
    if any(t for _, t, _ in perfect):
        assert average_precision(perfect, iou) == pytest.approx(1)


@pytest.mark.parametrize("images, options, message", [
    ([], {}, "at least one true object"),
    ([([cat(0)], [], SIZE)], {}, "at least one true object"),
    ([([], [cat(0)], SIZE)], dict(iou=0), "IoU above 0"),
    ([([], [cat(0)], SIZE)], dict(iou=1.5), "IoU above 0"),
    ([([], [cat(0)], (0, 5))], {}, "width, height"),
    ([([], [Detection("cat", (5, 0, 1, 1))], SIZE)], {}, "x1 <= x2"),
    ([([], [cat(0)], SIZE)], dict(masks=True), "mask of bools.*None"),
    ([([], [cat(0, mask=strip(0, 5))], (20, 60))], dict(masks=True), "mask of bools")])
def test_average_precision_names_what_is_wrong(images, options, message):
    with pytest.raises(ValueError, match=message): average_precision(images, **options)


def test_without_pycocotools_scoring_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    for call in (lambda: box_iou([], []), lambda: average_precision([([], [cat(0)], SIZE)])):
        with pytest.raises(ValueError, match="pip install pycocotools"): call()


# --- drawing

def corners(draw, size):
    values = [draw(st.floats(-20, 1.5 * max(size))) for _ in range(4)]
    (x1, x2), (y1, y2) = sorted(values[::2]), sorted(values[1::2])
    return x1, y1, x2, y2


@st.composite
def sheets(draw):
    size = draw(st.tuples(st.integers(1, 150), st.integers(1, 150)))
    odd = st.sampled_from(["red circle", "a label\nof two lines", "x" * 500, "日本", "\ud800"])
    labels = st.text(max_size=30) | odd
    def mask():
        kind = draw(st.sampled_from(["none", "empty", "full", "noise", "thin"]))
        if kind == "none": return None
        mask = np.full(size[::-1], kind == "full")
        if kind == "noise":
            mask = np.random.default_rng(draw(st.integers(0, 9))).random(size[::-1]) < 0.5
        if kind == "thin": mask[:, size[0] // 2] = True
        return mask
    return size, [Detection(draw(labels), corners(draw, size), mask=mask())
                  for _ in range(draw(st.integers(0, 4)))]


@given(sheets())
def test_anything_can_be_drawn(sheet):
    size, detections = sheet
    image = Image.new("RGB", size, "gray")
    drawn = draw_detections(image, detections)
    assert drawn.size == size and drawn.mode == "RGB" and drawn is not image
    assert image.getcolors() == [(size[0] * size[1], (128, 128, 128))]


def changed(image, detections):
    drawn = draw_detections(image, detections)
    return np.asarray(ImageChops.difference(drawn, image).convert("L")) > 0


def label_of(image, box):
    label, bare = (changed(image, [Detection(name, box)]) for name in ("red circle", ""))
    return label & ~bare


@pytest.mark.parametrize("side", [1, 112, 4000])
@pytest.mark.parametrize("paper", ["black", "white", "#d55e00"])
def test_lines_and_labels_grow_with_the_picture(side, paper):
    image = Image.new("RGB", (side, side), paper)
    box = (0.2 * side, 0.3 * side, 0.8 * side, 0.9 * side)
    if side == 1:
        assert draw_detections(image, [Detection("red circle", box)]).size == (1, 1)
        return
    line = changed(image, [Detection("", box)])
    assert line[side // 2].sum() >= max(2, side / 200) and not line[side // 2, side // 2]
    label = changed(image, [Detection("red circle", box)]) & ~line
    rows, columns = np.nonzero(label)
    assert max(6, side / 50) <= np.ptp(rows) + 1 <= max(20, side / 20)
    assert np.ptp(columns) > 3 * np.ptp(rows)


def disc(side):
    y, x = np.mgrid[:side, :side] + 0.5
    return np.hypot(x - side / 2, y - 0.6 * side) < side / 4


@pytest.mark.parametrize("side", [28, 112, 4000])
@pytest.mark.parametrize("paper", ["black", "white", "gray", "#d55e00"])
def test_a_mask_changes_what_is_inside_and_nothing_else(side, paper):
    image, mask = Image.new("RGB", (side, side), paper), disc(side)
    # wider than the mask, so that no line of it hides the edge
    box = (0.1 * side, 0.2 * side, 0.9 * side, side)
    bare = draw_detections(image, [Detection("", box)])
    drawn = draw_detections(image, [Detection("", box, mask=mask)])
    tint = np.asarray(ImageChops.difference(drawn, bare).convert("L")) > 0
    assert not tint[~mask].any()
    row = int(0.6 * side)
    middle = tint[row]
    line = max(1, round(side / 200))
    # an edge on either side at least, on paper of the mask's own colour too
    assert middle.sum() >= 2
    if paper in ("black", "white", "gray"):
        assert middle[side // 4 + 3 * line:side * 3 // 4 - 3 * line].all()
    # on either side the edge stands out from what it encloses, a rim's width at least
    pixels = np.asarray(drawn, dtype=int)[row]  # [side, 3]
    edge = (abs(pixels - pixels[side // 2]).max(axis=-1) > 60) & mask[row]
    assert min(edge[:side // 2].sum(), edge[side // 2:].sum()) >= max(1, line // 3)


def test_a_mask_lets_the_picture_through():
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    detections = [Detection("", (0, 0, 112, 112), mask=disc(112))]
    drawn = np.asarray(draw_detections(Image.fromarray(noise), detections))
    middle = np.s_[57:77, 46:66]
    for i in range(3):
        a, b = (pixels[middle][..., i].ravel() for pixels in (noise, drawn))
        assert np.corrcoef(a, b)[0, 1] > 0.9
    assert np.std(drawn[middle]) > 0.5 * np.std(noise[middle])


@pytest.mark.parametrize("paper", ["black", "white"])
def test_a_label_is_as_legible_over_a_mask(paper):
    image = Image.new("RGB", (112, 112), paper)
    box, everywhere = (20, 40, 90, 90), np.ones((112, 112), dtype=bool)
    plate = label_of(image, box)
    top, bottom, left, right = (f(a) for a in np.nonzero(plate) for f in (np.min, np.max))
    inside = np.s_[top:bottom + 1, left:right + 1]
    with_mask, without = (
        np.asarray(draw_detections(image, [Detection("red circle", box, mask=m)]))
        for m in (everywhere, None))
    assert np.array_equal(with_mask[inside], without[inside])


def test_one_pixel_and_an_empty_mask_can_be_drawn():
    image, mask = Image.new("RGB", (50, 50), "black"), np.zeros((50, 50), dtype=bool)
    def drawn(mask):
        return draw_detections(image, [Detection("", (40, 40, 48, 48), mask=mask)])
    assert drawn(mask) == drawn(None)
    mask[10, 20] = True
    assert drawn(mask).getpixel((20, 10)) == (0xd5, 0x5e, 0x00)


@pytest.mark.parametrize("wrong", [
    np.ones((60, 40), bool), np.ones((40, 60)), np.ones((40, 60), int), np.ones(40, bool),
    np.ones((40, 60, 1), bool),
    True])
def test_a_wrong_mask_is_named(wrong):
    with pytest.raises(ValueError, match=r"mask of bools.*\(40, 60\)"):
        draw_detections(Image.new("RGB", (60, 40)), [Detection("", (0, 0, 5, 5), mask=wrong)])


def test_a_mask_is_no_part_of_a_detections_identity():
    plain = Detection("cat", (0, 0, 1, 1))
    masked = Detection("cat", (0, 0, 1, 1), mask=np.ones((2, 2), bool))
    assert plain == masked and hash(plain) == hash(masked) and repr(plain) == repr(masked)


@pytest.mark.parametrize("where", [
    (-50, -50, 5, 5), (105, 0, 112, 8), (0, 105, 8, 112), (105, 105, 300, 300),
    (0, 0, 112, 112)])
def test_a_label_stays_whole_inside_the_picture(where):
    free = Image.new("RGB", (112, 112), "black")
    middle = np.nonzero(label_of(free, (30, 50, 80, 90)))
    here = np.nonzero(label_of(free, where))
    # the box's line may hide the label's first three rows or columns, a cut would take more
    for axis in (0, 1):
        assert np.ptp(here[axis]) >= np.ptp(middle[axis]) - 3


def test_labels_avoid_each_other():
    image = Image.new("RGB", (200, 200), "black")
    twins = [Detection("first", (50, 60, 150, 150)), Detection("second", (50, 60, 150, 150))]
    drawn = np.array(draw_detections(image, twins))
    alone = np.array(draw_detections(image, twins[:1]))
    above = slice(0, 60)
    assert np.array_equal(drawn[above], alone[above])  # the second label went elsewhere …
    assert (drawn[150:] != alone[150:]).any()          # … below the box


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(mode):
    drawn = draw_detections(Image.new(mode, (60, 40)), [Detection("cat", (5, 15, 30, 35))])
    assert drawn.mode == "RGB" and drawn.size == (60, 40)


def test_a_turned_photo_is_drawn_upright():
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # "turn a quarter to see me upright"
    image.info["exif"] = exif.tobytes()
    assert draw_detections(image, []).size == (40, 60)


# --- other people's boxes

PHOTO = (640, 427)
PIXELS = (169., 84., 446., 359.)


def test_named_forms_become_corners():
    assert from_coco_box((169, 84, 277, 275)) == PIXELS
    assert from_coco_box(np.array([1, 2, 0, 3])) == (1, 2, 1, 5)
    yolo = (307.5 / 640, 221.5 / 427, 277 / 640, 275 / 427)
    assert np.allclose(from_yolo_box(yolo, PHOTO), PIXELS)
    assert from_yolo_box((.5, .5, 1, 1), PHOTO) == (0, 0, 640, 427)
    assert from_yolo_box((.5, .25, .5, .25), (100, 1000)) == (25, 125, 75, 375)
    assert all(type(v) is float for v in (*from_coco_box((1, 2, 3, 4)),
                                          *from_yolo_box((0, 0, 0, 0), PHOTO)))


@given(SIZES, st.data())
def test_all_three_forms_give_the_same_tokens(size, data):
    x1, y1, x2, y2 = box = data.draw(boxes(size))
    (width, height), sides = size, (x2 - x1, y2 - y1)
    yolo = (min((x1 + x2) / 2 / width, 1), min((y1 + y2) / 2 / height, 1),
            sides[0] / width, sides[1] / height)
    for other in (from_coco_box((x1, y1, *sides)), from_yolo_box(yolo, size)):
        assert np.abs(np.subtract(other, box)).max() <= 1e-9 * max(size)


@pytest.mark.parametrize("wrong", [(1, 2, -3, 4), (1, 2, 3, -4), (1, 2, 3), None, "1234",
                                   (1, 2, float("nan"), 4),
                                   (1, 2, float("inf"), 4), [[1, 2, 3, 4]]])
def test_what_is_no_coco_box(wrong):
    with pytest.raises(ValueError, match="x, y, width, height"): from_coco_box(wrong)


@pytest.mark.parametrize("wrong", [(.5, .5, 1.1, .5), (-.1, .5, .1, .1), (169, 84, 277, 275),
                                   (.5, .5, .1), None, (.5, .5, float("nan"), .5),
                                   (.5, -.5, .5, .5), (.5, .5, .5, -.1)])
def test_what_is_no_yolo_box(wrong):
    with pytest.raises(ValueError, match="centre"): from_yolo_box(wrong, PHOTO)


PARTS = [(.25, .2, .7, .84), (.48, .52, .48, .64), (0, 0, 1, 1), (0, 0, .5, 1),
         (.1, .2, .3, .4), (1e-3, 0, 1, .5)]


@pytest.mark.parametrize("box", PARTS, ids=str)
def test_boxes_in_parts_of_the_picture_are_refused(box):
    "Each is in order, and would be a pixel in the corner."
    other = PIXELS
    for call in (lambda: format_box(box, PHOTO),
                 lambda: format_box(np.array(box, np.float32), (64, 17)),
                 lambda: format_detections([Detection("a", other), Detection("b", box)],
                                           PHOTO),
                 lambda: average_precision([([], [Detection("a", box)], PHOTO)])):
        message = "^expected a box in pixels.*from_yolo_box.*multiply.*$"  # all in one line
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("box", [*PARTS, (0, 0, 0, 0)], ids=str)
def test_what_may_be_meant_so_is_taken(box):
    "A toy picture; a box larger than a pixel; an answer; found boxes, which may be anything."
    assert len(format_box(box, (16, 640))) == 36
    assert len(format_box((1., .2, 1.5, .8), PHOTO)) == 36
    assert len(format_box((-.1, .2, .5, .8), PHOTO)) == 36
    for text in ("<loc0000><loc0000><loc0000><loc0000>",
                 "<loc0000><loc0000><loc0001><loc0001>"):
        found, = parse_boxes(text, PHOTO)
        assert format_detections([found], PHOTO) == text
    found, true = [Detection("a", box)], [Detection("a", PIXELS)]
    assert average_precision([(found, true, PHOTO)]) == 0
    assert draw_detections(Image.new("RGB", PHOTO), found)


@pytest.mark.parametrize("box", [(641, 10, 700, 20), (10, 428, 20, 500), (-9, 10, -1, 20),
                                 (10, -20, 30, -1),
                                 (400, 500, 420, 620)])
def test_boxes_outside_the_picture_are_refused(box):
    message = r"outside its picture of width 640 and height 427.*\(width, height\)"
    with pytest.raises(ValueError, match=message):
        format_box(box, PHOTO)


@pytest.mark.parametrize("box", [(640, 0, 640, 9), (0, 427, 9, 427), (0, 0, 0, 9),
                                 (-9, -9, 0, 9), (639, 426, 900, 900)])
def test_boxes_at_the_edge_are_taken(box): assert len(format_box(box, PHOTO)) == 36


def test_swapped_corners_name_the_other_forms():
    for call in (lambda: format_box((300, 100, 50, 80), PHOTO),
                 lambda: box_iou([(300, 100, 50, 80)], [PIXELS])):
        with pytest.raises(ValueError, match="from_coco_box and from_yolo_box"): call()
    check_box(PIXELS, PHOTO)


@pytest.mark.parametrize("size", [(0, 9), (9, -1), (9,), 9, (float("nan"), 9),
                                  (float("inf"), 9), (480, 640, 3), None])
def test_sizes_that_are_none(size):
    for call in (lambda: check_box((0, 0, 5, 5), size), lambda: parse_boxes("", size),
                 lambda: from_yolo_box((.5, .5, .5, .5), size)):
        with pytest.raises(ValueError, match=r"size = \(width, height\)"): call()


def test_masks_of_another_size_have_no_iou():
    a = np.zeros((20, 30), bool)
    a[5:9, 5:9] = True
    assert mask_iou([a], [a, ~a]).tolist() == [[1, 0]] and mask_iou([], [a]).shape == (0, 1)
    for b in (a.T, a[:-1], a[None], a.astype(np.uint8), 255 * a.astype(np.uint8),
              a.astype(float), a[0]):
        for pair in (([a], [b]), ([b], [a]), ([a, b], [a])):
            with pytest.raises(ValueError, match="bools, all of one size"): mask_iou(*pair)
