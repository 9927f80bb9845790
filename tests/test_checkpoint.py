"""Folders in and out: round trips, every key layout, names on the hub, transformers both
ways, broken files, kills."""
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from PIL import Image
from safetensors.torch import load_file, save_file

import paligemma_nb
from paligemma_nb import checkpoint
from paligemma_nb.checkpoint import (
    FLOATS, WeightFiles, empty_model, load_checkpoint, load_weights, published_key,
    read_config, save_model, write_folder)
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.hub import INDEX, WEIGHTS, find_folder, read_json
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.siglip import SiglipVisionConfig

TINY = Path(paligemma_nb.__file__).parent/"tiny"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


BOTH = pytest.mark.parametrize("model", [GemmaConfig, Gemma2Config], indirect=True,
                               ids=lambda c: c.model_type)


def make_model(processor, seed=0, gemma=GemmaConfig):
    torch.manual_seed(seed)
    config = PaliGemmaConfig(SiglipVisionConfig(36, 52, 2, 3, 14, 42),
                             image_token_index=processor.image_token_id,
                             text_config=gemma(40, 56, 2, 4, 2, processor.vocab_size,
                                               head_dim=12))
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)
    return model


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor(train_tokenizer(["caption en a red circle", "detect square"],
                                              1600), 42, 9)


@pytest.fixture(scope="module")
def model(request, processor):
    return make_model(processor, gemma=getattr(request, "param", GemmaConfig))


@pytest.fixture(scope="module")
def source(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")/"model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def folder(source, tmp_path): # one to break
    return Path(shutil.copytree(source, tmp_path/"model"))


@pytest.fixture(scope="module")
def inputs(processor):
    return processor([Image.effect_noise((60, 50), 80)] * 2,
                     ["caption en", "detect square ; circle"])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder): return sorted(p.name for p in folder.iterdir())


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(error, *words): # a single clear line that holds these words
    return pytest.raises(error,
                         match="^[^\n]*" + "[^\n]*".join(map(re.escape, words)) + "[^\n]*$")


# --- there and back

@BOTH
def test_round_trip(model, source, inputs):
    loaded, processor = load_checkpoint(source, device="cpu")
    assert same(model, loaded) and loaded.config == model.config and not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert processor.encode("detect red circle") and processor.image_size == 42
    assert files(source) == sorted(
        ["config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json",
         "tokenizer_config.json"])
    assert json.loads((source/"config.json").read_text())["dtype"] == "float32"
    load_file(source/WEIGHTS)  # readable by the plain library, too


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.float16", "float64"])
def test_dtype(model, source, processor, tmp_path, dtype):
    loaded, _ = load_checkpoint(source, dtype=dtype, device=torch.device("cpu"))
    wanted = next(loaded.parameters()).dtype
    assert str(wanted).endswith(str(dtype).removeprefix("torch."))
    assert all(torch.equal(a, b.to(wanted))
               for a, b in zip(loaded.parameters(), model.parameters()))
    save_model(loaded, processor, tmp_path/"new")
    # None: the dtype of the file
    assert same(load_checkpoint(tmp_path/"new", device="cpu")[0], loaded)
    stored = read_json(tmp_path/"new"/"config.json")["dtype"]
    assert f"torch.{stored}" == str(wanted)


@pytest.mark.parametrize("dtype", ["int8", "bf16", torch.int64, "", 16])
def test_unknown_dtype(source, dtype):
    with fails(ValueError, "unknown dtype", "expected float32, bfloat16, float16, float64"):
        load_checkpoint(source, dtype=dtype)


def test_devices(source):
    with fails(ValueError, "'gpu'"): load_checkpoint(source, device="gpu")
    with fails(ValueError, "'cuda:99'", "cannot be used"):
        load_checkpoint(source, device="cuda:99")
    if torch.cuda.is_available(): assert next(load_checkpoint(source)[0].parameters()).is_cuda
    else:
        assert not next(load_checkpoint(source)[0].parameters()).is_cuda
        with fails(ValueError, "'cuda'", "cannot be used"):
            load_checkpoint(source, device="cuda")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(),
                    reason="asks Linux for the list of mapped files")
def test_weights_are_mapped_not_read(folder, inputs):
    model, processor = load_checkpoint(folder, device="cpu")
    assert str(folder/WEIGHTS) in Path("/proc/self/maps").read_text()
    before = model(**inputs).logits
    # private pages: the file stays as it was
    with torch.no_grad(): model.language_model.model.norm.weight.add_(1)
    assert not torch.equal(model(**inputs).logits, before)
    assert torch.equal(load_checkpoint(folder, device="cpu")[0](**inputs).logits, before)
    # replaces the very file that the model is mapped from
    save_model(model, processor, folder)
    assert same(load_checkpoint(folder, device="cpu")[0], model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(),
                    reason="asks Linux for the list of mapped files")
def test_dropped_tensor_takes_its_map_along(tmp_path):
    "A large one; the small ones share the map that comes with opening the file."
    large = {name: torch.ones(512, 512) for name in ("kept", "dropped")}
    save_file(large | dict(small=torch.ones(3)), tmp_path/WEIGHTS)
    def num_maps(): return Path("/proc/self/maps").read_text().count(str(tmp_path/WEIGHTS))
    files = WeightFiles(tmp_path)
    shared = num_maps()
    kept, dropped, small = files["kept"], files["dropped"], files["small"]
    assert num_maps() == shared + 2 and small.tolist() == [1, 1, 1]
    del dropped
    assert num_maps() == shared + 1
    del kept
    assert num_maps() == shared


PEAK = """
import re, sys, torch
from pathlib import Path
from paligemma_nb.checkpoint import empty_model, load_weights, read_config
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
model, before = empty_model(read_config(sys.argv[1])), peak()
load_weights(model, sys.argv[1], dtype=torch.float32)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="asks Linux for the peak of resident memory")
@pytest.mark.parametrize("head", [False, True], ids=["no head", "tied head"])
def test_conversion_holds_no_second_copy(processor, tmp_path, head):
    config = PaliGemmaConfig(SiglipVisionConfig(256, 1024, 2, 4, 14, 42),
                             GemmaConfig(1024, 4096, 6, 8, 1, 16_000, 128),
                             image_token_index=processor.image_token_id)
    tensors = {name: torch.ones(x.shape, dtype=torch.bfloat16)
               for name, x in empty_model(config).state_dict().items()}
    if head: tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    write_folder(tmp_path/"large", config.to_dict(), tensors, processor)
    file, largest = (tmp_path/"large"/WEIGHTS).stat().st_size, max(x.nbytes
                                                                   for x in tensors.values())
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path/"large"], capture_output=True,
                          text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(TINY.parents[1])})
    peak, held = map(int, done.stdout.split())
    assert file > 190e6
    assert held == 2 * sum(x.nbytes for k, x in tensors.items() if k != "lm_head.weight")
    # the file itself is 200 MB
    assert held <= peak <= held + largest + 30e6, (peak / 1e6, held / 1e6)


def test_file_replaced_while_it_is_read(model, processor, folder):
    files = WeightFiles(folder)
    assert torch.equal(files[EMBEDDING], model.state_dict()[EMBEDDING])
    # every name and shape as before
    save_model(make_model(processor, seed=1), processor, folder)
    with fails(ValueError, str(folder/WEIGHTS), "replaced while it was read"): files[EMBEDDING]


def test_dtypes_that_may_be_stored(tmp_path):
    tensors = dict(q=torch.ones(2, dtype=torch.int8), scale=torch.ones(2),
                   packed=torch.ones(3, dtype=torch.uint8))
    save_file(tensors, tmp_path/WEIGHTS)
    files = WeightFiles(tmp_path, dtypes=FLOATS | dict(I8=torch.int8, U8=torch.uint8))
    assert files.shapes == dict(q=(2,), scale=(2,), packed=(3,))
    assert all(torch.equal(files[name], x) and files[name].dtype == x.dtype
               for name, x in tensors.items())
    with fails(ValueError, WEIGHTS,
               "packed is stored as U8, expected F32, BF16, F16, F64, I8"):
        WeightFiles(tmp_path, dtypes=FLOATS | dict(I8=torch.int8))


def test_published_sizes_on_the_meta_device():
    for size, expected in ((224, 2_923_466_480), (448, 2_924_351_216), (896, 2_927_890_160)):
        model = empty_model(PaliGemmaConfig(SiglipVisionConfig(1152, 4304, 27, 16, 14, size),
                                            GemmaConfig(2048, 16384, 18, 8, 1, 257216),
                                            image_token_index=257152))
        assert sum(p.numel() for p in model.parameters()) == expected
        assert len(model.state_dict()) == 603


@pytest.mark.skipif(not TINY.exists(), reason="the shipped model has not been trained yet")
def test_shipped_model():
    model, processor = load_checkpoint(device="cpu")
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 16e6
    out = model(**processor([Image.new("RGB", (50, 50), "red")], ["caption en"])).logits
    assert out.isfinite().all()


def test_needs_neither_transformers_nor_a_compiler(source):
    """Each would add seconds to the first answer. (`normal_` on the meta device imports
    torch's compiler.)"""
    code = (f"import sys; from paligemma_nb import load_model; load_model({str(source)!r}); "
            "print({'transformers', 'huggingface_hub', 'torch._dynamo'} & set(sys.modules))")
    env = os.environ | {"PYTHONPATH": str(TINY.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True,
                          text=True, check=True)
    assert done.stdout == "set()\n"


# --- key layouts

def to_b(key):
    key = key.replace("language_model.lm_head", "lm_head").replace("language_model.model.",
                                                                   "language_model.")
    return key if key.startswith("lm_head") else "model." + key


LAYOUTS = {
    "A, published": lambda key: key,
    "B": to_b,
    "C": lambda key: to_b(key).replace("vision_tower.vision_model.", "vision_tower."),
    "saved by transformers 5": lambda key: key.replace("vision_tower.vision_model.",
                                                       "vision_tower."),
}


def write_weights(folder, tensors, limit=10**9): # one file, or an index and shards
    (folder/WEIGHTS).unlink(missing_ok=True)
    checkpoint._write_weights(tensors, folder, limit)
    assert (folder/INDEX).exists() == (limit < 10**9)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [10**9, 50_000], ids=["one file", "shards"])
@pytest.mark.parametrize("rename", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(model, folder, rename, limit, dtype):
    expected = {key: x.to(dtype) for key, x in model.state_dict().items()}
    # the two are one
    head_alone = {HEAD if key == EMBEDDING else key: x for key, x in expected.items()}
    for tensors in (expected, expected | {HEAD: expected[EMBEDDING].clone()}, head_alone):
        assert all(published_key(rename(key)) == key for key in tensors)
        write_weights(folder, {rename(key): x for key, x in tensors.items()}, limit)
        loaded = load_checkpoint(folder, device="cpu")[0].state_dict()
        assert loaded.keys() == expected.keys()
        assert {x.dtype for x in loaded.values()} == {dtype}
        assert all(torch.equal(x, expected[key]) for key, x in loaded.items())
        for file in folder.glob("model*"): file.unlink()


def test_untied_heads(model, folder):
    table = model.state_dict()[EMBEDDING]
    for head in (table + 1e-6, table[:-1].clone(), table.bfloat16()):
        save_file(model.state_dict() | {"lm_head.weight": head}, folder/WEIGHTS)
        with fails(ValueError, WEIGHTS, "lm_head.weight differs from the embedding"):
            load_checkpoint(folder)


def test_two_tensors_of_one_name(model, folder):
    x = model.state_dict()["multi_modal_projector.linear.bias"].clone()
    save_file(model.state_dict() | {"model.multi_modal_projector.linear.bias": x},
              folder/WEIGHTS)
    with fails(ValueError, WEIGHTS, "second tensor for multi_modal_projector.linear.bias"):
        load_checkpoint(folder)


# --- strictness

@BOTH
def test_missing_surplus_and_misshapen_tensors(model, folder):
    good, keys = model.state_dict(), list(model.state_dict())
    total = f"expected {len(keys)} tensors"
    for tensors, words in (
        ({k: good[k] for k in keys[1:]}, (total, "missing 1", keys[0])),
        ({k: good[k] for k in keys[9:]}, (total, "missing 9", "and 4 more")),
        (good | {"vision_tower.x.bias": torch.ones(2)},
         (total, "surplus 1", "vision_tower.vision_model.x.bias")),
        ({k: good[k] for k in keys[1:]} | {"lora.a": torch.ones(2)},
         ("missing 1", keys[0], "surplus 1", "lora.a")),
        (good | {keys[0]: good[keys[0]][..., :-1].contiguous()},
         (keys[0], "expected", str(list(good[keys[0]].shape)))),
        (good | {EMBEDDING: good[EMBEDDING].T.contiguous()},
         (EMBEDDING, str(list(good[EMBEDDING].T.shape)))),
        (good | {keys[3]: good[keys[3]].char()}, (keys[3], "I8", "expected F32")),
        ({}, (total, "found 0")),
    ):
        save_file(tensors, folder/WEIGHTS)
        with fails(ValueError, str(folder/WEIGHTS), *words): load_checkpoint(folder)
        untouched = make_model_like(model)
        with pytest.raises(ValueError): load_weights(untouched, folder)
        assert same(untouched, make_model_like(model))  # nothing was set before the error


def make_model_like(model):
    torch.manual_seed(1)
    return PaliGemmaForConditionalGeneration(model.config)


def test_files_of_several_dtypes_load_in_one(model, folder):
    tensors = {k: x if k == EMBEDDING else x.bfloat16() for k, x in model.state_dict().items()}
    save_file(tensors, folder/WEIGHTS)
    loaded, _ = load_checkpoint(folder, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(x, tensors[k].float()) for k, x in loaded.state_dict().items())


def test_processor_that_does_not_fit(folder):
    preprocessor = folder/"preprocessor_config.json"
    original = preprocessor.read_text()
    edit_json(preprocessor, size=dict(height=28, width=28))
    with fails(ValueError, str(folder),
               "picture size is 28 in the processor, 42 in the config"):
        load_checkpoint(folder)
    preprocessor.write_text(original)
    edit_json(preprocessor, image_seq_length=16)
    with fails(ValueError,
               "number of tokens for a picture is 16 in the processor, 9 in the config"):
        load_checkpoint(folder)
    preprocessor.write_text(original)
    edit_json(folder/"config.json", image_token_index=7)
    with fails(ValueError, "id of <image>", "7 in the config"): load_checkpoint(folder)


def test_tokenizer_of_another_model(folder, processor, model):
    config = json.loads((folder/"config.json").read_text())
    config["text_config"]["vocab_size"] -= 5
    (folder/"config.json").write_text(json.dumps(config))
    tokens = processor.vocab_size
    with fails(ValueError,
               f"the tokenizer has {tokens} tokens, the embedding {tokens - 5} rows"):
        load_checkpoint(folder)


# --- shards

@pytest.mark.parametrize("limit", [1, 30_000, 200_000])
def test_shards(model, processor, tmp_path, limit):
    save_model(model, processor, tmp_path/"m", max_shard_size=limit)
    index = json.loads((tmp_path/"m"/INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    n = len(names)
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert n > 1
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes
                                                  for x in model.state_dict().values())
    for name in names:
        tensors = load_file(tmp_path/"m"/name)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
    assert same(load_checkpoint(tmp_path/"m", device="cpu")[0], model)
    if limit == 1: assert n == len(model.state_dict())
    # back to one file: no shard and no index may stay
    save_model(model, processor, tmp_path/"m")
    assert WEIGHTS in files(tmp_path/"m") and len(files(tmp_path/"m")) == 5


def test_broken_shards(model, processor, tmp_path):
    good = tmp_path/"good"
    save_model(model, processor, good, max_shard_size=150_000)
    shards = sorted(p.name for p in good.glob("*.safetensors"))
    index = json.loads((good/INDEX).read_text())
    first = load_file(good/shards[0])
    key = min(first)

    def broken(error, *words):
        with fails(error, *words): load_checkpoint(bad)
        shutil.rmtree(bad)
        shutil.copytree(good, bad)

    bad = Path(shutil.copytree(good, tmp_path/"bad"))
    (bad/shards[1]).unlink()
    broken(FileNotFoundError, shards[1], INDEX)
    save_file(first | {"foreign.weight": torch.ones(3)}, bad/shards[0])
    broken(ValueError, shards[0], INDEX, "surplus 1", "foreign.weight")
    save_file({k: x for k, x in first.items() if k != key}, bad/shards[0])
    broken(ValueError, shards[0], INDEX, "missing 1", key)
    (bad/shards[1]).write_bytes((good/shards[1]).read_bytes()[:-1])
    broken(ValueError, shards[1], "not a whole safetensors file")
    shutil.copy(good/shards[0], bad/shards[1])
    broken(ValueError, shards[1], "missing")
    edit_json(bad/INDEX,
              weight_map={k: f for k, f in index["weight_map"].items() if f != shards[0]})
    broken(ValueError, INDEX, "missing", key)  # a whole shard forgotten
    edit_json(bad/INDEX, weight_map={k: "../" + f for k, f in index["weight_map"].items()})
    broken(ValueError, INDEX, "../", "no file name")
    for weight_map in (None, [], {key: 3}, {key: None}):
        edit_json(bad/INDEX, weight_map=weight_map)
        broken(ValueError, INDEX, "expected a weight_map")
    for text, message in (("{", "is not JSON"), ("[]", "expected a JSON object, got list"),
                          ("", "is not JSON")):
        (bad/INDEX).write_text(text)
        broken(ValueError, INDEX, message)
    assert same(load_checkpoint(bad, device="cpu")[0], model)  # the copy as such is good


# --- broken and foreign files

@pytest.fixture(scope="module", params=[10**9, 50_000], ids=["one file", "shard"])
def to_break(request, model, source, tmp_path_factory):
    "(folder, its first file of weights); every test writes that file anew"
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("broken")/"model"))
    write_weights(folder, model.state_dict(), request.param)
    return folder, min(folder.glob("*.safetensors"))


def test_file_cut_short_anywhere(to_break, model):
    folder, path = to_break
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng, target = random.Random(0), empty_model(model.config)
    sizes = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]
    for size in sizes + rng.sample(range(header), 20) + rng.sample(range(len(whole)), 80):
        path.write_bytes(whole[:size])
        with fails(ValueError, f"{path} ({size:,} bytes) is not a whole safetensors file"):
            load_weights(target, folder)
    path.write_bytes(whole + b"\0")
    with fails(ValueError, str(path), "not a whole safetensors file"):
        load_weights(target, folder)
    path.write_bytes(whole)
    assert all(p.is_meta for p in target.parameters())
    assert same(load_checkpoint(folder, device="cpu")[0], model)


@pytest.mark.parametrize("rename, dtype", [
    (LAYOUTS["A, published"], torch.float32), (LAYOUTS["B"], torch.float16),
    (LAYOUTS["C"], torch.bfloat16),
    (LAYOUTS["saved by transformers 5"], torch.bfloat16)], ids=[*LAYOUTS])
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "shard"])
def test_flipped_header_bits(folder, model, rename, dtype, limit):
    """No flip in the header may go unnoticed, but for the text of the metadata and the
    order of what is alike."""
    expected = {k: x.to(dtype) for k, x in model.state_dict().items()}
    write_weights(folder, {rename(k): x for k, x in expected.items()}, limit)
    path = min(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    metadata = 8 * whole.index(b'pt"')  # two letters that nobody reads
    rng, noticed, loaded = random.Random(0), 0, empty_model(model.config)
    for bit in [*range(8 * 8), *range(metadata, metadata + 16),
                *rng.sample(range(64, 8 * header), 200)]:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try: load_weights(loaded, folder)
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            noticed += 1
        else:
            got = loaded.state_dict()
            assert all(torch.equal(x, expected[k]) and x.dtype == dtype
                       for k, x in got.items()), f"bit {bit}"
    assert 240 < noticed < 280


@pytest.mark.parametrize("content", [
    b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"PK\x03\x04 a zip, as torch.save writes", b"{}",
    b"\0" * 4096, b"\xff" * 4096, (2).to_bytes(8, "little") + b"[]",
    (4).to_bytes(8, "little") + b"null"],
    ids=["png", "zip", "json", "zeros", "ones", "header is a list", "header is null"])
def test_foreign_file(folder, content):
    (folder/WEIGHTS).write_bytes(content)
    with fails(ValueError, str(folder/WEIGHTS), f"{len(content):,} bytes",
               "not a whole safetensors file"):
        load_checkpoint(folder)


def test_no_weights(folder):
    (folder/WEIGHTS).unlink()
    with fails(FileNotFoundError, f"no {WEIGHTS} and no {INDEX} in {folder}"):
        load_checkpoint(folder)


def test_pickles_are_not_opened(folder):
    class Boom:
        def __reduce__(self): return (os.mkdir, (str(folder/"boom"),))
    (folder/WEIGHTS).unlink()
    torch.save(Boom(), folder/"pytorch_model.bin")
    with fails(FileNotFoundError, f"no {WEIGHTS}", "pytorch_model.bin is not read"):
        load_checkpoint(folder)
    assert not (folder/"boom").exists()


def test_no_folder(source, tmp_path):
    with fails(FileNotFoundError, f"no model folder {tmp_path/'nothing'}"):
        load_checkpoint(tmp_path/"nothing")
    for odd in ("nothing", "a/b/c", "./a/b", "a/b/", "-a/b", "a/b.git", "a--b/c", "a b/c",
                "a/" + 97 * "b"):
        with fails(FileNotFoundError, f"no model folder {Path(odd)}", "hub"):
            load_checkpoint(odd)
    with fails(ValueError, "expected the folder", str(source/WEIGHTS)):
        load_checkpoint(source/WEIGHTS)
    (tmp_path/"empty").mkdir()
    with fails(FileNotFoundError, f"no config.json in {tmp_path/'empty'}"):
        load_checkpoint(tmp_path/"empty")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_missing_file(folder, name):
    (folder/name).unlink()
    with fails(FileNotFoundError, name, str(folder)): load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b"{}"])
def test_broken_json(folder, name, content):
    (folder/name).write_bytes(content)
    with fails(ValueError, str(folder/name)): load_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("section, changes", [
    (None, dict(vision_config=None)), (None, dict(text_config=[])),
    (None, dict(text_config={})),
    *[("text_config", changes) for changes in (
        dict(hidden_size=None), dict(hidden_size="big"), dict(hidden_size=-4),
        dict(hidden_size=10**18),
        dict(head_dim=7), dict(num_key_value_heads=0), dict(num_key_value_heads=3),
        dict(num_hidden_layers=2.5),
        dict(model_type="llama"))],
    *[("vision_config", changes) for changes in (
        dict(num_attention_heads=0), dict(patch_size=0), dict(hidden_act="relu"))],
], ids=str)
def test_impossible_config(folder, section, changes):
    path = folder/"config.json"
    content = json.loads(path.read_text())
    edit_json(path, **changes if section is None else {section: content[section] | changes})
    with pytest.raises(ValueError) as error: load_checkpoint(folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_do_not_fit_the_weights(folder):
    content = json.loads((folder/"config.json").read_text())
    edit_json(folder/"config.json",
              text_config=content["text_config"] | dict(intermediate_size=60))
    with fails(ValueError, str(folder/WEIGHTS), "does not fit the config", "mlp",
               "expected [60, 40]"):
        load_checkpoint(folder)
    edit_json(folder/"config.json",
              text_config=content["text_config"] | dict(num_hidden_layers=3))
    with fails(ValueError, str(folder/WEIGHTS), "missing 9", "language_model.model.layers.2."):
        load_checkpoint(folder)


def test_head_that_is_no_table(model, folder):
    "It stands for the embedding where that is missing, so it must have its shape."
    tensors = {HEAD if k == EMBEDDING else k: x for k, x in model.state_dict().items()}
    save_file(tensors | {HEAD: tensors[HEAD][:-1].clone()}, folder/WEIGHTS)
    with fails(ValueError, WEIGHTS, "does not fit the config", EMBEDDING):
        load_checkpoint(folder)
    save_file({k: x for k, x in tensors.items() if k != HEAD}, folder/WEIGHTS)
    with fails(ValueError, WEIGHTS, "missing 1", EMBEDDING): load_checkpoint(folder)


def test_config_without_rounding_is_a_plain_model(folder, model):
    edit_json(folder/"config.json", quantization_config=None)
    assert same(load_checkpoint(folder, device="cpu")[0], model)


def test_mask_vae_is_carried(folder, model, processor, tmp_path):
    edit_json(folder/"config.json", mask_vae="0123456789abcdef")
    loaded, _ = load_checkpoint(folder, device="cpu")
    assert loaded.config.mask_vae == "0123456789abcdef"
    save_model(loaded, processor, tmp_path/"copy")
    assert read_config(tmp_path/"copy") == loaded.config
    from paligemma_nb.quantization import quantize
    save_model(quantize(loaded.bfloat16(), "int8"), processor, tmp_path/"small")
    assert read_config(tmp_path/"small").mask_vae == "0123456789abcdef"
    save_model(model, processor, tmp_path/"none")
    assert "mask_vae" not in read_json(tmp_path/"none"/"config.json")


# --- names on the hub

def put_in_cache(folder, cache, name="someone/reader"):
    """As `huggingface_hub` does it: blobs, a snapshot of links to them, and a ref that
    names the snapshot."""
    repo, version = cache/f"models--{name.replace('/', '--')}", 40 * "a"
    for part in ("refs", "blobs", f"snapshots/{version}"): (repo/part).mkdir(parents=True)
    (repo/"refs"/"main").write_text(version)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo/"blobs"/f"{i:040x}")
        (repo/"snapshots"/version/file.name).symlink_to(f"../../blobs/{i:040x}")
    return repo/"snapshots"/version


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    return tmp_path/"hub"


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["one file", "shards"])
def test_name_in_the_cache(model, processor, cache, tmp_path, limit):
    save_model(model, processor, tmp_path/"m", max_shard_size=limit)
    snapshot = put_in_cache(tmp_path/"m", cache)
    assert find_folder("someone/reader").samefile(snapshot)
    assert same(load_checkpoint("someone/reader", device="cpu")[0], model)
    for name in files(snapshot):
        if name == "tokenizer_config.json": continue  # not read
        target = os.readlink(snapshot/name)
        (snapshot/name).unlink()
        lacking = WEIGHTS if name == INDEX else name
        with fails(FileNotFoundError, f"someone/reader lacks {lacking} in"):
            load_checkpoint("someone/reader")
        (snapshot/name).symlink_to(target)
    # as transformers 5 names it
    (snapshot/"preprocessor_config.json").rename(snapshot/"processor_config.json")
    assert same(load_checkpoint("someone/reader", device="cpu")[0], model)


def test_folder_goes_before_name(folder, cache, tmp_path, monkeypatch):
    put_in_cache(folder, cache)
    monkeypatch.chdir(tmp_path)
    (tmp_path/"someone").mkdir()
    (tmp_path/"someone"/".reader.old").mkdir()  # a save was killed between its renames
    assert find_folder("someone/reader") == Path("someone/reader")
    assert (tmp_path/"someone"/"reader").is_dir()
    with fails(FileNotFoundError, "no config.json in someone/reader"):
        load_checkpoint("someone/reader")
    # no name
    with fails(FileNotFoundError, "no model folder someone/writer"):
        find_folder(Path("someone/writer"))


def test_cache_is_asked_first(source, cache, tmp_path, monkeypatch):
    calls, answers = [], []
    def snapshot_download(name, *, allow_patterns, local_files_only=False, **kwargs):
        calls.append("cache" if local_files_only else "config"
                     if allow_patterns == "config.json" else "hub")
        if isinstance(answer := answers.pop(0), Exception): raise answer
        return str(answer)

    def asked(*these):
        calls.clear()
        answers[:] = these
        assert find_folder("some/name") == source
        return calls

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path/"partial").mkdir()
    assert asked(source) == ["cache"]
    part = tmp_path/"partial"
    for cached in (errors.LocalEntryNotFoundError("none"),
                   errors.IncompleteSnapshotError("a part", str(part)), part):
        assert asked(cached, part, source) == ["cache", "config", "hub"]


@pytest.mark.parametrize("error, words", [
    (errors.GatedRepoError("403\n\nCannot", response=Mock()),
     ["some/name is gated", "https://huggingface.co/some/name", "`hf auth login`"]),
    (errors.RepositoryNotFoundError("401\n\nRepository", response=Mock()),
     ["no folder some/name", "spelling", "`hf auth login`"]),
    (errors.LocalEntryNotFoundError("Got: ConnectError\nAn error"),
     ["no folder some/name", "when online (Got: ConnectError)"]),
    (errors.OfflineModeIsEnabled("offline mode is enabled"),
     ["no folder some/name", "give a folder", "(offline mode is enabled)"]),
    (errors.HfHubHTTPError("\n\n503 Busy", response=Mock()),
     ["could not be fetched", "503 Busy"]),
    (errors.HTTPError("proxy"), ["when online (proxy)"]),
    (TimeoutError("timed out"), ["when online (timed out)"]),
    (OSError(28, "No space left on device"), ["could not be fetched", "No space left"]),
    (RuntimeError("Data processing error"), ["could not be fetched", "Data processing error"]),
], ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "")
def test_hub_that_says_no(monkeypatch, error, words):
    def snapshot_download(*args, local_files_only=False, **kwargs):
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with fails(FileNotFoundError, *words): load_checkpoint("some/name")


@pytest.fixture
def hub(folder):
    """A small hub on this machine that answers like the real one. It serves owner/model;
    owner/gated it shows, no more."""
    for name in ("weights.bin", "vae.npz", "README.md"):
        (folder/name).write_text("large, and not wanted")
    (folder/"vae-oid.npz").write_text("wanted, if there is one")
    served, sha = [], 40 * "b"

    class Hub(BaseHTTPRequestHandler):
        def answer(self, content, code=200, **headers):
            self.send_response(code)
            for name, value in dict(headers, Content_Length=len(content)).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET": self.wfile.write(content)

        def do_GET(self):
            path = self.path.split("?")[0]
            if re.match(r"/api/models/owner/(model|gated)/tree/", path):
                tree = [dict(type="file", path=p.name, size=p.stat().st_size, oid=p.name)
                        for p in folder.iterdir()]
                self.answer(json.dumps(tree).encode())
            elif re.match(r"/api/models/owner/(model|gated)/", path):
                self.answer(json.dumps(dict(id="owner/model", sha=sha, siblings=[])).encode())
            elif path.startswith(f"/owner/model/resolve/{sha}/"):
                file = folder/path.split("/")[-1]
                if self.command == "GET": served.append(file.name)
                self.answer(file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=sha)
            elif path.startswith("/owner/gated/"):
                self.answer(b"", 401, X_Error_Code="GatedRepo")
            else: self.answer(b"", 401, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET
        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield served, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


OPEN = """
import sys
from paligemma_nb.checkpoint import load_checkpoint
for name in sys.argv[1:]:
    try: print(load_checkpoint(name)[0].language_model.model.norm.weight.tolist())
    except FileNotFoundError as e: print(e)
"""


def test_name_is_fetched_once(model, hub, tmp_path):
    def opened(*names, **env):
        env = dict(os.environ, PYTHONPATH=str(TINY.parents[1]),
                   HF_HUB_CACHE=str(tmp_path/"hub"),
                   HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_ENDPOINT=address,
                   NO_PROXY="127.0.0.1") | env
        done = subprocess.run([sys.executable, "-c", OPEN, *names], capture_output=True,
                              text=True, env=env, check=True)
        return *done.stdout.splitlines(), done.stderr

    served, address = hub
    weights = str(model.language_model.model.norm.weight.tolist())
    gated, unknown, stderr = opened("owner/gated", "owner/modell")
    assert gated == ("owner/gated is gated: accept its licence at "
                     "https://huggingface.co/owner/gated, then log in with `hf auth login`")
    assert unknown.startswith("no folder owner/modell, nor such a model on the hub: check ")
    assert stderr == "" and not served
    assert opened("owner/model")[0] == weights
    wanted = sorted(["config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json",
                     "tokenizer_config.json",
                     "vae-oid.npz"])
    assert sorted(served) == wanted
    (tmp_path/"hub"/"models--owner--model"/"snapshots"/(40 * "b")/"tokenizer.json").unlink()
    assert opened("owner/model")[0] == weights  # what is missing is linked again
    assert sorted(served) == wanted
    # nobody is there
    *lines, _ = opened("owner/model", "owner/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert lines[0] == weights
    assert lines[1].startswith("no folder owner/other, and the hub's files could not")


# --- saving

@pytest.mark.skipif(os.name == "nt", reason="about the permissions of Unix")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_files_are_as_open_as_others(model, processor, tmp_path, mask):
    before = os.umask(mask)
    try: save_model(model, processor, tmp_path/"m", max_shard_size=100_000)
    finally: os.umask(before)
    assert len(files(tmp_path/"m")) > 6
    assert {stat.S_IMODE(p.stat().st_mode)
            for p in (tmp_path/"m").iterdir()} == {0o666 & ~mask}


def test_write_folder_takes_any_tensors(processor, folder):
    tensors = dict(q=torch.tensor([[-3, 4]], dtype=torch.int8),
                   scale=torch.ones(2, dtype=torch.bfloat16))
    write_folder(folder, dict(quantization_config=dict(bits=8)), tensors, processor)
    assert read_json(folder/"config.json") == dict(quantization_config=dict(bits=8))
    stored = load_file(folder/WEIGHTS)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[k], x) for k, x in tensors.items())
    assert PaliGemmaProcessor.from_pretrained(folder).image_size == 42
    assert files(folder.parent) == ["model"]


def test_save_replaces_the_model_and_nothing_else(model, processor, folder):
    (folder/"README.md").write_text("card")
    (folder/"logs").mkdir()
    (folder/"logs"/"model.safetensors").write_text("deeper, not ours")
    (folder/"old.safetensors").write_text("stale weights")
    log = open(folder/"loss.txt", "a")
    other = make_model(processor, seed=1)
    save_model(other, processor, folder)
    assert same(load_checkpoint(folder, device="cpu")[0], other)
    log.write("still open")
    log.close()
    assert (folder/"README.md").read_text() == "card"
    assert (folder/"loss.txt").read_text() == "still open"
    assert (folder/"logs"/"model.safetensors").exists()
    assert not (folder/"old.safetensors").exists()
    assert files(folder.parent) == [folder.name]  # nothing is left beside it


def test_save_makes_folders_and_takes_odd_paths(model, processor, tmp_path, monkeypatch):
    save_model(model, processor, tmp_path/"a"/"b"/"c")
    (tmp_path/"empty").mkdir()
    save_model(model, processor, str(tmp_path/"empty"))
    (tmp_path/"link").symlink_to(tmp_path/"empty")
    save_model(model, processor, tmp_path/"link")
    assert (tmp_path/"link").is_symlink()
    monkeypatch.chdir(tmp_path/"a")
    save_model(model, processor, "b/../d")
    for path in ("a/b/c", "empty", "link", "a/d"):
        assert same(load_checkpoint(tmp_path/path, device="cpu")[0], model)
    # as open to others as a plain folder
    assert (tmp_path/"empty").stat().st_mode == (tmp_path/"a").stat().st_mode


def test_save_refuses(model, processor, folder, tmp_path):
    (tmp_path/"photos").mkdir()
    (tmp_path/"photos"/"cat.jpg").write_text("x")
    with fails(ValueError, str(tmp_path/"photos"), "holds something else than a model"):
        save_model(model, processor, tmp_path/"photos")
    with fails(ValueError, "got a file", "cat.jpg"):
        save_model(model, processor, tmp_path/"photos"/"cat.jpg")
    grown = make_model(processor, seed=1)
    grown.multi_modal_projector.linear.lora = torch.nn.Parameter(torch.ones(2))
    with fails(ValueError, "the model to save", "surplus 1",
               "multi_modal_projector.linear.lora"):
        save_model(grown, processor, folder)
    small = PaliGemmaProcessor(processor.tokenizer, 28, 4)
    with fails(ValueError, "the model to save", "picture size is 28"):
        save_model(model, small, folder)
    assert same(load_checkpoint(folder, device="cpu")[0], model)
    assert files(tmp_path) == ["model", "photos"]


@pytest.mark.parametrize("step", ["save_file", "_keep_other_files", "write_json"])
def test_failed_save_changes_nothing(model, processor, folder, monkeypatch, step):
    def full(*args, **kwargs): raise OSError("no space left on device")
    before = {name: (folder/name).read_bytes() for name in files(folder)}
    monkeypatch.setattr(checkpoint, step, full)
    with pytest.raises(OSError, match="no space left"):
        save_model(make_model(processor, seed=1), processor, folder)
    assert before == {name: (folder/name).read_bytes() for name in files(folder)}
    assert files(folder.parent) == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step(model, processor, folder):
    """The process dies, with no chance to tidy up, before its 1st, 2nd, … change of the
    disk: old or new is there."""
    (folder/"README.md").write_text("card")
    other, seen = make_model(processor, seed=1), []
    for last in count():
        if (child := os.fork()) == 0:
            steps = iter(range(last))
            def dies_first(function):
                def wrapped(*args, **kwargs):
                    if next(steps, None) is None: os._exit(9)
                    return function(*args, **kwargs)
                return wrapped
            try:
                for owner, name in (
                    *[(os, name) for name in ("mkdir", "link", "rename", "unlink", "rmdir")],
                    (Path, "write_text"),
                    (Path, "rename"), (checkpoint, "save_file"),
                    (type(processor.tokenizer), "save"),
                ):
                    try: setattr(owner, name, dies_first(getattr(owner, name)))
                    except TypeError: pass  # a class of a compiled library
                save_model(other, processor, folder)
                os._exit(0)
            finally: os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        loaded, _ = load_checkpoint(folder, device="cpu")
        seen.append("new" if same(loaded, other) else "old" if same(loaded, model)
                    else "neither")
        assert (folder/"README.md").read_text() == "card"
        save_model(model, processor, folder)  # what the dead left behind is no hindrance
        assert same(load_checkpoint(folder, device="cpu")[0], model)
        assert files(folder.parent) == ["model"]
        if status == 0: break
    assert seen == sorted(seen, key=["old", "new"].index)
    assert seen[0] == "old" and seen[-1] == "new" and len(seen) > 10


# --- transformers, both ways

@pytest.fixture(scope="module")
def Theirs(): return pytest.importorskip("transformers").PaliGemmaForConditionalGeneration


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@BOTH
@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["one file", "shards"])
def test_transformers_opens_ours(Theirs, model, processor, inputs, tmp_path, limit):
    save_model(model, processor, tmp_path/"m", max_shard_size=limit)
    theirs, info = Theirs.from_pretrained(tmp_path/"m", attn_implementation="eager",
                                          output_loading_info=True)
    assert not any(info.values()), info
    real = inputs["attention_mask"].bool()
    assert relative(theirs(**inputs).logits[real], model(**inputs).logits[real]) <= 1e-5
    ends = theirs.config.eos_token_id, theirs.generation_config.eos_token_id
    assert ends == (model.config.eos_token_id,) * 2


@BOTH
@pytest.mark.parametrize("limit", ["1GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_open_theirs(Theirs, source, processor, model, tmp_path, limit, dtype):
    theirs = Theirs.from_pretrained(source, dtype=dtype)
    theirs.save_pretrained(tmp_path/"theirs", max_shard_size=limit)
    processor.save_pretrained(tmp_path/"theirs")
    assert (tmp_path/"theirs"/INDEX).exists() == (limit == "100KB")
    loaded, _ = load_checkpoint(tmp_path/"theirs", device="cpu")
    assert loaded.config == model.config
    assert same(loaded, load_checkpoint(source, device="cpu", dtype=dtype)[0])
    # other names, and the head
    in_memory = {k: x.clone() for k, x in theirs.state_dict().items()}
    save_file(in_memory, tmp_path/"theirs"/WEIGHTS)
    assert same(load_checkpoint(tmp_path/"theirs", device="cpu")[0], loaded)


def test_spelling_of_transformers_4(folder, model):
    """`rope_theta` and `torch_dtype` instead of `rope_parameters` and `dtype`; keys that we
    do not know."""
    content = json.loads((folder/"config.json").read_text())
    content["torch_dtype"] = content.pop("dtype")
    text = content["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["hidden_act"] = "gelu"
    content |= dict(hidden_size=40, ignore_index=-100, transformers_version="4.42.0")
    (folder/"config.json").write_text(json.dumps(content))
    assert read_config(folder) == model.config
    assert same(load_checkpoint(folder, device="cpu")[0], model)


def test_reading_shapes_opens_no_data(source, model):
    assert WeightFiles(source).shapes == {k: tuple(x.shape)
                                          for k, x in model.state_dict().items()}
