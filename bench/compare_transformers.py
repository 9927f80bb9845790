"""This package and transformers side by side: tokens, opening, training, memory.

    python bench/compare_transformers.py    # the shipped model and a middle size
    python bench/compare_transformers.py --size 3b --folder weights --results bench/results

Sizes: tiny (shipped), middle (0.3 B), 3b (PaliGemma) and 3b2 (PaliGemma 2). The last two have
the published sizes and random weights, which transformers writes (6 GB). They take some ten
minutes on two cores, and 24 GB of memory.

Both open the same folder and write the same answer, token by token in turns: one of
transformers, one of each of ours. How pairs of times are judged stands in `pairs.py`. The
table has the best and the median of both sides; the ratio of the best, the median ratio of
the pairs, and where the middle 80 % of them lie. Above 1 this package is faster or smaller.

Between the tokens a small product and a read of memory are timed, too. They say how steady
the machine was, and how long it takes to read the decoder's weights once, which a further
token cannot avoid: its share of that bound is given at best and in the median. (What fits
into a cache can be beyond the bound.)

As an older processor, in a few minutes; AVX512_CORE_BF16 and AVX512_CORE without the second
variable:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python bench/compare_transformers.py \\
        --size middle --rounds 6 --new_tokens 4 --opening_rounds 0 --results bench/results
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from machine import Pace, machine_line, peak_bytes, process, timed, write_results
from models import (
    decoder_bytes, full_size, make_inputs, open_ours, open_theirs, write_middle, write_small)
from pairs import answers_in_turns, share_of_bound, summary

# ways in which a model is opened here: together with theirs, those of one set fit into memory
SETS = {"tiny": [["as stored"]], "middle": [["as stored", "packed", "int8", "int4"]]}
SETS["3b"] = SETS["3b2"] = [["as stored", "packed"], ["int8", "int4"]]
ANSWER = 64  # tokens that a process of its own writes


def find_model(size, folder): # -> its folder; the dtype that both compute in
    import paligemma_nb
    if size == "tiny": return Path(paligemma_nb.__file__).parent / "tiny", "float32"
    if size != "middle": return full_size(size, folder), "bfloat16"
    write_middle(path := Path(folder) / size)
    return path, "bfloat16"


# --- in this process, in turns

def answer_rows(size, theirs, folders, ways, pace, rounds, n, dtype):
    opened = {way: open_ours(folders[way], way, dtype) for way in ways}
    ours, processor = {way: model for way, (model, _) in opened.items()}, opened[ways[0]][1]
    first, further = answers_in_turns(theirs, ours, make_inputs(processor), pace, rounds, n)
    rows = {}
    for way in ways:
        for what, times in (("first token (ms)", first), ("each further token (ms)", further)):
            rows[way, what] = summary(list(zip(times[way], times["transformers"])))
        rows[way, what]["share_of_bound"] = share_of_bound(
            further[way], further["read"], decoder_bytes(folders[way]))
    if "packed" in ways and size != "middle":  # first tokens of 8 rows take long: one round
        ours, inputs = {"packed": ours["packed"]}, make_inputs(processor, rows=8)
        _, further = answers_in_turns(theirs, ours, inputs, pace, rounds=1, n=12, warm_up=0)
        rows["packed", "each further token of 8 rows (ms)"] = summary(
            list(zip(further["packed"], further["transformers"])))
    return rows


def training_rows(folder, rounds, size=64):
    "One forward and backward pass over the same batch, every row with its own picture."
    from paligemma_nb.kernels import training_precision
    from paligemma_nb.training import Recipe, batch_loss, make_batch
    model, processor = open_ours(folder, dtype="float32")
    reference = open_theirs(folder, "float32")
    recipe = Recipe(scenes_per_step=size, prompts_per_scene=1, single_object_steps=0)
    batch = make_batch(processor, recipe, step=0)

    def ours():
        with training_precision("cpu"): batch_loss(model, batch).backward()
        model.zero_grad()

    def theirs():
        with torch.autocast("cpu", torch.bfloat16): reference(**batch).loss.backward()
        reference.zero_grad()

    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds + 1)][1:]  # after a warm-up
    return {("as stored", f"training step of {size} rows (ms)"): summary(pairs)}


# --- in processes of their own

def alone(side, folder, dtype):
    "Opens the model and writes an answer: seconds until each is done, and the peak of memory."
    from paligemma_nb.generation import generate
    from paligemma_nb.processing import PaliGemmaProcessor
    import paligemma_nb.speed  # noqa: F401  (what is timed is the opening, not the imports)
    if side == "transformers":
        from transformers import PaliGemmaForConditionalGeneration  # noqa: F401
    start = time.perf_counter()
    if side == "transformers":
        processor = PaliGemmaProcessor.from_pretrained(folder)
        model = open_theirs(folder, dtype)
    else: model, processor = open_ours(folder, side, dtype)
    ready, inputs = time.perf_counter(), make_inputs(processor)
    if side == "transformers":
        model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
    else: generate(model, inputs, max_new_tokens=ANSWER)
    end = time.perf_counter()
    print(json.dumps(dict(ready=ready - start, total=end - start, peak=peak_bytes() / 1e6)))


def alone_rows(folders, dtype, pace, rounds):
    "Opening, opening with an answer, and memory of every way, in turns with theirs."
    sides, found = {"transformers": folders["as stored"]} | folders, {}
    for _ in range(rounds):
        for side, folder in sides.items():
            pace.note()
            flags = dict(folder=folder, dtype=dtype, threads=torch.get_num_threads())
            found.setdefault(side, []).append(process(__file__, alone=side, **flags))
    rows = {}
    for key, what in (("ready", "open (s)"), ("total", f"open and write {ANSWER} tokens (s)"),
                      ("peak", "peak memory (MB)")):
        for way in folders if found else ():
            pairs = [(a[key], b[key]) for a, b in zip(found[way], found["transformers"])]
            rows[way, what] = summary(pairs, memory=key == "peak")
    return rows


def start_up(rounds):
    "Seconds from the command to a one-token answer of the shipped model; theirs has none."
    command = [sys.executable, "-m", "paligemma_nb.inference", "--only_cpu"]
    command += ["--max_tokens_to_generate=1"]
    run = partial(subprocess.run, command, capture_output=True, check=True)
    return median(timed(run) for _ in range(rounds)) / 1e3


# --- all of one size

def measure(size, folder, temporary, pace, rounds, n, opening_rounds): # -> rows of the file
    folder, dtype = find_model(size, folder or temporary)
    folders = {way: folder for ways in SETS[size] for way in ways}
    for way in folders:
        if way.startswith("int"):
            folders[way] = write_small(folder, way, Path(temporary) / way)
    os.sync()  # what was saved is on the disk before the first clock starts
    theirs, rows = open_theirs(folder, dtype), {}
    for ways in SETS[size]:
        rows |= answer_rows(size, theirs, folders, ways, pace, rounds, n, dtype)
    del theirs
    if size == "tiny": rows |= training_rows(folder, rounds)
    rows |= alone_rows(folders, dtype, pace, opening_rounds)
    return [dict(model=size, weights=way, what=what) | row
            for (way, what), row in rows.items()]


def table(rows):
    head = ("model", "weights", "what", "ours: best, median", "transformers: best, median",
            "ratio: of the best, of pairs", "middle 80 %", "verdict", "share of the bound")
    lines = [f"| {' | '.join(head)} |", "|---|---|---" + "|--:" * 4 + "|---|--:|"]
    for r in rows:
        (ours, theirs), (low, high) = r["minima"], r["spread"]
        cells = [r["model"], r["weights"], r["what"], f"{ours:,.1f}, {r['ours']:,.1f}",
                 f"{theirs:,.1f}, {r['transformers']:,.1f}",
                 f"{r['ratio_of_minima']:.2f}, {r['ratio']:.2f}", f"{low:.2f}–{high:.2f}",
                 r["verdict"], ", ".join(f"{x:.0%}" for x in r.get("share_of_bound", ()))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    size: str = "small",      # tiny, middle, 3b, 3b2, or small: the first two
    rounds: int = 9,          # answers, after one that warms up
    new_tokens: int = 7,      # of each answer: the first one, and further ones
    opening_rounds: int = 2,  # in processes of their own, each with an answer
    threads: int = 2,
    results: str = "",        # write a file of this machine in here, as in bench/results
    folder: str = "",         # where full-size weights stay for the next time
    alone: str = "", dtype: str = "",  # used by this script to start itself
):
    torch.set_num_threads(threads)
    if alone: return globals()["alone"](alone, folder, dtype)
    sizes = ["tiny", "middle"] if size == "small" else [size]
    if not set(sizes) <= SETS.keys():
        sys.exit(f"--size: expected small, {', '.join(SETS)}, got {size}")
    if rounds < 1 or new_tokens < 2:
        sys.exit("expected --rounds 1 or more, and --new_tokens 2 or more")
    import transformers
    pace, rows = Pace(), []
    pace.note()
    for name in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            rows += measure(name, folder, temporary, pace, rounds, new_tokens, opening_rounds)
    pace.note()
    found = dict(transformers=transformers.__version__, rounds=rounds, new_tokens=new_tokens,
                 opening_rounds=opening_rounds, pace=pace.line(), pace_ms=pace.times)
    if "tiny" in sizes: found["start-up of the shipped model (s)"] = start_up(rounds)
    print(f"{machine_line()}, transformers {transformers.__version__}\n{pace.line()}\n")
    print(table(rows))
    if results: write_results(results, size, found | dict(rows=rows))


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
