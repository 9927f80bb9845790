"""big_vision's .npz: names and shapes, its network in einsums, round trips, broken files.

What the files hold is written down here from listings of the published ones, not taken from
the code under test."""
import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import TINY, fails, files, same

import paligemma_nb
from paligemma_nb import load_model
from paligemma_nb.big_vision import (config_of_shapes, convert_npz, load_npz, npz_shapes,
                                     read_npz, write_npz)
from paligemma_nb.checkpoint import empty_model
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.generation import generate
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import open_image
from paligemma_nb.siglip import SiglipVisionConfig

GENERATIONS = pytest.mark.parametrize("gemma", [GemmaConfig, Gemma2Config],
                                      ids=lambda c: c.model_type)
BLOCK, LAYERS = "img/Transformer/encoderblock/", "llm/layers/"
SAMPLE = Path(paligemma_nb.__file__).with_name("sample.png")


# --- the published files

def listing(l, n, p, c, h, d, m, L, V, C, H, D, K, M, gemma):  # noqa: E741
    attention = {f"MultiHeadDotProductAttention_0/{name}/{kind}": shape
                 for name in ("query", "key", "value")
                 for kind, shape in (("kernel", (l, c, h, d)), ("bias", (l, h, d)))}
    norms = {f"LayerNorm_{i}/{kind}": (l, c) for i in (0, 1) for kind in ("scale", "bias")}
    block = attention | norms | {
        "MultiHeadDotProductAttention_0/out/kernel": (l, h, d, c),
        "MultiHeadDotProductAttention_0/out/bias": (l, c),
        "MlpBlock_0/Dense_0/kernel": (l, c, m), "MlpBlock_0/Dense_0/bias": (l, m),
        "MlpBlock_0/Dense_1/kernel": (l, m, c), "MlpBlock_0/Dense_1/bias": (l, c)}
    layers = {"attn/q_einsum/w": (L, H, C, D), "attn/kv_einsum/w": (L, 2, K, C, D),
              "attn/attn_vec_einsum/w": (L, H, D, C), "mlp/gating_einsum": (L, 2, C, M),
              "mlp/linear": (L, M, C),
              "pre_attention_norm/scale": (L, C), "pre_ffw_norm/scale": (L, C)}
    if gemma is Gemma2Config:
        layers |= {"post_attention_norm/scale": (L, C), "post_ffw_norm/scale": (L, C)}
    named = {BLOCK + key: shape for key, shape in block.items()}
    named |= {LAYERS + key: shape for key, shape in layers.items()}
    return named | {
        "img/embedding/kernel": (p, p, 3, c), "img/embedding/bias": (c,),
        "img/pos_embedding": (1, n, c),
        "img/Transformer/encoder_norm/scale": (c,), "img/Transformer/encoder_norm/bias": (c,),
        "img/head/kernel": (c, C), "img/head/bias": (C,),
        "llm/embedder/input_embedding": (V, C), "llm/final_norm/scale": (C,)}


SO400M = dict(l=27, p=14, c=1152, h=16, d=72, m=4304, V=257_152)
GEMMA = dict(L=18, C=2048, H=8, D=256, K=1, M=16384)
# sizes; query_pre_attn_scalar; parameters of the published folder, which has 64 more rows
PUBLISHED = {
    "3b-224": (GemmaConfig, dict(n=256, **GEMMA), 256, 2_923_466_480),
    "3b-896": (GemmaConfig, dict(n=4096, **GEMMA), 256, 2_927_890_160),
    "2-3b-224": (Gemma2Config, dict(
        n=256, L=26, C=2304, H=8, D=256, K=4, M=9216), 256, 3_032_242_416),
    "2-10b-224": (Gemma2Config, dict(
        n=256, L=42, C=3584, H=16, D=256, K=8, M=14336), 256, 9_662_638_832),
    "2-28b-224": (Gemma2Config, dict(
        n=256, L=46, C=4608, H=32, D=128, K=16, M=36864), 144, 27_650_487_024)}


@pytest.mark.parametrize("gemma, sizes, scalar, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_published_listing(gemma, sizes, scalar, parameters):
    shapes = listing(**SO400M, **sizes, gemma=gemma)
    config = config_of_shapes(shapes, "pt.npz", 257_152)
    assert npz_shapes(config) == shapes
    text = config.text_config
    assert type(text) is gemma
    assert getattr(text, "query_pre_attn_scalar", text.head_dim) == scalar
    side = int(sizes["n"] ** .5) * 14
    assert config.vision_config == SiglipVisionConfig(1152, 4304, 27, 16, 14, side)
    assert config.image_token_index == config.text_config.vocab_size == 257_152
    ours = sum(p.numel() for p in empty_model(config).parameters())
    assert ours == parameters - 64 * sizes["C"]
    assert ours == sum(np.prod(shape) for shape in shapes.values())


# --- the network in big_vision's formulas, in float64, on arrays that our writer never saw

def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x): return .5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + .044715 * x ** 3)))
def rms_norm(x, scale):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
def cap(x, limit): return x if limit is None else limit * np.tanh(x / limit)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def vision(w, picture): # [s, s, 3] -> [n, C]
    kernel = w["img/embedding/kernel"]
    p, side = len(kernel), len(picture) // len(kernel)
    patches = picture[:side * p, :side * p].reshape(side, p, side, p, 3)
    x = np.einsum("ypxqr,pqrc->yxc", patches, kernel).reshape(side * side, -1)
    x = x + w["img/embedding/bias"]
    x = x + w["img/pos_embedding"][0]
    for i in range(len(w[BLOCK + "LayerNorm_0/scale"])):
        b = {key.removeprefix(BLOCK): a[i] for key, a in w.items() if key.startswith(BLOCK)}
        b = {key.removeprefix("MultiHeadDotProductAttention_0/"): a for key, a in b.items()}
        y = layer_norm(x, b["LayerNorm_0/scale"], b["LayerNorm_0/bias"])
        q, k, v = (np.einsum("nc,chd->nhd", y, b[f"{name}/kernel"]) + b[f"{name}/bias"]
                   for name in ("query", "key", "value"))
        weights = softmax(np.einsum("qhd,khd->hqk", q / np.sqrt(q.shape[-1]), k))
        heads = np.einsum("hqk,khd->qhd", weights, v)
        x = x + np.einsum("qhd,hdc->qc", heads, b["out/kernel"]) + b["out/bias"]
        y = layer_norm(x, b["LayerNorm_1/scale"], b["LayerNorm_1/bias"])
        y = gelu(y @ b["MlpBlock_0/Dense_0/kernel"] + b["MlpBlock_0/Dense_0/bias"])
        x = x + y @ b["MlpBlock_0/Dense_1/kernel"] + b["MlpBlock_0/Dense_1/bias"]
    x = layer_norm(x, w["img/Transformer/encoder_norm/scale"],
                   w["img/Transformer/encoder_norm/bias"])
    return x @ w["img/head/kernel"] + w["img/head/bias"]


def rope(x): # [T, heads, D], positions from 0
    exponents = 2 / x.shape[-1] * np.arange(x.shape[-1] // 2)
    angles = np.arange(len(x))[:, None, None] / 10_000 ** exponents
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def decoder(w, x, mask): # [T, C], [T, T] -> logits [T, V]
    two = LAYERS + "post_ffw_norm/scale" in w
    for i in range(len(w[LAYERS + "mlp/linear"])):
        b = {key.removeprefix(LAYERS): a[i] for key, a in w.items() if key.startswith(LAYERS)}
        y = rms_norm(x, b["pre_attention_norm/scale"])
        q = np.einsum("TD,NDH->TNH", y, b["attn/q_einsum/w"])
        k, v = np.einsum("SD,zKDH->zSKH", y, b["attn/kv_einsum/w"])
        q, k = rope(q) * q.shape[-1] ** -.5, rope(k)
        q = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
        scores = cap(np.einsum("TKGH,SKH->KGTS", q, k), 50. if two else None)
        y = np.einsum("KGTS,SKH->TKGH", softmax(np.where(mask, scores, -2e38)), v)
        y = y.reshape(len(x), -1, q.shape[-1])  # [T, N, H]
        y = np.einsum("TNH,NHD->TD", y, b["attn/attn_vec_einsum/w"])
        x = x + (rms_norm(y, b["post_attention_norm/scale"]) if two else y)
        y = rms_norm(x, b["pre_ffw_norm/scale"])
        gate, up = b["mlp/gating_einsum"]
        y = (gelu(y @ gate) * (y @ up)) @ b["mlp/linear"]
        x = x + (rms_norm(y, b["post_ffw_norm/scale"]) if two else y)
    return cap(rms_norm(x, w["llm/final_norm/scale"]) @ w["llm/embedder/input_embedding"].T,
               30. if two else None)


@st.composite
def sizes(draw):
    def one(low, high): return draw(st.integers(low, high))
    K, h, d = one(1, 3), one(1, 4), one(2, 7)
    return dict(l=one(1, 3), n=one(1, 3) ** 2, p=one(2, 5), c=h * d, h=h, d=d, m=one(2, 20),
                L=one(1, 4), V=one(20, 40), C=one(5, 30), H=K * one(2, 3), D=2 * one(1, 6),
                K=K, M=one(2, 30))


def random_arrays(gemma, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(0, .3, shape).astype("f4")
            for key, shape in listing(**sizes, gemma=gemma).items()}


def model_of(path):
    tensors = dict(read_npz(path))
    with zipfile.ZipFile(path) as npz: names = npz.namelist()
    shapes = {n.removesuffix(".npy").removeprefix("params/"): a.shape
              for n, a in np.load(path).items()}
    assert len(names) == len(shapes)
    config = config_of_shapes(shapes, path, shapes["llm/embedder/input_embedding"][0])
    model = empty_model(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def relative(got, expected):
    return np.abs(got.numpy() - expected).max() / np.abs(expected).max()


@torch.no_grad()
def check_mathematics(model, arrays, seed):
    w, rng = {key: a.astype("f8") for key, a in arrays.items()}, np.random.default_rng(seed)
    config = model.config
    side, n = config.vision_config.image_size, config.vision_config.num_image_tokens
    picture = rng.uniform(-1, 1, (side, side, 3))
    text = rng.integers(0, config.text_config.vocab_size, 8)
    features = vision(w, picture)
    pixels = torch.from_numpy(picture.transpose(2, 0, 1)).float()[None]
    assert relative(model.get_image_features(pixels)[0], features) < 1e-5
    # the picture and 3 tokens are the prefix
    mask_ar = np.array([0] * (n + 3) + [1] * 5).cumsum()
    embedded = w["llm/embedder/input_embedding"][text] * config.text_config.hidden_size ** .5
    x = np.concatenate((features, embedded))
    ids = torch.tensor([[config.image_token_index] * n + text.tolist()])
    types = torch.tensor([[0] * (n + 3) + [1] * 5])
    got = model(ids, pixels, token_type_ids=types).logits[0]
    assert relative(got, decoder(w, x, mask_ar[None] <= mask_ar[:, None])) < 1e-5


@GENERATIONS
@settings(max_examples=25)
@given(sizes=sizes(), seed=st.integers(0, 99), prefix=st.sampled_from(["params/", ""]))
def test_network_is_the_one_in_einsums(gemma, sizes, seed, prefix, tmp_path_factory):
    path = tmp_path_factory.mktemp("math")/"a.npz"
    arrays = random_arrays(gemma, seed, **sizes)
    np.savez(path, **{prefix + key: a for key, a in arrays.items()})
    model = model_of(path)
    assert npz_shapes(model.config) == listing(**sizes, gemma=gemma)
    check_mathematics(model, arrays, seed)


SQUARE = dict(l=2, n=4, p=3, c=16, h=4, d=4, m=16, L=2, V=40, C=16, H=4, D=4, K=2, M=16)


@GENERATIONS
def test_key_bias(gemma, tmp_path):
    np.savez(tmp_path/"a.npz", **(arrays := random_arrays(gemma, **SQUARE)))
    tower = model_of(tmp_path/"a.npz").vision_tower.vision_model
    for i, layer in enumerate(tower.encoder.layers):
        assert np.array_equal(layer.self_attn.k_proj.bias.detach().view(4, 4),
                              arrays[BLOCK + "MultiHeadDotProductAttention_0/key/bias"][i])


@GENERATIONS
def test_the_check_notices_every_array_and_each_order_of_axes(gemma, tmp_path):
    "Many sizes are equal, so that wrong orders of axes load; the check must see each of them."
    arrays, tried = random_arrays(gemma, **SQUARE), 0
    # adds the same to all of a query's scores: no effect
    key_bias = BLOCK + "MultiHeadDotProductAttention_0/key/bias"
    for key, a in ((key, a) for key, a in arrays.items() if key != key_bias):
        wrong = [a[::-1]] if len(a) > 1 else [a[:, ::-1]]
        wrong += [a.swapaxes(i, j) for i in range(a.ndim) for j in range(i)]
        for b in (b for b in wrong if b.shape == a.shape and not np.array_equal(a, b)):
            np.savez(tmp_path/"a.npz", **(arrays | {key: np.ascontiguousarray(b)}))
            tried += 1
            with pytest.raises(AssertionError):
                check_mathematics(model_of(tmp_path/"a.npz"), arrays, 0)
    assert tried > 40


# --- there and back

@GENERATIONS
@settings(max_examples=15)
@given(sizes=sizes(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_round_trip(gemma, sizes, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round")
    np.savez(folder/"a.npz", **random_arrays(gemma, **sizes))
    model = model_of(folder/"a.npz").to(dtype)
    write_npz(model, folder/"b.npz")
    back = model_of(folder/"b.npz")
    assert same(model, back) and back.config == model.config
    assert {p.dtype for p in back.parameters()} == {dtype}
    written = np.load(folder/"b.npz", allow_pickle=False)
    stored = {torch.float32: "f4", torch.float16: "f2", torch.bfloat16: "V2"}[dtype]
    assert {written[key].dtype for key in written} == {np.dtype(stored)}
    assert files(folder) == ["a.npz", "b.npz"]
    if dtype == torch.float32:
        assert all(np.array_equal(written["params/" + key], a)
                   for key, a in np.load(folder/"a.npz").items())


@pytest.fixture(scope="module")
def arrays(): return random_arrays(Gemma2Config, **SQUARE | dict(C=20, m=15))


@pytest.fixture
def path(arrays, tmp_path):
    np.savez(tmp_path/"a.npz", **arrays)
    return tmp_path/"a.npz"


def test_compressed_and_transposed_files(arrays, path, tmp_path):
    transposed = {key: np.asfortranarray(a) for key, a in arrays.items()}
    np.savez_compressed(tmp_path/"b.npz", **transposed)
    assert same(model_of(path), model_of(tmp_path/"b.npz"))


def test_bfloat16_is_read_bit_for_bit(arrays, path, tmp_path):
    halves = {key: torch.from_numpy(a).bfloat16() for key, a in arrays.items()}
    stored = {key: a.view(torch.int16).numpy().view("V2") for key, a in halves.items()}
    np.savez(tmp_path/"b.npz", **stored)
    wide, narrow = dict(read_npz(path)), dict(read_npz(tmp_path/"b.npz"))
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, wide[name].bfloat16())
               for name, x in narrow.items())


def test_needs_a_layer_at_a_time(tmp_path):
    "If each tensor is dropped, reading takes far less memory than the largest array."
    sizes = SQUARE | dict(L=40, C=256, M=2000)  # the stacked gates take 164 MB, one layer's 4
    path, rng = tmp_path/"big.npz", np.random.default_rng(0)
    np.savez(path, **{key: rng.normal(size=shape).astype("f4") for key, shape in listing(
        **sizes, gemma=GemmaConfig).items()})
    code = """
import resource, sys
from paligemma_nb.big_vision import read_npz
unit = 1024 ** (1 + (sys.platform == "darwin"))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before = peak()
for name, x in read_npz(sys.argv[1]): del x
print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60  # MB


# --- the shipped model, through both formats

def test_shipped_model_still_describes_a_picture(tmp_path):
    model, processor = load_model(device="cpu")
    write_npz(model, tmp_path/"tiny.npz")
    convert_npz(tmp_path/"tiny.npz", TINY, tmp_path/"folder")
    loaded, its_processor = load_model(tmp_path/"folder", device="cpu")
    assert same(model, loaded) and its_processor.image_size == processor.image_size
    inputs = its_processor([open_image(SAMPLE)], ["caption en"])
    assert torch.equal(generate(loaded, inputs, max_new_tokens=20),
                       generate(model, inputs, max_new_tokens=20))


def test_dtype_and_picture_size(tmp_path):
    arrays = random_arrays(Gemma2Config, **SQUARE | dict(V=1586, n=9))
    np.savez(tmp_path/"a.npz", **arrays)
    model, processor = load_npz(tmp_path/"a.npz", TINY, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert (processor.image_size, processor.num_image_tokens) == (9, 9)
    # past the table: no row is made up
    assert model.config.image_token_index == processor.image_token_id == 1586
    assert len(model.language_model.model.embed_tokens.weight) == 1586
    inputs = processor([open_image(SAMPLE)], ["caption en"])
    assert generate(model, inputs, max_new_tokens=3).max() < 1586


def test_transformers_opens_a_converted_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    np.savez(tmp_path/"a.npz", **random_arrays(GemmaConfig, **SQUARE | dict(V=1586)))
    convert_npz(tmp_path/"a.npz", TINY, tmp_path/"folder")
    theirs, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path/"folder", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values())
    model, processor = load_model(tmp_path/"folder", device="cpu")
    inputs = processor([open_image(SAMPLE)], ["caption en"])
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert relative(model(**inputs).logits, expected.numpy()) < 1e-4


# --- bad input

def read(path): return dict(read_npz(path))


@pytest.mark.parametrize("change, words", [
    (dict(drop=["llm/final_norm/scale"]), ["missing 1 (llm/final_norm/scale)"]),
    (dict(drop=["llm/layers/post_ffw_norm/scale"]),
     ["surplus 1 (llm/layers/post_attention_norm/scale)"]),
    (dict(add={"opt/0/count": np.zeros(3, "f4")}), ["surplus 1 (opt/0/count)"]),
    (dict(add={"params/img/head/bias": np.zeros(20, "f4")}),
     ["params/img/head/bias.npy is a second array"]),
    (dict(add={"img/head/bias": np.zeros(21, "f4")}),
     ["img/head/bias is [21], expected [20]"]),
    (dict(add={"img/head/bias": np.zeros((20, 1), "f4")}),
     ["img/head/bias is [20, 1], expected [20]"]),
    (dict(add={"llm/layers/mlp/linear": np.zeros((3, 16, 20), "f4")}),
     ["is [3, 16, 20], expected [2, 16, 20]"]),
    (dict(add={"img/embedding/kernel": np.zeros((3, 4, 3, 16), "f4")}),
     ["got 4 patches of 3 x 4 pixels"]),
    (dict(add={"img/embedding/kernel": np.zeros((3, 3, 4, 16), "f4")}),
     ["is [3, 3, 4, 16], expected [3, 3, 3, 16]"]),
    (dict(add={"img/pos_embedding": np.zeros((1, 5, 16), "f4")}),
     ["expected square pictures", "got 5 patches"]),
    (dict(add={"img/head/bias": np.zeros(20, "i4")}),
     ["img/head/bias is stored as int32, expected float32"]),
    (dict(add={"img/head/bias": np.zeros(20, ">f4")}),
     ["img/head/bias is stored as >f4, expected float32"]),
    (dict(add={"img/head/bias": np.array([None] * 20)}),
     ["img/head/bias is stored as object, expected float32"]),
])
def test_wrong_arrays(arrays, tmp_path, change, words):
    kept = {key: a for key, a in arrays.items() if key not in change.get("drop", ())}
    np.savez(tmp_path/"a.npz", **kept | change.get("add", {}))
    with fails(ValueError, "a.npz", *words): read(tmp_path/"a.npz")


def test_heads_that_cannot_be(tmp_path):
    np.savez(tmp_path/"a.npz", **random_arrays(GemmaConfig, **SQUARE | dict(d=3)))
    with fails(ValueError, "a.npz", "4 heads of 3 for a width of 16"): read(tmp_path/"a.npz")
    np.savez(tmp_path/"a.npz", **random_arrays(GemmaConfig, **SQUARE | dict(K=3)))
    with fails(ValueError, "a.npz", "num_attention_heads 4", "num_key_value_heads 3"):
        read(tmp_path/"a.npz")
    np.savez(tmp_path/"a.npz", **random_arrays(GemmaConfig, **SQUARE | dict(L=0)))
    with fails(ValueError, "a.npz"): read(tmp_path/"a.npz")


def test_no_file_and_no_npz(tmp_path):
    with fails(FileNotFoundError, "no file", "a.npz"): read(tmp_path/"a.npz")
    with fails(FileNotFoundError, "no file"): read(tmp_path)
    np.save(tmp_path/"a.npy", np.zeros(3))
    with fails(ValueError, "a.npy is not a whole .npz file"): read(tmp_path/"a.npy")
    with zipfile.ZipFile(tmp_path/"b.npz", "w") as npz: npz.writestr("notes.txt", "hello")
    with fails(ValueError, "b.npz", "notes.txt is no array"): read(tmp_path/"b.npz")


def test_file_cut_short_anywhere(path):
    whole, rng = path.read_bytes(), random.Random(0)
    for size in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:
        path.write_bytes(whole[:size])
        with fails(ValueError, "a.npz"): read(path)


def test_flipped_bits(path):
    "A zip has a checksum for each array: no flipped bit of a number goes unnoticed."
    whole, rng, before = path.read_bytes(), random.Random(0), read(path)
    noticed = 0
    for _ in range(150):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)])
                         + whole[at + 1:])
        try: after = read(path)
        except ValueError as e:
            noticed += 1
            assert "a.npz" in str(e)
        else:  # a date or such
            assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert noticed > 100


def test_tokenizer_that_does_not_fit(path):
    with fails(ValueError, "tiny", "the tokenizer has 1587 tokens, the embedding 40 rows"):
        load_npz(path, TINY)
    with fails(FileNotFoundError, "nowhere"): load_npz(path, "nowhere")


def test_git_lfs_pointers(path, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path/"clone").mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TINY/name, tmp_path/"clone")
    (tmp_path/"clone"/"tokenizer.json").write_text(pointer)
    with fails(ValueError, "clone holds git-lfs pointers instead of tokenizer.json",
               "`git lfs pull`"):
        load_npz(path, tmp_path/"clone")
    path.write_text(pointer)
    for read in (lambda: load_npz(path, TINY), lambda: list(read_npz(path))):
        with fails(ValueError, "git-lfs pointers instead of a.npz"): read()


@pytest.mark.parametrize("wrong", [dict(dtype="int8"), dict(device="warp")])
def test_unknown_dtype_and_device(path, wrong):
    with fails(ValueError, *wrong.values()): load_npz(path, TINY, **wrong)


def test_write_refuses(path, tmp_path):
    model = model_of(path)
    write_npz(model, tmp_path/"b.npz")
    before = (tmp_path/"b.npz").read_bytes()
    with fails(ValueError, "got ['torch.float64']"):
        write_npz(model.double(), tmp_path/"b.npz")
    model.float().multi_modal_projector.half()
    with fails(ValueError, "expected all of float32", "torch.float16"):
        write_npz(model, tmp_path/"b.npz")
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        SiglipVisionConfig(8, 8, 1, 2, 2, 4), GemmaConfig(8, 8, 1, 2, 2, 20, 4), 20))
    with fails(ValueError, "fewer key-value heads than the 2 query heads"):
        write_npz(model, tmp_path/"b.npz")
    assert (tmp_path/"b.npz").read_bytes() == before and files(tmp_path) == ["a.npz", "b.npz"]


def test_failed_write_leaves_the_old_file(path, tmp_path, monkeypatch):
    model, before = model_of(path), path.read_bytes()
    monkeypatch.setattr("paligemma_nb.big_vision.from_published", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_npz(model, path)
    assert path.read_bytes() == before and files(tmp_path) == ["a.npz"]


# --- a folder from a file

def test_converting_writes_a_folder_of_the_dtype(tmp_path):
    write_npz(load_model(device="cpu")[0], tmp_path/"tiny.npz")
    words = map(str, (tmp_path/"tiny.npz", TINY, tmp_path/"007"))  # as a command line has them
    assert convert_npz(*words, dtype="bfloat16") == tmp_path/"007"
    config = json.loads((tmp_path/"007"/"config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "mask_vae" not in config  # the file does not say whose codes


def test_converting_says_what_is_wrong(path, tmp_path):
    (tmp_path/"photos").mkdir()
    shutil.copy(SAMPLE, tmp_path/"photos")
    new = tmp_path/"new"
    for error, message, *words in (
        (FileNotFoundError, "no file", tmp_path/"no.npz", TINY, new),
        (ValueError, "1587 tokens", path, TINY, new),
        (FileNotFoundError, "no tokenizer.json", path, tmp_path, new),
        (ValueError, "expected a folder", path, TINY, path),
        (ValueError, "photos holds something else", path, TINY, tmp_path/"photos"),
        (ValueError, "unknown dtype 'int4'", path, TINY, new, "int4"),
    ):
        with fails(error, message): convert_npz(*words)
    assert files(tmp_path) == ["a.npz", "photos"]
    assert files(tmp_path/"photos") == ["sample.png"]
