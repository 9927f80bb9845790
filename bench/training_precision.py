"""What bfloat16 costs in training, here and on processors without instructions for it.

    python bench/training_precision.py --results bench/results
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python bench/training_precision.py …

Loss and gradient of the shipped model on 16 rows, in float32 and under bfloat16's autocast,
and the step of its 52 matrices by our Muon (in float32) and by PyTorch's (in bfloat16):
seconds of one core, in turns, medians. They hardly depend on who else is at work.
"""
import time
from statistics import median

import fire
import torch

from machine import write_results


def measure(works, repeats): # name -> something to do; -> name: median seconds of processor
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: median(found) for name, found in times.items()}


def main(results: str | None = None, repeats: int = 5, rows: int = 16):
    from paligemma_nb import load_model
    from paligemma_nb.training import Muon, Recipe, make_batch, make_optimizers
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu", dtype="float32")
    batch = {k: x[:rows] for k, x in make_batch(processor, Recipe(), 4_000).items()}

    def gradient(bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**batch).loss
        loss.backward()

    gradient(False)
    matrices = make_optimizers(model, Recipe())["muon"].param_groups[0]["params"]
    muon = dict(float32=Muon(matrices, lr=0.0), bfloat16=torch.optim.Muon(matrices, lr=0.0))
    found = dict(rows_of_batch=rows, matrices=len(matrices), repeats=repeats, gradient=measure(
        dict(float32=lambda: gradient(False), bfloat16=lambda: gradient(True)), repeats))
    steps = {name: optimizer.step for name, optimizer in muon.items()}
    found["muon"] = measure(steps, repeats)
    for work in ("gradient", "muon"):
        print(f"{work}:", ", ".join(f"{s:.2f} s in {kind}" for kind, s in found[work].items()))
    if results: write_results(results, "training_precision", found)


if __name__ == "__main__": fire.Fire(main)
