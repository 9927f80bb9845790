"""Build the site: what nbdev and Quarto write, an index of all names, 404.html, llms.txt."""
import ast
import json
import os
import re
import subprocess
from pathlib import Path

from published import SETTINGS, site

ROOT = Path(__file__).resolve().parents[1]
LOST = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>No such page: {title}</title>
<style>
  :root {{ color-scheme: light dark; font: 18px/1.6 system-ui, sans-serif; }}
  body {{ max-width: 34em; margin: 15vh auto; padding: 0 1em; }}
</style>
<h1>There is no such page</h1>
<p>The lesson may have got another number. The <a href="{base}/">front page</a> lists all of
them, and the search is there, too.</p>
</html>
"""


def title_of(path: Path, title: str) -> str: # as the site, its search and llms.txt have it
    number = re.match(r"(\d\d)_", path.name)
    return f"{number[1]} · {title}" if number else title


def lessons() -> list[tuple[Path, str, str]]: # notebook, title, description
    found = []
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        title, *rest = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
        found.append((path, title_of(path, title.lstrip("# ")), rest[0].lstrip("> ")))
    return found


def address(lesson: Path) -> str: # nbdev takes the number away
    return f"{site()}/nbs/{re.sub('^[0-9]+_', '', lesson.stem)}.html"


# --- all names

def constants(node: ast.Assign, lines: list[str]): # each name, and its comment or its value
    comment = lines[node.end_lineno - 1].partition("  # ")[2]
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple): pairs = zip(target.elts, node.value.elts)
        for name, value in pairs:
            text = ast.unparse(value)
            text = text if len(text) < 60 else f"{text[:50]} …"
            yield ast.unparse(name), comment.replace("<", r"\<") or f"`{text}`"


def names_of(module: Path) -> list[tuple[str, str, bool]]: # name, one line, has it an anchor
    source = module.read_text(encoding="utf-8")
    said, public = {}, []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            first = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
            said[node.name] = re.match(r"(?:`[^`]*`|.)*?[.?!](?= |$)|.+", first)[0], True
        elif ast.unparse(node).startswith("__all__ = "): public = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign):
            for name, line in constants(node, source.splitlines()): said[name] = line, False
    return [(name, *said[name]) for name in sorted(public, key=str.lower)]


def all_names() -> str:
    "The page names.qmd: each module in the order of the lessons, each name with one line"
    page = ['---\ntitle: "All names"',
            'description: "What the modules of `paligemma_nb` export, one line each"\n---']
    for path, title, _ in lessons():
        module = ROOT/SETTINGS["lib_path"]/f"{path.stem[3:]}.py"
        about = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
        rows = [f"| [`{name}`](nbs/{path.name}{f'#{name.lower()}' * anchored}) | {line} |"
                for name, line, anchored in names_of(module)]
        page += [f"## {path.stem[:2]} · {module.stem}",
                 " ".join(f"{about} (Lesson [{title}](nbs/{path.name}))".split()),
                 "\n".join(["| name | what it is |", "|---|---|", *rows])]
    return "\n\n".join(page) + "\n"


# --- the site

def add(folder: Path) -> None: # the folder of the pages
    base = SETTINGS["doc_baseurl"]
    (folder/"404.html").write_text(LOST.format(title=SETTINGS["title"], base=base))
    pages = [(title, address(path), about) for path, title, about in lessons()]
    pages.append(("All names", f"{site()}/names.html", "what each module exports"))
    lines = "\n".join(f"- [{title}]({link}): {about}" for title, link, about in pages)
    head = f"# {SETTINGS['title']}\n\n> {SETTINGS['description']}\n\n## Lessons\n\n"
    (folder/"llms.txt").write_text(f"{head}{lines}\n")


def main() -> None:
    (ROOT/"names.qmd").write_text(all_names())
    # settings.ini names a renderer and a processor, which stand beside this file
    subprocess.run("nbdev_docs", cwd=ROOT, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT/".ci")})
    add(ROOT/"_docs")


if __name__ == "__main__": main()
