"The benchmark: what it says of made-up times, who has a turn when, and one small run."
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"bench"))

from compare_transformers import table  # noqa: E402
from machine import Pace, machine_line, machine_slug, percentile, write_results  # noqa: E402
from pairs import in_turns, interval, share_of_bound, summary  # noqa: E402


# --- verdicts

@pytest.mark.parametrize("n, out", [(6, 0), (8, 0), (9, 1), (12, 2), (54, 19), (2000, 955)])
def test_interval_leaves_out_as_many_as_coins_rarely_bring(n, out): # tables of the sign test
    assert interval(list(range(n))) == [out, n - 1 - out]


def test_fewer_than_six_pairs_cannot_tell():
    assert interval([2.0] * 5) is None
    assert summary([(1.0, 50.0)] * 5)["verdict"] == "too few to tell"
    assert summary([(1.0, 50.0)] * 6)["verdict"] == "faster"


def run_of(ours, theirs, n=40, noise=0.02, seed=0):
    "Pairs on a machine whose pace doubles or halves for five pairs at a time"
    chance, pairs = random.Random(seed), []
    for i in range(n):
        if i % 5 == 0: pace = chance.choice((0.5, 1, 2))
        pairs.append(tuple(t * pace * chance.gauss(1, noise) for t in (ours, theirs)))
    return pairs


@pytest.mark.parametrize("ours, verdict", [(100, "faster"), (110, "slower")])
def test_a_machine_that_changes_its_pace_does_not_hide_a_difference(ours, verdict):
    found = summary(run_of(ours, 105))
    assert found["verdict"] == verdict
    assert found["ratio"] == pytest.approx(105 / ours, rel=0.01)
    low, high = found["spread"]
    assert found["interval"][0] < found["ratio"] < found["interval"][1] < 1.2 and low < high


def test_a_few_pairs_disturbed_on_one_side_do_not_turn_a_verdict():
    pairs = run_of(100, 105)
    pairs[::8] = [(5 * a, b) for a, b in pairs[::8]]
    assert summary(pairs)["verdict"] == "faster"
    assert summary(pairs)["spread"][0] < 0.3  # but they are to be seen


def test_equal_sides_are_called_different_in_one_run_of_twenty_at_most():
    verdicts = [summary(run_of(100, 100, n=30, seed=seed))["verdict"] for seed in range(400)]
    assert 0 < sum(v != "cannot tell" for v in verdicts) <= 0.07 * 400


def test_ties_cannot_tell():
    assert summary([(3.0, 3.0)] * 50)["verdict"] == "cannot tell"
    assert summary([(3.0, 3.0)] * 30 + [(1.0, 2.0)] * 20)["verdict"] == "cannot tell"


def test_minima_stand_beside_medians():
    found = summary([(4, 9), (1, 8), (2, 2)])
    assert found["minima"] == [1, 2] and found["ratio_of_minima"] == 2
    assert (found["ours"], found["transformers"], found["ratio"]) == (2, 8, 9 / 4)


def test_memory_needs_all_pairs_but_not_many():
    assert summary([(2, 3), (2, 2.1)], memory=True)["verdict"] == "smaller"
    assert summary([(3, 2)], memory=True)["verdict"] == "larger"
    assert summary([(2, 3)] * 9 + [(3, 2)], memory=True)["verdict"] == "cannot tell"


def test_share_of_bound_pairs_each_token_with_its_read():
    size = 4 * Pace.block_bytes
    # bounds 40, 80 and 20 ms: the machine's pace changes
    assert share_of_bound([50, 100, 80], [10, 20, 5], size) == [20 / 50, 0.8]


# --- turns

class Theirs: # calls its criteria as transformers' `generate` does; a token is a line in a log
    def __init__(self, log): self.log = log

    def generate(self, input_ids, max_new_tokens, stopping_criteria, **kwargs):
        for _ in range(max_new_tokens):
            self.log.append("t")
            assert not stopping_criteria(input_ids, None).any()


def test_everyone_has_one_turn_and_follows_everyone():
    log = []
    others = {name: lambda name=name: log.append(name) for name in "abc"}
    inputs = dict(input_ids=torch.zeros(1, 3))
    times = in_turns(Theirs(log), inputs, 300, others, random.Random(0))
    assert list(times) == ["transformers", *"abc"]
    assert all(len(x) == 300 for x in times.values())
    assert all(sorted(log[i:i + 4]) == sorted("tabc") for i in range(0, 1200, 4))
    assert log[::4] == ["t"] * 300  # transformers' own loop leads
    follows = [(a, b) for a, b in zip(log, log[1:])]
    for pair in itertools.permutations("tabc", 2):
        assert 70 < follows.count(pair) < 130  # of 300, one of three


def test_a_turn_of_others_is_not_counted_as_theirs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow(list): # a token of theirs takes two seconds
        def append(self, name): clock[0] += 2

    def others(): clock[0] += 5
    times = in_turns(Theirs(Slow()), dict(input_ids=torch.zeros(1, 3)), 3, dict(ours=others))
    assert times == dict(transformers=[2000] * 3, ours=[5000] * 3)


# --- machines

@pytest.mark.parametrize("name, flags, settings, slug", [
    ("AMD EPYC", "avx2 avx512f avx512_bf16 avx512_vnni", "", "amd-epyc-vnni"),
    ("AMD EPYC 7B13 64-Core Processor", "fma avx2", "", "amd-epyc-7b13-avx2"),
    ("Intel(R) Xeon(R) Processor", "avx2 avx512_vnni amx_bf16", "", "intel-xeon-amx"),
    ("Intel(R) Xeon(R) Processor", "avx2 avx512_vnni amx_bf16", "AVX2", "intel-xeon-amx"),
    ("Intel(R) Xeon(R) CPU @ 2.20GHz", "avx2 avx512f avx512_vnnix", "", "intel-xeon-avx512")])
def test_slug_tells_machines_apart(tmp_path, monkeypatch, name, flags, settings, slug):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", settings)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", settings.lower())
    (tmp_path/"cpuinfo").write_text(f"model name\t: {name}\nflags\t\t: {flags}\n" * 2)
    older = "-as-avx2" if settings else ""
    threads = torch.get_num_threads()
    assert machine_slug(tmp_path/"cpuinfo") == f"{slug}-{threads}-threads{older}"
    assert ("ATEN_CPU_CAPABILITY=avx2" in machine_line()) == bool(settings)
    assert machine_slug(tmp_path/"none")  # not Linux


def test_results_are_read_back_with_five_digits(tmp_path):
    rows = [dict(what="a", pairs=[(2 / 3, 1234567.8)])] * 2
    write_results(tmp_path, "3b", dict(pace_ms=dict(read=[1 / 3, 20]), rows=rows))
    path = tmp_path/machine_slug()/"3b.json"
    found = json.loads(path.read_text())
    assert found["machine"] == machine_line() and found["pace_ms"] == dict(read=[0.33333, 20])
    assert found["rows"] == [dict(what="a", pairs=[[0.66667, 1234600]])] * 2


def test_every_result_names_its_machine():
    paths = sorted((ROOT/"bench"/"results").glob("*/*.json"))
    assert paths and all("threads" in json.loads(p.read_text())["machine"] for p in paths)
    for path in paths:  # a machine has a folder
        name, threads = json.loads(path.read_text())["machine"].split(", threads: ")
        assert path.parent.name.startswith(name.split()[0].lower().removesuffix("(r)"))
        assert f"-{threads.split(',')[0]}-threads" in path.parent.name


# --- from end to end

def test_a_small_run(tmp_path):
    command = [sys.executable, str(ROOT/"bench"/"compare_transformers.py"), "--size=tiny",
               "--rounds=2", "--new_tokens=3", "--opening_rounds=1", "--threads=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--results={tmp_path}"], check=True, capture_output=True,
                          text=True, env=env)
    found = json.loads(next(tmp_path.glob("*-1-threads*/tiny.json")).read_text())
    assert found["pace"] in done.stdout and "the same product took" in found["pace"]
    assert table(found["rows"]).splitlines()[0] in done.stdout
    assert found["start-up of the shipped model (s)"] > 0
    pairs = {row["what"]: row["pairs"] for row in found["rows"]}
    assert {what: len(values) for what, values in pairs.items()} == {
        "first token (ms)": 2, "each further token (ms)": 4, "open (s)": 1,
        "open and write 64 tokens (s)": 1, "training step of 64 rows (ms)": 2,
        "peak memory (MB)": 1}
    for row in found["rows"]:  # what a row says follows from the pairs that it keeps
        again = summary(row["pairs"], memory="memory" in row["what"])
        assert row["verdict"] == again["verdict"] and row["weights"] == "as stored"
        assert row["ratio"] == pytest.approx(again["ratio"], rel=1e-3)
        assert ("share_of_bound" in row) == (row["what"] == "each further token (ms)")
    # before and after the run, before each opening, and in each turn of an answer
    assert [len(times) for times in found["pace_ms"].values()] == [5 + 2 * 3 + 2 * 5 + 5] * 2
    assert percentile(found["pace_ms"]["read"], 0.5) > 0


# --- fine-tuning

def test_numbers_of_handwritten_digits_are_where_their_rows_say():
    from digits import INK, QUESTION, number_rows
    from paligemma_nb.datasets import check_texts
    from paligemma_nb.detection import parse_boxes
    rows = number_rows(30, seed=0)
    assert rows[0]["suffix"] == number_rows(1, seed=0)[0]["suffix"]
    assert [r["prefix"] == QUESTION for r in rows[:3]] == [True, False, True]
    numbers = {id(r["image"]): r["suffix"] for r in rows if r["prefix"] == QUESTION}
    assert {len(text) for text in numbers.values()} == {1, 2, 3, 4}
    for row in rows:
        check_texts(row["prefix"], row["suffix"])
        digit = row["prefix"].removeprefix("detect ")
        if digit == QUESTION: continue
        found = parse_boxes(row["suffix"], row["image"].size)
        assert len(found) == numbers[id(row["image"])].count(digit)
        for x1, y1, x2, y2 in (d.box for d in found):
            assert abs(x2 - x1 - INK) < 0.3 and abs(y2 - y1 - INK) < 0.3
            assert min(row["image"].crop((x1, y1, x2, y2)).getextrema()[0]) < 64  # ink


def test_unseen_digits_are_others():
    from digits import digits
    (seen, _), (unseen, values) = digits(), digits(held_out=True)
    assert len(seen) == 1_400 and len(seen) + len(unseen) == 1_797
    assert set(values) == set(range(10))


def test_gradients_of_an_adapter_are_those_of_peft(tmp_path):
    command = [sys.executable, str(ROOT/"bench"/"lora_full_size.py"), "--size=tiny",
               "--dtype=float32", "--threads=1", "--ways=ours,sdpa,eager"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, f"--results={tmp_path}"], check=True, env=env)
    found = json.loads(next(tmp_path.glob("*-1-threads*/lora_full_size.json")).read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert rows["ours"]["gradients_apart"] < 1e-5 and rows["eager"]["gradients_apart"] == 0
    assert all(len(row["losses"]) == 3 for row in rows.values())
    losses = rows["ours"]["losses"]
    assert losses == pytest.approx(rows["eager"]["losses"], rel=1e-4) and losses[2] < losses[0]


def test_bytes_on_paper_are_those_that_a_small_model_takes():
    from lora_bytes import (
        METHODS, activations, configs, counted_bytes, state_bytes, with_layers)
    for config in configs(28).values():
        config = with_layers(config, 3, 2)
        state = state_bytes(config)
        assert state == counted_bytes(config)
        assert [*state] == [*METHODS] and sorted(state.values())[::-1] == [*state.values()]
        for method in METHODS[:-1]:  # raises SystemExit where layers do not add up
            kept, checkpointed = activations(with_layers(config, 5, 4), method)
            assert 0 < checkpointed < kept


def test_what_color_alone_answers():
    import one_color
    from paligemma_nb.scenes import make_scene
    scene = make_scene(0)
    places = [("star", "red", 10), ("ring", "blue", 50), ("cross", "red", 100)]
    first = scene.objects[0]
    scene.objects = [replace(first, shape=shape, color=color, center=(x, 50.))
                     for shape, color, x in places]
    for a, b, answer in (("red star", "red cross", "none"),   # 10, 100: both are red
                         ("red star", "blue ring", "wrong"),  # 10, 50; red is at 55
                         ("blue ring", "red cross", "right")):
        for word in ("left of", "right of"):
            for x, y in ((a, b), (b, a)):
                prompt = f"answer en is the {x} {word} the {y}?"
                assert one_color.by_color(scene, prompt) == answer


def test_scenes_in_one_color_come_first():
    from one_color import ONE_COLOR, PRACTICE
    from paligemma_nb.scenes import make_scene
    from paligemma_nb.training import Recipe
    wanted = [s for s in map(make_scene, range(300)) if PRACTICE.wants(0, s)]
    assert wanted and all(PRACTICE.wants(ONE_COLOR, make_scene(k)) for k in range(20))
    for scene in wanted:
        assert len({o.color for o in scene.objects}) == 1 and len(scene.things()) > 1
    assert all(Recipe().wants(0, s) for s in wanted)


def test_what_is_stored_about_colors_belongs_to_the_shipped_model():
    import one_color
    from paligemma_nb import load_model
    from paligemma_nb.reward import fingerprint
    model, processor = load_model(device="cpu", dtype="float32")
    stored = json.loads(Path(one_color.OUTPUT).read_text())
    assert one_color.OneColor(**stored["recipe"]) == one_color.PRACTICE
    assert (stored["one_color"], stored["steps"]) == (one_color.ONE_COLOR, one_color.STEPS)
    assert stored["start"] == fingerprint(model)
    asked = {name: n for name, (_, n) in stored["before"].items()}
    assert asked == {name: n for name, (_, n) in stored["after"].items()}
    found = one_color.marks(model, processor, 40)  # of the same questions, the first ones
    assert all(0 < n <= asked[name] for name, (_, n) in found.items())
    assert found["right"][0] > .9 * found["right"][1]


@pytest.mark.long
@pytest.mark.parametrize("script", [
    "label_scenes", "serve_clients", "training_precision", "two_processes"])
def test_a_record(script):
    "It comes to its end, and leaves its results"
    subprocess.run([sys.executable, ROOT / "bench" / f"{script}.py", "--results",
                    ROOT / "bench" / "results"], check=True)
