"""What the site adds to the page of a notebook, which itself stays as it is (settings.ini:
`procs`): its number in the title, its outputs as they were saved, a fold over the cells that
only import and prepare, the live scene where its picture stands, and once the project is
published, links to run the lesson."""
import re
from itertools import takewhile
from pathlib import Path

import yaml
from execnb.nbio import mk_cell, read_nb
from nbdev.process import Processor

import published
from docs import title_of

FOLDED = '#| code-fold: true\n#| code-summary: "Set-up"\n'
LONG = 5  # lines of set-up; less needs no fold


def setup_of(cells: list) -> list: # neighbours; the first imports, none is exported
    def is_own(cell): return cell.cell_type == "code" and not getattr(cell, "directives_", {})
    start = next((i for i, cell in enumerate(cells)
                  if is_own(cell) and re.match(r"import |from ", cell.source)), len(cells))
    found = [*takewhile(lambda cell: is_own(cell) and not cell.outputs, cells[start:])]
    lines = sum(len(cell.source.splitlines()) for cell in found)
    return found if lines > LONG else []


class page(Processor):
    "Comes after nbdev's own, which have made the first cell the page's front matter."
    def begin(self):
        path, cells, matter = Path(self.nb.path_), self.nb.cells, self.nb.frontmatter_
        matter["title"] = title_of(path, matter["title"])
        cells[0].source = f"---\n{yaml.safe_dump(matter, allow_unicode=True)}---\n\n"
        code = [cell for cell in read_nb(path).cells if cell.cell_type == "code"]
        saved = {cell.id: cell.outputs for cell in code}
        for cell in cells: # nbdev has run some, which may say something else now
            if cell.get("id") in saved: cell.outputs = saved[cell.id]
        for cell in cells: # a line that is nothing but a link to the scene comes alive
            scene = re.search(r"^\[.+\]\((\S*scene/)index\.html\)$", cell.source, re.M)
            if scene and cell.cell_type == "markdown":
                cell.source += f'\n\n<script type="module" src="{scene[1]}embed.js"></script>'
        first, *others = setup_of(cells) or [None]
        if first: first.source = FOLDED + "\n\n".join(c.source for c in (first, *others))
        for cell in others: cell.source = None # the processor drops it
        if published.is_on():
            is_front = path.stem == "index"
            line = published.front() if is_front else published.run_links(f"nbs/{path.name}")
            cells.insert(1, mk_cell(line, "markdown"))
