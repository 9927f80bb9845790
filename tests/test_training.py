"""Training: batches, loss, resuming; and the shipped model, which training made."""
import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import paligemma_nb
from paligemma_nb import kernels, load_model, tasks, training
from paligemma_nb.generation import generate
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.processing import EXTRA_TOKENS, PaliGemmaProcessor
from paligemma_nb.scenes import HELD_OUT, VALIDATION, make_scene
from paligemma_nb.tasks import KIND_WEIGHTS, Example, Marked, evaluate, sample_examples
from paligemma_nb.training import (
    STAGES, Muon, Recipe, batch_loss, initialize, load_state, make_batch,
    make_optimizers, save_state, save_trained, tiny_config,
    tiny_processor, train, train_step, train_tiny, waves)

TINY = Path(paligemma_nb.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", dtype="float32")


def new_model(processor, layers):
    "As small as may be, before its first step"
    config = tiny_config(processor)
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2,
                 num_hidden_layers=layers)
    config.vision_config = replace(config.vision_config, **sizes)
    config.text_config = replace(config.text_config, head_dim=32, **sizes)
    model = PaliGemmaForConditionalGeneration(config)
    initialize(model, processor)
    return model


@pytest.fixture
def fresh(shipped): return new_model(shipped[1], layers=1)


# --- batches, loss

def test_examples_cover_every_kind_and_are_drawn_by_weight():
    rng = np.random.default_rng(0)
    drawn = [e.kind for seed in range(200) for e in sample_examples(make_scene(seed), 2, rng)]
    assert set(drawn) == set(KIND_WEIGHTS)
    assert drawn.count("detect") > drawn.count("caption") > drawn.count("absent")
    assert set(STAGES[0].kind_weights) == set(STAGES[1].kind_weights) == set(KIND_WEIGHTS)
    last = STAGES[-1].kind_weights
    scenes = map(make_scene, range(300))
    drawn = {e.kind for scene in scenes for e in sample_examples(scene, 2, rng, last)}
    later = "segment", "segment_absent", "several", "several_absent", "unanswerable"
    assert drawn == set(last) == {*KIND_WEIGHTS, *later}


def test_the_vocabulary_is_the_shipped_one(shipped):
    assert tiny_processor().tokenizer.to_str() == shipped[1].tokenizer.to_str()


def test_a_batch_depends_on_recipe_and_step_alone(shipped):
    _, processor = shipped
    recipe = Recipe(scenes_per_step=3)
    a, b, later = (make_batch(processor, recipe, step) for step in (5, 5, 6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["pixel_values"], later["pixel_values"])
    assert ((a["labels"] != -100) == (a["token_type_ids"] == 1)).all()
    assert (a["labels"][:, -1] == processor.eos_token_id).all()


def test_no_training_scene_is_held_out(monkeypatch, shipped):
    seeds = []
    def noted(seed, *args, **kwargs):
        seeds.append(seed)
        return make_scene(seed, *args, **kwargs)
    monkeypatch.setattr(training, "make_scene", noted)
    for stage in STAGES:
        for step in range(0, stage.steps, 500): make_batch(shipped[1], stage, step)
    assert len(seeds) > 400 and max(seeds) < HELD_OUT


def test_shared_pictures_give_the_plain_loss(shipped):
    model, processor = shipped
    batch = make_batch(processor, Recipe(scenes_per_step=3, single_object_steps=0), 0)
    plain = model(**batch).loss
    torch.testing.assert_close(batch_loss(model, batch), plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(batch_loss(model, batch), plain, rtol=1e-5, atol=0)


def test_length_power_weighs_tokens_by_the_length_of_their_answer(shipped, fresh):
    batch = make_batch(shipped[1], Recipe(scenes_per_step=3, single_object_steps=0), 1)
    rows = [{name: x[i:i + 1] for name, x in batch.items()} for i in range(6)]
    losses = torch.stack([fresh(**row).loss for row in rows])
    lengths = batch["token_type_ids"].sum(1)
    for power in (0, 0.5, 1):
        weights = lengths ** (1 - power)  # of a row: of lengths tokens, each lengths ** -power
        expected = (weights * losses).sum() / weights.sum()
        found = batch_loss(fresh, batch, power)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_rows_may_come_in_any_order(shipped):
    "Rows of one's own: without a common picture, with one by chance, or padded on the right"
    model, processor = shipped
    scenes = [make_scene(seed) for seed in (1, 1, 2, 1)]
    # the end is a surprise: a loss of nearly 0 would be all rounding
    pictures, texts = zip(*((s.pixels, f"{s.caption}, seen twice") for s in scenes))
    batch = processor(list(pictures), ["caption en"] * 4, list(texts))
    expected = model(**batch).loss
    for order in ([0, 1, 2, 3], [2, 0, 1, 3], [0, 2, 1, 3]):
        rows = {name: x[order] for name, x in batch.items()}
        torch.testing.assert_close(batch_loss(model, rows), expected, rtol=1e-4, atol=0)
    pictures = batch["pixel_values"]
    swapped = batch | dict(pixel_values=torch.cat((pictures[1:], pictures[:1])))
    found = batch_loss(model, swapped)
    torch.testing.assert_close(found, model(**swapped).loss, rtol=1e-4, atol=0)
    assert abs(found - expected) > 1
    pads = (batch["attention_mask"] == 0).sum(1).tolist()
    right = batch | {name: torch.stack([x.roll(-n) for x, n in zip(batch[name], pads)])
                     for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    assert max(pads) > 0
    torch.testing.assert_close(batch_loss(model, right), expected, rtol=1e-4, atol=0)


def test_each_picture_is_seen_once(shipped, monkeypatch):
    model, processor = shipped
    batch, seen = make_batch(processor, Recipe(scenes_per_step=3, prompts_per_scene=4), 0), []
    see = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda x: seen.append(len(x)) or see(x))
    batch_loss(model, batch)
    assert seen == [3] and len(batch["input_ids"]) == 12


def test_the_loss_is_taken_in_float32(shipped):
    _, processor = shipped
    model = load_model(device="cpu", dtype="bfloat16")[0]
    batch = make_batch(processor, Recipe(scenes_per_step=2, prompts_per_scene=1), 0)
    kept = int((batch["labels"] != -100).sum(1).max()) + 1
    labels = batch["labels"][:, 1 - kept:]
    logits = model(**batch | dict(labels=None), logits_to_keep=kept).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    loss = batch_loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(labels=None), "no labels"),
    (dict(labels=-100), "no labels"),
    (dict(token_type_ids=0), "token_type_ids of 1"),
])
def test_batches_without_answers_or_with_leaks_are_refused(shipped, change, message):
    model, processor = shipped
    batch = make_batch(processor, Recipe(scenes_per_step=1), 0)
    for name, value in change.items():
        if value is None: del batch[name]
        else: batch[name] = torch.full_like(batch[name], value)
    with pytest.raises(ValueError, match=message): batch_loss(model, batch)


def test_a_row_without_labels_changes_nothing(shipped):
    model, processor = shipped
    batch = make_batch(processor, Recipe(scenes_per_step=1), 0)
    one = {name: x[:1] for name, x in batch.items()}
    batch["labels"][1] = -100
    for power in (0, 0.5):
        found, expected = (batch_loss(model, rows, power) for rows in (batch, one))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


# --- the first steps

PARTS = dict(patch_embedding="patches", position_embedding="positions", linear="projector",
             embed_tokens="tokens")
OUTPUTS = "out_proj", "fc2", "o_proj", "down_proj"

def group_of(name):
    "What kind of parameter it is"
    part, kind = name.split(".")[-2:]
    if kind == "bias" or "norm" in part: return "biases" if kind == "bias" else "norms"
    if part in PARTS: return PARTS[part]
    side = "vision" if name.startswith("vision_tower") else "text"
    return side + ("_output" if part in OUTPUTS else "_input")


def lengths(tensors):
    "Names and tensors -> for each group of parameters the length of all of them together"
    groups = {}
    for name, x in tensors: groups.setdefault(group_of(name), []).append(x.detach().double())
    return {group: torch.cat([x.flatten() for x in xs]).norm().item()
            for group, xs in groups.items()}


def first_steps(tokenizer):
    """Five steps of a small model in float32, on one thread -> the losses; and for each group
    of parameters its length after the first step and after the last, that of the way from
    start to end, of the running means, and of those of squares."""
    processor = PaliGemmaProcessor(tokenizer, image_size=56, num_image_tokens=16)
    model = new_model(processor, layers=2)
    recipe = Recipe(steps=5, single_object_steps=2, scenes_per_step=3, muon_lr=0.03,
                    adamw_lr=0.01, warmup_steps=3, decay_steps=3, max_grad_norm=0.5, seed=3,
                    length_power=0.5, kind_weights=STAGES[3].kind_weights, autocast=False)
    optimizers = make_optimizers(model, recipe)
    named = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    losses, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(5):
        batch = make_batch(processor, recipe, step)
        losses.append(train_step(model, optimizers, batch, recipe, step))
        if step == 0: measured = [lengths(named.items())]
    torch.set_num_threads(threads)
    measured += [lengths(named.items()), lengths((n, p - start[n]) for n, p in named.items())]
    states = {n: o.state[p] for n, p in named.items()
              for o in optimizers.values() if p in o.state}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        measured.append(lengths((n, s[key]) for n, s in states.items() if key in s))
    return dict(loss=losses) | {
        group: [found[group] for found in measured if group in found] for group in measured[0]}


# What `first_steps` gives. Under ten settings (ATen, NumPy, oneDNN and MKL held to AVX-512
# without bf16, to AVX2, to SSE4.1) no number moved by more than 3e-6 of itself.
FIRST_STEPS = """
loss          9.0164433     8.4215355     8.3963766     7.8355393     7.3463402
patches       8.0128101     8.3598314     2.4528658     0.0011341086  3.9080092e-08
biases        0             0.39025964    0.39025964    0.0010354347  1.0647804e-07
positions     16            16.066576     0.43621858    9.8357675e-05 8.4906191e-10
norms         17.888564     17.905842     0.35113515    0.026449512   8.8030709e-05
vision_input  25.262535     25.270258     0.93268765    7.8932847e-05
vision_output 0             1.2384058     1.2384058     0.0015221154
projector     8.0412392     8.069334      0.82392359    0.001784071   3.9480167e-07
tokens        39.648491     38.061314     6.6646408     0.080748287   0.00059049481
text_input    27.766916     27.877738     1.7882129     0.0041526076
text_output   0.1298925     1.5173112     1.5173112     0.045172108
"""


def test_the_first_steps_are_the_pinned_ones(shipped):
    found = first_steps(shipped[1].tokenizer)
    rows = [line.split() for line in FIRST_STEPS.strip().splitlines()]
    assert [row[0] for row in rows] == list(found)
    for group, *numbers in rows:
        first, *others = map(float, numbers)
        assert found[group][0] == pytest.approx(first, rel=1e-6, abs=0), group
        assert found[group][1:] == pytest.approx(others, rel=1e-5, abs=0), group


# --- the run

def test_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, warmup_steps=10, decay_steps=50)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1 and rates[-1] == 1 / 50
    assert rates[9:51] == [1] * 42


@pytest.mark.parametrize("change", [
    dict(steps=60), dict(steps=10, warmup_steps=4, decay_steps=8), dict(warmup_steps=0),
    dict(decay_steps=0), dict(scenes_per_step=0), dict(max_grad_norm=0),
    dict(max_grad_norm=-1), dict(max_grad_norm=float("nan")),
    dict(prompts_per_scene=0), dict(prompts_per_scene=9),
    dict(kind_weights=dict(caption=1, where=0)), dict(kind_weights=dict(caption=1, cap=1)),
    dict(kind_weights=dict(caption=1, count=1, where=-1)),
])
def test_recipes_that_could_not_do_what_they_say_are_refused(change):
    with pytest.raises(ValueError, match="expected|never peak"): Recipe(**change)


def test_the_rate_just_reaches_its_peak():
    recipe = Recipe(steps=10, warmup_steps=4, decay_steps=7)
    assert [recipe.rate(step) for step in (2, 3, 4)] == [3 / 4, 1, 6 / 7]
    for step in (-1, 10):
        with pytest.raises(ValueError, match=f"no step {step} among 10"): recipe.rate(step)


def test_scenes_without_enough_kinds_are_named():
    scene, rng = make_scene(1, num_objects=1), np.random.default_rng(0)
    with pytest.raises(ValueError, match="scene 1 offers .*caption"):
        sample_examples(scene, 2, rng, dict(caption=1, where=1))
    (only,) = sample_examples(scene, 1, rng, dict(caption=1, detect=0))
    assert only.kind == "caption"


def test_only_whole_weights_in_float32_are_trained(fresh):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"float32.*got .*{dtype}"):
            make_optimizers(fresh.to(dtype), Recipe())
    with pytest.raises(ValueError, match="got 0 matrices"):
        make_optimizers(torch.nn.Linear(2, 2), Recipe())


def test_a_step_that_is_not_finite_changes_nothing(shipped, fresh):
    recipe = Recipe(scenes_per_step=1)
    optimizers, batch = make_optimizers(fresh, recipe), make_batch(shipped[1], recipe, 0)
    before = [p.detach().clone() for p in fresh.parameters()]
    black = batch | dict(pixel_values=batch["pixel_values"] * torch.nan)
    with pytest.raises(ValueError, match="step 3: loss nan"):
        train_step(fresh, optimizers, black, recipe, 3)
    fresh.vision_tower.requires_grad_(False)
    fresh.language_model.model.norm.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(ValueError, match="norm of its gradient (inf|nan)"):
        train_step(fresh, optimizers, batch, recipe, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters()))


def test_gradients_from_before_do_not_count(shipped, fresh):
    recipe = Recipe(scenes_per_step=1, warmup_steps=1, autocast=False)
    batch = make_batch(shipped[1], recipe, 0)
    start = {name: t.clone() for name, t in fresh.state_dict().items()}
    def stepped():
        train_step(fresh, make_optimizers(fresh, recipe), batch, recipe, 0)
        return [p.detach().clone() for p in fresh.parameters()]
    expected = stepped()
    fresh.load_state_dict(start)
    batch_loss(fresh, make_batch(shipped[1], recipe, 1)).backward()
    assert all(torch.equal(a, b) for a, b in zip(stepped(), expected))


def test_precision_is_the_recipes(shipped, fresh, monkeypatch):
    batch, dtypes = make_batch(shipped[1], Recipe(scenes_per_step=1), 0), []
    projector = fresh.multi_modal_projector
    projector.register_forward_hook(lambda module, x, out: dtypes.append(out.dtype))
    for fast, autocast in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(fast, False, False))
        recipe = Recipe(scenes_per_step=1, autocast=autocast)
        train_step(fresh, make_optimizers(fresh, recipe), batch, recipe, 0)
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_muon_is_pytorchs_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # it would take that
    shapes = (7, 11), (11, 7), (5, 5), (3, 40)
    def walk(optimizer):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        idle = torch.nn.Parameter(torch.ones(2, 2))  # no gradient reaches it
        steps = optimizer([*weights, idle], lr=.02, weight_decay=.1,
                          adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            for w in weights: w.grad = torch.randn(w.shape, generator=generator)
            steps.step()
        weights[1].grad.zero_()
        steps.step()
        return [*weights, idle], steps.state_dict()["state"]
    (ours, kept), (theirs, expected) = walk(Muon), walk(torch.optim.Muon)
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-5,
                                                                           atol=1e-6)
    assert kept.keys() == expected.keys()
    for i, state in expected.items(): torch.testing.assert_close(kept[i], state)


def test_waves_need_pairs():
    assert waves(torch.zeros(3), 4, 1).shape == (3, 4)
    with pytest.raises(ValueError, match="even"): waves(torch.zeros(3), 5, 1)


def test_exams_need_not_fall_on_saves(tmp_path, shipped, fresh, monkeypatch):
    recipe, exams = Recipe(steps=5, scenes_per_step=1, warmup_steps=1, decay_steps=2), []
    monkeypatch.setattr(training, "train_step", lambda *a: float(a[-1]))
    monkeypatch.setattr(training, "evaluate", lambda *a: exams.append(a[2:]) or ({}, []))
    history = train(tmp_path, fresh, shipped[1], recipe, save_every=2, evaluate_every=3,
                    num_scenes=7)
    assert [(row["step"], row["loss"], "marks" in row) for row in history] == [
        (2, 0.5, False), (3, 2, True), (4, 3, False), (5, 4, True)]
    assert exams == [(7, VALIDATION)] * 2 and VALIDATION >= HELD_OUT + 1_000
    for wrong in (dict(save_every=0), dict(evaluate_every=0)):
        with pytest.raises(ValueError, match="positive"):
            train(tmp_path / "x", fresh, shipped[1], recipe, **wrong)


def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path, shipped, fresh):
    _, processor = shipped
    recipe = Recipe(steps=4, scenes_per_step=2, warmup_steps=1, decay_steps=2)
    start = {name: t.clone() for name, t in fresh.state_dict().items()}
    often = dict(save_every=1, evaluate_every=99, num_scenes=1)
    whole = train(tmp_path / "whole", fresh, processor, recipe, **often)

    class Stop(Exception): pass
    class Stopping:  # a processor that fails before the third batch
        calls, image_size = 0, processor.image_size
        def __call__(self, *arguments):
            self.calls += 1
            if self.calls == 3: raise Stop
            return processor(*arguments)

    fresh.load_state_dict(start)
    with pytest.raises(Stop): train(tmp_path / "stopped", fresh, Stopping(), recipe, **often)
    initialize(fresh, processor, seed=7)  # what the state must replace
    resumed = train(tmp_path / "stopped", fresh, processor, recipe, **often)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    losses = ([row["loss"] for row in rows] for rows in (resumed, whole))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_save_cut_short_leaves_the_old_state(tmp_path, fresh, monkeypatch):
    recipe, path = Recipe(), tmp_path / "state.safetensors"
    optimizers = make_optimizers(fresh, recipe)
    save_state(path, fresh, optimizers, 7, recipe, [])
    assert list(tmp_path.iterdir()) == [path]

    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr("paligemma_nb.checkpoint.save_file", killed)
    with pytest.raises(KeyboardInterrupt): save_state(path, fresh, optimizers, 8, recipe, [])
    assert load_state(path, fresh, optimizers, recipe) == (7, [])


def test_states_of_others_are_refused(tmp_path, shipped, fresh):
    recipe, path = Recipe(), tmp_path / "state.safetensors"
    optimizers = make_optimizers(fresh, recipe)
    save_state(path, fresh, optimizers, 7, recipe, [])
    with pytest.raises(ValueError, match="another recipe: expected seed 1, got 0$"):
        load_state(path, fresh, optimizers, replace(recipe, seed=1))
    other = new_model(shipped[1], layers=2)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="another model: expected .*layers.1"):
        load_state(path, other, make_optimizers(other, recipe), recipe)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(ValueError, match="damaged"):
        load_state(path, fresh, optimizers, recipe)
    with pytest.raises(ValueError, match="no file of save_state"):
        load_state(TINY / "model.safetensors", fresh, optimizers, recipe)


def test_a_state_from_before_a_setting_was_there_has_its_default(tmp_path, fresh, monkeypatch):
    recipe, path = Recipe(), tmp_path / "state.safetensors"
    optimizers, write = make_optimizers(fresh, recipe), save_file
    def without(tensors, file, metadata):
        theirs = json.loads(metadata["recipe"])
        del theirs["autocast"]
        write(tensors, file, metadata | dict(recipe=json.dumps(theirs)))
    monkeypatch.setattr("paligemma_nb.checkpoint.save_file", without)
    save_state(path, fresh, optimizers, 7, recipe, [])
    assert load_state(path, fresh, optimizers, recipe) == (7, [])
    with pytest.raises(ValueError, match="expected autocast False, got True"):
        load_state(path, fresh, optimizers, replace(recipe, autocast=False))


# --- the command

def test_the_shipped_model_is_made_stage_by_stage(tmp_path, shipped, monkeypatch):
    runs, saved = [], []
    def run(folder, model, processor, recipe):
        runs.append((folder, recipe))
        return [dict(step=recipe.steps)]
    monkeypatch.setattr(training, "tiny_processor", lambda: shipped[1])
    monkeypatch.setattr(training, "train", run)
    monkeypatch.setattr(training, "save_trained", lambda *a: saved.append(a))
    train_tiny(str(tmp_path))
    assert runs == [(tmp_path / f"stage{i}", recipe) for i, recipe in enumerate(STAGES, 1)]
    (folder, _, _, stages, history), = saved
    assert folder == tmp_path / "model" and stages == STAGES
    assert history == [dict(step=recipe.steps, stage=i) for i, recipe in enumerate(STAGES, 1)]


def test_further_stages_start_from_a_model_of_the_first_ones(tmp_path, shipped, monkeypatch):
    story = tmp_path / "first" / "history.json"
    story.parent.mkdir()
    rows = [dict(step=recipe.steps, stage=i) for i, recipe in enumerate(STAGES[:2], 1)]
    runs, saved = [], []
    monkeypatch.setattr(training, "load_model", lambda path, dtype: shipped)  # in float32
    monkeypatch.setattr(training, "train", lambda *a: runs.append(a[3]) or [dict(step=1)])
    monkeypatch.setattr(training, "save_trained", lambda *a: saved.append(a))
    write = lambda stages: story.write_text(json.dumps(dict(
        stages=[asdict(recipe) for recipe in stages], rows=rows)))
    write(STAGES[:2])
    train_tiny(str(tmp_path / "run"), str(story.parent))
    assert runs == [*STAGES[2:]]
    (_, model, _, stages, history), = saved
    assert model is shipped[0] and stages == STAGES and history[:2] == rows
    assert [row["stage"] for row in history] == [*range(1, len(STAGES) + 1)]
    for others in ([], STAGES[1:2], [replace(STAGES[0], seed=7)], STAGES + STAGES):
        write(others)
        with pytest.raises(ValueError, match=f"has {len(others)} stages that are not"):
            train_tiny(str(tmp_path / "run"), str(story.parent))


def test_what_is_saved_says_how_it_was_examined(tmp_path, shipped, monkeypatch):
    marks, asked = dict(count=dict(right=0.25, asked=40)), []
    example = Example("count", "p", "2")
    failed = [Marked(seed, example, "3", [], dict(right=0.)) for seed in range(40)]
    monkeypatch.setattr(tasks, "evaluate",
                        lambda *a: asked.append(a[2:]) or (marks, failed))
    rows = [dict(step=1, loss=1, seconds=30, marks={}),  # before machines were noted
            dict(step=2, loss=1, seconds=30, marks={}, machine="a lamp")]
    save_trained(tmp_path, *shipped, [Recipe()], rows, num_scenes=9)
    results = json.loads((tmp_path / "results.json").read_text())
    assert asked == [(9,)] and (results["num_scenes"], results["first_seed"]) == (9, HELD_OUT)
    assert results["marks"] == marks
    history = json.loads((tmp_path / "history.json").read_text())
    assert [Recipe(**recipe) for recipe in history["stages"]] == [Recipe()]
    card = (tmp_path / "README.md").read_text()
    assert "| count | 40 | 0.250 |" in card
    assert "1 minutes; a machine that was not noted, then a lamp." in card
    shown = [line.split()[1] for line in card.splitlines() if line.endswith("| p | 2 | 3 |")]
    assert shown == [str(seed) for seed in range(0, 40, 4)]  # spread over the failures


# --- the shipped model

def test_shipped_folder_is_small_and_complete(shipped):
    model, processor = shipped
    assert sum(p.stat().st_size for p in TINY.iterdir()) <= 16e6
    files = ("config.json", "model.safetensors", "tokenizer.json", "results.json",
             "history.json", "README.md")
    assert {*files} <= {p.name for p in TINY.iterdir()}
    assert len(EXTRA_TOKENS) == 1024 + 128
    assert all(processor.tokenizer.token_to_id(token) is not None for token in EXTRA_TOKENS)
    text = "Ein Bär, 一只熊, 🐻\t<loc0007>  end"
    assert processor.decode(processor.encode(text)) == text


def test_shipped_model_does_what_its_card_says(shipped):
    "60 of the scenes of the card's results; the bounds leave room for so small a sample."
    results, _ = evaluate(*shipped, num_scenes=60)
    assert results["caption"]["right"] >= 0.8 and results["count"]["right"] >= 0.85
    sure = "color", "shape", "exists", "absent", "segment_absent"
    assert all(results[kind]["right"] >= 0.9 for kind in sure)
    assert results["detect"]["iou"] >= 0.8 and results["detect"]["ap50"] >= 0.85
    assert results["segment"]["iou"] >= 0.7 and results["segment"]["over_half"] >= 0.8


def test_greedy_text_equals_transformers_on_200_prompts(shipped):
    from transformers import PaliGemmaForConditionalGeneration as Theirs
    model, processor = shipped
    theirs = Theirs.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    theirs.eval()
    rng, asked = np.random.default_rng(0), []
    for seed in range(HELD_OUT + 2_000, HELD_OUT + 2_100):
        scene = make_scene(seed)
        examples = sample_examples(scene, 2, rng, STAGES[-1].kind_weights)
        asked += [(scene.pixels, e.prompt) for e in examples]
    for start in range(0, 200, 50):
        pixels, prompts = zip(*asked[start:start + 50])
        inputs = processor(list(pixels), list(prompts))
        expected = theirs.generate(**inputs, max_new_tokens=48, do_sample=False)
        expected = expected[:, inputs["input_ids"].shape[1]:]
        ours = generate(model, inputs, max_new_tokens=48)
        assert processor.decode(ours) == processor.decode(expected)


def test_the_commands_are_the_functions(monkeypatch, capsys):
    from paligemma_nb import finetuning, inference
    assert inference.main(["evaluate", "--model_path", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "nowhere" in err
    called = []
    def measured(model_path: str | None = None, num_scenes: int = 1, first_seed: int = 2):
        called.append((model_path, num_scenes, first_seed))
    def trained(output_path: str = "runs/tiny", model_path: str | None = None):
        called.append((output_path, model_path))
    monkeypatch.setattr(finetuning, "measure", measured)
    monkeypatch.setattr(training, "train_tiny", trained)
    assert inference.main(["evaluate", "--num_scenes=7"]) == 0
    assert inference.main(["train", "--output-path", "7"]) == 0
    assert called == [(None, 7, HELD_OUT), ("7", None)]


@pytest.mark.parametrize("power", [0, .5])
def test_a_batch_in_parts_is_the_whole_batch(power, shipped):
    model, processor = deepcopy(shipped[0]), shipped[1]
    scenes = [make_scene(seed) for seed in range(3)]
    suffixes = ["a", scenes[1].caption, "two words"]  # a mean of means would be another loss
    rows = list(zip([s.pixels for s in scenes], ["caption en"] * 3, suffixes))
    recipe, got = replace(STAGES[0], autocast=False, length_power=power), []
    for parts in [rows], [rows[:1], rows[1:]]:
        batches = [processor(*map(list, zip(*part))) for part in parts]
        model.load_state_dict(shipped[0].state_dict())
        loss = train_step(model, make_optimizers(model, recipe), batches, recipe, 0)
        got.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (one, whole), (two, summed) = got
    assert two == pytest.approx(one, rel=1e-5)
    assert (whole - summed).norm() < 1e-5 * whole.norm()
