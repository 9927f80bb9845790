"""Finding a model: folders as they come from git and the hub, what is there instead,
revisions, parts from elsewhere."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from unittest.mock import Mock

import paligemma_nb
from paligemma_nb.checkpoint import WeightFiles, load_checkpoint
from paligemma_nb.hub import (
    INDEX, MASK_VAE, PICTURES, WEIGHTS, find_folder, find_model, find_processor, find_weights,
    is_pointer, missing_files, needed_files, shorten, what_else)
from test_checkpoint import edit_json, fails, put_in_cache, same

TINY = Path(paligemma_nb.__file__).parent/"tiny"
POINTER = ("version https://git-lfs.github.com/spec/v1\n"
           "oid sha256:" + 64 * "0" + "\nsize 5847052824\n")
NAMES = ["config.json", WEIGHTS, PICTURES[0], "tokenizer.json", "tokenizer_config.json"]


def refuses_to_load(path, error, *words, **kwargs):
    with fails(error, *words): load_checkpoint(path, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def tiny(): return load_checkpoint(device="cpu")[0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path/"model").mkdir()
    for name in NAMES: shutil.copy(TINY/name, tmp_path/"model")
    return tmp_path/"model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    return tmp_path/"hub"


def test_names_of_files():
    assert shorten({"b", "a"}) == "a, b" and shorten("fedcba") == "a, b, c, d, e and 1 more"
    assert needed_files(TINY) == ["config.json", WEIGHTS, "tokenizer.json", PICTURES[0]]
    assert missing_files(TINY) == []
    assert find_weights(TINY) == TINY/WEIGHTS and find_folder(None) == TINY


# --- git-lfs

@pytest.mark.parametrize("names", [[WEIGHTS], ["tokenizer.json"], [WEIGHTS, "tokenizer.json"],
                                   ["config.json"],
                                   [PICTURES[0]], [WEIGHTS, "tokenizer.json", PICTURES[0]]],
                                   ids=str)
def test_a_clone_without_its_large_files(folder, names):
    for name in names: (folder/name).write_text(POINTER)
    refuses_to_load(folder, ValueError,
                    f"{folder} holds git-lfs pointers instead of {', '.join(sorted(names))}:",
                    "`git lfs pull`")
    if WEIGHTS in names:
        with fails(ValueError, f"git-lfs pointers instead of {WEIGHTS}:"): WeightFiles(folder)
    assert is_pointer(folder/names[0]) and not is_pointer(TINY/WEIGHTS)
    assert not is_pointer(folder/"nothing")


def test_shards_and_an_index_as_pointers(folder):
    (folder/WEIGHTS).unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder/INDEX).write_text(json.dumps(dict(weight_map={f"w{i}": file
                                                          for i, file in enumerate(files)})))
    for file in files: (folder/file).write_text(POINTER)
    refuses_to_load(folder, ValueError, "git-lfs pointers instead of " + ", ".join(files))
    (folder/INDEX).write_text(POINTER)
    refuses_to_load(folder, ValueError, f"git-lfs pointers instead of {INDEX}")


def test_pointers_that_nobody_reads_are_no_fault(folder, tiny):
    for name in ("tokenizer.model", "photo.png", "pytorch_model.bin", "training.safetensors"):
        (folder/name).write_text(POINTER)
    assert same(load_checkpoint(folder, device="cpu")[0], tiny)


# --- what is there instead

@pytest.mark.parametrize("name, words", [
    ("paligemma.Q4_K_M.gguf",
     "is GGUF, which is llama.cpp's: take the same model as model.safetensors"),
    ("pytorch_model-00001-of-00002.bin", "may run code: convert it to safetensors"),
    ("consolidated.pth", "may run code"),
    ("pt_224.npz", "is big_vision's: paligemma-nb convert"),
    ("adapter_model.safetensors", "an adapter without its base model: load_model takes it"),
    ("model-00001-of-00003.safetensors", f"is in no {INDEX}: fetch that"),
    ("tf_model.h5", "for another framework"),
    ("flax_model.msgpack", "for another framework"),
    ("model.fp16.safetensors", "or call a whole model"),
])
def test_other_weights_are_named(folder, name, words):
    (folder/WEIGHTS).rename(folder/name)
    (folder/MASK_VAE).write_text("no weights of a model")
    refuses_to_load(folder, FileNotFoundError,
                    f"no {WEIGHTS} and no {INDEX} in {folder}; {name} ", words)


def test_nothing_else_is_nothing_else(folder):
    (folder/WEIGHTS).unlink()
    (folder/MASK_VAE).write_text("x")
    with pytest.raises(FileNotFoundError) as error: load_checkpoint(folder)
    assert str(error.value) == f"no {WEIGHTS} and no {INDEX} in {folder}"
    assert what_else("tokenizer", NAMES) == what_else("pictures", ["tokenizer.model"]) == ""


@pytest.mark.parametrize("name, words", [
    ("a.gguf", "is GGUF"), ("pt_224.npz", "paligemma-nb convert"),
    (WEIGHTS, "give its folder"), ("a.bin", "may run code"),
    ("notes.txt", "")])
def test_a_file_for_a_folder(tmp_path, name, words):
    (tmp_path/name).write_text("x")
    with fails(ValueError, f"expected the folder of a model, got a file: {tmp_path/name}",
               words):
        find_folder(tmp_path/name)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "torchao",
                                    "compressed-tensors", None])
def test_weights_rounded_by_another_library(folder, key, method):
    settings = dict(bits=4) | ({} if method is None else dict(quant_method=method))
    edit_json(folder/"config.json", **{key: settings})
    named = f"that of {method!r}" if method else f"{key} {{'bits': 4}}"
    words = (str(folder/"config.json"), named, "take the original ones", "load_model",
             "weights='int8'", "--quantize")
    refuses_to_load(folder, ValueError, *words)
    for function in (find_model, paligemma_nb.load_model):
        with fails(ValueError, *words): function(folder)


def test_weights_rounded_here(folder):
    ours = dict(quant_method="paligemma_nb", weights="int8")
    edit_json(folder/"config.json", quantization_config=ours)
    assert find_model(folder).quantization == ours and find_model(TINY).quantization is None
    refuses_to_load(folder, ValueError,
                    f"{folder} holds quantised weights: open it with paligemma_nb.load_model")


# --- found once

def test_what_a_folder_says(folder):
    (folder/"tokenizer.json").unlink()
    found = find_model(folder, processor_path=TINY)
    assert (found.path, found.tokenizer, found.pictures) == (folder, TINY, folder)
    assert found.config == json.loads((folder/"config.json").read_text())
    assert find_model(found) is found
    for more in (dict(revision="main"), dict(processor_path=TINY)):
        with fails(ValueError, f"{folder} is found already"): find_model(found, **more)
        refuses_to_load(found, ValueError, "is found already", **more)


def test_what_was_found_is_not_read_again(folder, tiny):
    found = find_model(folder)
    (folder/"config.json").write_text("{")
    assert same(load_checkpoint(found, device="cpu")[0], tiny)


# --- the missing part from elsewhere

def test_the_missing_part_comes_from_elsewhere(folder, tiny, tmp_path):
    for missing, homes in ((["tokenizer.json"], (TINY, folder)),
                           ([PICTURES[0]], (folder, TINY)),
                           (["tokenizer.json", PICTURES[0]], (TINY, TINY))):
        for name in missing: (folder/name).unlink()
        refuses_to_load(folder, FileNotFoundError, *sorted(missing), str(folder),
                        "processor_path")
        assert find_processor(folder, TINY) == homes
        for path in (TINY, str(TINY)):
            model, processor = load_checkpoint(folder, processor_path=path, device="cpu")
            assert same(model, tiny) and processor.image_size == 112
            assert processor.encode("detect red circle")
        for name in missing: shutil.copy(TINY/name, folder)
    refuses_to_load(folder, ValueError, f"{folder} has a tokenizer and picture settings",
                    "leave processor_path out",
                    processor_path=TINY)


def test_own_settings_are_kept(folder, tmp_path):
    "The other folder is for larger pictures, and only its tokenizer is wanted."
    other = Path(shutil.copytree(folder, tmp_path/"other"))
    edit_json(other/PICTURES[0], size=dict(height=224, width=224), image_seq_length=1024)
    (folder/"tokenizer.json").unlink()
    assert load_checkpoint(folder, processor_path=other, device="cpu")[1].image_size == 112
    (folder/PICTURES[0]).unlink()
    refuses_to_load(folder, ValueError,
                    "picture size is 224 in the processor, 112 in the config",
                    processor_path=other)


def test_the_other_lacks_it_too(folder, tmp_path):
    (folder/"tokenizer.json").unlink()
    other = Path(shutil.copytree(folder, tmp_path/"other"))
    refuses_to_load(folder, FileNotFoundError, f"no tokenizer.json in {other}",
                    processor_path=other)
    (other/"tokenizer.json").write_text(POINTER)
    refuses_to_load(folder, ValueError, f"{other} holds git-lfs pointers instead of tokenizer",
                    processor_path=other)
    refuses_to_load(folder, FileNotFoundError, "no model folder", str(tmp_path/"none"),
                    processor_path=tmp_path/"none")


def test_sentencepiece_alone(folder):
    (folder/"tokenizer.json").rename(folder/"tokenizer.model")
    refuses_to_load(folder, FileNotFoundError,
                    f"no tokenizer.json in {folder}; tokenizer.model is SentencePiece's",
                    "AutoTokenizer", "processor_path")


def test_new_name_of_the_picture_settings(folder, tiny):
    (folder/PICTURES[0]).rename(folder/PICTURES[1])
    assert same(load_checkpoint(folder, device="cpu")[0], tiny)


# --- names and revisions

def branches(cache, folder, name="someone/reader", **more):
    "main, and a snapshot for each further branch"
    snapshots = {"main": put_in_cache(folder, cache, name)}
    repo = cache/f"models--{name.replace('/', '--')}"
    for branch, source in more.items():
        version = 40 * "0123456789abcdef"[len(snapshots)]
        (repo/"refs"/branch).write_text(version)
        snapshots[branch] = Path(shutil.copytree(source, repo/"snapshots"/version))
    return snapshots


def test_a_branch_a_commit_and_main(folder, cache, tmp_path):
    half = Path(shutil.copytree(folder, tmp_path/"half"))
    from safetensors.torch import load_file, save_file
    save_file({k: x.bfloat16() for k, x in load_file(TINY/WEIGHTS).items()}, half/WEIGHTS)
    found = branches(cache, folder, bfloat16=half)
    for revision, expected in ((None, "main"), ("main", "main"), ("bfloat16", "bfloat16"),
                               (found["bfloat16"].name, "bfloat16"),
                               (found["main"].name, "main")):
        assert find_folder("someone/reader", revision).samefile(found[expected])
        dtype = next(load_checkpoint("someone/reader", revision=revision,
                                     device="cpu")[0].parameters()).dtype
        assert str(dtype) == ("torch.float32" if expected == "main" else "torch.bfloat16")
    refuses_to_load("someone/reader", FileNotFoundError,
                    "no folder someone/reader (revision float16)", "when online",
                    revision="float16")


@pytest.mark.parametrize("revision", ["", "  ", 3, b"main", ["main"]])
def test_what_is_no_revision(revision):
    for path in (None, TINY, "someone/reader"):
        with fails(ValueError, "expected a branch, tag or commit as revision"):
            find_folder(path, revision)


def test_a_revision_needs_a_name(folder):
    refuses_to_load(None, ValueError, "revision 'main' needs a name on the hub, and none was",
                    revision="main")
    for path in (folder, str(folder), folder/WEIGHTS):
        with fails(ValueError, "revision 'bfloat16' needs a name on the hub", str(path)):
            find_folder(path, "bfloat16")
    with fails(FileNotFoundError, "no model folder"): find_folder(folder/"none", "main")


def answers(monkeypatch, cached, online, listed=()):
    "What the library says: each an exception or a folder. Returns the calls."
    calls = []
    def say(x):
        if isinstance(x, Exception): raise x
        return str(x) if isinstance(x, Path) else x
    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False, **kwargs):
        calls.append((name, revision, allow_patterns, local_files_only))
        return say(cached if local_files_only else online)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: say(listed))
    return calls


def test_unknown_revision(monkeypatch):
    calls = answers(monkeypatch, errors.LocalEntryNotFoundError("none"),
                    errors.RevisionNotFoundError("404\n\nnot found", response=Mock()))
    refuses_to_load("some/name", FileNotFoundError, "some/name has no revision 'bf16'",
                    "https://huggingface.co/some/name/tree/main lists its branches",
                    revision="bf16")
    assert [revision for _, revision, *_ in calls] == ["bf16"] * 2


def test_decoder_of_masks_is_wanted_but_not_needed(monkeypatch, folder):
    calls = answers(monkeypatch,
                    errors.IncompleteSnapshotError("vae-oid.npz is missing", str(folder)),
                    errors.LocalEntryNotFoundError("offline"))
    assert find_folder("some/name") == folder  # out of reach, but all that is needed is there
    assert len(calls) == 2 and MASK_VAE in calls[0][2] and "tokenizer.json" in calls[0][2]
    (folder/"tokenizer.json").unlink()
    with fails(FileNotFoundError, "could not be fetched"): find_folder("some/name")
    calls = answers(monkeypatch, folder, folder, [])
    (folder/"tokenizer.json").touch()
    assert find_folder("some/name") == folder and len(calls) == 1


def test_a_repository_that_lacks_a_part(monkeypatch, folder, tmp_path):
    none = errors.LocalEntryNotFoundError("none")
    (tmp_path/"empty").mkdir()
    for listed, words in ((["a.Q4.gguf", "README.md"], "a.Q4.gguf is GGUF"),
                          (["pytorch_model.bin"], "may run code"),
                          (["adapter_model.safetensors"], "adapter")):
        answers(monkeypatch, none, tmp_path/"empty", listed)
        with pytest.raises(FileNotFoundError) as error: load_checkpoint("some/name")
        message = str(error.value)
        assert "some/name lacks config.json, model.safetensors, " in message
        assert words in message
        assert "\n" not in message and "when online" not in message  # it was asked
    (folder/"tokenizer.json").unlink()
    answers(monkeypatch, none, folder, ["tokenizer.model", WEIGHTS])
    refuses_to_load("some/name", FileNotFoundError, "some/name lacks tokenizer.json in",
                    "SentencePiece", "processor_path")
    answers(monkeypatch, none, folder, OSError("offline"))
    refuses_to_load("some/name", FileNotFoundError, "some/name lacks tokenizer.json",
                    "try again when online")


def test_names_for_both_parts(monkeypatch, folder, tmp_path, tiny):
    """Weights from a name that has nothing else; the processor from a name of which no
    weights are fetched."""
    for name in ("tokenizer.json", PICTURES[0]): (folder/name).rename(tmp_path/name)
    (tmp_path/"other").mkdir()
    for name in ("tokenizer.json", PICTURES[0]): (tmp_path/name).rename(tmp_path/"other"/name)
    calls = []
    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False, **kwargs):
        calls.append((name, revision, list(allow_patterns)))
        return str({"a/weights": folder, "a/words": tmp_path/"other"}[name])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load_checkpoint("a/weights", revision="half", processor_path="a/words",
                               device="cpu")
    (first, revision, wanted), (second, other_revision, few) = calls
    assert same(model, tiny)
    assert (first, revision, second, other_revision) == ("a/weights", "half", "a/words", None)
    assert "*.safetensors" in wanted and "*.safetensors" not in few
    assert "config.json" not in few
    assert "tokenizer.json" in few and set(PICTURES) <= set(few)
