"""What more pixels are worth: the shipped model goes on with pictures of 112 and of 224 px.

    python bench/resolution.py all --folder runs/resolution # -> nbs/data/36_resolution.json
    python bench/resolution.py run 224 --seed 1             # or one

At 224 px the positions are interpolated, and each picture has four times the tokens. Both see
the same scenes in the same order and get as many steps; a step at 224 px takes two to three
times as long, and `seconds` says it. Boxes are also marked by the size of the object. A run
has one thread and can be stopped at any moment; called again, it goes on.
"""
import json
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import torch

from paligemma_nb.training import Recipe

OUTPUT = str(Path(__file__).resolve().parents[1] / "nbs/data/36_resolution.json")
SIZES, SEEDS = (112, 224), (0, 1)
EDGES = 0, 0.3, 0.36, 1  # of small, middle, large: a box's longer side, in the picture's


def recipe_of(seed): # a stage of its own: rates that sink from the start
    return Recipe(400, 0, scenes_per_step=16, warmup_steps=20, decay_steps=380, seed=seed,
                  length_power=0.5, kind_weights=dict(
                      caption=2, detect=4, count=1, exists=1, where=4, several=2))


def marks(model, processor, num_scenes): # by kind; boxes also by the size of the object
    from paligemma_nb.scenes import VALIDATION
    from paligemma_nb.tasks import evaluate
    from stages import boxes_by

    def size(a): # 0, 1, 2: small, middle, large
        x1, y1, x2, y2 = a.example.objects[0].box
        side = max(x2 - x1, y2 - y1) / processor.image_size
        return int(np.searchsorted(EDGES, side)) - 1

    found, answers = evaluate(model, processor, num_scenes, VALIDATION)
    ious = boxes_by(size, answers)
    return found | dict(iou_by_size=[float(np.mean(some)) for some in ious.values()],
                        asked_by_size=[*map(len, ious.values())])


def run(size: int, seed: int = 0, folder: str = "runs/resolution", num_scenes: int = 200):
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint
    from paligemma_nb.stages import at_resolution
    from paligemma_nb.tasks import machine
    from paligemma_nb.training import make_batch, make_optimizers, run_steps
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    start, recipe, place = fingerprint(model), recipe_of(seed), Path(folder)
    model, processor = at_resolution(model, processor, size)
    path = place / f"before-{size}.json"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(marks(model, processor, num_scenes)))
    history = run_steps(
        place / f"{size}-{seed}", model, make_optimizers(model, recipe), recipe,
        lambda first: (make_batch(processor, recipe, step) for step in count(first)),
        lambda history: marks(model, processor, num_scenes),
        save_every=50, evaluate_every=recipe.steps)
    found = dict(size=size, seed=seed, start=start, recipe=asdict(recipe), machine=machine(),
                 before=json.loads(path.read_text()), history=history)
    (place / f"{size}-{seed}.json").write_text(json.dumps(found))
    print(table([found]), flush=True)


def table(runs):
    from paligemma_nb.tasks import markdown
    rows = [["px", "seed", "minutes", "several", "where", "boxes", "small", "middle", "large"]]
    for r in runs:
        minutes = sum(row["seconds"] for row in r["history"]) / 60
        for m, spent in ((r["before"], 0.0), (r["history"][-1]["marks"], minutes)):
            values = m["several"]["all_found"], m["where"]["right"], m["detect"]["iou"]
            rows.append([str(r["size"]), str(r["seed"]), f"{spent:.1f}",
                         *(f"{x:.3f}" for x in (*values, *m["iou_by_size"]))])
    return markdown(rows)


def all_runs(folder: str = "runs/resolution", output: str = OUTPUT):
    from machine import machine_line, rows_on_lines
    torch.set_num_threads(1)
    pairs = [(size, seed) for seed in SEEDS for size in SIZES]
    files = [Path(folder, f"{size}-{seed}.json") for size, seed in pairs]
    for (size, seed), path in zip(pairs, files):
        if not path.exists(): run(size, seed, folder)
    runs = [json.loads(path.read_text()) for path in files]
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"), edges=EDGES)
    Path(output).write_text(rows_on_lines(head, "runs", runs))
    print(table(runs), f"written: {output}", sep="\n")


if __name__ == "__main__":
    import fire
    fire.Fire(dict(run=run, all=all_runs))
