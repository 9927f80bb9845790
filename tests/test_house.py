"The house itself: packaging, scripts, the site's sources, and the rules that every notebook and module keeps."
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT/"nbs").glob("*.ipynb"))
PAGES = [ROOT/"index.ipynb", *LESSONS]
MODULES = sorted(p for p in (ROOT/"paligemma_nb").glob("*.py") if not p.name.startswith("_"))
CONFIG = ConfigParser()
CONFIG.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]


def each(paths): return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)
def read(path): return nbformat.read(path, as_version=4)
def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
def prose_cells(nb): return [c for c in nb.cells if c.cell_type == "markdown"]
def has_flag(cell, flag): return re.search(rf"^#\s*\|\s*{flag}\s*$", cell.source, re.M)
def outputs(nb): return [o for c in code_cells(nb) for o in c.outputs]


def run(*command, **kwargs):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **{"cwd": ROOT} | kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- packaging

def test_constraints_pin_every_requirement():
    lines = [line.split(";")[0].strip() for line in (ROOT/"constraints.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    asked = (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split()
    assert {re.split("[><=]", name)[0] for name in asked} <= pins.keys()
    assert all(pins[name] == version for name, _, version in (r.partition("==") for r in asked) if version)
    assert "torchvision" not in pins  # beside the CPU build of torch its import fails


def test_wheel_ships_the_models_the_sample_and_the_command(tmp_path):
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/"paligemma_nb", tmp_path/"paligemma_nb", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", ".", cwd=tmp_path)
    wheel = zipfile.ZipFile(next((tmp_path/"out").glob("*.whl")))
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT/"paligemma_nb").glob("tiny/*")}
    data |= {"paligemma_nb/sample.png", "paligemma_nb/mask_vae.safetensors"}
    assert len(data) > 1 and data <= set(wheel.namelist())
    commands = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "paligemma-nb = paligemma_nb.inference:main" in commands


def test_readme_is_the_front_page(): run(sys.executable, ".ci/readme.py", "--check")


# --- the two commands, with a Python that only writes down what it is asked to do

@pytest.fixture
def clone(tmp_path):
    "A clone in a folder with a space in its name: run(script, *arguments, **variables) -> the lines asked of Python"
    root, env = tmp_path/"a clone", tmp_path/"an env"
    shutil.copytree(ROOT/".ci", root/".ci")
    for name in ("launch_inference.sh", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(ROOT/name, root)
    (env/"bin").mkdir(parents=True)
    python, log = env/"bin"/"python", tmp_path/"log"
    python.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || printf "<%s>" "$@" >>"$LOG"; echo >>"$LOG"\n')
    python.chmod(0o755)

    def launch(*arguments, **variables):
        log.write_text("")
        run("bash", root/"launch_inference.sh", *arguments, cwd=tmp_path,
            env={"VIRTUAL_ENV": str(env), "LOG": str(log), **variables})
        return [line for line in log.read_text().splitlines() if line]
    launch.root = root
    return launch


def test_launch_installs_once_and_passes_its_parameters_on(clone):
    torch, rest, started = clone(PROMPT="detect  red circle", TOP_P="0.5")
    assert "<torch==" in torch and "<--editable><.>" in rest and "constraints.txt" in rest
    assert started == "<-m><paligemma_nb.inference><--prompt=detect  red circle><--output_image=answer.png><--top_p=0.5>"
    assert clone("--help") == ["<-m><paligemma_nb.inference><--help>"]
    (clone.root/"constraints.txt").write_text("torch==0\n")
    assert len(clone()) == 3  # changed requirements are installed


@each([ROOT/"launch_inference.sh", ROOT/"run_tests.sh", ROOT/".ci"/"run"])
def test_scripts_can_be_called(path):
    assert os.access(path, os.X_OK)
    run("bash", "-n", path)


# --- the site's sources

def listed(contents):
    "The pages of a sidebar, in order"
    for entry in contents:
        if isinstance(entry, str): yield entry
        else: yield from listed(entry["contents"])


def test_site_lists_every_page_in_order():
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    render = [page for pattern in site["project"]["render"] for page in sorted(ROOT.glob(pattern))]
    sidebar = [ROOT/page for page in listed(site["website"]["sidebar"]["contents"])]
    assert render == PAGES and sidebar == PAGES
    assert all((ROOT/link["href"]).exists() for link in site["website"]["navbar"]["left"])
    assert (ROOT/site["format"]["html"]["css"]).exists()


@each(sorted((ROOT/".github"/"workflows").glob("*")))
def test_workflows_are_plain_steps(path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    assert all("run" in step or "uses" in step for job in jobs for step in job["steps"])


PROCESS = """
import json, sys
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
pages = {}
for path in sys.argv[2:]:
    try:
        nb = read_nb(path)
        FilterDefaults()(nb)
        pages[path] = {"error": None, "source": "\\n".join(c.source for c in nb.cells)}
    except Exception as e:
        pages[path] = {"error": f"{e}: {e.__cause__!r}", "source": ""}
open(sys.argv[1], "w").write(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "What nbdev makes of every notebook for the site; it executes imports and exported cells on the way"
    folder = tmp_path_factory.mktemp("site")  # what a cell writes is written here
    shutil.copy(ROOT/"settings.ini", folder)
    run(sys.executable, "-c", PROCESS, folder/"pages.json", *PAGES, cwd=folder, env={"IN_TEST": "1"})
    return json.loads((folder/"pages.json").read_text())


@each(PAGES)
def test_page_is_processed_and_shows_the_code(path, site):
    page = site[str(path)]
    assert page["error"] is None
    assert page["source"].startswith("---\n") and "title:" in page["source"] and "description:" in page["source"]
    exported = [c.source for c in code_cells(read(path)) if has_flag(c, "exports?")]
    names = [d.group() for source in exported for d in re.finditer(r"^(?:class|def) \w+", source, re.M)]
    assert not [name for name in names if not re.search(rf"^{name}\b", page["source"], re.M)]
    left = re.findall(r"^#\| *default_exp.*|^nbdev\.nbdev_export.*", page["source"], re.M)
    assert not left, f"not marked #| hide: {left}"


@each(PAGES)
def test_first_cell_is_title_and_description(path):
    # nbdev turns the whole cell into the page's front matter: any further prose in it would be lost on the site.
    assert re.fullmatch(r"# .+\n+> .+", read(path).cells[0].source.strip())


def anchors(path):
    "The identifiers that pandoc gives to a page's headings, and nbdev to its exported names"
    nb = read(path)
    for cell in prose_cells(nb):
        for heading in re.findall(r"^#+ +(.+?) *#*$", cell.source, re.M):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*$]", r"\1", heading).lower()
            yield re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text).strip()))
    for cell in code_cells(nb):
        if has_flag(cell, "exports?"): yield from (n.lower() for n in re.findall(r"^(?:class|def) (\w+)", cell.source, re.M))


@each(PAGES)
def test_links_resolve(path):
    text = "\n".join(c.source for c in prose_cells(read(path)))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:href|src)=["']([^"']+)""", text)
    for link in links:
        if re.match(r"https?:|mailto:|data:|attachment:", link): continue
        name, _, anchor = link.partition("#")
        target = (path.parent/name).resolve() if name else path
        assert target.exists() and ROOT in target.parents, link
        if anchor: assert anchor in set(anchors(target)), link


# --- notebooks

@each(PAGES)
def test_notebook_is_valid_with_its_outputs(path):
    nb = read(path)
    nbformat.validate(nb)
    assert path.stat().st_size <= 400 * 1024
    assert any(c.outputs for c in code_cells(nb)), "no saved outputs"
    assert not [o for o in outputs(nb) if o.output_type == "error"]


@each(PAGES)
def test_notebook_stands_alone(path):
    nb = read(path)
    shown = "\n".join(text for o in outputs(nb) for text in [o.get("text", ""), *(
        data for kind, data in o.get("data", {}).items() if kind.startswith("text/") and isinstance(data, str))])
    absolute = re.search(r"(?<![\w.:/<)\]])(?:/[\w.-]+){2,}|\b[A-Z]:\\\w+", shown)
    assert not absolute, f"a path of one machine in an output: {absolute.group()}"
    text = shown + "\n".join(c.source for c in prose_cells(nb))
    remote = re.search(r"""!\[[^]]*\]\(https?:[^)]*|<img[^>]+src=["']https?:[^"']*""", text)
    assert not remote, f"an image from the network: {remote.group()}"


@each(LESSONS)
def test_lesson_keeps_the_house_style(path):
    nb = read(path)
    code = code_cells(nb)
    lines = [sum(bool(line.strip()) for line in c.source.splitlines()) for c in code]
    tests = sum(len(re.findall(r"^\s*(?:assert\b|test_\w+\(|\w*assert_\w+\()", c.source, re.M)) for c in code)
    plots = sum(any(k.startswith("image/") for o in c.outputs for k in o.get("data", {})) for c in code)
    assert statistics.median(lines) <= 5 and max(lines) <= 35
    assert max(len(line) for c in code for line in c.source.splitlines()) <= 120
    assert plots >= 3 and tests >= 6
    assert len(prose_cells(nb)) >= 0.6 * len(code)


# --- modules

FLOORS = {name: int(p.stem[:2]) for p in LESSONS
          for name in re.findall(r"^#\|\s*default_exp (\w+)", "\n".join(c.source for c in code_cells(read(p))), re.M)}


def imported(path):
    "Names of the package's modules that a module imports"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["paligemma_nb" if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else: continue
        yield from (name.split(".")[1] for name in names if name.startswith("paligemma_nb."))


@each(MODULES)
def test_module_imports_only_lower_floors(path):
    assert path.stem in FLOORS, "no notebook exports this module"
    above = {name for name in imported(path) if FLOORS.get(name, 0) >= FLOORS[path.stem]}
    assert not above, f"imports from its own or a later notebook: {above}"


@each(MODULES)
def test_module_can_be_read_in_one_sitting(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# %% ")]  # nbdev's cell marks
    assert len(lines) <= 380


def test_importing_the_library_stays_light():
    names = ", ".join(f"paligemma_nb.{p.stem}" for p in MODULES)
    loaded = run(sys.executable, "-c", f"import sys, {names}; print(*sys.modules)").split()
    assert not {"transformers", "matplotlib", "nbdev", "fastcore", "IPython", "torchvision"} & set(loaded)
