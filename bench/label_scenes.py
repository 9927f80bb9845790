"""Many pictures: one process with two threads against two actors of Ray with one thread each.

    python bench/label_scenes.py --scenes 2000 --results bench/results

Draws scenes into a folder and runs `paligemma-nb label` twice over it. Every row must be equal
in text and boxes. Seconds are taken from the first part to the last, without the start of
either; the start stands beside them. (Each way answers in blocks of 64; what is measured is
the blocks after the first one of each process.)
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

from machine import write_results

ROOT = Path(__file__).parents[1]
PROMPTS = "caption en", "detect red circle"


def run(pictures, output, workers, threads): # -> rows, and one row of results
    words = [sys.executable, "-m", "paligemma_nb", "label", "--image_file_path", str(pictures),
             "--output_path", str(output), "--workers", str(workers), "--device", "cpu",
             *(word for prompt in PROMPTS for word in ("--prompt", prompt))]
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT),
                            TQDM_DISABLE="1")
    started = time.time()
    subprocess.run(words, env=env, check=True)
    parts = sorted(output.glob("part-*.jsonl"))
    ends = sorted(part.stat().st_mtime for part in parts)
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    first = max(1, workers)  # parts that were begun before anything could be measured
    count = len(rows) // len(PROMPTS) * (len(parts) - first) / len(parts)
    return rows, dict(workers=workers, threads=threads, until_first_part=ends[0] - started,
                      pictures_a_second=count / (ends[-1] - ends[first - 1]),
                      seconds=ends[-1] - started)


def main(scenes: int = 2_000, results: str | None = None):
    from paligemma_nb.scenes import HELD_OUT, make_scene
    with tempfile.TemporaryDirectory() as folder:
        (pictures := Path(folder) / "pictures").mkdir()
        for k in range(scenes): make_scene(HELD_OUT + k).image.save(pictures / f"{k:05}.png")
        ways = dict(one_process=(0, 2), two_actors=(2, 1))
        found = {name: run(pictures, Path(folder) / name, *way) for name, way in ways.items()}
    (one, first), (two, second) = found.values()
    differ = [(a, b) for a, b in zip(one, two, strict=True)
              if (a["text"], a["boxes"]) != (b["text"], b["boxes"])]
    for row in (first, second): print(row)
    print(f"{len(one)} rows, {len(differ)} differ")
    if results: write_results(results, "labelling", dict(
        scenes=scenes, prompts=PROMPTS, rows_that_differ=len(differ), rows=[first, second]))
    if differ: sys.exit(f"the first two: {differ[0]}")


if __name__ == "__main__": fire.Fire(main)
