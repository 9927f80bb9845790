"""This package and transformers side by side: time to the first token, time for each further token, training, memory.

    python bench/compare_transformers.py                      # the shipped model and a middle size, 2 threads
    python bench/compare_transformers.py --size tiny --repeats 15 --output_file result.json

Both open the same folder and do the same work in turns (ours, theirs, ours, …), so that a busy machine slows both;
medians are compared. Ratios above 1 mean that this package is faster or smaller.
"""
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

SIZES = ("tiny", "middle")


def middle_model():
    "About 300 M parameters with random weights, between the shipped model and the published ones."
    from paligemma_nb.gemma import GemmaConfig
    from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from paligemma_nb.processing import PaliGemmaProcessor
    from paligemma_nb.siglip import SiglipVisionConfig
    from paligemma_nb.training import tiny_processor
    processor = PaliGemmaProcessor(tiny_processor().tokenizer, image_size=224, num_image_tokens=256)
    vision = SiglipVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                patch_size=14, image_size=224)
    text = GemmaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
                       num_key_value_heads=1, head_dim=128, vocab_size=32_000)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision, text, image_token_index=processor.image_token_id))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.02)
    return model.bfloat16(), processor


def open_ours(folder, dtype):
    from paligemma_nb.checkpoint import load_model
    from paligemma_nb.generation import generate
    model, processor = load_model(folder, device="cpu", dtype=dtype)
    model.config.eos_token_id = -1  # every answer takes the full number of tokens
    return model, processor, lambda inputs, n: generate(model, inputs, max_new_tokens=n)


def open_theirs(folder, dtype):
    from transformers import PaliGemmaForConditionalGeneration
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model, lambda inputs, n: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)


def in_turns(functions, repeats):
    "Median seconds of each function; every round runs them all."
    for f in functions: f()
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for f, record in zip(functions, seconds):
            start = time.perf_counter()
            f()
            record.append(time.perf_counter() - start)
    return [median(record) for record in seconds]


def generation_rows(folder, dtype, repeats, new_tokens=32):
    from paligemma_nb.scenes import HELD_OUT, make_scene
    model, processor, ours = open_ours(folder, dtype)
    reference, theirs = open_theirs(folder, dtype)
    inputs = processor([make_scene(HELD_OUT).image], ["caption en"])
    if not torch.equal(ours(inputs, 4), theirs(inputs, 4)[:, inputs["input_ids"].shape[1]:]):
        print(f"note: in {dtype} the two choose different tokens here; the work is the same")
    first = in_turns([lambda: ours(inputs, 1), lambda: theirs(inputs, 1)], repeats)
    whole = in_turns([lambda: ours(inputs, new_tokens), lambda: theirs(inputs, new_tokens)], repeats)
    rest = [(w - f) / (new_tokens - 1) for w, f in zip(whole, first)]
    return {"first token (ms)": [1e3 * t for t in first], "each further token (ms)": [1e3 * t for t in rest]}


def training_row(folder, repeats, rows=64):
    "One forward and backward pass over the same batch, every row with its own picture."
    from paligemma_nb.training import Recipe, batch_loss, make_batch, training_precision
    model, processor, _ = open_ours(folder, "float32")
    reference, _ = open_theirs(folder, "float32")
    batch = make_batch(processor, Recipe(scenes_per_step=rows, prompts_per_scene=1, single_object_steps=0), step=0)

    def ours():
        with training_precision("cpu"): batch_loss(model, batch).backward()
        model.zero_grad()

    def theirs():
        with torch.autocast("cpu", torch.bfloat16): reference(**batch).loss.backward()
        reference.zero_grad()

    return {f"training step of {rows} rows (ms)": [1e3 * t for t in in_turns([ours, theirs], repeats)]}


def memory_row(folder, dtype):
    "Peak resident memory of a fresh process that loads the model and writes 8 tokens."
    peaks = []
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--memory_of", side, "--folder", str(folder), "--dtype", dtype]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return {"peak memory (MB)": peaks}


def memory_of(side, folder, dtype):
    from paligemma_nb.scenes import make_scene
    from paligemma_nb.processing import PaliGemmaProcessor
    run = open_ours(folder, dtype)[-1] if side == "ours" else open_theirs(folder, dtype)[-1]
    run(PaliGemmaProcessor.from_pretrained(folder)([make_scene(0).image], ["caption en"]), 8)
    print(peak_bytes() / 1e6)


def peak_bytes():
    status = Path("/proc/self/status")  # on Linux getrusage would count what the parent held when it started this process
    if status.exists(): return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(
    size: str = "all",         # tiny, middle or all
    repeats: int = 9,          # rounds; medians are taken
    threads: int = 2,
    output_file: str = "",     # also write the figures here, as JSON
    memory_of: str = "", folder: str = "", dtype: str = "",  # used by this script to start itself
):
    torch.set_num_threads(threads)
    if memory_of: return globals()["memory_of"](memory_of, folder, dtype)
    if size not in (*SIZES, "all"): sys.exit(f"--size: expected tiny, middle or all, got {size}")
    import paligemma_nb
    import transformers
    from paligemma_nb.checkpoint import save_model
    from paligemma_nb.training import machine
    results = dict(machine=machine(), transformers=transformers.__version__, load=os.getloadavg(), repeats=repeats, rows=[])
    for name in SIZES if size == "all" else [size]:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "tiny": path, dtype = Path(paligemma_nb.__file__).parent / "tiny", "float32"
            else:
                path, dtype = Path(temporary) / name, "bfloat16"
                save_model(*middle_model(), path)
            rows = generation_rows(path, dtype, repeats) | memory_row(path, dtype)
            if name == "tiny": rows |= training_row(path, repeats)
        results["rows"] += [dict(model=f"{name}, {dtype}", what=what, ours=ours, transformers=theirs, ratio=theirs / ours)
                            for what, (ours, theirs) in rows.items()]
    print(f"{results['machine']}, transformers {results['transformers']}, load {results['load'][0]:.1f}\n")
    print("| model | what | ours | transformers | ratio |\n|---|---|---|---|---|")
    for r in results["rows"]: print(f"| {r['model']} | {r['what']} | {r['ours']:.1f} | {r['transformers']:.1f} | {r['ratio']:.2f} |")
    if output_file: Path(output_file).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
