"""Render index.ipynb as README.md, with its pictures in nbs/images.

--check: write nothing, say whether they are current."""
import re
import sys
from pathlib import Path

import nbformat
import published
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
images = root/"nbs"/"images"


def render() -> dict[Path, bytes]:
    "Each file of the rendered page with its content"
    # pictures are named nbs/images/README_<cell>_<n>.png
    resources = {"unique_key": "README", "output_files_dir": "nbs/images"}
    nb = nbformat.read(root/"index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean drops it, code fences want it
    about = {}  # cell -> what its picture shows, as the site's alternative text
    for i, cell in enumerate(nb.cells):
        if line := re.match(r'#\| fig-alt: "(.+)"\n', cell.source):
            about[str(i)], cell.source = line[1], cell.source[line.end():]
    text, resources = MarkdownExporter().from_notebook_node(nb, resources=resources)
    text = re.sub(r"!\[\w*\](?=\(nbs/images/README_(\d+)_)",
                  lambda picture: f"![{about[picture[1]]}]", text)
    page = f"{published.site()}/nbs/scene/" if published.is_on() else "nbs/scene"
    text = text.replace("](nbs/scene/index.html)", f"]({page})")  # alive on the site alone
    if published.is_on():
        title, _, rest = text.partition("\n\n")
        text = f"{title}\n\n{published.badges()}\n\n{rest}"
    pages = {root/"README.md": text.strip().encode() + b"\n"}
    # a picture is there in two formats, of which the page shows one
    pictures = resources["outputs"].items()
    return pages | {root/name: data for name, data in pictures if name in text}


def main() -> None:
    files = render()
    left = set(images.glob("README_*")) - files.keys()
    if "--check" not in sys.argv[1:]:
        images.mkdir(exist_ok=True)
        for path, data in files.items(): path.write_bytes(data)
        for path in left: path.unlink()
        return
    stale = [p for p, data in files.items() if not p.exists() or p.read_bytes() != data]
    if stale := stale + sorted(left):
        names = ", ".join(str(p.relative_to(root)) for p in stale)
        sys.exit(f"Not what index.ipynb renders to: {names}. Run: python .ci/readme.py")


if __name__ == "__main__": main()
