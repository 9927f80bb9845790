"""Tasks: a scene as prompts and answers, and the marks of answers."""
from dataclasses import replace

import numpy as np
import pytest

from paligemma_nb.detection import Detection, parse_boxes
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import find_objects
from paligemma_nb.tasks import Answer, Example, ap50, grade, scene_examples, worst

# --- a scene as text

def test_absent_things_are_absent():
    for seed in range(100):
        scene = make_scene(seed)
        examples = scene_examples(scene, np.random.default_rng(seed))
        for kind, verb in (("absent", "detect "), ("segment_absent", "segment ")):
            (absent,) = examples[kind]
            assert absent.prompt.removeprefix(verb) not in scene.things() and absent.suffix == ""


def test_several_asks_for_things_and_answers_with_those_that_are_there():
    asked = [(scene, e) for scene in map(make_scene, range(60))
             for e in scene_examples(scene, np.random.default_rng(scene.seed)).get("several", [])]
    for scene, e in asked:
        names = e.prompt.removeprefix("detect ").split(" ; ")
        expected = [o.name for name in names for o in scene.things().get(name, [])]
        assert [d.label for d in parse_boxes(e.suffix, (112, 112))] == expected and expected
    assert {len(e.objects) for _, e in asked} >= {1, 2, 3}


def test_a_mask_comes_back_from_its_text():
    for seed in range(HELD_OUT, HELD_OUT + 20):
        scene = make_scene(seed, size=336)
        for e in scene_examples(scene, np.random.default_rng(seed))["segment"]:
            found = find_objects(e.suffix, (336, 336))
            for d, o in zip(found, e.objects, strict=True):
                assert (d.mask & o.mask).sum() > 0.9 * (d.mask | o.mask).sum()
            assert all(value == 1 or mark == "iou" for mark, value in grade(e, e.suffix, found).items())


# --- marks

RING, TRIANGLE, *_ = make_scene(HELD_OUT + 1).objects  # a red ring, a cyan triangle
SIZE = 112, 112
ONE, BOTH = (Example("detect", "", objects=objects).suffix for objects in ((RING,), (RING, TRIANGLE)))


def marks_of(text, *objects, kind="detect", prompt="detect red ring"):
    return grade(Example(kind, prompt, objects=objects), text, find_objects(text, SIZE))


@pytest.mark.parametrize("objects, text, marks", [
    ((RING,), ONE, dict(over_half=1, right=1)),
    ((RING,), ONE.replace("red", "blue"), dict(over_half=1, right=0)),
    ((RING,), f"{ONE} ; {ONE}", dict(over_half=1, right=0)),
    ((RING,), "", dict(iou=0, over_half=0, right=0)),
    ((TRIANGLE,), ONE, dict(iou=0, over_half=0, right=0)),
    ((RING, TRIANGLE), ONE, dict(all_found=0)),
    ((RING, TRIANGLE), BOTH, dict(all_found=1)),
    ((TRIANGLE, RING), BOTH, dict(all_found=0)),  # the order is part of the answer
])
def test_grade_detect(objects, text, marks):
    graded = marks_of(text, *objects)
    assert marks.items() <= graded.items()
    if marks.get("over_half"): assert graded["iou"] == pytest.approx(1, abs=0.03)


def test_grade_segment_compares_masks_and_not_boxes():
    ask = dict(kind="segment", prompt="segment red ring")
    text = Example("segment", "segment red ring", objects=(RING,)).suffix
    assert marks_of(text, RING, **ask)["iou"] > 0.85 and marks_of(text, RING, **ask)["right"] == 1
    assert marks_of(ONE, RING, **ask) == dict(iou=0, over_half=0, right=0)       # the right box, without a mask
    codes = text[text.index("<seg"):text.index(" red")]
    filled = text.replace(codes, "<seg000>" * 16)
    found, = find_objects(filled, SIZE)
    expected = (found.mask & RING.mask).sum() / (found.mask | RING.mask).sum()
    assert marks_of(filled, RING, **ask)["iou"] == pytest.approx(expected)


def test_grade_text():
    example = Example("count", "answer en how many rings are there?", "2")
    assert grade(example, "2", []) == dict(right=1) and grade(example, "22", []) == dict(right=0)
    absent = Example("absent", "detect red ring")
    assert grade(absent, "", []) == dict(right=1) and grade(absent, ONE, find_objects(ONE, SIZE)) == dict(right=0)


def test_ap50_counts_what_is_missed_and_what_is_invented():
    scenes = [make_scene(seed) for seed in range(HELD_OUT, HELD_OUT + 30)]
    def answer(scene, name, objects, kind="detect"):
        found = [Detection(name, o.box, score=0.9, mask=o.mask) for o in objects]
        return Answer(scene.seed, Example(kind, f"detect {name}", objects=scene.things().get(name, ())), "", found, {})
    right = [answer(s, name, objects) for s in scenes for name, objects in s.things().items()]
    assert ap50(right, ("detect", "absent")) == ap50(right, ("detect",), masks=True) == 1
    blind = [replace(a, found=[]) if i % 2 else a for i, a in enumerate(right)]
    assert ap50(blind, ("detect",)) < 0.75
    names = {name for s in scenes for name in s.things()}  # an invented thing is unsure, or as sure as the others
    invented = [replace(a, found=[replace(d, score=1.0) for d in a.found]) for a in (
        answer(s, name, s.objects[:1], kind="absent") for s in scenes for name in names - s.things().keys())]
    assert ap50(right + invented, ("detect",)) == 1
    assert ap50(right + invented, ("detect", "absent")) < 0.5


def test_worst_are_the_lowest():
    def answer(seed, kind, **marks): return Answer(seed, Example(kind, "p"), "t", [], marks)
    answers = [answer(s, kind, iou=iou) for kind in ("detect", "segment") for s, iou in ((3, 0.5), (2, 0.1), (1, 0.1))]
    found = worst([*answers, answer(9, "detect", all_found=0.0), answer(9, "count", right=0.0)], num=2)
    assert [(w["seed"], w["iou"]) for w in found["segment"]] == [(1, 0.1), (2, 0.1)] and len(found["detect"]) == 2
