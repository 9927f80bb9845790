"""The edition to write in: each stub says what it wants, the original passes the same cells,
and what was written becomes a package. How a cell becomes a stub is tested in its lesson, 47;
that every practice notebook runs to its end is a long proof."""
import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from paligemma_nb import practice
from paligemma_nb.inference import main

ROOT = Path(__file__).resolve().parents[1]
LESSONS = practice._lessons(ROOT)


def text(cell): return "".join(cell["source"])
def cells(path): return practice._read(path)["cells"]


def stubs(path): # name -> the cell
    return {name: text(cell) for cell in cells(path) for name in practice.marked(text(cell))}


STUBS = {path.stem: stubs(path) for path in LESSONS}
STUBS = {lesson: found for lesson, found in STUBS.items() if found}
NAMES = [(lesson, name) for lesson, found in STUBS.items() for name in found]
each_stub = pytest.mark.parametrize("lesson, name", NAMES)
CENTRAL = """patchify SiglipVisionEmbeddings.forward SiglipAttention.forward rotate_half
KVCache.update GemmaRMSNorm.forward GemmaMLP.forward grouped_attention prefix_lm_mask
merge_image_features
suffix_loss resize_weights image_to_tensor place_images left_pad nucleus naive_generate
published_key check_shapes coordinate_to_bin bin_to_coordinate parse_boxes Codebook.nearest
mask_vae_loss average_precision orthogonalize train_step Int8Linear.round round_to_int4
LoraLinear.forward sigmoid_loss""".split()


def test_there_is_plenty_to_write_and_nothing_central_is_left_out():
    names = [name for _, name in NAMES]
    assert len(names) == len(set(names)) >= 60 and set(CENTRAL) <= set(names)


# --- stubs

@each_stub
def test_a_stub_is_python_and_can_be_taken_back(lesson, name):
    source = STUBS[lesson][name]
    stub = practice.make_stub(source, name)
    ast.parse(stub)
    assert practice.is_stub(stub, name) and not practice.is_stub(source, name)
    assert practice.put_back(stub, name, source) == source
    assert max(map(len, stub.splitlines())) <= 95
    was, now = (practice._function(text, name) for text in (source, stub))
    assert ast.unparse(was.args) == ast.unparse(now.args)
    assert ast.get_docstring(was) == ast.get_docstring(now)


@pytest.fixture(scope="module")
def tried():
    "name -> what tests/practising.py found out about the stub, for all lessons"
    command = [sys.executable, ROOT/"tests"/"practising.py"]
    command += [path for path in LESSONS if path.stem in STUBS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@each_stub
def test_a_stub_says_what_was_expected_and_the_original_passes(lesson, name, tried):
    row = tried[name]
    assert row["lesson"] == lesson and row["again"] == []
    line = f"not yet: write {re.escape(name)}; expected: [^ ].*"
    assert any(re.fullmatch(line, said) for said in row["said"]), row["said"]


HINTS = re.compile(
    r'<details class="write"><summary>Write <code>([\w.]+)</code> yourself: [●○]{3}, '
    r"\d+ minutes</summary>\n\n.+?\n\n"
    r"<details><summary>Hint 1</summary>\n\n.+?\n\n</details>\n"
    r"<details><summary>Hint 2</summary>\n\n.+?\n\n</details>\n</details>", re.S)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_hints_stand_before_each_cell_to_write(path):
    found = cells(path)
    for before, cell in zip(found, found[1:]):
        if before["cell_type"] == "code": continue
        names = HINTS.findall(text(before))
        assert text(before).count('class="write"') == len(names)
        assert names == (practice.marked(text(cell)) if cell["cell_type"] == "code" else [])
        if names: assert text(cell).startswith(("#| export", "#| practice"))


# --- a course in a folder

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    return practice.write_course(tmp_path_factory.mktemp("a")/"b c"/"mine")


def test_the_folder_is_a_course_to_write_in(course):
    for path in LESSONS:
        nb = nbformat.read(course/"nbs"/path.name, as_version=4)
        nbformat.validate(nb)
        assert "go_on()" in nb.cells[1].source
        code = [c for c in nb.cells if c.cell_type == "code"]
        assert not [c for c in code if c.outputs or c.execution_count]
        for name in STUBS.get(path.stem, ()):
            [source] = [c.source for c in nb.cells if name in practice.marked(c.source)]
            assert practice.is_stub(source, name)
        prose = "".join(c.source for c in nb.cells if c.cell_type == "markdown")
        assert 'class="write">' not in prose
    assert (course/"index.ipynb").is_file() and list(course.glob("nbs/data/*.json"))
    assert list(course.glob("bench/results/*/3b.json"))
    assert sum(p.stat().st_size for p in course.rglob("*") if p.is_file()) < 4e6


def test_the_edition_to_read_is_complete(tmp_path, capsys):
    assert main(["practice", str(tmp_path/"x"), "--edition", "read"]) == 0
    assert capsys.readouterr().err == f"written: {tmp_path/'x'}\n"
    for path in LESSONS:
        was, now = cells(path), cells(tmp_path/"x"/"nbs"/path.name)
        assert [text(cell) for cell in was] == [text(cell) for cell in now]


def test_a_used_folder_is_left_alone(tmp_path, capsys):
    (tmp_path/"file").write_text("mine")
    (tmp_path/"used").mkdir()
    (tmp_path/"used"/"notes.txt").write_text("mine")
    for name in ("file", "used"):
        assert main(["practice", str(tmp_path/name)]) == 2
        assert re.fullmatch("error: .* exists: name a new folder.*\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "notes.txt", "used"]


# --- what was written, as a package

def change(folder, lesson, name, edit):
    "Edits the cell of one stub, as a learner does; the cell is left out where `edit` is None."
    path = folder/"nbs"/f"{lesson}.ipynb"
    notebook = practice._read(path)
    [cell] = [cell for cell in notebook["cells"] if name in practice.marked(text(cell))]
    if edit is None: notebook["cells"].remove(cell)
    else: cell["source"] = edit(text(cell))
    practice._write(notebook, path)


def solve(folder, lesson, name, *edits):
    solution = STUBS[lesson][name]
    for old, new in edits:
        assert old in solution
        solution = solution.replace(old, new)
    change(folder, lesson, name, lambda source: practice.put_back(source, name, solution))


@pytest.fixture
def fresh(course, tmp_path): return Path(shutil.copytree(course, tmp_path/"mine"))


@functools.cache
def reference(ask): return ask("paligemma_nb", ROOT)


@pytest.fixture
def asked_once(monkeypatch): # the course's own model says the same each time
    ask = practice._answer
    monkeypatch.setattr(practice, "_answer", lambda package, folder: (
        reference(ask) if package == "paligemma_nb" else ask(package, folder)))


def test_an_untouched_folder_makes_the_package_itself(fresh):
    states = practice.collect(fresh)
    assert {lesson: set(names) for lesson, names in states.items()} == {
        lesson: set(stubs) for lesson, stubs in STUBS.items()}
    assert not any(any(names.values()) for names in states.values())
    def modules(folder): # name -> code, whatever the package is called
        here = re.compile(r"\bfrom (?:my_paligemma|paligemma_nb|\.)\.?")
        files = set(folder.glob("*.py")) - {folder/"__main__.py", folder/"_modidx.py"}
        return {path.name: here.sub("from here.", path.read_text()) for path in files}
    assert modules(fresh/"my_paligemma") == modules(ROOT/"paligemma_nb")


def test_your_parts_are_used_and_the_rest_is_the_courses(fresh, capsys, asked_once):
    solve(fresh, "03_rope", "rotate_half")
    solve(fresh, "05_gemma", "GemmaDecoderLayer.add", ("x + mixed", "mixed + x  # mine"))
    change(fresh, "03_rope", "rotate_half", lambda source: source + "\n\ndef helper(): ...")
    assert main(["mine", str(fresh)]) == 0
    out = capsys.readouterr().out
    assert f"yours: 2 of the {len(NAMES)} functions to write\n" in out
    assert "right: my_paligemma.paligemma opens the shipped weights and says 'a " in out
    [left] = re.findall("05_gemma: (.*)", out)
    assert "GemmaDecoderLayer.forward" in left and "GemmaDecoderLayer.add" not in left
    assert "x = mixed + x  # mine" in (fresh/"my_paligemma"/"gemma.py").read_text()
    assert "def helper()" in (fresh/"my_paligemma"/"rope.py").read_text()


def test_a_wrong_part_and_one_that_raises_are_told(fresh, capsys, asked_once):
    solve(fresh, "03_rope", "rotate_half", ("-second, first", "second, first"))
    assert main(["mine", str(fresh)]) == 1
    assert re.search("^not yet: my_paligemma.paligemma says '.*', expected 'a ",
                     capsys.readouterr().out, re.M)
    solve(fresh, "05_gemma", "GemmaRMSNorm.forward", ("x.float()", "x.flaot()"))
    assert main(["mine", str(fresh)]) == 1
    assert re.search(r"^not yet: AttributeError: .*flaot.*\(my_paligemma/gemma.py, line \d+",
                     capsys.readouterr().out, re.M)


@pytest.mark.parametrize("edit, says", [
    (lambda source: source + "\n  oops(", "03_rope.ipynb: .*'oops\\('"),
    (lambda source: source.replace("def rotate_half", "def half"), "rotate_half is gone"),
    (None, r"03_rope.ipynb has no cell `#\| practice rotate_half` any more"),
], ids=["syntax", "name", "cell"])
def test_a_cell_that_cannot_be_used_is_named(fresh, capsys, edit, says):
    change(fresh, "03_rope", "rotate_half", edit)
    assert main(["mine", str(fresh)]) == 2
    assert re.fullmatch(f"error: .*{says}.*\n", capsys.readouterr().err)
    assert not (fresh/"my_paligemma").exists()


def test_whole_lessons_and_cells_without_export_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(practice, "_ANSWER", "oops")
    said, module = practice._answer("my_paligemma", tmp_path)
    assert module is None
    assert said.endswith("name 'oops' is not defined: its cell must begin with `#| export`")
    states = {"03_rope": dict(a=True), "05_gemma": dict(b=True, c=False)}
    monkeypatch.setattr(practice, "collect", lambda folder: states)
    monkeypatch.setattr(practice, "_answer", lambda *_: ("a ring", "mine"))
    assert practice.show_mine("x") == 0
    out = capsys.readouterr().out
    assert "yours: 2 of the 3 functions to write, and all of 03_rope\n" in out


def test_another_folder_is_refused(tmp_path, capsys):
    assert main(["mine", str(tmp_path)]) == 2
    assert "expected a folder of `paligemma-nb practice`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- a wheel, and a kernel

def test_a_wheel_holds_the_course(tmp_path):
    "Without the outputs, and with all that the command needs."
    build, home = tmp_path/"build", tmp_path/"installed"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "paligemma_nb", "bench"):
        shutil.copytree(ROOT/name, build/name, ignore=ignore)
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE", "index.ipynb"):
        shutil.copy(ROOT/name, build)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, "."], cwd=build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(home)
    env = os.environ | {"PYTHONPATH": str(home)}
    command = [sys.executable, "-m", "paligemma_nb", "practice", "mine"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    def files(folder): # name -> content
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): path.read_bytes() for path in paths}
    assert files(tmp_path/"mine") == files(practice.write_course(tmp_path/"here"))


def run_all(path):
    "As `jupyter nbconvert --execute`, which an error stops -> the lines `not yet: …`"
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, timeout=None, kernel_name="python3", resources=where).execute()
    shown = "\n".join(o.text for c in nb.cells for o in c.get("outputs", ()) if "text" in o)
    return re.findall("^not yet: .*", shown, re.M)


def test_run_all_goes_on_beyond_a_stub(fresh):
    lines = run_all(fresh/"nbs"/"03_rope.ipynb")
    for name in STUBS["03_rope"]: solve(fresh, "03_rope", name)
    solved = run_all(fresh/"nbs"/"03_rope.ipynb")
    assert any("write rotate_half;" in line for line in lines)
    assert not [line for line in solved if "; expected: " in line] and len(solved) < len(lines)


@pytest.mark.long
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_practice_notebook_runs_to_its_end(path, course): run_all(course/"nbs"/path.name)
