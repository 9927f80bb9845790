"""Build the site: what nbdev and Quarto write, then 404.html and llms.txt."""
import json
import os
import subprocess
from configparser import ConfigParser
from pathlib import Path

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


def lessons() -> list[tuple[Path, str, str]]: # notebook, title, description
    found = []
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        title, *rest = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
        found.append((path, title.lstrip("# "), rest[0].lstrip("> ")))
    return found


def add(site: Path) -> None: # the folder of the pages
    config = ConfigParser()
    config.read(ROOT/"settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    base, address = settings["doc_baseurl"], settings["doc_host"] + settings["doc_baseurl"]
    (site/"404.html").write_text(LOST.format(title=settings["title"], base=base))
    lines = "\n".join(f"- [{title}]({address}/nbs/{path.stem}.html): {about}"
                      for path, title, about in lessons())
    head = f"# {settings['title']}\n\n> {settings['description']}\n\n## Lessons\n\n"
    (site/"llms.txt").write_text(f"{head}{lines}\n")


def main() -> None:
    # settings.ini names a renderer, which stands beside this file
    subprocess.run("nbdev_docs", cwd=ROOT, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT/".ci")})
    add(ROOT/"_docs")


if __name__ == "__main__": main()
