"Each mark of the shipped model that a lesson's text quotes is the one in results.json."
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKS = json.loads((ROOT / "paligemma_nb" / "tiny" / "results.json").read_text())["marks"]

# as they stand there: with new weights the test says which to write anew
QUOTES = {
    "30_tasks": (
        "a mean IoU of {detect[iou]:.3f} for boxes and {segment[iou]:.3f} for masks",
        "all {color[asked]} questions for a colour and all {shape[asked]} for a shape were "
        "answered rightly",
        "{several[all_found]:.0%} for several, {several_absent[right]:.0%} for "
        "several_absent, {where[right]:.0%} for where"),
    "37_reward": ("two things at once went from 0.740 to {several[all_found]:.3f}",),
}


def text_of(lesson): # its prose and what its plots show, on one line
    cells = json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text())["cells"]
    return " ".join(" ".join("".join(cell["source"]).split()) for cell in cells)


@pytest.mark.parametrize("lesson, quote",
                         [(lesson, quote) for lesson in QUOTES for quote in QUOTES[lesson]])
def test_quoted_marks_are_those_of_the_results(lesson, quote):
    text = text_of(lesson).replace(" %", "%")
    assert quote.format(**MARKS) in text, f"{lesson}: expected {quote.format(**MARKS)!r}"


def test_what_lesson_30_computes_from_the_marks():
    lacks, missed = 1 - MARKS["segment"]["iou"], 1 - MARKS["segment"]["over_half"]
    text = text_of("30_tasks")
    assert MARKS["color"]["right"] == MARKS["shape"]["right"] == 1
    assert f"`segment` lacks {lacks:.3f} to a mean IoU of 1" in text
    assert f"Misses, {100 * missed:.1f} answers of a hundred" in text


def test_the_card_shows_the_marks():
    from paligemma_nb.tasks import marks_table
    assert marks_table(MARKS) in (ROOT / "paligemma_nb" / "tiny" / "README.md").read_text()


def tables(path): # what a notebook's outputs show as Markdown
    outputs = [o for cell in json.loads((ROOT / path).read_text())["cells"]
               for o in cell.get("outputs", ())]
    return ["".join(o["data"]["text/markdown"]) for o in outputs
            if "text/markdown" in o.get("data", ())]


@pytest.mark.parametrize("path", ["index.ipynb", "nbs/30_tasks.ipynb"])
def test_a_table_of_marks_is_that_of_the_results(path):
    from paligemma_nb.tasks import marks_table
    assert any(marks_table(MARKS) in table for table in tables(path))
