"Words of a command line as a function's values: strictly, with one line for each mistake."
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, strategies as st

from paligemma_nb import __version__
from paligemma_nb.command import convert, help_text, read_flags, run, say


def work(
    folder: str,                            # where the model is
    target: str | Path,                     # where the result goes
    prompt: str | list[str] = "caption en", # what to ask; may be repeated
    files: list[str] | None = None,         # pictures
    notes: str | None = None,               # what to write down
    tokens: int = 100, top_p: float = 0.9,  # of an answer
    sample: bool = False,
    weights: Literal["int8", "int4"] | None = None, # round them # first
) -> int: # an exit code
    """Does the work.

    And says so."""
    def inner(folder: str): return folder # a comment of another function
    print(inner(folder), tokens)
    return tokens if tokens < 3 else 0


USUAL = dict(folder="m", target="t", prompt="caption en", files=None, notes=None, tokens=100,
             top_p=0.9, sample=False, weights=None)


@pytest.mark.parametrize("words, values", [
    ([], {}),
    (["--prompt", "7"], dict(prompt=["7"])),
    (["--prompt", "[1, 2]"], dict(prompt=["[1, 2]"])),
    (["--prompt", "None"], dict(prompt=["None"])),
    (["--prompt=--x y"], dict(prompt=["--x y"])),
    (["--prompt", "détecte 字 ✨"], dict(prompt=["détecte 字 ✨"])),
    (["--prompt", "a=b"], dict(prompt=["a=b"])),
    (["--prompt=a=b"], dict(prompt=["a=b"])),
    (["--prompt", "-"], dict(prompt=["-"])),
    (["--prompt", "-5 apples"], dict(prompt=["-5 apples"])),
    (["-prompt", "x"], dict(prompt=["x"])),
    (["--prompt", "a", "--prompt=b"], dict(prompt=["a", "b"])),
    (["--top-p", "-0.5"], dict(top_p=-0.5)),
    (["--top_p=1"], dict(top_p=1.0)),
    (["--tokens", "5"], dict(tokens=5)),
    (["--sample"], dict(sample=True)),
    (["--sample", "--tokens=1"], dict(sample=True, tokens=1)),
    (["--sample", "No"], dict(sample=False)),
    (["--sample=true"], dict(sample=True)),
    (["--sample", "0"], dict(sample=False)),
    (["--weights=int4"], dict(weights="int4")),
    (["--notes", "007"], dict(notes="007")),
    (["--notes", "--sample=1"], None),
    (["--files", "a.png"], dict(files=["a.png"])),
    (["--files=a b.png"], dict(files=["a b.png"])),
    (["--files", "7", "[7]", "-", "a=b"], dict(files=["7", "[7]", "-", "a=b"])),
    (["--files", "a", "b", "--sample", "--files=c", "d"], dict(files=[*"abcd"], sample=True)),
])
def test_values(words, values):
    if values is None: pytest.raises(ValueError, read_flags, work, ["m", "t", *words])
    else: assert read_flags(work, ["m", "t", *words]) == USUAL | values


@pytest.mark.parametrize("words", [
    ["m", "t"], ["--folder=m", "t"], ["--target", "t", "m"], ["--target=t", "--folder", "m"],
    ["m", "--target=t"], ["--tokens", "100", "m", "t"], ["m", "--notes=x", "t"],
])
def test_what_is_needed_may_stand_alone(words):
    values = read_flags(work, words)
    assert (values["folder"], values["target"]) == ("m", "t")


@pytest.mark.parametrize("words, says", [
    ("m t --frobnicate", "unknown flag --frobnicate: the flags are --folder, --target, "),
    ("m t --Prompt x", "unknown flag --Prompt: "),
    ("m t --prompts=x", "unknown flag --prompts: "),
    ("m t -x", "unknown flag -x: "),
    ("m t -p x", "unknown flag -p: "),
    ("m t --nosample", "unknown flag --nosample: "),
    ("m t --no-sample=True", "unknown flag --no-sample: "),
    ("m t --tes", "unknown flag --tes: "),  # to Fire, --notes would be a no to it
    ("m t --sample --sample=False", "--sample is given twice"),
    ("m t --top-p 1 -top_p=1", "--top_p is given twice"),
    ("m t --target x", "unexpected argument 't': the flags are"),
    ("--folder=m --folder=n t", "--folder is given twice"),
    ("m t u", "unexpected argument 'u': "),
    ("m t --prompt a cat", "unexpected argument 'cat': "),
    ("m t --sample True False", "unexpected argument 'False': "),
    ("m t --tokens=1 2", "unexpected argument '2': "),
    ("m t –prompt x", "unexpected argument '–prompt': "),  # a dash of a word processor
    ("m t --prompt -- x", "unexpected argument '--'"),
    ("m t -- --trace", "unexpected argument '--'"),
    ("m t --=x", "unexpected argument '--=x'"),
    ("m t ---", "unexpected argument '---'"),
    ("m t -", "unexpected argument '-': "),
    ("m t --prompt", "--prompt needs a value"),
    ("m t --notes", "--notes needs a value"),
    ("m t --notes --sample", "--notes needs a value"),
    ("m t --prompt -x", "--prompt needs a value"),
    ("m t --files", "--files needs a value"),
    ("m t --prompt=", "--prompt: expected some text in UTF-8, got ''"),
    ("m t --files a ", "--files: expected some text in UTF-8, got ''"),
    ("m t --prompt=\udcff", r"--prompt: expected some text in UTF-8, got '\udcff'"),
    ("m ", "--target: expected some text in UTF-8, got ''"),
    ("m", "--target is missing"),
    ("--target t", "--folder is missing"),
    ("m t --tokens=2.5", "--tokens: expected a whole number, got '2.5'"),
    ("m t --tokens many", "--tokens: expected a whole number, got 'many'"),
    ("m t --top_p=much", "--top_p: expected a number, got 'much'"),
    ("m t --sample maybe", "--sample: expected True or False, got 'maybe'"),
    ("m t --sample=", "--sample: expected True or False, got ''"),
    ("m t --weights=int2", "--weights: expected int8 or int4, got 'int2'"),
])
def test_mistakes(words, says, capsys):
    with pytest.raises(ValueError) as error: read_flags(work, words.split(" "))
    assert str(error.value).startswith(says)
    assert capsys.readouterr() == ("", "")  # Fire has said nothing of its own
    assert run({None: work}, words.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {says}") and err.count("\n") == 1


WORDS = ["m", "t", "-", "--", "-1", "--sample", "--prompt", "--tokens=3", "--files", "a=b",
         "--notes", "-h=", "--separator=m", "[", ""]


@given(st.lists(st.sampled_from(WORDS)))
def test_any_words_are_values_or_a_value_error(words):
    try: values = read_flags(work, words)
    except ValueError: return
    assert values.keys() == USUAL.keys() and type(values["tokens"]) is int
    assert all(type(text) is str for text in [*(values["files"] or []), *values["prompt"]])


def test_values_are_those_of_the_annotation():
    kinds = int, float | None, str, bool, Literal["1", "2"], Literal["1"] | None
    values = [convert("1", kind) for kind in kinds]
    assert values == [1, 1.0, "1", True, "1", "1"]
    assert [type(value) for value in values] == [int, float, str, bool, str, str]
    assert convert("x", str | Path) == convert("x", list[str]) == "x"


def test_annotations_may_be_texts():
    "As they all are in a module with `from __future__ import annotations`."
    def late(count: "int" = 1): pass
    assert read_flags(late, ["--count=2"]) == dict(count=2)


def test_help_is_the_signature_and_its_comments():
    assert help_text(work, "work") == """\
Usage: paligemma-nb work FOLDER TARGET [--flag value | --flag=value] ...

Does the work.

And says so.

Flags [default]:
  --folder                  where the model is
  --target                  where the result goes
  --prompt                  what to ask; may be repeated [caption en]
  --files                   pictures
  --notes                   what to write down
  --tokens                  of an answer [100]
  --top_p                   of an answer [0.9]
  --sample                   [False]
  --weights                 int8 or int4; round them # first"""
    assert help_text(work, others=["add", "sub"]).endswith(
        "\n\nCommands, each with its own --help:\n  add, sub")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["m", "--nonsense", "--help"]])
def test_help_comes_before_mistakes(words, capsys):
    assert run({None: work, "add": work}, words) == 0
    out, err = capsys.readouterr()
    assert out == help_text(work, others=["add"]) + "\n" and err == ""
    assert run({None: work, "add": work}, ["add", *words]) == 0
    assert capsys.readouterr().out == help_text(work, "add") + "\n"


def test_version(capsys):
    assert run({None: work}, ["--version"]) == 0
    assert capsys.readouterr() == (f"paligemma-nb {__version__}\n", "")


def test_exit_codes(capsys):
    codes = [run({None: work}, ["m", "t", f"--tokens={n}"]) for n in range(4)]
    assert codes == [0, 1, 2, 0]
    assert run({None: lambda: Path("x")}, []) == 0
    assert capsys.readouterr().out == "m 0\nm 1\nm 2\nm 3\n"


def test_commands_are_chosen_by_the_first_word(capsys):
    def one(words: list[str] | None = None): print("one", words)
    def two(word: str): print("two", word)
    commands = {None: one, "two": two}
    assert run(commands, ["two", "two"]) == run(commands, ["--words", "two"]) == 0
    assert capsys.readouterr().out == "two two\none ['two']\n"
    for words in ([""], ["to"], ["two"], ["None"]): assert run(commands, words) == 2


def test_modules_are_imported_when_they_are_called():
    script = """if True:
        import sys
        from paligemma_nb.command import run
        commands = {None: lambda: None, "later": "tasks:measure", "wrong": "none:none"}
        assert run(commands, []) == 0 and "torch" not in sys.modules
        assert run(commands, ["wrong"]) == 2 and "torch" not in sys.modules
        assert run(commands, ["later", "--help"]) == 0 and "torch" in sys.modules"""
    done = process(script)
    assert done.returncode == 0 and b"No module named 'paligemma_nb.none'" in done.stderr


@pytest.mark.parametrize("error, code, says", [
    (ValueError("bad\n  weights"), 2, "error: bad weights\n"),
    (FileNotFoundError(2, "no file", "x.png"), 2, "error: [Errno 2] no file: 'x.png'\n"),
    (ImportError("needs pycocotools"), 2, "error: needs pycocotools\n"),
    (KeyboardInterrupt(), 130, ""),
    (BrokenPipeError(), 141, ""),
])
def test_errors_are_one_line(error, code, says, capsys):
    def fails(): raise error
    assert run({None: fails}, []) == code
    assert capsys.readouterr() == ("", says)


def test_a_bug_keeps_its_traceback():
    def buggy(): {}["x"]
    with pytest.raises(KeyError): run({None: buggy}, [])


def test_warnings_are_notes(capsys):
    def warns():
        for _ in range(2): warnings.warn("slow\n here")
    assert run({None: warns}, []) == 0
    assert capsys.readouterr() == ("", "note: slow here\n")


def test_lines_stand_above_the_bar(capsys):
    from tqdm import tqdm
    with tqdm(total=1, disable=True): say("note", "a\nb")
    assert capsys.readouterr() == ("", "note: a b\n")


# --- in a process of its own

def process(script, *words, **env):
    env = os.environ | dict(PYTHONPATH=str(Path(inspect.getfile(run)).parents[1])) | env
    return subprocess.run([sys.executable, "-c", script], capture_output=True, env=env)


TALK = """
import sys
from paligemma_nb.command import run
def talk(lines: int = 1, flush: bool = False):
    "Talks."
    for i in range(lines): print("äöü 字" * 9, flush=flush)
sys.exit(run({None: talk}))"""


@pytest.fixture
def talk(tmp_path):
    (tmp_path/"talk.py").write_text(TALK, encoding="utf-8")
    here = dict(PYTHONPATH=str(Path(inspect.getfile(run)).parents[1]), PYTHONUNBUFFERED="")
    def talk(*words, env={}, stdout=subprocess.PIPE, **kwargs):
        command = [sys.executable, tmp_path/"talk.py", *words]
        kwargs |= dict(stdout=stdout, stderr=subprocess.PIPE, env=os.environ | here | env)
        return subprocess.run(command, **kwargs)
    return talk


WAYS = pytest.mark.parametrize("words", [
    ["--help"], ["--version"], ["--flush"], ["--lines=9999"], []])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@WAYS
def test_a_full_disk_is_one_line(talk, words, unbuffered):
    with open("/dev/full", "wb") as full:
        done = talk(*words, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2 and done.stderr.endswith(b"No space left on device\n")
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    at_once = unbuffered or "--lines=9999" in words  # else Python says it when all is written
    assert at_once or b"cannot write to stdout" in done.stderr


@WAYS
def test_nobody_reads(talk, words):
    reader, writer = os.pipe()
    os.close(reader)
    done = talk(*words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_streams_that_are_closed(talk):
    done = talk(stdout=None, preexec_fn=lambda: os.close(1))
    says = b"error: cannot write to stdout: it is closed\n"
    assert (done.returncode, done.stderr) == (2, says)
    done = talk("--wrong", preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_terminal_may_lack_characters(talk):
    done = talk(env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"??? ?" * 9 + b"\n")
