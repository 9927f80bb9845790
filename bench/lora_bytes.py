"""How many bytes fine-tuning takes at the published sizes: on paper, and counted by PyTorch.

    python bench/lora_bytes.py --results bench/results    # a minute; models on the meta device

The state of a run: weights, their gradients and AdamW's two moments. In `full` and `frozen`
(vision tower and embedding stay) all of it in float32, and the copies in bfloat16 that
autocast makes; LoRA (rank 8, the decoder's attention) keeps the weights in bfloat16, QLoRA the
decoder's and the embedding in four bits, both have adapters in float32. Formulas over the
config say how many weights there are; the same is counted on a model without storage, and must
be equal.

Activations: what autograd keeps for one picture with 8 tokens of prompt and 32 of answer, in
bfloat16, with attention written out (as the package trains on a CPU), so with its tables of
tokens by tokens; fused attention does without them. The formula is linear in the layers, from
models of one to three layers, and must be equal to the count at full depth. With gradient
checkpointing each layer keeps its input alone, and one at a time all that it needs. What an
operator needs for a moment is not in it.
"""
import sys
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

from machine import write_results

PROMPT, ANSWER, RANK, GROUP = 8, 32, 8, 64
METHODS = "full", "frozen", "lora", "qlora"


def configs(side): # name -> PaliGemmaConfig
    from paligemma_nb.gemma import GemmaConfig
    from paligemma_nb.gemma2 import Gemma2Config
    from paligemma_nb.paligemma import PaliGemmaConfig
    from paligemma_nb.siglip import SiglipVisionConfig
    vision = SiglipVisionConfig(1152, 4304, 27, 16, patch_size=14, image_size=side)
    texts = {"PaliGemma 3B": GemmaConfig(2048, 16384, 18, 8, 1, 257_216),
             "PaliGemma 2 3B": Gemma2Config(2304, 9216, 26, 8, 4, 257_216),
             "PaliGemma 2 10B": Gemma2Config(3584, 14336, 42, 16, 8, 257_216),
             "PaliGemma 2 28B": Gemma2Config(4608, 36864, 46, 32, 16, 257_216, head_dim=128)}
    return {name: PaliGemmaConfig(vision, text, 257_152) for name, text in texts.items()}


def meta_model(config):
    from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
    with torch.device("meta"): return PaliGemmaForConditionalGeneration(config).bfloat16()


# --- weights

def on_paper(config): # numbers of weights, by what becomes of them
    t, v = config.text_config, config.vision_config
    c, i, d, w = t.hidden_size, t.intermediate_size, t.head_dim, v.hidden_size
    h, k, n = t.num_attention_heads, t.num_key_value_heads, t.num_hidden_layers
    norms = 4 if t.model_type == "gemma2" else 2
    tower = (3 * v.patch_size ** 2 * w + w + v.num_image_tokens * w + 2 * w
             + v.num_hidden_layers * (4 * (w * w + w) + 2 * w * v.intermediate_size
                                      + v.intermediate_size + 5 * w))
    matrices = n * (2 * c * h * d + 2 * c * k * d + 3 * c * i)
    return dict(tower=tower, projector=w * c + c, embedding=t.vocab_size * c,
                matrices=matrices, norms=(n * norms + 1) * c,
                adapters=n * RANK * (4 * c + 2 * h * d + 2 * k * d))


def state_bytes(config): # -> method -> bytes
    n = on_paper(config)
    adapters = n.pop("adapters")
    whole, small = sum(n.values()), n["embedding"] + n["matrices"]
    fixed = n["tower"] + n["embedding"]
    four_bits = small // 2 + small // GROUP * 4  # a scale and a zero point for each group
    return dict(full=(4 + 4 + 8 + 2) * whole, frozen=6 * whole + 12 * (whole - fixed),
                lora=2 * whole + 16 * adapters,
                qlora=2 * (whole - small) + four_bits + 16 * adapters)


def counted_bytes(config): # the same, of models on the meta device
    from paligemma_nb.lora import ATTENTION, add_lora
    from paligemma_nb.quantization import quantize
    found = {}
    for method in METHODS:
        if method != "qlora": model = prepared(config, method)
        else:
            model = quantize(meta_model(config), "int4", GROUP)
            model = add_lora(model, RANK, targets=ATTENTION)
        weights = [*model.parameters()]
        rounded = [x for x in model.buffers() if x.dtype != torch.float32]  # not the angles
        learning = sum(p.numel() for p in weights if p.requires_grad)
        held = sum(x.nbytes for x in weights + rounded)
        if "lora" not in method: held *= 3  # float32, beside it bfloat16
        found[method] = held + 12 * learning
    return found


# --- activations

def prepared(config, method):
    from paligemma_nb.lora import ATTENTION, add_lora
    model = meta_model(config).train()
    if "lora" in method: return add_lora(model, RANK, targets=ATTENTION)
    if method == "frozen":
        model.vision_tower.requires_grad_(False)
        model.language_model.model.embed_tokens.requires_grad_(False)
    return model


def kept_bytes(config, method): # by autograd until the backward pass, beside the weights
    model, kept = prepared(config, method), {}
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}

    def note(x):
        key = x.untyped_storage()._cdata
        if key not in own: kept[key] = x, x.untyped_storage().nbytes()
        return x

    side, language = config.vision_config.image_size, model.language_model
    with (torch.device("meta"), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH),
          torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)):
        ids = torch.zeros(1, PROMPT + ANSWER, dtype=torch.long)
        features = model.get_image_features(torch.zeros(1, 3, side, side).bfloat16())
        embeds = torch.cat([features, language.model.embed(ids)], dim=1)
        t = embeds.shape[1]
        mask = torch.ones(1, 1, t, t, dtype=torch.bool)
        hidden = language.model(embeds, language.masks(
            mask, torch.zeros(1, t, dtype=torch.long), torch.zeros(1, t, dtype=torch.long), 0),
            None, t - ANSWER - 1)
        logits = language.logits(hidden)[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(ANSWER, dtype=torch.long))
    return sum(nbytes for _, nbytes in kept.values())


def with_layers(config, text, vision):
    types = dict(layer_types=None) if config.text_config.model_type == "gemma2" else {}
    return replace(config,
                   text_config=replace(config.text_config, num_hidden_layers=text, **types),
                   vision_config=replace(config.vision_config, num_hidden_layers=vision))


def activations(config, method): # -> bytes without and with checkpointing
    t, v = config.text_config, config.vision_config
    def count(*layers): return kept_bytes(with_layers(config, *layers), method)
    # the last layer works on the answer alone: three layers have one more of the full ones
    few = count(2, 1)
    layer, tower_layer = count(3, 1) - few, count(2, 2) - few
    n, m = t.num_hidden_layers, v.num_hidden_layers
    paper = few + (n - 2) * layer + (m - 1) * tower_layer
    if (counted := kept_bytes(config, method)) != paper:
        sys.exit(f"{method}: {counted:,} bytes are kept, expected {paper:,}")
    tokens = v.num_image_tokens + PROMPT + ANSWER
    inputs = 2 * (n * tokens * t.hidden_size)
    rest = paper - (n - 1) * layer - m * tower_layer
    if tower_layer: inputs += 2 * m * v.num_image_tokens * v.hidden_size
    return paper, rest + inputs + max(layer, tower_layer)


# --- the table

def rows_of(side):
    for name, config in configs(side).items():
        state, counted = state_bytes(config), counted_bytes(config)
        if state != counted: sys.exit(f"{name}: {counted} bytes counted, expected {state}")
        kept = {method: activations(config, method) for method in METHODS[:-1]}
        kept["qlora"] = kept["lora"]  # rounded weights change nothing about activations
        for method in METHODS:
            yield dict(model=name, side=side, method=method, state=state[method],
                       activations=kept[method][0], checkpointed=kept[method][1])


def table(rows): # GB, a line for each model and picture
    lines = ["| model | picture | " + " | ".join(METHODS) + " |",
             "|---|--:" + "|--:" * len(METHODS) + "|"]
    cells = {(r["model"], r["side"], r["method"]): "{:.1f} + {:.1f} ({:.1f})".format(
        *(r[key] / 1e9 for key in ("state", "activations", "checkpointed"))) for r in rows}
    for name, side in dict.fromkeys((r["model"], r["side"]) for r in rows):
        line = " | ".join(cells[name, side, method] for method in METHODS)
        lines.append(f"| {name} | {side} px | {line} |")
    return "\n".join(lines)


def main(sides: tuple = (224, 448, 896), results: str = ""):
    sides = sides if isinstance(sides, (tuple, list)) else (sides,)
    start = time.perf_counter()
    rows = sorted((row for side in sides for row in rows_of(side)),
                  key=lambda r: [*configs(224)].index(r["model"]))
    print(f"GB: state + activations of a row (with checkpointing)\n\n{table(rows)}")
    found = dict(prompt_tokens=PROMPT, answer_tokens=ANSWER, rank=RANK, group_size=GROUP,
                 seconds=time.perf_counter() - start, rows=rows)
    if results: write_results(results, "lora_bytes", found)


if __name__ == "__main__":
    import fire
    fire.Fire(main)
