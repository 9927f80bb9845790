"""Training on two processes against one: losses and weights of 20 steps in float32.

    python bench/two_processes.py --results bench/results     # a minute

tests/sharing.py is run by two processes (gloo), once for each way: full or LoRA, SGD or AdamW,
data parallel or FSDP; training from nothing with Muon; the same again by this one. Losses
differ by at most so much relatively; weights by a share of the way from the start to the end
of the run. In parts: where this one takes each batch in two halves, as the two do.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import repeat
from pathlib import Path

import fire
from safetensors.torch import load_file

from machine import write_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main(results: str | None = None):
    from sharing import MORE, WAYS, run
    from test_finetuning import distance
    with tempfile.TemporaryDirectory() as folder:
        folder, rows, known = Path(folder), [], {}
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", "2", ROOT / "tests" / "sharing.py", folder, "all"]
        subprocess.run(words, check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        for way, in_parts in [*zip(sorted(MORE + WAYS), repeat(False)), (WAYS[-1], True)]:
            *asked, fsdp = way
            if (key := (*asked, in_parts)) not in known:
                _, start = run(folder / "start", *asked, stop=0)
                path = folder / "-".join(map(str, key))
                known[key] = start, *run(path, *asked, in_parts=in_parts)
                shutil.rmtree(folder / "start")
            start, one, weights = known[key]
            name = "-".join(map(str, way))
            two = json.loads((folder / f"{name}.json").read_text())
            found = load_file(folder / f"{name}.safetensors")
            kinds = [*asked, "fsdp" if fsdp else "data"] + ["parts"] * in_parts
            rows.append(dict(
                way="-".join(kinds),
                losses_differ=max(abs(a - b) / a for a, b in zip(one, two, strict=True)),
                weights_differ=distance(found, weights) / distance(start, weights),
                one=one, two=two))
            print({key: rows[-1][key] for key in ("way", "losses_differ", "weights_differ")})
    if results: write_results(results, "two_processes", dict(rows=rows))


if __name__ == "__main__": fire.Fire(main)
