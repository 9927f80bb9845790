"""Agreement with transformers (eager attention, float32, random weights): the numbers that every lesson promises.

Each case is an odd shape of the model, because a model with the usual sizes forgives a swapped dimension.
Both generations of Gemma pass the same checks; `test_paligemma2` runs them on shapes that it draws."""
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import PaliGemmaConfig as TheirConfig
from transformers import PaliGemmaForConditionalGeneration as Theirs

from paligemma_nb.checkpoint import published_key
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.generation import answer_attention, answer_probs, generate
from paligemma_nb.kv_cache import KVCache
from paligemma_nb.paligemma import (
    PaliGemmaConfig, PaliGemmaForConditionalGeneration, decoder_mask, merge_image_features,
    prefix_lm_mask, suffix_loss)
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
    "three of six, 45 px by patches of 14, other theta": Case(6, 3, 8, hidden=52, image=45, text=dict(rope_theta=500.)),
    "two pictures a row, other depths": Case(
        4, 1, 16, image=29, pictures=2, text=dict(intermediate_size=41, num_hidden_layers=2),
        vision=dict(hidden_size=42, intermediate_size=31, num_hidden_layers=3,
                    layer_norm_eps=.02)),
    "three pictures a row, one patch each": Case(5, 5, 6, hidden=31, image=17, patch=17, pictures=3, vision_heads=2),
    "seven heads of 2, prime hidden, other eps": Case(7, 1, 2, 53, image=31, patch=6, text=dict(rms_norm_eps=1e-3)),
    "<image> lies past the embedding": Case(4, 2, 12, vocab=IMAGE),
    "301 positions: more than bfloat16 can count": Case(2, 1, 6, hidden=20, image=51, patch=3),
}
SLIDES, FULL = "sliding_attention", "full_attention"
CASES_2 = {  # 21 tokens and more, of which the last five are the suffix
    "Gemma 2, nothing outside the window": Case(4, 2, 20, text=dict(query_pre_attn_scalar=10)),
    "Gemma 2, the window ends in the prompt": Case(
        4, 1, 14, hidden=44, text=dict(query_pre_attn_scalar=9, sliding_window=8, attn_logit_softcapping=4.)),
    "Gemma 2, shorter than the suffix": Case(
        6, 3, 8, hidden=54, image=45, text=dict(
            query_pre_attn_scalar=3, sliding_window=3, final_logit_softcapping=2.,
            intermediate_size=57, num_hidden_layers=4, rms_norm_eps=.1, rope_theta=300.)),
    "Gemma 2, no caps, others slide": Case(
        3, 3, 10, hidden=39, pictures=2, image=28, text=dict(
            query_pre_attn_scalar=4, sliding_window=11, layer_types=[FULL, SLIDES, SLIDES],
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
    "Their model and ours with the same random weights, and a batch whose rows begin with 0, 2 and 4 tokens of padding."
    torch.manual_seed(0)
    config = case.config
    theirs = Theirs._from_config(TheirConfig(**config.to_dict()), attn_implementation="eager").eval()
    with torch.no_grad():
        # attention is far from flat then, and rounding errors stay about five times below TOLERANCE
        for p in theirs.parameters(): p.normal_(0, .17)
    ours = PaliGemmaForConditionalGeneration(config).eval()
    weights = {published_key(name): w.detach().clone() for name, w in theirs.state_dict().items()}
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert torch.equal(weights.pop(head), weights[embedding])  # theirs is tied, too
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
    return {name: x if name == "pixel_values" else x[:, :-suffix] for name, x in inputs.items()}


def new_cache(model, inputs, room):
    text, (rows, t) = model.config.text_config, inputs["input_ids"].shape
    return KVCache(text.num_hidden_layers, rows, text.num_key_value_heads, t + room, text.head_dim)


def test_attention_is_not_flat(both):
    "A comparison says little if every query takes the mean: here the strongest key gets over twice its share."
    theirs, _, inputs = both
    for weights in theirs(**inputs, output_attentions=True).attentions:  # [b, h, t, t]
        visible = (weights > 0).sum(dim=-1)
        assert (weights.amax(dim=-1) * visible)[visible > 1].mean() > 2


def test_attention_weights(both):
    "In every layer, scale, soft cap and window included."
    theirs, ours, inputs = both
    modules, seen = [layer.self_attn for layer in ours.language_model.model.layers], []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(args)) for module in modules]
    try: ours(**inputs)
    finally:
        for hook in hooks: hook.remove()
    attentions, real = theirs(**inputs, output_attentions=True).attentions, inputs["attention_mask"].bool()
    for module, (x, cos, sin, mask, *_), expected in zip(modules, seen, attentions):
        q, k, _ = module.project(x, cos, sin)
        got = module.weights(q, k, mask).transpose(1, 2)[real]  # [real tokens, h, t]
        assert relative(got, expected.transpose(1, 2)[real]) <= TOLERANCE


def test_prefill_of_a_padded_batch(both):
    theirs, ours, inputs = both
    inputs, real = prefill(inputs), prefill(inputs)["attention_mask"].bool()
    expected, got = theirs(**inputs).logits, ours(**inputs).logits
    assert relative(got[real], expected[real]) <= TOLERANCE
    without_types = {name: x for name, x in inputs.items() if name != "token_type_ids"}  # zeros are our default
    assert torch.equal(ours(**without_types).logits[real], got[real])
    last = ours(**inputs, logits_to_keep=1).logits
    assert relative(last, expected[:, -1:]) <= TOLERANCE


def test_last_positions_alone(both):
    "Where few are asked for, the last layer computes no others."
    theirs, ours, inputs = both
    expected = theirs(**inputs).logits
    for kept in (1, 4): assert relative(ours(**inputs, logits_to_keep=kept).logits, expected[:, -kept:]) <= TOLERANCE


def test_padding_changes_nothing(both):
    _, ours, inputs = both
    inputs = prefill(inputs)
    together = ours(**inputs, logits_to_keep=1).logits
    per_row = len(inputs["pixel_values"]) // len(together)
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool())):
        alone = ours(ids[mask][None], inputs["pixel_values"][i * per_row:(i + 1) * per_row], logits_to_keep=1).logits
        assert relative(together[i:i + 1], alone) <= TOLERANCE


def test_each_cached_step(both):
    theirs, ours, inputs = both
    first, ids, mask = prefill(inputs), inputs["input_ids"], inputs["attention_mask"]
    cache = new_cache(ours, first, 5)
    got, expected = ours(**first, kv_cache=cache, logits_to_keep=1), theirs(**first, use_cache=True, logits_to_keep=1)
    whole = theirs(**inputs).logits
    for t in range(first["input_ids"].shape[1], ids.shape[1]):
        assert relative(got.logits, expected.logits) <= TOLERANCE
        assert relative(got.logits, whole[:, t - 1:t]) <= TOLERANCE  # as if all had been computed at once
        got = ours(ids[:, t:t + 1], attention_mask=mask[:, :t + 1], kv_cache=cache)
        expected = theirs(input_ids=ids[:, t:t + 1], attention_mask=mask[:, :t + 1], use_cache=True,
                          past_key_values=expected.past_key_values)
    assert relative(got.logits, whole[:, -1:]) <= TOLERANCE and cache.length == cache.max_length


def test_suffix_after_a_cache_in_one_piece(both):
    theirs, ours, inputs = both
    cache = new_cache(ours, prefill(inputs), 5)
    ours(**prefill(inputs), kv_cache=cache)
    got = ours(inputs["input_ids"][:, -5:], attention_mask=inputs["attention_mask"], kv_cache=cache).logits
    assert relative(got, theirs(**inputs).logits[:, -5:]) <= TOLERANCE


def test_embeddings_in_bfloat16(both):
    "The factor sqrt(hidden) is rounded to the weights' dtype first: bit for bit as they do it."
    theirs, ours, _ = both
    expected, got = deepcopy(theirs.get_input_embeddings()).bfloat16(), deepcopy(ours.language_model.model).bfloat16()
    ids = torch.arange(200)
    assert got.embed(ids).dtype == torch.bfloat16 and torch.equal(got.embed(ids), expected(ids))


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
        # some gradients are zero but for rounding: softmax ignores a bias of all keys, and a choice among one key
        bound = TOLERANCE * grads[name].abs().max() + 1e-7 * largest
        assert (p.grad - grads[name]).abs().max() <= bound, name


def test_greedy_tokens(both):
    theirs, ours, inputs = both
    inputs = prefill(inputs)
    t = inputs["input_ids"].shape[1]
    free = theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=VOCAB + 1)[:, t:]
    eos = free[0, 4].item()  # so that one row ends before the others
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)[:, t:]
    ours.config.eos_token_id = eos
    assert torch.equal(generate(ours, inputs, max_new_tokens=12), expected)
    ours.config.eos_token_id = EOS


def test_answer_probabilities(both):
    theirs, ours, inputs = both
    suffix = inputs["input_ids"][:, -5:]
    logits = theirs(**inputs).logits[:, -6:-1]
    logits[..., IMAGE:IMAGE + 1] = -torch.inf  # no answer holds a picture
    expected = logits.softmax(dim=-1).gather(-1, suffix[..., None])[..., 0]
    torch.testing.assert_close(answer_probs(ours, prefill(inputs), suffix).log(), expected.log(), rtol=TOLERANCE, atol=2 * TOLERANCE)


def test_answer_attention(both):
    theirs, ours, inputs = both
    rows, suffix, text = len(inputs["input_ids"]), inputs["input_ids"][:, -5:], ours.config.text_config
    everything = theirs(**inputs, output_attentions=True).attentions
    for layer in range(text.num_hidden_layers):
        expected = torch.stack([weights[:, -6:-1, ids == IMAGE] for weights, ids in zip(everything[layer], inputs["input_ids"])])
        assert expected.max() > 2 / inputs["input_ids"].shape[1]  # b, h, t, n: not flat
        for head in range(text.num_attention_heads):
            got = answer_attention(ours, prefill(inputs), suffix, layer, head)
            torch.testing.assert_close(got, expected[:, head], rtol=0, atol=TOLERANCE)
        mean = answer_attention(ours, prefill(inputs), suffix, layer - text.num_hidden_layers)
        torch.testing.assert_close(mean, expected.mean(dim=1), rtol=0, atol=TOLERANCE)
        assert mean.shape == (rows, 5, (inputs["input_ids"][0] == IMAGE).sum())


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
    assert changed(-6)[real].all()  # the prompt's last token: also the image tokens that stand before it


def test_a_picture_reaches_every_token(both):
    _, ours, inputs = both
    other = ours(**inputs | dict(pixel_values=inputs["pixel_values"] + .1)).logits
    assert (other != ours(**inputs).logits).any(dim=-1)[inputs["attention_mask"].bool()].all()


def test_image_tower_runs_once_per_picture(both):
    _, ours, inputs = both
    inputs, seen = prefill(inputs), []
    handle = ours.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    try:
        generate(ours, inputs, max_new_tokens=6)
        assert seen == [len(inputs["pixel_values"])]  # one call for the whole batch, none while decoding
        features = ours.get_image_features(inputs["pixel_values"])
        ours(inputs["input_ids"], image_features=features, attention_mask=inputs["attention_mask"])
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
        (dict(input_ids=fewer), f"hold {found - 1} <image> tokens, but the pictures give {found}"),
        (dict(pixel_values=pictures[1:]), f"hold {found} <image> tokens, but the pictures give {found - n}"),
        (dict(pixel_values=None), f"hold {found} <image> tokens, but the pictures give 0"),
        (dict(pixel_values=pictures[..., :-1]), f"expected .*{pictures.shape[-1]}.*, got"),
    ):
        with pytest.raises(ValueError, match=message): ours(**inputs | bad)


# --- inputs that could be computed with, and mean something else

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


def test_labels_that_are_none(small):
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


def test_ids_and_pictures_that_are_none(small):
    ours, inputs, right = small
    ids, pictures, v = inputs["input_ids"], inputs["pixel_values"], VOCAB
    features = ours.get_image_features(pictures)
    def given(features): return dict(pixel_values=None, image_features=features)
    def other(x): return ids.where(ids != ids[0, -1], x)
    assert torch.equal(ours(**inputs | given(features)).logits, right.logits)
    rounded = given(features.bfloat16()), given(features.bfloat16().float())  # as under autocast
    got, expected = (ours(**inputs | bad).logits for bad in rounded)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    for bad, message in (
        (dict(image_features=features), "expected pixel_values or image_features, got both"),
        (dict(pixel_values=pictures.byte()), r"pixel_values in \[-1, 1\], got torch.uint8"),
        (given(features.flatten(0, 1)[None]), "a picture takes 12 <image> tokens"),
        (given(features[..., :-1]), r"image_features: expected \[images, n, 48\]"),
        (given(features[..., None]), r"image_features: expected \[images, n, 48\]"),
        (dict(input_ids=ids.float()), "input_ids: expected int64, got torch.float32"),
        (dict(input_ids=ids[0]), r"input_ids: expected \[b, t\], got \[16\]"),
        (dict(input_ids=other(v)), f"input_ids: expected tokens 0 … {v - 1}, found .* … {v}"),
        (dict(input_ids=other(-100)), f"input_ids: expected tokens 0 … {v - 1}, found -100 …"),
        (dict(logits_to_keep=-1), "logits_to_keep must be 0 or more, got -1"),
    ):
        with refused(message): ours(**without(inputs, "labels") | bad)


def test_a_cache_takes_its_own_shape_alone():
    cache, expected = KVCache(2, 3, 2, 5, 8), r"keys and values \[3, 2, t, 8\], got \["
    def pair(b=3, k=2, t=4, d=8): return torch.ones(b, k, t, d)
    for bad in (pair(b=1), pair(b=2), pair(k=1), pair(t=1), pair(d=1), pair()[0]):
        for both in ((bad, pair()), (pair(), bad)):
            with refused(expected): cache.update(0, *both)
    for _ in range(2):  # nothing moves on before `advance`
        keys, values = cache.update(0, pair(), 2 * pair())
        assert torch.equal(keys, pair()) and torch.equal(values, 2 * pair())
    cache.advance(4)
    with refused("2 tokens do not fit: 4 of 5 used"): cache.update(1, pair(t=2), pair(t=2))
    keys, values = cache.update(0, 3 * pair(t=1), 4 * pair(t=1))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 3]
    assert values[2, 1, :, 7].tolist() == [2, 2, 2, 2, 4]
    assert cache.num_bytes == 2 * (2 * 3 * 2 * 5 * 8) * 4


def test_a_batch_for_another_cache(small):
    ours, inputs, _ = small
    cache, last = new_cache(ours, inputs, 0), inputs["input_ids"][:, -1:]
    with refused(r"expected keys and values \[3, 2, t, 12\], got \[1, 2, 1, 12\]"):
        ours(last[:1], kv_cache=cache)
    ours(inputs["input_ids"][:, -5:], kv_cache=cache)
    with refused(r"attention_mask: expected \[3, 6\], got \[3, 1\]"):
        ours(last, attention_mask=inputs["attention_mask"][:, -1:], kv_cache=cache)


def test_compiled_code_looks_at_no_values(small):
    "What asks for a tensor's value would stop a graph: in one, checks of values are left out."
    _, inputs, right = small
    names = "input_ids", "labels", "attention_mask", "token_type_ids"
    ids, labels, mask, types = (inputs[name] for name in names)
    merging = torch.randn(*ids.shape, 8), ids == IMAGE, torch.randn(3, 4, 8)
    for function, *args in ((decoder_mask, ids, mask, types), (prefix_lm_mask, types, mask),
                            (merge_image_features, *merging),
                            (suffix_loss, right.logits, labels)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*args), function(*args)), function.__name__
