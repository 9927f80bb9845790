"""Runs that differ in one thing: that they do, that they can be stopped, what is made of them.
A model for pictures of another size, against transformers."""
import json
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma_nb import load_model
from paligemma_nb.checkpoint import save_model
from paligemma_nb.generation import generate
from paligemma_nb.reward import fingerprint
from paligemma_nb.stages import at_resolution, resize_positions
from paligemma_nb.training import Recipe, make_optimizers, train_step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import resolution  # noqa: E402
import stages  # noqa: E402
from stages import (  # noqa: E402
    RUNS, StageRecipe, batches, new_model, optimizers_of, recipe_of)


@pytest.fixture(scope="module")
def processor(): return load_model(device="cpu", dtype="float32")[1]


@pytest.fixture(scope="module")
def base(processor): return new_model(processor, StageRecipe())


def differ(one, other): # names of weights that are not in both with the same numbers
    one, other = one.state_dict(), other.state_dict()
    return {n for n in one.keys() | other.keys() if n not in one or n not in other
            or one[n].shape != other[n].shape or not torch.equal(one[n], other[n])}


def ends(names): return Counter(name.split(".")[-2] for name in names)


def test_each_run_starts_as_the_base_but_for_what_it_says(processor, base):
    def start(name): return ends(differ(new_model(processor, recipe_of(name, 0)), base))
    for name in ("base", "causal", "frozen", "contrast", "length 1", "adamw 0.0006"):
        assert not start(name)
    assert start("random places").keys() == {"embed_tokens", "position_embedding"}
    outputs = "out_proj", "fc2", "o_proj", "down_proj"
    assert start("random outputs") == {name: 4 for name in outputs}
    assert start("4 KV heads").keys() >= {"k_proj", "v_proj"}
    assert start("MLP").keys() >= {"0", "2", "linear"}
    other = new_model(processor, recipe_of("base", 1))
    assert {"q_proj", "fc1", "linear"} <= ends(differ(other, base)).keys()


def test_random_places_are_as_long_as_waves(processor, base):
    places = new_model(processor, recipe_of("random places", 0))
    first = processor.tokenizer.token_to_id("<loc0000>")
    ours, waves = (m.language_model.model.embed_tokens.weight for m in (places, base))
    assert torch.allclose(ours[first:first + 1024].norm(dim=1), torch.ones(1024), atol=1e-5)
    near = [(x[first:first + 1023] * x[first + 1:first + 1024]).sum(1).mean()
            for x in (ours, waves)]
    assert near[1] > 0.9 > 0.1 > abs(near[0]) and torch.equal(ours[:first], waves[:first])


def after(name, processor, steps=2, **settings): # the model before and after some steps
    settings = dict(scenes_per_step=2, steps=6, single_object_steps=0, warmup_steps=1,
                    decay_steps=2, autocast=False) | settings
    recipe = replace(recipe_of(name, 0), **settings)
    model = new_model(processor, recipe)
    before, optimizers = deepcopy(model), optimizers_of(model, recipe)
    for step, batch in enumerate(islice(batches(processor, recipe, 0), steps)):
        train_step(model, optimizers, batch, recipe, step)
    return before, model


def test_what_learns(processor):
    before, model = after("frozen", processor)
    learned = differ(before, model)
    assert learned and not any(name.startswith("vision_tower") for name in learned)
    before, model = after("base", processor)
    assert any(name.startswith("vision_tower") for name in differ(before, model))
    # optimizers in two parts do the same as in one
    recipe = replace(StageRecipe(), scenes_per_step=2, steps=6, single_object_steps=0,
                     warmup_steps=1, decay_steps=2, autocast=False)
    plain, whole = Recipe(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}), before
    optimizers = make_optimizers(whole, plain)
    for step, batch in enumerate(islice(batches(processor, recipe, 0), 2)):
        train_step(whole, optimizers, batch, plain, step)
    assert not differ(whole, model)


def test_a_tower_that_warms_up_moves_less(processor):
    def moved(name):
        before, model = after(name, processor, 1, contrast=0)
        return sum((p - q).norm().item() for p, q in zip(model.vision_tower.parameters(),
                                                         before.vision_tower.parameters()))
    assert 0 < moved("tower warm-up") < 0.1 * moved("base")
    rates = recipe_of("tower warm-up", 0).rates(99)
    assert rates["tower muon"] == pytest.approx(rates["muon"] / 2)


def test_the_race_changes_the_optimizer_of_the_matrices_alone(processor):
    muon, adamw = (after(name, processor, 1, zero_outputs=False)[1]
                   for name in ("base", "adamw 0.002"))
    matrices = {n for n, p in muon.named_parameters() if ".layers." in n and p.ndim == 2}
    assert differ(muon, adamw) == matrices
    rates = [recipe_of(name, 0).rates(99) for name in ("base", "adamw 0.002", "adamw 0.006")]
    assert rates[0] == rates[1] and rates[2]["muon"] == pytest.approx(3 * rates[0]["muon"])
    assert rates[2]["adamw"] == rates[0]["adamw"]


def test_a_causal_prompt_is_read_from_left_to_right(processor, base):
    model = new_model(processor, recipe_of("causal", 0))
    for p in model.parameters(): p.data += 0.05 * torch.randn_like(p)
    picture = np.full((112, 112, 3), 90, np.uint8)
    one, two = (processor([picture], [f"detect red {x}"]) for x in ("star", "ring"))
    with torch.no_grad():
        same = (one["input_ids"] == two["input_ids"])[0].int().cumprod(0).bool()
        ours = [model(**x).logits[0, same] for x in (one, two)]
        base.load_state_dict(model.state_dict())
        theirs = [base(**x).logits[0, same] for x in (one, two)]
    assert torch.equal(*ours) and not torch.allclose(*theirs)
    ids = generate(model, one, max_new_tokens=4)  # with a cache, as without
    for i in range(4):
        grown = dict(one, input_ids=torch.cat((one["input_ids"], ids[:, :i]), 1),
                     attention_mask=torch.ones(1, one["input_ids"].shape[1] + i).int())
        with torch.no_grad(): logits = model(**grown, logits_to_keep=1).logits[0, -1]
        logits[processor.image_token_id] = -torch.inf
        assert logits.argmax() == ids[0, i]


def test_losses_reach_as_far_as_they_say(processor):
    answers, prompts = (next(batches(processor, replace(recipe_of(name, 0), scenes_per_step=2),
                                     0)) for name in ("causal", "loss on prompt"))
    assert torch.equal(answers["input_ids"], prompts["input_ids"])
    for row, ids in zip(prompts["labels"], prompts["input_ids"]):
        kept = [i for i in ids.tolist() if i not in (processor.image_token_id,
                                                     processor.pad_token_id)]
        assert row[row != -100].tolist() == kept
    assert (answers["labels"] != -100).sum() < (prompts["labels"] != -100).sum()


def test_towers_and_decoders_are_taught_before(processor):
    recipe = replace(recipe_of("contrast", 0), contrast=10, texts=25)
    model = new_model(processor, recipe)
    start = deepcopy(model)
    losses = stages.teach_tower(model, processor, recipe)
    assert len(losses) == 10 and losses[-1] < losses[0]
    learned = differ(start, model)
    assert learned and all(name.startswith("vision_tower") for name in learned)
    start = deepcopy(model)
    losses = stages.teach_decoder(model, processor, recipe)
    assert len(losses) == 25 and losses[-1] < losses[0] - 1
    learned = differ(start, model)
    assert learned and all(name.startswith("language_model") for name in learned)
    batch = stages.text_batch(processor, recipe, 0)
    text = processor.decode(batch["input_ids"][:1])[0]
    assert "\n" in text and processor.image_token_id not in batch["input_ids"]


def test_marks_are_split_by_the_number_of_objects(processor):
    model = load_model(device="cpu", dtype="float32")[0]
    found = stages.marks(model, processor, 8)
    split = found["detect_by_objects"]
    assert split.keys() <= {1, 2, 3, 4} and min(split) == 1 and found["caption"]["asked"] == 8
    assert found["detect"]["iou"] == pytest.approx(np.mean([*split.values()]), abs=0.1)


def test_all_runs_are_made_once_and_gathered(tmp_path, monkeypatch, processor, capsys):
    fake = {kind: {mark: 0.5} for kind, mark in stages.SHOWN.items()}
    monkeypatch.setattr(stages, "marks", lambda *_: fake | dict(detect_by_objects={1: 0.5}))
    monkeypatch.setattr(stages, "RUNS", {"base": {}, "adamw 0.0006": RUNS["adamw 0.0006"]})
    monkeypatch.setattr(stages, "SEEDS", (0,))
    monkeypatch.setattr("paligemma_nb.training.tiny_processor", lambda: processor)
    monkeypatch.setattr(stages, "recipe_of", lambda name, seed: StageRecipe(
        seed=seed, steps=4, single_object_steps=1, scenes_per_step=2, warmup_steps=1,
        decay_steps=2, **stages.RUNS[name]))
    stages.all_runs(tmp_path, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [r["name"] for r in found["runs"]] == [*stages.RUNS]
    assert [row["step"] for row in found["runs"][0]["history"]] == [1, 2, 3, 4]
    assert found["no_best_rate_yet"] == ["adamw"]
    assert "adamw: its best rate is the first" in capsys.readouterr().out
    monkeypatch.setattr(stages, "run", None)
    stages.all_runs(tmp_path, tmp_path / "out.json")  # makes none again
    stages.all_runs(tmp_path / "lost", tmp_path / "out.json")  # nor where only these are left
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == found["runs"]
    monkeypatch.setattr(stages, "recipe_of", lambda name, seed: StageRecipe(seed=seed))
    assert stages.known(tmp_path, tmp_path / "out.json") == {}  # they were made by others


def test_a_best_rate_has_neighbours():
    def run(name, loss): return dict(name=name, history=[dict(loss=loss)])
    losses = dict(zip(stages.RATES["adamw"], (3, 2, 1, 2)))
    runs = [run(f"adamw {rate:g}", loss) for rate, loss in losses.items()]
    assert stages.at_the_edge(runs) == [] and stages.at_the_edge(runs[:3]) == ["adamw"]
    runs += [run("muon 0.0006", 3), run("base", 2)]
    assert stages.at_the_edge([*runs, run("muon 0.006", 3)]) == []
    assert stages.at_the_edge([*runs, run("muon 0.006", 1)]) == ["muon"]


def test_stored_runs_belong_to_their_recipes():
    told = json.loads(Path(stages.OUTPUT).read_text())["runs"]
    assert told and [*stages.known("nowhere", stages.OUTPUT).values()] == told
    for r in told:
        steps = [row["step"] for row in r["history"]]
        assert steps == [100, 150, 200, 300, 400, 450, 500, 600]
        recipe = recipe_of(r["name"], r["seed"])
        assert [*map(len, r["before"]["losses"].values())] == [
            n for n in (recipe.contrast, recipe.texts) if n]


# --- pictures of another size

@pytest.mark.parametrize("old, new, width", [(3, 5, 24), (8, 16, 6), (7, 3, 10), (4, 4, 2)])
def test_positions_are_those_of_transformers(old, new, width):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    torch.manual_seed(old)
    theirs = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        patch_size=4, image_size=4 * old, vision_use_head=False)).embeddings
    table = theirs.position_embedding.weight.detach()
    pixels = torch.randn(1, 3, 4 * new, 4 * new)
    with torch.no_grad():
        patches = theirs.patch_embedding(pixels).flatten(2).mT
        expected = theirs(pixels, interpolate_pos_encoding=True) - patches
    assert torch.allclose(resize_positions(table, new), expected[0], rtol=1e-5, atol=1e-6)


def test_positions_that_cannot_be_resized():
    for n, side in ((15, 4), (16, 0)):
        with pytest.raises(ValueError, match=f"expected a square .*: {n}, {side}"):
            resize_positions(torch.zeros(n, 2), side)


def test_a_model_for_larger_pictures_is_that_of_transformers(tmp_path):
    "the features of its tower, and its logits from a saved folder"
    import transformers
    model, processor = load_model(device="cpu", dtype="float32")
    save_model(model, processor, tmp_path / "small")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "small", dtype=torch.float32)
    same, large = at_resolution(model, processor, 154)
    assert same is model and large.num_image_tokens == 121 and processor.image_size == 112
    picture = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    inputs = large(images=[picture], text=["caption en"])
    with torch.no_grad():
        ours = model.vision_tower(inputs["pixel_values"])
        expected = theirs.model.vision_tower(
            inputs["pixel_values"], interpolate_pos_encoding=True).last_hidden_state
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
        logits = model(**inputs).logits
    save_model(model, large, folder := tmp_path / "large")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32)
    with torch.no_grad(): expected = theirs(**inputs).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    again, processor = load_model(folder, device="cpu", dtype="float32")
    assert torch.equal(again(**inputs).logits, logits) and processor.image_size == 154


def test_what_else_a_larger_picture_leaves_alone():
    model, processor = load_model(device="cpu", dtype="bfloat16")
    model.requires_grad_(False)
    before = {n: p for n, p in model.named_parameters() if "position" not in n}
    at_resolution(model, processor, 56)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in before.items())  # no copy
    assert not any(p.requires_grad for p in after.values())
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    for size in (0, 100, 224.0):
        with pytest.raises(ValueError, match=f"expected a multiple of 14 px, got {size}"):
            at_resolution(model, processor, size)
    with pytest.raises(ValueError, match="336 px make 576 image tokens, .* holds 512"):
        at_resolution(model, processor, 336)
    assert model.config.vision_config.image_size == 56  # as it was
    config = deepcopy(model.config)
    other = type(model)(model.config)  # shares the config, and does not follow
    at_resolution(other, processor, 112)
    assert model.config == config != other.config


def test_quantised_weights_take_larger_pictures():
    "the tables are the same, and the answers of a tower and a decoder as close as at 112 px"
    pictures = [np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)]
    away = []
    for size in (112, 224):
        (whole, processor), (small, _) = (
            at_resolution(*load_model(device="cpu", dtype="bfloat16", weights=weights), size)
            for weights in (None, "int8"))
        tables = [m.vision_tower.vision_model.embeddings.position_embedding.weight
                  for m in (whole, small)]
        assert torch.equal(*tables)
        inputs = processor(pictures, ["caption en"])
        with torch.no_grad():
            exact, near = (m(**inputs).logits.float() for m in (whole, small))
        away.append(((exact - near).norm() / exact.norm()).item())
    assert max(away) < 0.05


# --- larger pictures, trained

def test_stored_runs_with_larger_pictures_belong_to_recipe_and_weights():
    model, _ = load_model(device="cpu", dtype="float32")
    start, told = fingerprint(model), json.loads(Path(resolution.OUTPUT).read_text())["runs"]
    pairs = [(r["size"], r["seed"]) for r in told]
    assert pairs == [(size, seed) for seed in resolution.SEEDS for size in resolution.SIZES]
    for r in told:
        assert r["start"] == start and r["recipe"] == asdict(resolution.recipe_of(r["seed"]))
        assert [row["step"] for row in r["history"]] == [*range(50, 401, 50)]


def test_runs_with_larger_pictures(tmp_path, monkeypatch):
    few = dict(scenes_per_step=2, warmup_steps=1, decay_steps=2, kind_weights=dict(detect=1),
               prompts_per_scene=1)
    monkeypatch.setattr(resolution, "recipe_of", lambda seed: Recipe(2, 0, seed=seed, **few))
    monkeypatch.setattr(resolution, "SEEDS", (0,))
    monkeypatch.setattr(resolution.run, "__defaults__", (0, "runs/resolution", 8))
    resolution.all_runs(tmp_path, tmp_path / "out.json")
    small, large = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (small["size"], large["size"]) == (112, 224) and small["start"] == large["start"]
    for r in (small, large):
        asked = r["before"]["asked_by_size"]
        assert len(asked) == 3 and sum(asked) <= r["before"]["detect"]["asked"]
        assert r["history"][-1]["step"] == 2
    assert small["before"]["detect"]["iou"] > .9 > .3 > large["before"]["detect"]["iou"]
    monkeypatch.setattr(resolution, "run", None)
    resolution.all_runs(tmp_path, tmp_path / "out.json")  # makes none again
