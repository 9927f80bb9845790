"""Execute notebooks again and keep what they show: those given, or all that open the shipped
model, as is due when its weights have changed.

If all, first the pictures that the model draws for the front page; then the notebooks, two at
a time, one thread each; then nbdev_clean, and README. A notebook in which a cell raises stays
as it was, and is named at the end. Whether a lesson's sentences are still true of its outputs
is for people to read; the marks they quote, tests/test_quotes.py.
"""
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
OPENS = re.compile(r'load_(model|checkpoint)\(|paligemma_nb/tiny|"tiny"')  # the shipped model


def code(path: Path) -> str: # of all cells
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def execute(path: Path) -> bool: # did all of its cells run?
    words = "jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR".split()
    whole = "--ExecutePreprocessor.coalesce_streams=True"  # what is printed stays in one piece
    done = subprocess.run([*words, whole, path], stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    cell = done.stderr.rpartition("following cell:\n")[2] if done.returncode else ""
    print(path.name, cell, flush=True)
    return not done.returncode


def main(given: list[str]) -> None:
    notebooks = [ROOT/"index.ipynb", *sorted((ROOT/"nbs").glob("*.ipynb"))]
    paths = [*map(Path, given)] or [path for path in notebooks if OPENS.search(code(path))]
    if not given: subprocess.run([sys.executable, ROOT/".ci"/"social.py"], check=True)
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(execute, paths))
    subprocess.run(["nbdev_clean"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, ROOT/".ci"/"readme.py"], check=True)
    if failed := [path.name for path, ran in zip(paths, done) if not ran]:
        sys.exit(f"a cell raised, nothing was kept: {', '.join(failed)}")


if __name__ == "__main__": main(sys.argv[1:])
