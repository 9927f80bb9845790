"""Exported graphs: the numbers and answers of the model they were made of, files that open in
onnxruntime and Node, folders that are whole or not there."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from paligemma_nb import export, load_model, pack, quantize
from paligemma_nb.attention import answer_attention
from paligemma_nb.checkpoint import read_config
from paligemma_nb.export import (
    FORMATS, GRAPHS, FunctionalCache, OnnxModel, export_model, to_float16, watch_attention,
    write_onnx)
from paligemma_nb.generation import generate, stream
from paligemma_nb.hub import find_folder
from paligemma_nb.inference import main
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.opening import answer
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import load_mask_vae
from paligemma_nb.tasks import KIND_WEIGHTS, sample_examples
from test_checkpoint import fails
from test_parity import CASES, IMAGE, VOCAB

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")


SHIPPED = find_folder(None)


class NoText: # a processor without files
    def save_pretrained(self, folder): pass


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The shipped model, exported by the command"
    path = tmp_path_factory.mktemp("exported")/"tiny"
    words = ["export", str(SHIPPED), str(path), "--attention", "--weights", *FORMATS]
    assert main(words) == 0
    return path


@pytest.fixture(scope="module")
def questions():
    "200 prompts of all kinds, each about a scene of its own"
    rng, kinds = np.random.default_rng(0), KIND_WEIGHTS | dict(segment=6, several=4)
    scenes = [make_scene(HELD_OUT + 500 + i) for i in range(200)]
    asked = [sample_examples(scene, 1, rng, kinds)[0] for scene in scenes]
    return [scene.image for scene in scenes], [example.prompt for example in asked]


def answers(model, processor, questions):
    found = []
    for i in range(0, len(questions[0]), 25):
        inputs = processor(*(part[i:i + 25] for part in questions))
        found += [[t for t in row if t] for row in generate(model, inputs).tolist()]
    return found


# --- answers

def test_200_answers_are_the_same(shipped, folder, questions):
    model, processor = shipped
    expected = answers(model, processor, questions)
    assert len({len(row) for row in expected}) > 5  # words, boxes, masks
    assert answers(OnnxModel(folder), processor, questions) == expected
    half = answers(OnnxModel(folder, "float16"), processor, questions)
    assert sum(a == b for a, b in zip(half, expected)) >= 195  # near ties fall either way


def test_what_is_built_on_generate_takes_an_exported_model(shipped, folder):
    model, processor = shipped
    ours, images = OnnxModel(folder), [make_scene(HELD_OUT + i).image for i in range(2)]
    prompts = ["caption en", "detect red circle"]
    expected = answer(model, processor, images, prompts)
    assert answer(ours, processor, images, prompts) == expected
    inputs = processor(images[:1], prompts[:1])
    assert "".join(stream(ours, processor, inputs)) == processor.decode(
        generate(model, inputs))[0]


# --- numbers

ODD = {
    "Gemma, two KV heads": "two KV heads, heads wider than hidden",
    "Gemma 2, a short window": "Gemma 2, the window ends in the prompt",
    "Gemma 2, no caps": "Gemma 2, no caps, others slide"}


@pytest.fixture(scope="module", params=ODD.values(), ids=ODD.keys())
def odd(request, tmp_path_factory):
    "A model with random weights, and its graphs with the weights in files of their own"
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(CASES[request.param].config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .17)
    path = tmp_path_factory.mktemp("odd")/"model"
    write_onnx(model, NoText(), path, attention=True, max_file_size=10_000)
    return model, OnnxModel(path), path


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def text(*shape): return torch.randint(2, VOCAB - 20, shape)


@torch.no_grad()
def test_prompt_token_and_suffix_of_odd_models(odd):
    model, graphs, _ = odd
    vision, decoder = model.config.vision_config, model.config.text_config
    n = vision.num_image_tokens
    for b, padding in ((3, 2), (1, 0)): # neither is the batch of the trace
        pixels = torch.rand(b, vision.num_channels, *[vision.image_size] * 2) * 2 - 1
        ids = torch.cat((torch.full((b, n), IMAGE), text(b, 9)), dim=1)
        mask = torch.ones_like(ids)
        if padding:
            ids = torch.cat((torch.zeros(b, padding, dtype=torch.long), ids), dim=1)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
            ids[1:, :padding] = text(b - 1, padding)
        pair = [(m, KVCache(decoder.num_hidden_layers, b, decoder.num_key_value_heads, 99,
                            decoder.head_dim)) for m in (model, graphs)]
        given, images = mask, dict(pixel_values=pixels)
        for t, keep in ((ids.shape[1], 3), (1, 1), (12, 0), (1, 5)): # 12: past the windows
            new = ids if t == ids.shape[1] else text(b, t)
            got = [m(new, attention_mask=given, kv_cache=cache, logits_to_keep=keep, **images)
                   for m, cache in pair]
            assert got[0].logits.shape[1] == min(t, keep or t)
            close(got[1].logits, got[0].logits)
            given = torch.cat((given, torch.ones(b, 12 if t == 1 else 1).long()), dim=1)
            images = {}


def test_weights_beside_large_graphs(odd):
    _, _, path = odd
    names = {file.name for file in (path/"onnx").iterdir()}
    outside = json.loads((path/"config.json").read_text())["transformers.js_config"]
    outside = outside["use_external_data_format"]
    assert outside and names == {f"{name}.onnx" for name in GRAPHS[:3]} | {
        f"{name}_data" for name in outside}


def test_attention_is_that_of_the_model(shipped, folder):
    model, processor = shipped
    image, prompt = make_scene(HELD_OUT + 3).image, "caption en"
    inputs = processor([image], [prompt])
    ids, ours = generate(model, inputs), OnnxModel(folder)
    expected = answer_attention(model, inputs, ids, layer=2, head=1)  # [1, t, n]
    embeds = ours.run("embed_tokens", input_ids=inputs["input_ids"])["inputs_embeds"]
    embeds[:, :64] = ours.get_image_features(inputs["pixel_values"])
    text, past = model.config.text_config, {}
    for i in range(text.num_hidden_layers):
        for part in ("key", "value"):
            past[f"past_key_values.{i}.{part}"] = torch.zeros(1, 1, 0, text.head_dim)
    out = ours.run("decoder_model_merged", inputs_embeds=embeds, **past,
                   attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                   num_logits_to_keep=torch.tensor(1))
    seen = out["attentions.2"]
    assert seen.shape == (1, text.num_attention_heads, *[embeds.shape[1]] * 2)
    assert torch.allclose(seen[0, 1, -1, :64], expected[0, 0], atol=1e-5)
    assert out["logits"][0, -1].argmax() == ids[0, 0]


@pytest.mark.parametrize("weights, off", [("float32", 1e-4), ("float16", .02)])
def test_masks_are_those_of_the_decoder(folder, weights, off):
    codes = torch.randint(128, (5, 16))
    got = OnnxModel(folder, weights).run("mask_decoder", codes=codes)["masks"]
    assert (got - load_mask_vae().decode(codes)).abs().max() < off


def test_the_cache_changes_nothing():
    old = [torch.rand(2, 1, 3, 4) for _ in range(4)]
    kept, new = [x.clone() for x in old], [torch.rand(2, 1, 2, 4) for _ in range(2)]
    cache = FunctionalCache(old)
    assert cache.length == 3
    cache.update(0, *new)
    keys, values = cache.update(1, *new)
    assert torch.equal(keys, torch.cat((old[2], new[0]), 2))
    assert torch.equal(values, torch.cat((old[3], new[1]), 2))
    assert len(cache.present) == 4 and all(map(torch.equal, old, kept))


def test_watching_ends(shipped):
    layers, seen = shipped[0].language_model.model.layers, []
    with pytest.raises(RuntimeError), watch_attention(layers, seen): raise RuntimeError
    assert not any("attend" in vars(layer.self_attn) for layer in layers)


# --- files

def test_files_say_what_they_take(folder):
    axes = {}
    for path in sorted((folder/"onnx").iterdir()):
        assert not re.search(rb"site-packages|/home/|\.py\b", path.read_bytes())
        graph = ir.load(path).graph
        axes[path.stem] = {x.name: [str(d) for d in x.shape] for x in graph.inputs}
    assert len(axes) == len(GRAPHS) * len(FORMATS)
    assert all(axes[name] == axes[name + "_fp16"] for name in GRAPHS)
    assert axes["vision_encoder"] == {"pixel_values": ["num_images", "3", "112", "112"]}
    decoder = axes["decoder_model_merged"]
    assert decoder.pop("past_key_values.3.value") == ["batch_size", "1", "past_length", "48"]
    assert decoder["inputs_embeds"] == ["batch_size", "sequence_length", "192"]
    assert decoder["attention_mask"] == ["batch_size", "total_length"]


def test_float16_takes_half_the_room(folder):
    sizes = [sum(path.stat().st_size for path in (folder/"onnx").glob("*.onnx")
                 if path.stem.endswith("_fp16") == half) for half in (False, True)]
    assert 1.9 < sizes[0] / sizes[1] <= 2


def test_float16_refuses_what_it_cannot_hold():
    value = ir.Value(name="w", const_value=ir.tensor(np.full((2, 2), 1e5, "float32")))
    value.shape, value.dtype = ir.Shape((2, 2)), ir.DataType.FLOAT
    node = ir.node("Identity", [value])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value],
                     opset_imports={"": 20})
    with fails(ValueError, "w", "65,504"): to_float16(ir.Model(graph, ir_version=10))


def test_settings_are_those_of_the_model(shipped, folder):
    model, _ = shipped
    assert read_config(folder) == model.config
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert json.loads((folder/name).read_text()) == json.loads((SHIPPED/name).read_text())
    assert json.loads((folder/"generation_config.json").read_text()) == dict(
        bos_token_id=2, eos_token_id=[1], pad_token_id=0, suppress_tokens=[1586])


@pytest.fixture
def quick(monkeypatch):
    "Exports that trace nothing"
    monkeypatch.setattr(export, "trace_model", lambda *_: {})
    def save(graphs, folder, weights, size):
        (folder/f"{weights}.onnx").touch()
        return {}
    monkeypatch.setattr(export, "save_graphs", save)


def test_an_export_is_whole_or_not_there(shipped, tmp_path, quick, monkeypatch):
    path = tmp_path/"new"/"folder"
    write_onnx(*shipped, path, ["float32"])
    write_onnx(*shipped, path, ["float16", "float16"])
    assert [file.name for file in (path/"onnx").iterdir()] == ["float16.onnx"]
    before = sorted(path.rglob("*"))
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(export, "save_graphs", stop)
    with pytest.raises(KeyboardInterrupt): write_onnx(*shipped, path)
    assert sorted(path.rglob("*")) == before and [*path.parent.iterdir()] == [path]


def test_other_dtypes_are_exported_in_float32(tmp_path, quick, monkeypatch):
    seen = []
    def trace(model, *_):
        seen.append(model.dtype)
        return {}
    monkeypatch.setattr(export, "trace_model", trace)
    model, processor = load_model(dtype="bfloat16")
    write_onnx(model, processor, tmp_path/"new")
    assert seen == [torch.float32] and model.dtype == torch.bfloat16


# --- refusals

@pytest.mark.parametrize("what", ["a model", "something else", "a file"])
def test_other_folders_stay(shipped, tmp_path, quick, what, capsys):
    path = tmp_path/"here"
    if what == "a model": shutil.copytree(SHIPPED, path)
    elif what == "a file": path.touch()
    else: (path/"diary").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="expected a"): write_onnx(*shipped, path)
    assert main(["export", str(SHIPPED), str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("weights", [["int8"], [], ["float32", "half"]])
def test_only_formats_that_were_measured(shipped, tmp_path, weights):
    with fails(ValueError, "weights: expected some of float32, float16"):
        write_onnx(*shipped, tmp_path/"new", weights)
    assert not any(tmp_path.iterdir())


def test_models_that_are_no_plain_floats(tmp_path, quick):
    model, processor = load_model()
    model.peft_config = {}
    with fails(ValueError, "merge_adapter"): write_onnx(model, processor, tmp_path/"new")
    del model.peft_config
    for change, word in ((lambda m: quantize(m, "int8"), "int8"), (pack, "packed")):
        changed = change(load_model()[0])
        if word not in export.weights_of(changed): continue  # nothing to pack here
        with fails(ValueError, "plain float", word):
            write_onnx(changed, processor, tmp_path/"new")


def test_rounded_folders_are_refused(tmp_path, capsys):
    assert main(["quantize", str(SHIPPED), str(tmp_path/"small"), "--weights", "int8"]) == 0
    with fails(ValueError, "rounded"): export_model(str(tmp_path/"small"), str(tmp_path/"new"))
    assert not (tmp_path/"new").exists()


def test_without_the_packages(shipped, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with fails(ImportError, "paligemma-nb[onnx]"): OnnxModel(folder)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with fails(ImportError, "paligemma-nb[onnx]"): write_onnx(*shipped, tmp_path/"new")


def test_folders_that_cannot_be_opened(folder, tmp_path):
    with fails(ValueError, "weights", "int8"): OnnxModel(folder, "int8")
    shutil.copytree(folder, path := tmp_path/"copy")
    (path/"onnx"/"vision_encoder.onnx").write_bytes(b"no graph")
    with fails(ValueError, "vision_encoder.onnx", "broken"): OnnxModel(path)
    (path/"onnx"/"embed_tokens_fp16.onnx").unlink()
    with fails(FileNotFoundError, "embed_tokens_fp16.onnx", "float16"):
        OnnxModel(path, "float16")
    (path/"onnx"/"mask_decoder.onnx").unlink()  # only masks need it
    shutil.copy(folder/"onnx"/"vision_encoder.onnx", path/"onnx")
    assert set(OnnxModel(path).sessions) == {*GRAPHS[:3]}


def test_inputs_that_do_not_fit(shipped, folder):
    ours, (_, processor) = OnnxModel(folder), shipped
    inputs = processor([make_scene(HELD_OUT).image], ["caption en"])
    del inputs["token_type_ids"]
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with fails(ValueError, "vision_encoder", "112"):
        ours(**inputs | dict(pixel_values=pixels[..., :100]))
    with fails(ValueError, "64 <image> tokens"): ours(ids)
    with fails(ValueError, "expected tokens 0 … 1586"): ours(ids + 2000)
    with fails(ValueError, "attention_mask"): ours(ids, attention_mask=ids[:, 1:] * 0 + 1)
    with fails(ValueError, "got both"): ours(**inputs, image_features=pixels)
    with fails(ValueError, "embed_tokens", "input_ids"): ours.run("embed_tokens", x=ids)


# --- Node

NODE = """
const { env, AutoProcessor, PaliGemmaForConditionalGeneration, RawImage } =
  require("@huggingface/transformers");
const [parent, name, dtype, picture, ...prompts] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = parent;
(async () => {
  const processor = await AutoProcessor.from_pretrained(name);
  const model = await PaliGemmaForConditionalGeneration.from_pretrained(name, { dtype });
  const image = await RawImage.read(picture);
  for (const prompt of prompts) {
    const inputs = await processor(image, "<image>" + prompt);
    const all = await model.generate({ ...inputs, max_new_tokens: 60 });
    const ids = all.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
    console.log(JSON.stringify(ids));
  }
})();
"""


@pytest.mark.parametrize("weights, dtype", [("float32", "fp32"), ("float16", "fp16")])
def test_transformers_js_gives_the_same_answers(shipped, folder, tmp_path, weights, dtype):
    node = shutil.which("node")
    found = node and subprocess.run(
        [node, "-e", 'require("@huggingface/transformers")'], capture_output=True)
    if not found or found.returncode:
        pytest.skip("needs Node with @huggingface/transformers: npm install it, and name its "
                    "node_modules as NODE_PATH")
    scene = make_scene(HELD_OUT + 8)
    scene.image.save(tmp_path/"scene.png")
    prompts = ["caption en", *(f"{task} {scene.objects[0].name}"
                               for task in ("detect", "segment"))]
    done = subprocess.run([node, "-e", NODE, f"{folder.parent}/", folder.name, dtype,
                           tmp_path/"scene.png", *prompts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    _, processor = shipped
    inputs = processor([scene.image] * 3, prompts)
    expected = generate(OnnxModel(folder, weights), inputs).tolist()
    assert got == [[t for t in row if t] for row in expected]
