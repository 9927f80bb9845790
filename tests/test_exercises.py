"""Every thing to do in a lesson has a stub, a check, a folded solution and wrong answers. That
the checks tell them apart is tried where the lessons run, in `.ci/notebooks.py`."""
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from exercises import KINDS, exercises
from wrong_answers import WRONG

from paligemma_nb.tour import verdict

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT/"nbs").glob("*.ipynb"))
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@each_lesson
def test_things_to_do_are_whole(path):
    nb = nbformat.read(path, as_version=4)
    found = exercises(nb)
    assert {exercise.kind for exercise in found} == set(KINDS)
    assert all(e.stars in ("●○○", "●●○", "●●●") and e.hints <= 2 for e in found)
    names = [exercise.check for exercise in found]
    assert len(names) == len(set(names)) and set(names) == WRONG.get(path.stem, {}).keys()
    few = [e.check for e in found if len(set(e.answers(path.stem))) < 3]
    assert not few, f"fewer than two wrong answers: {few}"
    told = "".join(c.source for c in nb.cells if 'class="write"' not in c.source)
    labelled = re.findall("[●○]{3}", told)  # without those of the edition to write in
    assert len(labelled) == len(found) + 2 * (path.stem == "00_tour"), "an unusual label"


@each_lesson
def test_run_all_runs_all(path):
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert not [source for source in code if re.search(r"^#\s*\|\s*eval:", source, re.M)]
    assert not [source for source in code if "nbdev.nbdev_export()" in source]


def test_there_is_plenty_to_do():
    lessons = [exercises(nbformat.read(path, as_version=4)) for path in LESSONS]
    assert sum(map(len, lessons)) >= 60


# --- the verdict

def said(capsys, check, answer=None):
    assert verdict(check)(answer) is None
    printed = capsys.readouterr()
    assert not printed.err
    line, = printed.out.splitlines()
    return line


def test_a_verdict_is_one_line_and_never_raises(capsys):
    def check(f):
        if f(2) != 4: raise AssertionError(f"expected 4,\n    got {f(2)}")
        return "all of them"
    assert said(capsys, check, lambda x: x * x) == "right: all of them"
    assert said(capsys, check, lambda x: x) == "not yet: expected 4, got 2"
    assert said(capsys, check, lambda x: x[0]).startswith("not yet: TypeError: 'int' object")
    def bare(x): raise AssertionError
    assert said(capsys, bare) == "not yet: def bare(x): raise AssertionError"


# --- the runner of notebooks finds a mistaken check

LESSON = {
    "task": "**Write it: twice** (●○○, 1 minute). Write `twice(x)`.",
    "check": "def check_twice(twice):\n    fine = {condition}\n"
             "    print('right: 6' if fine else 'not yet: 6')",
    "stub": "def twice(x): return x  # your turn\ncheck_twice(twice)",
    "solution": "<details><summary>Solution</summary>\n\n```python\n"
                "def twice(x): return 2 * x\n```\n</details>"}


def run_lesson(folder, condition="twice(3) == 6 and twice(5) == 10", **cells):
    new = dict(markdown=nbformat.v4.new_markdown_cell, code=nbformat.v4.new_code_cell)
    parts = LESSON | cells
    parts["check"] = parts["check"].format(condition=condition)
    kinds = {"task": "markdown", "solution": "markdown"}
    nb = nbformat.v4.new_notebook(
        cells=[new[kinds.get(name, "code")](source) for name, source in parts.items()])
    nbformat.write(nb, folder/"toy.ipynb")
    wrong = {"toy": {"check_twice": [("2 * x", "x + 3"), "def twice(x): return x ** 2"]}}
    (folder/"wrong_answers.py").write_text(f"WRONG = {wrong}")
    for file in (ROOT/".ci"/"notebooks.py", ROOT/"tests"/"exercises.py"):
        (folder/file.name).write_text(file.read_text())
    command = [sys.executable, "notebooks.py", "toy.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_right_lesson_passes(tmp_path): assert run_lesson(tmp_path)[0] == 0


@pytest.mark.parametrize("change, expected", [
    (dict(condition="twice(3) == 6"), "got 'right: 6':\ndef twice(x): return x + 3"),
    (dict(condition="twice(3) == 3"), "got 'right: 6':\ndef twice(x): return x  # your turn"),
    (dict(condition="twice(3) == 7"), "expected 'right:', got 'not yet: 6'"),
    (dict(stub="twice = None  # your turn\ncheck_twice(twice)"), "TypeError"),
    (dict(solution="No solution."), "expected the folded solution"),
    (dict(stub="def twice(x): return x  # your turn"), "no check in the last line"),
    (dict(last="open('left.txt', 'w').close()"), "changed files: ./left.txt"),
], ids=["wrong answer", "stub", "solution", "raises", "no solution", "no check", "file"])
def test_a_mistaken_lesson_fails(tmp_path, change, expected):
    code, shown = run_lesson(tmp_path, **change)
    assert code == 1 and expected in shown
