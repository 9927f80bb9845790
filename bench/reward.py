"""Practice by rewards, and plain training for the same time: the runs of lesson 37.

    python bench/reward.py all --folder runs/reward          # every run, then gather
    python bench/reward.py run practice --seed 1             # or one: see KINDS
    python bench/reward.py gather                            # -> nbs/data/37_reward.json

All start from the same weights and see the same prompts, `detect` of two things, about the
same scenes. The stored runs began where four of the seven stages ended (`--model_path` of a
folder of those weights, from this repository's history, repeats them); the default is the
shipped model. `practice` samples answers and gets a reward for each; `plain` is given the true
ones, in as many passes over the scenes as fit into the same time of a core. `free` practises
without the pull towards the start, `hits` for a reward that asks to be hacked. `fresh` is
`plain` with new scenes in each step, as true answers cost nothing here; `hasty` is `plain`
with about three times its rates.

A run has one thread and can be stopped at any moment; called again, it goes on. It notes which
share of a core it got, since several may share a machine; of one that was stopped, only its
last part, so that its time is not to be compared.
"""
import json
import time
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = str(ROOT / "nbs/data/37_reward.json")
SEVERAL = dict(several=1)  # what is practised
EVERY = 20                 # steps of practice between two exams
KINDS = dict(practice={}, hits=dict(reward="hits", steps=30), free=dict(kl=0.0),  # by rewards
             plain={}, fresh={}, hasty=dict(muon_lr=1e-3, adamw_lr=5e-4))         # by answers
PLAIN = "plain", "fresh", "hasty"
ALL = (("practice", 0), ("plain", 0), ("hits", 0), ("practice", 1), ("plain", 1), ("free", 0),
       ("practice", 2), ("plain", 2), ("hasty", 0), ("fresh", 0))


def reward_recipe(kind, seed):
    from paligemma_nb.reward import RewardRecipe
    settings = {} if kind in PLAIN else KINDS[kind]
    return RewardRecipe(seed=seed, kind_weights=SEVERAL, **settings)


def plain_recipe(kind, seed): # its steps take as long as those of practice do
    from paligemma_nb.training import Recipe
    recipe = Recipe(steps=300, single_object_steps=0, scenes_per_step=32, prompts_per_scene=1,
                    muon_lr=3e-4, adamw_lr=1.5e-4, warmup_steps=20, decay_steps=280,
                    length_power=0.5, seed=seed, kind_weights=SEVERAL)
    return replace(recipe, **KINDS[kind])


def train_plainly(folder, model, processor, recipe, practice, fresh):
    from paligemma_nb.reward import exam, practice_prompts
    from paligemma_nb.training import make_optimizers, run_steps
    n, per_step = recipe.scenes_per_step, practice.scenes_per_step

    def batches(first):
        pool = [pair for step in range(practice.steps)
                for pair in practice_prompts(practice, step, processor.image_size)]
        for step in count(first):
            if fresh: # what practice would see later, two of its steps at a time
                later = practice.steps + step * n // per_step
                some = [pair for k in range(later, later + n // per_step)
                        for pair in practice_prompts(practice, k, processor.image_size)]
            else:
                done, at = divmod(step * n, len(pool))  # passes; place in this one
                order = np.random.default_rng([recipe.seed, done]).permutation(len(pool))
                some = [pool[i] for i in order[at:at + n]]
            scenes, examples = zip(*some)
            yield processor([s.pixels for s in scenes], [e.prompt for e in examples],
                            [e.suffix for e in examples])

    every = recipe.steps * EVERY // practice.steps
    return run_steps(folder, model, make_optimizers(model, recipe), recipe, batches,
                     lambda history: dict(right=exam(model, processor, SEVERAL)[0]),
                     every, every)


def sampled(model, processor, num_scenes=240): # -> reward and right ones, of four answers each
    from paligemma_nb.reward import RewardRecipe, sample_answers
    from paligemma_nb.scenes import HELD_OUT, make_scene
    from paligemma_nb.tasks import sample_examples
    rewards = []
    for first in range(0, num_scenes, 24):
        scenes = [make_scene(HELD_OUT + i) for i in range(first, first + 24)]
        asked = [(s, *sample_examples(s, 1, np.random.default_rng(s.seed), SEVERAL))
                 for s in scenes]
        *_, found = sample_answers(model, processor, asked, RewardRecipe(samples=4), first)
        rewards.append(found)
    rewards = torch.cat(rewards)  # a right answer has more than 0.5
    return dict(reward=rewards.mean().item(), right=(rewards > 0.5).float().mean().item())


def shown(answers): return [dict(seed=a.seed, prompt=a.example.prompt, text=a.text)
                            for a in answers[:40]]


def told(model, processor, hacked=False): # what a model can do: two things at once, and all
    from paligemma_nb.reward import exam
    from paligemma_nb.scenes import HELD_OUT
    from paligemma_nb.tasks import evaluate
    right, answers = exam(model, processor, SEVERAL, 100 if hacked else 1_000, HELD_OUT)
    found = dict(right=right, answers=shown(answers))
    if hacked: return found  # its answers are long, and there is nothing more to be known
    return found | dict(sampled=sampled(model, processor),
                        marks=evaluate(model, processor, 150)[0])


def run(kind: str = "practice", seed: int = 0, folder: str = "runs/reward",
        model_path: str | None = None):
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint, practise
    from paligemma_nb.tasks import machine
    torch.set_num_threads(1)
    model, processor = load_model(model_path, device="cpu", dtype="float32")
    recipe, start, place = reward_recipe(kind, seed), fingerprint(model), Path(folder)
    wall, core, name = time.perf_counter(), time.process_time(), f"{kind}-{seed}"
    if kind in PLAIN:
        practice, recipe = recipe, plain_recipe(kind, seed)
        history = train_plainly(place / name, model, processor, recipe, practice,
                                kind == "fresh")
    else:
        recipe = replace(recipe, start=start)
        history = practise(place / name, model, processor, recipe, EVERY)
    share = (time.process_time() - core) / (time.perf_counter() - wall)
    found = dict(kind=kind, seed=seed, start=start, recipe=asdict(recipe), machine=machine(),
                 core_share=share, history=history, end=told(model, processor, kind == "hits"))
    (place / f"{name}.json").write_text(json.dumps(found))
    print(table([found]), flush=True)


def seconds(r): return sum(row["seconds"] for row in r["history"]) * r["core_share"]


def table(runs):
    heads = "kind", "seed", "core seconds", "two things right", "captions", "where", "counts"
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in runs:
        marks = r["end"].get("marks")
        cells = [r["kind"], r["seed"], f"{seconds(r):.0f}", f"{r['end']['right']:.3f}"]
        for kind in ("caption", "where", "count"):
            cells.append(f"{marks[kind]['right']:.3f}" if marks else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def before(folder, model, processor, start): # what these weights can do, measured once
    from paligemma_nb.reward import exam
    path = Path(folder) / f"before-{start}.json"
    if not path.exists():
        right = exam(model, processor, SEVERAL)[0]  # the exam of all histories
        path.write_text(json.dumps(told(model, processor) | dict(exam=right)))
    return json.loads(path.read_text())


def gather(folder: str = "runs/reward", output: str = OUTPUT, model_path: str | None = None):
    from machine import machine_line, rows_on_lines
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint
    torch.set_num_threads(1)
    model, processor = load_model(model_path, device="cpu", dtype="float32")
    files = (Path(folder, f"{kind}-{seed}.json") for kind, seed in ALL)
    runs = [json.loads(path.read_text()) for path in files if path.exists()]
    start = fingerprint(model)
    if other := [r["start"] for r in runs if r["start"] != start]:
        raise SystemExit(f"{folder} holds a run from weights {other[0]}, these are {start}")
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"), start=start,
                times="several runs shared a busy machine: core seconds are about right",
                before=before(folder, model, processor, start))
    Path(output).write_text(rows_on_lines(head, "runs", runs))
    print(table(runs), f"written: {output}", sep="\n")


def all_runs(folder: str = "runs/reward", output: str = OUTPUT, model_path: str | None = None):
    for kind, seed in ALL:
        if not Path(folder, f"{kind}-{seed}.json").exists():
            run(kind, seed, folder, model_path)
    gather(folder, output, model_path)


if __name__ == "__main__":
    import fire
    fire.Fire(dict(run=run, gather=gather, all=all_runs))
