"""What Gemma 2 changes: settings of the config, soft caps in blocks of queries (same numbers,
less memory), the sliding window; and PaliGemma 2 in folders, to and from transformers."""
import dataclasses
import json

import pytest
import test_parity as parity
import torch
from counting import Calls, peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import LAYOUTS, fails, same

from paligemma_nb import gemma2, load_model, save_model
from paligemma_nb.checkpoint import empty_model, read_config
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import (
    FULL, LAYER_TYPES, SLIDING, Gemma2Attention, Gemma2Config, sliding_window_mask)
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.siglip import SiglipVisionConfig

TOLERANCE = 1e-5


@pytest.fixture
def blocks_of(monkeypatch):
    "blocks_of(queries, keys): so many queries at a time, where there are so many keys."
    return lambda queries, keys: monkeypatch.setattr(gemma2, "MAX_SCORES", queries * keys)


# --- the whole model

def gemma2_pair(**text):
    text = dict(query_pre_attn_scalar=9) | text
    return parity.make_both(parity.Case(4, 2, 12, text=text, gemma=Gemma2Config))


def test_padding_on_the_right_that_sees_nothing():
    """A suffix that ends early: what follows it is further than a window away from all that it
    may look at."""
    theirs, ours, inputs = gemma2_pair(sliding_window=2)
    inputs["attention_mask"][0, -4:] = 0
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill((inputs["token_type_ids"] == 0) | ~real, -100)
    got = ours(**inputs, labels=labels)
    assert parity.relative(got.logits[real], theirs(**inputs).logits[real]) <= TOLERANCE
    got.loss.backward()
    assert got.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_bfloat16_is_as_exact_as_theirs():
    theirs, ours, inputs = gemma2_pair(sliding_window=7, attn_logit_softcapping=3.)
    real, exact = inputs["attention_mask"].bool(), theirs(**inputs).logits
    rounded = inputs | dict(pixel_values=inputs["pixel_values"].bfloat16())
    got, expected = (model.bfloat16()(**rounded).logits for model in (ours, theirs))
    assert got.dtype == torch.bfloat16
    far, theirs_far = ((x - exact)[real].norm() / exact[real].norm() for x in (got, expected))
    assert far <= 1.1 * theirs_far < .1
    q, k = torch.randn(2, 4, 60, 12).bfloat16(), torch.randn(2, 2, 60, 12).bfloat16()
    attention = ours.language_model.model.layers[0].self_attn
    weights = attention.weights(q, k, None)  # a softmax in float32
    assert weights.dtype == torch.float32 and (weights.sum(dim=-1) - 1).abs().max() < 1e-6


# --- soft caps, in blocks of queries: the same numbers

def naive(q, k, v, mask, scale, cap):
    "Everything at once, with copies, in float64."
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = cap * torch.tanh(q.double() @ k.mT * scale / cap)
    if mask is not None: scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores.softmax(dim=-1) @ v


def capped(scale, cap): # an attention module, for its `attend`
    module = Gemma2Attention(Gemma2Config(8, 8, 1, 1, 1, 10, 8), 0)
    module.scale, module.softcap = scale, cap
    return module


def with_gradients(attend, q, k, v, *rest):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, *rest)
    weight = torch.sin(torch.arange(out.numel())).view(out.shape)
    return out, *torch.autograd.grad((out * weight).sum(), leaves)


@settings(max_examples=60)
@given(data=st.data())
def test_blocks_give_what_the_whole_gives(data):
    "Odd shapes, shared heads, room in the cache, any mask, rows that see nothing; gradients."
    def draw(*args): return data.draw(st.integers(*args))
    b, kv_heads, shared, t, past, d = (draw(1, most) for most in (3, 3, 4, 23, 9, 9))
    n, h, block = t + past, kv_heads * shared, draw(1, 25)
    d += d == n  # so that only scores have n entries a row
    torch.manual_seed(draw(0, 9))
    q, cache = torch.randn(b, h, t, d), torch.randn(2, b, kv_heads, n + draw(0, 3), d)
    k, v = cache[0, :, :, :n], cache[1, :, :, :n]
    forms = (t, n), (1, n), (b, 1, t, n), (1, 1, t, n), (b, 1, 1, n), (b, h, t, n)
    form = data.draw(st.sampled_from([None, *forms]))
    cap = data.draw(st.sampled_from([.7, 3., 50.]))
    mask = None if form is None else torch.rand(form) < .6
    if mask is not None: mask[..., 0, :] = False  # the first query sees nothing, or none does
    scale, attend = d ** -.5, capped(d ** -.5, cap).attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma2, "MAX_SCORES", block * n + draw(0, n - 1))
        got = with_gradients(attend, q, k, v, mask)
        with Calls(n) as calls: attend(q, k, v, mask)
    assert calls.largest == b * h * min(t, block) * n * 4  # float32
    for x, expected in zip(got, with_gradients(naive, q, k, v, mask, scale, cap)):
        assert x.isfinite().all() and x.shape == expected.shape
        assert (x - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize("name", [name for name in parity.CASES_2 if "no caps" not in name])
@pytest.mark.parametrize("queries", [1, 4])
def test_blocks_agree_with_transformers(name, queries, blocks_of):
    "Blocks of one query, or of a few: padded, with a cache and without, every gradient."
    both = parity.make_both(parity.CASES[name])
    blocks_of(queries, both[2]["input_ids"].shape[1])
    for check in (
        parity.test_prefill_of_a_padded_batch, parity.test_last_positions_alone,
        parity.test_padding_changes_nothing, parity.test_each_cached_step,
        parity.test_suffix_after_a_cache_in_one_piece, parity.test_loss_and_every_gradient,
    ): check(both)


LONG = parity.Case(8, 4, 6, image=56, patch=2, gemma=Gemma2Config, text=dict(
    query_pre_attn_scalar=5, attn_logit_softcapping=3., sliding_window=500))
LENGTH = 28 * 28 + 12  # of its rows


def test_a_long_prompt_agrees_with_transformers():
    "796 tokens make more scores than are held at a time, as the package is set."
    theirs, ours, inputs = parity.make_both(LONG)
    assert inputs["input_ids"].shape[1] == LENGTH > 2 * (gemma2.MAX_SCORES // LENGTH)
    with torch.no_grad(): got, expected = (model(**inputs).logits for model in (ours, theirs))
    real = inputs["attention_mask"].bool()
    assert parity.relative(got[real], expected[real]) <= TOLERANCE


# --- in less memory

HEADS = {"PaliGemma 2 3B": (8, 4, 256), "PaliGemma 2 10B": (16, 8, 256),
         "PaliGemma 2 28B": (32, 16, 128)}


@pytest.mark.parametrize("h, kv_heads, d", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_of_a_published_size(h, kv_heads, d, rows):
    "On the device `meta`, which computes nothing. A picture of 224 px stays in one block."
    for tokens in (256, 1024, 4096):
        n = tokens + 8
        q, k = (torch.empty(rows, heads, n, d, dtype=torch.bfloat16, device="meta")
                for heads in (h, kv_heads))
        with Calls(n) as calls: out = capped(d ** -.5, 50.).attend(q, k, k, None)
        assert out.shape == q.shape and out.dtype == q.dtype
        block = min(n, gemma2.MAX_SCORES // n)
        assert calls.names.count("aten.bmm.default") == 2 * -(-n // block)
        assert calls.largest == rows * h * n * block * 4
        assert (block == n) == (tokens == 256) and block >= 60  # large enough to be fast


def test_one_query_is_not_cut(blocks_of):
    "Decoding runs the operations of the whole, however long the cache."
    q, (k, v) = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 3, 40, 8)
    attention = capped(.3, 4.)
    with Calls() as expected:
        (attention.weights(q, k, None).view(2, 3, 2, 40) @ v).reshape(q.shape)
    blocks_of(0, 40)
    with Calls() as calls: attention.attend(q, k, v, None)
    assert calls.names == expected.names


@torch.no_grad()
def test_a_block_is_freed_before_the_next(blocks_of):
    "The peak is that of one block of twenty, in a few copies, and the result."
    q, (k, v) = torch.randn(1, 8, 600, 16), torch.randn(2, 1, 2, 600, 16)
    mask, scores = torch.ones(600, 600).tril().bool(), 8 * 600 * 600 * 4
    def work(): return capped(.25, 50.).attend(q, k, v, mask)
    blocks_of(600, 600)
    assert peak_bytes(work) > 2 * scores  # one block
    blocks_of(30, 600)
    assert peak_bytes(work) < 6 * scores / 20 + 2 * q.nbytes


@torch.no_grad()
def test_the_decoder_takes_a_quarter_of_their_memory(monkeypatch):
    "Theirs holds all scores, in several copies; ours a thirtieth, as it does at 896 pixels."
    theirs, ours, _ = parity.make_both(LONG)
    embeds = torch.randn(1, LENGTH, LONG.hidden)
    no_mask = dict.fromkeys(("full_attention", "sliding_attention"))
    scores = LENGTH * LENGTH  # of a head
    other = peak_bytes(lambda: theirs.model.language_model(
        inputs_embeds=embeds, attention_mask=no_mask, use_cache=False).last_hidden_state)
    monkeypatch.setattr(gemma2, "MAX_SCORES", scores // 32)
    mine = peak_bytes(lambda: ours.language_model.model(embeds, first=LENGTH - 1))
    assert other > 8 * 4 * scores and mine <= other / 4, (mine, other)


# --- the window

@settings(max_examples=60)
@given(data=st.data())
def test_window_by_its_definition(data):
    def draw(*args): return data.draw(st.integers(*args))
    past, prefix, suffix = draw(0, 6), draw(0, 6), draw(0, 6)
    window, pad = draw(1, 14), draw(0, 3)
    if prefix + suffix == 0: return
    types = torch.tensor([[0] * prefix + [1] * suffix])
    n = past + prefix + suffix
    seen = (torch.arange(n) >= pad)[None, None, None]
    got = sliding_window_mask(seen, types, types, past, window)
    got = got.expand(1, 1, prefix + suffix, n)[0, 0]
    for i, kind in enumerate(types[0].tolist()):
        for j in range(n):
            assert got[i, j] == (j >= pad and (kind == 0 or past + i - j < window))


def test_window_without_token_types():
    "All prefix at first, all suffix after a cache; no mask is made where none is needed."
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert sliding_window_mask(None, ids, None, 0, 2) is None
    assert sliding_window_mask(None, ids, None, 4, 7) is None
    assert sliding_window_mask(None, ids, None, 4, None) is None
    got = sliding_window_mask(None, ids, None, 4, 6)  # what comes later is for `decoder_mask`
    assert got.int().tolist() == [[1] * 7, [1] * 7, [0] + [1] * 6]


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_only_sliding_layers_slide(kind):
    """With one layer, a key outside the window moves the last token's logits if and only if
    the layer does not slide."""
    torch.manual_seed(0)
    text = Gemma2Config(24, 32, 1, 2, 1, 50, 8, sliding_window=3, layer_types=[kind])
    config = PaliGemmaConfig(SiglipVisionConfig(8, 8, 1, 1, 14, 14), text, 49)
    model = PaliGemmaForConditionalGeneration(config)
    ids, types = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1, 1]])
    def last(ids): return model(ids, token_type_ids=types).logits[0, -1]
    others = [ids.where(torch.arange(5) != i, 20) for i in range(5)]
    moved = [not torch.equal(last(ids), last(other)) for other in others]
    assert moved == [kind == FULL] * 2 + [True] * 3
    for sizes in ([1] * 5, [1, 4]):  # the same through a cache, however it is cut
        cache = KVCache(1, 1, 1, 5, 8)
        for piece in ids.split(sizes, dim=1): out = model(piece, kv_cache=cache).logits[0, -1]
        torch.testing.assert_close(out, last(ids), rtol=TOLERANCE, atol=TOLERANCE)


# --- the config

PUBLISHED = { # hidden, MLP, layers, heads, KV heads, head_dim, scalar: parameters, tensors
    "PaliGemma 2 3B": ((2304, 9216, 26, 8, 4, 256, 256), 3_032_242_416, 727),
    "PaliGemma 2 10B": ((3584, 14336, 42, 16, 8, 256, 256), 9_662_638_832, 903),
    "PaliGemma 2 28B": ((4608, 36864, 46, 32, 16, 128, 144), 27_650_487_024, 947),
}


def published(name, size=224):
    c, mlp, layers, h, k, d, scalar = PUBLISHED[name][0]
    text = Gemma2Config(c, mlp, layers, h, k, 257216, d, query_pre_attn_scalar=scalar)
    vision = SiglipVisionConfig(1152, 4304, 27, 16, 14, size)
    return PaliGemmaConfig(vision, text, image_token_index=257152)


def count(model): return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(name):
    config, (_, parameters, tensors) = published(name), PUBLISHED[name]
    model = empty_model(config)
    assert count(model) == parameters and len(model.state_dict()) == tensors
    for size, positions in ((448, 1024), (896, 4096)):  # only the table of positions grows
        more = (positions - 256) * 1152
        assert count(empty_model(published(name, size))) == parameters + more
    with torch.device("meta"): theirs = parity.Theirs(parity.TheirConfig(**config.to_dict()))
    assert count(theirs) == parameters
    shapes = {parity.published_key(k): x.shape for k, x in theirs.state_dict().items()}
    del shapes["language_model.lm_head.weight"]
    assert shapes == {k: x.shape for k, x in model.state_dict().items()}


def spell(text, version):
    """What config.json says of a Gemma 2: transformers leaves out its defaults, and version 5
    spells out the layers."""
    rope, n = dict(rope_theta=10_000.0, rope_type="default"), text["num_hidden_layers"]
    common = text | dict(model_type="gemma2", eos_token_id=1, num_image_tokens=256)
    if version == 4:
        return common | dict(hidden_act="gelu_pytorch_tanh", rope_theta=10_000.0,
                             torch_dtype="bfloat16", sliding_window_size=4096)
    return common | dict(rope_parameters=rope, dtype="bfloat16", pad_token_id=0,
                         use_bidirectional_attention=True,
                         layer_types=[LAYER_TYPES[i % 2] for i in range(n)])


@pytest.mark.parametrize("version", [4, 5])
def test_both_spellings(version):
    config = published("PaliGemma 2 28B")
    names = ("hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
             "num_key_value_heads vocab_size query_pre_attn_scalar").split()
    sizes = {name: getattr(config.text_config, name) for name in names}
    content = config.to_dict() | dict(text_config=spell(sizes, version))
    read = PaliGemmaConfig.from_dict(json.loads(json.dumps(content)))
    assert read == config and PaliGemmaConfig.from_dict(read.to_dict()) == read
    settings = "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"
    text = read.text_config
    assert [getattr(text, name) for name in settings] == [50, 30, 4096]
    assert text.layer_types == [SLIDING, FULL] * 23 and text.query_pre_attn_scalar == 144
    assert parity.TheirConfig(**content).text_config.layer_types == text.layer_types
    off = content["text_config"] | dict.fromkeys(settings)  # null: it says so, they are off
    read = PaliGemmaConfig.from_dict(content | dict(text_config=off)).text_config
    assert [getattr(read, name) for name in settings] == [None] * 3


def test_hidden_act_means_nothing():
    content = published("PaliGemma 2 3B").to_dict()
    text = content["text_config"]
    def read(**changes): PaliGemmaConfig.from_dict(content | dict(text_config=text | changes))
    del text["hidden_activation"]
    for act in ("gelu", "relu"): read(hidden_act=act)
    with pytest.raises(ValueError, match="text_config: expected a tanh-GELU, got 'relu'"):
        read(hidden_activation="relu")


def test_the_first_generation_stays_as_it_is():
    "It takes no setting of the second, even from a file that holds them, and writes none."
    text = GemmaConfig(48, 76, 3, 4, 1, 300, 20)
    vision = SiglipVisionConfig(36, 52, 2, 3, 14, 42)
    config = PaliGemmaConfig(vision, text, image_token_index=290)
    content = config.to_dict()
    one, two = ({f.name for f in dataclasses.fields(c)} for c in (GemmaConfig, Gemma2Config))
    assert len(two - one) == 5 and not (two - one) & content["text_config"].keys()
    settings = dict(attn_logit_softcapping=50., final_logit_softcapping=30., sliding_window=4)
    both = content["text_config"] | settings
    del content["text_config"]["model_type"]  # files without it are of the first
    for section in (content["text_config"], both):
        read = PaliGemmaConfig.from_dict(content | dict(text_config=section))
        assert read == config and type(read.text_config) is GemmaConfig


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="gemma3_text"), "model_type 'gemma' or 'gemma2', got 'gemma3_text'"),
    (dict(model_type=None), "model_type 'gemma' or 'gemma2', got None"),
    (dict(model_type=["gemma2"]), "model_type 'gemma' or 'gemma2', got ['gemma2']"),
    (dict(layer_types=[FULL]), "layer_types: expected 2 of"),
    (dict(layer_types=[FULL, "chunked_attention"]), "layer_types: expected 2 of"),
    (dict(layer_types=[FULL, [SLIDING]]), "layer_types: expected 2 of"),
    (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar must be above 0, got 0"),
    (dict(query_pre_attn_scalar=None), "query_pre_attn_scalar must be above 0, got None"),
    (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping must be above 0, got 0.0"),
    (dict(final_logit_softcapping=float("nan")), "final_logit_softcapping must be above"),
    (dict(sliding_window=-1), "sliding_window must be above 0, got -1"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
     "text_config: expected rope_type 'default', got 'linear'"),
    (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)),
     "expected rope_type 'default', got 'dynamic'"),
], ids=str)
def test_refused(folder, changes, message):
    content = json.loads((folder/"config.json").read_text())
    content["text_config"] |= changes
    (folder/"config.json").write_text(json.dumps(content))
    with fails(ValueError, str(folder/"config.json"), message): load_model(folder)


# --- folders

@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(["caption en a red circle", "detect square"], 1600)
    return PaliGemmaProcessor(tokenizer, 42, 9)


@pytest.fixture(scope="module")
def model(processor):
    "Every setting of the second generation is another than its default."
    torch.manual_seed(0)
    text = Gemma2Config(
        40, 56, 2, 4, 2, processor.vocab_size, head_dim=12, query_pre_attn_scalar=7,
        sliding_window=5, attn_logit_softcapping=3., final_logit_softcapping=4.,
        layer_types=[FULL, SLIDING])
    vision = SiglipVisionConfig(36, 52, 2, 3, 14, 42)
    config = PaliGemmaConfig(vision, text, image_token_index=processor.image_token_id)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)
    return model


@pytest.fixture
def folder(model, processor, tmp_path):
    save_model(model, processor, tmp_path/"model")
    return tmp_path/"model"


def test_settings_reach_transformers_and_come_back(model, processor, folder, tmp_path):
    theirs, info = parity.Theirs.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    text, mine = theirs.config.text_config, model.config.text_config
    assert text.model_type == "gemma2"
    assert type(theirs.model.language_model).__name__ == "Gemma2Model"
    fields = {k: v for k, v in dataclasses.asdict(mine).items() if k != "rope_theta"}
    assert fields == {k: getattr(text, k) for k in fields}
    assert text.rope_parameters["rope_theta"] == mine.rope_theta
    image = torch.zeros(42, 42, 3).byte().numpy()
    inputs = processor([image], ["caption en"], ["a red circle"])
    assert parity.relative(theirs(**inputs).logits, model(**inputs).logits) <= TOLERANCE
    theirs.save_pretrained(tmp_path/"theirs")
    processor.save_pretrained(tmp_path/"theirs")
    assert read_config(tmp_path/"theirs") == model.config
    assert same(load_model(tmp_path/"theirs", device="cpu")[0], model)


def test_generations_do_not_load_each_other(model, folder, tmp_path):
    content = json.loads((folder/"config.json").read_text())
    first = content["text_config"] | dict(model_type="gemma")
    (folder/"config.json").write_text(json.dumps(content | dict(text_config=first)))
    with fails(ValueError, "surplus 4", "post_feedforward_layernorm"): load_model(folder)
    (folder/"config.json").write_text(json.dumps(content))
    tensors = {k: x for k, x in model.state_dict().items() if "feedforward_layernorm" not in k}
    for rename in LAYOUTS.values():
        save_file({rename(k): x for k, x in tensors.items()}, folder/"model.safetensors")
        with fails(ValueError, "missing 4", "pre_feedforward_layernorm"): load_model(folder)
