"""What rounding costs the shipped model: marks as stored, and in bfloat16 with small weights.

    python bench/quantised_marks.py --output_file bench/results/quantised_marks.json

On held-out scenes; some minutes on two cores. It is about answers, not speed: one file
serves for all machines.
"""
import json
from pathlib import Path

import torch


def main(num_scenes: int = 300, output_file: str = "", threads: int = 2):
    torch.set_num_threads(threads)
    from paligemma_nb import load_model, pack
    from paligemma_nb.scenes import HELD_OUT
    from paligemma_nb.tasks import evaluate, marks_table
    marks = {}
    for weights in (None, "int8", "int4"):
        dtype = "bfloat16" if weights else None
        model, processor = load_model(device="cpu", dtype=dtype, weights=weights)
        pack(model)
        name = weights or "float32"  # as asked for: of int4, some matrices have eight bits
        marks[name], _ = evaluate(model, processor, num_scenes, HELD_OUT)
        print(f"{name}\n\n{marks_table(marks[name])}\n", flush=True)
    if output_file:
        found = dict(num_scenes=num_scenes, marks=marks)
        Path(output_file).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    import fire
    fire.Fire(main)
