"""The whole model agrees with transformers (eager attention, float32, random weights): the
numbers that every lesson promises.

Each case is an odd shape of the model, because a model with the usual sizes forgives a swapped
dimension. Both generations of Gemma pass the same checks, on given shapes and drawn ones."""
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PaliGemmaConfig as TheirConfig
from transformers import PaliGemmaForConditionalGeneration as Theirs

from paligemma_nb.attention import answer_attention, answer_probs
from paligemma_nb.checkpoint import published_key
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import FULL, SLIDING, Gemma2Config
from paligemma_nb.generation import generate
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.paligemma import (
    PaliGemmaConfig, PaliGemmaForConditionalGeneration, suffix_loss)
from paligemma_nb.siglip import SiglipVisionConfig

TOLERANCE = 1e-5
VOCAB, IMAGE, EOS = 300, 290, 1


@dataclass
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int = 48
    image: int = 42
    patch: int = 14
    pictures: int = 1         # in each row
    vision_heads: int = 3     # vision hidden 36
    vocab: int = VOCAB
    text: dict | None = None  # other settings of the decoder
    vision: dict | None = None  # and of the vision tower
    gemma: type = GemmaConfig

    @property
    def config(self):
        return PaliGemmaConfig(
            SiglipVisionConfig(**dict(
                hidden_size=36, intermediate_size=52, num_hidden_layers=2,
                num_attention_heads=self.vision_heads, patch_size=self.patch,
                image_size=self.image) | (self.vision or {})),
            self.gemma(**dict(
                hidden_size=self.hidden, intermediate_size=76, num_hidden_layers=3,
                num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
                vocab_size=self.vocab, head_dim=self.head_dim) | (self.text or {})),
            image_token_index=IMAGE)


CASES = {
    "one KV head, head_dim 20 of 48/4": Case(4, 1, 20),
    "two KV heads, heads wider than hidden": Case(
        4, 2, 32, image=28, vision=dict(layer_norm_eps=.5)),
    "all KV heads, 16 image tokens": Case(
        4, 4, 10, hidden=40, image=56, vision=dict(num_channels=2)),
    "three of six, 45 px by patches of 14, other theta": Case(
        6, 3, 8, hidden=52, image=45, text=dict(rope_theta=500.)),
    "two pictures a row, other depths": Case(
        4, 1, 16, image=29, pictures=2, text=dict(intermediate_size=41, num_hidden_layers=2),
        vision=dict(hidden_size=42, intermediate_size=31, num_hidden_layers=3,
                    layer_norm_eps=.02)),
    "three pictures a row, one patch each": Case(
        5, 5, 6, hidden=31, image=17, patch=17, pictures=3, vision_heads=2),
    "seven heads of 2, prime hidden, other eps": Case(
        7, 1, 2, 53, image=31, patch=6, text=dict(rms_norm_eps=1e-3)),
    "<image> lies past the embedding": Case(4, 2, 12, vocab=IMAGE),
    "301 positions: more than bfloat16 can count": Case(2, 1, 6, hidden=20, image=51, patch=3),
}
CASES_2 = {  # 21 tokens and more, of which the last five are the suffix
    "Gemma 2, nothing outside the window": Case(4, 2, 20, text=dict(query_pre_attn_scalar=10)),
    "Gemma 2, the window ends in the prompt": Case(
        4, 1, 14, hidden=44, text=dict(
            query_pre_attn_scalar=9, sliding_window=8, attn_logit_softcapping=4.)),
    "Gemma 2, shorter than the suffix": Case(
        6, 3, 8, hidden=54, image=45, text=dict(
            query_pre_attn_scalar=3, sliding_window=3, final_logit_softcapping=2.,
            intermediate_size=57, num_hidden_layers=4, rms_norm_eps=.1, rope_theta=300.)),
    "Gemma 2, no caps, others slide": Case(
        3, 3, 10, hidden=39, pictures=2, image=28, text=dict(
            query_pre_attn_scalar=4, sliding_window=11, layer_types=[FULL, SLIDING, SLIDING],
            attn_logit_softcapping=None, final_logit_softcapping=None)),
    "Gemma 2, no window": Case(5, 5, 6, hidden=35, pictures=3, image=17, patch=17, vocab=310,
                               text=dict(
        query_pre_attn_scalar=5, layer_types=[FULL] * 3)),
}
CASES |= {name: replace(case, gemma=Gemma2Config) for name, case in CASES_2.items()}
MEANT_FOR_GENERATE = "max_position_embeddings"  # the arithmetic does not know it


def relative(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def both(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_both(request.param)
    torch.set_num_threads(threads)


def make_both(case):
    """Their model and ours with the same random weights, and a batch whose rows begin with 0,
    2 and 4 tokens of padding."""
    torch.manual_seed(0)
    config = case.config
    their_config = TheirConfig(**config.to_dict())
    theirs = Theirs._from_config(their_config, attn_implementation="eager").eval()
    with torch.no_grad():
        # then attention is far from flat, and rounding errors stay well below TOLERANCE
        for p in theirs.parameters(): p.normal_(0, .17)
    ours = PaliGemmaForConditionalGeneration(config).eval()
    weights = {published_key(k): w.detach().clone() for k, w in theirs.state_dict().items()}
    head = weights.pop("language_model.lm_head.weight")  # theirs is tied, too
    assert torch.equal(head, weights["language_model.model.embed_tokens.weight"])
    ours.load_state_dict(weights)
    return theirs, ours, batch(case)


def test_every_number_of_both_configs_varies():
    "A number that is the same in every case could stand in the code as well."
    for part, gemma in (("vision_config", GemmaConfig), ("text_config", GemmaConfig),
                        ("text_config", Gemma2Config)):
        cases = [case for case in CASES.values() if case.gemma is gemma]
        configs = [getattr(case.config, part) for case in cases]
        for name in {f.name for f in fields(configs[0])} - {MEANT_FOR_GENERATE}:
            assert len({str(getattr(config, name)) for config in configs}) > 1, name


def batch(case, rows=3, prompt=7, suffix=5):
    n = case.pictures * (case.image // case.patch) ** 2
    t = n + prompt + suffix
    ids, types, mask = (torch.full((rows, t), value) for value in (0, 0, 1))
    for row, pad in enumerate((0, 2, 4)):
        ids[row, pad:pad + n] = IMAGE
        ids[row, pad + n:] = torch.randint(3, 250, (t - pad - n,))
        mask[row, :pad] = 0
    types[:, -suffix:] = 1
    channels = case.config.vision_config.num_channels
    pictures = torch.randn(rows * case.pictures, channels, case.image, case.image)
    return dict(input_ids=ids, pixel_values=pictures, attention_mask=mask,
                token_type_ids=types)


def prefill(inputs, suffix=5): # the same rows without their suffix
    return {k: x if k == "pixel_values" else x[:, :-suffix] for k, x in inputs.items()}


def new_cache(model, inputs, room):
    text, (rows, t) = model.config.text_config, inputs["input_ids"].shape
    return KVCache(text.num_hidden_layers, rows, text.num_key_value_heads, t + room,
                   text.head_dim)


def test_attention_is_not_flat(both):
    "A comparison says little if every query takes the mean: the best key gets twice that."
    theirs, _, inputs = both
    for weights in theirs(**inputs, output_attentions=True).attentions:  # [b, h, t, t]
        visible = (weights > 0).sum(dim=-1)
        assert (weights.amax(dim=-1) * visible)[visible > 1].mean() > 2


def test_attention_weights(both):
    "In every layer, scale, soft cap and window included."
    theirs, ours, inputs = both
    modules, seen = [layer.self_attn for layer in ours.language_model.model.layers], []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(args))
             for module in modules]
    try: ours(**inputs)
    finally:
        for hook in hooks: hook.remove()
    attentions = theirs(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for module, (x, cos, sin, mask, *_), expected in zip(modules, seen, attentions):
        q, k, _ = module.project(x, cos, sin)
        got = module.weights(q, k, mask).transpose(1, 2)[real]  # [real tokens, h, t]
        assert relative(got, expected.transpose(1, 2)[real]) <= TOLERANCE


def test_prefill_of_a_padded_batch(both):
    theirs, ours, inputs = both
    inputs, real = prefill(inputs), prefill(inputs)["attention_mask"].bool()
    expected, got = theirs(**inputs).logits, ours(**inputs).logits
    assert relative(got[real], expected[real]) <= TOLERANCE
    without_types = {k: x for k, x in inputs.items() if k != "token_type_ids"}  # default: 0
    assert torch.equal(ours(**without_types).logits[real], got[real])
    last = ours(**inputs, logits_to_keep=1).logits
    assert relative(last, expected[:, -1:]) <= TOLERANCE


def test_last_positions_alone(both):
    "Where few are asked for, the last layer computes no others."
    theirs, ours, inputs = both
    expected = theirs(**inputs).logits
    for kept in (1, 4, 999): # more than there are: all
        real = inputs["attention_mask"].bool()[:, -kept:]
        got = ours(**inputs, logits_to_keep=kept).logits
        assert relative(got[real], expected[:, -kept:][real]) <= TOLERANCE


def test_padding_changes_nothing(both):
    _, ours, inputs = both
    inputs = prefill(inputs)
    together = ours(**inputs, logits_to_keep=1).logits
    pictures = inputs["pixel_values"].chunk(len(together))
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool())):
        alone = ours(ids[mask][None], pictures[i], logits_to_keep=1).logits
        assert relative(together[i:i + 1], alone) <= TOLERANCE


def test_each_cached_step(both):
    theirs, ours, inputs = both
    first, ids, mask = prefill(inputs), inputs["input_ids"], inputs["attention_mask"]
    cache = new_cache(ours, first, 5)
    got = ours(**first, kv_cache=cache, logits_to_keep=1)
    expected = theirs(**first, use_cache=True, logits_to_keep=1)
    whole = theirs(**inputs).logits
    for t in range(first["input_ids"].shape[1], ids.shape[1]):
        assert relative(got.logits, expected.logits) <= TOLERANCE
        assert relative(got.logits, whole[:, t - 1:t]) <= TOLERANCE  # as if all came at once
        step = dict(input_ids=ids[:, t:t + 1], attention_mask=mask[:, :t + 1])
        got = ours(**step, kv_cache=cache)
        expected = theirs(**step, use_cache=True, past_key_values=expected.past_key_values)
    assert relative(got.logits, whole[:, -1:]) <= TOLERANCE
    assert cache.length == cache.max_length


def test_suffix_after_a_cache_in_one_piece(both):
    theirs, ours, inputs = both
    cache = new_cache(ours, prefill(inputs), 5)
    ours(**prefill(inputs), kv_cache=cache)
    suffix, mask = inputs["input_ids"][:, -5:], inputs["attention_mask"]
    got = ours(suffix, attention_mask=mask, kv_cache=cache).logits
    assert relative(got, theirs(**inputs).logits[:, -5:]) <= TOLERANCE


def test_embeddings_in_bfloat16(both):
    "The factor sqrt(hidden) is rounded to the weights' dtype first: bit for bit as in theirs."
    theirs, ours, _ = both
    expected = deepcopy(theirs.get_input_embeddings()).bfloat16()
    got, ids = deepcopy(ours.language_model.model).bfloat16().embed, torch.arange(200)
    assert got(ids).dtype == torch.bfloat16 and torch.equal(got(ids), expected(ids))


def test_angles_in_a_bfloat16_model(both):
    "Positions, frequencies, cosines and sines in float32, rounded once: as theirs."
    theirs, ours, _ = both
    decoder, seen = deepcopy(ours.language_model.model).bfloat16(), []
    decoder.layers[0].register_forward_pre_hook(lambda module, args: seen.extend(args[1:3]))
    x = torch.zeros(1, 700, decoder.config.hidden_size).bfloat16()
    decoder(x)
    theirs = theirs.model.language_model.rotary_emb  # float32 also where they open bfloat16
    for got, expected in zip(seen, theirs(x, torch.arange(1, 701)[None]), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_loss_of_bfloat16_logits_is_float32(both):
    theirs, ours, inputs = both
    logits, labels = ours(**inputs).logits.detach().bfloat16(), labels_of(inputs)
    expected = theirs.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    got = suffix_loss(logits, labels)
    assert got.dtype == torch.float32 and relative(got, expected) <= 1e-6
    assert torch.equal(suffix_loss(logits, labels.int()), got)


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)


def test_loss_and_every_gradient(both):
    theirs, ours, inputs = both
    labels = labels_of(inputs)
    labels[0, -1] = -100  # a row with fewer labels: the mean is over all labels of the batch
    for model in both[:2]: model.zero_grad()
    expected, got = theirs(**inputs, labels=labels), ours(**inputs, labels=labels)
    assert relative(got.loss, expected.loss) <= TOLERANCE
    expected.loss.backward()
    got.loss.backward()
    grads = {published_key(name): p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    largest = max(grad.abs().max() for grad in grads.values())
    for name, p in ours.named_parameters():
        # some gradients are zero but for rounding: a softmax ignores what all keys share
        bound = TOLERANCE * grads[name].abs().max() + 1e-7 * largest
        assert (p.grad - grads[name]).abs().max() <= bound, name


def test_greedy_tokens(both):
    theirs, ours, inputs = both
    inputs = prefill(inputs)
    t = inputs["input_ids"].shape[1]
    greedy = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
    free = theirs.generate(**inputs, **greedy, eos_token_id=VOCAB + 1)[:, t:]
    eos = free[0, 4].item()  # so that one row ends before the others
    expected = theirs.generate(**inputs, **greedy, eos_token_id=eos)[:, t:]
    ours.config.eos_token_id = eos
    assert torch.equal(generate(ours, inputs, max_new_tokens=12), expected)
    ours.config.eos_token_id = EOS


def test_answer_probabilities(both):
    theirs, ours, inputs = both
    suffix = inputs["input_ids"][:, -5:]
    logits = theirs(**inputs).logits[:, -6:-1]
    logits[..., IMAGE:IMAGE + 1] = -torch.inf  # no answer holds a picture
    expected = logits.softmax(dim=-1).gather(-1, suffix[..., None])[..., 0]
    got = answer_probs(ours, prefill(inputs), suffix)
    torch.testing.assert_close(got.log(), expected.log(), rtol=TOLERANCE, atol=2 * TOLERANCE)


def test_answer_attention(both):
    theirs, ours, inputs = both
    ids, text = inputs["input_ids"], ours.config.text_config
    rows, suffix, first = len(ids), ids[:, -5:], prefill(inputs)
    everything = theirs(**inputs, output_attentions=True).attentions
    for layer in range(text.num_hidden_layers):
        expected = torch.stack([weights[:, -6:-1, row == IMAGE]
                                for weights, row in zip(everything[layer], ids)])
        assert expected.max() > 2 / ids.shape[1]  # b, h, t, n: not flat
        for head in range(text.num_attention_heads):
            got = answer_attention(ours, first, suffix, layer, head)
            torch.testing.assert_close(got, expected[:, head], rtol=0, atol=TOLERANCE)
        mean = answer_attention(ours, first, suffix, layer - text.num_hidden_layers)
        torch.testing.assert_close(mean, expected.mean(dim=1), rtol=0, atol=TOLERANCE)
        assert mean.shape == (rows, 5, (ids[0] == IMAGE).sum())


def test_nothing_leaks_from_the_suffix(both):
    "The last suffix token is seen by itself alone; a prefix token is seen by all."
    _, ours, inputs = both
    real = inputs["attention_mask"].bool()

    def changed(position): # [b, t]: which logits differ when this column holds another token
        ids = inputs["input_ids"].clone()
        ids[:, position] = ids[:, position] % 200 + 3
        return (ours(**inputs | dict(input_ids=ids)).logits != before).any(dim=-1)

    before = ours(**inputs).logits
    last = changed(-1)
    assert last[:, -1].all() and not last[:, :-1].any()
    suffix = changed(-3)  # the third last: it, and the two after it
    assert suffix[:, -3:].all() and not suffix[:, :-3].any()
    assert changed(-6)[real].all()  # the prompt's last token moves image tokens, too


def test_a_picture_reaches_every_token(both):
    _, ours, inputs = both
    other = ours(**inputs | dict(pixel_values=inputs["pixel_values"] + .1)).logits
    assert (other != ours(**inputs).logits).any(dim=-1)[inputs["attention_mask"].bool()].all()


def test_image_tower_runs_once_per_picture(both):
    _, ours, inputs = both
    inputs, seen = prefill(inputs), []
    def see(module, args, output): seen.append(len(args[0]))
    handle = ours.vision_tower.register_forward_hook(see)
    try:
        generate(ours, inputs, max_new_tokens=6)
        # one call for the whole batch, none while decoding
        assert seen == [len(inputs["pixel_values"])]
        features = ours.get_image_features(inputs["pixel_values"])
        ours(inputs["input_ids"], image_features=features,
             attention_mask=inputs["attention_mask"])
        assert len(seen) == 2  # features that are given are not computed again
    finally: handle.remove()


def test_wrong_numbers_of_image_tokens(both):
    _, ours, inputs = both
    inputs = prefill(inputs)
    ids, pictures = inputs["input_ids"], inputs["pixel_values"]
    found, n = int((ids == IMAGE).sum()), ours.config.vision_config.num_image_tokens
    fewer = ids.clone()
    fewer[0, 0] = 5
    for bad, message in (
        (dict(input_ids=fewer), f"hold {found - 1} <image> .* the pictures give {found}"),
        (dict(pixel_values=pictures[1:]), f"hold {found} <image> .* give {found - n}"),
        (dict(pixel_values=None), f"hold {found} <image> tokens, but the pictures give 0"),
        (dict(pixel_values=pictures[..., :-1]), f"expected .*{pictures.shape[-1]}.*, got"),
    ):
        with pytest.raises(ValueError, match=message): ours(**inputs | bad)


# --- drawn shapes

@st.composite
def cases(draw, gemma):
    def choose(*values): return draw(st.sampled_from(values))
    kv_heads, patch = choose(1, 2, 3), choose(3, 5, 14)
    heads = kv_heads * choose(1, 2, 3)
    hidden = choose(*range(24, 60)) // heads * heads  # transformers wants that for Gemma 2
    image = patch * choose(1, 2, 3) + choose(0, 1, 2)
    case = Case(heads, kv_heads, 2 * choose(1, 2, 3, 4, 5, 8), hidden, image, patch,
                pictures=choose(1, 1, 2, 3), vision_heads=choose(1, 2, 3), gemma=gemma,
                vision=dict(layer_norm_eps=choose(1e-6, .1), num_channels=choose(3, 1)),
                text=dict(rope_theta=choose(100., 10_000.), rms_norm_eps=choose(1e-6, 1e-2)))
    if gemma is Gemma2Config:
        kinds = [FULL] * 3, [SLIDING] * 3, [SLIDING, FULL, FULL], [FULL, FULL, SLIDING]
        case.text |= dict(  # a window of 1 breaks transformers' cache
            sliding_window=choose(*range(2, 40)), query_pre_attn_scalar=choose(3, 7, 16, 144),
            attn_logit_softcapping=choose(None, 2., 50.),
            final_logit_softcapping=choose(None, 3., 30.), layer_types=choose(None, *kinds))
    return case


@pytest.mark.parametrize("gemma", [GemmaConfig, Gemma2Config], ids=lambda c: c.model_type)
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(gemma, data):
    both = make_both(data.draw(cases(gemma)))
    for check in (
        test_attention_weights, test_prefill_of_a_padded_batch, test_padding_changes_nothing,
        test_each_cached_step, test_suffix_after_a_cache_in_one_piece,
        test_loss_and_every_gradient, test_greedy_tokens,
    ): check(both)
