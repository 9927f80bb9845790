"""What each choice of the recipe is worth: runs of equal budget that differ in one thing.

    python bench/stages.py run contrast --seed 1 --folder runs/stages   # one run: see RUNS
    python bench/stages.py all --folder runs/stages       # those that are missing, then gather
    python bench/stages.py gather --folder runs/stages    # those with all seeds are added to
                                                          # nbs/data/36_stages.json

Each run is `base` but for what RUNS says; two seeds each. Runs of a seed see the same batches
in the same order, unless the recipe changes the scenes (`all objects at once`). A tower or a
decoder that was taught before (`contrast`, `texts`) got PRETRAINING steps more: as in the
paper these come on top, and their time stands apart.

`muon …` and `adamw …` try rates for the layers' matrices, each about three times the one
before; everything else has AdamW at `adamw_lr` in all runs. If the lowest loss of an optimizer
is that of its first or its last rate, `gather` says so: there is no best yet.

A run has one thread and can be stopped at any moment; called again, it goes on.
"""
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.training import Recipe

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = str(ROOT / "nbs/data/36_stages.json")
SEEDS = 0, 1
PRETRAINING = 300     # steps of 32 pictures or of 64 texts
RATES = dict(muon=(6e-4, 2e-3, 6e-3), adamw=(2e-4, 6e-4, 2e-3, 6e-3))


@dataclass(frozen=True)
class StageRecipe(Recipe):
    "A short training, and what may be different about it."
    steps: int = 600
    single_object_steps: int = 200  # a third of the steps, as in lesson 31
    warmup_steps: int = 50
    decay_steps: int = 400
    contrast: int = 0               # steps by contrast that the tower has behind it
    texts: int = 0                  # steps on the scenes' texts that the decoder has behind it
    frozen: bool = False            # the tower does not learn
    tower_warmup: int = 0           # steps in which the tower's rates rise; 0: as all others
    causal: bool = False            # the prompt is read from left to right, as the answer is
    loss_on_prompt: bool = False    # and learned as well
    mlp: bool = False               # two linear maps and a GELU between tower and decoder
    waves: bool = True              # places start as sines and cosines
    zero_outputs: bool = True       # blocks start by changing nothing
    muon: bool = True               # False: AdamW for the layers' matrices, too, at muon_lr
    kv_heads: int = 1               # of 4 heads

    def rates(self, step):
        rates, slow = super().rates(step), min(1.0, (step + 1) / max(1, self.tower_warmup))
        tower = {f"tower {name}": rate * slow for name, rate in rates.items()}
        return rates | ({} if self.frozen else tower)


RUNS = {
    "base": {},
    "contrast": dict(contrast=PRETRAINING), "texts": dict(texts=PRETRAINING),
    "frozen": dict(contrast=PRETRAINING, frozen=True),
    "tower warm-up": dict(contrast=PRETRAINING, tower_warmup=200),
    "causal": dict(causal=True), "loss on prompt": dict(causal=True, loss_on_prompt=True),
    "MLP": dict(mlp=True),
    "all objects at once": dict(single_object_steps=0),
    "random places": dict(waves=False), "random outputs": dict(zero_outputs=False),
    "length 1": dict(length_power=1.0),
    "2 KV heads": dict(kv_heads=2), "4 KV heads": dict(kv_heads=4),
    **{f"muon {rate:g}": dict(muon_lr=rate) for rate in RATES["muon"]
       if rate != Recipe().muon_lr},
    **{f"adamw {rate:g}": dict(muon=False, muon_lr=rate) for rate in RATES["adamw"]}}


# --- a model, and what it has behind it

class CausalPrompt(PaliGemmaForConditionalGeneration):
    "Reads pictures in both directions and all text from left to right, with `generate`, too."
    def forward(self, input_ids, pixel_values=None, attention_mask=None, token_type_ids=None,
                labels=None, kv_cache=None, **settings):
        if kv_cache is None or not kv_cache.length:
            token_type_ids = (input_ids != self.config.image_token_index).int()
            if attention_mask is not None: token_type_ids *= attention_mask  # no padding
        return super().forward(input_ids, pixel_values, attention_mask, token_type_ids, labels,
                               kv_cache, **settings)


def new_model(processor, recipe): # at its start, before any training
    from paligemma_nb.training import initialize, tiny_config
    config = tiny_config(processor)
    config.text_config = replace(config.text_config, num_key_value_heads=recipe.kv_heads)
    kind = CausalPrompt if recipe.causal else PaliGemmaForConditionalGeneration
    model = kind(config)
    if recipe.mlp:
        c = config.text_config.hidden_size
        model.multi_modal_projector.linear = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, c), nn.GELU("tanh"), nn.Linear(c, c))
    initialize(model, processor, recipe.seed)
    if not recipe.waves: shuffle_places(model, processor, recipe.seed)
    if not recipe.zero_outputs: fill_outputs(model, recipe.seed)
    return model


@torch.no_grad()
def shuffle_places(model, processor, seed): # as long as before, but no longer near each other
    generator = torch.Generator().manual_seed(seed)
    first = processor.tokenizer.token_to_id("<loc0000>")
    tables = (model.language_model.model.embed_tokens.weight[first:first + 1024],
              model.vision_tower.vision_model.embeddings.position_embedding.weight)
    for table in tables:
        noise = torch.randn(table.shape, generator=generator)
        table.copy_(nn.functional.normalize(noise, dim=1) * table.norm(dim=1, keepdim=True))


@torch.no_grad()
def fill_outputs(model, seed): # the usual start of every other matrix
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.split(".")[-2] in ("out_proj", "fc2", "o_proj", "down_proj") and p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5, generator=generator)


def teach_tower(model, processor, recipe): # as SigLIP learns, see lesson 33
    from paligemma_nb.contrastive import (
        ContrastRecipe, SiglipConfig, SiglipModel, SiglipTextConfig, train_contrastive)
    vision = model.config.vision_config
    text = SiglipTextConfig(
        vision.hidden_size, vision.intermediate_size, 2, vision.num_attention_heads,
        vocab_size=processor.vocab_size, max_position_embeddings=16)
    torch.manual_seed(recipe.seed)
    both, tower = SiglipModel(SiglipConfig(text, vision)), model.vision_tower.vision_model
    both.vision_model.load_state_dict(tower.state_dict(), strict=False)  # all but its head
    contrast = ContrastRecipe(examples=32 * recipe.contrast, batch_size=32,
                              first_seed=10**8 * (1 + recipe.seed))
    losses = list(train_contrastive(both, processor, contrast))
    learned = both.vision_model.state_dict()
    tower.load_state_dict({name: learned[name] for name in tower.state_dict()})
    return losses


def text_batch(processor, recipe, step): # what is asked and answered, without a picture
    from paligemma_nb.processing import BOS, EOS, left_pad
    from paligemma_nb.scenes import HELD_OUT, make_scene
    from paligemma_nb.tasks import sample_examples
    rng, texts = np.random.default_rng([recipe.seed, step, 1]), []
    for seed in rng.integers(HELD_OUT, size=32):
        scene = make_scene(int(seed), processor.image_size)
        texts += [f"{e.prompt}\n{e.suffix}{EOS}"
                  for e in sample_examples(scene, 2, rng, recipe.kind_weights)]
    return left_pad([processor.encode(BOS)] * len(texts), [*map(processor.encode, texts)],
                    processor.pad_token_id)


def teach_decoder(model, processor, recipe): # as a language model, on texts alone
    from paligemma_nb.kernels import training_precision
    from paligemma_nb.training import apply_gradient, make_optimizers
    texts = Recipe(steps=recipe.texts, warmup_steps=20, decay_steps=recipe.texts - 20)
    optimizers, losses = make_optimizers(model, texts), []
    for step in range(recipe.texts):
        model.zero_grad()
        batch = text_batch(processor, recipe, step)
        with training_precision("cpu"): loss = model(**batch).loss
        loss.backward()
        apply_gradient(model, optimizers, texts, step, loss.item())
        losses.append(loss.item())
    return losses


# --- a run

def optimizers_of(model, recipe): # by the names in recipe.rates
    from paligemma_nb.training import make_optimizers

    def of_what_learns():
        optimizers = make_optimizers(model, recipe)
        if not recipe.muon: # the other half of lesson 31's race
            matrices = optimizers["muon"].param_groups[0]["params"]
            optimizers["muon"] = AdamW(matrices, weight_decay=0.01, betas=(0.9, 0.98))
        return optimizers

    tower = model.vision_tower
    tower.requires_grad_(False)
    optimizers = of_what_learns()
    if recipe.frozen: return optimizers
    rest = [p for p in model.parameters() if p.requires_grad]
    for p in rest: p.requires_grad_(False)
    tower.requires_grad_(True)
    own = {f"tower {name}": o for name, o in of_what_learns().items()}
    for p in rest: p.requires_grad_(True)
    return optimizers | own


def batches(processor, recipe, first):
    from paligemma_nb.training import make_batch
    for step in count(first):
        batch = make_batch(processor, recipe, step)
        if recipe.loss_on_prompt: # from its bos on
            text = (batch["input_ids"] != processor.image_token_id) & (
                batch["attention_mask"] == 1)
            batch |= dict(labels=batch["input_ids"].where(text, -100),
                          token_type_ids=text.int())
        yield batch


def boxes_by(group, answers): # what evaluate returns -> {group of an answer: its IoUs}
    ious = {}
    for a in answers:
        if a.example.kind == "detect" and "iou" in a.marks:
            ious.setdefault(group(a), []).append(a.marks["iou"])
    return dict(sorted(ious.items()))


def marks(model, processor, num_scenes): # by kind; boxes also by the number of objects
    from paligemma_nb.scenes import VALIDATION, make_scene
    from paligemma_nb.tasks import evaluate
    found, answers = evaluate(model, processor, num_scenes, VALIDATION)
    ious = boxes_by(lambda a: len(make_scene(a.seed).objects), answers)
    return found | dict(detect_by_objects={n: float(np.mean(x)) for n, x in ious.items()})


def recipe_of(name, seed): return StageRecipe(seed=seed, **RUNS[name])


def run(name: str, seed: int = 0, folder: str = "runs/stages", num_scenes: int = 200):
    from paligemma_nb.tasks import machine
    from paligemma_nb.training import run_steps, tiny_processor
    torch.set_num_threads(1)
    recipe, place = recipe_of(name, seed), Path(folder) / f"{name}-{seed}"
    processor, started, before = tiny_processor(), time.process_time(), {}
    model = new_model(processor, recipe)
    # a run that goes on has the pre-training in its state
    if not (place / "state.safetensors").exists():
        if recipe.contrast: before["contrast"] = teach_tower(model, processor, recipe)
        if recipe.texts: before["texts"] = teach_decoder(model, processor, recipe)
        place.mkdir(parents=True, exist_ok=True)
        seconds = time.process_time() - started
        (place / "before.json").write_text(json.dumps(dict(losses=before, seconds=seconds)))
    wall, core = time.perf_counter(), time.process_time()
    history = run_steps(place, model, optimizers_of(model, recipe), recipe,
                        lambda first: batches(processor, recipe, first),
                        lambda history: marks(model, processor, max(1, num_scenes // 5)),
                        save_every=100, evaluate_every=max(1, recipe.steps // 4))
    share = (time.process_time() - core) / (time.perf_counter() - wall)
    found = dict(name=name, seed=seed, recipe=asdict(recipe), machine=machine(),
                 core_share=share, before=json.loads((place / "before.json").read_text()),
                 history=history, end=marks(model, processor, num_scenes))
    (place.parent / f"{name}-{seed}.json").write_text(json.dumps(found))
    print(table([found]), flush=True)


# --- all of them

SHOWN = dict(caption="right", color="right", shape="right", count="right", exists="right",
             where="right", detect="iou")


def table(runs):
    heads = ["run", "seed", "minutes", *SHOWN, "detect, one object", "loss"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in runs:
        minutes = sum(row["seconds"] for row in r["history"]) * r["core_share"] / 60
        values = [r["end"][kind][mark] for kind, mark in SHOWN.items()]
        values += [{int(n): x for n, x in r["end"]["detect_by_objects"].items()}[1],
                   r["history"][-1]["loss"]]
        cells = [r["name"], r["seed"], f"{minutes:.0f}", *(f"{x:.2f}" for x in values)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def at_the_edge(runs): # optimizers whose lowest loss has no higher one on each side
    def losses(optimizer, rate): # base is Muon at the recipe's own rate
        own = optimizer == "muon" and rate == Recipe().muon_lr
        name = "base" if own else f"{optimizer} {rate:g}"
        return [r["history"][-1]["loss"] for r in runs if r["name"] == name]

    found = []
    for optimizer, rates in RATES.items():
        if not any(r["name"].startswith(optimizer) for r in runs): continue
        tried = [np.mean(some) for rate in rates if (some := losses(optimizer, rate))]
        if np.argmin(tried) in (0, len(tried) - 1): found.append(optimizer)
    return found


def known(folder, output): # runs by these recipes, from an earlier output and the folder
    earlier = json.loads(Path(output).read_text())["runs"] if Path(output).exists() else []
    pairs = [(name, seed) for name in RUNS for seed in SEEDS]
    files = (Path(folder, f"{name}-{seed}.json") for name, seed in pairs)
    runs = {(r["name"], r["seed"]): r for r in [
        *earlier, *(json.loads(path.read_text()) for path in files if path.exists())]}
    return {pair: runs[pair] for pair in pairs
            if pair in runs and runs[pair]["recipe"] == asdict(recipe_of(*pair))}


def gather(folder: str = "runs/stages", output: str = OUTPUT):
    from machine import machine_line, rows_on_lines
    torch.set_num_threads(1)
    found = known(folder, output)
    runs = [r for (name, _), r in found.items() if all((name, s) in found for s in SEEDS)]
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"),
                times="several runs shared a busy machine: minutes are not to be compared",
                no_best_rate_yet=at_the_edge(runs))
    Path(output).write_text(rows_on_lines(head, "runs", runs))
    print(table(runs), f"written: {output}", sep="\n")
    for optimizer in head["no_best_rate_yet"]:
        print(f"{optimizer}: its best rate is the first or the last, add one beyond to RATES")


def all_runs(folder: str = "runs/stages", output: str = OUTPUT):
    for seed in SEEDS:
        for name in RUNS:
            if (name, seed) not in known(folder, output): run(name, seed, folder)
    gather(folder, output)


if __name__ == "__main__":
    import fire
    fire.Fire(dict(run=run, gather=gather, all=all_runs))
