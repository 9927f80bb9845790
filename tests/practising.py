"""python practising.py NOTEBOOK ...: each stub of these lessons, tried in a shell of IPython.

For each marked function: the cell with its stub is run, then the cells that follow, until one
says `not yet: write NAME`; then the original cell, and the same cells once more, which have to
say nothing of the kind. Of the cells before, only those run that these need. Each lesson in a
process of its own, so that none sees what another has imported or changed. Prints a line of
JSON for each stub, and on stderr what each lesson takes of a processor."""
import ast
import contextlib
import dis
import io
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo  # optimizers import it; this and what follows once, for all lessons
from IPython.core.interactiveshell import InteractiveShell
from transformers.models.gemma import modeling_gemma  # noqa: F401
from transformers.models.paligemma import modeling_paligemma  # noqa: F401
from transformers.models.siglip import image_processing_pil_siglip  # noqa: F401
from transformers.models.siglip import modeling_siglip  # noqa: F401

from paligemma_nb import practice

# settings and imports: what nobody names, and all rely on
SETTING = re.compile("set_grad_enabled|chdir|filterwarnings|^(?:from|import) ", re.M)
SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
          ast.GeneratorExp)  # names that are bound in one of these stay there


def at_top(tree): # the syntax nodes of a cell that do not stand in a scope of their own
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, SCOPES): yield from at_top(node)


def brief(source): # with two steps of a training: no stub is tried on what it has learned
    return re.sub(r"in range\(\d+\)", "in range(2)", source) if ".backward()" in source else source


def names_in(node): return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def globals_of(code): # the names that compiled code looks up outside of its functions
    inner = [globals_of(x) for x in code.co_consts if hasattr(x, "co_code")]
    looks = ("LOAD_NAME", "LOAD_GLOBAL")
    return {x.argval for x in dis.get_instructions(code) if x.opname in looks}.union(*inner)


def made_by(node): # names that a statement, or a part of one, binds or may change
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return {node.name}
    if isinstance(getattr(node, "ctx", None), ast.Store): return names_in(node)
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call): return set()
    called = ast.unparse(node.value.func)
    if called.endswith("_"): return names_in(node)  # torch's way to say that it changes them
    if called == "print" or called.startswith("test_"): return set()
    return names_in(node.value.func if "." in called else node)


class Cell:
    def __init__(self, source, shell):
        self.source, code = source, shell.transform_cell(source)
        self.uses = globals_of(compile(code, "a cell", "exec"))
        self.makes = set().union(*map(made_by, at_top(ast.parse(code))))
        if SETTING.search(source): self.makes.add("settings")


class Lesson:
    def __init__(self, path):
        self.shell, self.done, self.path = InteractiveShell.instance(), set(), path
        sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                   if cell["cell_type"] == "code"]
        # an exercise's own stub says `not yet`, too, and is tried elsewhere
        self.cells = [Cell(text, self.shell) for text in sources if "# your turn" not in text]

    def said(self, source): # what a cell prints of its failure
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = self.shell.run_cell(source)
            plt.close("all")
        assert result.error_before_exec is None, source
        return [line for line in out.getvalue().splitlines() if line.startswith("not yet: ")]

    def prepare(self, i): # runs the cells above that cell i needs, if they have not run
        names, needed, above = {"settings"} | self.cells[i].uses, set(), self.cells[:i]
        def look(kind): # backwards
            for j, cell in reversed([*enumerate(above)]):
                if cell.makes & names and cell.source.startswith(kind) and j not in needed:
                    needed.add(j)
                    names.update(cell.uses)
        look("")
        for _ in range(3): look("#| export")  # it may use what is exported below it
        for j in sorted(needed - self.done): self.said(brief(self.cells[j].source))
        self.done |= needed

    def try_stub(self, i, name):
        cells, until, state = self.cells, i, torch.get_rng_state()
        lines = self.said(practice.make_stub(cells[i].source, name))
        while f"write {name};" not in " ".join(lines) and until + 1 < len(cells):
            until += 1
            self.prepare(until)
            lines += self.said(cells[until].source)
        torch.set_rng_state(state)
        again = [line for cell in cells[i:until + 1] for line in self.said(cell.source)]
        return dict(lesson=self.path.stem, name=name, said=lines, again=again)

    def try_stubs(self):
        for i, cell in enumerate(self.cells):
            names = practice.marked(cell.source)
            if not names: continue
            self.prepare(i)
            self.done.add(i)  # the original is run last
            for name in names: yield self.try_stub(i, name)


def main(paths):
    for path in map(Path, paths):
        if child := os.fork():
            if os.waitpid(child, 0)[1]: sys.exit(f"{path} cannot be tried")
            continue
        begin = time.process_time()
        warnings.simplefilter("ignore")
        os.chdir(path.parent)  # lessons read files beside them
        lesson = Lesson(path.absolute())
        practice.go_on()
        for found in lesson.try_stubs(): print(json.dumps(found), flush=True)
        print(f"{path.stem}: {time.process_time() - begin:.1f} s", file=sys.stderr, flush=True)
        os._exit(0)


if __name__ == "__main__": main(sys.argv[1:])
