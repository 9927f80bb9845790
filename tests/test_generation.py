"""Answers: batches whose rows end apart, greedy against the plain loop, sampling against transformers and by its counts,
streams, the probabilities of answers and what was looked at while they were written."""
import copy
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import TopPLogitsWarper

from paligemma_nb import generation
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.generation import (_pieces, answer_attention, answer_probs, generate,
                                     generate_tokens, is_finished, next_token, nucleus, stream,
                                     token_ends)
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.siglip import SiglipVisionConfig

PROMPTS = ["caption en", "detect square ; red circle", "is it?", "caption en a red square", "a"]
processor = PaliGemmaProcessor(train_tokenizer(["caption en a red circle", "detect square is it ?"], 1600), 28, 4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = PaliGemmaConfig(SiglipVisionConfig(36, 52, 2, 3, 14, 28), image_token_index=processor.image_token_id,
                             eos_token_id=-1,  # never: see `ending` for answers that end
                             text_config=GemmaConfig(40, 56, 2, 4, 2, processor.vocab_size, head_dim=12, max_position_embeddings=80))
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3)
    return model


def make_inputs(prompts=PROMPTS):
    rng = np.random.default_rng(0)
    return processor([rng.integers(256, size=(28, 28, 3), dtype=np.uint8) for _ in prompts], prompts)


@pytest.fixture(scope="module")
def inputs(): return make_inputs()


def row(inputs, i): # alone, without its padding
    real = inputs["attention_mask"][i].bool()
    return {name: x[i:i + 1] if name == "pixel_values" else x[i:i + 1, real] for name, x in inputs.items()}


@torch.no_grad()
def plain_loop(model, inputs, steps): # one row, no cache, everything again for each token
    ids, t = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(steps):
        types = (torch.arange(ids.shape[1]) >= t).long()[None]
        logits = model(ids, inputs["pixel_values"], token_type_ids=types).logits[0, -1]
        logits[processor.image_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax()[None, None]), dim=1)
        if ids[0, -1] == model.config.eos_token_id: break
    return ids[0, t:]


@pytest.fixture
def ending(model, inputs): # the same weights with an <eos> such that the rows end at different steps, one of them never
    free = generate(model, inputs, max_new_tokens=20)
    def ends(eos): return [(r == eos).nonzero()[0].item() if eos in r[:-1] else None for r in free]
    model = copy.copy(model)
    model.config = copy.copy(model.config)
    model.config.eos_token_id = max(free.unique().tolist(), key=lambda eos: len(set(ends(eos))))
    assert len(set(ends(model.config.eos_token_id))) >= 3
    return model


# --- batches

def test_rows_end_apart_and_are_what_they_are_alone(ending, inputs):
    together, eos = generate(ending, inputs, max_new_tokens=20), ending.config.eos_token_id
    lengths = []
    for i, answer in enumerate(together):
        alone = plain_loop(ending, row(inputs, i), 20)
        assert torch.equal(answer[:len(alone)], alone) and (answer[len(alone):] == ending.config.pad_token_id).all()
        assert eos not in alone[:-1]
        lengths.append(len(alone))
    assert together.shape[1] == max(lengths) and len(set(lengths)) >= 3


def test_stops_when_the_last_row_has_ended(ending, inputs):
    short = [i for i, answer in enumerate(generate(ending, inputs, max_new_tokens=20)) if ending.config.eos_token_id in answer]
    rows = make_inputs([PROMPTS[i] for i in short]) | dict(pixel_values=inputs["pixel_values"][short])
    calls = []
    handle = ending.language_model.model.register_forward_hook(lambda *_: calls.append(1))
    ids = generate(ending, rows, max_new_tokens=60)
    handle.remove()
    assert ids.shape[1] == len(calls) < 20 and all((ids == ending.config.eos_token_id).any(dim=1))


def test_mask_only_where_there_is_padding(model, inputs):
    masks = []
    def spy(*args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return PaliGemmaForConditionalGeneration.forward(model, *args, attention_mask=attention_mask, **kwargs)
    model.forward = spy
    try:
        generate(model, row(inputs, 0), max_new_tokens=3)
        assert masks == [None] * 3
        generate(model, inputs, max_new_tokens=3)
    finally: del model.forward
    t = inputs["input_ids"].shape[1]
    assert [m.shape for m in masks[3:]] == [(5, t), (5, t + 1), (5, t + 2)]
    assert all(torch.equal(m[:, :t], inputs["attention_mask"].bool()) and m[:, t:].all() for m in masks[3:])


def test_features_instead_of_pixels(model, inputs):
    expected = generate(model, inputs, max_new_tokens=5)
    features = dict(inputs, image_features=model.get_image_features(inputs["pixel_values"]))
    del features["pixel_values"]
    assert torch.equal(generate(model, features, max_new_tokens=5), expected)


def test_inputs_stay_as_they_are(model, inputs):
    before = {name: x.clone() for name, x in inputs.items()}
    generate(model, inputs, max_new_tokens=3, do_sample=True)
    assert inputs.keys() == before.keys() and all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("sign", [1, -1])
def test_image_is_never_an_answer(model, inputs, sign):
    loud = copy.deepcopy(model)
    with torch.no_grad(): loud.language_model.model.embed_tokens.weight[processor.image_token_id] *= sign * 1000
    assert processor.image_token_id not in generate(loud, inputs, max_new_tokens=8)
    assert processor.image_token_id not in generate(loud, inputs, max_new_tokens=8, do_sample=True, top_p=1.0)


def other_eos(model, eos):
    model = copy.copy(model)
    model.config = dataclasses.replace(model.config, eos_token_id=eos)
    return model


def test_any_of_several_eos_ends_a_row(model, inputs):
    "Each row stops behind the first of them that it says."
    free = generate(model, inputs, max_new_tokens=20)
    eos = [free[0, 2].item(), free[1, 5].item(), free[2, 7].item()]
    several = other_eos(model, eos)
    ids = generate(several, inputs, max_new_tokens=20)
    ends = torch.isin(free, torch.tensor(eos))
    lengths = [r.nonzero()[0].item() + 1 if r.any() else 20 for r in ends]
    assert len(set(lengths)) >= 3 and max(lengths[:3]) < 20 and ids.shape[1] == max(lengths)
    for got, whole, n in zip(ids, free, lengths):
        assert torch.equal(got[:n], whole[:n]) and (got[n:] == model.config.pad_token_id).all()
    assert (answer_probs(several, inputs, ids)[0, lengths[0]:] == 1).all()
    assert (answer_attention(several, inputs, ids, 0)[0, lengths[0]:] == 0).all()
    assert is_finished(ids, several.config).tolist() == ends.any(dim=1).tolist()


def test_finished_or_cut_off(ending, inputs):
    whole = generate(ending, inputs, max_new_tokens=20)
    lengths = [r.nonzero()[:1].flatten().tolist() for r in whole == ending.config.eos_token_id]
    for room in range(1, 21):
        ids = generate(ending, inputs, max_new_tokens=room)
        finished = is_finished(ids, ending.config)
        assert finished.dtype == torch.bool
        assert finished.tolist() == [bool(at) and at[0] < room for at in lengths]
    assert 0 < sum(map(bool, lengths)) < len(inputs["input_ids"])  # both kinds are among them
    assert is_finished(whole[0], ending.config).ndim == 0  # a single row, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, inputs, dtype):
    ids = generate(copy.deepcopy(model).to(dtype), inputs, max_new_tokens=6, do_sample=True)
    assert ids.shape == (5, 6) and ids.dtype == torch.int64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(model, inputs):
    there = copy.deepcopy(model).cuda()
    assert torch.equal(generate(there, inputs, max_new_tokens=8).cpu(), generate(model, inputs, max_new_tokens=8))
    chance = torch.Generator("cuda").manual_seed(0)
    assert generate(there, inputs, max_new_tokens=8, do_sample=True, generator=chance).device.type == "cuda"


def test_ids_can_be_trained_on_and_modes_do_not_leak(model, inputs):
    steps = generate_tokens(model, inputs, max_new_tokens=3)
    for _ in steps: assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    ids = generate(model, inputs, max_new_tokens=3)
    assert not ids.is_inference()
    model(torch.cat((inputs["input_ids"], ids), dim=1), inputs["pixel_values"]).logits.sum().backward()
    model.zero_grad()


# --- settings

@pytest.mark.parametrize("wrong, message", [
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    (dict(max_new_tokens=-3), "max_new_tokens must be at least 1, got -3"),
    (dict(top_p=0), "top_p must be above 0 and at most 1, got 0"),
    (dict(top_p=1.01), "top_p must be above 0 and at most 1, got 1.01"),
    (dict(top_p=float("nan")), "top_p must be above 0 and at most 1, got nan"),
    (dict(temperature=-.1), "temperature must be 0 or more, got -0.1"),
    (dict(temperature=float("inf")), "temperature must be 0 or more, got inf"),
    (dict(temperature=float("nan")), "temperature must be 0 or more, got nan"),
    (dict(max_new_tokens=1000), "new ones do not fit: the context holds 80"),
])
def test_refused_before_anything_runs(model, inputs, wrong, message):
    model.forward = lambda *args, **kwargs: pytest.fail("the model was called")
    try:
        for call in (lambda: generate(model, inputs, **wrong), lambda: generate_tokens(model, inputs, **wrong),
                     lambda: stream(model, processor, row(inputs, 0), **wrong)):
            with pytest.raises(ValueError, match=message): call()
        with pytest.raises(ValueError, match="suffix"): generate(model, processor([Image.new("RGB", (9, 9))], "a", suffix="b"))
    finally: del model.forward


def test_the_context_can_be_filled(model, inputs):
    room = 80 - inputs["input_ids"].shape[1]
    assert generate(model, inputs, max_new_tokens=room).shape[1] <= room
    with pytest.raises(ValueError, match=f"{room + 1} new ones"): generate(model, inputs, max_new_tokens=room + 1)


def test_greedy_by_other_names(model, inputs):
    greedy = generate(model, inputs, max_new_tokens=8)
    for settings in (dict(temperature=0), dict(temperature=1e-300), dict(top_p=1e-9), dict(temperature=1e-6, top_p=1.0)):
        assert torch.equal(generate(model, inputs, max_new_tokens=8, do_sample=True, **settings), greedy), settings
    assert torch.equal(generate(model, inputs, max_new_tokens=8, temperature=5, top_p=1.0), greedy)  # without do_sample


def test_chance_can_be_repeated(model, inputs):
    def draw(seed, **settings):
        chance = torch.Generator().manual_seed(seed)
        return generate(model, inputs, max_new_tokens=8, do_sample=True, generator=chance, **settings)
    state = torch.get_rng_state()
    for settings in ({}, dict(top_p=1.0), dict(temperature=3.0)):
        assert torch.equal(draw(1, **settings), draw(1, **settings)) and not torch.equal(draw(1, **settings), draw(2, **settings))
    assert torch.equal(torch.get_rng_state(), state)  # a generator of one's own leaves torch's alone


# --- inputs that would mean something else

def padded_right(inputs):
    pads = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    def move(x): return torch.stack([r.roll(-n) for r, n in zip(x, pads)])
    return inputs | {name: move(inputs[name]) for name in ("input_ids", "attention_mask")}


def with_mask(inputs, change):
    mask = inputs["attention_mask"].clone()
    change(mask)
    return inputs | dict(attention_mask=mask)


def unmasked(inputs): return {k: x for k, x in inputs.items() if k != "attention_mask"}


LEFT = "must have its zeros on the left.*padding_side"
ZEROS_AND_ONES = "1 for tokens and 0 for padding"
BAD_INPUTS = {
    "padded on the right": (padded_right, LEFT),
    "padded on both sides": (lambda x: with_mask(x, lambda m: m[0, -1:].zero_()), LEFT),
    "a hole": (lambda x: with_mask(x, lambda m: m[1, 8].zero_()), LEFT),
    "a hole, as bool": (lambda x: x | dict(attention_mask=torch.arange(12).expand(5, -1) != 8),
                        LEFT),
    "a row of padding": (lambda x: with_mask(x, lambda m: m[2].zero_()), LEFT),
    "two": (lambda x: with_mask(x, lambda m: m[0, -1:].fill_(2)), ZEROS_AND_ONES),
    "additive": (lambda x: x | dict(attention_mask=(x["attention_mask"] - 1) * 1e9),
                 ZEROS_AND_ONES),
    "too short a mask": (lambda x: x | dict(attention_mask=x["attention_mask"][:, 1:]),
                         r"shape \[5, 12\], got \[5, 11\]"),
    "too few rows": (lambda x: x | dict(attention_mask=x["attention_mask"][:1]),
                     r"got \[1, 12\]"),
    "a mask for each query": (lambda x: x | dict(attention_mask=torch.ones(5, 1, 12, 12)),
                              r"got \[5, 1, 12, 12\]"),
    "padding without a mask": (unmasked, "hold padding.*attention_mask"),
    "right padding without a mask": (lambda x: unmasked(padded_right(x)), "hold padding"),
    "pictures twice": (lambda x: x | dict(image_features=torch.zeros(5, 4, 40)),
                       "leave out one"),
    "a suffix by its types": (lambda x: x | dict(token_type_ids=x["input_ids"] > 0),
                              "hold a suffix"),
    "unknown": (lambda x: x | dict(position_ids=x["input_ids"]), r"\['position_ids'\], too"),
    "one row, flat": (lambda x: unmasked(x) | dict(input_ids=x["input_ids"][0]),
                      r"\[b, t\].*got \[12\]"),
    "no rows": (lambda x: unmasked(x) | dict(input_ids=x["input_ids"][:0]), r"got \[0, 12\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_would_give_another_answer(model, inputs, case):
    change, message = BAD_INPUTS[case]
    assert inputs["input_ids"].shape == (5, 12)
    wrong, ids = change(inputs), torch.full((5, 2), 9)
    model.forward = lambda *args, **kwargs: pytest.fail("the model was called")
    try:
        with pytest.raises(ValueError, match=message): generate(model, wrong, max_new_tokens=4)
        if wrong["input_ids"].shape == (5, 12):
            with pytest.raises(ValueError, match=message): answer_probs(model, wrong, ids)
            with pytest.raises(ValueError, match=message):
                answer_attention(model, wrong, ids, 0)
    finally: del model.forward


def test_masks_that_mean_the_same(model, inputs):
    expected = generate(model, inputs, max_new_tokens=4)
    for kind in (torch.bool, torch.int32, torch.float32):
        same = inputs | dict(attention_mask=inputs["attention_mask"].to(kind))
        assert torch.equal(generate(model, same, max_new_tokens=4), expected)


def test_a_pad_that_was_written_in_the_prompt_is_no_padding(model):
    "Its name in a text becomes its id: without a mask, only a row's ends tell of padding."
    picture = np.zeros((28, 28, 3), np.uint8)
    inputs = processor(picture, "caption <pad> en")
    assert (inputs["input_ids"] == 0).any()
    assert torch.equal(generate(model, unmasked(inputs), max_new_tokens=4),
                       generate(model, inputs, max_new_tokens=4))


# --- logits that are not finite

def overflowing(model, dtype=torch.float16): # one matrix scaled by 20,000
    loud = copy.deepcopy(model).to(dtype)
    with torch.no_grad(): loud.language_model.model.layers[1].mlp.down_proj.weight *= 20_000
    return loud


GREEDY = dict(max_new_tokens=4)
WAYS = GREEDY, *(GREEDY | dict(do_sample=True, top_p=top_p) for top_p in (1.0, .9))


def test_float16_that_overflows_is_refused(model, inputs):
    loud, ids = overflowing(model), torch.full((5, 3), 9)
    message = ("^new token 1 of row 0: its logits are not finite in float16.*"
               'dtype="bfloat16" or "float32".*damaged$')
    for settings in WAYS:
        with pytest.raises(ValueError, match=message): generate(loud, inputs, **settings)
        pieces = stream(loud, processor, row(inputs, 1), **settings)
        with pytest.raises(ValueError, match=message): next(pieces)
        steps = generate_tokens(loud, inputs, **settings)
        with pytest.raises(ValueError, match=message): next(steps)
    with pytest.raises(ValueError, match=message): answer_probs(loud, inputs, ids)
    with pytest.raises(ValueError, match=message): answer_attention(loud, inputs, ids, 0)
    wide = overflowing(model, torch.bfloat16)  # the way out that the message names
    assert generate(wide, inputs, max_new_tokens=3).shape == (5, 3)
    assert answer_probs(wide, inputs, ids).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_weights_are_refused(model, inputs, dtype):
    damaged, name = copy.deepcopy(model).to(dtype), str(dtype).removeprefix("torch.")
    mlp = damaged.language_model.model.layers[0].mlp
    with torch.no_grad(): mlp.up_proj.weight[3, 5] = torch.nan
    message = f"^new token 1 of row 0: its logits are not finite in {name}: the weights"
    for settings in WAYS:
        with pytest.raises(ValueError, match=message): generate(damaged, inputs, **settings)


class Scripted:
    "Stands in for the model's forward: logits [steps, b, v], given out step by step."
    def __init__(self, model, logits):
        self.model, self.logits, self.step = copy.copy(model), logits, 0
        self.model.forward = self.forward
    def forward(self, tokens, logits_to_keep=0, **_):
        steps = self.logits[self.step:self.step + logits_to_keep]
        self.step += 1
        return type("Output", (), dict(logits=steps.transpose(0, 1).clone()))


BAD_ROWS = {"nan": lambda r: r[7].fill_(torch.nan), "all nan": lambda r: r.fill_(torch.nan),
            "inf": lambda r: r[7].fill_(torch.inf), "all -inf": lambda r: r.fill_(-torch.inf),
            "inf - inf": lambda r: r[7:9].copy_(torch.tensor([torch.inf, -torch.inf]))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", BAD_ROWS)
def test_one_bad_row_at_one_step(model, inputs, how, dtype):
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, processor.vocab_size, generator=chance).to(dtype)
    BAD_ROWS[how](logits[2, 3])
    for settings in WAYS:
        steps = generate_tokens(Scripted(model, logits).model, inputs, **settings)
        assert [len(next(steps)) for _ in range(2)] == [5, 5]  # what came before is given out
        with pytest.raises(ValueError, match="^new token 3 of row 3: its logits"): next(steps)
        temperature = 1.0 if "do_sample" in settings else 0.0
        with pytest.raises(ValueError, match="of row 3"): next_token(logits[2], temperature)
    for read in (answer_probs, lambda *args: generation._read_answer(*args)):
        with pytest.raises(ValueError, match="^new token 3 of row 3"):
            read(Scripted(model, logits).model, inputs, torch.full((5, 4), 9))


@pytest.mark.parametrize("how", BAD_ROWS)
def test_a_row_that_has_ended_counts_no_more(model, inputs, how):
    logits = torch.zeros(4, 5, processor.vocab_size)
    logits[..., 9] = 50.
    logits[0, 3, 9], logits[0, 3, 11] = 0., 50.
    model = other_eos(model, 11)
    BAD_ROWS[how](logits[1, 3])
    for settings in WAYS:
        ids = generate(Scripted(model, logits).model, inputs, **settings)
        assert ids[3].tolist() == [11, 0, 0, 0] and (ids[[0, 1, 2, 4]] == 9).all()
    probs = answer_probs(Scripted(model, logits).model, inputs, ids)
    assert torch.allclose(probs, torch.ones(5, 4))


def test_minus_infinity_means_never(model, inputs):
    logits = torch.zeros(1, 5, processor.vocab_size).half()
    logits[..., 100:] = -torch.inf
    for settings in WAYS:
        settings = settings | dict(max_new_tokens=1)
        ids = generate(Scripted(model, logits).model, inputs, **settings)
        assert ids.max() < 100


# --- the choice

def spread(probs, top_p): # the nucleus, back on the vocabulary
    kept, ids = nucleus(probs, top_p)
    return torch.zeros_like(probs).scatter(-1, ids, kept)


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 65, 700, 5000])
@pytest.mark.parametrize("top_p", [1e-6, .1, .5, .9, .99, .999])
def test_nucleus_is_transformers(vocab, top_p):
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1, 3, 9, 30])[:, None]
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
    torch.testing.assert_close(spread(logits.softmax(-1), top_p), expected, atol=1e-12, rtol=0)
    got = spread(logits.float().softmax(-1), top_p)
    # rounding may move one token of the smallest kept probability over the edge
    torch.testing.assert_close(got.double(), expected, atol=1e-3 / vocab + 1e-5, rtol=1e-3)
    assert ((got > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1


def test_nucleus_of_equals(): # which of equals stay is open, but not how many
    assert (spread(torch.full((2, 200), 1 / 200), .5) > 0).sum(-1).tolist() == [100, 100]
    assert spread(torch.eye(100), .9).equal(torch.eye(100))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (.7, .8), (2.0, .5)])
def test_draws_follow_the_probabilities(temperature, top_p):
    logits = torch.tensor([2., 1.5, 1., .5, 0, -1, -4])
    warper = TopPLogitsWarper(top_p) if top_p < 1 else lambda _, logits: logits
    expected = warper(None, logits[None] / temperature).softmax(-1)[0]
    n = 40_000
    drawn = next_token(logits.expand(n, -1), temperature, top_p, torch.Generator().manual_seed(0)).bincount(minlength=7) / n
    assert (drawn[expected == 0] == 0).all()
    assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()  # four standard deviations


@given(st.floats(0, 1e300), st.floats(1e-12, 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=80))
def test_any_numbers_give_a_token(temperature, top_p, dtype, logits):
    token = next_token(torch.tensor([logits, logits[::-1]], dtype=dtype), temperature, top_p)
    assert token.shape == (2,) and 0 <= token.min() and token.max() < len(logits)


def test_bfloat16_adds_up_many_small_probabilities():
    "5,000 equals: half of them are the nucleus of 0.5; a sum in bfloat16 would stand still."
    logits = torch.zeros(1, 5_000, dtype=torch.bfloat16).expand(4_000, -1)
    drawn = next_token(logits, 1.0, .5, torch.Generator().manual_seed(0)).unique()
    assert 1_500 < len(drawn) <= 2_501  # of 2,500, 4,000 draws hit about 80 %


# --- streams

TOKENS = [processor.tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<loc0007>", "<seg003>", "▁", "▁red", "\n")]
BYTES = st.binary(max_size=6).map(lambda b: [processor.tokenizer.token_to_id(f"<0x{x:02X}>") for x in b])
TEXTS = st.text(max_size=6).map(processor.encode)


@given(st.lists(st.one_of(st.sampled_from(TOKENS).map(lambda t: [t]), BYTES, TEXTS), max_size=8))
def test_pieces_join_to_the_decoded_whole(parts):
    ids = [token for part in parts for token in part]
    pieces = list(_pieces(processor, map(torch.tensor, ids)))
    assert "".join(pieces) == processor.decode(ids) and "" not in pieces


def test_pieces_come_as_early_as_they_can():
    taken = []
    def steps():
        for token in processor.encode("a red 字 circle"):
            taken.append(token)
            yield torch.tensor([token])
    seen = [(piece, len(taken)) for piece in _pieces(processor, steps())]
    assert seen == [("a", 1), (" red", 2), (" ", 3), ("字 circle", 7)]  # the three bytes wait for what follows them


def test_stream_is_generate(model, inputs):
    for settings in ({}, dict(do_sample=True, temperature=2.0)):
        for i in range(len(PROMPTS)):
            def chance(): return torch.Generator().manual_seed(i)
            pieces = list(stream(model, processor, row(inputs, i), max_new_tokens=12, generator=chance(), **settings))
            whole = generate(model, row(inputs, i), max_new_tokens=12, generator=chance(), **settings)
            assert "".join(pieces) == processor.decode(whole[0])


def test_stream_serves_one_row(model, inputs):
    with pytest.raises(ValueError, match="stream serves one prompt, got 5"): stream(model, processor, inputs)


# --- answers, read again

@pytest.fixture
def loop_probs(monkeypatch): # call(model, inputs, **settings) -> what generate wrote, and the probability it gave to each token
    def call(model, inputs, **settings):
        probs = []
        def spy(logits, *args):
            new = next_token(logits, *args)
            probs.append(logits.float().softmax(dim=-1).gather(-1, new[:, None])[:, 0])
            return new
        monkeypatch.setattr(generation, "next_token", spy)
        ids = generate(model, inputs, **settings)
        monkeypatch.undo()
        return ids, torch.stack(probs, dim=1)
    return call


def behind_eos(model, ids): # bool [b, t], one token at a time
    behind = torch.zeros_like(ids, dtype=torch.bool)
    for r in range(len(ids)):
        for i in range(1, ids.shape[1]): behind[r, i] = behind[r, i - 1] or ids[r, i - 1] == model.config.eos_token_id
    return behind


@pytest.mark.parametrize("choice", [{}, dict(do_sample=True, temperature=1.0, top_p=1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("loud", [1, 3])  # 3: `<image>` would often be the likeliest token, if it were allowed
def test_probabilities_are_those_of_the_loop(ending, inputs, loop_probs, choice, loud):
    model = copy.deepcopy(ending)
    with torch.no_grad(): model.language_model.model.embed_tokens.weight[processor.image_token_id] *= loud
    chance = torch.Generator().manual_seed(4)
    ids, expected = loop_probs(model, inputs, max_new_tokens=20, generator=chance, **choice)
    behind, got = behind_eos(model, ids), answer_probs(model, inputs, ids)
    assert got.dtype == torch.float32 and got.shape == ids.shape and not got.requires_grad
    torch.testing.assert_close(got[~behind], expected[~behind], rtol=1e-4, atol=1e-7)
    assert (got[behind] == 1).all() and (behind.any() or choice)


ANY_TOKENS = st.sampled_from([0, 1, 5, 9, 270, 271, 300, processor.vocab_size - 1]).filter(lambda i: i != processor.image_token_id)


@settings(max_examples=25)
@given(st.lists(st.lists(ANY_TOKENS, min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_answer_is_read_as_step_by_step(model, inputs, columns):
    "Also one that holds `<pad>` itself: only what stands behind `<eos>` is padding."
    model, ids = copy.copy(model), torch.tensor(columns).T
    model.config = dataclasses.replace(model.config, eos_token_id=1)
    features = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                    image_features=model.get_image_features(inputs["pixel_values"]).detach())
    got, behind = answer_probs(model, features, ids), behind_eos(model, ids)
    for i in range(ids.shape[1]):
        before = torch.cat((inputs["input_ids"], ids[:, :i]), dim=1)
        types = (torch.arange(before.shape[1]) >= inputs["input_ids"].shape[1]).long().expand_as(before)
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(ids[:, :i])), dim=1)
        logits = model(before, attention_mask=mask, token_type_ids=types, image_features=features["image_features"]).logits[:, -1]
        logits[:, processor.image_token_id] = -torch.inf
        expected = logits.softmax(dim=-1).gather(-1, ids[:, i:i + 1])[:, 0].masked_fill(behind[:, i], 1)
        torch.testing.assert_close(got[:, i], expected, rtol=1e-4, atol=1e-9)


def test_probabilities_of_all_first_tokens_sum_to_one(model, inputs):
    v, one = processor.vocab_size, row(inputs, 1)
    allowed = torch.tensor([i for i in range(v) if i != processor.image_token_id])[:, None]
    features = model.get_image_features(one["pixel_values"]).detach()
    many = dict(input_ids=one["input_ids"].expand(len(allowed), -1), image_features=features.expand(len(allowed), -1, -1))
    assert abs(answer_probs(model, many, allowed).sum() - 1) < 1e-4


def test_each_row_is_read_as_if_alone(ending, inputs):
    ids = generate(ending, inputs, max_new_tokens=20)
    behind = behind_eos(ending, ids)
    probs, looks = answer_probs(ending, inputs, ids), answer_attention(ending, inputs, ids, -1)
    assert behind.any() and (looks[behind] == 0).all() and (looks[~behind] > 0).all()
    for i in range(len(ids)):
        own = ids[i:i + 1, ~behind[i]]
        n = own.shape[1]
        torch.testing.assert_close(probs[i:i + 1, :n], answer_probs(ending, row(inputs, i), own), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(looks[i:i + 1, :n], answer_attention(ending, row(inputs, i), own, -1), rtol=1e-4, atol=1e-6)


def test_attention_belongs_to_the_position_that_writes(model, inputs):
    "The weights for a token may not depend on the token itself, but must on the one before."
    ids = generate(model, inputs, max_new_tokens=6)
    changed = ids.clone()
    changed[:, 3] = changed[:, 3] % 100 + 3
    difference = (answer_attention(model, inputs, ids, 1) - answer_attention(model, inputs, changed, 1)).abs().amax(dim=-1)
    assert (difference[:, :4] == 0).all() and (difference[:, 4] > 0).all()


def test_attention_sums_and_heads(model, inputs):
    ids = generate(model, inputs, max_new_tokens=6)
    heads = torch.stack([answer_attention(model, inputs, ids, 0, head) for head in range(4)])
    torch.testing.assert_close(heads.mean(dim=0), answer_attention(model, inputs, ids, -2), rtol=1e-5, atol=1e-7)
    assert torch.equal(heads[3], answer_attention(model, inputs, ids, 0, -1))
    assert heads.dtype == torch.float32 and (heads >= 0).all() and (heads.sum(dim=-1) < 1).all()


def test_two_pictures_stand_in_their_order(model):
    rng = np.random.default_rng(1)
    pictures = [rng.integers(256, size=(28, 28, 3), dtype=np.uint8) for _ in range(6)]
    texts = ["<image><image>" + prompt for prompt in PROMPTS[:3]]
    inputs = processor([pictures[:2], pictures[2:4], pictures[4:]], texts)
    ids = generate(model, inputs, max_new_tokens=4)
    together = answer_attention(model, inputs, ids, 1, 2)
    assert together.shape == (3, 4, 8) and inputs["attention_mask"].logical_not().any()
    real = inputs["attention_mask"][0].bool()
    alone = processor([pictures[:2]], texts[:1])
    assert torch.equal(alone["input_ids"][0], inputs["input_ids"][0, real])
    torch.testing.assert_close(together[:1], answer_attention(model, alone, ids[:1], 1, 2), rtol=1e-4, atol=1e-6)
    swapped = dict(alone, pixel_values=alone["pixel_values"].flip(0))
    assert not torch.allclose(together[:1], answer_attention(model, swapped, ids[:1], 1, 2), atol=1e-3)


def test_features_serve_reading_too(model, inputs):
    ids = generate(model, inputs, max_new_tokens=5)
    features = dict(inputs, image_features=model.get_image_features(inputs["pixel_values"]).detach())
    del features["pixel_values"]
    assert torch.equal(answer_probs(model, features, ids), answer_probs(model, inputs, ids))
    assert torch.equal(answer_attention(model, features, ids, 0), answer_attention(model, inputs, ids, 0))


@pytest.mark.parametrize("wrong, message", [
    (dict(layer=2), "layer must lie in -2 … 1, got 2"),
    (dict(layer=-3), "layer must lie in -2 … 1, got -3"),
    (dict(head=4), "head must lie in -4 … 3, got 4"),
    (dict(head=-5), "head must lie in -4 … 3, got -5"),
    (dict(ids=torch.ones(4, 3, dtype=torch.long)), r"expected ids \[5, t\], an answer to each prompt, got \[4, 3\]"),
    (dict(ids=torch.ones(5, dtype=torch.long)), r"got \[5\]"),
    (dict(ids=torch.ones(5, 0, dtype=torch.long)), r"got \[5, 0\]"),
    (dict(ids=torch.full((5, 1), processor.image_token_id)), "without <image>"),
    (dict(ids=torch.full((5, 1), processor.vocab_size)), f"tokens 0 … {processor.vocab_size - 1}"),
    (dict(ids=torch.full((5, 1), -1)), "got -1"),
    (dict(ids=torch.ones(5, 1000, dtype=torch.long)), "1000 new ones do not fit: the context holds 80"),
])
def test_reading_refuses(model, inputs, wrong, message):
    call = dict(ids=torch.ones(5, 2, dtype=torch.long), layer=0) | wrong
    with pytest.raises(ValueError, match=message): answer_attention(model, inputs, **call)
    if "ids" in wrong:
        with pytest.raises(ValueError, match=message): answer_probs(model, inputs, call["ids"])


def test_reading_refuses_inputs(model, inputs):
    ids = torch.ones(2, 2, dtype=torch.long)
    picture = Image.new("RGB", (28, 28))
    with pytest.raises(ValueError, match="suffix"): answer_probs(model, processor([picture] * 2, ["a", "b"], suffix=["a", "b"]), ids)
    uneven = processor([[picture], [picture, picture]], ["<image>a", "<image><image>a"])
    assert answer_probs(model, uneven, ids).shape == (2, 2)
    with pytest.raises(ValueError, match=r"as many <image> tokens in every row, got \[4, 8\]"): answer_attention(model, uneven, ids, 0)


def test_attention_is_of_its_own_thread(model, inputs):
    "Another thread uses the model in the midst of the pass that is watched, and watches, too."
    ids = generate(model, inputs, max_new_tokens=4)
    expected, other = answer_attention(model, inputs, ids, 1), []
    main = threading.get_ident()

    def interrupt(module, args): # in front of the layer that is watched, and only once
        if threading.get_ident() != main or other: return
        def work():
            other.append(generate(model, row(inputs, 1), max_new_tokens=4))
            other.append(answer_attention(model, row(inputs, 1), ids[1:2], 1))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    with model.language_model.model.layers[0].register_forward_pre_hook(interrupt):
        got = answer_attention(model, inputs, ids, 1)
    assert torch.equal(got, expected) and torch.equal(other[0], ids[1:2])
    torch.testing.assert_close(other[1], expected[1:2], rtol=1e-4, atol=1e-6)


def test_attention_of_many_threads(model, inputs):
    ids, wrong = generate(model, inputs, max_new_tokens=4), []
    rows = [(row(inputs, i), ids[i:i + 1]) for i in range(5)]
    expected = [answer_attention(model, x, y, 0) for x, y in rows]
    def work(i):
        for _ in range(20):
            got = answer_attention(model, *rows[i], 0)
            if not torch.equal(got, expected[i]): wrong.append(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong


def test_hooks_are_registered_one_at_a_time(model, inputs, monkeypatch):
    "torch reads and raises its count of hooks in two steps: two hooks might get one number."
    register, inside, most = torch.nn.Module.register_forward_pre_hook, [], []
    def slow(*args, **kwargs):
        inside.append(1)
        time.sleep(.02)
        most.append(len(inside))
        inside.pop()
        return register(*args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", slow)
    ids = torch.ones(5, 2, dtype=torch.long)
    def work(): answer_attention(model, inputs, ids, 0)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert most == [1] * 4


def test_no_hook_stays(model, inputs):
    def hooks(): return [len(module._forward_pre_hooks) for module in model.modules()]
    before, ids = hooks(), torch.ones(5, 2, dtype=torch.long)
    answer_attention(model, inputs, ids, 0)
    assert hooks() == before
    with pytest.raises(ValueError, match="<image>"): answer_attention(model, inputs, ids * processor.image_token_id, 0)
    assert hooks() == before
    with pytest.raises(ValueError, match="pictures give"): answer_attention(model, inputs | dict(pixel_values=inputs["pixel_values"][1:]), ids, 0)
    assert hooks() == before and sum(before) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_in_half_precision(model, inputs, dtype):
    half, ids = copy.deepcopy(model).to(dtype), generate(model, inputs, max_new_tokens=4)
    probs, looks = answer_probs(half, inputs, ids), answer_attention(half, inputs, ids, 1)
    assert probs.dtype == looks.dtype == torch.float32
    assert (looks - answer_attention(model, inputs, ids, 1)).abs().max() < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_reading_on_cuda(model, inputs):
    there, ids = copy.deepcopy(model).cuda(), generate(model, inputs, max_new_tokens=4)
    torch.testing.assert_close(answer_probs(there, inputs, ids).cpu(), answer_probs(model, inputs, ids), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(answer_attention(there, inputs, ids, 0).cpu(), answer_attention(model, inputs, ids, 0),
                               rtol=1e-2, atol=1e-4)


def test_ends_of_tokens_that_are_bytes():
    "字 is three byte tokens: decoded one by one they look longer than the character that they make."
    ids = processor.encode("a 字 b 字")
    ends = token_ends(processor, ids)
    assert len(ids) > 7 and ends == sorted(ends) and ends[-1] == len(processor.decode(ids)) == len("a 字 b 字")
