"""PaliGemma 2 beside PaliGemma, on drawn shapes: the checks of `test_parity`, the config in every spelling, the
sizes of the published models, and folders to and from transformers."""
import dataclasses
import json

import pytest
import test_parity as parity
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import LAYOUTS, fails, same

from paligemma_nb.checkpoint import empty_model, load_model, read_config, save_model
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration, sliding_window_mask
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.siglip import SiglipVisionConfig

GENERATIONS = pytest.mark.parametrize("gemma", [GemmaConfig, Gemma2Config], ids=lambda c: c.model_type)
KINDS = "sliding_attention", "full_attention"


# --- the same numbers as transformers

@st.composite
def cases(draw, gemma):
    def choose(*values): return draw(st.sampled_from(values))
    kv_heads, patch = choose(1, 2, 3), choose(3, 5, 14)
    heads = kv_heads * choose(1, 2, 3)
    hidden = choose(*range(24, 60)) // heads * heads  # transformers wants a multiple for Gemma 2
    case = parity.Case(heads, kv_heads, 2 * choose(1, 2, 3, 4, 5, 8), hidden=hidden,
                       image=patch * choose(1, 2, 3) + choose(0, 1, 2), patch=patch, pictures=choose(1, 1, 2, 3),
                       vision_heads=choose(1, 2, 3), gemma=gemma,
                       vision=dict(layer_norm_eps=choose(1e-6, .1), num_channels=choose(3, 1)),
                       text=dict(rope_theta=choose(100., 10_000.),
                                 rms_norm_eps=choose(1e-6, 1e-2)))
    if gemma is Gemma2Config:
        case.text |= dict(  # a window of 1 breaks transformers' cache
            sliding_window=choose(*range(2, 40)), query_pre_attn_scalar=choose(3, 7, 16, 144),
            attn_logit_softcapping=choose(None, 2., 50.), final_logit_softcapping=choose(None, 3., 30.),
            layer_types=choose(None, *([KINDS[i] for i in layers] for layers in ((0, 0, 0), (1, 0, 0), (0, 0, 1)))))
    return case


@GENERATIONS
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_agrees_with_transformers(gemma, data):
    case = data.draw(cases(gemma))
    both = parity.make_both(case)
    for check in (
        parity.test_attention_weights, parity.test_prefill_of_a_padded_batch, parity.test_padding_changes_nothing,
        parity.test_each_cached_step, parity.test_suffix_after_a_cache_in_one_piece,
        parity.test_loss_and_every_gradient, parity.test_greedy_tokens,
    ): check(both)


def gemma2_pair(**text):
    return parity.make_both(parity.Case(4, 2, 12, text=dict(query_pre_attn_scalar=9) | text, gemma=Gemma2Config))


def test_padding_on_the_right_that_sees_nothing():
    "A suffix that ends early: what follows it is further than a window away from all that may be looked at."
    theirs, ours, inputs = gemma2_pair(sliding_window=2)
    inputs["attention_mask"][0, -4:] = 0
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill((inputs["token_type_ids"] == 0) | ~real, -100)
    got = ours(**inputs, labels=labels)
    assert parity.relative(got.logits[real], theirs(**inputs).logits[real]) <= parity.TOLERANCE
    got.loss.backward()
    assert got.logits.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())


def test_bfloat16_is_as_exact_as_theirs():
    theirs, ours, inputs = gemma2_pair(sliding_window=7, attn_logit_softcapping=3.)
    real, exact = inputs["attention_mask"].bool(), theirs(**inputs).logits
    got, expected = (model.bfloat16()(**inputs | dict(pixel_values=inputs["pixel_values"].bfloat16())).logits
                     for model in (ours, theirs))
    assert got.dtype == torch.bfloat16
    far, theirs_far = ((x - exact)[real].norm() / exact[real].norm() for x in (got, expected))
    assert far <= 1.1 * theirs_far < .1
    q, k = torch.randn(2, 4, 60, 12).bfloat16(), torch.randn(2, 2, 60, 12).bfloat16()
    weights = ours.language_model.model.layers[0].self_attn.weights(q, k, None)  # a softmax in float32
    assert weights.dtype == torch.float32 and (weights.sum(dim=-1) - 1).abs().max() < 1e-6


# --- the window

@settings(max_examples=60)
@given(data=st.data())
def test_window_by_its_definition(data):
    def draw(*args): return data.draw(st.integers(*args))
    past, prefix, suffix, window, pad = draw(0, 6), draw(0, 6), draw(0, 6), draw(1, 14), draw(0, 3)
    if prefix + suffix == 0: return
    types = torch.tensor([[0] * prefix + [1] * suffix])
    n = past + prefix + suffix
    seen = (torch.arange(n) >= pad)[None, None, None]
    got = sliding_window_mask(seen, types, types, past, window).expand(1, 1, prefix + suffix, n)[0, 0]
    for i, kind in enumerate(types[0].tolist()):
        for j in range(n):
            assert got[i, j] == (j >= pad and (kind == 0 or past + i - j < window))


def test_window_without_token_types():
    "All prefix at first, all suffix after a cache; no mask is made where none is needed."
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert sliding_window_mask(None, ids, None, 0, 2) is None
    assert sliding_window_mask(None, ids, None, 4, 7) is None and sliding_window_mask(None, ids, None, 4, None) is None
    got = sliding_window_mask(None, ids, None, 4, 6)
    assert got.int().tolist() == [[1] * 7, [1] * 7, [0] + [1] * 6]  # what comes later is `decoder_mask`'s business


def test_only_sliding_layers_slide():
    "With one layer, a key outside the window moves the last token's logits if and only if the layer does not slide."
    for kind in KINDS:
        torch.manual_seed(0)
        text = Gemma2Config(24, 32, 1, 2, 1, 50, 8, sliding_window=3, layer_types=[kind])
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(SiglipVisionConfig(8, 8, 1, 1, 14, 14), text, 49))
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        types = torch.tensor([[0, 1, 1, 1, 1]])
        def last(ids): return model(ids, token_type_ids=types).logits[0, -1]
        moved = [not torch.equal(last(ids), last(ids.where(torch.arange(5) != i, 20))) for i in range(5)]
        assert moved == [kind == "full_attention"] * 2 + [True] * 3
        for decode in (True, False):  # the same through a cache, in one piece and token by token
            cache = KVCache(1, 1, 1, 5, 8)
            for piece in ids.split([1, 1, 1, 1, 1] if decode else [1, 4], dim=1): out = model(piece, kv_cache=cache).logits[0, -1]
            torch.testing.assert_close(out, last(ids), rtol=1e-5, atol=1e-5)


# --- the config

PUBLISHED = {  # hidden, MLP, layers, heads, KV heads, head_dim, query_pre_attn_scalar: parameters at 224 px, tensors
    "PaliGemma 2 3B": ((2304, 9216, 26, 8, 4, 256, 256), 3_032_242_416, 727),
    "PaliGemma 2 10B": ((3584, 14336, 42, 16, 8, 256, 256), 9_662_638_832, 903),
    "PaliGemma 2 28B": ((4608, 36864, 46, 32, 16, 128, 144), 27_650_487_024, 947),
}


def published(name, size=224):
    c, mlp, layers, h, k, d, scalar = PUBLISHED[name][0]
    return PaliGemmaConfig(SiglipVisionConfig(1152, 4304, 27, 16, 14, size), image_token_index=257152,
                           text_config=Gemma2Config(c, mlp, layers, h, k, 257216, d, query_pre_attn_scalar=scalar))


def count(model): return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(name):
    config, (_, parameters, tensors) = published(name), PUBLISHED[name]
    model = empty_model(config)
    assert count(model) == parameters and len(model.state_dict()) == tensors
    for size, positions in ((448, 1024), (896, 4096)):  # only the table of positions grows
        assert count(empty_model(published(name, size))) == parameters + (positions - 256) * 1152
    with torch.device("meta"): theirs = parity.Theirs(parity.TheirConfig(**config.to_dict()))
    assert count(theirs) == parameters
    shapes = {parity.published_key(k): x.shape for k, x in theirs.state_dict().items() if k != "lm_head.weight"}
    assert shapes == {k: x.shape for k, x in model.state_dict().items()}


def spell(text, version):
    "What config.json says of a Gemma 2: transformers leaves out its defaults, and 5 spells out the layers."
    four = dict(hidden_act="gelu_pytorch_tanh", rope_theta=10_000.0, torch_dtype="bfloat16", sliding_window_size=4096)
    five = dict(rope_parameters=dict(rope_theta=10_000.0, rope_type="default"), dtype="bfloat16", pad_token_id=0,
                use_bidirectional_attention=True, layer_types=[KINDS[i % 2] for i in range(text["num_hidden_layers"])])
    return text | dict(model_type="gemma2", eos_token_id=1, num_image_tokens=256) | (four if version == 4 else five)


@pytest.mark.parametrize("version", [4, 5])
def test_both_spellings(version):
    config = published("PaliGemma 2 28B")
    sizes = {k: getattr(config.text_config, k) for k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "head_dim", "query_pre_attn_scalar")}
    content = config.to_dict() | dict(text_config=spell(sizes, version))
    read = PaliGemmaConfig.from_dict(json.loads(json.dumps(content)))
    assert read == config and PaliGemmaConfig.from_dict(read.to_dict()) == read
    text = read.text_config
    assert (text.attn_logit_softcapping, text.final_logit_softcapping, text.sliding_window) == (50, 30, 4096)
    assert text.sliding_layers == list(range(0, 46, 2)) and text.query_pre_attn_scalar == 144
    assert parity.TheirConfig(**content).text_config.layer_types == text.layer_types
    off = content["text_config"] | dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=None)
    read = PaliGemmaConfig.from_dict(content | dict(text_config=off)).text_config
    assert read.attn_logit_softcapping is read.final_logit_softcapping is read.sliding_window is None  # said so: off


def test_ids_that_end_an_answer():
    "One or several, above or in the text section; after a null above the text section counts."
    config = published("PaliGemma 2 3B")
    content = config.to_dict()
    assert config.eos_token_ids == [config.eos_token_id] == [1]
    for eos, ids in ((1, [1]), (7, [7]), ([1, 107], [1, 107]), ([3], [3])):
        read = PaliGemmaConfig.from_dict(content | dict(eos_token_id=eos))
        assert read.eos_token_id == eos and read.eos_token_ids == ids
        assert PaliGemmaConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read
        assert parity.TheirConfig(**read.to_dict()).eos_token_id == eos
        below = content | dict(text_config=content["text_config"] | dict(eos_token_id=eos))
        for above in ({}, dict(eos_token_id=None)):
            del below["eos_token_id"]
            assert PaliGemmaConfig.from_dict(below | above).eos_token_ids == ids
            below["eos_token_id"] = 1
        assert PaliGemmaConfig.from_dict(below).eos_token_ids == [1]
    config.eos_token_id = [5, 6]  # it may be set: nothing is remembered
    assert config.eos_token_ids == [5, 6]


def test_name_of_the_mask_vae():
    content = published("PaliGemma 2 3B").to_dict()
    assert "mask_vae" not in content and PaliGemmaConfig.from_dict(content).mask_vae is None
    read = PaliGemmaConfig.from_dict(content | dict(mask_vae="0123456789abcdef"))
    assert read.mask_vae == "0123456789abcdef"
    assert PaliGemmaConfig.from_dict(read.to_dict()) == read
    assert PaliGemmaConfig.from_dict(content | dict(mask_vae=None)).mask_vae is None
    parity.TheirConfig(**read.to_dict())


@pytest.mark.parametrize("changes, message", [
    (dict(eos_token_id=[]), "eos_token_id: expected an id or a list of ids, got []"),
    (dict(eos_token_id=["a"]), "eos_token_id: expected an id or a list of ids, got ['a']"),
    (dict(eos_token_id=[[1]]), "eos_token_id: expected an id or a list of ids, got [[1]]"),
    (dict(eos_token_id=True), "eos_token_id: expected an id or a list of ids, got True"),
    (dict(pad_token_id=[0]), "pad_token_id: expected an id, got [0]"),
    (dict(bos_token_id=2.0), "bos_token_id: expected an id, got 2.0"),
    (dict(image_token_index="<image>"), "image_token_index: expected an id, got '<image>'"),
], ids=str)
def test_ids_refused(folder, changes, message):
    content = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(content | changes))
    with fails(ValueError, str(folder/"config.json"), message): load_model(folder)


def test_hidden_act_means_nothing():
    content = published("PaliGemma 2 3B").to_dict()
    text = content["text_config"]
    del text["hidden_activation"]
    for act in ("gelu", "relu"): PaliGemmaConfig.from_dict(content | dict(text_config=text | dict(hidden_act=act)))
    with pytest.raises(ValueError, match="text_config: expected a tanh-GELU, got 'relu'"):
        PaliGemmaConfig.from_dict(content | dict(text_config=text | dict(hidden_activation="relu")))


def test_the_first_generation_stays_as_it_is():
    "It takes no setting of the second, even from a file that holds them, and writes none."
    text = GemmaConfig(48, 76, 3, 4, 1, 300, 20)
    config = PaliGemmaConfig(SiglipVisionConfig(36, 52, 2, 3, 14, 42), text, image_token_index=290)
    content = config.to_dict()
    one, two = ({f.name for f in dataclasses.fields(gemma)} for gemma in (GemmaConfig, Gemma2Config))
    settings_of_2 = two - one
    assert len(settings_of_2) == 5 and not settings_of_2 & content["text_config"].keys()
    both = content["text_config"] | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4)
    del content["text_config"]["model_type"]  # files without it are of the first
    for section in (content["text_config"], both):
        read = PaliGemmaConfig.from_dict(content | dict(text_config=section))
        assert read == config and type(read.text_config) is GemmaConfig


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="gemma3_text"), "expected a text_config of model_type 'gemma' or 'gemma2', got 'gemma3_text'"),
    (dict(model_type=None), "model_type 'gemma' or 'gemma2', got None"),
    (dict(model_type=["gemma2"]), "model_type 'gemma' or 'gemma2', got ['gemma2']"),
    (dict(layer_types=["full_attention"]), "layer_types: expected 2 of"),
    (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types: expected 2 of"),
    (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar must be above 0, got 0"),
    (dict(query_pre_attn_scalar=None), "query_pre_attn_scalar must be above 0, got None"),
    (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping must be above 0, got 0.0"),
    (dict(final_logit_softcapping=float("nan")), "final_logit_softcapping must be above 0, got nan"),
    (dict(sliding_window=-1), "sliding_window must be above 0, got -1"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
     "text_config: expected rope_type 'default', got 'linear'"),
    (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)),
     "expected rope_type 'default', got 'dynamic'"),
], ids=str)
def test_refused(folder, changes, message):
    content = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(content | dict(text_config=content["text_config"] | changes)))
    with fails(ValueError, str(folder/"config.json"), message): load_model(folder)


# --- folders

@pytest.fixture(scope="module")
def processor(): return PaliGemmaProcessor(train_tokenizer(["caption en a red circle", "detect square"], 1600), 42, 9)


@pytest.fixture(scope="module")
def model(processor):
    "Every setting of the second generation is another than its default."
    torch.manual_seed(0)
    text = Gemma2Config(40, 56, 2, 4, 2, processor.vocab_size, head_dim=12, query_pre_attn_scalar=7, sliding_window=5,
                        attn_logit_softcapping=3., final_logit_softcapping=4., layer_types=["full_attention", KINDS[0]])
    config = PaliGemmaConfig(SiglipVisionConfig(36, 52, 2, 3, 14, 42), text, image_token_index=processor.image_token_id)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)
    return model


@pytest.fixture
def folder(model, processor, tmp_path):
    save_model(model, processor, tmp_path/"model")
    return tmp_path/"model"


def test_settings_reach_transformers_and_come_back(model, processor, folder, tmp_path):
    theirs, info = parity.Theirs.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    text, mine = theirs.config.text_config, model.config.text_config
    assert text.model_type == "gemma2" and type(theirs.model.language_model).__name__ == "Gemma2Model"
    fields = {k: v for k, v in dataclasses.asdict(mine).items() if k != "rope_theta"}
    assert fields == {k: getattr(text, k) for k in fields} and text.rope_parameters["rope_theta"] == mine.rope_theta
    inputs = processor([torch.zeros(42, 42, 3).byte().numpy()], ["caption en"], ["a red circle"])
    assert parity.relative(theirs(**inputs).logits, model(**inputs).logits) <= parity.TOLERANCE
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
