"""The whole model by itself: its config, what it refuses, its output, and what users of
transformers and torch's compiler expect of it. Are its numbers right? See `test_parity`."""
import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from test_parity import (
    CASES, TOLERANCE, VOCAB, Case, TheirConfig, labels_of, make_both, new_cache,
    prefill, relative)

from paligemma_nb import generate, load_model
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.paligemma import (
    PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaOutput, decoder_mask,
    prefix_lm_mask, suffix_loss)
from paligemma_nb.siglip import SiglipVisionConfig


# --- the config

@pytest.fixture
def config():
    vision = SiglipVisionConfig(36, 52, 2, 3, 14, 42)
    text = GemmaConfig(48, 76, 3, 4, 1, 300, 20)
    return PaliGemmaConfig(vision, text, image_token_index=290)


def test_ids_that_end_an_answer(config):
    "One or several, above or in the text section; after a null above the text section counts."
    content = config.to_dict()
    assert config.eos_token_ids == [config.eos_token_id] == [1]
    for eos, ids in ((1, [1]), (7, [7]), ([1, 107], [1, 107]), ([3], [3])):
        read = PaliGemmaConfig.from_dict(content | dict(eos_token_id=eos))
        assert read.eos_token_id == eos and read.eos_token_ids == ids
        assert PaliGemmaConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read
        assert TheirConfig(**read.to_dict()).eos_token_id == eos
        below = content | dict(text_config=content["text_config"] | dict(eos_token_id=eos))
        for above in ({}, dict(eos_token_id=None)):
            del below["eos_token_id"]
            assert PaliGemmaConfig.from_dict(below | above).eos_token_ids == ids
            below["eos_token_id"] = 1
        assert PaliGemmaConfig.from_dict(below).eos_token_ids == [1]
    config.eos_token_id = [5, 6]  # it may be set: nothing is remembered
    assert config.eos_token_ids == [5, 6]


def test_name_of_the_mask_vae(config):
    content, name = config.to_dict(), "0123456789abcdef"
    assert "mask_vae" not in content and PaliGemmaConfig.from_dict(content).mask_vae is None
    read = PaliGemmaConfig.from_dict(content | dict(mask_vae=name))
    assert read.mask_vae == name and PaliGemmaConfig.from_dict(read.to_dict()) == read
    assert PaliGemmaConfig.from_dict(content | dict(mask_vae=None)).mask_vae is None
    TheirConfig(**read.to_dict())


@pytest.mark.parametrize("changes, message", [
    (dict(eos_token_id=[]), "eos_token_id: expected an id or a list of ids, got []"),
    (dict(eos_token_id=["a"]), "eos_token_id: expected an id or a list of ids, got ['a']"),
    (dict(eos_token_id=[[1]]), "eos_token_id: expected an id or a list of ids, got [[1]]"),
    (dict(eos_token_id=True), "eos_token_id: expected an id or a list of ids, got True"),
    (dict(pad_token_id=[0]), "pad_token_id: expected an id, got [0]"),
    (dict(bos_token_id=2.0), "bos_token_id: expected an id, got 2.0"),
    (dict(image_token_index="<image>"), "image_token_index: expected an id, got '<image>'"),
], ids=str)
def test_ids_refused(config, changes, message):
    with pytest.raises(ValueError) as error:
        PaliGemmaConfig.from_dict(config.to_dict() | changes)
    assert str(error.value) == message


# --- inputs that could be computed with, but mean something else

def refused(message): return pytest.raises(ValueError, match=message)


def without(inputs, *names): return {k: x for k, x in inputs.items() if k not in names}


@pytest.fixture(scope="module")
def small():
    "Ours alone, a batch with labels, and what the model makes of them."
    _, ours, inputs = make_both(Case(4, 2, 12, image=28))
    inputs["labels"] = labels_of(inputs)
    with torch.no_grad(): return ours, inputs, ours(**inputs)


def test_labels_without_token_types_would_leak(small):
    "All would count as prefix, and each token of the suffix would see what it is to predict."
    ours, inputs, right = small
    with refused("labels need token_type_ids, which .* suffix"):
        ours(**without(inputs, "token_type_ids"))
    assert torch.equal(ours(**inputs).loss, right.loss)
    leak = ours(**without(inputs, "token_type_ids", "labels")).logits
    assert (suffix_loss(leak, inputs["labels"]) - right.loss).abs() > .01


def test_labels_after_a_cache(small):
    "There the new tokens are the suffix, with or without token types."
    ours, inputs, _ = small
    labels = inputs["labels"].clone()
    labels[:, -5] = -100  # it is predicted by what came before
    new = dict(input_ids=inputs["input_ids"][:, -5:], attention_mask=inputs["attention_mask"])

    def loss(labels, **types):
        cache = new_cache(ours, prefill(inputs), 5)
        ours(**prefill(without(inputs, "labels")), kv_cache=cache)
        return ours(**new, labels=labels, kv_cache=cache, **types).loss

    expected = ours(**inputs | dict(labels=labels)).loss
    for types in ({}, dict(token_type_ids=inputs["token_type_ids"][:, -5:])):
        assert relative(loss(labels[:, -5:], **types), expected) <= TOLERANCE
    with refused("labels after a cache: .* must be -100"): loss(new["input_ids"])


def test_labels_that_are_no_labels(small):
    ours, inputs, right = small
    labels, ids, v = inputs["labels"], inputs["input_ids"], VOCAB
    padded = inputs["attention_mask"].clone()
    padded[1, -1] = 0
    def other(x): return labels.where(labels != labels[0, -1], x)
    for bad, message in (
        (dict(labels=ids), "-100 where token_type_ids is 0, found 290 in row 0, place 0"),
        (dict(attention_mask=padded),
         f"-100 where attention_mask is 0, found {labels[1, -1]} in row"),
        (dict(labels=labels[:, -5:]), r"labels: expected \[3, 16\], .* got \[3, 5\]"),
        (dict(labels=labels[0]), r"labels: expected \[3, 16\], .* got \[16\]"),
        (dict(labels=labels.float()), "labels: expected int64, got torch.float32"),
        (dict(labels=labels.short()), "labels: expected int64, got torch.int16"),
        (dict(labels=other(v)), f"expected -100 or a token 0 … {v - 1}, found .* … {v}"),
        (dict(labels=other(-1)), f"expected -100 or a token 0 … {v - 1}, found -1 … "),
        (dict(labels=torch.full_like(labels, -100)), "every label is -100"),
        (dict(logits_to_keep=3), "labels reach before the 3 positions"),
    ):
        with refused(message): ours(**inputs | bad)
    for bad in (labels[:2], labels[:, 1:], labels[0]):
        with refused(r"labels: expected \[3, 16 or more\]"): suffix_loss(right.logits, bad)
    assert torch.equal(suffix_loss(right.logits[:, -6:], labels), right.loss)
    with refused("labels reach before the 5 pos"): suffix_loss(right.logits[:, -5:], labels)


def test_masks_that_say_the_opposite(small):
    "0 and 1, as integers or bool, for each token. An additive mask has 0 where one may look."
    ours, inputs, right = small
    mask, types = inputs["attention_mask"], inputs["token_type_ids"]
    additive = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)
    large = additive.clamp(min=-1e4)

    def refuses(message, **bad):
        with refused(f"{next(iter(bad))}: {message}"): ours(**inputs | bad)

    for bad in (additive, large, additive.half(), additive.bfloat16(), mask.float()):
        message = f"expected 0 and 1 as integers or bool, got {bad.dtype}; .*pass `mask == 0`"
        refuses(message, attention_mask=bad)
        with refused(message): prefix_lm_mask(types, bad)
        with refused(message): decoder_mask(inputs["input_ids"], bad, None)
    refuses("expected 0 and 1, found -10000 … 0", attention_mask=large.int())
    refuses("expected 0 and 1, found 0 … 2", attention_mask=2 * mask)
    refuses("row 0 is all padding", attention_mask=1 - mask)  # elsewhere 1 marks padding
    refuses("row 2 is all padding", attention_mask=mask * torch.tensor([[1], [1], [0]]))
    for bad in (mask[:1], mask[:, 1:], mask[0], mask[:, None], F.pad(mask, (1, 0))):
        for name in ("attention_mask", "token_type_ids"):
            refuses(r"expected \[3, 16\], got \[", **{name: bad})
    refuses("expected 0 and 1, found 0 … 2", token_type_ids=2 * types)
    refuses("expected 0 and 1, found -1 … 0", token_type_ids=-types)
    refuses("expected 0 and 1 as integers or bool", token_type_ids=types.float())
    refuses("expected 0 .prefix., .* row 0 has 0 after 1", token_type_ids=types.flip(1))
    for dtype in (torch.bool, torch.uint8, torch.int32):
        marks = dict(attention_mask=mask.to(dtype), token_type_ids=types.to(dtype))
        assert torch.equal(ours(**inputs | marks).logits, right.logits)


def test_token_types_of_padding_do_not_count(small):
    ours, inputs, right = small
    mask, types = inputs["attention_mask"].clone(), inputs["token_type_ids"]
    left = types.where(mask == 1, 1)
    assert torch.equal(ours(**inputs | dict(token_type_ids=left)).loss, right.loss)
    mask[0, -2:] = 0
    padded = inputs | dict(attention_mask=mask, labels=inputs["labels"].where(mask == 1, -100))
    got, expected = ours(**padded | dict(token_type_ids=types * mask)), ours(**padded)
    assert relative(got.loss, expected.loss) <= TOLERANCE


def test_ids_and_pictures_that_are_neither(small):
    ours, inputs, right = small
    ids, pictures, v = inputs["input_ids"], inputs["pixel_values"], VOCAB
    features = ours.get_image_features(pictures)
    def given(features): return dict(pixel_values=None, image_features=features)
    def other(x): return ids.where(ids != ids[0, -1], x)
    assert torch.equal(ours(**inputs | given(features)).logits, right.logits)
    rounded = features.bfloat16()  # as under autocast
    got, expected = (ours(**inputs | given(x)).logits for x in (rounded, rounded.float()))
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    for bad, message in (
        (dict(image_features=features), "expected pixel_values or image_features, got both"),
        (dict(pixel_values=pictures.byte()), r"pixel_values in \[-1, 1\], got torch.uint8"),
        (given(features.flatten(0, 1)[None]), "a picture takes 12 <image> tokens"),
        (given(features[..., :-1]), r"image_features: expected \[images, n, 48\]"),
        (given(features[..., None]), r"image_features: expected \[images, n, 48\]"),
        (dict(input_ids=ids.float()), "input_ids: expected int64, got torch.float32"),
        (dict(input_ids=ids[0]), r"input_ids: expected \[b, t\], got \[16\]"),
        (dict(input_ids=other(v)), f"input_ids: expected tokens 0 … {v - 1}, .* … {v}"),
        (dict(input_ids=other(-100)), f"input_ids: expected tokens 0 … {v - 1}, found -100"),
        (dict(logits_to_keep=-1), "logits_to_keep must be 0 or more, got -1"),
    ):
        with refused(message): ours(**without(inputs, "labels") | bad)


def test_a_batch_for_another_cache(small):
    ours, inputs, _ = small
    cache, last = new_cache(ours, inputs, 0), inputs["input_ids"][:, -1:]
    with refused(r"expected keys and values \[3, 2, t, 12\], got \[1, 2, 1, 12\]"):
        ours(last[:1], kv_cache=cache)
    ours(inputs["input_ids"][:, -5:], kv_cache=cache)
    with refused(r"attention_mask: expected \[3, 6\], got \[3, 1\]"):
        ours(last, attention_mask=inputs["attention_mask"][:, -1:], kv_cache=cache)


# --- the output

def test_output_by_name_number_and_unpacked(small):
    "As in transformers: the loss first, and nothing for what is not there."
    ours, inputs, out = small
    loss, logits = out
    assert loss is out.loss is out["loss"] is out[0]
    assert logits is out.logits is out["logits"] is out[1] is out[:2][1]
    out = ours(**without(inputs, "labels"))
    logits, = out
    assert logits is out.logits is out[0] is out[-1] and out.loss is out["loss"] is None
    with pytest.raises(KeyError, match="past_key_values"): out["past_key_values"]
    with pytest.raises(IndexError): out[1]


# --- one graph, without a look at values

COMPILED = {name: CASES[name] for name in (
    "two pictures a row, other depths", "Gemma 2, shorter than the suffix")}


@pytest.fixture(scope="module", params=COMPILED.values(), ids=COMPILED)
def compiled(request):
    "Ours, a prompt, and the same with a suffix and labels."
    _, ours, inputs = make_both(request.param)
    return ours, prefill(inputs), inputs | dict(labels=labels_of(inputs))


def agree(got, expected):
    assert type(got) is PaliGemmaOutput and (got.loss is None) == (expected.loss is None)
    for a, b in zip(got, expected): assert relative(a, b) <= TOLERANCE


def test_export_in_strict_mode(compiled):
    "For any number of rows and tokens."
    ours, *batches = compiled
    for batch in batches:
        batch = {name: x.contiguous() for name, x in batch.items()}
        sizes = {name: dict.fromkeys(range(1 if name == "pixel_values" else 2),
                                     torch.export.Dim.AUTO) for name in batch}
        program = torch.export.export(ours, (), batch, dynamic_shapes=sizes, strict=True)
        longer = {name: x if name == "pixel_values" else torch.cat((x, x[:, -1:]), dim=1)
                  for name, x in batch.items()}
        more = {name: torch.cat((x, x.flip(0))) for name, x in longer.items()}
        for inputs in (batch, longer, more): agree(program.module()(**inputs), ours(**inputs))


def test_compile_breaks_no_graph(compiled):
    "`fullgraph` raises at a break. The gradients are the same, too."
    ours, prompt, batch = compiled
    torch._dynamo.reset()
    whole = torch.compile(ours, fullgraph=True, backend="eager")
    agree(whole(**prompt), ours(**prompt))
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (ours, whole):
        ours.zero_grad()
        out = model(**batch)
        out.loss.backward()
        agree(out, ours(**batch))
        gradients.append([p.grad for p in ours.parameters()])
    largest = max(grad.abs().max() for grad in gradients[0])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= TOLERANCE * a.abs().max() + 1e-7 * largest


def test_compile_with_a_cache(compiled):
    "The cache is filled, and moves on, as without the compiler."
    ours, first, batch = compiled
    torch._dynamo.reset()
    whole = torch.compile(ours, fullgraph=True, backend="eager")
    ids, mask, t = batch["input_ids"], batch["attention_mask"], first["input_ids"].shape[1]
    caches = new_cache(ours, first, 5), new_cache(ours, first, 5)
    with torch.no_grad():
        for model, cache in zip((whole, ours), caches):
            model(**first, kv_cache=cache, logits_to_keep=1)
            for end in range(t + 1, t + 6):
                out = model(ids[:, end - 1:end], attention_mask=mask[:, :end], kv_cache=cache)
            assert relative(out.logits, ours(**batch).logits[:, -1:]) <= TOLERANCE
    assert caches[0].length == caches[1].length == t + 5
    torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=TOLERANCE, atol=TOLERANCE)


# --- what users of transformers expect

def test_device_and_dtype():
    model = make_both(Case(2, 1, 8))[1]
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.bfloat16().dtype == torch.bfloat16 and model.to("meta").device.type == "meta"


@pytest.fixture(scope="module")
def training():
    "Four layers in either tower, for checkpoints to pay."
    def both(gemma):
        text = dict(query_pre_attn_scalar=9, sliding_window=8) if gemma is Gemma2Config else {}
        case = Case(4, 2, 12, image=70, vision=dict(num_hidden_layers=4), gemma=gemma,
                    text=text | dict(num_hidden_layers=4))
        _, ours, inputs = make_both(case)
        return ours.train(), inputs | dict(labels=labels_of(inputs))
    return {gemma: both(gemma) for gemma in (GemmaConfig, Gemma2Config)}


@pytest.mark.parametrize("gemma", [GemmaConfig, Gemma2Config], ids=lambda c: c.model_type)
def test_checkpointed_gradients(training, gemma):
    "The same gradients from less than half of the memory; off again, all is as before."
    model, inputs = training[gemma]
    def gradients(model):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return [out.logits, *(p.grad for p in model.parameters())]

    expected, most = gradients(model), saved_bytes(lambda: model(**inputs).loss)
    keys = model.state_dict().keys()
    model.gradient_checkpointing_enable()
    assert model.state_dict().keys() == keys
    for twin in (model, deepcopy(model)):
        for a, b in zip(gradients(twin), expected): assert torch.equal(a, b)
    assert saved_bytes(lambda: model(**inputs).loss) < most / 2
    towers = model.language_model.model, model.vision_tower.vision_model.encoder
    for tower in towers:
        runs, seen = [], tower.layers[1].self_attn
        with seen.register_forward_pre_hook(lambda *_: runs.append(1)): gradients(model)
        assert len(runs) == 2  # the second time for the gradients
    with torch.no_grad(): assert torch.equal(model(**inputs).logits, expected[0])
    model.gradient_checkpointing_disable()
    assert saved_bytes(lambda: model(**inputs).loss) == most
    assert not any("forward" in vars(module) for module in model.modules())


def test_generate_as_a_method(small):
    ours, inputs, _ = small
    inputs = prefill(without(inputs, "labels"))
    expected = generate(ours, inputs, max_new_tokens=6)
    assert torch.equal(ours.generate(inputs, max_new_tokens=6), expected)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=6), expected)
    only_picture = dict(pixel_values=inputs.pop("pixel_values"))
    assert torch.equal(ours.generate(inputs, **only_picture, max_new_tokens=6), expected)
    inputs |= only_picture
    def sampling(): return dict(do_sample=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours.generate(**inputs, **sampling()),
                       generate(ours, inputs, **sampling()))
    with pytest.raises(TypeError, match="num_beams"): ours.generate(**inputs, num_beams=4)
    with pytest.raises(TypeError, match="input_ids"): ours.generate(inputs, **inputs)
    with refused("position_ids"): ours.generate(**inputs, position_ids=inputs["input_ids"])


def test_opened_and_saved_by_methods(tmp_path):
    model, processor = load_model(device="cpu")
    mine = PaliGemmaForConditionalGeneration.from_pretrained(device="cpu", dtype="float32")
    assert type(mine) is type(model) and mine.dtype == torch.float32
    mine.save_pretrained(tmp_path/"mine", processor)
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path/"mine", device="cpu")
    weights = again.state_dict()
    assert all(torch.equal(x, weights[k]) for k, x in mine.state_dict().items())
    with refused("its processor, too"): mine.save_pretrained(tmp_path/"other")
    assert not (tmp_path/"other").exists()
