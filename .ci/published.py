"""What leads to the project's place on the network, once there is one: `published = True` in
settings.ini. Till then nothing of it is shown: no link leads nowhere.

python .ci/published.py FOLDER writes the lessons for Colab there, which the site's workflow
pushes as the branch `colab`: each begins with a cell that installs the course."""
import json
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ConfigParser()
CONFIG.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
TOUR = "nbs/00_tour.ipynb"
INSTALL = """\
import os, subprocess, sys

if "google.colab" in sys.modules and not os.path.exists("../settings.ini"):
    subprocess.run(["git", "clone", "--depth", "1", "{git_url}"], check=True)
    os.chdir("{repo}/nbs")  # here are the pictures and records that the lessons show
    pip = sys.executable, "-m", "pip", "install", "--quiet"
    subprocess.run([*pip, "..[course]"], check=True)
"""


def is_on() -> bool: return SETTINGS.getboolean("published")


def site() -> str: return SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]


def run_links(page: str = TOUR) -> str: # the path of a notebook
    "Where a lesson can be run without installing anything"
    name = f"{SETTINGS['user']}/{SETTINGS['repo']}"
    colab = f"https://colab.research.google.com/github/{name}/blob/colab/{page}"
    binder = f"https://mybinder.org/v2/gh/{name}/{SETTINGS['branch']}?labpath={page}"
    return f"Run it in [Colab]({colab}) or in [Binder]({binder})"


def front() -> str:
    "The line of the site's front page"
    return f"`pip install {SETTINGS['lib_name']}` · {run_links()}"


def badges() -> str:
    "The lines of README: a badge comes from another host, so the site has none"
    tests = f"{SETTINGS['git_url']}/actions/workflows/test.yaml"
    return (f"[![Tests]({tests}/badge.svg)]({tests})\n\n"
            f"{front()} · [read it on the site]({site()})")


def write_lessons(folder: Path) -> None:
    "The notebooks as they are, but for a first cell"
    cell = dict(cell_type="code", id="install", metadata={}, outputs=[], execution_count=None,
                source=INSTALL.format(**SETTINGS))
    (folder/"nbs").mkdir(parents=True)
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"].insert(1, cell)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        (folder/"nbs"/path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if is_on(): write_lessons(Path(sys.argv[1]))
    else: print("Not published: `published` in settings.ini is off.")
