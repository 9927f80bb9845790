"""Handwriting for a model that has seen drawn shapes alone: which method learns it, and when.

    python bench/digits.py run --method full --muon --folder runs/digits      # minutes
    python bench/digits.py run --method lora --seed 1 --folder runs/digits
    python bench/digits.py gather --folder runs/digits    # -> nbs/data/35_digits.json

The 1,797 digits of scikit-learn were written by 43 people. Numbers of one to four of them
stand on a canvas of 112 px, in a grid of 4 by 4 (anywhere else the tower's patches would cut
them differently each time, and learning would take longer). The model is asked what is
written, and where a digit is. It learns from the first 1,400 digits and is marked on the
others, and on captions of the scenes that it knew before: what it learned, what it forgot. A
share of the rows are old questions about scenes that it was trained on.

Logistic regression says how hard it is to read a single digit: the last 397 were written by
other people than the first 1,400, mostly, and that makes much of a difference to it.

The small tokenizer has no token for 5 to 9: it spells them as bytes. Answers are no longer for
that, but nothing that the model was trained on holds these tokens, so it had learned never to
write them (`first_losses`); LoRA and `frozen` leave their rows of the embedding as they are.

A run has one thread, and notes which share of a core it got: several may share a machine.
"""
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FIRST_HELD_OUT = 1_400  # of the digits
SIDE, INK = 112, 28     # px of the canvas, and of a digit on it
QUESTION = "answer en what number is written?"


# --- the pictures

def digits(held_out=False): # -> pixels [n, 8, 8] 0 … 16, and their values [n]
    from sklearn.datasets import load_digits
    part = slice(FIRST_HELD_OUT, None) if held_out else slice(FIRST_HELD_OUT)
    data = load_digits()
    return data.images[part], data.target[part]


def draw_number(pixels, values, rng): # -> picture, digits as text, their Detections
    from paligemma_nb.detection import Detection
    n, places = rng.integers(1, 5), SIDE // INK
    canvas, found = np.zeros((SIDE, SIDE), np.uint8), []
    x, y = INK * rng.integers(places - n + 1), INK * rng.integers(places)
    for i in rng.integers(len(values), size=n):
        digit = Image.fromarray((pixels[i] * 255 / 16).astype(np.uint8))
        canvas[y:y + INK, x:x + INK] = digit.resize((INK, INK), Image.Resampling.BICUBIC)
        box = tuple(map(float, (x, y, x + INK, y + INK)))
        found.append(Detection(str(values[i]), box))
        x += INK
    return Image.fromarray(255 - canvas).convert("RGB"), "".join(d.label for d in found), found


def number_rows(num, seed, held_out=False): # each number is asked for, in a third a digit, too
    from paligemma_nb.detection import format_detections
    (pixels, values), rng, rows = digits(held_out), np.random.default_rng([seed, held_out]), []
    for i in range(num):
        image, text, found = draw_number(pixels, values, rng)
        rows.append(dict(image=image, prefix=QUESTION, suffix=text))
        if i % 3: continue
        absent = [d for d in "0123456789" if d not in text]
        asked = rng.choice(absent if rng.random() < 0.3 else [*text])
        things = [d for d in found if d.label == asked]
        rows.append(dict(image=image, prefix=f"detect {asked}",
                         suffix=format_detections(things, image.size)))
    return rows


def old_rows(num, seed): # what the model was trained on: one question about each scene
    from paligemma_nb.scenes import make_scene
    from paligemma_nb.tasks import sample_examples
    rng, rows = np.random.default_rng([seed, 2]), []
    for i in range(num):
        scene = make_scene(i, SIDE)
        example, = sample_examples(scene, 1, rng)
        rows.append(dict(image=scene.image, prefix=example.prompt, suffix=example.suffix))
    return rows


def caption_rows(num): # of scenes that were never trained on
    from paligemma_nb.scenes import HELD_OUT, make_scene
    scenes = [make_scene(HELD_OUT + i, SIDE) for i in range(num)]
    return [dict(image=s.image, prefix="caption en", suffix=s.caption) for s in scenes]


# --- the baseline, and what bytes cost

def baseline(): # single digits, 64 numbers each
    from sklearn.linear_model import LogisticRegression
    x, y = map(np.concatenate, zip(digits(), digits(held_out=True)))
    x, mixed = x.reshape(len(x), -1) / 16, np.random.default_rng(0).permutation(len(x))

    def right(order):
        seen, unseen = order[:FIRST_HELD_OUT], order[FIRST_HELD_OUT:]
        model = LogisticRegression(max_iter=1_000).fit(x[seen], y[seen])
        return model.score(x[unseen], y[unseen])
    start = time.perf_counter()
    held_out = right(np.arange(len(x)))
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, right=held_out, right_if_mixed=right(mixed),
                right_of_numbers=mean(held_out ** n for n in (1, 2, 3, 4)))


def byte_digits(processor): # those that are no token of their own
    return [d for d in "0123456789" if processor.tokenizer.token_to_id(d) is None]


@torch.no_grad()
def first_losses(model, processor, pictures=8): # of each digit alone, before it learns
    from paligemma_nb.datasets import collate
    from paligemma_nb.training import batch_loss
    rows = [r for r in number_rows(1_000, 0, True) if r["prefix"] == QUESTION]
    losses = {}
    for digit in "0123456789":
        some = [(*r.values(),) for r in rows if r["suffix"] == digit][:pictures]
        losses[digit] = batch_loss(model, collate(processor, some)).item()
    return losses


def right_digits(judged, wanted): # share of these digits that stand in their place, or None
    pairs = [(a, b) for j in judged if j.prefix == QUESTION
             for a, b in zip(j.suffix, j.text.ljust(len(j.suffix))) if a in wanted]
    return mean(a == b for a, b in pairs) if pairs else None


# --- one run

def run(
    folder: str = "runs/digits", # gets a folder with the state, and NAME.json
    method: str = "full",
    muon: bool = False,
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 32,
    old: float = 0.2,            # share of rows from the scenes that it was trained on
    replay: float = 0.0,         # share of its own answers about the new pictures
    learning_rate: float = None,
    pictures: int = 6_000,       # to learn from
    unseen: int = 100,           # pictures to be marked on, and as many scenes
    evaluations: int = 8,
):
    from paligemma_nb import load_model
    from paligemma_nb.datasets import open_dataset
    from paligemma_nb.finetuning import FinetuneRecipe, finetune, measure_rows
    from paligemma_nb.tasks import evaluate, machine
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    rows = number_rows(pictures, seed)
    train = open_dataset(rows + old_rows(round(len(rows) * old / (1 - old)), seed))
    valid = open_dataset(number_rows(unseen, 0, held_out=True) + caption_rows(unseen))
    recipe = FinetuneRecipe(method, steps, batch_size, learning_rate=learning_rate,
                            replay=replay, seed=seed, muon=muon)
    name = f"{method}{'-muon' * muon}-{steps}-{old:g}-{replay:g}-{seed}"
    marks = measure_rows(model, processor, valid)[0]
    before = dict(step=0, loss=None, seconds=0.0, marks=marks)
    wall, core = time.perf_counter(), time.process_time()
    history = finetune(model, processor, train, valid, Path(folder) / name, recipe,
                       evaluate_every=-(-steps // evaluations), patience=steps)
    share = (time.process_time() - core) / (time.perf_counter() - wall)
    judged = measure_rows(model, processor, valid)[1]
    spelled = byte_digits(processor)
    others = [d for d in "0123456789" if d not in spelled]
    found = dict(
        name=name, recipe=asdict(recipe), pictures=pictures, old=old, machine=machine(),
        core_share=share, history=[before, *history],
        old_tasks=evaluate(model, processor, unseen)[0],
        digits_right=dict(tokens=right_digits(judged, others),
                          bytes=right_digits(judged, spelled)))
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps(found))
    print(table([found]))


# --- all of them

def marks(row): # of one evaluation: numbers read, IoU of boxes, captions, each 0 … 1
    found = row["marks"]
    return found["answer"]["exact"], found["detect"]["iou"], found["caption"]["exact"]


def best(run): # the evaluation whose weights `finetune` keeps
    rows = [row["marks"]["all"] for row in run["history"][1:] if row.get("marks")]
    return max(rows, key=lambda found: (found["mark"], -found["loss"]))


def table(runs): # single digits are marked with the weights that were kept
    heads = ("method", "seed", "old rows", "replay", "steps", "core seconds", "numbers read",
             "IoU of `detect`", "captions of scenes", "digits: tokens, bytes")
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in runs:
        recipe, seconds = r["recipe"], 0.0
        name = recipe["method"] + ", Muon" * recipe["muon"]
        for row in r["history"]:
            seconds += row["seconds"] * r["core_share"]
            if not row.get("marks"): continue
            kept = row["marks"]["all"] == best(r)
            kinds = "{tokens:.0%}, {bytes:.0%}".format(**r["digits_right"]) if kept else ""
            cells = [name, recipe["seed"], r["old"], recipe["replay"], row["step"],
                     f"{seconds:.0f}", *(f"{mark:.0%}" for mark in marks(row)), kinds]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def gather(folder: str = "runs/digits", output: str = str(ROOT / "nbs/data/35_digits.json")):
    from machine import machine_line, rows_on_lines
    from paligemma_nb import load_model
    model, processor = load_model(device="cpu", dtype="float32")
    runs = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"),
                times="several runs shared a busy machine: core seconds are about right",
                baseline=baseline(), digits_spelled_in_bytes=byte_digits(processor),
                first_losses=first_losses(model, processor))
    Path(output).write_text(rows_on_lines(head, "runs", runs))
    print(json.dumps(head, indent=1), table(runs), f"written: {output}", sep="\n")


if __name__ == "__main__":
    import fire
    fire.Fire(dict(run=run, gather=gather))
