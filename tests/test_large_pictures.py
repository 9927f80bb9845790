"""Soft-capped attention in blocks of queries: the same numbers as all at once, and memory that is counted, not timed.

Memory is what PyTorch's allocator handed out at most, from its own record: the operating system has no say in it."""
import pytest
import test_parity as parity
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma_nb import gemma
from paligemma_nb.gemma import Gemma2Config, grouped_attention, grouped_weights

TOLERANCE = 1e-5


@pytest.fixture
def blocks_of(monkeypatch):
    "blocks_of(queries, heads, keys): attention over so many keys takes so many queries at a time."
    return lambda queries, heads, keys: monkeypatch.setattr(gemma, "MAX_SCORES", queries * heads * keys)


def peak_bytes(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: kept = work()
    events = record.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    assert changes and kept is not None
    return max(torch.tensor(changes).cumsum(dim=0)).item()


class Calls(TorchDispatchMode):
    "The operations that are run, and the largest tensor that has one entry for each of `keys`."
    def __init__(self, keys=None):
        super().__init__()
        self.keys, self.names, self.largest = keys, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, torch.Tensor) and not func.is_view and out.shape[-1:] == (self.keys,):
            self.largest = max(self.largest, out.nbytes)
        return out


# --- the same numbers

def naive(q, k, v, mask, scale, cap):
    "Everything at once, with copies, in float64."
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = cap * torch.tanh(q @ k.mT * scale / cap)
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
    "Odd shapes, shared heads, a cache with room left, every form of mask, rows that see nothing; gradients, too."
    def draw(*args): return data.draw(st.integers(*args))
    b, k_heads, shared, t, past, d = draw(1, 3), draw(1, 3), draw(1, 4), draw(2, 23), draw(0, 9), draw(1, 9)
    n, h, block = t + past, k_heads * shared, draw(1, 25)
    d += d == n  # so that only scores have n entries a row
    torch.manual_seed(draw(0, 9))
    q, cache = torch.randn(b, h, t, d), torch.randn(2, b, k_heads, n + draw(0, 3), d)
    k, v = cache[0, :, :, :n], cache[1, :, :, :n]
    form = data.draw(st.sampled_from([None, (t, n), (1, n), (b, 1, t, n), (1, 1, t, n), (b, 1, 1, n), (b, h, t, n)]))
    mask = None if form is None else torch.rand(form) < .6
    if mask is not None: mask[..., 0, :] = False  # the first query sees nothing (or all of them, if they share a row)
    cap, scale = data.draw(st.sampled_from([.7, 3., 50.])), d ** -.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "MAX_SCORES", block * h * n + draw(0, h * n - 1))
        got = with_gradients(grouped_attention, q, k, v, mask, scale, cap)
        with Calls(n) as calls: grouped_attention(q, k, v, mask, scale, cap)
    assert calls.largest == b * h * min(t, block) * n * 4  # so many queries at a time, and no more
    for x, expected in zip(got, with_gradients(naive, q, k, v, mask, scale, cap)):
        assert x.isfinite().all() and x.shape == expected.shape
        assert (x - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


GEMMA_2 = [name for name in parity.CASES_2 if "no caps" not in name]


@pytest.mark.parametrize("name", GEMMA_2)
@pytest.mark.parametrize("queries", [1, 4])
def test_blocks_agree_with_transformers(name, queries, blocks_of):
    "A padded batch, with a cache and without, its loss and every gradient: blocks of one query, and of a few."
    both = parity.make_both(parity.CASES[name])
    blocks_of(queries, parity.CASES[name].heads, both[2]["input_ids"].shape[1])
    for check in (parity.test_prefill_of_a_padded_batch, parity.test_last_positions_alone,
                  parity.test_padding_changes_nothing, parity.test_each_cached_step,
                  parity.test_suffix_after_a_cache_in_one_piece, parity.test_loss_and_every_gradient):
        check(both)


LONG = parity.Case(8, 4, 6, hidden=48, image=56, patch=2, gemma=Gemma2Config, text=dict(
    query_pre_attn_scalar=5, attn_logit_softcapping=3., sliding_window=500))


def test_a_long_prompt_agrees_with_transformers():
    "784 image tokens and eight heads are more scores than are held at a time: several blocks as the package is set."
    theirs, ours, inputs = parity.make_both(LONG)
    t = inputs["input_ids"].shape[1]
    assert t == 796 and gemma.MAX_SCORES // (8 * t) < t
    with torch.no_grad(): got, expected = (model(**inputs).logits for model in (ours, theirs))
    real = inputs["attention_mask"].bool()
    assert parity.relative(got[real], expected[real]) <= TOLERANCE


# --- and less memory

PUBLISHED = {"PaliGemma 2 3B": (8, 4, 256), "PaliGemma 2 10B": (16, 8, 256), "PaliGemma 2 28B": (32, 16, 128)}


@pytest.mark.parametrize("heads, kv_heads, dim", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_of_a_published_size(heads, kv_heads, dim, rows):
    "On the device `meta`, where nothing is computed. 224 px: one block; 896 px: never more scores than allowed."
    for tokens in (256, 1024, 4096):
        n = tokens + 8
        q, k = (torch.empty(rows, h, n, dim, dtype=torch.bfloat16, device="meta") for h in (heads, kv_heads))
        with Calls(n) as calls: out = grouped_attention(q, k, k, None, dim ** -.5, 50.)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert calls.names.count("aten.bmm.default") == 2 * -(-n // max(1, gemma.MAX_SCORES // (heads * n)))
        if tokens == 256: assert calls.largest == rows * heads * n * n * 4
        else: assert .9 * gemma.MAX_SCORES < calls.largest / 4 / rows <= gemma.MAX_SCORES


def test_one_query_is_not_cut(blocks_of):
    "Decoding runs the operations of the whole, however long the cache."
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    def whole(): return grouped_weights(q, k, None, .3, 4.).view(2, 3, 2, 40) @ v
    with Calls() as expected: whole().reshape(q.shape)
    blocks_of(0, 6, 40)
    with Calls() as calls: grouped_attention(q, k, v, None, .3, 4.)
    assert calls.names == expected.names


def test_a_block_is_freed_before_the_next(blocks_of):
    "Not only is each small: the peak is that of one block, its few steps, and the result."
    q, k, v = torch.randn(1, 8, 600, 16), torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    mask = torch.ones(600, 600, dtype=torch.bool).tril()
    def work(): return grouped_attention(q, k, v, mask, .25, 50.)
    scores = 8 * 600 * 600 * 4
    with torch.no_grad():
        assert peak_bytes(work) > 2 * scores  # whole: four million scores would be allowed
        blocks_of(30, 8, 600)
        assert peak_bytes(work) < 6 * scores / 20 + 2 * q.nbytes


def test_first_token_takes_a_quarter_of_their_memory():
    """Of the decoder at a picture of 28 x 28 patches, with the published ratio of heads: theirs holds all scores, in
    several copies. The bound of scores is smaller here as the picture is: a thirtieth, as at 896 pixels."""
    theirs, ours, inputs = parity.make_both(LONG)
    inputs = {name: x[:1] for name, x in parity.prefill(inputs).items()}
    t = inputs["input_ids"].shape[1]
    features = ours.get_image_features(inputs.pop("pixel_values"))
    embeds = gemma.GemmaModel.embed(ours.language_model.model, inputs["input_ids"].clamp(max=200))
    embeds = torch.cat((features, embeds[:, features.shape[1]:]), dim=1).detach()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "MAX_SCORES", 8 * t * t // 32)
        mine = peak_bytes(lambda: ours.language_model.model(embeds, last=1))
        other = peak_bytes(lambda: theirs.model.language_model(
            inputs_embeds=embeds, attention_mask={kind: None for kind in ("full_attention", "sliding_attention")},
            use_cache=False).last_hidden_state)
    assert other > 8 * t * t * 4 and mine <= other / 4, (mine, other)
