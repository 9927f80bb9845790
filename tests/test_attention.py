"""Looking back at answers: probabilities against the loop and step by step, attention
by what it depends on; several threads may look at the same time."""
import copy
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_generation import (
    BAD_INPUTS, BAD_ROWS, OVERFLOW, PROMPTS, Scripted, ending, inputs, model, other_eos,
    overflowing, processor, row)
from torch.testing import assert_close as close

from paligemma_nb import attention, generation
from paligemma_nb.attention import answer_attention, answer_probs, token_ends
from paligemma_nb.generation import generate, next_token


@pytest.fixture
def loop_probs(monkeypatch):
    "call(model, inputs, **settings) -> what generate wrote, and the probabilities it had"
    def call(model, inputs, **settings):
        probs = []
        def spy(logits, **settings):
            new = next_token(logits, **settings)
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
        for i in range(1, ids.shape[1]):
            behind[r, i] = behind[r, i - 1] or ids[r, i - 1] == model.config.eos_token_id
    return behind


SAMPLED = dict(do_sample=True, temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("choice", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("loud", [1, 3])  # 3: `<image>` would often be the likeliest token
def test_probabilities_are_those_of_the_loop(ending, inputs, loop_probs, choice, loud):
    model, image = copy.deepcopy(ending), processor.image_token_id
    with torch.no_grad(): model.language_model.model.embed_tokens.weight[image] *= loud
    chance = torch.Generator().manual_seed(4)
    ids, expected = loop_probs(model, inputs, max_new_tokens=20, generator=chance, **choice)
    behind, got = behind_eos(model, ids), answer_probs(model, inputs, ids)
    assert got.dtype == torch.float32 and got.shape == ids.shape and not got.requires_grad
    close(got[~behind], expected[~behind], rtol=1e-4, atol=1e-7)
    assert (got[behind] == 1).all() and (behind.any() or choice)


assert processor.image_token_id == processor.vocab_size - 1
ANY_TOKENS = st.sampled_from([0, 1, 5, 9, 270, 271, 300, processor.vocab_size - 2])


@settings(max_examples=25)
@given(st.lists(st.lists(ANY_TOKENS, min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_answer_is_read_as_step_by_step(model, inputs, columns):
    "Also one that holds `<pad>` itself: only what stands behind `<eos>` is padding."
    model, ids = other_eos(model, 1), torch.tensor(columns).T
    features = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                    image_features=model.get_image_features(inputs["pixel_values"]).detach())
    got, behind = answer_probs(model, features, ids), behind_eos(model, ids)
    for i in range(ids.shape[1]):
        before = torch.cat((inputs["input_ids"], ids[:, :i]), dim=1)
        types = torch.arange(before.shape[1]) >= inputs["input_ids"].shape[1]
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(ids[:, :i])), dim=1)
        types = types.long().expand_as(before)
        logits = model(before, attention_mask=mask, token_type_ids=types,
                       image_features=features["image_features"]).logits[:, -1]
        logits[:, processor.image_token_id] = -torch.inf
        expected = logits.softmax(dim=-1).gather(-1, ids[:, i:i + 1])[:, 0]
        expected = expected.masked_fill(behind[:, i], 1)
        close(got[:, i], expected, rtol=1e-4, atol=1e-9)


def test_probabilities_of_all_first_tokens_sum_to_one(model, inputs):
    v, one = processor.vocab_size, row(inputs, 1)
    allowed = torch.tensor([i for i in range(v) if i != processor.image_token_id])[:, None]
    features = model.get_image_features(one["pixel_values"]).detach()
    many = dict(input_ids=one["input_ids"].expand(len(allowed), -1),
                image_features=features.expand(len(allowed), -1, -1))
    assert abs(answer_probs(model, many, allowed).sum() - 1) < 1e-4


def test_each_row_is_read_as_if_alone(ending, inputs):
    ids = generate(ending, inputs, max_new_tokens=20)
    behind = behind_eos(ending, ids)
    probs, looks = answer_probs(ending, inputs, ids), answer_attention(ending, inputs, ids, -1)
    assert behind.any() and (looks[behind] == 0).all() and (looks[~behind] > 0).all()
    for i in range(len(ids)):
        own, alone = ids[i:i + 1, ~behind[i]], row(inputs, i)
        n = own.shape[1]
        close(probs[i:i + 1, :n], answer_probs(ending, alone, own), rtol=1e-4, atol=1e-7)
        expected = answer_attention(ending, alone, own, -1)
        close(looks[i:i + 1, :n], expected, rtol=1e-4, atol=1e-6)


def test_attention_belongs_to_the_position_that_writes(model, inputs):
    "The weights for a token may not depend on the token itself, but must on the one before."
    ids = generate(model, inputs, max_new_tokens=6)
    changed = ids.clone()
    changed[:, 3] = changed[:, 3] % 100 + 3
    looks, others = (answer_attention(model, inputs, x, 1) for x in (ids, changed))
    difference = (looks - others).abs().amax(dim=-1)
    assert (difference[:, :4] == 0).all() and (difference[:, 4] > 0).all()


def test_attention_sums_and_heads(model, inputs):
    ids = generate(model, inputs, max_new_tokens=6)
    heads = torch.stack([answer_attention(model, inputs, ids, 0, head) for head in range(4)])
    close(heads.mean(dim=0), answer_attention(model, inputs, ids, -2), rtol=1e-5, atol=1e-7)
    assert torch.equal(heads[3], answer_attention(model, inputs, ids, 0, -1))
    assert heads.dtype == torch.float32
    assert (heads >= 0).all() and (heads.sum(dim=-1) < 1).all()


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
    def looks(inputs): return answer_attention(model, inputs, ids[:1], 1, 2)
    close(together[:1], looks(alone), rtol=1e-4, atol=1e-6)
    swapped = dict(alone, pixel_values=alone["pixel_values"].flip(0))
    assert not torch.allclose(together[:1], looks(swapped), atol=1e-3)


def test_features_serve_reading_too(model, inputs):
    ids = generate(model, inputs, max_new_tokens=5)
    features = dict(inputs)
    pixels = features.pop("pixel_values")
    features["image_features"] = model.get_image_features(pixels).detach()
    for read in (answer_probs, partial(answer_attention, layer=0)):
        assert torch.equal(read(model, features, ids), read(model, inputs, ids))


@pytest.mark.parametrize("wrong, message", [
    (dict(layer=2), "layer must lie in -2 … 1, got 2"),
    (dict(layer=-3), "layer must lie in -2 … 1, got -3"),
    (dict(head=4), "head must lie in -4 … 3, got 4"),
    (dict(head=-5), "head must lie in -4 … 3, got -5"),
    (dict(ids=torch.ones(4, 3, dtype=torch.long)),
     r"expected ids \[5, t\], an answer to each prompt, got \[4, 3\]"),
    (dict(ids=torch.ones(5, dtype=torch.long)), r"got \[5\]"),
    (dict(ids=torch.ones(5, 0, dtype=torch.long)), r"got \[5, 0\]"),
    (dict(ids=torch.full((5, 1), processor.image_token_id)), "without <image>"),
    (dict(ids=torch.full((5, 1), processor.vocab_size)),
     f"tokens 0 … {processor.vocab_size - 1} without"),
    (dict(ids=torch.full((5, 1), -1)), "got -1"),
    (dict(ids=torch.ones(5, 1000, dtype=torch.long)),
     "1000 new ones do not fit: the context holds 80"),
])
def test_reading_refuses(model, inputs, wrong, message):
    call = dict(ids=torch.ones(5, 2, dtype=torch.long), layer=0) | wrong
    with pytest.raises(ValueError, match=message): answer_attention(model, inputs, **call)
    if "ids" in wrong:
        with pytest.raises(ValueError, match=message): answer_probs(model, inputs, call["ids"])


def test_reading_refuses_inputs(model, inputs):
    ids = torch.ones(2, 2, dtype=torch.long)
    picture = Image.new("RGB", (28, 28))
    suffixed = processor([picture] * 2, ["a", "b"], suffix=["a", "b"])
    with pytest.raises(ValueError, match="suffix"): answer_probs(model, suffixed, ids)
    uneven = processor([[picture], [picture, picture]], ["<image>a", "<image><image>a"])
    assert answer_probs(model, uneven, ids).shape == (2, 2)
    message = r"as many <image> tokens in every row, got \[4, 8\]"
    with pytest.raises(ValueError, match=message): answer_attention(model, uneven, ids, 0)


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_reading_refuses_what_generate_refuses(model, inputs, case):
    change, message = BAD_INPUTS[case]
    wrong, ids = change(inputs), torch.full((5, 2), 9)
    if wrong["input_ids"].shape != (5, 12): message = "expected ids"
    model.forward = lambda *args, **kwargs: pytest.fail("the model was called")
    try:
        for read in (answer_probs, partial(answer_attention, layer=0)):
            with pytest.raises(ValueError, match=message): read(model, wrong, ids)
    finally: del model.forward


def test_any_of_several_eos_ends_what_is_read(model, inputs):
    several, ids = other_eos(model, [20, 30]), torch.full((5, 4), 9)
    ids[0, 1], ids[1, 2], ids[2, 0] = 20, 30, 30
    ended = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1], [0] * 4, [0] * 4]).bool()
    assert torch.equal(answer_probs(several, inputs, ids) == 1, ended)
    assert torch.equal((answer_attention(several, inputs, ids, 0) == 0).all(dim=-1), ended)


def test_overflow_is_refused(model, inputs):
    loud, ids = overflowing(model), torch.full((5, 3), 9)
    for read in (answer_probs, partial(answer_attention, layer=0)):
        with pytest.raises(ValueError, match=OVERFLOW): read(loud, inputs, ids)
    assert answer_probs(overflowing(model, torch.bfloat16), inputs, ids).isfinite().all()


@pytest.mark.parametrize("how", BAD_ROWS)
def test_logits_that_are_not_finite(model, inputs, how):
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, processor.vocab_size, generator=chance)
    BAD_ROWS[how](logits[2, 3])
    ids = torch.full((5, 4), 9)
    for read in (answer_probs, attention._read_answer):
        with pytest.raises(ValueError, match="^new token 3 of row 3"):
            read(Scripted(model, logits).model, inputs, ids)
    ended = other_eos(model, 11)  # but behind an <eos> they do not count
    ids[3, 1] = 11
    probs = answer_probs(Scripted(ended, logits).model, inputs, ids)
    assert probs.isfinite().all() and (probs[3, 2:] == 1).all() and (probs[:, :2] < 1).all()


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
    close(other[1], expected[1:2], rtol=1e-4, atol=1e-6)


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
    fewer = inputs | dict(pixel_values=inputs["pixel_values"][1:])
    for wrong, answer, message in ((inputs, ids * processor.image_token_id, "<image>"),
                                   (fewer, ids, "pictures give")):
        with pytest.raises(ValueError, match=message):
            answer_attention(model, wrong, answer, 0)
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
    for read, atol in ((answer_probs, 1e-5), (partial(answer_attention, layer=0), 1e-4)):
        close(read(there, inputs, ids).cpu(), read(model, inputs, ids), rtol=1e-2, atol=atol)


def test_ends_of_tokens_that_are_bytes():
    "字 is three byte tokens: decoded one by one they look longer than what they make."
    text = "a 字 b 字"
    ids = processor.encode(text)
    ends = token_ends(processor, ids)
    assert len(ids) > 7 and ends == sorted(ends)
    assert ends[-1] == len(processor.decode(ids)) == len(text)
