"""Run notebooks from top to bottom, as `jupyter nbconvert --execute` does, two at a time, each
in a process of its own with one thread.

Takes their paths; prints what each takes of a processor, and the sum. In a lesson's kernel it
also tries each exercise: the stub and all wrong answers must get `not yet: …` of their check,
the folded solution `right: …`. Exit code 1: a cell raises, a check is mistaken, a notebook
hangs, or a file here has changed.
"""
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# nbformat's validator would build a grammar of web addresses, in each process, for a second of
# the processor; it does without, and no notebook has one to check
sys.modules["rfc3987_syntax"] = None
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.append(str(Path(__file__).resolve().parents[1]/"tests"))
from exercises import exercises

MANY = 60  # seconds of a processor; more is said, and is no failure: processors differ
# A notebook that waits for ever takes no processor time, so its limit is in seconds of wall
# time. The slowest takes a minute: a slow and busy machine stays far below half an hour.
HANG = float(os.environ.get("NOTEBOOK_HANG", 30 * 60))


def run(path: str) -> None:
    "Run one notebook here. Raises CellExecutionError, or ValueError if a check is mistaken."
    nb = nbformat.read(path, as_version=4)
    to_do = {exercise.stub: exercise for exercise in exercises(nb)}
    where = {"metadata": {"path": str(Path(path).resolve().parent)}}
    client = NotebookClient(nb, kernel_name="python3", timeout=None, resources=where)

    def expect(begin, cell, i, answer):
        client.execute_cell(cell, i)
        shown = [o.text for o in cell.outputs if o.get("name") == "stdout"]
        line = "".join(shown).strip().split("\n")[-1]
        if not line.startswith(begin):
            raise ValueError(f"{to_do[i].check}: expected {begin!r}, got {line!r}:\n{answer}")

    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if i not in to_do: client.execute_cell(cell, i); continue
            expect("not yet:", cell, i, cell.source)
            for begin, answer in to_do[i].answers(Path(path).stem):
                code = f"exec({answer!r}, dict(globals()))"  # it leaves no names behind
                expect(begin, nbformat.v4.new_code_cell(code), i, answer)


def start(path: str) -> tuple[float, bool]:
    "Run one in a process of its own: seconds of a processor, and whether it has passed"
    with tempfile.TemporaryFile("w+") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, __file__, "--here", path], env=env,
                                 stdout=subprocess.DEVNULL, stderr=log)
        (timer := threading.Timer(HANG, child.kill)).start()  # its kernel sees that and ends
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        line = f"{path}: processor {seconds:.0f} s"
        if seconds > MANY: line += f" (a lesson should take less than {MANY})"
        if child.returncode == -signal.SIGKILL: line += ", KILLED: a hang, or no memory left"
        elif child.returncode: line += ", FAILED"
        log.seek(0)
        print(log.read() + line if child.returncode else line, flush=True)
        return seconds, child.returncode == 0


def files() -> dict[str, int]:
    "When each file of this folder was last written, hidden ones and caches left out"
    times = {}
    for folder, folders, names in os.walk("."):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        times |= {path: os.lstat(path).st_mtime_ns for path in
                  (os.path.join(folder, name) for name in names)}
    return times


def main(paths: list[str]) -> None:
    before = files()
    with ThreadPoolExecutor(2) as pool: seconds, passed = zip(*pool.map(start, paths))
    print(f"{len(paths)} notebooks: processor {timedelta(seconds=round(sum(seconds)))} in all")
    failed = [path for path, has_passed in zip(paths, passed) if not has_passed]
    if failed: sys.exit(f"A notebook fails: {', '.join(failed)}. What it said stands above.")
    changed = sorted({path for path, _ in before.items() ^ files().items()})
    if changed: sys.exit(f"Running the notebooks has changed files: {', '.join(changed)}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--here"]: main(sys.argv[1:])
    else:
        try: run(sys.argv[2])
        except (CellExecutionError, ValueError) as error: sys.exit(str(error))
