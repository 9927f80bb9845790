"""Practice by rewards: what an answer is worth, gradients against their definitions, runs that
were stopped, the stored runs."""
import json
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from paligemma_nb import load_model, reward as module
from paligemma_nb.attention import answer_probs
from paligemma_nb.detection import Detection, format_detections
from paligemma_nb.generation import generate
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.reward import (
    RewardRecipe, answer_logprobs, clipped_loss, exam, fingerprint, hits_reward, kl_estimate,
    match_reward, named_iou, practice_prompts, practice_step, practise, sample_answers)
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import find_objects
from paligemma_nb.tasks import Example, evaluate, grade, scene_examples
from paligemma_nb.training import Recipe, initialize, tiny_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import reward as bench  # noqa: E402

RECORDS = ROOT / "nbs" / "data" / "37_reward.json"
SMALL = RewardRecipe(steps=4, scenes_per_step=2, samples=3, warmup_steps=1, max_new_tokens=6)


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", dtype="float32")


@pytest.fixture
def fresh(shipped): # as small as may be; its answers are noise
    config = tiny_config(shipped[1])
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2,
                 num_hidden_layers=1)
    config.vision_config = replace(config.vision_config, **sizes)
    config.text_config = replace(config.text_config, head_dim=32, **sizes)
    model = PaliGemmaForConditionalGeneration(config)
    initialize(model, shipped[1])
    return model


# --- rewards

def both(example, text): # match_reward and hits_reward
    found = find_objects(text, (112, 112))
    return match_reward(example, text, found), hits_reward(example, text, found)


def written(objects): return format_detections([Detection(o.name, o.box) for o in objects],
                                               (112, 112))


def several(seed): # two names, each of them there
    scene = make_scene(seed, num_objects=3)
    return [e for e in scene_examples(scene, np.random.default_rng(0))["several"]
            if len({o.name for o in e.objects}) > 1]


@given(seed=st.integers(0, 10**6))
def test_rewards_of_right_answers_and_of_mistakes(seed):
    for example in several(seed):
        true = example.objects
        match, hits = both(example, example.suffix)
        assert 0.95 < match <= 1 and 0.95 * len(true) < hits <= len(true)
        short, long = written(true[1:]), written((*true, true[0]))
        assert both(example, short)[0] < both(example, long)[0] < match
        assert both(example, short)[1] < hits < both(example, long)[1]  # it can be hacked
        twice = written((true[1],) * 2)
        assert both(example, twice)[0] < both(example, written(true[1:2]))[0]
        assert both(example, "") == both(example, "red") == (0, 0)
        other = [Detection("grey cube", o.box) for o in true]
        assert both(example, format_detections(other, (112, 112))) == (0, 0)


def test_the_match_is_an_iou_of_sets():
    example = several(3)[0]
    (x1, y1, x2, y2), *_ = (o.box for o in example.objects)
    half = [Detection(example.objects[0].name, (x1, y1, x2, (y1 + y2) / 2))]
    text = format_detections(half, (112, 112))
    shared = float(named_iou(example, find_objects(text, (112, 112))).max())
    assert shared == pytest.approx(0.5, abs=0.02)
    expected = shared / (1 + len(example.objects) - shared) / 2
    assert both(example, text)[0] == pytest.approx(expected)


def test_words_and_nothing_are_right_or_wrong():
    assert both(Example("where", "…", "yes"), "yes") == (1, 1)
    assert both(Example("where", "…", "yes"), "no") == (0, 0)
    box = written(several(3)[0].objects[:1])
    assert both(Example("absent", "detect red star"), "") == (1, 1)
    assert both(Example("absent", "detect red star"), box) == (0, 0)


# --- probabilities

@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("most", [1, 9])
def test_answers_that_share_a_prompt_have_their_probabilities(shipped, n, most):
    model, processor = shipped
    scenes = [make_scene(s) for s in (1, 2)]
    prompts = "caption en", "detect red star ; blue ring"
    inputs = processor([s.pixels for s in scenes], prompts)
    assert not inputs["attention_mask"].all()  # prompts of other lengths
    rows = {name: x.repeat_interleave(n, 0) for name, x in inputs.items()}
    ids = generate(model, rows, max_new_tokens=most, do_sample=True, temperature=2.0,
                   generator=torch.Generator().manual_seed(0))
    logprobs, counts = answer_logprobs(model, inputs, ids)
    assert torch.allclose(logprobs[counts], answer_probs(model, rows, ids).log()[counts],
                          atol=1e-4)
    eos = model.config.eos_token_ids[0]
    for row, counted in zip(ids.tolist(), counts.tolist()):
        end = row.index(eos) + 1 if eos in row else len(row)
        assert counted == [True] * end + [False] * (len(row) - end)


def test_gradients_pass_through_the_prompt_as_in_training(fresh, shipped):
    processor, scene = shipped[1], make_scene(1)
    names = "red star", "blue ring"
    batch = processor([scene.pixels] * 2, ["detect red star"] * 2, names)
    ids = [row[row != -100].tolist() for row in batch["labels"]]
    longest = max(map(len, ids))
    ids = torch.tensor([row + [processor.pad_token_id] * (longest - len(row)) for row in ids])
    inputs = processor([scene.pixels], ["detect red star"])
    logprobs, counts = answer_logprobs(fresh, inputs, ids)
    found = torch.autograd.grad(-logprobs[counts].mean(), fresh.parameters())
    expected = torch.autograd.grad(fresh(**batch).loss, fresh.parameters())
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


numbers = st.floats(-1.5, 1.5)


@given(now=numbers, before=numbers, advantage=numbers, clip=st.floats(0.05, 0.5))
def test_the_clip_stops_what_has_gone_far_enough_alone(now, before, advantage, clip):
    logprob = torch.tensor([[now]], dtype=torch.float64, requires_grad=True)
    loss = clipped_loss(logprob, torch.tensor([[before]], dtype=torch.float64),
                        torch.tensor([advantage], dtype=torch.float64), clip)
    ratio = np.exp(now - before)
    slope, = torch.autograd.grad(loss.sum(), logprob)
    enough = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    assert slope.item() == pytest.approx(0 if enough else -ratio * advantage)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6))
def test_the_estimate_of_kl_is_right_on_average(weights):
    p, p0 = torch.tensor(weights, dtype=torch.float64).T
    p, p0 = p / p.sum(), p0 / p0.sum()
    estimate = kl_estimate(p.log(), p0.log())
    assert (estimate >= -1e-12).all()
    assert (p * estimate).sum() == pytest.approx((p * (p / p0).log()).sum().item(), abs=1e-9)


# --- a step

def test_a_step_is_the_policy_gradient(fresh, shipped, monkeypatch):
    recipe, processor = replace(SMALL, updates=1, autocast=False), shipped[1]
    marks = iter(np.arange(6) % 4)  # of noise: rewards that differ
    monkeypatch.setitem(module.REWARDS, "match", lambda *_: float(next(marks)))
    asked, kept = practice_prompts(recipe, 0), {}

    def apply(model, *_): kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
    monkeypatch.setattr(module, "apply_gradient", apply)
    told = practice_step(fresh, deepcopy(fresh), processor, {}, asked, recipe, 0)
    assert told["reward"] == pytest.approx(np.mean([0, 1, 2, 3, 0, 1]))
    assert told["kl"] == told["clipped"] == 0  # so far it is where it started

    marks = iter(np.arange(6) % 4)
    seed = int(np.random.default_rng([recipe.seed, 0, 1]).integers(2**31))
    inputs, ids, _, rewards = sample_answers(fresh, processor, asked, recipe, seed)
    advantages = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    logprobs, counts = answer_logprobs(fresh, inputs, ids)
    worth = (advantages * logprobs * counts).sum() / counts.sum()
    for (name, _), slope in zip(fresh.named_parameters(),
                                torch.autograd.grad(-worth, fresh.parameters())):
        assert torch.allclose(kept[name], slope, rtol=1e-3, atol=1e-6), name


def test_equal_rewards_teach_nothing_and_the_start_pulls(fresh, shipped, monkeypatch):
    monkeypatch.setitem(module.REWARDS, "match", lambda *_: 1.0)
    steps, start, asked = [], deepcopy(fresh), practice_prompts(SMALL, 0)
    def apply(model, *_): steps.append(sum(p.grad.norm() for p in model.parameters()).item())
    monkeypatch.setattr(module, "apply_gradient", apply)
    def step(**settings):
        recipe = replace(SMALL, **settings)
        return practice_step(fresh, start, shipped[1], {}, asked, recipe, 0)
    step()
    assert len(steps) == 2 and max(steps) < 1e-6  # one for each update; 0, but for rounding
    with torch.no_grad():
        for p in fresh.language_model.parameters(): p.mul_(1.5)
    assert step(kl=0.0)["kl"] > 0 and max(steps) < 1e-6
    step(kl=0.1)
    assert len(steps) == 6 and min(steps[4:]) > 1e-3


def test_prompts_depend_on_recipe_and_step(shipped):
    asked = practice_prompts(SMALL, 3)
    def told(recipe, step): return [(s.seed, e) for s, e in practice_prompts(recipe, step)]
    assert told(SMALL, 3) == [(s.seed, e) for s, e in asked] != told(SMALL, 2)
    assert told(replace(SMALL, seed=1), 3) != told(SMALL, 3)
    assert {e.kind for _, e in asked} == {"several"}
    assert max(s.seed for s, _ in asked) < HELD_OUT
    words = replace(SMALL, kind_weights=dict(where=1, count=1), scenes_per_step=20)
    assert {e.kind for _, e in practice_prompts(words, 0)} <= {"where", "count"}


@pytest.mark.parametrize("settings, said", [
    (dict(reward="beauty"), "a reward of match, hits, got 'beauty'"),
    (dict(samples=1), "nothing to be compared with"), (dict(steps=0), "steps: expected more"),
    (dict(clip=0), "clip: expected more than 0, got 0"), (dict(updates=0), "updates"),
    (dict(scenes_per_step=2, updates=3), "2 prompts do not make 3 equal updates"),
    (dict(kl=-0.1), "kl: expected 0 or more"), (dict(warmup_steps=0), "warmup_steps")])
def test_recipes_that_could_not_do_what_they_say(settings, said):
    with pytest.raises(ValueError, match=said): RewardRecipe(**settings)


def test_rates_rise_and_fall():
    recipe = RewardRecipe()
    rates = [recipe.rates(step)["adamw"] for step in range(recipe.steps)]
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.05 * recipe.learning_rate and top == recipe.warmup_steps - 1
    for step in (-1, recipe.steps):
        with pytest.raises(ValueError, match="no step"): recipe.rates(step)


# --- runs

def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, fresh, shipped, monkeypatch):
    monkeypatch.setitem(module.REWARDS, "match", lambda example, text, found: len(text) % 5)
    def run(name, model): return practise(tmp_path / name, model, shipped[1], SMALL, 2, 3)
    whole, halves, first = deepcopy(fresh), deepcopy(fresh), fingerprint(fresh)
    history = run("whole", whole)
    assert [row["step"] for row in history] == [2, 4]
    assert [len(row["marks"]["log"]) for row in history] == [2, 2]
    logged = [entry["reward"] for row in history for entry in row["marks"]["log"]]
    assert np.mean(logged) == pytest.approx(-np.mean([row["loss"] for row in history]))

    step = practice_step
    def stopped(*args):
        if args[-1] == 3: raise KeyboardInterrupt
        return step(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "practice_step", stopped)
        run("halves", halves)
    again = run("halves", deepcopy(fresh))
    for row in history + again: row.pop("seconds")
    assert again == history and fingerprint(fresh) == first != fingerprint(whole)
    with pytest.raises(ValueError, match="another recipe: expected start"):
        run("halves", whole)


def test_the_exam_is_what_evaluate_asks_and_marks(shipped):
    model, processor = shipped
    right, answers = exam(model, processor, dict(caption=1), 12, HELD_OUT, batch_size=5)
    assert right == np.mean([a.marks["right"] for a in answers])
    assert [a.seed for a in answers] == [*range(HELD_OUT, HELD_OUT + 12)]
    marks, _ = evaluate(model, processor, 12)
    assert abs(right - marks["caption"]["right"]) < 0.2 and right > 0.8


def test_a_fingerprint_sees_every_number(fresh):
    first = fingerprint(fresh)
    with torch.no_grad(): fresh.language_model.model.norm.weight[-1] += 1e-6
    assert fingerprint(fresh) != first == first.lower() and len(first) == 16


# --- the script, and what it stored

def small_recipes(monkeypatch):
    reward_recipe, plain_recipe = bench.reward_recipe, bench.plain_recipe
    monkeypatch.setattr(bench, "EVERY", 2)
    monkeypatch.setattr(bench, "reward_recipe", lambda kind, seed: replace(
        reward_recipe(kind, seed), steps=4, scenes_per_step=2, samples=2, max_new_tokens=3))
    monkeypatch.setattr(bench, "plain_recipe", lambda kind, seed: replace(
        plain_recipe(kind, seed), steps=6, scenes_per_step=4, warmup_steps=1, decay_steps=6))


def test_one_command_repeats_all_runs_that_are_missing(tmp_path, monkeypatch, capsys):
    small_recipes(monkeypatch)
    marks = {kind: dict(right=0.5) for kind in ("caption", "where", "count")}
    monkeypatch.setattr(bench, "told", lambda *_: dict(right=0.5, answers=[], marks=marks))
    monkeypatch.setattr(module, "exam", lambda *_: (0.5, []))
    monkeypatch.setattr(bench, "ALL", (("practice", 1), ("plain", 0), ("hasty", 0)))
    output = tmp_path / "out.json"
    bench.all_runs(tmp_path, output)
    stored = json.loads(output.read_text())
    assert [(r["kind"], r["seed"]) for r in stored["runs"]] == [*bench.ALL]
    assert [r["history"][-1]["step"] for r in stored["runs"]] == [4, 6, 6]
    assert all(r["start"] == stored["start"] for r in stored["runs"])
    assert stored["runs"][2]["recipe"]["muon_lr"] > stored["runs"][1]["recipe"]["muon_lr"]
    assert "| practice | 1 |" in capsys.readouterr().out

    path = tmp_path / "plain-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(start="others")))
    with pytest.raises(SystemExit, match="holds a run from weights others"):
        bench.all_runs(tmp_path, output)  # which runs none of them again
    assert json.loads(output.read_text()) == stored


def test_plain_training_sees_what_practice_sees(tmp_path, monkeypatch, shipped):
    small_recipes(monkeypatch)
    def seen(kind, first, seed=0):
        def run_steps(folder, model, optimizers, recipe, batches, measure, *every):
            found = batches(first)
            return [next(found) for _ in range(first, recipe.steps)]
        monkeypatch.setattr("paligemma_nb.training.run_steps", run_steps)
        recipe, practice = bench.plain_recipe(kind, seed), bench.reward_recipe(kind, 0)
        some = bench.train_plainly(tmp_path, *shipped, recipe, practice, kind == "fresh")
        return [sorted(map(tuple, x["pixel_values"].flatten(1)[:, :9].tolist())) for x in some]
    recipe = bench.reward_recipe("practice", 0)
    pictures = [scene.pixels for k in range(4) for scene, _ in practice_prompts(recipe, k)]
    inputs = shipped[1](pictures, ["caption en"] * 8)["pixel_values"]
    once = sorted(map(tuple, inputs.flatten(1)[:, :9].tolist()))
    plain = seen("plain", 0)
    for i in (0, 2, 4): assert sorted(plain[i] + plain[i + 1]) == once  # in each pass
    assert plain[0] != plain[2] and seen("plain", 3) == plain[3:]
    assert seen("plain", 0, seed=1) != plain
    fresh = [x for batch in seen("fresh", 0) for x in batch]
    assert len({*fresh}) == len(fresh) == 24 and not {*fresh} & {*once}


@pytest.fixture(scope="module")
def stored(): return json.loads(RECORDS.read_text())


def test_stored_runs_belong_to_their_recipes(stored):
    for r in stored["runs"]:
        name, rows = (r["kind"], r["seed"]), r["history"]
        assert r["start"] == stored["start"] and r["machine"], name
        if r["kind"] in bench.PLAIN: expected = bench.plain_recipe(*name)
        else: expected = replace(bench.reward_recipe(*name), start=stored["start"])
        assert type(expected)(**r["recipe"]) == expected, name
        every = bench.EVERY * expected.steps // bench.reward_recipe("plain", 0).steps
        if r["kind"] not in bench.PLAIN: every = bench.EVERY
        steps = [*range(every, expected.steps, every), expected.steps]
        assert [row["step"] for row in rows] == steps, name
    assert {(r["kind"], r["seed"]) for r in stored["runs"]} == {*bench.ALL}


def test_stored_steps_asked_what_their_recipe_asks(stored):
    for r in stored["runs"]:
        if r["kind"] in bench.PLAIN: continue
        recipe, log = RewardRecipe(**r["recipe"]), [e for row in r["history"]
                                                    for e in row["marks"]["log"]]
        assert len(log) == recipe.steps
        for step in range(0, recipe.steps, 7):
            asked = practice_prompts(recipe, step)
            objects = np.mean([len(example.objects) for _, example in asked])
            assert log[step]["objects"] == pytest.approx(objects, abs=1e-4)


def test_stored_marks_are_those_of_the_start(stored, shipped):
    _, answers = exam(*shipped, bench.SEVERAL, 40, HELD_OUT)
    told = stored["before"]["answers"]
    assert [(a["seed"], a["prompt"]) for a in told] == [
        (a.seed, a.example.prompt) for a in answers]
    marks = [grade(a.example, x["text"], find_objects(x["text"], (112, 112)))["all_found"]
             for a, x in zip(answers, told, strict=True)]
    assert abs(np.mean(marks) - stored["before"]["right"]) < .15  # of 40 and of 1,000
    if fingerprint(shipped[0]) == stored["start"]: # where they began, they are repeated
        same = sum(a.text == x["text"] for a, x in zip(answers, told))
        assert same >= 20  # a processor's rounding may move a box by a bin


def test_stored_times_can_be_compared(stored):
    seconds = {(r["kind"], r["seed"]): bench.seconds(r) for r in stored["runs"]}
    practice = np.mean([s for (kind, _), s in seconds.items() if kind == "practice"])
    for (kind, _), s in seconds.items():
        if kind in bench.PLAIN: assert 0.75 < s / practice < 1.5
