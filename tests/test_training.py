"""Training: batches, loss, resuming; and the shipped model, which training made."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import paligemma_nb
from paligemma_nb.checkpoint import load_model
from paligemma_nb.generation import generate
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.processing import EXTRA_TOKENS
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.tasks import evaluate
from paligemma_nb.training import (KIND_WEIGHTS, STAGES, Recipe, batch_loss, initialize, load_state, make_batch,
                                   make_optimizers, sample_examples, save_state, tiny_config, tiny_processor, train)

TINY = Path(paligemma_nb.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", dtype="float32")


@pytest.fixture
def fresh(shipped):
    _, processor = shipped
    config = tiny_config(processor)
    config.text_config = replace(config.text_config, num_hidden_layers=1)
    config.vision_config = replace(config.vision_config, num_hidden_layers=1)
    model = PaliGemmaForConditionalGeneration(config)
    initialize(model, processor)
    return model


# --- batches, loss

def test_examples_cover_every_kind_and_are_drawn_by_weight():
    rng = np.random.default_rng(0)
    drawn = [e.kind for seed in range(200) for e in sample_examples(make_scene(seed), 2, rng)]
    assert set(drawn) == set(KIND_WEIGHTS)
    assert drawn.count("detect") > drawn.count("caption") > drawn.count("absent")
    assert set(STAGES[0].kind_weights) == set(STAGES[1].kind_weights) == set(KIND_WEIGHTS)
    last = STAGES[-1].kind_weights
    drawn = {e.kind for seed in range(300) for e in sample_examples(make_scene(seed), 2, rng, last)}
    assert drawn == set(last) == set(KIND_WEIGHTS) | {"segment", "segment_absent", "several"}


def test_the_vocabulary_is_the_shipped_one(shipped):
    assert tiny_processor().tokenizer.to_str() == shipped[1].tokenizer.to_str()


def test_a_batch_depends_on_recipe_and_step_alone(shipped):
    _, processor = shipped
    recipe = Recipe(scenes_per_step=3)
    a, b, later = make_batch(processor, recipe, 5), make_batch(processor, recipe, 5), make_batch(processor, recipe, 6)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["pixel_values"], later["pixel_values"])
    assert ((a["labels"] != -100) == (a["token_type_ids"] == 1)).all()
    assert (a["labels"][:, -1] == processor.eos_token_id).all()


def test_no_training_scene_is_held_out(monkeypatch, shipped):
    seeds = []
    monkeypatch.setattr("paligemma_nb.training.make_scene", lambda seed, *a, **k: seeds.append(seed) or make_scene(seed, *a, **k))
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
        weights = lengths ** (1 - power)  # of a row: its number of tokens, each with the weight lengths ** -power
        expected = (weights * losses).sum() / weights.sum()
        torch.testing.assert_close(batch_loss(fresh, batch, power), expected, rtol=1e-5, atol=0)


# --- the run

def test_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, warmup_steps=10, decay_steps=50)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1 and rates[9:51] == [1] * 42 and rates[-1] == 1 / 50


def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path, shipped, fresh):
    _, processor = shipped
    recipe = Recipe(steps=4, scenes_per_step=2, warmup_steps=1, decay_steps=2)
    start = {name: t.clone() for name, t in fresh.state_dict().items()}
    whole = train(tmp_path / "whole", fresh, processor, recipe, save_every=1, evaluate_every=99, num_scenes=1)

    class Stop(Exception): pass
    class Stopping:  # a processor that fails before the third batch
        calls, image_size = 0, processor.image_size
        def __call__(self, *arguments):
            self.calls += 1
            if self.calls == 3: raise Stop
            return processor(*arguments)

    fresh.load_state_dict(start)
    with pytest.raises(Stop): train(tmp_path / "stopped", fresh, Stopping(), recipe, save_every=1, evaluate_every=99)
    initialize(fresh, processor, seed=7)  # what the state must replace
    resumed = train(tmp_path / "stopped", fresh, processor, recipe, save_every=1, evaluate_every=99, num_scenes=1)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    np.testing.assert_allclose([r["loss"] for r in resumed], [r["loss"] for r in whole], rtol=1e-6)


def test_a_save_cut_short_leaves_the_old_state(tmp_path, fresh, monkeypatch):
    recipe, path = Recipe(), tmp_path / "state.safetensors"
    optimizers = make_optimizers(fresh, recipe)
    save_state(path, fresh, optimizers, 7, recipe, [])

    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr("paligemma_nb.training.save_file", killed)
    with pytest.raises(KeyboardInterrupt): save_state(path, fresh, optimizers, 8, recipe, [])
    assert load_state(path, fresh, optimizers, recipe) == (7, [])
    with pytest.raises(ValueError, match="another recipe"): load_state(path, fresh, optimizers, replace(recipe, seed=1))


# --- the shipped model

def test_shipped_folder_is_small_and_complete(shipped):
    model, processor = shipped
    assert sum(p.stat().st_size for p in TINY.iterdir()) <= 16e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "results.json", "history.json", "README.md"} <= {
        p.name for p in TINY.iterdir()}
    assert len(EXTRA_TOKENS) == 1024 + 128
    assert all(processor.tokenizer.token_to_id(token) is not None for token in EXTRA_TOKENS)
    text = "Ein Bär, 一只熊, 🐻\t<loc0007>  end"
    assert processor.decode(processor.encode(text)) == text


def test_shipped_model_does_what_its_card_says(shipped):
    "60 of the scenes of the card's results; the bounds leave room for so small a sample."
    results, _ = evaluate(*shipped, num_scenes=60)
    assert results["caption"]["right"] >= 0.8 and results["count"]["right"] >= 0.85
    assert all(results[kind]["right"] >= 0.9 for kind in ("color", "shape", "exists", "absent", "segment_absent"))
    assert results["detect"]["iou"] >= 0.8 and results["detect"]["ap50"] >= 0.85
    assert results["segment"]["iou"] >= 0.7 and results["segment"]["over_half"] >= 0.8


def test_greedy_text_equals_transformers_on_200_prompts(shipped):
    from transformers import PaliGemmaForConditionalGeneration as Theirs
    model, processor = shipped
    theirs = Theirs.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    rng, asked = np.random.default_rng(0), []
    for seed in range(HELD_OUT + 2_000, HELD_OUT + 2_100):
        scene = make_scene(seed)
        asked += [(scene.pixels, e.prompt) for e in sample_examples(scene, 2, rng, STAGES[-1].kind_weights)]
    for start in range(0, 200, 50):
        pixels, prompts = zip(*asked[start:start + 50])
        inputs = processor(list(pixels), list(prompts))
        expected = theirs.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1]:]
        assert processor.decode(generate(model, inputs, max_new_tokens=48)) == processor.decode(expected)


def test_command_line_helps_and_refuses():
    command = [sys.executable, "-m", "paligemma_nb.training"]
    done = subprocess.run([*command, "evaluate", "--model_path", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_unknown_flags_start_nothing(command):
    done = subprocess.run([sys.executable, "-m", "paligemma_nb.training", command, "--stepz", "3"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "stepz" in done.stderr and "Traceback" not in done.stderr
