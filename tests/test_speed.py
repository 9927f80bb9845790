"Packed and quantised weights: the same products, the same answers, and folders that open without the original."
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from paligemma_nb import inference, kernels as kernels_room, quantization, speed
from paligemma_nb.checkpoint import WEIGHTS, empty_model, load_model, save_model
from paligemma_nb.generation import generate
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.kernels import Kernels, in_bytes, kernels
from paligemma_nb.quantization import (Int4Embedding, Int4Linear, Int8Embedding, Int8Linear,
                                       int4_rows, pack_int4, quantize, save_quantized,
                                       unpack_int4, weights_of)
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.speed import (PackedInt8Linear, PackedLinear, WideLinear, can_pack, open_model,
                                pack)
from test_parity import CASES, batch

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of a product, to its largest entry
packs = pytest.mark.skipif(not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="no bfloat16 kernels here")


needs_bytes = pytest.mark.skipif(not kernels().packed_bytes, reason="no products of bytes here")


@pytest.fixture
def processor_of(monkeypatch):
    "Sets what the processor can do, as far as its choices go: the kernels themselves stay."
    def override(**found):
        for module in (quantization, speed): monkeypatch.setattr(module, "kernels", lambda: Kernels(**found))
    return override


@pytest.fixture(scope="module")
def scenes(): return [make_scene(HELD_OUT + i).image for i in range(12)]


def relative(got, expected): return ((got.float() - expected).abs().max() / expected.abs().max()).item()


def dense8(linear): return linear.weight.float() * linear.scale.float()[:, None]


def dense4(linear): # [out, in]
    scale, zero = (x.T.float()[..., None] for x in linear.scale_zero.unbind(-1))
    return ((unpack_int4(linear.weight).float() - 8).unflatten(1, (-1, linear.group_size)) * scale + zero).flatten(1)


# --- one matrix

@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs, inputs", [(192, 256), (61, 64), (130, 200), (1, 36)])
def test_int8_is_near_and_its_products_are_exact(dtype, outputs, inputs):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).to(dtype)
    weight[0] *= 100  # a loud row must not spoil the others
    linear = Int8Linear(weight)
    assert linear.weight.dtype == torch.int8 and linear.scale.dtype == dtype
    steps = (dense8(linear) - weight.float()).abs() / linear.scale.float()[:, None]
    assert steps.max() < (.51 if dtype != torch.bfloat16 else .76)  # half, and the scale's rounding
    linear.limit = 0  # every row of inputs in 16 bits
    for shape in ((1,), (linear.few,), (linear.few + 1,), (2, 3), (3, 1, 20)):
        x = torch.randn(*shape, inputs).to(dtype)
        assert relative(linear(x), x.float() @ dense8(linear).T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [32, 64])
def test_int4_is_near_and_its_products_are_exact(dtype, group_size, rows):
    torch.manual_seed(0)
    weight = torch.randn(1152, 512).to(dtype) + 1  # more than one block of 1024, and not around 0
    linear = Int4Linear(weight, group_size, rows)
    assert (linear.group_size, linear.block_rows, linear.weight.dtype) == (group_size, rows, torch.uint8)
    step = linear.scale_zero[..., 0].T.float().repeat_interleave(group_size, dim=1)
    assert ((dense4(linear) - weight.float()).abs() / step).max() < (.51 if dtype != torch.bfloat16 else .6)
    linear.limit = 0
    for shape in ((1,), (Int4Linear.few,), (Int4Linear.few + 1,), (3, 1, 20)):
        x = torch.randn(*shape, 512).to(dtype)
        # else the weights are rounded once more, to bytes
        by_kernel = x[..., 0].numel() <= Int4Linear.few and int4_rows() == rows and dtype == torch.bfloat16
        tolerance = TOLERANCE[dtype] if by_kernel or dtype == torch.float32 else max(TOLERANCE[dtype], 1.2e-2)
        assert relative(linear(x), x.float() @ dense4(linear).T) < tolerance
    before = dense4(linear)
    linear.block_by(96 - rows)
    assert linear.block_rows == 96 - rows and torch.equal(dense4(linear), before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("bfloat16, bytes_", list(product([True, False], repeat=2)))
def test_large_weights_are_multiplied_in_parts(dtype, tolerance, bfloat16, bytes_, processor_of):
    processor_of(bfloat16=bfloat16, bytes=bytes_ and kernels().bytes, packed_bytes=False)
    torch.manual_seed(0)
    x = torch.randn(150, 4096).mul(20).to(dtype)  # more rows, too, than are rounded at a time
    weights = torch.randn(1602, 4096).to(dtype) * .02, torch.randn(1088, 4096).to(dtype) * .02
    for linear, dense in ((Int8Linear(weights[0]), dense8), (Int4Linear(weights[1]), dense4)):
        linear.limit = 0
        assert relative(linear(x), x.float() @ dense(linear).T) < tolerance


def test_inputs_in_bytes():
    torch.manual_seed(0)
    x = torch.randn(300, 2048)
    x[::3, 0] = 100  # a peak of more than 20 in every third row
    x[1] = 0
    for limit, expected in ((1e9, [1]), (20, [1, *range(0, 300, 3)]), (0, range(300))):
        numbers, step, twice = in_bytes(x, limit)
        assert sorted(twice.tolist()) == sorted(expected)
        assert (numbers.dtype, len(numbers)) == (torch.int8, 300 + len(twice))
        assert torch.equal(numbers[:300].abs().amax(dim=1) == 127, (x != 0).any(dim=1))
        back = numbers[:300].float().index_add_(0, twice, numbers[300:].float(), alpha=1 / 254) * step
        worst = torch.full((300,), .5001).index_fill_(0, twice, .5001 / 254 + 1e-5) * step[:, 0]  # half a step
        assert ((back - x).abs().amax(dim=1) <= worst).all()


def test_a_loud_input_does_not_drown_the_others():
    "One number that is far larger than its row would, in eight bits, leave nothing of the others."
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512), torch.randn(40, 512)
    weight[:, 0], x[:, 0] = 0, 1000  # multiplied by 0, so that what counts are the others
    linear, expected = Int8Linear(weight.bfloat16()), x.bfloat16().float() @ weight.bfloat16().float().T
    assert relative(linear(x.bfloat16()), expected) < .02
    linear.limit = 1e9
    assert relative(linear(x.bfloat16()), expected) > .5


@pytest.mark.parametrize("rows", [32, 64])
def test_tables(rows):
    torch.manual_seed(0)
    table, ids = torch.randn(320, 128), torch.randint(320, (3, 7))
    for small, dense in ((Int8Embedding(table), dense8), (Int4Embedding(table, 64, rows), dense4)):
        torch.testing.assert_close(small(ids), dense(small)[ids])
        assert relative(small.attend(table[:2]), table[:2] @ dense(small).T) < 1e-5


def test_no_rows():
    for linear in (Int8Linear(torch.randn(64, 128).bfloat16()), Int4Linear(torch.randn(64, 128).bfloat16())):
        assert linear(torch.zeros(0, 128).bfloat16()).shape == (0, 64)


def test_rows_of_one_value_stay_finite():
    for constant in (0., 2.):
        weight = torch.full((64, 64), constant, dtype=torch.bfloat16)
        assert (dense4(Int4Linear(weight)) - constant).abs().max() < .02
        assert (dense8(Int8Linear(weight)) - constant).abs().max() < .02


@pytest.mark.parametrize("rows", [2, 32, 64])
def test_int4_blocks(rows):
    numbers = torch.randint(16, (128, 6), dtype=torch.uint8)
    packed = pack_int4(numbers, rows)
    assert packed.shape == (128 // rows, 6, rows // 2) and torch.equal(unpack_int4(packed), numbers)
    assert packed[1 if rows < 128 else 0, 3, 0] == numbers[rows, 3] + 16 * numbers[rows + rows // 2, 3]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_processors(capability):
    "torch takes the kernels of an older processor if it is told to: layouts and products must fit those, too."
    code = """import torch; from paligemma_nb.quantization import *
torch.manual_seed(0); w, x = torch.randn(192, 128).bfloat16(), torch.randn(3, 128).bfloat16()
for rows in {32, 64, int4_rows() or 64}:
    linear = Int4Linear(w, 64, rows)
    expected = linear(x.float())
    assert (linear(x) - expected).abs().max() < .02 * expected.abs().max()
linear = Int8Linear(w)
expected = linear(x.float())
assert (linear(x) - expected).abs().max() < .01 * expected.abs().max()"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


ISAS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16")


@pytest.mark.parametrize("isa", ISAS)
def test_whichever_kernels_onednn_has(isa):
    """oneDNN can be told to do without newer instructions. Whatever is chosen then, products are
    right; bytes above all, which an older processor adds up wrongly."""
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
a, b = (torch.full((n, 1024), 127, dtype=torch.int8) for n in (64, 32))  # sums beyond sixteen bits
if found.bytes: assert (torch._int_mm(a, b.t()) == 127 * 127 * 1024).all()
print(found)"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    if isa == "AVX2": env |= {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "Kernels(" in done.stdout, done.stderr


HIDDEN = [(torch, "_int_mm"), (torch, "_weight_int8pack_mm"),
          (torch.ops.aten, "_weight_int4pack_mm_for_cpu"), (torch.ops.onednn, "qlinear_prepack"),
          (torch.ops.onednn, "qlinear_pointwise"), (torch.ops.mkldnn, "_linear_pointwise"),
          (torch.ops.mkldnn, "_reorder_linear_weight")]


@pytest.mark.parametrize("hidden", [*([h] for h in HIDDEN), HIDDEN], ids=lambda h: "+".join(n for _, n in h))
def test_a_build_without_private_operations(hidden, monkeypatch, scenes):
    "They may go with any release of PyTorch: something else then does the work."
    def gone(*args, **kwargs): raise AttributeError("no such operation")
    for cached in (kernels, int4_rows, speed._has_packing): cached.cache_clear()
    try:
        for place, name in hidden:
            if place is torch: monkeypatch.delattr(place, name)
            else: monkeypatch.setattr(place, name, gone)
        for weights in (None, "int8", "int4"):
            model, processor = open_model(device="cpu", dtype="bfloat16", weights=weights)
            inputs = processor(scenes[:2], ["caption en"] * 2)
            got = processor.decode(generate(model, inputs, max_new_tokens=30))
            assert got[0].startswith("a yellow star, a blue circle"), (weights, got)
    finally:
        monkeypatch.undo()
        for cached in (kernels, int4_rows, speed._has_packing): cached.cache_clear()


def test_choices_follow_the_kernels(processor_of):
    "Each kind of processor gets its own modules; in float32 nothing is laid out."
    def kinds(weights, dtype="bfloat16"):
        model = open_model(device="cpu", dtype=dtype, weights=weights)[0]
        return {type(m).__name__ for m in model.language_model.model.layers.modules()}
    processor_of(bfloat16=True, bytes=True, packed_bytes=True)
    assert "PackedInt8Linear" in kinds("int8") and "PackedLinear" in kinds(None)
    processor_of(bfloat16=False, bytes=False, packed_bytes=False)
    assert "Int8Linear" in kinds("int8") and "WideLinear" in kinds(None)
    assert not {"PackedLinear", "PackedInt8Linear"} & (kinds("int8") | kinds(None))
    assert not {"WideLinear", "PackedLinear"} & kinds(None, "float32")


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (2, 40), (0,)])
def test_wide_products(shape):
    "Weights in bfloat16, widened block by block: no less exact than float32 with the same weights."
    torch.manual_seed(0)
    linear = nn.Linear(96, 1100, dtype=torch.bfloat16)
    x = torch.randn(*shape, 96).bfloat16()
    got, expected = WideLinear(linear)(x), nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
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


def test_scratch_memory_is_a_threads_own():
    "A product that reads what another thread has written there would be wrong without a word."
    places, both = [], threading.Barrier(2)
    def take():
        places.append(kernels_room._scratch("product", torch.float32, 8, 8).data_ptr())
        both.wait()  # both are alive, so that memory that was given back is not given out again
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(set(places)) == 2


def test_names_do_not_share_scratch_memory():
    a, b = (kernels_room._scratch(name, torch.float32, 4) for name in ("weight", "product"))
    a.fill_(1), b.fill_(2)
    assert a.sum() == 4


def test_rows_anywhere_in_memory():
    "An address that is no multiple of 64 crashes torch 2.13's int8 kernel, and with it the process."
    code = ("import torch; from paligemma_nb.quantization import Int8Linear; torch.manual_seed(0)\n"
            "for n, k in ((1587, 192), (128, 192), (130, 200)):\n"
            "    l, base = Int8Linear(torch.randn(n, k).bfloat16()), torch.randn(4, k + 9).bfloat16()\n"
            "    for i in range(9): assert torch.equal(l(base[:, i:i + k]), l(base[:, i:i + k].clone()))\n"
            "    for i in range(9): assert torch.equal(l(base.flatten()[i:i + k]), l(base.flatten()[i:i + k].clone()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, (done.returncode, done.stderr)


# --- whole models

@pytest.fixture(scope="module", params=["two KV heads, dtype bfloat16", "Gemma 2"])
def shapes(request):
    "Both generations, with sides that the four-bit kernel can take and some that it cannot."
    case = next(c for name, c in CASES.items() if ("Gemma 2" in name) == (request.param == "Gemma 2"))
    text = replace(case.config.text_config, hidden_size=64, intermediate_size=128, head_dim=32)
    return case, replace(case.config, text_config=text)


def random_model(config, dtype):
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .1)
    return model.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, .05)])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_few_rows_and_many_agree(shapes, weights, dtype, tolerance):
    "A cached step takes the kernel, a prefill is multiplied in bytes: both must be the same model."
    case, config = shapes
    model = quantize(random_model(config, dtype), weights)
    assert model.quantization["weights"] == weights
    if dtype == torch.bfloat16: pack(model)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch(case).items()}
    text, (rows, t) = config.text_config, inputs["input_ids"].shape
    with torch.no_grad():
        whole = model(**inputs).logits
        cache = KVCache(text.num_hidden_layers, rows, text.num_key_value_heads, t, text.head_dim, dtype)
        first = {name: x if name == "pixel_values" else x[:, :-5] for name, x in inputs.items()}
        steps = [model(**first, kv_cache=cache, logits_to_keep=1).logits]
        for i in range(t - 5, t - 1):
            mask = inputs["attention_mask"][:, :i + 1]
            steps.append(model(inputs["input_ids"][:, i:i + 1], attention_mask=mask, kv_cache=cache).logits)
    assert relative(torch.cat(steps, dim=1), whole[:, -6:-1].float()) < tolerance


def test_what_is_rounded(shapes):
    _, config = shapes
    model = quantize(random_model(config, torch.bfloat16), "int4")
    decoder = model.language_model.model
    kinds = {type(m) for m in decoder.layers.modules() if not list(m.children()) and hasattr(m, "weight")}
    assert not any(isinstance(m, nn.Linear) for m in decoder.modules())
    assert Int4Linear in kinds and isinstance(decoder.embed_tokens, (Int4Embedding, Int8Embedding))
    for part in (model.vision_tower, model.multi_modal_projector):
        assert not any(isinstance(m, (Int8Linear, Int4Linear)) for m in part.modules())
    assert not any(p.requires_grad for p in model.parameters())
    sizes = {weights: sum(x.nbytes for x in quantize(empty_model(config), weights).state_dict().values())
             for weights in ("int8", "int4")}
    assert sizes["int4"] < sizes["int8"] < sum(x.nbytes for x in empty_model(config).state_dict().values())


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
    assert relative(got, expected) < 1.5 * relative(plain, expected) + 1e-3  # rounding, no more than without


@packs
def test_packed_answers(scenes):
    model, processor = load_model(device="cpu", dtype="bfloat16")
    inputs = processor(scenes, ["caption en"] * len(scenes))
    expected = generate(model, inputs)
    got = generate(pack(model), inputs)
    same = [a == b for a, b in zip(processor.decode(got), processor.decode(expected))]
    assert sum(same) >= len(same) - 1  # two tokens that are nearly as likely may change places


def test_nothing_is_packed_where_it_does_not_pay():
    model, _ = open_model(device="cpu")
    assert weights_of(model) == "float32" and not any(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quality_on_the_shipped_model(scenes, dtype):
    "Rounding costs something, eight bits less than four: measured on true captions of scenes that it never saw."
    captions = [make_scene(HELD_OUT + i).caption for i in range(len(scenes))]
    model, processor = load_model(device="cpu")
    inputs = processor(scenes, ["caption en"] * len(scenes), suffix=captions)
    labels, divergence = inputs.pop("labels"), {}
    def log_probs(model): # of the tokens that follow each other in the captions
        with torch.no_grad(): return model(**inputs).logits[:, :-1][labels[:, 1:] != -100].float().log_softmax(dim=-1)
    expected = log_probs(model)
    for weights in ("int8", "int4"):
        got = log_probs(open_model(device="cpu", dtype=dtype, weights=weights)[0])
        divergence[weights] = nn.functional.kl_div(got, expected, log_target=True, reduction="batchmean").item()
    assert 0 < divergence["int8"] < .2 * divergence["int4"] < .1, divergence


# --- folders

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights, group_size", [("int8", 64), ("int4", 32), ("int4", 64)])
def test_saved_and_opened_again(tmp_path, scenes, dtype, weights, group_size):
    model, processor = load_model(device="cpu", dtype=dtype)
    save_quantized(quantize(model, weights, group_size), processor, tmp_path/"small")
    opened, its_processor = quantization.load_quantized(tmp_path/"small")
    assert weights_of(opened) == weights_of(model)
    for name, x in opened.state_dict().items(): assert torch.equal(x, model.state_dict()[name])
    opened, its_processor = open_model(tmp_path/"small")
    assert weights_of(opened) == weights_of(model) and weights in weights_of(model)
    inputs = processor(scenes[:3], ["caption en"] * 3)
    got, expected = its_processor.decode(generate(opened, inputs)), processor.decode(generate(model, inputs))
    assert got == expected or dtype == "bfloat16" and sum(map(str.__eq__, got, expected)) >= 2
    assert open_model(tmp_path/"small", weights=weights)
    full = sum(x.nbytes for x in load_model(device="cpu", dtype=dtype)[0].state_dict().values())
    assert (tmp_path/"small"/WEIGHTS).stat().st_size < full


@pytest.fixture
def small(tmp_path):
    model, processor = load_model(device="cpu")
    save_quantized(quantize(model, "int4", 64, rows=32), processor, tmp_path/"small")
    return tmp_path/"small"


def test_a_folder_from_another_kind_of_processor(small, scenes):
    model, processor = open_model(small)
    original = quantize(load_model(device="cpu")[0], "int4")
    inputs = processor(scenes[:2], ["caption en"] * 2)
    assert torch.equal(generate(model, inputs), generate(original, inputs))
    assert json.loads((small/"config.json").read_text())["quantization_config"]["rows"] == 32


def refused(f, *words, error=ValueError):
    with pytest.raises(error) as info: f()
    assert all(str(word) in str(info.value) for word in words) and "\n" not in str(info.value), str(info.value)


def edit(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_refused(small, tmp_path):
    model, processor = load_model(device="cpu")
    for weights in ("int2", "", None): refused(lambda: quantize(model, weights), "'int8' or 'int4'", repr(weights))
    for size in (0, 16, 48): refused(lambda: quantize(model, "int4", size), "32, 64, 128 or 256", size)
    assert weights_of(model) == "float32"  # a refusal changes nothing
    refused(lambda: save_quantized(model, processor, tmp_path/"x"), "as `quantize` leaves it", "float32")
    quantize(model, "int8")
    for weights in ("int8", "int4"): refused(lambda: quantize(model, weights), "weights are int8 already")
    refused(lambda: save_model(model, processor, tmp_path/"x"), "the model to save")
    refused(lambda: load_model(small), small, "paligemma_nb.speed.open_model")
    refused(lambda: open_model(small, weights="int8"), small, "holds int4 weights, not int8")
    refused(lambda: open_model(small, dtype="float32"), small, "in the dtype")
    refused(lambda: open_model(small, device="meta"), small, "on the CPU")
    refused(lambda: open_model(small, weights="int3"), small, "int3")
    assert not (tmp_path/"x").exists()


@packs
def test_packed_weights_are_not_saved(tmp_path):
    model, processor = open_model(device="cpu", dtype="bfloat16", weights="int8")
    refused(lambda: save_quantized(model, processor, tmp_path/"x"), "packed weights", "saved")
    assert not (tmp_path/"x").exists()


STATES = dict(deepcopy=copy.deepcopy, pickle=pickle.dumps, float=lambda m: m.float(),
              half=lambda m: m.half(), dtype=lambda m: m.to(torch.float64), meta=lambda m: m.to("meta"),
              state_dict=lambda m: m.state_dict(), load=lambda m: m.load_state_dict({}))


@packs
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("change", STATES)
def test_packed_models_say_what_they_cannot(change, weights):
    if weights and not kernels().packed_bytes: pytest.skip("no products of bytes here")
    model, processor = open_model(device="cpu", dtype="bfloat16", weights=weights)
    refused(lambda: STATES[change](model), "packed weights", "open the folder again, without packing")


@packs
def test_what_leaves_a_packed_model_as_it_is_may_be_said(scenes):
    model, processor = open_model(device="cpu", dtype="bfloat16")
    inputs = processor(scenes[:1], ["caption en"])
    expected = generate(model, inputs)
    for same in (model.to("cpu"), model.to(torch.bfloat16), model.bfloat16(), model.eval(), model.cpu()):
        assert same is model and torch.equal(generate(same, inputs), expected)


def test_small_weights_stay_on_the_cpu():
    model = quantize(load_model(device="cpu", dtype="bfloat16")[0], "int8")
    moved = []
    def to_elsewhere(x): moved.append(x); return x.new_empty(0, device="meta") if len(moved) > 1 else Elsewhere()
    class Elsewhere: device = torch.device("cuda")
    layer = model.language_model.model.layers[0].self_attn.q_proj
    refused(lambda: layer._apply(to_elsewhere), "run on the CPU, not on cuda", "load the model without them")
    assert len(moved) == 1  # asked before anything was moved
    copied = copy.deepcopy(model)
    assert torch.equal(copied.float().language_model.model.embed_tokens.weight,
                       model.language_model.model.embed_tokens.weight)


def test_what_was_asked_for_is_kept_whatever_the_sides(tmp_path):
    "No side is a multiple of 64: every matrix gets eight bits, and the folder is still one of int4."
    config = replace(next(iter(CASES.values())).config)
    config = replace(config, text_config=replace(config.text_config, hidden_size=60, intermediate_size=100))
    model = quantize(random_model(config, torch.bfloat16), "int4")
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
    assert weights_of(model).startswith("int4 (") and "eight bits" in weights_of(model)
    assert model.quantization["weights"] == "int4"


def test_saved_as_int4_opens_as_int4(tmp_path, processor_of):
    model, processor = load_model(device="cpu", dtype="bfloat16")
    save_quantized(quantize(model, "int4", 256), processor, tmp_path/"x")  # 192 wide: mostly eight bits
    assert open_model(tmp_path/"x", weights="int4")[0].quantization["weights"] == "int4"


@pytest.mark.parametrize("dtype, weights, pays, expected", [
    ("float32", "int8", True, "in float32, int8 weights save memory and no time"),
    ("bfloat16", "int4", False, "on this processor int4 weights save memory"),
    ("bfloat16", "int4", True, None), ("bfloat16", "int8", False, None), ("bfloat16", None, False, None)])
def test_opening_says_where_small_weights_do_not_pay(dtype, weights, pays, expected, monkeypatch):
    monkeypatch.setattr(speed, "int4_pays", lambda: pays)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_model(device="cpu", dtype=dtype, weights=weights)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == bool(expected) and (not expected or said[0].startswith(expected)), said


@pytest.mark.parametrize("settings", [
    dict(quant_method="gptq", bits=4), {}, [], "int4", dict(quant_method="paligemma_nb"),
    dict(quant_method="paligemma_nb", weights="int3"),
    dict(quant_method="paligemma_nb", weights="int4", group_size="64"),
    dict(quant_method="paligemma_nb", weights="int4", rows=7),
    dict(quant_method="paligemma_nb", weights="int4", rows=8)])
def test_settings_that_make_no_sense(small, settings):
    edit(small/"config.json", quantization_config=settings)
    refused(lambda: open_model(small), small/"config.json", "quantization_config")


def test_settings_that_do_not_fit_the_file(small):
    edit(small/"config.json", quantization_config=dict(quant_method="paligemma_nb", weights="int8"))
    refused(lambda: open_model(small), small/WEIGHTS, "surplus")
    edit(small/"config.json", quantization_config=dict(quant_method="paligemma_nb", weights="int4", group_size=32))
    refused(lambda: open_model(small), small/WEIGHTS, "expected [")
    whole = (small/WEIGHTS).read_bytes()
    for size in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        (small/WEIGHTS).write_bytes(whole[:size])
        refused(lambda: open_model(small), small/WEIGHTS)


def test_both_commands(tmp_path, capsys):
    tiny = Path(quantization.__file__).parent/"tiny"
    command = [sys.executable, "-m", "paligemma_nb.quantization", "quantize", str(tiny)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    def run(*arguments):
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env)
    done = run(tmp_path/"small", "--weights", "int8")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"written: {tmp_path/'small'}\n", "")
    for wrong in (["--weights=int2"], ["--group_size=5"], ["--bits=4"]):
        done = run(tmp_path/"x", *wrong)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path/"x").exists()
    for flags in (["--quantize=int8"], [f"--model_path={tmp_path/'small'}"]):
        assert inference.main([*flags, "--only_cpu"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("device: cpu, weights: int8\n") and len(out.splitlines()) == 2
        assert err == "note: in float32, int8 weights save memory and no time; dtype='bfloat16' is faster\n"
    assert inference.main(["--dtype=bfloat16", "--only_cpu"]) == 0
    assert capsys.readouterr().out.startswith("device: cpu, weights: bfloat16")
    for flag in ("--quantize=int4", "--dtype=float32"):
        assert inference.main([flag, f"--model_path={tmp_path/'small'}", "--only_cpu"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
