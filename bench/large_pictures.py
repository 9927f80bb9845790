"""The first token after a large picture: how long it takes, and how much memory, beside transformers.

    python bench/large_pictures.py --results bench/results    # 224, 448 and 896 pixels, both generations
    python bench/large_pictures.py --sides 224 --layers 1     # a short try

Random weights of the published widths, which transformers writes. Both towers have four layers, so that an eager
transformers is done in time and memory; every layer does the same work, so a share tells what it would with all of them.
(`--layers 0` keeps the published depth: 12 GB on the disk and as much memory, and some minutes for each size.)

Times are taken in one process for each picture size, call by call in turns: ours as stored, ours packed, transformers
eager (the attention that PaliGemma 2 needs) and, for the first generation, its sdpa. Memory is taken in a process for
each, before it has worked on any picture: all weights are read once, then the peak of the resident set while the first
token is made, less what was resident just before. It counts keys and values that are kept, too.
"""
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from machine import machine_line, timed, write_results
from models import make_inputs, open_ours, open_theirs, write_full_size

SIZES = {"3b": "PaliGemma 3B", "3b2": "PaliGemma 2 3B"}
WAYS = {"3b": ("as stored", "packed", "eager", "sdpa"), "3b2": ("as stored", "packed", "eager")}


# --- models

def write_sides(size, sides, layers, folder):
    "The same weights in a folder for each side of the picture: only the table of positions and the config differ."
    from paligemma_nb.processing import PaliGemmaProcessor
    write_full_size(size, folder / size, num_layers=layers or None)
    model, processor = open_theirs(folder / size, "bfloat16"), PaliGemmaProcessor.from_pretrained(folder / size)
    vision, tower = model.config.vision_config, model.model.vision_tower
    if layers: vision.num_hidden_layers, tower.encoder.layers = layers, tower.encoder.layers[:layers]
    for side in sides:
        n = (side // vision.patch_size) ** 2
        vision.image_size, model.config.text_config.num_image_tokens = side, n
        table = 0.02 * torch.randn(n, vision.hidden_size)
        tower.embeddings.position_embedding.weight = torch.nn.Parameter(table.bfloat16())
        model.save_pretrained(folder / f"{size}-{side}")
        PaliGemmaProcessor(processor.tokenizer, side, n).save_pretrained(folder / f"{size}-{side}")


def first_token(folder, way): # -> what computes it
    from paligemma_nb.generation import generate_tokens
    from paligemma_nb.processing import PaliGemmaProcessor
    inputs = make_inputs(PaliGemmaProcessor.from_pretrained(folder))
    if way in ("eager", "sdpa"):
        model = open_theirs(folder, "bfloat16")
        model.set_attn_implementation(way)
        work = lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    else:
        model = open_ours(folder, way)[0]
        work = lambda: next(generate_tokens(model, inputs, max_new_tokens=1))
    for tensor in [*model.parameters(), *model.buffers()]: tensor.sum()  # a file that is mapped is read only now
    return work


# --- memory, in a process of its own

def resident(field): # bytes: VmRSS now, VmHWM its peak
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak(): # -> is there a way to?
    try: return Path("/proc/self/clear_refs").write_text("5") > 0
    except OSError: return False


def extra_bytes(work): # None where the system (not Linux) does not tell
    gc.collect()
    if not reset_peak(): return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is asked for next
    reset_peak()
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def alone(folder, way): # -> bytes, from a process of its own
    command = [sys.executable, __file__, "--alone", way, "--folder", folder, "--threads", torch.get_num_threads()]
    out = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


# --- one picture size after the other

def measure(size, side, folder, rounds): # -> rows, one for each way
    extra = {way: alone(folder, way) for way in WAYS[size]}
    works = {way: first_token(folder, way) for way in WAYS[size] if rounds}
    times = {way: [] for way in WAYS[size]}
    for i in range(rounds + 1 if rounds else 0):
        for way, work in works.items():
            took = timed(work)
            if i: times[way].append(took)  # the first round warms up
    return [dict(model=size, side=side, image_tokens=(side // 14) ** 2, way=way, first_token_ms=times[way],
                 extra_memory_mb=extra[way] and extra[way] / 1e6) for way in WAYS[size]]


def beside_eager(row, rows): # -> ratio of best times, median ratio of the pairs, share of memory
    eager = next(r for r in rows if (r["model"], r["side"], r["way"]) == (row["model"], row["side"], "eager"))
    ours, theirs = row["first_token_ms"], eager["first_token_ms"]
    if not ours: return None, None, row["extra_memory_mb"] and row["extra_memory_mb"] / eager["extra_memory_mb"]
    return (min(theirs) / min(ours), median(b / a for a, b in zip(ours, theirs)),
            row["extra_memory_mb"] and row["extra_memory_mb"] / eager["extra_memory_mb"])


def table(rows):
    lines = ["| model | picture | tokens | way | first token: best, median (ms) | times as fast as eager: of the best, "
             "of pairs | extra memory (MB) | share of eager's |", "|---|--:|--:|---" + "|--:" * 4 + "|"]
    for r in rows:
        best, pairs, share = beside_eager(r, rows)
        ms, name = r["first_token_ms"], r["way"]
        cells = [SIZES[r["model"]], f"{r['side']} px", f"{r['image_tokens']:,}",
                 f"transformers, {name}" if name in ("eager", "sdpa") else f"ours, {name}",
                 f"{min(ms):,.0f}, {median(ms):,.0f}" if ms else "–", f"{best:.2f}, {pairs:.2f}" if ms else "–",
                 f"{r['extra_memory_mb']:,.0f}" if share else "–", f"{share:.0%}" if share else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    sides: tuple = (224, 448, 896),     # of the pictures, in pixels, multiples of 14
    sizes: tuple = ("3b", "3b2"),
    layers: int = 4,                    # of each tower; 0: as published, 27 and 18 or 26
    rounds: int = 6,                    # after one that warms up; 0: memory alone
    threads: int = 2,
    results: str = "",                  # also write a file of this machine in this folder, as in bench/results
    alone: str = "", folder: str = "",  # used by this script to start itself
):
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if alone: return print(json.dumps(extra_bytes(first_token(Path(folder), alone))))
    sides, sizes = (x if isinstance(x, (tuple, list)) else (x,) for x in (sides, sizes))
    if bad := [s for s in sides if s % 14 or s < 14]: sys.exit(f"--sides: expected multiples of 14, got {bad}")
    if not set(sizes) <= SIZES.keys(): sys.exit(f"--sizes: expected some of {', '.join(SIZES)}, got {sizes}")
    import transformers
    start, rows = time.perf_counter(), []
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            write_sides(size, sides, layers, Path(temporary))
            for side in sides: rows += measure(size, side, Path(temporary) / f"{size}-{side}", rounds)
    depth = f"{layers} layers of each tower" if layers else "all layers"
    print(f"{machine_line()}, transformers {transformers.__version__}\nPublished widths, {depth}, random weights in "
          f"bfloat16; {time.perf_counter() - start:.0f} s in all\n\n{table(rows)}")
    if results:
        write_results(results, "large_pictures", dict(transformers=transformers.__version__, layers=depth,
                                                      rounds=rounds, rows=rows))


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
