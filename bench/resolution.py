"""What more pixels are worth: the shipped model goes on with pictures of 112 and of 224 px.

    python bench/resolution.py all --folder runs/resolution # -> nbs/data/36_resolution.json
    python bench/resolution.py run 224 --seed 1             # or one

At 224 px the table of places is interpolated, as the published models did it, and each picture
has four times the tokens. Both see the same scenes in the same order and get as many steps; a
step at 224 px takes about four times as long, and `seconds` says it. Marks of boxes are also
taken by the size of the object. A run has one thread and can be stopped at any moment.
"""
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from paligemma_nb.training import Recipe

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = str(ROOT / "nbs/data/36_resolution.json")
SIZES, SEEDS = (112, 224), (0, 1)
EDGES = 0, 0.3, 0.36, 1  # of an object's box, as a part of the picture's side: about a third each


def resolution_recipe(seed): # a late stage: small rates that only sink
    return Recipe(steps=300, single_object_steps=0, scenes_per_step=16, muon_lr=1e-3,
                  adamw_lr=5e-4, warmup_steps=20, decay_steps=280, length_power=0.5, seed=seed,
                  kind_weights=dict(caption=2, detect=4, count=1, exists=1, where=4, several=2))


def marks(model, processor, num_scenes, first_seed):
    from paligemma_nb.tasks import evaluate
    found, answers = evaluate(model, processor, num_scenes, first_seed)
    by_size = [[] for _ in EDGES[1:]]
    for a in answers:
        if a.example.kind != "detect" or len(a.example.objects) != 1: continue
        x1, y1, x2, y2 = a.example.objects[0].box
        side = max(x2 - x1, y2 - y1) / processor.image_size
        by_size[np.searchsorted(EDGES, side) - 1].append(a.marks["iou"])
    return found | dict(iou_by_size=[float(np.mean(ious)) for ious in by_size],
                        asked_by_size=[len(ious) for ious in by_size])


def run(size: int, seed: int = 0, folder: str = "runs/resolution", num_scenes: int = 150):
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint
    from paligemma_nb.scenes import HELD_OUT
    from paligemma_nb.stages import at_resolution
    from paligemma_nb.tasks import machine
    from paligemma_nb.training import train
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    start, recipe, place = fingerprint(model), resolution_recipe(seed), Path(folder)
    model, processor = at_resolution(model, processor, size)
    path = place / f"before-{size}.json"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(marks(model, processor, num_scenes, HELD_OUT)))
    wall, core = time.perf_counter(), time.process_time()
    history = train(place / f"{size}-{seed}", model, processor, recipe, evaluate_every=100)
    share = (time.process_time() - core) / (time.perf_counter() - wall)
    found = dict(size=size, seed=seed, start=start, recipe=asdict(recipe), machine=machine(),
                 core_share=share, history=history, before=json.loads(path.read_text()),
                 end=marks(model, processor, num_scenes, HELD_OUT))
    (place / f"{size}-{seed}.json").write_text(json.dumps(found))
    print(table([found]), flush=True)


def table(runs):
    from paligemma_nb.tasks import markdown
    rows = [["px", "seed", "core minutes", "two things", "where", "boxes", "small", "middle",
             "large"]]
    for r in runs:
        minutes = sum(row["seconds"] for row in r["history"]) * r["core_share"] / 60
        for when, spent in (("before", 0.0), ("end", minutes)):
            m = r[when]
            values = m["several"]["all_found"], m["where"]["right"], m["detect"]["iou"]
            rows.append([str(r["size"]), str(r["seed"]), f"{spent:.1f}",
                         *(f"{x:.3f}" for x in (*values, *m["iou_by_size"]))])
    return markdown(rows)


def all_runs(folder: str = "runs/resolution", output: str = OUTPUT):
    from machine import brief, machine_line
    torch.set_num_threads(1)
    for seed in SEEDS:
        for size in SIZES:
            if not Path(folder, f"{size}-{seed}.json").exists(): run(size, seed, folder)
    runs = [json.loads(Path(folder, f"{size}-{seed}.json").read_text())
            for seed in SEEDS for size in SIZES]
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"), edges=EDGES)
    lines = [f"  {json.dumps(key)}: {json.dumps(brief(value))}" for key, value in head.items()]
    rows = ",\n    ".join(json.dumps(brief(r)) for r in runs)
    lines.append(f'  "runs": [\n    {rows}\n  ]')
    Path(output).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(table(runs), f"written: {output}", sep="\n")


if __name__ == "__main__":
    import fire
    fire.Fire(dict(run=run, all=all_runs))
