"""Is the model the same as transformers' at the published sizes? Random weights, by theirs.

    python bench/check_full_size.py --folder weights --results bench/results

PaliGemma 3B and PaliGemma 2 3B; 24 GB of memory. `--folder` keeps weights for the next time.

For each of them: the file opens strictly. The logits in bfloat16, after the prompt and after
each of 16 given tokens, are as near to those of float32 as transformers' are. They choose the
same tokens, except where float32 sees a tie: two logits nearer to each other than the largest
distance of one of transformers' logits from float32. 16 greedy tokens are equal, and with the
first 4 layers alone, in float32, the logits agree to 1e-5. (Greedy tokens say little: random
weights may repeat one token for ever.)
"""
import sys
import tempfile
from pathlib import Path

import torch

from machine import write_results
from models import full_size, make_inputs, open_theirs, write_full_size

CUT, GIVEN = 4, 16  # layers; tokens


def deviation(got, expected): return (got.float() - expected.float()).abs().max().item()
def relative(got, expected):
    return deviation(got, expected) / expected.float().abs().max().item()


@torch.inference_mode()
def last_logits(model, inputs): return model(**inputs, logits_to_keep=1).logits[:, -1]


def given_tokens(model): # [16] at random, the same for every model of a size
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.text_config.vocab_size
    return torch.randint(1000, vocab_size, (GIVEN,), generator=generator)


@torch.inference_mode()
def our_steps(model, inputs): # -> logits [17, v] after the prompt, then after each given token
    from paligemma_nb.kv_cache import KVCache
    text, length = model.config.text_config, inputs["input_ids"].shape[1] + GIVEN
    cache = KVCache(text.num_hidden_layers, 1, text.num_key_value_heads, length, text.head_dim,
                    model.language_model.model.norm.weight.dtype)
    steps = [model(**inputs, kv_cache=cache, logits_to_keep=1)]
    steps += [model(token.view(1, 1), kv_cache=cache) for token in given_tokens(model)]
    return torch.cat([step.logits[:, -1] for step in steps])


@torch.inference_mode()
def their_steps(model, inputs): # as above
    steps = [model(**inputs, logits_to_keep=1)]
    steps += [model(token.view(1, 1), past_key_values=steps[0].past_key_values)
              for token in given_tokens(model)]
    return torch.cat([step.logits[:, -1] for step in steps])


def gaps(ours, theirs, exact):
    "Where choices differ: how far apart in float32, in units of their largest deviation."
    a, b = ours.argmax(dim=1), theirs.argmax(dim=1)
    return [(row[i] - row[j]).abs().item() / deviation(theirs, exact)
            for row, i, j in zip(exact, a, b) if i != j]


def check(size, temporary, folder):
    from paligemma_nb import load_model
    from paligemma_nb.generation import generate
    results = {}
    cut = Path(temporary) / "cut"
    write_full_size(size, cut, num_layers=CUT)
    model, processor = load_model(cut, device="cpu", dtype="float32")
    inputs = make_inputs(processor)
    results[f"{CUT} layers, float32: logits differ by"] = relative(
        last_logits(model, inputs), last_logits(open_theirs(cut, "float32"), inputs))
    del model

    whole = full_size(size, folder or temporary)
    exact = our_steps(load_model(whole, device="cpu", dtype="float32")[0], inputs)
    theirs, (model, _) = open_theirs(whole, "bfloat16"), load_model(whole, device="cpu")
    results["parameters"] = sum(p.numel() for p in model.parameters())
    ours, expected = our_steps(model, inputs), their_steps(theirs, inputs)
    results |= {"bfloat16: our logits differ from float32 by": relative(ours, exact),
                "bfloat16: theirs differ from float32 by": relative(expected, exact),
                "bfloat16: ours differ from theirs by": relative(ours, expected),
                "steps, each behind another token": len(exact),
                "different tokens that float32 chooses": exact.argmax(dim=1).unique().numel(),
                "gaps where the choices differ (below 1: a tie)": gaps(ours, expected, exact)}
    model.config.eos_token_id, theirs.generation_config.eos_token_id = -1, None
    tokens = generate(model, inputs, max_new_tokens=GIVEN)
    results["16 greedy tokens, ours"] = tokens[0].tolist()
    tokens = theirs.generate(**inputs, max_new_tokens=GIVEN, min_new_tokens=GIVEN,
                             do_sample=False)
    results["16 greedy tokens, theirs"] = tokens[0, inputs["input_ids"].shape[1]:].tolist()
    return results


def main(results: str = "", folder: str = "", threads: int = 2):
    import transformers
    torch.set_num_threads(threads)
    found, failed = {}, []
    for size in ("3b", "3b2"):
        with tempfile.TemporaryDirectory() as temporary:
            found[size] = r = check(size, temporary, folder)
        print(size, *(f"{what}: {value}" for what, value in r.items()), sep="\n  ", flush=True)
        if r["16 greedy tokens, ours"] != r["16 greedy tokens, theirs"]:
            failed.append(f"{size}: other tokens")
        if r[f"{CUT} layers, float32: logits differ by"] > 1e-5:
            failed.append(f"{size}: float32 differs")
        theirs = r["bfloat16: theirs differ from float32 by"]
        if r["bfloat16: our logits differ from float32 by"] > 1.5 * theirs:
            failed.append(f"{size}: bfloat16 is less exact than theirs")
        if any(gap >= 1 for gap in r["gaps where the choices differ (below 1: a tie)"]):
            failed.append(f"{size}: another choice, and no tie")
    if results:
        versions = dict(transformers=transformers.__version__)
        write_results(results, "full_size", versions | dict(models=found))
    if failed: sys.exit("; ".join(failed))


if __name__ == "__main__":
    import fire
    fire.Fire(main)
