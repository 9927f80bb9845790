"""This package and transformers side by side: opening, first token, further tokens, training, memory.

    python bench/compare_transformers.py                      # the shipped model and a middle size, 2 threads
    python bench/compare_transformers.py --size 3b --output_file result.json
    python bench/compare_transformers.py --size tiny --repeats 15

Sizes: tiny (shipped), middle (0.3 B), 3b (PaliGemma) and 3b2 (PaliGemma 2). The last two are full size, with random
weights that transformers writes to a temporary folder (6 GB); all of it takes half an hour on two cores.
Both open the same folder and do the same work in turns (ours, theirs, ours, …), so that a busy machine slows both. Each
round has its own ratio, and of times and ratios the medians count: where a machine changes its pace between rounds, the
ratio is not quite that of the times beside it. (The file keeps all rounds.) Ratios above 1 mean that this package is
faster or smaller.
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

SIZES = ("tiny", "middle", "3b", "3b2")
WAYS = ("as stored", "packed", "int8", "int4")  # in which a full-size model is opened here


# --- models

def wide_processor():
    from paligemma_nb.processing import PaliGemmaProcessor
    from paligemma_nb.training import tiny_processor
    return PaliGemmaProcessor(tiny_processor().tokenizer, image_size=224, num_image_tokens=256)


def write_middle(folder):
    "About 300 M parameters with random weights, between the shipped model and the published ones."
    from paligemma_nb.checkpoint import save_model
    from paligemma_nb.gemma import GemmaConfig
    from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from paligemma_nb.siglip import SiglipVisionConfig
    processor = wide_processor()
    vision = SiglipVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                patch_size=14, image_size=224)
    text = GemmaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
                       num_key_value_heads=1, head_dim=128, vocab_size=32_000)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision, text, image_token_index=processor.image_token_id))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.02)
    save_model(model.bfloat16(), processor, folder)


def write_full_size(size, folder, num_layers=None):
    "The published sizes; written by transformers, so that nothing of ours has touched the file."
    from transformers import PaliGemmaConfig as TheirConfig, PaliGemmaForConditionalGeneration as Theirs
    from paligemma_nb.gemma import Gemma2Config, GemmaConfig
    from paligemma_nb.paligemma import PaliGemmaConfig
    from paligemma_nb.siglip import SiglipVisionConfig
    processor = wide_processor()
    text = (GemmaConfig(2048, 16384, num_layers or 18, 8, 1, 257_216) if size == "3b" else
            Gemma2Config(2304, 9216, num_layers or 26, 8, 4, 257_216))
    config = PaliGemmaConfig(SiglipVisionConfig(1152, 4304, 27, 16, patch_size=14), text, processor.image_token_id)
    torch.manual_seed(0)
    with torch.device("meta"): model = Theirs(TheirConfig(**config.to_dict())).bfloat16()
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        # so that layers outweigh the embedding: else the model would repeat its last token, and comparing says little
        std = 0.005 if "embed_tokens" in name else 0.05 if "language_model" in name and p.ndim > 1 else 0.02
        is_scale = "vision" in name and name.endswith("weight") and p.ndim == 1  # LayerNorm's; RMSNorm's is around 0
        torch.nn.init.normal_(p, mean=float(is_scale), std=std)
    model.tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def open_ours(folder, dtype=None, way="as stored"):
    from paligemma_nb.checkpoint import load_model
    from paligemma_nb.speed import open_model
    if way == "as stored": model, processor = load_model(folder, device="cpu", dtype=dtype)
    else: model, processor = open_model(folder, device="cpu", dtype=dtype)
    model.config.eos_token_id = -1  # every answer takes the full number of tokens
    return model, processor


def open_theirs(folder, dtype):
    from transformers import PaliGemmaForConditionalGeneration, logging
    logging.set_verbosity_error(), logging.disable_progress_bar()
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


# --- work: each function returns the moments at which its tokens were known

def our_moments(model, inputs, n):
    from paligemma_nb.generation import generate_tokens
    return [(time.perf_counter(), new)[0] for new in generate_tokens(model, inputs, max_new_tokens=n)]


def their_moments(model, inputs, n):
    from transformers import StoppingCriteriaList
    moments = []

    def note(ids, scores, **kwargs):
        moments.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                   stopping_criteria=StoppingCriteriaList([note]))
    return moments


def summary(rounds): # of pairs (ours, theirs)
    ours, theirs = map(median, zip(*rounds))
    return dict(ours=ours, transformers=theirs, ratio=median(b / a for a, b in rounds), rounds=rounds)


def in_turns(ours, theirs, repeats):
    "Rounds of milliseconds until the first moment, and between two (empty pairs where there is only one)."
    first, further = [], []
    for _ in range(repeats + 1):
        starts, moments = zip(*[(time.perf_counter(), work()) for work in (ours, theirs)])
        first.append([1e3 * (side[0] - start) for start, side in zip(starts, moments)])
        further.append([1e3 * median(b - a for a, b in zip(side, side[1:])) for side in moments if len(side) > 1])
    return first[1:], further[1:]  # the first round warms up


def make_inputs(processor, rows=1):
    from paligemma_nb.scenes import HELD_OUT, make_scene
    return processor([make_scene(HELD_OUT + i).image for i in range(rows)], ["caption en"] * rows)


def generation_rows(ours, theirs, processor, repeats, new_tokens=32, rows=1):
    inputs = make_inputs(processor, rows)
    first, further = in_turns(lambda: our_moments(ours, inputs, new_tokens),
                              lambda: their_moments(theirs, inputs, new_tokens), repeats)
    return {"first token (ms)": first, "each further token (ms)": further}


def training_row(folder, repeats, rows=64):
    "One forward and backward pass over the same batch, every row with its own picture."
    from paligemma_nb.training import Recipe, batch_loss, make_batch, training_precision
    (model, processor), reference = open_ours(folder, "float32"), open_theirs(folder, "float32")
    batch = make_batch(processor, Recipe(scenes_per_step=rows, prompts_per_scene=1, single_object_steps=0), step=0)

    def ours():
        with training_precision("cpu"): batch_loss(model, batch).backward()
        model.zero_grad()
        return [time.perf_counter()]

    def theirs():
        with torch.autocast("cpu", torch.bfloat16): reference(**batch).loss.backward()
        reference.zero_grad()
        return [time.perf_counter()]

    return {f"training step of {rows} rows (ms)": in_turns(ours, theirs, repeats)[0]}


# --- processes of their own

def process(*arguments): # -> what `alone` prints
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def alone(side, folder, dtype, new_tokens):
    "Opens the model in this process and writes an answer: seconds until both are done, and the peak of memory."
    # what is timed is the opening, not the imports
    if side == "theirs": from transformers import PaliGemmaForConditionalGeneration  # noqa: F401
    else: import paligemma_nb.speed  # noqa: F401
    start = time.perf_counter()
    if side == "theirs":
        from paligemma_nb.processing import PaliGemmaProcessor
        model, processor, work = open_theirs(folder, dtype), PaliGemmaProcessor.from_pretrained(folder), their_moments
    else: (model, processor), work = open_ours(folder, None, side), our_moments
    ready = time.perf_counter()
    last = work(model, make_inputs(processor), new_tokens)[-1]
    print(json.dumps(dict(ready=ready - start, total=last - start, peak=peak_bytes() / 1e6)))


def peak_bytes():
    status = Path("/proc/self/status")  # on Linux getrusage would count what the parent held when it started this one
    if status.exists(): return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone_rows(folders, dtype, repeats, new_tokens):
    "Opening, opening with an answer, and memory of each way, in turns with theirs."
    rows = {}
    for way, folder in folders.items():
        pairs = [[process("--alone", side, "--folder", folders["as stored"] if side == "theirs" else folder,
                          "--dtype", dtype, "--new_tokens", new_tokens) for side in (way, "theirs")]
                 for _ in range(repeats)]
        for key, what in (("ready", "open (s)"), ("total", f"open and write {new_tokens} tokens (s)"),
                          ("peak", "peak memory (MB)")):
            rows[way, what] = [[side[key] for side in pair] for pair in pairs]
    return rows


def start_up_row(repeats):
    "From the command to the end of a one-token answer of the shipped model; transformers has no such command."
    command = [sys.executable, "-m", "paligemma_nb.inference", "--only_cpu", "--max_tokens_to_generate=1"]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


# --- one size after the other

def small_rows(name, temporary, repeats):
    import paligemma_nb
    if name == "tiny": folder, dtype = Path(paligemma_nb.__file__).parent / "tiny", "float32"
    else:
        folder, dtype = Path(temporary) / name, "bfloat16"
        write_middle(folder)
    (model, processor), theirs = open_ours(folder, dtype), open_theirs(folder, dtype)
    rows = generation_rows(model, theirs, processor, repeats)
    peaks = [process("--alone", side, "--folder", folder, "--dtype", dtype)["peak"] for side in ("as stored", "theirs")]
    rows["peak memory (MB)"] = [peaks]
    if name == "tiny": rows |= training_row(folder, repeats)
    return {("as stored", what): values for what, values in rows.items()}


def full_rows(name, folder, temporary, repeats):
    from paligemma_nb.checkpoint import load_model
    from paligemma_nb.quantization import quantize, save_quantized
    from paligemma_nb.speed import pack
    if folder is None:
        folder = Path(temporary) / name
        write_full_size(name, folder)
    theirs, rows, folders = open_theirs(folder, "bfloat16"), {}, dict.fromkeys(WAYS[:2], folder)
    for way in WAYS:
        model, processor = open_ours(folder)
        if way.startswith("int"):
            folders[way] = Path(temporary) / way
            save_quantized(quantize(model, way), processor, folders[way])
        if way != "as stored": pack(model)
        found = generation_rows(model, theirs, processor, repeats, new_tokens=9)
        rows |= {(way, what): values for what, values in found.items()}
        if way == "packed":
            found = generation_rows(model, theirs, processor, 1, new_tokens=9, rows=8)
            rows[way, "each further token of 8 rows (ms)"] = found["each further token (ms)"]
        del model
    del theirs
    os.sync()  # what was saved is on the disk before the next clock starts
    return rows | alone_rows(folders, "bfloat16", max(1, repeats // 2), new_tokens=64)


def compare(
    size: str = "small",       # tiny, middle, 3b, 3b2, or small: the first two
    repeats: int = 9,          # rounds; medians are taken
    threads: int = 2,
    output_file: str = "",     # also write the figures here, as JSON
    folder: str = "",          # of a full-size checkpoint that is there already
    alone: str = "", dtype: str = "", new_tokens: int = 8,  # used by this script to start itself
):
    torch.set_num_threads(threads)
    if alone: return globals()["alone"](alone, folder, dtype, new_tokens)
    if size not in (*SIZES, "small"): sys.exit(f"--size: expected small, {', '.join(SIZES)}, got {size}")
    import transformers
    from paligemma_nb.training import machine
    results = dict(machine=machine(), transformers=transformers.__version__, load=os.getloadavg(), repeats=repeats,
                   rows=[])
    for name in SIZES[:2] if size == "small" else [size]:
        with tempfile.TemporaryDirectory() as temporary:
            if name in SIZES[:2]: rows = small_rows(name, temporary, repeats)
            else: rows = full_rows(name, folder or None, temporary, repeats)
        results["rows"] += [dict(model=name, weights=way, what=what) | summary(rounds)
                            for (way, what), rounds in rows.items()]
    results["start-up of the shipped model (s)"] = start_up_row(repeats)
    if output_file: Path(output_file).write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results['machine']}, transformers {results['transformers']}, load {results['load'][0]:.1f}; "
          f"start-up of the shipped model {results['start-up of the shipped model (s)']:.1f} s\n")
    print("| model | our weights | what | ours | transformers | ratio |\n|---|---|---|---|---|---|")
    for r in results["rows"]:
        numbers = f"{r['ours']:.1f} | {r['transformers']:.1f} | {r['ratio']:.2f}"
        print(f"| {r['model']} | {r['weights']} | {r['what']} | {numbers} |")


if __name__ == "__main__":
    import fire
    fire.Fire(compare)
