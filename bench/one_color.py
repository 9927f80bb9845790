"""Where color does not help: `where` questions by what the colors of a scene can tell.

    python bench/one_color.py practise --folder runs/one_color # half an hour; can be stopped
    python bench/one_color.py ask --folder runs/one_color      # -> nbs/data/31_one_color.json

Someone who goes by color alone asks where everything red is on average, and where everything
blue. That is right in most scenes ("right"), wrong in some in which a third thing has one of
the two colors ("wrong"), and no answer at all if both things are red ("none"). `practise` goes
on from the shipped model with 24 of 32 scenes in one color, and weight on `where`; `ask` marks
the shipped model and that one, on validation scenes.
"""
import re
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from paligemma_nb.training import Recipe

OUTPUT = str(Path(__file__).resolve().parents[1] / "nbs/data/31_one_color.json")
ONE_COLOR = 24  # scenes in a batch
STEPS = 1_000   # then it was stopped, with its rate still at the peak


@dataclass(frozen=True)
class OneColor(Recipe):
    "First come scenes of different things in one color."
    def wants(self, i, scene):
        one = len({o.color for o in scene.objects}) == 1 < len(scene.things())
        return i >= ONE_COLOR or one


PRACTICE = OneColor(
    1_500, 0, warmup_steps=50, decay_steps=500, seed=7, length_power=0.5, kind_weights=dict(
        caption=3, detect=4, absent=1, count=1, exists=1, color=1, shape=1, where=40,
        segment=4, segment_absent=0.5, several=8, several_absent=1, unanswerable=1))


def practise(folder: str = "runs/one_color"):
    from paligemma_nb import load_model
    from paligemma_nb.scenes import VALIDATION
    from paligemma_nb.tasks import evaluate
    from paligemma_nb.training import make_batch, make_optimizers, run_steps
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    history = run_steps(
        folder, model, make_optimizers(model, PRACTICE), PRACTICE,
        lambda first: (make_batch(processor, PRACTICE, step) for step in count(first)),
        lambda history: evaluate(model, processor, 64, VALIDATION)[0],
        save_every=100, evaluate_every=500,
        is_done=lambda history: bool(history) and history[-1]["step"] >= STEPS)
    print(*(f"step {row['step']}: loss {row['loss']:.3f}" for row in history), sep="\n")


def by_color(scene, prompt): # does going by color answer it: "right", "wrong" or "none"?
    first, word, second = re.match(
        r"answer en is the (.+) (left of|right of|above|below) the (.+)\?", prompt).groups()
    a, b = (scene.things()[name][0] for name in (first, second))
    if a.color == b.color: return "none"
    axis = 0 if word in ("left of", "right of") else 1
    mean_a, mean_b = (np.mean([o.center[axis] for o in scene.objects if o.color == color])
                      for color in (a.color, b.color))
    same = (mean_a < mean_b) == (a.center[axis] < b.center[axis])
    return "right" if same else "wrong"


def marks(model, processor, num_scenes): # -> {by_color: [right, asked]}, of all questions
    from paligemma_nb import generate
    from paligemma_nb.opening import in_batches
    from paligemma_nb.scenes import VALIDATION, make_scene
    asked = []
    for seed in range(VALIDATION, VALIDATION + num_scenes):
        scene = make_scene(seed)
        asked += [(scene, f"answer en {question}", answer)
                  for question, answer, kind in scene.questions() if kind == "where"]
    found = {name: [0, 0] for name in ("right", "wrong", "none")}
    for rows in in_batches(asked, 128):
        inputs = processor([scene.pixels for scene, *_ in rows], [p for _, p, _ in rows])
        texts = processor.decode(generate(model, inputs, max_new_tokens=4))
        for (scene, prompt, answer), text in zip(rows, texts):
            cell = found[by_color(scene, prompt)]
            cell[0] += text == answer
            cell[1] += 1
    return found


def ask(folder: str = "runs/one_color", num_scenes: int = 1_000, output_file: str = OUTPUT):
    from machine import machine_line, rows_on_lines
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint
    from paligemma_nb.training import load_state, make_optimizers
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    start, before = fingerprint(model), marks(model, processor, num_scenes)
    step, history = load_state(Path(folder) / "state.safetensors", model,
                               make_optimizers(model, PRACTICE), PRACTICE)
    found = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"), start=start,
                 num_scenes=num_scenes, recipe=asdict(PRACTICE), one_color=ONE_COLOR,
                 steps=step, before=before, after=marks(model, processor, num_scenes))
    for when in ("before", "after"):
        told = (f"{name} {right}/{of} = {right / of:.3f}"
                for name, (right, of) in found[when].items())
        print(f"{when}, where color is", *told)
    Path(output_file).write_text(rows_on_lines(found, "history", history))
    print(f"written: {output_file}")


if __name__ == "__main__":
    import fire
    fire.Fire(dict(practise=practise, ask=ask))
