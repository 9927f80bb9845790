"""Reads the things to do out of a lesson, with the answers that are tried on each.

One is a text cell with its label, a cell `# your turn` that ends with a check, and a text cell
with the folded solution:

    **Write it: a moon** (●●○, 10 minutes). …  or **Predict, then run** or **Find the fault**
"""
import re
from dataclasses import dataclass

from wrong_answers import WRONG

KINDS = "Predict, then run", "Write it", "Find the fault"
LABEL = re.compile(rf"^\*\*({'|'.join(KINDS)}): [^*]+\*\* \((.+?), (\d+) minutes?\)\.", re.M)
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n.*?^```python\n(.*?)^```$"
                      r".*?</details>", re.M | re.S)
CHECK = re.compile(r"^(check_\w+)\(.*\)$")


@dataclass(frozen=True)
class Exercise:
    kind: str      # one of KINDS
    stars: str     # how hard it is: ●○○, ●●○ or ●●●
    minutes: int
    hints: int     # folded ones
    stub: int      # the number of the cell with the stub, among all of the notebook's
    check: str     # the name of the check
    call: str      # the line that calls it
    solution: str

    def answers(self, lesson: str) -> list[tuple[str, str]]:
        """How the check's line must begin, and the code that is tried in place of the stub.
        A wrong answer is the whole code, or what to replace in the solution by what."""
        tried = [("right:", self.solution)]
        for wrong in WRONG.get(lesson, {}).get(self.check, ()):
            if not isinstance(wrong, str):
                old, new = wrong
                if old not in self.solution:
                    raise ValueError(f"{self.check}: {old!r} is not in the solution")
                wrong = self.solution.replace(old, new)
            tried.append(("not yet:", wrong))
        return [(begin, f"{code}\n{self.call}") for begin, code in tried]


def exercises(nb) -> list[Exercise]:
    "Of a notebook, in order. Raises ValueError for one that is not whole."
    found, task, stub = [], None, None
    for i, cell in enumerate(nb.cells):
        labels = LABEL.findall(cell.source) if cell.cell_type == "markdown" else ()
        if len(labels) > 1 or labels and task:
            raise ValueError(f"cell {i}: two labels, and no stub between them")
        if labels: task = (*labels[0], cell.source.count("<summary>Hint"))
        if cell.cell_type == "code" and "# your turn" in cell.source:
            stub, call = i, cell.source.strip().splitlines()[-1]
            if task is None: raise ValueError(f"cell {i}: a stub without a label before it")
            if not CHECK.match(call): raise ValueError(f"cell {i}: no check in the last line")
        elif stub is not None and cell.cell_type == "markdown":
            if not (solution := SOLUTION.search(cell.source)):
                raise ValueError(f"cell {i}: expected the folded solution of cell {stub}")
            kind, stars, minutes, hints = task
            found.append(Exercise(kind, stars, int(minutes), hints, stub,
                                  CHECK.match(call)[1], call, solution[1].rstrip()))
            task = stub = None
    if task is not None: raise ValueError("the last label lacks a stub, or a solution")
    return found
