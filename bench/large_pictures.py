"""The first token after a large picture: how long it takes, and how much memory.

    python bench/large_pictures.py --results bench/results   # 224, 448, 896 pixels; minutes
    python bench/large_pictures.py --sides 224 --layers 1 --rounds 2           # a short try
    python bench/large_pictures.py --sides 896 --layers 0 --rounds 0   # memory at full depth

Random weights of the published widths, which transformers writes, in both generations. Both
towers have four layers, so that transformers' eager attention is done in time. Full depth
(12 GB on the disk, and as much memory) adds keys and values of more layers, and little else.

Times are taken in one process for each picture size, call by call in turns: ours as stored,
ours packed, transformers' eager attention (which PaliGemma 2 needs) and, for the first
generation, its sdpa. Memory is taken in a process for each, before it has seen a picture: all
weights are read once, and then it is the peak of the resident set while the first token is
made, less what was resident just before. Keys and values are in it; their share is given, too.
"""
import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from machine import machine_line, process, timed, write_results
from models import make_inputs, open_ours, open_theirs, write_full_size

SIZES = {"3b": "PaliGemma 3B", "3b2": "PaliGemma 2 3B"}
OURS = "as stored", "packed"
WAYS = {"3b": (*OURS, "eager", "sdpa"), "3b2": (*OURS, "eager")}


# --- models

def write_sides(size, sides, layers, folder):
    "A folder for each side of the picture: only table of positions and config are different."
    from paligemma_nb.processing import PaliGemmaProcessor
    write_full_size(size, folder / size, num_layers=layers or None)
    model = open_theirs(folder / size, "bfloat16")
    tokenizer = PaliGemmaProcessor.from_pretrained(folder / size).tokenizer
    config, tower = model.config.vision_config, model.model.vision_tower
    if layers:
        config.num_hidden_layers, tower.encoder.layers = layers, tower.encoder.layers[:layers]
    for side in sides:
        n = (side // config.patch_size) ** 2
        config.image_size, model.config.text_config.num_image_tokens = side, n
        table = (0.02 * torch.randn(n, config.hidden_size)).bfloat16()
        tower.embeddings.position_embedding.weight = torch.nn.Parameter(table)
        model.save_pretrained(folder / f"{size}-{side}")
        PaliGemmaProcessor(tokenizer, side, n).save_pretrained(folder / f"{size}-{side}")


def first_token(folder, way): # -> a function that computes it
    from paligemma_nb.generation import generate_tokens
    from paligemma_nb.processing import PaliGemmaProcessor
    inputs = make_inputs(PaliGemmaProcessor.from_pretrained(folder))
    if way in OURS:
        model = open_ours(folder, way)[0]
        work = lambda: next(generate_tokens(model, inputs, max_new_tokens=1))
    else:
        model = open_theirs(folder, "bfloat16")
        model.set_attn_implementation(way)
        work = lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    for tensor in model.parameters(): tensor.sum()  # a file that is mapped is read only now
    return work


# --- memory, in a process of its own

def resident(field): # bytes: VmRSS now, or VmHWM, its peak
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_bytes(work): # None where the system does not tell, which is all but Linux
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free would hide what is asked for next
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    except (AttributeError, OSError): return None
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def kept_bytes(folder): # keys and values of the prompt, of all layers, in bfloat16
    from paligemma_nb.processing import PaliGemmaProcessor
    tokens = make_inputs(PaliGemmaProcessor.from_pretrained(folder))["input_ids"].shape[1]
    config = json.loads((folder / "config.json").read_text())["text_config"]
    width = config["num_key_value_heads"] * config["head_dim"]
    return 2 * 2 * config["num_hidden_layers"] * width * tokens


# --- one picture size after the other

def measure(size, side, folder, rounds): # -> rows of the table, one for each way
    flags = dict(folder=folder, threads=torch.get_num_threads())
    extra = {way: process(__file__, alone=way, **flags) for way in WAYS[size]}
    works = {way: first_token(folder, way) for way in WAYS[size]} if rounds else {}
    times = {way: [] for way in WAYS[size]}
    for i in range(rounds + 1):
        for way, work in works.items():
            took = timed(work)
            if i: times[way].append(took)  # the first round warms up
    return [dict(model=size, side=side, image_tokens=(side // 14) ** 2, way=way,
                 first_token_ms=times[way], extra_memory_mb=extra[way] and extra[way] / 1e6,
                 keys_and_values_mb=kept_bytes(folder) / 1e6) for way in WAYS[size]]


def beside_eager(row, rows): # adds ratios, above 1 where it is faster, and a share
    same = [r for r in rows if (r["model"], r["side"]) == (row["model"], row["side"])]
    eager = next(r for r in same if r["way"] == "eager")
    if ours := row["first_token_ms"]:
        theirs = eager["first_token_ms"]
        row |= dict(ratio_of_best=min(theirs) / min(ours),
                    ratio=median(b / a for a, b in zip(ours, theirs)))
    if row["extra_memory_mb"]:
        row |= dict(share_of_memory=row["extra_memory_mb"] / eager["extra_memory_mb"])
    return row


def table(rows):
    heads = ("model", "picture", "tokens", "way", "first token (ms): best, median",
             "times as fast as eager: best, pairs", "extra memory (MB)",
             "of it keys and values", "share of eager's")
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|---" + "|--:" * 5 + "|"]
    for r in rows:
        ms, whose = r["first_token_ms"], "ours" if r["way"] in OURS else "transformers"
        cells = [SIZES[r["model"]], f"{r['side']} px", f"{r['image_tokens']:,}",
                 f"{whose}, {r['way']}"]
        cells += [f"{min(ms):,.0f}, {median(ms):,.0f}",
                  f"{r['ratio_of_best']:.2f}, {r['ratio']:.2f}"] if ms else ["–", "–"]
        cells += ([f"{r['extra_memory_mb']:,.0f}", f"{r['keys_and_values_mb']:,.0f}",
                   f"{r['share_of_memory']:.0%}"] if r["extra_memory_mb"] else ["–"] * 3)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    sides: tuple = (224, 448, 896),  # of the pictures, in pixels, multiples of 14
    sizes: tuple = ("3b", "3b2"),
    layers: int = 4,                 # of each tower; 0: as published, 27, and 18 or 26
    rounds: int = 9,                 # at 224 px, fewer for larger ones; 0: memory alone
    threads: int = 2,
    results: str = "",               # also write a file of this machine into this folder
    alone: str = "", folder: str = "",  # used by this script to start itself
):
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if alone: return print(json.dumps(extra_bytes(first_token(Path(folder), alone))))
    sides, sizes = (x if isinstance(x, (tuple, list)) else (x,) for x in (sides, sizes))
    if bad := [side for side in sides if side % 14 or side < 14]:
        sys.exit(f"--sides: expected multiples of 14, got {bad}")
    if not set(sizes) <= SIZES.keys():
        sys.exit(f"--sizes: expected some of {', '.join(SIZES)}, got {', '.join(sizes)}")
    import transformers
    start, rows = time.perf_counter(), []
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            write_sides(size, sides, layers, Path(temporary))
            for side in sides:
                few = rounds and max(2, rounds * 224 // side)
                rows += measure(size, side, Path(temporary) / f"{size}-{side}", few)
                print(f"{SIZES[size]}, {side} px, done after "
                      f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    rows = [beside_eager(row, rows) for row in rows]
    depth = f"{layers} of each tower" if layers else "as published: 27, and 18 or 26"
    found = dict(transformers=transformers.__version__, seconds=time.perf_counter() - start,
                 layers=depth)
    print(f"{machine_line()}, transformers {transformers.__version__}\n"
          f"Published widths, random bfloat16 weights, layers {depth}; "
          f"{found['seconds']:.0f} s\n\n{table(rows)}")
    if results: write_results(results, "large_pictures", found | dict(rows=rows))


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
