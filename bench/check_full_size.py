"""Is the model the same as transformers' at the published sizes? Random weights, written by transformers.

    python bench/check_full_size.py --output_file result.json    # PaliGemma 3B and PaliGemma 2 3B; 24 GB of memory

For each: the file opens strictly; the logits behind the prompt, in bfloat16, are as near to those of float32 as
transformers' are; 16 greedy tokens are equal; and of the first 4 layers, in float32, the logits agree to 1e-5.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch

from compare_transformers import make_inputs, open_theirs, write_full_size

CUT = 4  # layers


def relative(got, expected): return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@torch.inference_mode()
def last_logits(model, inputs): return model(**inputs, logits_to_keep=1).logits[:, -1]


def check(size, temporary):
    from paligemma_nb.checkpoint import load_model
    from paligemma_nb.generation import generate
    results = {}
    cut = Path(temporary) / "cut"
    write_full_size(size, cut, num_layers=CUT)
    model, processor = load_model(cut, device="cpu", dtype="float32")
    inputs = make_inputs(processor)
    results[f"{CUT} layers, float32: logits differ by"] = relative(
        last_logits(model, inputs), last_logits(open_theirs(cut, "float32"), inputs))
    del model

    whole = Path(temporary) / "whole"
    write_full_size(size, whole)
    exact = last_logits(load_model(whole, device="cpu", dtype="float32")[0], inputs)
    theirs, (model, _) = open_theirs(whole, "bfloat16"), load_model(whole, device="cpu")
    results["parameters"] = sum(p.numel() for p in model.parameters())
    ours, expected = last_logits(model, inputs), last_logits(theirs, inputs)
    results |= {"bfloat16: our logits differ from float32 by": relative(ours, exact),
                "bfloat16: theirs differ from float32 by": relative(expected, exact),
                "bfloat16: ours differ from theirs by": relative(ours, expected)}
    model.config.eos_token_id, theirs.generation_config.eos_token_id = -1, None
    tokens = generate(model, inputs, max_new_tokens=16)
    results["16 greedy tokens, ours"] = tokens[0].tolist()
    results["16 greedy tokens, theirs"] = theirs.generate(
        **inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    return results


def main(output_file: str = "", threads: int = 2):
    torch.set_num_threads(threads)
    found, failed = {}, []
    for size in ("3b", "3b2"):
        with tempfile.TemporaryDirectory() as temporary: found[size] = r = check(size, temporary)
        print(size, *(f"{what}: {value}" for what, value in r.items()), sep="\n  ", flush=True)
        if r["16 greedy tokens, ours"] != r["16 greedy tokens, theirs"]: failed.append(f"{size}: other tokens")
        if r[f"{CUT} layers, float32: logits differ by"] > 1e-5: failed.append(f"{size}: float32 differs")
        if r["bfloat16: our logits differ from float32 by"] > 1.5 * r["bfloat16: theirs differ from float32 by"]:
            failed.append(f"{size}: bfloat16 is less exact than theirs")
    if output_file: Path(output_file).write_text(json.dumps(found, indent=2) + "\n")
    if failed: sys.exit("; ".join(failed))


if __name__ == "__main__":
    import fire
    fire.Fire(main)
