"""Rounded weights: the products, what is rounded, what it costs, and folders that open
without the original."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from paligemma_nb import quantization, speed
from paligemma_nb.checkpoint import WEIGHTS, empty_model, load_checkpoint, save_model
from paligemma_nb.generation import generate
from paligemma_nb.hub import find_model
from paligemma_nb.kernels import Kernels, kernels
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.quantization import (
    Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, int4_rows, load_quantized, pack_int4,
    quantize, unpack_int4, weights_of, write_quantized)
from paligemma_nb.scenes import HELD_OUT, make_scene
from test_checkpoint import edit_json, fails
from test_parity import CASES, batch

ROOT = Path(__file__).resolve().parents[1]
# of a product, relative to its largest entry
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def processor_of(monkeypatch):
    "Sets what the processor can do, as far as its choices go: the kernels themselves stay."
    def override(**found):
        for module in (quantization, speed):
            monkeypatch.setattr(module, "kernels", lambda: Kernels(**found))
    return override


@pytest.fixture(scope="module")
def scenes(): return [make_scene(HELD_OUT + i).image for i in range(12)]


def relative(got, expected):
    return ((got.float() - expected).abs().max() / expected.abs().max()).item()


def dense8(linear): return linear.weight.float() * linear.scale.float()[:, None]


def dense4(linear): # [out, in]
    scale, zero = (x.T.float()[..., None] for x in linear.scale_zero.unbind(-1))
    return ((unpack_int4(linear.weight).float() - 8).unflatten(1, (-1, linear.group_size))
            * scale + zero).flatten(1)


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
    # half, and the scale's rounding
    assert steps.max() < (.51 if dtype != torch.bfloat16 else .76)
    linear.limit = 0  # every row of inputs in 16 bits
    for shape in ((1,), (linear.few,), (linear.few + 1,), (2, 3), (3, 1, 20)):
        x = torch.randn(*shape, inputs).to(dtype)
        assert relative(linear(x), x.float() @ dense8(linear).T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [32, 64])
def test_int4_is_near_and_its_products_are_exact(dtype, group_size, rows):
    torch.manual_seed(0)
    # more than one block of 1024, and not around 0
    weight = torch.randn(1152, 512).to(dtype) + 1
    linear = Int4Linear(weight, group_size, rows)
    assert (linear.group_size, linear.block_rows) == (group_size, rows)
    assert linear.weight.dtype == torch.uint8
    step = linear.scale_zero[..., 0].T.float().repeat_interleave(group_size, dim=1)
    steps = (dense4(linear) - weight.float()).abs() / step
    assert steps.max() < (.51 if dtype != torch.bfloat16 else .6)
    linear.limit = 0
    for shape in ((1,), (Int4Linear.few,), (Int4Linear.few + 1,), (3, 1, 20)):
        x = torch.randn(*shape, 512).to(dtype)
        by_kernel = (x[..., 0].numel() <= Int4Linear.few and int4_rows() == rows
                     and dtype == torch.bfloat16)
        tolerance = TOLERANCE[dtype]
        if not by_kernel and dtype != torch.float32:  # weights are rounded once more, to bytes
            tolerance = max(tolerance, 1.2e-2)
        assert relative(linear(x), x.float() @ dense4(linear).T) < tolerance
    before = dense4(linear)
    linear.block_by(96 - rows)
    assert linear.block_rows == 96 - rows and torch.equal(dense4(linear), before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2),
                                              (torch.float16, 1e-2)])
@pytest.mark.parametrize("bfloat16, bytes_", list(product([True, False], repeat=2)))
def test_large_weights_are_multiplied_in_parts(dtype, tolerance, bfloat16, bytes_,
                                               processor_of):
    processor_of(bfloat16=bfloat16, bytes=bytes_ and kernels().bytes, packed_bytes=False)
    torch.manual_seed(0)
    x = torch.randn(150, 4096).mul(20).to(dtype)  # more rows, too, than are rounded at a time
    weights = torch.randn(1602, 4096).to(dtype) * .02, torch.randn(1088, 4096).to(dtype) * .02
    for linear, dense in ((Int8Linear(weights[0]), dense8), (Int4Linear(weights[1]), dense4)):
        linear.limit = 0
        assert relative(linear(x), x.float() @ dense(linear).T) < tolerance


def test_a_loud_input_does_not_drown_the_others():
    """One number that is far larger than its row would, in eight bits, leave nothing of the
    others."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512), torch.randn(40, 512)
    weight[:, 0], x[:, 0] = 0, 1000  # multiplied by 0, so that what counts are the others
    weight, x = weight.bfloat16(), x.bfloat16()
    linear, expected = Int8Linear(weight), x.float() @ weight.float().T
    assert relative(linear(x), expected) < .02
    linear.limit = 1e9
    drowned = relative(linear(x), expected) > .5
    assert drowned == (kernels().bytes or kernels().packed_bytes) # else nothing is in bytes


@pytest.mark.parametrize("rows", [32, 64])
def test_tables(rows):
    torch.manual_seed(0)
    table, ids = torch.randn(320, 128), torch.randint(320, (3, 7))
    for small, dense in ((Int8Embedding(table), dense8),
                         (Int4Embedding(table, 64, rows), dense4)):
        torch.testing.assert_close(small(ids), dense(small)[ids])
        assert relative(small.attend(table[:2]), table[:2] @ dense(small).T) < 1e-5


def test_no_rows():
    for linear in (Int8Linear(torch.randn(64, 128).bfloat16()),
                   Int4Linear(torch.randn(64, 128).bfloat16())):
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
    assert packed.shape == (128 // rows, 6, rows // 2) and torch.equal(unpack_int4(packed),
                                                                       numbers)
    assert packed[1 if rows < 128 else 0, 3,
                  0] == numbers[rows, 3] + 16 * numbers[rows + rows // 2, 3]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_processors(capability):
    """torch takes the kernels of an older processor if it is told to: layouts and products
    must fit those, too."""
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=env)
    assert done.returncode == 0, done.stderr


ROWS_ANYWHERE = """
import torch; from paligemma_nb.quantization import Int8Linear; torch.manual_seed(0)
for n, k in ((1587, 192), (128, 192), (130, 200)):
    linear = Int8Linear(torch.randn(n, k).bfloat16())
    base = torch.randn(4, k + 9).bfloat16()
    for i in range(9):
        for x in (base[:, i:i + k], base.flatten()[i:i + k]):
            assert torch.equal(linear(x), linear(x.clone()))
"""


def test_rows_anywhere_in_memory():
    """An address that is no multiple of 64 crashes torch 2.13's int8 kernel, and with it the
    process."""
    done = subprocess.run([sys.executable, "-c", ROWS_ANYWHERE], capture_output=True,
                          text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, (done.returncode, done.stderr)


# --- whole models

@pytest.fixture(scope="module", params=["two KV heads, dtype bfloat16", "Gemma 2"])
def shapes(request):
    "Both generations, with sides that the four-bit kernel can take and some that it cannot."
    case = next(c for name, c in CASES.items()
                if ("Gemma 2" in name) == (request.param == "Gemma 2"))
    text = replace(case.config.text_config, hidden_size=64, intermediate_size=128, head_dim=32)
    return case, replace(case.config, text_config=text)


def random_model(config, dtype):
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .1)
    return model.to(dtype)


def test_what_is_rounded(shapes):
    _, config = shapes
    model = quantize(random_model(config, torch.bfloat16), "int4")
    decoder = model.language_model.model
    kinds = {type(m) for m in decoder.layers.modules() if not list(m.children())
             and hasattr(m, "weight")}
    assert not any(isinstance(m, nn.Linear) for m in decoder.modules())
    assert Int4Linear in kinds and isinstance(decoder.embed_tokens,
                                              (Int4Embedding, Int8Embedding))
    for part in (model.vision_tower, model.multi_modal_projector):
        assert not any(isinstance(m, (Int8Linear, Int4Linear)) for m in part.modules())
    assert not any(p.requires_grad for p in model.parameters())
    empty = {weights: empty_model(config) for weights in ("float32", "int8", "int4")}
    for weights in ("int8", "int4"): quantize(empty[weights], weights)
    sizes = {weights: sum(x.nbytes for x in model.state_dict().values())
             for weights, model in empty.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["float32"]


def test_small_weights_stay_on_the_cpu():
    model = quantize(load_checkpoint(device="cpu", dtype="bfloat16")[0], "int8")
    moved = []
    def to_elsewhere(x):
        moved.append(x)
        return x.new_empty(0, device="meta") if len(moved) > 1 else Elsewhere()
    class Elsewhere: device = torch.device("cuda")
    layer = model.language_model.model.layers[0].self_attn.q_proj
    with fails(ValueError, "run on the CPU, not on cuda", "load the model without them"):
        layer._apply(to_elsewhere)
    assert len(moved) == 1  # asked before anything was moved
    copied = copy.deepcopy(model)
    assert torch.equal(copied.float().language_model.model.embed_tokens.weight,
                       model.language_model.model.embed_tokens.weight)


def test_what_was_asked_for_is_kept_whatever_the_sides(tmp_path):
    """No side is a multiple of 64: every matrix gets eight bits, and the folder is still
    one of int4."""
    config = replace(next(iter(CASES.values())).config)
    config = replace(config, text_config=replace(config.text_config, hidden_size=60,
                                                 intermediate_size=100))
    model = quantize(random_model(config, torch.bfloat16), "int4")
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
    assert weights_of(model).startswith("int4 (") and "eight bits" in weights_of(model)
    assert model.quantization["weights"] == "int4"


# --- folders

def reopened(folder): return load_quantized(find_model(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights, group_size", [("int8", 64), ("int4", 32), ("int4", 64)])
def test_saved_and_opened_again(tmp_path, scenes, dtype, weights, group_size):
    model, processor = load_checkpoint(device="cpu", dtype=dtype)
    full = sum(x.nbytes for x in model.state_dict().values())
    save_model(quantize(model, weights, group_size), processor, tmp_path/"small")
    opened, its_processor = reopened(tmp_path/"small")
    assert weights_of(opened) == weights_of(model) and weights in weights_of(model)
    assert opened.state_dict().keys() == model.state_dict().keys() and not opened.training
    for name, x in opened.state_dict().items(): assert torch.equal(x, model.state_dict()[name])
    inputs = processor(scenes[:3], ["caption en"] * 3)
    assert torch.equal(generate(opened, inputs), generate(model, inputs))
    assert its_processor.encode("caption en") == processor.encode("caption en")
    assert (tmp_path/"small"/WEIGHTS).stat().st_size < full
    config = json.loads((tmp_path/"small"/"config.json").read_text())
    assert config["dtype"] == dtype and config["quantization_config"]["weights"] == weights


def test_shards_of_small_weights(tmp_path):
    model, processor = load_checkpoint(device="cpu", dtype="bfloat16")
    save_model(quantize(model, "int8"), processor, tmp_path/"small", max_shard_size=500_000)
    opened = reopened(tmp_path/"small")[0].state_dict()
    assert not (tmp_path/"small"/WEIGHTS).exists()
    assert all(torch.equal(x, opened[name]) for name, x in model.state_dict().items())


@pytest.fixture
def small(tmp_path):
    model, processor = load_checkpoint(device="cpu")
    save_model(quantize(model, "int4", 64, rows=32), processor, tmp_path/"small")
    return tmp_path/"small"


def test_a_folder_from_another_kind_of_processor(small, scenes):
    model, processor = reopened(small)
    original = quantize(load_checkpoint(device="cpu")[0], "int4")
    inputs = processor(scenes[:2], ["caption en"] * 2)
    assert torch.equal(generate(model, inputs), generate(original, inputs))
    assert json.loads((small/"config.json").read_text())["quantization_config"]["rows"] == 32


def test_what_is_refused(small, tmp_path):
    model, processor = load_checkpoint(device="cpu")
    for weights in ("int2", "", None):
        with fails(ValueError, "'int8' or 'int4'", repr(weights)): quantize(model, weights)
    for size in (0, 16, 48):
        with fails(ValueError, "32, 64, 128 or 256", str(size)): quantize(model, "int4", size)
    with fails(ValueError, "rows: expected 32 or 64, got 8"): quantize(model, "int4", rows=8)
    assert weights_of(model) == "float32"  # a refusal changes nothing
    quantize(model, "int8")
    for weights in ("int8", "int4"):
        with fails(ValueError, "weights are int8 already"): quantize(model, weights)
    with fails(ValueError, str(small), "paligemma_nb.load_model"): load_checkpoint(small)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_tensor_too_many_is_not_saved(weights, tmp_path):
    model, processor = load_checkpoint(device="cpu")
    quantize(model, weights).multi_modal_projector.adapter = nn.Linear(2, 2)
    with fails(ValueError, "the model to save", "surplus 2", "adapter.bias"):
        save_model(model, processor, tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_saved_as_int4_opens_as_int4(tmp_path):
    model, processor = load_checkpoint(device="cpu", dtype="bfloat16")
    # 192 wide: mostly eight bits
    save_model(quantize(model, "int4", 256), processor, tmp_path/"x")
    assert reopened(tmp_path/"x")[0].quantization["weights"] == "int4"


@pytest.mark.parametrize("settings", [
    dict(quant_method="gptq", bits=4), {}, [], "int4", dict(quant_method="paligemma_nb"),
    dict(quant_method="paligemma_nb", weights="int3"),
    dict(quant_method="paligemma_nb", weights="int4", group_size="64"),
    dict(quant_method="paligemma_nb", weights="int4", rows=7),
    dict(quant_method="paligemma_nb", weights="int4", rows=8)])
def test_settings_that_make_no_sense(small, settings):
    edit_json(small/"config.json", quantization_config=settings)
    with fails(ValueError, str(small/"config.json"), "quantization_config"): reopened(small)


def test_settings_that_do_not_fit_the_file(small):
    edit_json(small/"config.json",
              quantization_config=dict(quant_method="paligemma_nb", weights="int8"))
    with fails(ValueError, str(small/WEIGHTS), "surplus"): reopened(small)
    edit_json(small/"config.json", quantization_config=dict(quant_method="paligemma_nb",
                                                            weights="int4", group_size=32))
    with fails(ValueError, str(small/WEIGHTS), "expected ["): reopened(small)
    whole = (small/WEIGHTS).read_bytes()
    for size in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        (small/WEIGHTS).write_bytes(whole[:size])
        with fails(ValueError, str(small/WEIGHTS)): reopened(small)


def test_written_in_one_step(small, tmp_path, capsys):
    save_model(*load_checkpoint(device="cpu"), tmp_path/"plain")
    write_quantized(str(tmp_path/"plain"), str(tmp_path/"eight"), weights="int8")
    assert capsys.readouterr().out == f"written: {tmp_path/'eight'}\n"
    assert weights_of(reopened(tmp_path/"eight")[0]) == "int8"
    for wrong in (dict(weights="int2"), dict(group_size=5), dict(model_path=str(small))):
        how = dict(model_path=str(tmp_path/"plain"), output_path=str(tmp_path/"x")) | wrong
        with fails(ValueError): write_quantized(**how)
    assert not (tmp_path/"x").exists()
