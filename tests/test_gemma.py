"Gemma's parts by themselves: attention with shared keys, the last layer's shortcut, the MLP."
import pytest
import torch
import torch.nn.functional as F
from counting import Calls, peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from paligemma_nb.gemma import (
    GemmaConfig, GemmaMLP, GemmaModel, grouped_attention, grouped_scores, masked_softmax)
from paligemma_nb.kv_cache import KVCache

TOLERANCE = 1e-5


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_query_heads_must_divide_into_groups():
    with pytest.raises(ValueError, match="heads 4 is not .* num_key_value_heads 3"):
        GemmaConfig(48, 76, 3, 4, 3, 101)


@settings(max_examples=60)
@given(data=st.data())
def test_attention_with_shared_keys(data):
    "Against copies of keys and values, in float64: odd shapes, room in the cache, any mask."
    def draw(*args): return data.draw(st.integers(*args))
    b, kv_heads, shared, t, past, d = (draw(1, most) for most in (3, 3, 4, 9, 9, 9))
    n, h, scale = t + past, kv_heads * shared, data.draw(st.sampled_from([.3, 1., d ** -.5]))
    torch.manual_seed(draw(0, 9))
    q, cache = torch.randn(b, h, t, d), torch.randn(2, b, kv_heads, n + draw(0, 3), d)
    k, v = cache[0, :, :, :n], cache[1, :, :, :n]
    form = data.draw(st.sampled_from([None, (t, n), (1, n), (b, 1, t, n), (b, 1, 1, n)]))
    mask = None if form is None else torch.rand(form) < .6
    if mask is not None: mask[..., 0] = True  # each sees something
    scores = q.double() @ k.double().repeat_interleave(shared, dim=1).mT * scale
    if mask is not None: scores = scores.masked_fill(~mask, -torch.inf)
    expected = scores.softmax(dim=-1)
    weights = masked_softmax(grouped_scores(q, k, scale), mask)
    close(weights, expected.float())
    values = v.double().repeat_interleave(shared, dim=1)
    close(grouped_attention(q, k, v, mask, scale), (expected @ values).float())


def test_no_copy_of_shared_keys():
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 300, 16)
    with Calls(16) as calls: grouped_attention(q, k, k, None, .25)
    assert calls.largest < k.nbytes


def test_a_row_that_sees_nothing_is_finite():
    "Padding may see nothing, and nobody looks at it: any numbers will do, but not NaN."
    mask = torch.zeros(2, 3, dtype=torch.bool)
    scores = grouped_scores(torch.randn(1, 2, 2, 4), torch.randn(1, 1, 3, 4), .5)
    close(masked_softmax(scores, mask), torch.full((1, 2, 2, 3), 1 / 3))


@pytest.mark.parametrize("first", [0, 1, 4, 6])
@pytest.mark.parametrize("past", [0, 3])
def test_what_is_not_asked_for_is_left_out(first, past):
    "The same outputs and the same cache, with fewer operations; a mask of one row or of all."
    torch.manual_seed(0)
    model, t = GemmaModel(GemmaConfig(24, 40, 2, 4, 2, 50, 8)), 7
    x, before = torch.randn(2, t, 24), torch.randn(2, past, 24)

    @torch.no_grad()
    def run(mask, first):
        cache = KVCache(2, 2, 2, 10, 8)
        if past: model(before, None, cache)
        with FlopCounterMode(display=False) as counter: out = model(x, mask, cache, first)
        return out, cache.keys[..., :past + t, :], counter.get_total_flops()

    padding = torch.rand(2, 1, 1, past + t) < .7
    for mask in (None, padding, torch.rand(2, 1, t, past + t) < .7):
        (everything, keys, most), (out, same, flops) = run(mask, 0), run(mask, first)
        close(out, everything[:, first:])
        assert torch.equal(keys, same) and (flops < most) == (first > 0)


def test_the_mlp_holds_two_of_its_widest():
    "Gate and up; their product takes the gate's place, unless gradients are asked for."
    mlp = GemmaMLP(GemmaConfig(8, 500, 1, 1, 1, 10))
    x, wide = torch.randn(1, 300, 8), 300 * 500 * 4
    with torch.no_grad(): got, peak = mlp(x), peak_bytes(lambda: mlp(x))
    assert 2 * wide < peak < 2.5 * wide
    leaves = [x.requires_grad_(), *mlp.parameters()]
    gate, up = F.gelu(x @ leaves[1].T, approximate="tanh"), x @ leaves[2].T
    expected = (gate * up) @ leaves[3].T
    close(got, expected.detach())
    gradients = (torch.autograd.grad(out.sin().sum(), leaves) for out in (mlp(x), expected))
    for a, b in zip(*gradients): close(a, b)
