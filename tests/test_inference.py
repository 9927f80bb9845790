"The command: what it answers, and one clear line with exit code 2 for everything that is wrong with its input."
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from paligemma_nb import inference
from paligemma_nb.checkpoint import load_model, save_model
from paligemma_nb.gemma import GemmaConfig
from paligemma_nb.generation import generate
from paligemma_nb.inference import FLAGS, SAMPLE, main, parse_flags
from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma_nb.processing import PaliGemmaProcessor, train_tokenizer
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.siglip import SiglipVisionConfig

SCENE = make_scene(HELD_OUT + 2738)  # what SAMPLE shows


@pytest.fixture(scope="module")
def source(tmp_path_factory): # a model with random weights, small and quick
    torch.manual_seed(0)
    processor = PaliGemmaProcessor(train_tokenizer(["caption en a red circle", "detect square"], 1600), 28, 4)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        SiglipVisionConfig(36, 52, 1, 3, 14, 28), image_token_index=processor.image_token_id, eos_token_id=-1,
        text_config=GemmaConfig(40, 56, 1, 4, 2, processor.vocab_size, head_dim=12, max_position_embeddings=128)))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .2)  # as it comes from torch it would repeat itself
    folder = tmp_path_factory.mktemp("source")/"model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def folder(source, tmp_path): return Path(shutil.copytree(source, tmp_path/"model"))  # one to break


@pytest.fixture
def command(capsys):
    def command(*flags):
        capsys.readouterr()
        code = main([str(flag) for flag in flags])
        return code, *capsys.readouterr()
    return command


@pytest.fixture
def fails(command):
    def fails(*flags, says=()):
        code, out, err = command(*flags)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        for words in [says] if isinstance(says, str) else says: assert words in err, err
    return fails


def process(*flags, env={}, stdout=subprocess.PIPE, **kwargs):
    env = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parents[1])} | env
    command = [sys.executable, "-m", "paligemma_nb.inference", *map(str, flags)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, **kwargs)


# --- answers

def test_shipped_model_describes_the_sample():
    done = process("--only_cpu")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == f"device: cpu\n{SCENE.caption}\n"


def test_sample_is_a_held_out_scene():
    with Image.open(SAMPLE) as image: assert image.mode == "RGB" and image.tobytes() == SCENE.image.tobytes()
    assert len({o.color for o in SCENE.objects}) == len({o.shape for o in SCENE.objects}) == 3


def test_answer_is_generate(command, source, tmp_path):
    picture = tmp_path/"a picture.jpg"
    SCENE.image.convert("L").save(picture)
    code, out, err = command("--model_path", source, "--prompt", "caption en", "--image_file_path", picture,
                             "--max_tokens_to_generate=7", "--only_cpu")
    model, processor = load_model(source, device="cpu")
    ids = generate(model, processor(Image.open(picture), "caption en"), max_new_tokens=7)
    assert (code, err) == (0, "") and out == f"device: cpu\n{processor.decode(ids)[0]}\n"


def test_sampling(command, source):
    def draw(*more): return command("--model_path", source, "--only_cpu", "--do_sample", "--top_p=1", *more)[1]
    assert draw() != draw()
    assert draw("--temperature", "0") == draw("--temperature=0") == command("--model_path", source, "--only_cpu")[1]


def test_as_a_process(source):
    "One run of the real thing, on a terminal that knows ASCII alone."
    done = process("--model_path", source, "--only_cpu", "--do_sample", "--top_p=1", env={"PYTHONIOENCODING": "ascii"}, cwd=source)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"device: cpu\n")
    done = process("--model_path", source.parent)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1 and b"config.json" in done.stderr


def test_nobody_reads(source):
    reader, writer = os.pipe()
    os.close(reader)
    for flags in (["--help"], ["--model_path", source]):
        done = process(*flags, stdout=writer)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(writer)


def test_interrupt_is_quiet(command, monkeypatch):
    def pressed(values): raise KeyboardInterrupt
    monkeypatch.setattr(inference, "open_stream", pressed)
    assert command() == (130, "", "")
    def late(values):
        def pieces():
            yield "a "
            raise KeyboardInterrupt
        return "cpu", pieces()
    monkeypatch.setattr(inference, "open_stream", late)
    assert command() == (130, "device: cpu\na ", "")


# --- flags

def test_help_names_every_flag_and_waits_for_nothing():
    script = "import sys, paligemma_nb.inference as i; i.main(['--prompt', 'x', '--help']); assert 'torch' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parents[1])}
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert all(f"--{name} " in text for name in FLAGS) and max(map(len, text.splitlines())) <= 120


def test_defaults():
    assert parse_flags([]) == dict(
        model_path=None, prompt="caption en", image_file_path=str(SAMPLE), max_tokens_to_generate=100, temperature=.8,
        top_p=.9, do_sample=False, only_cpu=False, device=None)


@pytest.mark.parametrize("argv, name, value", [
    (["--prompt", "7"], "prompt", "7"),
    (["--prompt", "[1, 2]"], "prompt", "[1, 2]"),
    (["--prompt=--x y"], "prompt", "--x y"),
    (["--prompt", "détecte 字 ✨"], "prompt", "détecte 字 ✨"),
    (["--prompt", "a=b"], "prompt", "a=b"),
    (["--prompt=a", "--prompt=b"], "prompt", "b"),
    (["--max-tokens-to-generate", "5"], "max_tokens_to_generate", 5),
    (["--top_p", "1"], "top_p", 1.0),
    (["--temperature", "1e-2"], "temperature", .01),
    (["--do_sample"], "do_sample", True),
    (["--do_sample", "--only_cpu"], "do_sample", True),
    (["--do_sample", "False"], "do_sample", False),
    (["--do_sample=true"], "do_sample", True),
    (["--do_sample", "0"], "do_sample", False),
    (["--nodo_sample"], "do_sample", False),
    (["--only_cpu", "--device", "cpu"], "device", "cpu"),
])
def test_flags(argv, name, value):
    values = parse_flags(argv)
    assert values[name] == value and values.keys() == FLAGS.keys()
    untouched = [n for n in FLAGS if n not in " ".join(argv).replace("-", "_")]
    assert untouched and all(values[n] == FLAGS[n][1] for n in untouched)


@pytest.mark.parametrize("argv, says", [
    (["--frobnicate"], ["unknown flag --frobnicate", "--max_tokens_to_generate"]),
    (["--Prompt", "x"], ["unknown flag --Prompt", "--prompt"]),
    (["--prompts=x"], ["unknown flag --prompts"]),
    (["--no_sample"], ["unknown flag"]),
    (["-x"], ["unknown flag", "x"]),
    (["-p", "detect"], ["unknown flag", "--prompt"]),
    (["detect red circle"], ["unexpected argument 'detect red circle'"]),
    (["--prompt", "detect", "red circle"], ["unexpected argument 'red circle'"]),
    (["--", "--interactive"], ["unexpected argument '--'"]),
    (["--prompt", "x", "-", "y"], ["unexpected argument '-'"]),
    (["--prompt"], ["--prompt needs a value"]),
    (["--model_path", "--do_sample"], ["--model_path needs a value"]),
    (["--noprompt"], ["--noprompt needs a value"]),
    (["--prompt", ""], ["--prompt: expected some text, got nothing"]),
    (["--prompt= \n"], ["--prompt: expected some text"]),
    (["--prompt", "\udcff"], ["--prompt: expected valid UTF-8"]),
    (["--image_file_path="], ["--image_file_path: expected some text"]),
    (["--top_p=0"], ["--top_p: expected more than 0 and at most 1, got '0'"]),
    (["--top_p=-0.5"], ["--top_p", "'-0.5'"]),
    (["--top_p", "-0.5"], ["--top_p", "'-0.5'"]),
    (["--top_p=1.5"], ["--top_p", "'1.5'"]),
    (["--top_p=nan"], ["--top_p", "'nan'"]),
    (["--top_p=much"], ["--top_p: expected a number, got 'much'"]),
    (["--temperature=-1"], ["--temperature: expected 0 or more, got '-1'"]),
    (["--temperature=inf"], ["--temperature", "'inf'"]),
    (["--temperature=hot"], ["--temperature: expected a number, got 'hot'"]),
    (["--max_tokens_to_generate=0"], ["--max_tokens_to_generate: expected a whole number of at least 1, got '0'"]),
    (["--max_tokens_to_generate=-3"], ["'-3'"]),
    (["--max_tokens_to_generate=2.5"], ["'2.5'"]),
    (["--max_tokens_to_generate=many"], ["'many'"]),
    (["--do_sample=maybe"], ["--do_sample: expected True or False, got 'maybe'"]),
    (["--only_cpu", "perhaps"], ["--only_cpu", "'perhaps'"]),
    (["--only_cpu", "--device=cuda"], ["--only_cpu and --device cuda exclude each other"]),
])
def test_bad_flags(fails, argv, says): fails(*argv, says=says)


def test_bad_devices(fails, source):
    for name in ("abacus", "cuda:", "CPU", "cpu:1"): fails(f"--device={name}", says=["--device: expected cpu, cuda", repr(name)])
    if not torch.cuda.is_available(): fails("--model_path", source, "--device=cuda", says="device 'cuda' cannot be used")


def test_past_the_context(fails, source):
    fails("--model_path", source, "--only_cpu", "--max_tokens_to_generate=128", says=["128 new ones do not fit", "the context holds 128"])
    fails("--model_path", source, "--only_cpu", "--prompt=" + "red " * 130, "--max_tokens_to_generate=1", says="do not fit")


# --- pictures

def png_that_claims(width, height):
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, says", [
    (b"", "not a picture"),
    (b"a letter, and no picture", "not a picture"),
    (SAMPLE.read_bytes()[:5000], "damaged or cut short"),
    (png_that_claims(50_000, 50_000), "too large"),
], ids=["empty", "text", "truncated", "enormous"])
def test_bad_pictures(fails, source, tmp_path, content, says):
    (tmp_path/"picture.png").write_bytes(content)
    fails("--model_path", source, "--image_file_path", tmp_path/"picture.png", says=[says, "picture.png"])


def test_no_picture(fails, source, tmp_path):
    fails("--model_path", source, "--image_file_path", tmp_path/"none.png", says="no such picture")
    fails("--model_path", source, "--image_file_path", tmp_path, says="not a picture file")
    fails("--model_path", source, "--prompt", "<image> <image> which?", says=["2", "images"])


# --- models

def test_bad_model_folders(fails, tmp_path):
    fails("--model_path", tmp_path/"none", says="no model folder")
    fails("--model_path", tmp_path, says="no config.json")
    fails("--model_path", SAMPLE, says=["folder", "file"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_missing_files(fails, folder, name):
    (folder/name).unlink()
    fails("--model_path", folder, says=name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of another kind", None], ids=["empty", "foreign", "truncated"])
def test_bad_weights(fails, folder, content):
    path = folder/"model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    fails("--model_path", folder, says=["model.safetensors", "not a whole safetensors file"])


def test_tensors_that_do_not_fit(fails, folder):
    path, norm = folder/"model.safetensors", "language_model.model.norm.weight"
    tensors = load_file(path)
    save_file({name: x for name, x in tensors.items() if name != norm}, path)
    fails("--model_path", folder, says=["missing", norm])
    save_file(tensors | {"language_model.extra": torch.zeros(2)}, path)
    fails("--model_path", folder, says=["surplus", "language_model.extra"])
    save_file(tensors | {norm: torch.zeros(41)}, path)
    fails("--model_path", folder, says=[norm, "[41]", "expected [40]"])


@pytest.mark.parametrize("content, says", [("{", "not JSON"), ("[]", "object"), ("{}", "lacks")])
def test_bad_configs(fails, folder, content, says):
    (folder/"config.json").write_text(content)
    fails("--model_path", folder, says=["config.json", says])


def test_config_of_other_sizes(fails, folder):
    config = json.loads((folder/"config.json").read_text())
    config["text_config"]["intermediate_size"] = 57
    (folder/"config.json").write_text(json.dumps(config))
    fails("--model_path", folder, says=["does not fit the config", "mlp"])
