"""Packed weights: the same products, the same answers, on whatever processor, and what they
refuse."""
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from paligemma_nb import speed
from paligemma_nb.checkpoint import load_checkpoint, save_model
from paligemma_nb.generation import generate
from paligemma_nb.kernels import kernels
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.opening import load_model
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.quantization import Int8Linear, int4_rows, quantize, weights_of
from paligemma_nb.speed import PackedInt8Linear, PackedLinear, WideLinear, can_pack, pack
from test_checkpoint import fails
from test_parity import batch
from test_quantization import (  # noqa: F401  (some of them are fixtures)
    ROOT, TOLERANCE, dense8, processor_of, random_model, relative, scenes, shapes)


packs = pytest.mark.skipif(not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)),
                           reason="no bfloat16 kernels here")
needs_bytes = pytest.mark.skipif(not kernels().packed_bytes,
                                 reason="no products of bytes here")


def open_packed(**how):
    model, processor = load_model(device="cpu", **how)
    return pack(model), processor


# --- one matrix

ISAS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16")


@pytest.mark.parametrize("isa", ISAS)
def test_whichever_kernels_onednn_has(isa):
    """oneDNN can be told to do without newer instructions. Whatever is chosen then,
    products are right; bytes above all, which an older processor adds up wrongly."""
    code = """import torch; from torch import nn
from paligemma_nb.kernels import *; from paligemma_nb.quantization import *
from paligemma_nb.speed import *
torch.manual_seed(0); w, x = torch.randn(192, 256).bfloat16(), torch.randn(70, 256).bfloat16()
plain = nn.Linear(256, 192, dtype=torch.bfloat16).requires_grad_(False); plain.weight.copy_(w)
found, exact = kernels(), x.float() @ w.float().T + plain.bias.float()
modules = [(WideLinear(plain), .01)]
if can_pack(w): modules += [(PackedLinear(w, plain.bias), .01)]
small = Int8Linear(w)
modules += [(lambda x, m=m: m(x) + plain.bias, .05) for m in
            [small] + ([PackedInt8Linear(small)] if found.packed_bytes else [])]
for rows in (1, 8, 9, 70):
    for module, tolerance in modules:
        off = module(x[:rows]).float() - exact[:rows]
        assert off.norm() < tolerance * exact[:rows].norm(), (rows, module, found)
# sums beyond sixteen bits
a, b = (torch.full((n, 1024), 127, dtype=torch.int8) for n in (64, 32))
if found.bytes: assert (torch._int_mm(a, b.t()) == 127 * 127 * 1024).all()
print(found)"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    if isa == "AVX2": env |= {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=env)
    assert done.returncode == 0 and "Kernels(" in done.stdout, done.stderr


HIDDEN = [(torch, "_int_mm"), (torch, "_weight_int8pack_mm"),
          (torch.ops.aten, "_weight_int4pack_mm_for_cpu"), (torch.ops.onednn,
                                                            "qlinear_prepack"),
          (torch.ops.onednn, "qlinear_pointwise"), (torch.ops.mkldnn, "_linear_pointwise"),
          (torch.ops.mkldnn, "_reorder_linear_weight")]


@pytest.mark.parametrize("hidden", [*([h] for h in HIDDEN), HIDDEN],
                         ids=lambda h: "+".join(n for _, n in h))
def test_a_build_without_private_operations(hidden, monkeypatch, scenes):
    "They may go with any release of PyTorch: something else then does the work."
    def gone(*args, **kwargs): raise AttributeError("no such operation")
    for cached in (kernels, int4_rows, speed._has_packing): cached.cache_clear()
    try:
        for place, name in hidden:
            if place is torch: monkeypatch.delattr(place, name)
            else: monkeypatch.setattr(place, name, gone)
        for weights in (None, "int8", "int4"):
            model, processor = open_packed(dtype="bfloat16", weights=weights)
            inputs = processor(scenes[:2], ["caption en"] * 2)
            got = processor.decode(generate(model, inputs, max_new_tokens=30))
            assert got[0].startswith("a yellow star, a blue circle"), (weights, got)
    finally:
        monkeypatch.undo()
        for cached in (kernels, int4_rows, speed._has_packing): cached.cache_clear()


def test_choices_follow_the_kernels(processor_of):
    "Each kind of processor gets its own modules; in float32 nothing is laid out."
    def kinds(weights, dtype="bfloat16"):
        model = open_packed(dtype=dtype, weights=weights)[0]
        return {type(m).__name__ for m in model.language_model.model.layers.modules()}
    processor_of(bfloat16=True, bytes=True, packed_bytes=True)
    assert "PackedInt8Linear" in kinds("int8")
    assert ("PackedLinear" in kinds(None)) == speed._has_packing()
    processor_of(bfloat16=False, bytes=False, packed_bytes=False)
    assert "Int8Linear" in kinds("int8") and "WideLinear" in kinds(None)
    assert not {"PackedLinear", "PackedInt8Linear"} & (kinds("int8") | kinds(None))
    assert not {"WideLinear", "PackedLinear"} & kinds(None, "float32")


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (2, 40), (0,)])
def test_wide_products(shape):
    """Weights in bfloat16, widened block by block: no less exact than float32 with the same
    weights."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 1100, dtype=torch.bfloat16)
    x = torch.randn(*shape, 96).bfloat16()
    got = WideLinear(linear)(x)
    expected = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    torch.testing.assert_close(got.float(), expected, rtol=8e-3, atol=1e-3)


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 1, 20), (0,)])
def test_packed_bytes_are_exact(shape, dtype):
    torch.manual_seed(0)
    small = Int8Linear(torch.randn(130, 200).to(dtype))
    small.limit = 0
    x, packed = torch.randn(*shape, 200).to(dtype), PackedInt8Linear(small)
    got, expected = packed(x), x.float() @ dense8(small).T
    assert got.shape == (*shape, 130) and got.dtype == dtype
    if len(x): assert relative(got, expected) < TOLERANCE[dtype]


@needs_bytes
def test_few_rows_keep_sixteen_bits():
    "Up to eight rows a second row of bytes costs nothing, so that inputs lose nothing."
    torch.manual_seed(0)
    small, x = Int8Linear(torch.randn(256, 512).bfloat16()), torch.randn(40, 512).bfloat16()
    packed, expected = PackedInt8Linear(small), x.float() @ dense8(small).T
    few, many = relative(packed(x[:8]), expected[:8]), relative(packed(x), expected)
    assert few < 5e-3 < many


# --- whole models

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, .05)])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_few_rows_and_many_agree(shapes, weights, dtype, tolerance):
    """A cached step takes the kernel, a prefill is multiplied in bytes: both must be the
    same model."""
    case, config = shapes
    model = quantize(random_model(config, dtype), weights)
    assert model.quantization["weights"] == weights
    if dtype == torch.bfloat16: pack(model)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x
              for name, x in batch(case).items()}
    text, (rows, t) = config.text_config, inputs["input_ids"].shape
    with torch.no_grad():
        whole = model(**inputs).logits
        cache = KVCache(text.num_hidden_layers, rows, text.num_key_value_heads, t,
                        text.head_dim, dtype)
        first = {name: x if name == "pixel_values" else x[:, :-5]
                 for name, x in inputs.items()}
        steps = [model(**first, kv_cache=cache, logits_to_keep=1).logits]
        for i in range(t - 5, t - 1):
            mask = inputs["attention_mask"][:, :i + 1]
            steps.append(model(inputs["input_ids"][:, i:i + 1], attention_mask=mask,
                               kv_cache=cache).logits)
    assert relative(torch.cat(steps, dim=1), whole[:, -6:-1].float()) < tolerance


@packs
def test_packed_model_gives_the_same_logits(shapes):
    case, config = shapes
    model, inputs = random_model(config, torch.bfloat16), batch(case)
    exact = random_model(config, torch.bfloat16).float()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, plain = exact(**inputs).logits[real], model(**inputs).logits[real]
        got = pack(model)(**inputs).logits[real]
    assert weights_of(model) == "bfloat16, packed"
    assert any(isinstance(m, PackedLinear) for m in model.modules()) and not any(
        type(m) is nn.Linear for m in model.modules())
    # rounding, no more than without
    assert relative(got, expected) < 1.5 * relative(plain, expected) + 1e-3


@packs
def test_packed_answers(scenes):
    model, processor = load_checkpoint(device="cpu", dtype="bfloat16")
    inputs = processor(scenes, ["caption en"] * len(scenes))
    expected = generate(model, inputs)
    got = generate(pack(model), inputs)
    same = [a == b for a, b in zip(processor.decode(got), processor.decode(expected))]
    assert sum(same) >= len(same) - 1  # two tokens that are nearly as likely may change places


def test_nothing_is_packed_where_it_does_not_pay():
    model, _ = open_packed()
    assert weights_of(model) == "float32" and not any(isinstance(m, PackedLinear)
                                                      for m in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quality_on_the_shipped_model(scenes, dtype):
    """Rounding costs something, eight bits less than four: measured on true captions of
    scenes that it never saw."""
    captions = [make_scene(HELD_OUT + i).caption for i in range(len(scenes))]
    model, processor = load_checkpoint(device="cpu")
    inputs = processor(scenes, ["caption en"] * len(scenes), suffix=captions)
    labels, divergence = inputs.pop("labels"), {}
    def log_probs(model): # of the tokens that follow each other in the captions
        with torch.no_grad():
            return model(**inputs).logits[:,
                                          :-1][labels[:,
                                                      1:] != -100].float().log_softmax(dim=-1)
    expected = log_probs(model)
    for weights in ("int8", "int4"):
        got = log_probs(open_packed(dtype=dtype, weights=weights)[0])
        divergence[weights] = nn.functional.kl_div(got, expected, log_target=True,
                                                   reduction="batchmean").item()
    assert 0 < divergence["int8"] < .2 * divergence["int4"] < .1, divergence


@packs
def test_packed_weights_are_not_saved(tmp_path):
    model, processor = open_packed(dtype="bfloat16", weights="int8")
    with fails(ValueError, "packed weights", "saved"):
        save_model(model, processor, tmp_path/"x")
    assert not (tmp_path/"x").exists()


STATES = dict(deepcopy=copy.deepcopy, pickle=pickle.dumps, float=lambda m: m.float(),
              half=lambda m: m.half(), dtype=lambda m: m.to(torch.float64),
              meta=lambda m: m.to("meta"),
              state_dict=lambda m: m.state_dict(), load=lambda m: m.load_state_dict({}))


@packs
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("change", STATES)
def test_packed_models_say_what_they_cannot(change, weights):
    if weights and not kernels().packed_bytes: pytest.skip("no products of bytes here")
    model, processor = open_packed(dtype="bfloat16", weights=weights)
    with fails(ValueError, "packed weights", "open the folder again, without packing"):
        STATES[change](model)


@packs
def test_what_leaves_a_packed_model_as_it_is_may_be_said(scenes):
    model, processor = open_packed(dtype="bfloat16")
    inputs = processor(scenes[:1], ["caption en"])
    expected = generate(model, inputs)
    for same in (model.to("cpu"), model.to(torch.bfloat16), model.bfloat16(), model.eval(),
                 model.cpu()):
        assert same is model and torch.equal(generate(same, inputs), expected)
