"Two processes do what one does: losses, weights, stopped runs; and bytes, counted on paper."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharing import WAYS, run
from test_finetuning import distance, scenes_of_one_color, write_maestro

from paligemma_nb import scale
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.gemma2 import Gemma2Config
from paligemma_nb.inference import main
from paligemma_nb.paligemma import PaliGemmaConfig
from paligemma_nb.scale import STRATEGIES, bytes_a_process
from paligemma_nb.siglip import SiglipVisionConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A folder with what two processes leave"
    folder = tmp_path_factory.mktemp("two")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
             "--standalone", ROOT / "tests" / "sharing.py", folder]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "method, kind -> losses, weights at the end and at the start, of one process"
    folder, known = tmp_path_factory.mktemp("one"), {}
    def get(method, kind):
        if (method, kind) not in known:
            _, start = run(folder / f"{method}-{kind}-start", method, kind, stop=0)
            start = {n: w.clone() for n, w in start.items()}
            known[method, kind] = *run(folder / f"{method}-{kind}", method, kind), start
        return known[method, kind]
    return get


@pytest.mark.parametrize("method, kind, fsdp", WAYS)
def test_two_processes_are_as_one(method, kind, fsdp, one, two):
    losses, weights, start = one(method, kind)
    name = f"{method}-{kind}-{fsdp}"
    others = json.loads((two / f"{name}.json").read_text())
    found = load_file(two / f"{name}.safetensors")
    assert len(losses) == 20 and losses[-1] < losses[0] and found.keys() == weights.keys()
    assert others == pytest.approx(losses, rel=1e-5)
    for n, w in weights.items(): torch.testing.assert_close(found[n], w, rtol=0, atol=1e-5)
    assert distance(found, weights) <= 2e-4 * distance(start, weights)


@pytest.mark.parametrize("fsdp", [False, True])
def test_stopped_as_two_continued_as_one(fsdp, one, two, tmp_path):
    shutil.copytree(two / f"stopped-{fsdp}", tmp_path / "run")
    losses, weights, start = one("full", "adamw")
    rest, found = run(tmp_path / "run", "full", "adamw")
    assert len(rest) == 12 and rest == pytest.approx(losses[8:], rel=1e-5)
    assert distance(found, weights) <= 2e-4 * distance(start, weights)
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as file:
        shapes = {n: file.get_slice(f"model/{n}").get_shape() for n in weights}
    assert shapes == {n: list(w.shape) for n, w in weights.items()}  # whole tensors


# --- the command

def launched(*flags, **variables): # by two processes
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
             "2", "-m", "paligemma_nb", "finetune", *flags]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
                            TQDM_DISABLE="1")
    return subprocess.run(words, env=env | variables, capture_output=True, text=True)


def test_the_command_with_fsdp(tmp_path):
    data = write_maestro(tmp_path / "data", scenes_of_one_color(0, 4))
    output, alone = tmp_path / "mine", tmp_path / "alone"
    flags = ["--data", str(data), "--steps", "2", "--batch_size", "4", "--replay", "0"]
    done = launched(*flags, "--output_path", str(output), ACCELERATE_USE_FSDP="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ask it: ") == 1  # one of them speaks
    assert main(["finetune", *flags, "--output_path", str(alone)]) == 0
    name = "adapter_model.safetensors"
    found, expected = (load_file(path / name) for path in (output, alone))
    assert found.keys() == expected.keys()
    for n, w in expected.items(): torch.testing.assert_close(found[n], w, rtol=0, atol=2e-3)
    assert {path.name for path in output.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.long
def test_the_command_with_marks(tmp_path):
    "Data parallel, with replay, marks and the best weights, as one process does it"
    data = write_maestro(tmp_path / "data", scenes_of_one_color(0, 8))
    flags = ["--data", str(data), "--valid", str(data), "--steps", "30", "--batch_size", "8"]
    done = launched(*flags, "--output_path", str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    assert main(["finetune", *flags, "--output_path", str(tmp_path / "alone")]) == 0
    histories = []
    for name in ("mine", "alone"):
        with safe_open(tmp_path / f"{name}.run" / "state.safetensors", "pt") as file:
            histories.append(json.loads(file.metadata()["history"]))
    for a, b in zip(*histories, strict=True): # in bfloat16, so only about equal
        assert a["loss"] == pytest.approx(b["loss"], rel=.05)
    assert "best after" in done.stdout


def test_train_is_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train"]) == 2
    assert "train runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (dict(batch_size=5, parts=1, valid=None), "5 rows do not make 2 processes times 1 parts"),
    (dict(batch_size=4, parts=4, valid=None), "4 rows do not make 2 processes times 4 parts"),
    (dict(batch_size=4, parts=1, valid="x"), "with FSDP leave it out")])
def test_what_does_not_divide(flags, message, monkeypatch):
    monkeypatch.setattr(scale, "team", [SimpleNamespace(shards=True)])
    with pytest.raises(ValueError, match=message): scale._check(flags, 2)


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


@pytest.mark.long
def test_a_record_of_two_processes():
    subprocess.run([sys.executable, ROOT / "bench" / "two_processes.py", "--results",
                    ROOT / "bench" / "results"], check=True)
