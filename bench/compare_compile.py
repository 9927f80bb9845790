"""Packed weights beside torch.compile, which can lay weights out as well, and fuses more.

    python bench/compare_compile.py --folder weights --results bench/results

PaliGemma 3B with random weights; 24 GB of memory, too little for the ways side by side. So
each runs in processes of its own, in turns: it opens the model and writes the same answer
several times. The first answer pays for packing or compiling; of the later ones there are the
medians and the best. Between the processes the machine's pace is noted. Compiling needs a C++
compiler.
"""
import json
import sys
import tempfile
import time
from functools import partial
from statistics import median

import torch

from machine import Pace, peak_bytes, process, timed, write_results
from models import full_size, make_inputs

WAYS = "as stored", "packed", "compiled"


def alone(folder, way, answers, new_tokens):
    from paligemma_nb import load_model
    from paligemma_nb.generation import generate_tokens
    from paligemma_nb.speed import pack
    start = time.perf_counter()
    model, processor = load_model(folder, device="cpu", dtype="bfloat16")
    model.requires_grad_(False).config.eos_token_id = -1  # all answers have the same length
    if way == "packed": pack(model)
    if way == "compiled":
        import torch._inductor.config
        # weights become constants, laid out for the processor; no other run's code counts
        torch._inductor.config.freezing = torch._inductor.config.force_disable_caches = True
        model.forward = torch.compile(model.forward)
    inputs, first, further = make_inputs(processor), [], []
    for i in range(answers):
        write = partial(next, generate_tokens(model, inputs, max_new_tokens=new_tokens))
        times = [timed(write) for _ in range(new_tokens)]
        if i == 0: ready = time.perf_counter() - start
        elif i > 1:  # the second may compile again, for another number of tokens in the cache
            first += times[:1]
            further += times[1:]
    print(json.dumps(dict(ready=ready, first=first, further=further, peak=peak_bytes() / 1e6)))


def figures(runs): # of one way, one for each of its processes
    first, further = (sum((run[key] for run in runs), []) for key in ("first", "further"))
    return {"open and first answer (s)": median(run["ready"] for run in runs),
            "first token (ms)": median(first), "each further token (ms)": median(further),
            "peak memory (MB)": median(run["peak"] for run in runs),
            "first token, best (ms)": min(first),
            "each further token, best (ms)": min(further)}


def compare(
    rounds: int = 2,    # of the three ways, one after the other
    answers: int = 6,   # by each process; the first two are not timed
    new_tokens: int = 16,
    threads: int = 2,
    results: str = "",  # write a file of this machine in here, as in bench/results
    folder: str = "",   # where full-size weights stay for the next time
    way: str = "",      # used by this script to start itself
):
    torch.set_num_threads(threads)
    if way: return alone(folder, way, answers, new_tokens)
    if answers < 3 or new_tokens < 2:
        sys.exit("expected --answers 3 or more, and --new_tokens 2 or more")
    found, pace = {way: [] for way in WAYS}, Pace()
    with tempfile.TemporaryDirectory() as temporary:
        model = full_size("3b", folder or temporary)
        for _ in range(rounds):
            for way in WAYS:
                pace.note()
                flags = dict(folder=model, way=way, answers=answers, new_tokens=new_tokens)
                found[way].append(process(__file__, **flags, threads=threads))
                print(way, figures(found[way][-1:]), flush=True)
    pace.note()
    print(pace.line())
    told = dict(new_tokens=new_tokens, rounds=rounds, pace=pace.line(), pace_ms=pace.times)
    told |= {way: figures(runs) for way, runs in found.items()} | dict(runs=found)
    if results: write_results(results, "compile", told)


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
