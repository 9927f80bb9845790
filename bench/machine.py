"""What a measurement was made on: the machine's name, its pace, and where its results belong.

`bench/results/` holds a folder for each machine, named after its processor, the best
instructions that it has for matrices (AMX, VNNI, AVX-512, AVX2) and the threads, such as
`intel-xeon-amx-2-threads`. Where the variables in EMULATIONS let it pass for an older one,
results go into a folder of their own: `intel-xeon-amx-2-threads-as-avx2`.
"""
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import torch

EMULATIONS = "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"
# the best first; each with the flag that Linux has for it
KINDS = dict(amx="amx_bf16", vnni="avx512_vnni", avx512="avx512f", avx2="avx2")


def processor(cpuinfo="/proc/cpuinfo"): # -> its name; the best of KINDS that it has, or ""
    text = Path(cpuinfo).read_text() if Path(cpuinfo).exists() else ""
    name = re.search(r"^model name\s*: (.+)", text, re.M)
    flags = re.search(r"^flags\s*: (.+)", text, re.M)
    flags = flags[1].split() if flags else []
    return (name[1].strip() if name else platform.processor() or platform.machine(),
            next((kind for kind, flag in KINDS.items() if flag in flags), ""))


def emulation(): return {name: os.environ[name] for name in EMULATIONS if os.environ.get(name)}


def machine_line():
    settings = [f"{name}={value}" for name, value in emulation().items()]
    return ", ".join([processor()[0], f"threads: {torch.get_num_threads()}", *settings,
                      f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def machine_slug(cpuinfo="/proc/cpuinfo"): # -> the name of its folder
    name, kind = processor(cpuinfo)
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", name.lower())
    older = list(dict.fromkeys(value.lower() for value in emulation().values()))
    words = [name, kind, f"{torch.get_num_threads()} threads", *["as"] * bool(older), *older]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words)).strip("-")


def brief(x): # five digits are enough for a file
    if isinstance(x, dict): return {key: brief(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)): return [brief(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def rows_on_lines(head, name, rows): # JSON: head, and under that name each row on a line
    lines = [f"  {json.dumps(key)}: {json.dumps(brief(value))}" for key, value in head.items()]
    rows = ",\n    ".join(json.dumps(brief(row)) for row in rows)
    if rows: lines.append(f'  "{name}": [\n    {rows}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_results(folder, kind, results):
    "Writes <folder>/<machine>/<kind>.json: the machine, then `results`, one row on a line."
    path = Path(folder) / machine_slug() / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = dict(machine=machine_line(), date=time.strftime("%Y-%m-%d"), load=os.getloadavg())
    rest = {key: value for key, value in results.items() if key != "rows"}
    path.write_text(rows_on_lines(head | rest, "rows", results.get("rows", ())))
    print(f"written: {path}")


def percentile(values, q): return sorted(values)[round(q * (len(values) - 1))]


def timed(work): # -> milliseconds
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def process(script, **flags): # of its own -> the JSON in the last line that it prints
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items())]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def peak_bytes(): # of this process's memory
    status = Path("/proc/self/status")  # on Linux getrusage would count the parent's, too
    if status.exists(): return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Pace:
    "The same two small works again and again: a product in float32, and a read of memory."
    block_bytes = 2**28  # of four in turn: when one comes round again, no cache should hold it

    def __init__(self):
        blocks = cycle(torch.ones(4, self.block_bytes // 8, dtype=torch.int64))
        square = torch.ones(1024, 1024)
        self.works = dict(multiply=lambda: square @ square, read=lambda: next(blocks).sum())
        self.times = {name: [] for name in self.works}  # milliseconds
        for work in self.works.values(): work()

    def note(self, count=5):
        for name, work in self.works.items():
            self.times[name] += [timed(work) for _ in range(count)]

    def bandwidth(self, q): # GB a second, at that percentile of the reads' times
        return self.block_bytes / percentile(self.times["read"], q) / 1e6

    def line(self):
        told = []
        for name, what in (("multiply", "product"), ("read", "read of memory")):
            low, high = (percentile(self.times[name], q) for q in (0.05, 0.95))
            factor = f"{high / low:.1f} times"
            told.append(f"the same {what} took {low:.1f} to {high:.1f} ms ({factor})")
        best, usual = self.bandwidth(0), self.bandwidth(0.5)
        return (f"Pace of the machine, nine times in ten: {', '.join(told)}. "
                f"It read {best:.1f} GB/s at best, {usual:.1f} in the median.")
