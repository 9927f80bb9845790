"""One of several processes: fine-tunes a small model in every way and leaves the results.

    python -m torch.distributed.run --nproc_per_node 2 tests/sharing.py FOLDER
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from paligemma_nb import finetuning, load_model
from paligemma_nb.datasets import open_dataset
from paligemma_nb.finetuning import FinetuneRecipe, finetune
from paligemma_nb.scale import Team, several_processes
from paligemma_nb.scenes import make_scene
from paligemma_nb.training import learning_weights, team

WAYS = [(method, kind, fsdp) for method in ("full", "lora") for kind in ("sgd", "adamw")
        for fsdp in (False, True)]


def recipe(method):
    return FinetuneRecipe(method, 20, 4, learning_rate=1e-3, rank=2, replay=0, autocast=False)


def rows(): # suffixes of very different lengths
    texts = ["red", "a red ring " * 12, "no", "blue ring and a red circle " * 5, "green"]
    return open_dataset([dict(image=make_scene(k).image, prefix="caption en",
                              suffix=text.strip()) for k, text in enumerate(texts)])


def sgd(model, recipe): return dict(adamw=torch.optim.SGD(learning_weights(model).values()))


def run(folder, method, kind, stop=None): # -> history, final weights
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
    try:
        finetune(model, processor, rows(), None, folder, recipe(method), evaluate_every=8)
    except KeyboardInterrupt: pass
    finally:
        finetuning._optimizers = optimizers
        finetuning.run_steps.__globals__["train_step"] = step
    return losses, {n: p.detach() for n, p in learning_weights(model).items()}


def main(folder):
    with several_processes():
        for method, kind, fsdp in WAYS:
            name = f"{method}-{kind}-{fsdp}"
            team[0] = Team(fsdp)
            losses, weights = run(folder / name, method, kind)
            if team[0].rank: continue
            save_file({n: p.contiguous() for n, p in weights.items()},
                      folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(losses))
        for fsdp in (False, True):
            team[0] = Team(fsdp)
            run(folder / f"stopped-{fsdp}", "full", "adamw", stop=13)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
