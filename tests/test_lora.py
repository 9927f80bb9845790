"""Adapters: equal to transformers with peft, both ways; beside small weights; refusals."""
import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_parity import CASES, labels_of, make_both, relative
from torch import nn
from transformers import PaliGemmaForConditionalGeneration as Theirs

from paligemma_nb import generate, load_model, save_model
from paligemma_nb.checkpoint import published_key
from paligemma_nb.gemma import GemmaConfig, GemmaEmbedding
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.lora import (
    ATTENTION, CONFIG, MLP, WEIGHTS, add_lora, find_adapter, load_adapter, lora_layers,
    merge_adapter, read_adapter_config, save_adapter, transformers_key)
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.quantization import Int4Linear, Int8Linear, quantize, replace_modules
from paligemma_nb.siglip import SiglipVisionConfig
from paligemma_nb.speed import pack

NAMES = ("two KV heads, heads wider than hidden", "two pictures a row, other depths",
         "Gemma 2, shorter than the suffix", "Gemma 2, no caps, others slide")
HABITS = {  # how people name the targets in transformers
    "last names, the vision tower's too": ["q_proj", "v_proj", "fc1"],
    "a pattern": r".*language_model.*\.(k_proj|o_proj|up_proj)",
    "all-linear": "all-linear",
}


@pytest.fixture(scope="module", params=NAMES)
def both(request): return make_both(CASES[request.param])


def adapted(model, seed=1, std=.2, **settings):
    "With an adapter that changes something"
    torch.manual_seed(seed)
    for name, p in add_lora(model, **settings).named_parameters():
        if "lora_B" in name: nn.init.normal_(p, std=std)
    return model


def loss_of(model, inputs): return model(**inputs, labels=labels_of(inputs)).loss


def step(model, inputs):
    "One step of gradient descent, large enough to be seen"
    loss_of(model, inputs).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p -= p.grad * (.2 / p.grad.abs().max().clamp(min=1e-3))
    model.zero_grad()


# --- equal to transformers with peft

@pytest.mark.parametrize("targets", [ATTENTION + MLP, ("v_proj", "down_proj")])
def test_ours_opens_in_transformers(both, tmp_path, targets):
    theirs, ours, inputs = map(deepcopy, both)
    base = ours(**inputs).logits
    add_lora(ours, rank=3, alpha=5, targets=targets)
    assert torch.equal(ours(**inputs).logits, base)  # B is 0
    for _ in range(2): step(ours, inputs)  # A moves in the second
    save_adapter(ours, tmp_path / "new/adapter")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "new/adapter")
    written = load_file(tmp_path / "new/adapter" / WEIGHTS)
    assert written.keys() == get_peft_model_state_dict(theirs).keys()  # not only understood
    got = ours(**inputs).logits
    assert relative(got, theirs(**inputs).logits) <= 1e-5 and relative(got, base) > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", HABITS.values(), ids=HABITS)
def test_theirs_opens_in_ours(both, tmp_path, targets, rslora):
    theirs, ours, inputs = map(deepcopy, both)
    config = LoraConfig(r=5, lora_alpha=3, target_modules=targets, use_rslora=rslora,
                        init_lora_weights="gaussian")
    theirs = get_peft_model(theirs, config)
    for _ in range(2): step(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    expected, base = theirs(**inputs).logits, ours(**inputs).logits
    assert relative(load_adapter(ours, tmp_path)(**inputs).logits, expected) <= 1e-5
    assert relative(base, expected) > 1e-2
    save_adapter(ours, tmp_path / "again")  # and back, the settings too
    again = PeftModel.from_pretrained(deepcopy(both[0]), tmp_path / "again")
    assert relative(again(**inputs).logits, expected) <= 1e-5


def test_loss_and_first_gradients(both, tmp_path):
    theirs, ours, inputs = map(deepcopy, both)
    save_adapter(adapted(ours, rank=4, alpha=3), tmp_path)
    theirs = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    got, expected = loss_of(ours, inputs), loss_of(theirs, inputs)
    assert relative(got, expected) <= 1e-5
    got.backward()
    expected.backward()
    grads = {published_key(name.removeprefix("base_model.model.")): p.grad
             for name, p in theirs.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == grads.keys()
    assert len(mine) == 14 * ours.config.text_config.num_hidden_layers
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in mine.items():
        bound = 1e-5 * grads[name].abs().max() + 1e-7 * largest
        assert (grad - grads[name]).abs().max() <= bound, name


def test_transformers_itself_opens_it(both, tmp_path):
    theirs, ours, inputs = map(deepcopy, both)
    save_adapter(adapted(ours), tmp_path)
    theirs.load_adapter(tmp_path)
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) <= 1e-5


def test_names_both_ways(both):
    theirs, ours, _ = both
    names = {name for name, _ in theirs.named_parameters()}
    assert {transformers_key(name) for name, _ in ours.named_parameters()} == names
    assert all(transformers_key(published_key(name)) == name for name in names)


# --- one model, changed and changed back

def test_merged(both):
    _, ours, inputs = map(deepcopy, both)
    ordinary = {name: w.clone() for name, w in ours.state_dict().items()}
    expected = adapted(ours, rank=2)(**inputs).logits
    assert merge_adapter(ours) is ours
    assert not lora_layers(ours) and not hasattr(ours, "peft_config")
    assert relative(ours(**inputs).logits, expected) <= 1e-5
    assert all(p.requires_grad for p in ours.parameters())
    merged = ours.state_dict()
    assert merged.keys() == ordinary.keys()
    assert {name for name in merged if not torch.equal(merged[name], ordinary[name])} == {
        name for name in merged if name.startswith("language_model.")
        and name.split(".")[-2] in ATTENTION + MLP}
    adapted(ours)  # and anew


@pytest.fixture
def tiny(): return load_model(device="cpu")


@pytest.fixture
def question(tiny):
    _, processor = tiny
    torch.manual_seed(0)
    pictures = [torch.randint(256, (112, 112, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    return processor(pictures, ["caption en", "detect red ring"], ["a red ring", "no"])


def test_merged_into_a_published_folder(tiny, question, tmp_path):
    model, processor = tiny
    question.pop("labels")
    expected = adapted(model)(**question).logits
    save_model(merge_adapter(model), processor, tmp_path / "merged")
    theirs = Theirs.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative(theirs(**question).logits, expected) <= 1e-5
    ours, _ = load_model(tmp_path / "merged", device="cpu")
    assert relative(ours(**question).logits, expected) <= 1e-5


def test_bfloat16_base(tiny, question, tmp_path):
    "Adapters in float32; what is merged is rounded once."
    model, _ = tiny
    model.bfloat16()
    save_adapter(adapted(model), tmp_path)
    layers = lora_layers(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {layer.base_layer.weight.dtype for layer in layers.values()} == {torch.bfloat16}
    exact = {name: layer.base_layer.weight + layer.get_delta_weight("default")
             for name, layer in layers.items()}
    got = model(**question).logits
    assert got.dtype == torch.bfloat16
    merged = dict(merge_adapter(model).named_parameters())
    for name, w in exact.items(): assert torch.equal(merged[f"{name}.weight"], w.bfloat16())
    assert relative(model(**question).logits.float(), got.float()) < .05


def test_frozen_but_for_the_adapter(tiny, question):
    model, _ = tiny
    add_lora(model, targets=ATTENTION)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.01)
    for _ in range(2):
        model(**question).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{n}.lora_{x}.default.weight" for n in lora_layers(model) for x in "AB"}
    assert len(moved) == 2 * 4 * 4


def test_modes_and_dropout(tiny, question, tmp_path):
    model, _ = tiny
    adapted(model, dropout=.5)
    question.pop("labels")
    assert torch.equal(model(**question).logits, model(**question).logits)  # eval mode
    save_adapter(model, tmp_path)
    again = load_adapter(load_model(device="cpu")[0].train(), tmp_path)
    assert not torch.equal(again(**question).logits, again(**question).logits)
    assert torch.equal(again.eval()(**question).logits, model(**question).logits)


def test_generates_with_an_adapter(tiny):
    model, processor = tiny
    picture = torch.zeros(112, 112, 3, dtype=torch.uint8).numpy()
    inputs = processor([picture] * 2, ["caption en"] * 2)
    plain = generate(model, inputs, max_new_tokens=8)
    got = generate(adapted(model, std=1), inputs, max_new_tokens=8)
    assert torch.equal(generate(merge_adapter(model), inputs, max_new_tokens=8), got)
    assert not torch.equal(got, plain)


# --- over small weights

def some_model(gemma):
    "Sides that int4 takes, and one that it does not"
    config = PaliGemmaConfig(
        SiglipVisionConfig(hidden_size=36, intermediate_size=52, num_hidden_layers=1,
                           num_attention_heads=3, patch_size=14, image_size=28),
        gemma(hidden_size=128, intermediate_size=192, num_hidden_layers=2, vocab_size=320,
              num_attention_heads=4, num_key_value_heads=1, head_dim=32),
        image_token_index=300)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    for p in model.parameters(): nn.init.normal_(p, std=.1)
    ids = torch.randint(3, 299, (3, 30))
    ids[:, :4] = 300
    types = (torch.arange(30) > 20).long().expand(3, 30)
    pictures = torch.randn(3, 3, 28, 28)
    return model, dict(input_ids=ids, pixel_values=pictures, token_type_ids=types)


def floats(small): # [out, in]
    return torch.cat([(n * scale).t() for n, scale in small.unpack(torch.float32, 10**9)])


def unpacked(model): # the same with its small weights as floats
    def swap(module):
        if not isinstance(module, (Int8Linear, Int4Linear)): return None
        weight = floats(module)
        if hasattr(module, "attend"): new = GemmaEmbedding(*weight.shape)
        else: new = nn.Linear(*weight.shape[::-1], bias=False)
        new.weight = nn.Parameter(weight, requires_grad=False)
        return new
    model = deepcopy(model)
    replace_modules(model, swap)
    return model


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("gemma", [GemmaConfig, Gemma2Config])
@pytest.mark.parametrize("targets", [ATTENTION, ("gate_proj", "o_proj")])
def test_gradients_over_small_weights(gemma, weights, targets):
    "Through targets, other matrices and the output head, against the same weights as floats"
    model, inputs = some_model(gemma)
    adapted(quantize(model, weights), targets=targets, rank=3)
    kinds = {type(layer.base_layer) for layer in lora_layers(model).values()}
    assert kinds == {Int8Linear} if weights == "int8" else Int4Linear in kinds
    wide = unpacked(model)
    assert not any(isinstance(m, (Int8Linear, Int4Linear)) for m in wide.modules())
    losses = [loss_of(m, inputs) for m in (model, wide)]
    assert relative(*losses) <= 1e-5
    for loss in losses: loss.backward()
    grads = dict(wide.named_parameters())
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(mine) == 2 * len(lora_layers(model))
    assert all(grad.abs().max() > 0 for grad in mine.values())
    for name, grad in mine.items(): assert relative(grad, grads[name].grad) <= 1e-5, name


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 70])
def test_gradient_of_small_weights_in_bfloat16(weights, rows):
    "By the kernel for few rows and the other way, within bfloat16's rounding"
    torch.manual_seed(0)
    kind = Int8Linear if weights == "int8" else Int4Linear
    small = kind(torch.randn(128, 192).bfloat16())
    x = torch.randn(2, rows // 2, 192).bfloat16().requires_grad_()
    upstream = torch.randn(2, rows // 2, 128).bfloat16()
    (small(x) * upstream).sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16
    assert relative(x.grad.float(), upstream.float() @ floats(small)) < .01
    with torch.no_grad(): assert torch.equal(small(x), small(x.detach()))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_training_and_files_over_small_weights(weights, tmp_path):
    model, inputs = some_model(GemmaConfig)
    quantize(model.bfloat16(), weights)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    fresh = deepcopy(model)
    adapted(model, rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(loss_of(model, inputs))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < .9 * losses[0]
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(fresh, tmp_path)(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="merge there"): merge_adapter(model)


# --- what is refused, and leaves the model as it was

@pytest.fixture
def saved(tiny, tmp_path):
    "A fresh base, and a good adapter's folder"
    save_adapter(adapted(deepcopy(tiny[0]), rank=2), tmp_path / "adapter", "someone/base")
    return tiny[0], tmp_path / "adapter"


def settings(**others): # -> what writes them into an adapter's config
    def configure(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | others))
    return configure


def changed(folder, change): save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
def tensors(change): return lambda folder: changed(folder, change)
def without(part): return lambda found: {k: x for k, x in found.items() if part not in k}
def renamed(old, new): return lambda found: {k.replace(old, new): x for k, x in found.items()}


def other_shape(found): # of one
    return found | {k: x[:, :-1].contiguous() for k, x in found.items()
                    if "layers.1.mlp.up_proj.lora_A" in k}


Q0, POINTER = "layers.0.self_attn.q_proj", "version https://git-lfs.github.com/spec/v1\n"
FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no adapter_config.json"),
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "config cut short": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "IA3": (settings(peft_type="IA3"), "type LORA, got 'IA3'"),
    "no type": (settings(peft_type=None), "type LORA, got None"),
    "DoRA": (settings(use_dora=True), "plain LoRA, got .*use_dora"),
    "biases": (settings(bias="all"), "plain LoRA, got .*bias"),
    "whole modules": (settings(modules_to_save=["norm"]), "plain LoRA, got .*modules_to_save"),
    "PiSSA": (settings(init_lora_weights="pissa"), "plain LoRA, got .*pissa"),
    "other ranks": (settings(rank_pattern={"q_proj": 4}), "plain LoRA, got .*rank_pattern"),
    "of the future": (settings(use_xlora2=True), "plain LoRA, got .*use_xlora2"),
    "wrong rank": (settings(r=3), r"another model or rank.*\[2, 512\].*expected \[\[3, 512\]"),
    "no rank": (settings(r=0), "whole rank above 0"),
    "rank in words": (settings(r="8"), "whole rank above 0"),
    "alpha is null": (settings(lora_alpha=None), "alpha above 0"),
    "no targets": (settings(target_modules=None), "target_modules"),
    "more targets": (settings(target_modules=["q_proj"]), "lacks vision_tower.*q_proj"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "may run code"),
    "pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), "git-lfs"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
                  "not a whole safetensors"),
    "empty": (lambda f: (changed(f, lambda t: {}), settings(target_modules=[])(f)),
              "holds no tensors"),
    "one of a pair": (tensors(without(f"{Q0}.lora_B")), "another model or rank.*None"),
    "a layer lacks": (tensors(without("layers.3.")), "lacks language_model.model.layers.3"),
    "more layers": (tensors(renamed("layers.3.", "layers.4.")), "no linear map .*layers.4"),
    "other widths": (tensors(other_shape), r"another model or rank.*up_proj.*\[2, 191\]"),
    "other names": (tensors(renamed("language_model", "llm")), "no linear map model.llm"),
    "embeddings": (tensors(renamed("lora_A", "lora_embedding_A")), "one lora_A and one"),
    "not finite": (tensors(lambda t: t | {k: x / 0 for k, x in t.items() if Q0 in k}),
                   "of finite numbers"),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_what_load_adapter_refuses(saved, spoil, message):
    model, folder = saved
    before = {name: id(m) for name, m in model.named_modules()}
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_twin_is_refused(saved):
    "Two layouts of names in one file"
    model, folder = saved
    def twin(key): return key.replace("model.language_model.", "language_model.model.")
    changed(folder, lambda found: found | {twin(k): x + 1 for k, x in found.items()})
    with pytest.raises(ValueError, match="one lora_A and one"): load_adapter(model, folder)


def test_older_names(saved):
    "As with transformers before 4.52, and with the adapter's name, as old versions of peft"
    model, folder = saved
    expected = load_file(folder / WEIGHTS)
    changed(folder, renamed("model.language_model.", "language_model.model."))
    changed(folder, renamed(".weight", ".default.weight"))
    settings(target_modules=r".*language_model\.model.*\.\w+_proj")(folder)
    layers = lora_layers(load_adapter(model, folder))
    for key, x in expected.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        layer = layers[published_key(name + ".weight").removesuffix(".weight")]
        assert torch.equal(getattr(layer, f"lora_{part[0]}")["default"].weight, x)


WRONG = [dict(rank=0), dict(rank=2.5), dict(rank=True), dict(alpha=0), dict(alpha=math.nan),
         dict(alpha="8"), dict(dropout=1), dict(dropout=-.1), dict(targets=()),
         dict(targets=("q_proj", "fc1")), dict(targets="q_proj")]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_add_lora_refuses(tiny, wrong):
    with pytest.raises(ValueError, match="expected"): add_lora(tiny[0], **wrong)
    assert not lora_layers(tiny[0])


@pytest.mark.parametrize("weights", [None, "int8"])
def test_packed_weights_are_refused(weights, saved):
    model, folder = saved
    model.bfloat16()
    if weights: quantize(model, weights)
    projection = pack(model).language_model.model.layers[0].self_attn.q_proj
    if type(projection) in (nn.Linear, Int8Linear):
        pytest.skip("nothing is packed on this processor")
    for call in (add_lora, lambda model: load_adapter(model, folder)):
        with pytest.raises(ValueError, match="packed: open the model without"): call(model)


def test_one_adapter_at_a_time(saved):
    model, folder = saved
    load_adapter(model, folder)
    again = lambda model: load_adapter(model, folder)
    for call in (add_lora, again, lambda model: quantize(model, "int8")):
        with pytest.raises(ValueError, match="adapter"): call(model)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_model_with_an_adapter_is_not_saved_whole(weights, tiny, tmp_path):
    model, processor = tiny
    adapted(quantize(model, weights) if weights else model)
    with pytest.raises(ValueError, match="has an adapter"):
        save_model(model, processor, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_what_save_and_merge_refuse(tiny, tmp_path):
    model, processor = tiny
    with pytest.raises(ValueError, match="no adapter to save"): save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter to merge"): merge_adapter(model)
    save_model(model, processor, tmp_path / "model")
    (tmp_path / "file").touch()
    add_lora(model)
    for name in ("model", "file"):
        with pytest.raises(ValueError, match="its own"): save_adapter(model, tmp_path / name)


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    model, folder = saved
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr("paligemma_nb.checkpoint.save_file", full)
    with pytest.raises(OSError): save_adapter(adapted(model), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("alpha", [4, 7])
def test_killed_between_two_files(saved, monkeypatch, calls, alpha):
    "New weights with the same settings are fine; with others they never meet the old ones"
    model, folder = saved
    old, replace, left = load_file(folder / WEIGHTS), Path.replace, [calls]

    def stop(path, target):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        return replace(path, target)
    new = adapted(deepcopy(model), seed=5, rank=2, alpha=alpha)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt): save_adapter(new, folder, "someone/base")
    monkeypatch.undo()
    names = {path.name for path in folder.iterdir()}
    assert names == ({WEIGHTS, CONFIG} if alpha == 4 else {WEIGHTS})
    same = all(torch.equal(x, old[k]) for k, x in load_file(folder / WEIGHTS).items())
    assert same == (calls == 0)


# --- which base, which adapter

def test_an_adapter_finds_its_base(tiny, saved, tmp_path):
    _, folder = saved
    save_model(*tiny, tmp_path / "base")
    save_adapter(adapted(tiny[0], rank=2), folder, tmp_path / "base")
    base = (tmp_path / "base").resolve()
    for given in ((folder,), (None, folder), (folder, folder)):
        assert find_adapter(*given) == (base, folder)
    assert find_adapter(base) == (base, None) and find_adapter(None) == (None, None)
    assert find_adapter(base, str(folder)) == (base, folder)
    assert find_adapter("owner/name", folder) == ("owner/name", folder)
    found = SimpleNamespace(path=base)  # as for a model that has been found already
    assert find_adapter(found) == (found, None)
    assert find_adapter(found, folder) == (found, folder)
    settings(revision="main")(folder)
    assert find_adapter(folder) == (base, folder)  # of a folder there are no revisions


def test_where_an_adapter_needs_help(saved, tmp_path):
    _, folder = saved
    def refused(message, *args, error=ValueError):
        with pytest.raises(error, match=message) as caught: find_adapter(*args)
        assert "\n" not in str(caught.value)
    refused("is an adapter for someone/base: .*name its folder, too", folder,
            error=FileNotFoundError)
    settings(revision="bfloat16")(folder)
    refused(r"someone/base \(revision bfloat16\)", folder, error=FileNotFoundError)
    settings(base_model_name_or_path=None)(folder)
    refused("does not say which model it is for", folder)
    refused("no adapter_config.json in", None, tmp_path, error=FileNotFoundError)
    refused("no adapter_config.json in", "owner/name", "some/adapter", error=FileNotFoundError)
    refused("was not asked for", folder, tmp_path / "other")
    (folder / "config.json").write_text("{}")  # a model beside it
    refused("was not asked for", folder)
    refused("was not asked for", folder, tmp_path / "other")
    assert find_adapter(folder, folder) == (folder, folder)


def test_base_is_noted_and_kept(saved, tmp_path):
    model, folder = saved
    assert read_adapter_config(folder)["base_model_name_or_path"] == "someone/base"
    save_adapter(load_adapter(model, folder), tmp_path / "again")
    assert read_adapter_config(tmp_path / "again") == read_adapter_config(folder)
    save_adapter(model, tmp_path / "relative", Path(os.path.relpath(folder)))
    noted = read_adapter_config(tmp_path / "relative")["base_model_name_or_path"]
    assert noted == str(folder.resolve())


LIGHT = """
import sys
import paligemma_nb.lora as lora
from paligemma_nb import load_model
lora.find_adapter(None)
model, _ = load_model(device="cpu")
lora.lora_layers(model)
heavy = {"peft", "accelerate", "transformers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
sys.modules["peft"] = None  # as if it were not installed
try: lora.add_lora(model)
except ImportError as e: print(e)
"""


def test_nothing_heavy_without_an_adapter():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'paligemma-nb[train]'" in done.stdout
