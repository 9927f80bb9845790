"""Fine-tuning on two processes against one: losses and weights of 20 steps in float32.

    python bench/two_processes.py --results bench/results     # half a minute

tests/sharing.py is run by two processes (gloo), once for each way: full or LoRA, SGD or AdamW,
data parallel or FSDP; the same again by this one. Losses differ by at most so much relatively;
weights by a share of the way from the start to the end of the run.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
from safetensors.torch import load_file

from machine import write_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main(results: str | None = None):
    from sharing import WAYS, run
    from test_finetuning import distance
    with tempfile.TemporaryDirectory() as folder:
        folder, rows, known = Path(folder), [], {}
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", "2", ROOT / "tests" / "sharing.py", folder]
        subprocess.run(words, check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        for method, kind, fsdp in WAYS:
            if (method, kind) not in known:
                _, start = run(folder / f"{method}-start", method, kind, stop=0)
                known[method, kind] = start, *run(folder / f"{method}-{kind}", method, kind)
            start, one, weights = known[method, kind]
            name = f"{method}-{kind}-{fsdp}"
            two, found = json.loads((folder / f"{name}.json").read_text()), load_file(
                folder / f"{name}.safetensors")
            rows.append(dict(
                way=f"{method}-{kind}-{'fsdp' if fsdp else 'data'}",
                losses_differ=max(abs(a - b) / a for a, b in zip(one, two, strict=True)),
                weights_differ=distance(found, weights) / distance(start, weights),
                one=one, two=two))
            print({key: rows[-1][key] for key in ("way", "losses_differ", "weights_differ")})
    if results: write_results(results, "two_processes", dict(rows=rows))


if __name__ == "__main__": fire.Fire(main)
