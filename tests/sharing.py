"""One of several processes: trains a small model in every way and leaves the results.

    python -m torch.distributed.run --nproc_per_node 2 tests/sharing.py FOLDER [all]
"""
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from paligemma_nb import finetuning, inference, load_model
from paligemma_nb.datasets import open_dataset
from paligemma_nb.finetuning import FinetuneRecipe, finetune
from paligemma_nb.scale import Team, several_processes
from paligemma_nb.scenes import make_scene
from paligemma_nb.training import Alone, Recipe, learning_weights, team, train

# method, kind, FSDP?
WAYS = [("full", "sgd", False), ("full", "sgd", True), ("lora", "marks", True),
        ("train", "muon", False)]
MORE = [("lora", "sgd", False), ("lora", "sgd", True), ("full", "adamw", False),
        ("full", "adamw", True), ("lora", "adamw", False), ("lora", "adamw", True)]
STOPPED = [("full", "adamw", False), ("full", "adamw", True), ("train", "muon", False)]
FROM_NOTHING = Recipe(steps=20, single_object_steps=10, scenes_per_step=4, warmup_steps=5,
                      decay_steps=10, length_power=.5, autocast=False)


def recipe(method):
    return FinetuneRecipe(method, 20, 4, learning_rate=1e-3, rank=2, replay=0, autocast=False)


def rows(): # suffixes of very different lengths
    texts = ["red", "a red ring " * 12, "no", "blue ring and a red circle " * 5, "green"]
    return open_dataset([dict(image=make_scene(k).image, prefix="caption en",
                              suffix=text.strip()) for k, text in enumerate(texts)])


class InParts(Alone):
    "One process that takes a batch as two would: it adds up the same numbers, to the bit"
    def rows(self, batch):
        return [{n: x.chunk(2)[k] for n, x in batch.items()} for k in range(2)]


def sgd(model, recipe): return dict(adamw=torch.optim.SGD(learning_weights(model).values()))


def run(folder, method, kind, stop=None, in_parts=False): # -> losses, final weights
    from test_finetuning import small_model
    processor = load_model(device="cpu")[1]
    torch.manual_seed(3)
    model = small_model(processor)
    for p in model.parameters(): nn.init.normal_(p, std=.1)
    optimizers, step = finetuning._optimizers, finetuning.run_steps.__globals__["train_step"]
    def train_step(model, optimizers, batch, recipe, number):
        if number == stop: raise KeyboardInterrupt
        losses.append(step(model, optimizers, batch, recipe, number))
        return losses[-1]
    losses = []
    if kind == "sgd": finetuning._optimizers = sgd
    finetuning.run_steps.__globals__["train_step"] = train_step
    valid, before = rows() if kind == "marks" else None, team[0]
    if in_parts: team[0] = InParts()
    try:
        if method == "train":
            train(folder, model, processor, FROM_NOTHING, 8, 20, num_scenes=1)
        else:
            finetune(model, processor, rows(), valid, folder, recipe(method), evaluate_every=8)
    except KeyboardInterrupt: pass
    finally:
        team[0], finetuning._optimizers = before, optimizers
        finetuning.run_steps.__globals__["train_step"] = step
    return losses, {n: p.detach() for n, p in learning_weights(model).items()}


def command(folder, name): # of the output
    return ["finetune", "--data", str(folder / "data" / "annotations.jsonl"), "--steps", "2",
            "--batch_size", "4", "--replay", "0", "--output_path", str(folder / name)]


def main(folder, every=""):
    from test_finetuning import scenes_of_one_color, write_maestro
    with several_processes():
        for method, kind, fsdp in WAYS + MORE * bool(every):
            name = f"{method}-{kind}-{fsdp}"
            team[0] = Team(fsdp)
            losses, weights = run(folder / name, method, kind)
            if team[0].rank: continue
            save_file({n: p.contiguous() for n, p in weights.items()},
                      folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(losses))
        for method, kind, fsdp in STOPPED:
            team[0] = Team(fsdp)
            run(folder / f"stopped-{method}-{fsdp}", method, kind, stop=13)
        if team[0].rank == 0: write_maestro(folder / "data", scenes_of_one_color(0, 4))
        team[0].total(0.)  # it is there
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        inference.main(command(folder, "shared"))  # last: it ends what the processes share


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), *sys.argv[2:])
