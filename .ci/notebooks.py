"""Run notebooks, two at a time, each in a process of its own with one thread.

Takes their paths; prints what each takes of a processor, and the sum. Exit code 1: one fails
or hangs.
"""
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

MANY = 60  # seconds of a processor; more is said, and is no failure: processors differ
# A notebook that waits for ever takes no processor time, so its limit is in seconds of wall
# time. The slowest takes a minute: a slow and busy machine stays far below half an hour.
HANG = float(os.environ.get("NOTEBOOK_HANG", 30 * 60))


def run(path: str) -> tuple[float, bool]:
    "Seconds of a processor, and whether the notebook has passed"
    with tempfile.TemporaryFile("w+") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(["nbdev_test", "--path", path], env=env,
                                 stdout=subprocess.DEVNULL, stderr=log)
        (timer := threading.Timer(HANG, child.kill)).start()
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


def main(paths: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool: seconds, passed = zip(*pool.map(run, paths))
    print(f"{len(paths)} notebooks: processor {timedelta(seconds=round(sum(seconds)))} in all")
    failed = [path for path, has_passed in zip(paths, passed) if not has_passed]
    if failed: sys.exit(f"A notebook fails: {', '.join(failed)}. Its traceback stands above.")


if __name__ == "__main__": main(sys.argv[1:])
