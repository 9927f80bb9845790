"""Tasks: a scene as prompts and answers, and the marks of answers."""
from dataclasses import replace

import numpy as np
import pytest

from paligemma_nb import load_model, tasks
from paligemma_nb.detection import Detection, parse_boxes
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import find_objects
from paligemma_nb.tasks import (
    KINDS, Example, Marked, ap50, evaluate, grade, marks_table, measure,
    scene_examples, worst)

# --- a scene as text

def test_absent_things_are_absent():
    for seed in range(100):
        scene = make_scene(seed)
        examples = scene_examples(scene, np.random.default_rng(seed))
        for kind, verb in (("absent", "detect "), ("segment_absent", "segment ")):
            (absent,) = examples[kind]
            assert absent.prompt.removeprefix(verb) not in scene.things()
            assert absent.suffix == ""
        [both] = examples["several_absent"]
        names = both.prompt.removeprefix("detect ").split(" ; ")
        assert names[0] == examples["absent"][0].prompt.removeprefix("detect ")
        assert len({*names}) == 2 and scene.things().keys().isdisjoint(names)
        assert both.suffix == ""


def test_several_asks_for_things_and_answers_with_those_that_are_there():
    asked = []
    for scene in map(make_scene, range(60)):
        offered = scene_examples(scene, np.random.default_rng(scene.seed))
        asked += [(scene, e) for e in offered.get("several", [])]
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
            marks = grade(e, e.suffix, found).items()
            assert all(value == 1 or mark == "iou" for mark, value in marks)


def test_every_kind_is_known_by_name():
    asked = {kind for seed in range(50)
             for kind in scene_examples(make_scene(seed), np.random.default_rng(seed))}
    assert asked == set(KINDS) and len(KINDS) == len(asked)
    with pytest.raises(ValueError, match="both words and objects"):
        Example("detect", "detect red ring", "yes", (RING,))


def test_the_absent_thing_and_the_order_of_names_are_the_generators():
    "and all else is not: the questions of a scene come from the scene"
    scene = make_scene(3)
    a, again, b = (scene_examples(scene, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert a == again and a["absent"] != b["absent"]
    drawn = "absent", "segment_absent", "several", "several_absent"
    assert all(a[kind] == b[kind] for kind in KINDS if kind not in drawn)
    assert a["segment_absent"][0].prompt == a["absent"][0].prompt.replace("detect", "segment")
    names = [[e.prompt for e in scene_examples(scene, np.random.default_rng(seed))["several"]]
             for seed in range(20)]
    first, second = next(iter(scene.things())), list(scene.things())[1]
    assert any(f"detect {first} ; {second}" in found for found in names)
    assert any(f"detect {second} ; {first}" in found for found in names)


def test_a_scene_is_asked_for_all_that_it_holds():
    for scene in map(make_scene, range(40)):
        examples, things = scene_examples(scene, np.random.default_rng(0)), scene.things()
        assert examples["caption"] == [Example("caption", "caption en", scene.caption)]
        for verb in ("detect", "segment"):
            assert {e.prompt: list(e.objects) for e in examples[verb]} == {
                f"{verb} {name}": objects for name, objects in things.items()}
        questions = [e for kind in KINDS[1:6] for e in examples.get(kind, [])]
        assert {(e.prompt.removeprefix("answer en "), e.words, e.kind) for e in questions} == {
            *scene.questions()}
        pairs = (len(things) + 1) * len(things) // 2  # of the things and one that is absent
        twins = sum(len(objects) > 1 for objects in things.values())
        assert len(examples["several"]) == pairs + twins


# --- marks

RING, TRIANGLE, *_ = make_scene(HELD_OUT + 1).objects  # a red ring, a cyan triangle
SIZE = 112, 112
ONE, BOTH = (Example("detect", "", objects=o).suffix for o in ((RING,), (RING, TRIANGLE)))


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
    marks = marks_of(text, RING, **ask)
    assert marks["iou"] > 0.85 and marks["right"] == 1
    no_mask = marks_of(ONE, RING, **ask)  # in the right box
    assert no_mask == dict(iou=0, over_half=0, right=0)
    codes = text[text.index("<seg"):text.index(" red")]
    filled = text.replace(codes, "<seg000>" * 16)
    found, = find_objects(filled, SIZE)
    expected = (found.mask & RING.mask).sum() / (found.mask | RING.mask).sum()
    assert marks_of(filled, RING, **ask)["iou"] == pytest.approx(expected)


@pytest.mark.parametrize("found", [
    [], find_objects(ONE, (224, 224)), find_objects(ONE, (1, 1)), find_objects(BOTH, SIZE),
    find_objects(BOTH, SIZE)[1:]])
def test_grade_refuses_what_the_text_does_not_say(found):
    with pytest.raises(ValueError, match="at .112, 112. px the text says the boxes"):
        grade(Example("detect", "detect red ring", objects=(RING,)), ONE, found)


def test_all_found_means_all_of_them_in_order():
    misplaced = Example("detect", "", objects=(RING, replace(TRIANGLE, box=RING.box))).suffix
    assert marks_of(misplaced, RING, TRIANGLE) == dict(all_found=0)
    left, right = (replace(o, shape="ring", color="red") for o in (RING, TRIANGLE))
    for order, found in (((left, right), 1), ((right, left), 0)):
        text = Example("detect", "", objects=order).suffix
        assert marks_of(text, left, right) == dict(all_found=found)


def test_the_first_object_of_an_answer_counts():
    far = Example("detect", "", objects=(replace(TRIANGLE, color="red", shape="ring"),)).suffix
    assert marks_of(f"{far} ; {ONE}", RING) == dict(iou=0, over_half=0, right=0)


def test_one_object_of_several_is_marked_as_several():
    "`detect a ; b` with b absent: one object, but the mark of answers with several"
    assert marks_of(ONE, RING, kind="several") == dict(all_found=1)
    assert marks_of(BOTH, RING, kind="several") == dict(all_found=0)


def test_over_half_is_over_half():
    def wide(x2): return Example("detect", "", objects=(replace(RING, box=(0, 0, x2, 56)),))
    text = Example("detect", "", objects=(replace(RING, box=(0, 0, 112, 56)),)).suffix
    for x2, over in ((112 * 0.49, 0), (112 * 0.51, 1)):
        marks = grade(wide(x2), text, find_objects(text, SIZE))
        assert marks == dict(iou=pytest.approx(x2 / 112, abs=1e-2), over_half=over, right=over)


def test_grade_text():
    example = Example("count", "answer en how many rings are there?", "2")
    assert grade(example, "2", []) == dict(right=1)
    assert grade(example, "22", []) == dict(right=0)
    caption = Example("caption", "caption en", "a red ring and a blue star")
    assert grade(caption, "a red ring", []) == grade(caption, "", []) == dict(right=0)
    absent = Example("absent", "detect red ring")
    assert grade(absent, "", []) == dict(right=1)
    assert grade(absent, ONE, find_objects(ONE, SIZE)) == dict(right=0)


def test_ap50_counts_what_is_missed_and_what_is_invented():
    scenes = [make_scene(seed) for seed in range(HELD_OUT, HELD_OUT + 30)]
    def marked(scene, name, objects, kind="detect"):
        found = [Detection(name, o.box, score=0.9, mask=o.mask) for o in objects]
        example = Example(kind, f"detect {name}", objects=scene.things().get(name, ()))
        return Marked(scene.seed, example, "", found, {})
    right = [marked(s, name, objects) for s in scenes for name, objects in s.things().items()]
    assert ap50(right, ("detect", "absent")) == ap50(right, ("detect",), masks=True) == 1
    blind = [replace(a, found=[]) if i % 2 else a for i, a in enumerate(right)]
    assert ap50(blind, ("detect",)) < 0.75
    names = {name for s in scenes for name in s.things()}
    invented = [marked(s, name, s.objects[:1], kind="absent")
                for s in scenes for name in names - s.things().keys()]
    surer = [replace(a, found=[replace(d, score=1.0) for d in a.found]) for a in invented]
    assert ap50(right + surer, ("detect",)) == 1
    assert ap50(right + surer, ("detect", "absent")) < 0.5


def test_ap50_takes_kinds_that_exist():
    ring = Example("detect", "detect red ring", objects=(RING,))
    answer = Marked(0, ring, ONE, find_objects(ONE, SIZE), {})
    assert ap50([answer], ("detect",)) == pytest.approx(1)
    for kinds in ("detect", ("detects",)):
        with pytest.raises(ValueError, match="tuple of kinds"): ap50([answer], kinds)
    for answers, kinds in ([answer], ("segment",)), ([], ("detect",)):
        with pytest.raises(ValueError, match="at least one true object"): ap50(answers, kinds)


def test_a_box_without_a_mask_has_found_nothing_where_masks_are_asked_for():
    whole = Example("segment", "segment red ring", objects=(RING,))
    answers = [Marked(seed, whole, text, find_objects(text, SIZE), {})
               for seed, text in enumerate((whole.suffix, ONE))]
    assert ap50(answers, ("segment",), masks=True) == pytest.approx(51 / 101)
    empty = replace(answers[0].found[0], mask=np.zeros_like(RING.mask))
    answers[1] = replace(answers[1], found=[empty])
    assert ap50(answers, ("segment",), masks=True) < 0.6
    assert ap50(answers, ("segment",)) == pytest.approx(1)


def test_an_exam_asks_marks_and_counts_what_it_says(monkeypatch):
    model, processor = load_model(device="cpu", dtype="float32")
    means, answers = evaluate(model, processor, num_scenes=3, first_seed=HELD_OUT + 5)
    assert {a.seed for a in answers} == {HELD_OUT + i for i in (5, 6, 7)}
    assert means["segment"]["right"] > 0.5  # long answers are not cut off
    lengths = [len(a.example.suffix) for a in answers]
    assert lengths == sorted(lengths)
    for kind, found in means.items():
        of_kind = [a for a in answers if a.example.kind == kind]
        assert found["asked"] == len(of_kind)
        for mark in found.keys() - {"asked", "ap50"}:
            assert found[mark] == pytest.approx(np.mean([a.marks[mark] for a in of_kind]))
    for seed in range(HELD_OUT + 5, HELD_OUT + 8):
        offered = scene_examples(make_scene(seed), np.random.default_rng(seed))
        for kind in offered:
            asked = [a.example for a in answers if a.seed == seed and a.example.kind == kind]
            assert len(asked) == (len(offered[kind]) if kind in ("detect", "segment") else 1)
            assert all(example in offered[kind] for example in asked)
    for a in answers:
        assert a.marks == grade(a.example, a.text, a.found)
        assert all(0 < d.score <= 1 for d in a.found)
        assert all(d.mask.shape == SIZE for d in a.found if d.codes)
    monkeypatch.setattr("paligemma_nb.tasks.ap50", lambda a, *kinds, **masks: (kinds, masks))
    again, _ = evaluate(model, processor, num_scenes=3, first_seed=HELD_OUT + 5, batch_size=7)
    assert again.keys() == means.keys() and again["count"] == means["count"]
    assert again["detect"]["ap50"] == ((("detect", "absent"),), {})
    assert again["segment"]["ap50"] == ((("segment", "segment_absent"),), dict(masks=True))
    detect = means["detect"]
    assert f"| detect | {detect['asked']} | {detect['right']:.3f} |" in marks_table(means)
    for num in (0, -1):
        with pytest.raises(ValueError, match="at least one"): evaluate(model, processor, num)


def test_worst_are_the_lowest():
    def marked(seed, kind, **marks): return Marked(seed, Example(kind, "p"), "t", [], marks)
    answers = [marked(seed, kind, iou=iou) for kind in ("detect", "segment")
               for seed, iou in ((3, 0.5), (2, 0.1), (1, 0.1))]
    others = marked(9, "detect", all_found=0.0), marked(9, "count", right=0.0)
    found = worst([*answers, *others], num=2)
    for kind in ("detect", "segment"):
        assert [(w["seed"], w["iou"]) for w in found[kind]] == [(1, 0.1), (2, 0.1)]


@pytest.mark.parametrize("first_seed, warned", [(HELD_OUT, False), (5, True)])
def test_evaluate_names_scenes_of_training(monkeypatch, capsys, first_seed, warned):
    marks, asked = dict(count=dict(right=0.25, asked=40)), []
    monkeypatch.setattr(tasks, "load_model", lambda path: (None, None))
    monkeypatch.setattr(tasks, "evaluate", lambda *a: asked.append(a[2:]) or (marks, []))
    measure(num_scenes=40, first_seed=first_seed)
    printed = capsys.readouterr().out
    assert asked == [(40, first_seed)] and f"40 scenes from seed {first_seed:,} on" in printed
    assert ("may have been trained on" in printed) == warned
