"""Answers: batches whose rows end apart, greedy against the plain loop, sampling and penalties
against transformers, processors, stops, streams."""
import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.generation import (
    _pieces, generate, generate_tokens, is_finished, next_token, nucleus, penalize_repetition,
    stream)
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.siglip import SiglipVisionConfig

PROMPTS = ["caption en", "detect square ; red circle", "is it?", "caption en a red square",
           "a"]
TEXTS = ["caption en a red circle", "detect square is it ?"]
processor = PaliGemmaProcessor(train_tokenizer(TEXTS, 1600), 28, 4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = GemmaConfig(40, 56, 2, 4, 2, processor.vocab_size, head_dim=12,
                       max_position_embeddings=80)
    config = PaliGemmaConfig(SiglipVisionConfig(36, 52, 2, 3, 14, 28), text,
                             image_token_index=processor.image_token_id,
                             eos_token_id=-1)  # never: see `ending` for answers that end
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3)
    return model


def make_inputs(prompts=PROMPTS):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(256, size=(28, 28, 3), dtype=np.uint8) for _ in prompts]
    return processor(pictures, prompts)


@pytest.fixture(scope="module")
def inputs(): return make_inputs()


def row(inputs, i): # alone, without its padding
    real = inputs["attention_mask"][i].bool()
    return {name: x[i:i + 1] if name == "pixel_values" else x[i:i + 1, real]
            for name, x in inputs.items()}


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


def other_eos(model, eos):
    model = copy.copy(model)
    model.config = dataclasses.replace(model.config, eos_token_id=eos)
    return model


@pytest.fixture
def ending(model, inputs):
    "The same weights; the rows end at different steps, one of them never."
    free = generate(model, inputs, max_new_tokens=20)
    def ends(eos):
        return {(r == eos).nonzero()[0].item() if eos in r[:-1] else None for r in free}
    eos = max(free.unique().tolist(), key=lambda eos: len(ends(eos)))
    assert len(ends(eos)) >= 3
    return other_eos(model, eos)


# --- batches

def test_rows_end_apart_and_are_what_they_are_alone(ending, inputs):
    together, eos = generate(ending, inputs, max_new_tokens=20), ending.config.eos_token_id
    lengths = []
    for i, answer in enumerate(together):
        alone = plain_loop(ending, row(inputs, i), 20)
        assert torch.equal(answer[:len(alone)], alone)
        assert (answer[len(alone):] == ending.config.pad_token_id).all()
        assert eos not in alone[:-1]
        lengths.append(len(alone))
    assert together.shape[1] == max(lengths) and len(set(lengths)) >= 3


def test_stops_when_the_last_row_has_ended(ending, inputs):
    answers, eos = generate(ending, inputs, max_new_tokens=20), ending.config.eos_token_id
    short = [i for i, answer in enumerate(answers) if eos in answer]
    rows = make_inputs([PROMPTS[i] for i in short])
    rows["pixel_values"] = inputs["pixel_values"][short]
    calls = []
    handle = ending.language_model.model.register_forward_hook(lambda *_: calls.append(1))
    ids = generate(ending, rows, max_new_tokens=60)
    handle.remove()
    assert ids.shape[1] == len(calls) < 20 and all((ids == eos).any(dim=1))


def test_mask_only_where_there_is_padding(model, inputs):
    masks = []
    def spy(*args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return type(model).forward(model, *args, attention_mask=attention_mask, **kwargs)
    model.forward = spy
    try:
        generate(model, row(inputs, 0), max_new_tokens=3)
        assert masks == [None] * 3
        generate(model, inputs, max_new_tokens=3)
    finally: del model.forward
    t = inputs["input_ids"].shape[1]
    assert [m.shape for m in masks[3:]] == [(5, t), (5, t + 1), (5, t + 2)]
    for m in masks[3:]:
        assert torch.equal(m[:, :t], inputs["attention_mask"].bool()) and m[:, t:].all()


def test_features_instead_of_pixels(model, inputs):
    expected = generate(model, inputs, max_new_tokens=5)
    features = dict(inputs, image_features=model.get_image_features(inputs["pixel_values"]))
    del features["pixel_values"]
    assert torch.equal(generate(model, features, max_new_tokens=5), expected)


def test_inputs_stay_as_they_are(model, inputs):
    before = {name: x.clone() for name, x in inputs.items()}
    generate(model, inputs, max_new_tokens=3, do_sample=True)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("sign", [1, -1])
def test_image_is_never_an_answer(model, inputs, sign):
    loud, image = copy.deepcopy(model), processor.image_token_id
    with torch.no_grad():
        loud.language_model.model.embed_tokens.weight[image] *= sign * 1000
    for settings in ({}, dict(do_sample=True, top_p=1.0), dict(repetition_penalty=.1),
                     dict(logits_processors=[lambda ids, logits: logits.index_fill(
                         1, torch.tensor([image]), 1e9)])):
        assert image not in generate(loud, inputs, max_new_tokens=8, **settings)


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
    for settings in ({}, dict(repetition_penalty=1.5, stop=lambda new: new[:, -1] == 9)):
        settings |= dict(max_new_tokens=8)
        ids = generate(there, inputs, **settings)
        assert torch.equal(ids.cpu(), generate(model, inputs, **settings))
    chance = torch.Generator("cuda").manual_seed(0)
    ids = generate(there, inputs, max_new_tokens=8, do_sample=True, top_k=5, generator=chance)
    assert ids.device.type == "cuda"


def test_ids_can_be_trained_on_and_modes_do_not_leak(model, inputs):
    steps = generate_tokens(model, inputs, max_new_tokens=3)
    for _ in steps: assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    ids = generate(model, inputs, max_new_tokens=3)
    assert not ids.is_inference()
    whole = torch.cat((inputs["input_ids"], ids), dim=1)
    model(whole, inputs["pixel_values"]).logits.sum().backward()
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
    (dict(top_k=-1), "top_k must be 0 or more, got -1"),
    (dict(repetition_penalty=0), "repetition_penalty must be above 0, got 0"),
    (dict(repetition_penalty=float("nan")), "repetition_penalty must be above 0, got nan"),
    (dict(max_new_tokens=1000), "new ones do not fit: the context holds 80"),
])
def test_refused_before_anything_runs(model, inputs, wrong, message):
    model.forward = lambda *args, **kwargs: pytest.fail("the model was called")
    try:
        for call in (lambda: generate(model, inputs, **wrong),
                     lambda: generate_tokens(model, inputs, **wrong),
                     lambda: stream(model, processor, row(inputs, 0), **wrong)):
            with pytest.raises(ValueError, match=message): call()
        suffixed = processor(Image.new("RGB", (9, 9)), "a", suffix="b")
        with pytest.raises(ValueError, match="suffix"): generate(model, suffixed)
        for call in (generate, generate_tokens):
            with pytest.raises(TypeError, match="num_beams"): call(model, inputs, num_beams=3)
    finally: del model.forward


def test_the_context_can_be_filled(model, inputs):
    room = 80 - inputs["input_ids"].shape[1]
    assert generate(model, inputs, max_new_tokens=room).shape[1] <= room
    with pytest.raises(ValueError, match=f"{room + 1} new ones"):
        generate(model, inputs, max_new_tokens=room + 1)


def test_greedy_by_other_names(model, inputs):
    def draw(**settings): return generate(model, inputs, max_new_tokens=8, **settings)
    greedy = draw()
    for settings in (dict(temperature=0), dict(temperature=1e-300), dict(top_p=1e-9),
                     dict(temperature=1e-6, top_p=1.0), dict(top_k=1, temperature=9.0)):
        assert torch.equal(draw(do_sample=True, **settings), greedy), settings
    assert torch.equal(draw(temperature=5, top_p=1.0, top_k=9), greedy)  # without do_sample
    assert torch.equal(draw(logits_processors=[lambda ids, logits: logits]), greedy)
    assert torch.equal(draw(stop=lambda new: False), greedy)


def test_chance_can_be_repeated(model, inputs):
    def draw(seed, **settings):
        chance = torch.Generator().manual_seed(seed)
        return generate(model, inputs, max_new_tokens=8, do_sample=True, generator=chance,
                        **settings)
    state = torch.get_rng_state()
    for settings in ({}, dict(top_p=1.0), dict(temperature=3.0), dict(top_k=9)):
        assert torch.equal(draw(1, **settings), draw(1, **settings))
        assert not torch.equal(draw(1, **settings), draw(2, **settings))
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


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
    wrong = change(inputs)
    model.forward = lambda *args, **kwargs: pytest.fail("the model was called")
    try:
        with pytest.raises(ValueError, match=message): generate(model, wrong, max_new_tokens=4)
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


OVERFLOW = ("^new token 1 of row 0: its logits are not finite in float16.*"
            'dtype="bfloat16" or "float32".*damaged$')
GREEDY = dict(max_new_tokens=4)
WAYS = (GREEDY, *(GREEDY | dict(do_sample=True, top_p=top_p) for top_p in (1.0, .9)),
        GREEDY | dict(repetition_penalty=1.2))


def test_float16_that_overflows_is_refused(model, inputs):
    loud = overflowing(model)
    for settings in WAYS:
        with pytest.raises(ValueError, match=OVERFLOW): generate(loud, inputs, **settings)
        pieces = stream(loud, processor, row(inputs, 1), **settings)
        with pytest.raises(ValueError, match=OVERFLOW): next(pieces)
        steps = generate_tokens(loud, inputs, **settings)
        with pytest.raises(ValueError, match=OVERFLOW): next(steps)
    wide = overflowing(model, torch.bfloat16)  # the way out that the message names
    assert generate(wide, inputs, max_new_tokens=3).shape == (5, 3)


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
    def forward(self, input_ids, logits_to_keep=0, **_):
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
    logits = torch.randn(6, vocab, dtype=torch.float64)
    logits *= torch.tensor([0.1, 0.5, 1, 3, 9, 30])[:, None]
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
    torch.testing.assert_close(spread(logits.softmax(-1), top_p), expected, atol=1e-12, rtol=0)
    got = spread(logits.float().softmax(-1), top_p)
    # rounding may move one token of the smallest kept probability over the edge
    torch.testing.assert_close(got.double(), expected, atol=1e-3 / vocab + 1e-5, rtol=1e-3)
    assert ((got > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1


def test_nucleus_of_equals(): # which of equals stay is open, but not how many
    assert (spread(torch.full((2, 200), 1 / 200), .5) > 0).sum(-1).tolist() == [100, 100]
    assert spread(torch.eye(100), .9).equal(torch.eye(100))


@pytest.mark.parametrize("temperature, top_p, top_k", [
    (1.0, 1.0, 0), (.7, .8, 0), (2.0, .5, 0), (2.0, 1.0, 3), (2.0, .7, 4), (1.0, 1.0, 50)])
def test_draws_follow_the_probabilities(temperature, top_p, top_k):
    logits = torch.tensor([2., 1.5, 1., .5, 0, -1, -4])
    expected = logits[None] / temperature
    if top_k: expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1: expected = TopPLogitsWarper(top_p)(None, expected)
    expected = expected.softmax(-1)[0]
    n = 40_000
    drawn = next_token(logits.expand(n, -1), temperature, top_p, top_k,
                       torch.Generator().manual_seed(0)).bincount(minlength=7) / n
    assert (drawn[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((drawn - expected).abs() <= 4 * deviation).all()


@given(st.floats(0, 1e300), st.floats(1e-12, 1), st.integers(0, 99),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=80))
def test_any_numbers_give_a_token(temperature, top_p, top_k, dtype, logits):
    logits = torch.tensor([logits, logits[::-1]], dtype=dtype)
    token = next_token(logits, temperature, top_p, top_k)
    assert token.shape == (2,) and 0 <= token.min() and token.max() < logits.shape[1]


def test_bfloat16_adds_up_many_small_probabilities():
    "5,000 equals: half of them are the nucleus of 0.5; a sum in bfloat16 would stand still."
    logits = torch.zeros(1, 5_000, dtype=torch.bfloat16).expand(4_000, -1)
    drawn = next_token(logits, 1.0, .5, generator=torch.Generator().manual_seed(0)).unique()
    assert 1_500 < len(drawn) <= 2_501  # of 2,500, 4,000 draws hit about 80 %


# --- processors, penalties, stops

@given(st.integers(0, 9999), st.floats(.05, 20), st.integers(1, 300))
def test_penalty_is_transformers(seed, penalty, t):
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 200, generator=chance) * 9
    ids = torch.randint(200, (3, t), generator=chance)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    before = logits.clone()
    assert torch.equal(penalize_repetition(logits, ids, penalty), expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [.5, 1.3, 4.0])
def test_penalty_counts_prompt_and_answer(model, inputs, penalty):
    "As in transformers for a row alone, whatever padding the batch adds."
    def theirs(ids, logits): return RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    together = generate(model, inputs, max_new_tokens=12, repetition_penalty=penalty)
    for i in range(len(PROMPTS)):
        alone = generate(model, row(inputs, i), max_new_tokens=12, logits_processors=[theirs])
        assert torch.equal(together[i:i + 1], alone)
    assert not torch.equal(together, generate(model, inputs, max_new_tokens=12))


def test_penalty_where_image_is_past_the_table(inputs):
    "Its id may lie behind the last row of the embedding, where no logit is."
    torch.manual_seed(0)
    v = processor.vocab_size - 1
    assert processor.image_token_id == v
    text = GemmaConfig(16, 16, 1, 1, 1, v, head_dim=8)
    config = PaliGemmaConfig(SiglipVisionConfig(8, 8, 1, 1, 14, 28), text, image_token_index=v)
    small = PaliGemmaForConditionalGeneration(config).eval()
    assert generate(small, inputs, max_new_tokens=3, repetition_penalty=2.0).max() < v


def test_processors_run_in_order_on_prompt_and_answer(model, inputs):
    seen = []
    def first(ids, logits):
        seen.append(ids.clone())
        assert logits.dtype == torch.float32 and logits.shape == (5, processor.vocab_size)
        return torch.zeros_like(logits)
    def second(ids, logits):
        assert not logits.any()  # what the first one returned
        logits[:, 7 + len(seen)] = 1.0
        return logits
    ids = generate(model, inputs, max_new_tokens=3, logits_processors=[first, second])
    assert ids.tolist() == [[8, 9, 10]] * 5
    for i, given in enumerate(seen):
        assert torch.equal(given, torch.cat((inputs["input_ids"], ids[:, :i]), dim=1))


def test_what_a_processor_returns_stays_its_own(model, inputs):
    fixed = torch.zeros(5, processor.vocab_size)
    fixed[:, 9] = 1
    before, eos = fixed.clone(), other_eos(model, 9)
    generate(eos, inputs, max_new_tokens=3, logits_processors=[lambda ids, logits: fixed])
    assert torch.equal(fixed, before)


def test_processors_see_no_row_again_that_has_ended(ending, inputs):
    "What they make of it is of no matter."
    def ban(ids, logits): # in ended rows, everything
        over = (ids[:, inputs["input_ids"].shape[1]:] == ending.config.eos_token_id).any(dim=1)
        return logits.masked_fill(over[:, None], -torch.inf)
    settings = dict(max_new_tokens=20)
    assert torch.equal(generate(ending, inputs, logits_processors=[ban], **settings),
                       generate(ending, inputs, **settings))


@pytest.mark.parametrize("process, message", [
    (lambda ids, logits: None, r"must return logits \[5, \d+\], got None"),
    (lambda ids, logits: logits[:1], r"must return logits \[5, \d+\], got tensor"),
    (lambda ids, logits: logits[:, :9], r"must return logits \[5, \d+\], got tensor"),
    (lambda ids, logits: logits - torch.inf, "new token 1: the logits processors leave"),
    (lambda ids, logits: logits * torch.nan, "new token 1: the logits processors leave")])
def test_processors_that_return_no_choice(model, inputs, process, message):
    for settings in WAYS:
        with pytest.raises(ValueError, match=message):
            generate(model, inputs, logits_processors=[process], **settings)


def test_stop_ends_each_row_for_itself(model, inputs):
    free, seen = generate(model, inputs, max_new_tokens=12), []
    rooms = torch.tensor([2, 5, 1, 7, 3])
    def stop(new):
        seen.append(new)
        return rooms <= new.shape[1]
    ids = generate(model, inputs, max_new_tokens=12, stop=stop)
    assert ids.shape[1] == 7 and [new.shape for new in seen] == [(5, n) for n in range(1, 8)]
    for got, whole, n in zip(ids, free, rooms):
        assert torch.equal(got[:n], whole[:n]) and (got[n:] == model.config.pad_token_id).all()
    assert torch.equal(seen[-1], ids) and not is_finished(ids, model.config).any()


def test_stop_may_end_all_rows(model, inputs):
    ids = generate(model, inputs, max_new_tokens=12, stop=lambda new: new.shape[1] == 3)
    assert torch.equal(ids, generate(model, inputs, max_new_tokens=3))


@pytest.mark.parametrize("said", [None, [True], 1, "yes"])
def test_stop_must_say_bool(model, inputs, said):
    with pytest.raises(ValueError, match="stop must return a bool"):
        generate(model, inputs, max_new_tokens=3, stop=lambda new: said)


def test_nothing_is_kept_that_nobody_asked_for(model, inputs, monkeypatch):
    "The tokens so far are joined, a time for each step, where a setting reads them."
    cat, calls = torch.cat, []
    monkeypatch.setattr(torch, "cat", lambda *args, **kw: calls.append(1) or cat(*args, **kw))
    def joined(**settings):
        calls.clear()
        generate(model, inputs, max_new_tokens=4, **settings)
        return len(calls)
    plain = joined()
    assert joined(do_sample=True, top_k=3) == plain
    for settings in (dict(stop=lambda new: False), dict(repetition_penalty=1.1)):
        assert joined(**settings) == plain + 4


# --- streams

def one(name): return processor.tokenizer.token_to_id(name)


TOKENS = [[one(name)] for name in
          ("<pad>", "<bos>", "<loc0007>", "<seg003>", "▁", "▁red", "\n")]
BYTES = st.binary(max_size=6).map(lambda b: [one(f"<0x{x:02X}>") for x in b])
WORDS = st.text(max_size=6).map(processor.encode)


@given(st.lists(st.one_of(st.sampled_from(TOKENS), BYTES, WORDS), max_size=8))
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
    # the three bytes wait for what follows them
    assert seen == [("a", 1), (" red", 2), (" ", 3), ("字 circle", 7)]


def test_stream_is_generate(model, inputs):
    for settings in ({}, dict(do_sample=True, temperature=2.0, top_k=40),
                     dict(repetition_penalty=2.0, stop=lambda new: new.shape[1] == 7)):
        for i in range(len(PROMPTS)):
            def again(): return settings | dict(
                max_new_tokens=12, generator=torch.Generator().manual_seed(i))
            pieces = list(stream(model, processor, row(inputs, i), **again()))
            whole = generate(model, row(inputs, i), **again())
            assert "".join(pieces) == processor.decode(whole[0])


def test_stream_serves_one_row(model, inputs):
    with pytest.raises(ValueError, match="stream serves one prompt, got 5"):
        stream(model, processor, inputs)
