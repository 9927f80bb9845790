"""Packed weights beside torch.compile, which can lay weights out as well (freezing), and fuses what lies between.

    python bench/compare_compile.py --output_file result.json   # PaliGemma 3B, random weights; 24 GB of memory

Each way runs in processes of its own, in turns: it opens the model and writes the same answer several times. The first
answer pays for packing or compiling; of the later ones, medians are taken. Compiling needs a C++ compiler.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from compare_transformers import make_inputs, our_moments, peak_bytes, write_full_size

WAYS = "as stored", "packed", "compiled"


def alone(folder, way, answers, new_tokens):
    from paligemma_nb.checkpoint import load_model
    from paligemma_nb.speed import pack
    start = time.perf_counter()
    model, processor = load_model(folder, device="cpu", dtype="bfloat16")
    model.requires_grad_(False).config.eos_token_id = -1  # every answer takes the full number of tokens
    if way == "packed": pack(model)
    if way == "compiled":
        import torch._inductor.config
        torch._inductor.config.freezing = True  # weights become constants, laid out for the processor
        torch._inductor.config.force_disable_caches = True  # what another run has compiled does not count
        model.forward = torch.compile(model.forward)
    inputs, first, further = make_inputs(processor), [], []
    for i in range(answers):
        begin = time.perf_counter()
        moments = our_moments(model, inputs, new_tokens)
        if i == 0: ready = moments[-1] - start
        elif i > 1:  # the second one may compile again, for another number of tokens in the cache
            first.append(moments[0] - begin)
            further += [b - a for a, b in zip(moments, moments[1:])]
    print(json.dumps({"open and first answer (s)": ready, "first token (ms)": 1e3 * median(first),
                      "each further token (ms)": 1e3 * median(further), "peak memory (MB)": peak_bytes() / 1e6}))


def compare(
    rounds: int = 2,        # of the three ways, one after the other
    answers: int = 6,       # by each process; the first two are not timed
    new_tokens: int = 16,
    threads: int = 2,
    output_file: str = "",  # also write the figures here, as JSON
    folder: str = "",       # of a full-size checkpoint that is there already
    way: str = "",          # used by this script to start itself
):
    torch.set_num_threads(threads)
    if way: return alone(folder, way, answers, new_tokens)
    from paligemma_nb.training import machine
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        if not folder: write_full_size("3b", folder := temporary)
        for _ in range(rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--folder", folder, "--way", way, "--answers", answers,
                           "--new_tokens", new_tokens, "--threads", threads]
                out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
                found[way].append(json.loads(out.splitlines()[-1]))
                print(way, found[way][-1], flush=True)
    results = dict(machine=machine(), load=os.getloadavg(), new_tokens=new_tokens, rounds=rounds)
    results |= {way: {what: median(run[what] for run in runs) for what in runs[0]} for way, runs in found.items()}
    if output_file: Path(output_file).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
