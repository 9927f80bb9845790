"""Contrast: losses, both towers against transformers, strict opening, a short training, the
stored runs."""
import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import paligemma_nb
from paligemma_nb.contrastive import (
    ContrastRecipe, SiglipConfig, SiglipModel, caption_ids, false_negatives, load_siglip,
    pair_logits, recall_at_1, ring_sigmoid_loss, scene_pixels, sigmoid_loss, softmax_loss,
    tiny_siglip, train_contrastive)
from paligemma_nb.processing import PaliGemmaProcessor
from paligemma_nb.scenes import make_scene
from paligemma_nb.siglip import SiglipVisionModel

TINY = Path(paligemma_nb.__file__).parent / "tiny"
RECORDS = Path(__file__).parents[1] / "nbs" / "data" / "33_contrastive.json"


@pytest.fixture(scope="module")
def processor(): return PaliGemmaProcessor.from_pretrained(TINY)


def close(ours, theirs, eps=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= eps * theirs.abs().max()


# --- losses

@given(n=st.integers(2, 9), seed=st.integers(0, 99), scale=st.floats(0.1, 30))
def test_losses_are_their_definitions(n, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, n, generator=generator).double()
    right = logits.diagonal()
    rows, columns = logits.exp().sum(1).log(), logits.exp().sum(0).log()
    softmax = ((rows - right).mean() + (columns - right).mean()) / 2
    yes, no = (1 + (-right).exp()).log().sum(), (1 + logits.exp()).log()
    sigmoid = (yes + no.sum() - no.diagonal().sum()) / n
    for got, loss in (softmax_loss(logits), softmax), (sigmoid_loss(logits), sigmoid):
        # the definitions take differences of large numbers: a loss near 0 has few digits there
        assert got.item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-11)


def test_losses_stay_finite():
    wrong = 1e4 * (1 - 2 * torch.eye(3))
    assert softmax_loss(wrong) == pytest.approx(2e4, rel=1e-4) and sigmoid_loss(wrong) == 3e4
    assert softmax_loss(-wrong) == 0 and sigmoid_loss(-wrong) == 0


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss, recall_at_1])
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0), (1, 2, 2)])
def test_logits_must_be_square(loss, shape):
    with pytest.raises(ValueError, match=r"expected logits \[n, n\]"): loss(torch.zeros(shape))


@given(devices=st.integers(1, 6), m=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_ring_of_devices_computes_the_whole_loss(devices, m, seed):
    torch.manual_seed(seed)
    x, y = (F.normalize(torch.randn(devices * m, 5), dim=1) for _ in range(2))
    learned = [p.requires_grad_() for p in (x, y, torch.tensor([7.0]), torch.tensor([-3.0]))]
    whole = sigmoid_loss(x @ y.T * learned[2] + learned[3])
    ring = ring_sigmoid_loss(x.split(m), y.split(m), *learned[2:])
    close(ring, whole)
    for ours, all_at_once in zip(*(torch.autograd.grad(loss, learned)
                                   for loss in (ring, whole))):
        assert torch.allclose(ours, all_at_once, rtol=1e-4, atol=1e-6)


def test_a_ring_keeps_no_block_for_the_backward_pass():
    kept = []
    x, y = (torch.randn(48, 2, requires_grad=True) for _ in range(2))
    def keep(tensor):
        kept.append(tensor.numel())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ring_sigmoid_loss(x.split(12), y.split(12), torch.tensor(1.0), torch.tensor(0.0))
        assert max(kept, default=0) < 12 * 12
        sigmoid_loss(x @ y.T)
        assert max(kept) >= 48 * 48


@pytest.mark.parametrize("sizes", [((2, 2), (2,)), ((2, 2), (2, 1)), ((), ())])
def test_parts_of_a_ring_must_be_alike(sizes):
    images, texts = ([torch.ones(n, 3) for n in part] for part in sizes)
    with pytest.raises(ValueError, match="expected as many parts"):
        ring_sigmoid_loss(images, texts, torch.tensor(1.0), torch.tensor(0.0))


def test_false_negatives_are_the_equal_captions():
    assert false_negatives(["a", "b", "a", "c", "a", "b"]) == 3 * 2 + 2 * 1
    assert false_negatives(["a", "b"]) == false_negatives([]) == 0


def test_recall_counts_rows_and_columns():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    assert recall_at_1(logits) == pytest.approx((2 / 3, 1))
    assert recall_at_1(logits.T) == pytest.approx((1, 2 / 3))


# --- towers

SIZES = {
    "odd": (dict(hidden_size=48, intermediate_size=40, num_hidden_layers=2,
                 num_attention_heads=3, vocab_size=61, max_position_embeddings=9),
            dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3,
                 num_attention_heads=4, image_size=33, patch_size=8)),
    "projected": (dict(hidden_size=24, intermediate_size=20, num_hidden_layers=1,
                       num_attention_heads=2, vocab_size=31, max_position_embeddings=5,
                       projection_size=36, layer_norm_eps=1e-3),
                  dict(hidden_size=36, intermediate_size=12, num_hidden_layers=1,
                       num_attention_heads=3, image_size=14, patch_size=7,
                       layer_norm_eps=1e-4)),
}


def published(folder, text, vision, **kwargs):
    "A checkpoint of random weights, as transformers writes it, and the model"
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    theirs = transformers.SiglipModel(config).eval()
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(folder, **kwargs)
    return theirs


@pytest.fixture
def folder(tmp_path):
    published(tmp_path, *SIZES["odd"])
    return tmp_path


@pytest.mark.parametrize("shards", [{}, dict(max_shard_size="40KB")])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_towers_and_logits_are_those_of_transformers(sizes, shards, tmp_path):
    (text, vision), side = sizes, sizes[1]["image_size"]
    theirs = published(tmp_path, text, vision, **shards)
    assert (tmp_path / "model.safetensors").exists() != bool(shards)
    ours = load_siglip(tmp_path, device="cpu")
    ids = torch.randint(text["vocab_size"], (4, text["max_position_embeddings"]))
    pixels = torch.rand(4, 3, side, side) * 2 - 1
    expected = theirs(ids, pixels, return_loss=True)
    close(ours.get_image_features(pixels), expected.vision_model_output.pooler_output)
    close(ours.get_text_features(ids), expected.text_model_output.pooler_output)
    close(ours(ids, pixels), expected.logits_per_image)
    close(sigmoid_loss(ours(ids, pixels)), expected.loss, 1e-6)
    close(ours(ids[:3, :-1], pixels), theirs(ids[:3, :-1], pixels).logits_per_image)
    assert not ours.training
    assert all(torch.equal(p, theirs.state_dict()[n]) for n, p in ours.state_dict().items())


def test_the_largest_published_model_has_the_same_tensors():
    sizes = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                 num_attention_heads=16)  # So400m/14-224, as its config.json says
    text, vision = sizes, sizes | dict(patch_size=14)
    parts = dict(text_config=text, vision_config=vision)
    with torch.device("meta"):
        ours = SiglipModel(SiglipConfig.from_dict(parts | dict(model_type="siglip")))
        theirs = transformers.SiglipModel(transformers.SiglipConfig(**parts))
    shapes = [{n: p.shape for n, p in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_sizes_that_a_config_leaves_out_are_the_base_models():
    found = SiglipConfig.from_dict(dict(model_type="siglip"))
    base = transformers.SiglipConfig()
    for part in ("text_config", "vision_config"):
        ours, theirs = asdict(getattr(found, part)), getattr(base, part).to_dict()
        assert ours == {name: theirs[name] for name in ours}


@torch.no_grad()
def test_the_tower_without_its_head_is_paligemmas(folder):
    ours, pixels = load_siglip(folder, device="cpu"), torch.rand(2, 3, 33, 33)
    tower = SiglipVisionModel(ours.config.vision_config)
    state = ours.vision_model.state_dict()
    tower.vision_model.load_state_dict({n: p for n, p in state.items()
                                        if not n.startswith("head.")})
    close(ours.vision_model.head(tower(pixels)), ours.get_image_features(pixels), 1e-6)


def test_dtype_can_be_chosen(folder):
    model = load_siglip(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


def change(folder, edit): # of the weights' file
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()},
              folder / "model.safetensors")


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("logit_bias"), "missing 1 .logit_bias."),
    (lambda t: t.update(extra=t["logit_bias"]), "surplus 1 .extra."),
    (lambda t: t.update({"vision_model.head.probe": torch.ones(1, 1, 47)}),
     r"vision_model.head.probe is \[1, 1, 47\], expected \[1, 1, 48\]"),
])
def test_weights_must_be_those_of_the_config(folder, edit, message):
    change(folder, edit)
    with pytest.raises(ValueError, match=message): load_siglip(folder, device="cpu")


@pytest.mark.parametrize("edit, message", [
    (lambda d: d.update(model_type="siglip2"), "expected a config of model_type 'siglip'"),
    (lambda d: d["text_config"].update(hidden_act="gelu"), "expected a tanh-GELU"),
    (lambda d: d["vision_config"].update(vision_use_head=False), "and a pooling head"),
    (lambda d: d["text_config"].update(num_attention_heads=5), "is not a multiple"),
    (lambda d: d["text_config"].update(projection_size=47), "cannot be compared"),
    (lambda d: d["text_config"].update(num_attention_heads=0), "config.json"),
    (lambda d: d.update(vision_config=3), "config.json"),
])
def test_configs_of_other_models_are_refused(folder, edit, message):
    content = json.loads((folder / "config.json").read_text())
    edit(content)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message): load_siglip(folder, device="cpu")


def test_folders_without_a_siglip_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError): load_siglip(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="got 'paligemma'"): load_siglip(TINY, device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"): load_siglip(tmp_path)


def test_texts_that_are_too_long_are_refused(folder, processor):
    ids = torch.zeros(1, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="at most 9 tokens in a text, got 10"):
        load_siglip(folder, device="cpu").get_text_features(ids)
    with pytest.raises(ValueError, match="a caption has 4 tokens, the model takes 3"):
        caption_ids(processor, ["a ring", "a red ring and"], 3)


# --- training

def test_captions_are_padded_and_pictures_are_the_processors(processor):
    ids = caption_ids(processor, ["a red ring", "a ring"], 4)
    assert ids.tolist() == [processor.encode("a red ring") + [0],
                            processor.encode("a ring") + [0, 0]]
    scenes = [make_scene(seed) for seed in (3, 4)]
    expected = processor([scene.image for scene in scenes], ["caption en"] * 2).pixel_values
    assert torch.equal(scene_pixels(processor, scenes), expected)


@pytest.mark.parametrize("wrong, message", [
    (dict(loss="hinge"), "expected a loss of sigmoid, softmax"),
    (dict(batch_size=1), "nothing to tell apart"),
    (dict(examples=100), "less than ten steps"),
])
def test_recipes_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): replace(ContrastRecipe(), **wrong)


def test_rates_rise_and_fall():
    recipe = ContrastRecipe(examples=3200)
    rates = [recipe.rates(step)["muon"] / recipe.muon_lr for step in range(recipe.steps)]
    peak = rates.index(max(rates))
    assert peak == 9 and 0.9 < rates[peak] <= 1 and min(rates) > 0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert recipe.rates(50)["adamw"] / recipe.adamw_lr == pytest.approx(rates[50])


def test_a_recipe_makes_one_run_and_learns(processor):
    recipe = ContrastRecipe(examples=48, batch_size=4)
    model = tiny_siglip(processor)
    losses = list(train_contrastive(model, processor, recipe))
    again = list(islice(train_contrastive(tiny_siglip(processor), processor, recipe), 2))
    assert len(losses) == 12 and again == pytest.approx(losses[:2], rel=1e-4)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert model.logit_scale != tiny_siglip(processor).logit_scale


def test_batch_sizes_see_the_same_pictures(processor, monkeypatch):
    seen = []
    def spy(seed, size):
        seen.append(seed)
        return make_scene(seed, size)
    monkeypatch.setattr("paligemma_nb.contrastive.make_scene", spy)
    for n in (2, 4):
        recipe = ContrastRecipe(examples=40, batch_size=n, first_seed=7)
        run = train_contrastive(tiny_siglip(processor), processor, recipe)
        list(islice(run, 8 // n))
    assert seen == 2 * [*range(7, 15)]


def test_pairs_are_scored_by_their_captions(processor):
    scenes, model = [make_scene(seed) for seed in range(3)], tiny_siglip(processor)
    own = pair_logits(model, processor, scenes)
    texts = [scene.caption for scene in scenes][::-1]
    assert torch.allclose(pair_logits(model, processor, scenes, texts), own.flip(1), atol=1e-5)


# --- the stored runs

@pytest.fixture(scope="module")
def records(): return json.loads(RECORDS.read_text())


def test_stored_runs_belong_to_their_recipes(records):
    assert records["training"]["recipe"] == asdict(ContrastRecipe())
    for name, record in records.items():
        recipe = ContrastRecipe(**record["recipe"])
        assert len(record["result"]["losses"]) == recipe.steps and record["machine"], name
        assert record["result"]["rows"][-1]["step"] == recipe.steps
    pairs = {name: records[name]["recipe"] for name in records if name[0] == "s"}
    assert {name: f"{r['loss']} {r['batch_size']}" for name, r in pairs.items()} == {
        name: name for name in pairs} and len(pairs) == 6
    assert len({r["examples"] for r in pairs.values()}) == 1  # the same number for each


@pytest.mark.parametrize("name", ["training", "softmax 8"])
def test_stored_runs_begin_as_they_do_here(records, processor, name):
    recipe = ContrastRecipe(**records[name]["recipe"])
    model = tiny_siglip(processor, recipe.bias)
    live = list(islice(train_contrastive(model, processor, recipe), 3))
    assert live == pytest.approx(records[name]["result"]["losses"][:3], rel=0.02)
