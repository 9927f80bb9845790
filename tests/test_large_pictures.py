"""Soft-capped attention in blocks of queries: the same numbers as all at once, in less memory.

Memory is what PyTorch's allocator handed out at most, by its own record: what else runs on the
machine has no say in it."""
import pytest
import test_parity as parity
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma_nb import gemma
from paligemma_nb.gemma import Gemma2Config, grouped_attention, grouped_weights

TOLERANCE = 1e-5


@pytest.fixture
def blocks_of(monkeypatch):
    "blocks_of(queries, keys): so many queries at a time, where there are so many keys."
    return lambda queries, keys: monkeypatch.setattr(gemma, "MAX_SCORES", queries * keys)


def peak_bytes(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = work()
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = torch.tensor([e.nbytes() for e in events if e.name() == "[memory]"]).cumsum(dim=0)
    assert held[-1] >= out.nbytes  # the record is whole
    return held.max().item()


class Calls(TorchDispatchMode):
    "Names of the operations, and bytes of the largest new tensor with an entry for each key."
    def __init__(self, keys=None):
        super().__init__()
        self.keys, self.names, self.largest = keys, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        is_new = isinstance(out, torch.Tensor) and not func.is_view
        if is_new and out.shape[-1:] == (self.keys,):
            self.largest = max(self.largest, out.nbytes)
        return out


# --- the same numbers

def naive(q, k, v, mask, scale, cap):
    "Everything at once, with copies, in float64."
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = cap * torch.tanh(q.double() @ k.mT * scale / cap)
    if mask is not None: scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores.softmax(dim=-1) @ v


def with_gradients(attention, q, k, v, *rest):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *rest)
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
    arguments = q, k, v, mask, d ** -.5, cap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "MAX_SCORES", block * n + draw(0, n - 1))
        got = with_gradients(grouped_attention, *arguments)
        with Calls(n) as calls: grouped_attention(*arguments)
    assert calls.largest == b * h * min(t, block) * n * 4  # float32
    for x, expected in zip(got, with_gradients(naive, *arguments)):
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
    assert inputs["input_ids"].shape[1] == LENGTH > 2 * (gemma.MAX_SCORES // LENGTH)
    with torch.no_grad(): got, expected = (model(**inputs).logits for model in (ours, theirs))
    real = inputs["attention_mask"].bool()
    assert parity.relative(got[real], expected[real]) <= TOLERANCE


# --- in less memory

PUBLISHED = {"PaliGemma 2 3B": (8, 4, 256), "PaliGemma 2 10B": (16, 8, 256),
             "PaliGemma 2 28B": (32, 16, 128)}


@pytest.mark.parametrize("h, kv_heads, d", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_of_a_published_size(h, kv_heads, d, rows):
    "On the device `meta`, which computes nothing. A picture of 224 px stays in one block."
    for tokens in (256, 1024, 4096):
        n = tokens + 8
        q, k = (torch.empty(rows, heads, n, d, dtype=torch.bfloat16, device="meta")
                for heads in (h, kv_heads))
        with Calls(n) as calls: out = grouped_attention(q, k, k, None, d ** -.5, 50.)
        assert out.shape == q.shape and out.dtype == q.dtype
        block = min(n, gemma.MAX_SCORES // n)
        assert calls.names.count("aten.bmm.default") == 2 * -(-n // block)
        assert calls.largest == rows * h * n * block * 4
        assert (block == n) == (tokens == 256) and block >= 60  # large enough to be fast


def test_one_query_is_not_cut(blocks_of):
    "Decoding runs the operations of the whole, however long the cache."
    q, (k, v) = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 3, 40, 8)
    with Calls() as expected:
        (grouped_weights(q, k, None, .3, 4.).view(2, 3, 2, 40) @ v).reshape(q.shape)
    blocks_of(0, 40)
    with Calls() as calls: grouped_attention(q, k, v, None, .3, 4.)
    assert calls.names == expected.names


@torch.no_grad()
def test_a_block_is_freed_before_the_next(blocks_of):
    "The peak is that of one block of twenty, in a few copies, and the result."
    q, (k, v) = torch.randn(1, 8, 600, 16), torch.randn(2, 1, 2, 600, 16)
    mask, scores = torch.ones(600, 600).tril().bool(), 8 * 600 * 600 * 4
    def work(): return grouped_attention(q, k, v, mask, .25, 50.)
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
    monkeypatch.setattr(gemma, "MAX_SCORES", scores // 32)
    mine = peak_bytes(lambda: ours.language_model.model(embeds, last=1))
    assert other > 8 * 4 * scores and mine <= other / 4, (mine, other)


def test_the_mlp_holds_two_of_its_widest():
    "Gate and up; their product takes the gate's place, unless gradients are asked for."
    mlp = gemma.GemmaMLP(gemma.GemmaConfig(8, 500, 1, 1, 1, 10))
    x, wide = torch.randn(1, 300, 8), 300 * 500 * 4
    with torch.no_grad(): got, peak = mlp(x), peak_bytes(lambda: mlp(x))
    assert 2 * wide < peak < 2.5 * wide
    leaves = [x.requires_grad_(), *mlp.parameters()]
    expected = (F.gelu(x @ leaves[1].T, approximate="tanh") * (x @ leaves[2].T)) @ leaves[3].T
    torch.testing.assert_close(got, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    gradients = (torch.autograd.grad(out.sin().sum(), leaves) for out in (mlp(x), expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
