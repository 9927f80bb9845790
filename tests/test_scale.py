"Two processes do what one does: losses, weights, stopped runs; and bytes, counted on paper."
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharing import MORE, STOPPED, WAYS, command, run
from test_finetuning import distance, scenes_of_one_color, write_maestro

from paligemma_nb import scale, training
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.inference import main
from paligemma_nb.paligemma import PaliGemmaConfig
from paligemma_nb.scale import STRATEGIES, bytes_a_process
from paligemma_nb.siglip import SiglipVisionConfig

ROOT = Path(__file__).parents[1]


def launched(*words, folder=ROOT, **variables): # folder: of modules that are found first
    paths = os.pathsep.join(map(str, (folder, ROOT)))
    env = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
                            TQDM_DISABLE="1")
    done = subprocess.run([sys.executable, "-m", *words], env=env | variables,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "-m")


@pytest.fixture(scope="module")
def two(tmp_path_factory, request):
    "A folder with what two processes leave"
    folder, every = tmp_path_factory.mktemp("two"), request.config.getoption("--all")
    done = launched("torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(ROOT / "tests" / "sharing.py"), str(folder), *["all"] * every)
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "method, kind -> losses, weights at the end and at the start, of one process"
    folder, known = tmp_path_factory.mktemp("one"), {}
    def get(method, kind):
        if (method, kind) not in known:
            _, start = run(folder / f"{method}-{kind}-start", method, kind, stop=0)
            start, name = {n: w.clone() for n, w in start.items()}, f"{method}-{kind}"
            found = run(folder / name, method, kind, in_parts=method == "train")
            known[method, kind] = *found, start
        return known[method, kind]
    get.folder = folder
    return get


@pytest.mark.parametrize("method, kind, fsdp", WAYS + [
    pytest.param(*way, marks=pytest.mark.long) for way in MORE])
def test_two_processes_are_as_one(method, kind, fsdp, one, two):
    losses, weights, start = one(method, kind)
    name = f"{method}-{kind}-{fsdp}"
    others = json.loads((two / f"{name}.json").read_text())
    found = load_file(two / f"{name}.safetensors")
    assert len(losses) == 20 and losses[-1] < losses[0] and found.keys() == weights.keys()
    assert others == pytest.approx(losses, rel=1e-5)
    for n, w in weights.items(): torch.testing.assert_close(found[n], w, rtol=0, atol=1e-5)
    assert distance(found, weights) <= 2e-4 * distance(start, weights)


def test_muon_steps_on_the_whole_batch(one, two, tmp_path):
    losses, weights = run(tmp_path, "train", "muon")
    others = json.loads((two / "train-muon-False.json").read_text())
    found, start = load_file(two / "train-muon-False.safetensors"), one("train", "muon")[2]
    assert others[0] == pytest.approx(losses[0], rel=1e-6)
    assert others == pytest.approx(losses, rel=1e-5)
    assert distance(found, weights) <= 2e-4 * distance(start, weights)


def history(path): # of a run
    with safe_open(path / "state.safetensors", "pt") as file:
        return json.loads(file.metadata()["history"])


def test_marks_of_shared_weights(one, two):
    one("lora", "marks")
    alone = history(one.folder / "lora-marks")
    for a, b in zip(alone, history(two / "lora-marks-True"), strict=True):
        losses = [row["marks"]["all"].pop("loss") for row in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert (a["step"], a["marks"]) == (b["step"], b["marks"])


@pytest.mark.parametrize("method, kind, fsdp", STOPPED)
def test_stopped_as_two_continued_as_one(method, kind, fsdp, one, two, tmp_path):
    shutil.copytree(two / f"stopped-{method}-{fsdp}", tmp_path / "run")
    losses, weights, start = one(method, kind)
    rest, found = run(tmp_path / "run", method, kind, in_parts=method == "train")
    assert len(rest) == 12 and rest == pytest.approx(losses[8:], rel=1e-5)
    assert distance(found, weights) <= 2e-4 * distance(start, weights)
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as file:
        shapes = {n: file.get_slice(f"model/{n}").get_shape() for n in weights}
    assert shapes == {n: list(w.shape) for n, w in weights.items()}  # whole tensors


# --- the command

def test_the_command_with_fsdp(two, tmp_path):
    assert (two / "stdout").read_text().count("ask it: ") == 1  # only one of them speaks
    assert main(command(two, tmp_path / "alone")) == 0
    files = [{path.name for path in (folder / name).iterdir()}
             for folder, name in ((two, "shared"), (tmp_path, "alone"))]
    assert files[0] == files[1]
    found, expected = (load_file(path / "adapter_model.safetensors")
                       for path in (two / "shared", tmp_path / "alone"))
    moved = torch.cat([w.flatten() for n, w in expected.items() if "lora_B" in n]).norm()
    # in bfloat16, where AdamW's first steps may turn about
    assert found.keys() == expected.keys() and distance(found, expected) < .5 * moved


@pytest.mark.long
@pytest.mark.parametrize("kind", ["--multi_gpu", "--use_fsdp"])
def test_accelerate_launch(kind, tmp_path):
    "With replay, marks and the best weights, as one process does it"
    data = write_maestro(tmp_path / "data", scenes_of_one_color(0, 8))
    flags = ["finetune", "--data", str(data), "--valid", str(data), "--steps", "30",
             "--batch_size", "8", "--output_path"]
    launch, *rest = ACCELERATE
    done = launched(launch, kind, *rest, "paligemma_nb", *flags, str(tmp_path / "mine"))
    assert done.stdout.count("best after") == done.stderr.count("written: ") == 1
    assert main([*flags, str(tmp_path / "alone")]) == 0
    alone, shared = (history(tmp_path / f"{name}.run") for name in ("alone", "mine"))
    for a, b in zip(alone, shared, strict=True): # in bfloat16, so only about equal
        assert a["loss"] == pytest.approx(b["loss"], rel=.05)
        assert (a["step"], a["marks"].keys()) == (b["step"], b["marks"].keys())


SMALL = """
from dataclasses import replace
from paligemma_nb import tasks, training
training.STAGES = tuple(
    replace(recipe, steps=2, single_object_steps=0, scenes_per_step=2, warmup_steps=1,
            decay_steps=1, autocast=False) for recipe in training.STAGES[:2])
whole = tasks.evaluate
training.evaluate = tasks.evaluate = lambda model, processor, *_: whole(model, processor, 1)
"""


@pytest.mark.long
def test_train_by_accelerate_launch(tmp_path):
    "Two stages of two steps; the command is the real one"
    (tmp_path / "sitecustomize.py").write_text(SMALL)
    launch, *rest = ACCELERATE
    for name, words in dict(mine=(launch, "--multi_gpu", *rest), alone=()).items():
        done = launched(*words, "paligemma_nb", "train", "--output_path", str(tmp_path / name),
                        folder=tmp_path)
        assert done.stderr.count("written: ") == 1
    alone, shared = (json.loads((tmp_path / name / "model" / "history.json").read_text())
                     for name in ("alone", "mine"))
    assert alone["stages"] == shared["stages"] and len(alone["rows"]) == 2
    for a, b in zip(alone["rows"], shared["rows"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize("count, shards, message", [
    (2, True, "start it without --use_fsdp"), (3, False, "32 scenes in a step do not make 3")])
def test_train_that_cannot_be_shared(count, shards, message, monkeypatch, capsys):
    monkeypatch.setattr(scale, "several_processes", lambda: nullcontext(count))
    monkeypatch.setattr(scale, "team", [SimpleNamespace(shards=shards)])
    monkeypatch.setattr(training, "train_tiny", None)
    assert main(["train"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rows, parts", [(5, 1), (4, 4)])
def test_what_does_not_divide(rows, parts):
    message = f"{rows} rows do not make 2 processes times {parts} parts"
    with pytest.raises(ValueError, match=message):
        scale._check(dict(batch_size=rows, parts=parts), 2)


ALONE = """
import sys
from paligemma_nb.scale import several_processes
with several_processes() as count: print(count)
assert not {"accelerate", "ray", "fastapi"} & sys.modules.keys()
"""


def test_one_process_imports_nothing_for_it():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


# --- bytes

VISION = SiglipVisionConfig(1152, 4304, 27, 16, patch_size=14, image_size=224)
PUBLISHED = {
    2_923_466_480: GemmaConfig(2048, 16384, 18, 8, 1, 257_216),
    9_662_638_832: Gemma2Config(3584, 14336, 42, 16, 8, 257_216),
    27_650_487_024: Gemma2Config(4608, 36864, 46, 32, 16, 257_216, head_dim=128)}


@pytest.mark.parametrize("weights", PUBLISHED)
def test_bytes_on_paper(weights):
    text = PUBLISHED[weights]
    config, layers = PaliGemmaConfig(VISION, text, 257_152), text.num_hidden_layers
    found = {(s, n): bytes_a_process(config, s, n) for s in STRATEGIES for n in (1, 8)}
    assert found["data parallel", 8] == found["data parallel", 1]
    assert found["data parallel", 1].total == 18 * weights
    kept = found["FSDP", 8]
    assert kept.weights + kept.gradients + kept.moments == 16 * weights / 8
    layer = (text.hidden_size * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
             * text.head_dim + 3 * text.hidden_size * text.intermediate_size)
    rest = 257_216 * text.hidden_size  # the embedding; norms and the projector are small
    assert kept.copies == pytest.approx(10 * max(layer, rest), rel=.01)
    heads = text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    adapters = 8 * layers * (4 * text.hidden_size + 2 * heads
                             + 3 * (text.hidden_size + text.intermediate_size))
    lora = found["LoRA, data parallel", 8]
    assert (lora.gradients, lora.moments) == (4 * adapters, 8 * adapters)
    assert lora.weights == 2 * weights + 4 * adapters and lora.copies == 0
    assert found["LoRA, FSDP", 8].total < lora.total < found["data parallel", 8].total
