"Boxes as text: what is written comes back, whatever is written is read, and every picture can be drawn on."
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from paligemma_nb.detection import (Detection, bin_to_coordinate, box_iou, coordinate_to_bin, draw_detections,
                                    format_box, format_detections, parse_boxes)

SIDES = st.integers(1, 10_000)
SIZES = st.tuples(SIDES, SIDES)
UNIT = st.floats(0, 1)
LABELS = st.text(st.characters(exclude_characters=";<", exclude_categories=["C", "Z"]), max_size=12)
CODES = st.none() | st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)
FRAGMENTS = st.sampled_from([
    "<loc0000>", "<loc0512>", "<loc1023>", "<loc1024>", "<loc9999>", "<loc12>", "<loc", "loc0001>",
    "<loc0100><loc0200>", "<loc0001><loc0002><loc0003><loc0004>", "<loc٠١٢٣>", "<seg000>", "<seg127>", "<seg128>",
    "<seg", "<seg007>" * 16,
    " ; ", ";", " ", "\n", "\t", "cat", "red circle", "<eos>", "<", ">", "é", "\x00", "\ud800"])


@st.composite
def boxes(draw, size):
    (x1, x2), (y1, y2) = (sorted(draw(UNIT) * length for _ in range(2)) for length in size)
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
    assert [coordinate_to_bin(bin_to_coordinate(i, length), length) for i in range(1024)] == list(range(1024))


def test_the_order_and_the_rounding():
    assert format_box((250, 125, 875, 750), (1023, 1023)) == "<loc0125><loc0250><loc0750><loc0875>"
    assert format_box((0, 0, 640, 427), (640, 427)) == "<loc0000><loc0000><loc1023><loc1023>"
    assert parse_boxes("<loc0000><loc1023><loc1023><loc1023>", (640, 427))[0].box == (640, 0, 640, 427)
    # 0.49 and 0.51 of a gap; a floor or a 1024 in either direction would give other numbers
    assert [coordinate_to_bin(x / 1023 * 112, 112) for x in (0.49, 0.51, 1022.49, 1022.51)] == [0, 1, 1022, 1023]


@given(SIZES, st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4))
def test_boxes_are_clipped_to_the_picture(size, corners):
    x1, y1, x2, y2 = (*np.minimum(corners[:2], corners[2:]), *np.maximum(corners[:2], corners[2:]))
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


@given(st.lists(FRAGMENTS, max_size=40).map("".join), SIZES)
@settings(max_examples=300)
def test_any_fragments_are_read(text, size): check_any(text, size)


@given(answers(), st.integers(0, 2000))
def test_a_cut_keeps_what_is_complete(case, end):
    detections, size = case
    text = format_detections(detections, size)
    whole, part = parse_boxes(text, size), parse_boxes(text[:end], size)
    assert [d.box for d in part] == [d.box for d in whole[:len(part)]]
    assert part[:-1] == whole[:max(len(part) - 1, 0)]
    assert len(part) == len(re.findall(r"(?:<loc[0-9]{4}>){4}", text[:end]))


L, S = "<loc0100>", "<seg007>"


@pytest.mark.parametrize("text, labels", [
    (L * 4 + " cat", ["cat"]), (f"{L} {L}\n{L}  {L}   big \t cat  ", ["big cat"]),
    (f"{L * 4}cat;{L * 4}dog", ["cat", "dog"]), (f"{L * 4} ; {L * 4} dog", ["", "dog"]),
    (f"{L * 3} cat ; {L * 4} dog", ["dog"]), (L * 4, [""]), (L * 5 + " cat", [""]), (L * 8 + " cat", ["", "cat"]),
    (f"{L * 2} cat {L * 2}", []), ("<loc1024>" + L * 3 + " cat", []), ("cat", []), ("", []),
    (f"sure: {L * 4} cat", ["cat"]), (f"{L * 4} a < b", ["a < b"]), (f"{L * 4} cat {S * 16}", ["cat"])])
def test_decisions(text, labels):
    assert [d.label for d in parse_boxes(text, (112, 112))] == labels


@pytest.mark.parametrize("count, kept", [(0, False), (1, False), (15, False), (16, True), (17, False), (32, False)])
def test_a_mask_is_sixteen_codes(count, kept):
    found, = parse_boxes(L * 4 + S * count + " cat", (112, 112))
    assert found.label == "cat" and found.codes == ((7,) * 16 if kept else None)


def test_swapped_corners_span_the_same_box():
    a, b = parse_boxes("<loc0001><loc0002><loc0003><loc0004> a ; <loc0003><loc0004><loc0001><loc0002> a", (300, 200))
    assert a == b


def test_long_damaged_text_is_read_in_linear_time():
    text = (L * 3 + " " * 1000) * 300 + (L * 4 + S * 15) * 2000
    assert len(parse_boxes(text, (112, 112))) > 2000


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (float("nan"), 5), 112, (112,), (1, 2, 3)])
def test_a_wrong_size_is_named(size):
    for call in (lambda: parse_boxes("", size), lambda: format_box((0, 0, 1, 1), size)):
        with pytest.raises(ValueError, match="width, height"): call()


@pytest.mark.parametrize("wrong, message", [
    (Detection("cat", (5, 0, 1, 1)), "x1 <= x2"), (Detection("cat", (0, 0, float("nan"), 1)), "x1 <= x2"),
    (Detection("cat", (0, 0, 1)), "x1 <= x2"), (Detection("cat ; dog", (0, 0, 1, 1)), "label"),
    (Detection("<loc0001>", (0, 0, 1, 1)), "label"), (Detection("cat", (0, 0, 1, 1), (1, 2, 3)), "16 codes"),
    (Detection("cat", (0, 0, 1, 1), ()), "16 codes"), (Detection("cat", (0, 0, 1, 1), (128,) * 16), "16 codes")])
def test_a_wrong_detection_is_named(wrong, message):
    with pytest.raises(ValueError, match=message): format_detections([wrong], (10, 10))


whole = st.lists(st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))), max_size=4)


@given(whole, whole)
def test_iou_counts_pixels(a, b):
    def pixels(box): return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    expected = [[len(pixels(p) & pixels(q)) / max(len(pixels(p) | pixels(q)), 1) for q in b] for p in a]
    iou = box_iou(a, b)
    assert iou.shape == (len(a), len(b))
    assert np.allclose(iou, np.reshape(expected, iou.shape))


def corners(draw, size):
    values = [draw(st.floats(-20, 1.5 * max(size))) for _ in range(4)]
    return min(values[0], values[2]), min(values[1], values[3]), max(values[0], values[2]), max(values[1], values[3])


@st.composite
def sheets(draw):
    size = draw(st.tuples(st.integers(1, 150), st.integers(1, 150)))
    odd = st.sampled_from(["red circle", "a label\nof two lines", "x" * 500, "日本", "\ud800"])
    labels = st.text(max_size=30) | odd
    return size, [Detection(draw(labels), corners(draw, size)) for _ in range(draw(st.integers(0, 4)))]


@given(sheets())
def test_anything_can_be_drawn(sheet):
    size, detections = sheet
    image = Image.new("RGB", size, "gray")
    drawn = draw_detections(image, detections)
    assert drawn.size == size and drawn.mode == "RGB" and drawn is not image
    assert image.getcolors() == [(size[0] * size[1], (128, 128, 128))]


def changed(image, detections):
    return np.asarray(ImageChops.difference(draw_detections(image, detections), image).convert("L")) > 0


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


@pytest.mark.parametrize("where", [
    (-50, -50, 5, 5), (105, 0, 112, 8), (0, 105, 8, 112), (105, 105, 300, 300), (0, 0, 112, 112)])
def test_a_label_stays_whole_inside_the_picture(where):
    def plate(image, box): return changed(image, [Detection("red circle", box)]) & ~changed(image, [Detection("", box)])
    free = Image.new("RGB", (112, 112), "black")
    middle = np.nonzero(plate(free, (30, 50, 80, 90)))
    here = np.nonzero(plate(free, where))
    for axis in (0, 1):  # the box's own line may hide the plate's first three rows or columns, a cut would take more
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
