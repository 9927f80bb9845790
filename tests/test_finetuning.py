"""Fine-tuning: from files to answers; equal to transformers with peft; killed and resumed;
batches; marks; refusals."""
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from test_parity import CASES, labels_of, make_both
from torch import nn
from tqdm import tqdm

from paligemma_nb import finetuning, load_model
from paligemma_nb.checkpoint import published_key
from paligemma_nb.datasets import collate, open_dataset
from paligemma_nb.detection import Detection
from paligemma_nb.finetuning import (
    FinetuneRecipe, Judged, batch_rows, default_rate, finetune, marks_of, measure_rows,
    normalized, own_answers, prepare, table, worst_sheet)
from paligemma_nb.inference import main
from paligemma_nb.lora import add_lora, lora_layers, save_adapter
from paligemma_nb.paligemma import PaliGemmaForConditionalGeneration
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.tasks import evaluate
from paligemma_nb.training import (
    batch_loss, initialize, learning_weights, tiny_config, train_step)

QUESTION = "answer en which paint was used?"


@pytest.fixture(scope="module")
def shipped(): return load_model(device="cpu", dtype="float32")


def scenes_of_one_color(first, count):
    "Scenes, with their colour: a question that differs from all that the model knows"
    found = []
    for seed in itertools.count(first):
        scene = make_scene(seed)
        colors = {thing.color for thing in scene.objects}
        if len(colors) == 1: found.append((scene, *colors))
        if len(found) == count: return found


def write_maestro(folder, scenes):
    "As roboflow's maestro lays it out: annotations.jsonl beside the pictures"
    folder.mkdir(parents=True)
    rows = []
    for scene, color in scenes:
        scene.image.save(folder / f"{scene.seed}.png")
        rows.append(dict(image=f"{scene.seed}.png", prefix=QUESTION, suffix=color))
    (folder / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "annotations.jsonl"


# --- the three commands

SEEDS = 0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_question_from_files(seed, tmp_path, capsys):
    known = scenes_of_one_color(5_000_000 + 1_000 * seed, 40)
    train = write_maestro(tmp_path / "train", known)
    held_out = scenes_of_one_color(HELD_OUT + 10, 40)
    valid = write_maestro(tmp_path / "valid", held_out)

    def right(model_path): # share, asked as one does it at home: from pictures, by the command
        pictures = [str(valid.parent / f"{scene.seed}.png") for scene, _ in held_out]
        argv = [*model_path, "--prompt", QUESTION, "--output_format", "json",
                "--image_file_path", *pictures]
        capsys.readouterr()
        assert main(argv) == 0
        said = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
        colors = [color for _, color in held_out]
        return np.mean([text == color for text, color in zip(said, colors, strict=True)])

    assert right([]) <= .2
    result = tmp_path / "runs/mine"
    assert main(["finetune", "--data", str(train), "--valid", str(valid), "--method", "lora",
                 "--steps", "75", "--seed", str(seed), "--output_path", str(result)]) == 0
    assert f"--model_path {result}" in capsys.readouterr().out
    sheet = tmp_path / "worst.png"
    assert main(["evaluate", "--model_path", str(result), "--data", str(valid),
                 "--sheet", str(sheet)]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| answer |"))
    assert float(row.split("|")[4]) >= .9 and Image.open(sheet).width > 800
    assert right(["--model_path", str(result)]) >= .9
    model, processor = load_model(result, device="cpu")
    assert evaluate(model, processor, 100)[0]["caption"]["right"] >= .9


# --- equal to transformers with peft

NAMES = "one KV head, head_dim 20 of 48/4", "Gemma 2, the window ends in the prompt"


def both_ready(name, method, folder):
    "Their model and ours with the same weights, both ready to learn the same; and batches"
    theirs, ours, inputs = make_both(CASES[name])
    recipe = FinetuneRecipe(method, steps=9, rank=3, learning_rate=1e-3, autocast=False)
    prepare(ours, recipe)
    if method == "lora":
        for layer in lora_layers(ours).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=.1)
        save_adapter(ours, folder)
        theirs = PeftModel.from_pretrained(theirs, folder, is_trainable=True)
    if method == "frozen":
        theirs.model.vision_tower.requires_grad_(False)
        theirs.get_input_embeddings().requires_grad_(False)
    inputs |= dict(labels=labels_of(inputs))
    batches = [inputs | dict(pixel_values=inputs["pixel_values"].roll(k, 0)) for k in range(5)]
    return theirs, ours, recipe, batches


def theirs_by_our_names(model):
    return {published_key(n.removeprefix("base_model.model.")): p
            for n, p in model.named_parameters() if p.requires_grad}


def distance(some, others): # length of all differences together
    return torch.stack([(some[n] - others[n]).norm() for n in some]).norm().item()


@pytest.mark.parametrize("method", ["lora", "frozen", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_first_gradients(name, method, tmp_path):
    theirs, ours, _, (batch, *_) = both_ready(name, method, tmp_path)
    got, expected = batch_loss(ours, batch), theirs(**batch).loss
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    got.backward()
    expected.backward()
    mine = {n: p.grad for n, p in learning_weights(ours).items()}
    grads = {n: p.grad for n, p in theirs_by_our_names(theirs).items()}
    assert mine.keys() == grads.keys()
    largest = max(grad.abs().max() for grad in grads.values())
    for n, grad in mine.items():
        bound = 1e-5 * grads[n].abs().max() + 1e-6 * largest
        assert (grad - grads[n]).abs().max() <= bound, n


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", ["lora", "frozen", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_steps(name, method, kind, tmp_path):
    theirs, ours, recipe, batches = both_ready(name, method, tmp_path)
    mine, others = learning_weights(ours), theirs_by_our_names(theirs)
    start = {n: p.detach().clone() for n, p in mine.items()}
    optimizers = [kind(x.values(), lr=1e-3, weight_decay=0) for x in (mine, others)]
    for step, batch in enumerate(batches):
        got = train_step(ours, dict(adamw=optimizers[0]), batch, recipe, step)
        theirs.zero_grad()
        loss = theirs(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), recipe.max_grad_norm)
        for group in optimizers[1].param_groups: group["lr"] = recipe.rates(step)["adamw"]
        optimizers[1].step()
        assert got == pytest.approx(loss.item(), rel=1e-5 if kind is torch.optim.SGD else 1e-4)
    update = distance(mine, start)
    assert update > 0
    if kind is torch.optim.AdamW: assert distance(mine, others) <= 1e-3 * update
    else: assert all(torch.allclose(mine[n], others[n], rtol=1e-5, atol=1e-6) for n in mine)


# --- small runs

def small_model(processor):
    "As small as may be; its answers mean nothing"
    config = tiny_config(processor)
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2,
                 num_hidden_layers=1)
    config.vision_config = replace(config.vision_config, **sizes)
    config.text_config = replace(config.text_config, head_dim=32, **sizes)
    model = PaliGemmaForConditionalGeneration(config)
    initialize(model, processor)
    return model.eval()


def scene_rows(first, count):
    return open_dataset([dict(image=make_scene(first + i).image, prefix="caption en",
                              suffix=make_scene(first + i).caption) for i in range(count)])


SMALL = FinetuneRecipe(steps=6, batch_size=4, learning_rate=.2, rank=2, replay=.25,
                       autocast=False)


@pytest.fixture(scope="module")
def small(shipped):
    "run(folder, recipe, …) -> history and final weights, from the same start each time"
    processor, train, valid = shipped[1], scene_rows(0, 5), scene_rows(HELD_OUT, 2)
    start = small_model(processor)
    torch.manual_seed(3)
    for p in start.parameters(): nn.init.normal_(p, std=.1)

    def run(folder, recipe=SMALL, train=train, valid=valid, **settings):
        model, settings = deepcopy(start), dict(evaluate_every=2) | settings
        history = finetune(model, processor, train, valid, folder, recipe, **settings)
        assert not model.training
        return history, model.state_dict()
    run.processor, run.train, run.valid, run.start = processor, train, valid, start
    return run


def without_seconds(history): return [{**row, "seconds": 0} for row in history]


def same(one, other):
    assert without_seconds(one[0]) == without_seconds(other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][n], other[1][n]) for n in one[1])


def run_until(moment, call):
    """The call in a process of its own that kills itself, as `kill -9` does, at the given
    number of calls and returns of Python functions -> was it killed?"""
    if (child := os.fork()) == 0:
        # tqdm's usual lock is shared between processes: whoever is killed would keep it
        tqdm.set_lock(threading.RLock())
        left = [moment]
        def count(*_):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        try: call()
        finally: os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def count_calls(call):
    counted = [0]
    def count(*_): counted[0] += 1
    sys.setprofile(count)
    try: call()
    finally: sys.setprofile(None)
    return counted[0]


@pytest.mark.parametrize("patience", [9, 1])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_and_resumed(kills, patience, small, tmp_path):
    whole = small(tmp_path / "whole", patience=patience)
    assert (whole[0][-1]["step"] < SMALL.steps) == (patience == 1)  # it did stop early
    same(small(tmp_path / "whole", patience=patience), whole)  # called once more
    call = partial(small, tmp_path / "counted", patience=patience)
    total, rng = count_calls(call), np.random.default_rng(patience)
    for k, moment in enumerate(rng.integers(total, size=kills)):
        call = partial(small, tmp_path / f"run{k}", patience=patience)
        assert run_until(moment, call)
        run_until(rng.integers(total), call)  # and a second time, if it is not over before
        same(call(), whole)
        assert not [*(tmp_path / f"run{k}").glob(".*")]


def test_the_best_is_kept(small, tmp_path):
    history, weights = small(tmp_path, patience=9)
    losses = [row["marks"]["all"]["loss"] for row in history]
    marks = [row["marks"]["all"]["mark"] for row in history]
    best = max(range(3), key=lambda i: (marks[i], -losses[i]))
    assert best < 2  # the last one is not the best
    model = add_lora(deepcopy(small.start), SMALL.rank)
    model.load_state_dict(weights)
    found = measure_rows(model, small.processor, small.valid)[0]
    assert found["all"]["loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("settings", [dict(workers=1), dict(checkpointing=True)])
def test_settings_that_change_no_number(settings, small, tmp_path):
    plain, other = small(tmp_path / "a"), small(tmp_path / "b", **settings)
    for a, b in zip(plain[0], other[0]): assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for n, w in plain[1].items(): assert torch.allclose(w, other[1][n], atol=2e-3), n


@pytest.mark.parametrize("method", ["frozen", "full"])
def test_what_learns(method, small, tmp_path):
    _, weights = small(tmp_path, FinetuneRecipe(method, 2, 4, replay=0, muon=method == "full"))
    moved = {n for n, w in small.start.state_dict().items() if not torch.equal(w, weights[n])}
    still = {n for n in weights if n.startswith("vision_tower") or "embed_tokens" in n}
    if method == "frozen": assert moved == weights.keys() - still
    else: assert len(moved) > .9 * len(weights)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_small_weights_learn(weights, small, tmp_path):
    model, processor = load_model(device="cpu", weights=weights, dtype="bfloat16")
    history = finetune(model, processor, small.train, None, tmp_path,
                       FinetuneRecipe(steps=4, batch_size=4, replay=0))
    assert history[-1]["step"] == 4 and np.isfinite(history[-1]["loss"])
    assert all(row["marks"] is None for row in history)


# --- batches

def test_parts_equal_the_whole(shipped):
    "Answers of very different lengths: each token counts the same, in whatever part it stands"
    _, processor = shipped
    torch.manual_seed(0)
    texts = ["red", "a red ring " * 12, "no", "blue ring and a red circle " * 4]
    rows = [(make_scene(k).image, "caption en", text.strip()) for k, text in enumerate(texts)]
    weights = []
    for parts in (1, 2, 4):
        recipe = FinetuneRecipe("full", 3, 4, parts, learning_rate=1e-2, autocast=False)
        model = prepare(small_model(processor), recipe)
        sgd = torch.optim.SGD(model.parameters(), lr=1.)
        batch = [collate(processor, rows[i::parts]) for i in range(parts)]
        loss = train_step(model, dict(adamw=sgd), batch, recipe, 1)
        weights.append((loss, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, found in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-5)
        torch.testing.assert_close(found, weights[0][1], rtol=1e-5, atol=1e-6)


def test_order_of_rows():
    recipe = FinetuneRecipe(steps=30, batch_size=8, replay=.25)
    plan = batch_rows(recipe, 20, 7)
    assert all(sum(i >= 20 for i in step) == 2 for step in plan)
    new = [i for step in plan for i in step if i < 20]
    old = [i for step in plan for i in step if i >= 20]
    for rows, n in ((new, 20), (old, 7)):  # each once before any comes again
        epochs = [rows[k:k + n] for k in range(0, len(rows) - n + 1, n)]
        assert len(epochs) > 1 and all(len({*epoch}) == n for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert plan == batch_rows(recipe, 20, 7)
    assert plan != batch_rows(replace(recipe, seed=1), 20, 7)
    assert all(len(step) == 8 and max(step) < 20 for step in batch_rows(recipe, 20, 0))


def test_own_answers(shipped):
    model, processor = shipped
    rows = [dict(image=make_scene(HELD_OUT + k).image, prefix=QUESTION, suffix="red")
            for k in range(3)]
    dataset = open_dataset(rows)
    dataset.rows.append(dataset.rows[0]._replace(prefix="another"))  # of the first picture
    own = own_answers(model, processor, dataset, ("caption en", "detect red ring"))
    captions = [row for row in own.rows if row.prefix == "caption en"]
    assert [row.picture for row in captions] == [0, 1, 2]
    assert all(row.suffix.strip() for row in own.rows)  # nothing found is no answer to keep
    assert own[0][0].tobytes() == rows[0]["image"].tobytes()
    assert len(own_answers(model, processor, dataset, most=2)) == 2


def test_rates_rise_and_fall(shipped):
    recipe = FinetuneRecipe(steps=100, warmup=.1, learning_rate=2.)
    rates = [recipe.rates(step)["adamw"] for step in range(100)]
    assert rates[0] == .2 and 1.9 < max(rates) <= 2 and rates[-1] < .01
    assert np.argmax(rates) == 9 and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert default_rate(shipped[0], recipe) == pytest.approx(5e-4, rel=.02)


# --- marks

@pytest.mark.parametrize("text, expected", [
    ("The red, RING.", "red ring"), ("a an the", ""), ("two  things", "two things"),
    ("theatre", "theatre"), ("it's", "its")])
def test_normalized(text, expected): assert normalized(text) == expected


def judged(prefix, suffix, text, found=(), true=(), cut_off=False, index=0):
    return Judged(index, prefix, suffix, text, (100, 100), list(found), list(true), cut_off)


def test_marks():
    one, half, other = (Detection("cat", box, score=s) for box, s in (
        ((0, 0, 40, 40), .9), ((0, 0, 40, 30), .9), ((60, 60, 90, 90), .5)))
    rows = [judged("answer en what?", "a ring", "The Ring"),
            judged("answer en what?", "x", "y"),
            judged("detect cat", "", "", [], []), judged("detect cat", "", "cat", [one], []),
            judged("detect cat", "c", "c", [half, other], [one, other], cut_off=True)]
    marks = marks_of(rows)
    assert marks["answer"] == dict(rows=2, cut_off=0, exact=0, vqa=.5)
    assert marks["detect"]["iou"] == pytest.approx((1 + 0 + (.75 + 1) / 2) / 3)
    assert marks["detect"]["cut_off"] == 1
    assert marks["detect"]["ap"] < marks["detect"]["ap50"] < 1  # one found that is not there
    captions = marks_of([judged("caption en", "a red ring", "a red ring")])["caption"]
    assert captions["chrf"] == captions["exact"] == captions["vqa"] == 1
    lines = table(marks).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4


def test_measured_rows_and_their_sheet(shipped):
    model, processor = shipped
    scenes = [make_scene(HELD_OUT + k) for k in range(3)]
    name = scenes[1].objects[0].name
    rows = [dict(image=s.image, prefix="caption en", suffix=s.caption) for s in scenes]
    rows[0]["suffix"] = "a wrong truth"
    marks, found = measure_rows(model, processor, dataset := open_dataset(rows))
    assert [j.index for j in found] == [0, 1, 2] and found[0].mark == 0
    assert marks["all"]["mark"] == np.mean([j.mark for j in found])
    costs = [model(**collate(processor, [row])) for row in dataset]
    tokens = [len(processor.encode(row[2])) + 1 for row in dataset]
    expected = sum(c.loss.item() * n for c, n in zip(costs, tokens)) / sum(tokens)
    assert marks["all"]["loss"] == pytest.approx(expected, rel=1e-4)
    sheet = worst_sheet(found, dataset)
    assert sheet.size == (4 * 232, 284)
    first = np.array(sheet)[4:228, 4:228]
    assert np.abs(first - np.array(scenes[0].image.resize((224, 224)))).mean() < 1
    cut, _ = measure_rows(model, processor, dataset, max_new_tokens=1)
    assert cut["caption"]["cut_off"] == 3 and name


# --- refusals

@pytest.mark.parametrize("settings, message", [
    (dict(method="adapter"), "method: expected one of"),
    (dict(steps=0), "steps: expected more"),
    (dict(learning_rate=-1), "learning_rate: expected more"), (dict(replay=1), "replay: exp"),
    (dict(batch_size=8, parts=3), "8 rows, 4 of them new, do not make 3 parts"),
    (dict(rank=0), "rank: expected"),
    (dict(batch_size=1, replay=.9), "0 of them new")])
def test_bad_recipes(settings, message):
    with pytest.raises(ValueError, match=message): FinetuneRecipe(**settings)


def test_another_run_in_the_folder(small, tmp_path):
    small(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = scene_rows(50, 5)
    for changed in (dict(recipe=replace(SMALL, rank=3)), dict(train=others),
                    dict(valid=others), dict(recipe=replace(SMALL, seed=1))):
        with pytest.raises(ValueError, match="belongs to another"): small(tmp_path, **changed)
    rows = small.train.rows
    image = make_scene(9).image
    swapped = open_dataset([dict(image=image, prefix=row.prefix, suffix=row.suffix)
                            for row in rows])  # the same texts
    with pytest.raises(ValueError, match="belongs to another recipe: expected data"):
        small(tmp_path, train=swapped)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_base_in_the_folder(small, tmp_path):
    recipe = replace(SMALL, replay=0)
    small(tmp_path, recipe)
    other = deepcopy(small.start)
    nn.init.normal_(other.multi_modal_projector.linear.weight)
    with pytest.raises(ValueError, match="belongs to another"):
        finetune(other, small.processor, small.train, small.valid, tmp_path, recipe,
                 evaluate_every=2)


@pytest.mark.parametrize("method", ["lora", "frozen", "full"])
def test_models_that_cannot_learn(method, tmp_path):
    recipe = FinetuneRecipe(method)
    packed, _ = load_model(device="cpu", dtype="bfloat16", weights="packed")
    with pytest.raises(ValueError, match="packed|ordinary"): prepare(packed, recipe)
    model, _ = load_model(device="cpu", dtype="bfloat16")
    if method != "lora":
        with pytest.raises(ValueError, match="dtype='float32'"): prepare(model, recipe)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="adapter"): prepare(add_lora(model.float()), recipe)


@pytest.mark.parametrize("method, weights, pays, dtype", [
    ("lora", None, True, "float32"), ("lora", None, False, "bfloat16"),
    ("lora", "int8", True, "bfloat16"), ("full", None, False, "float32")])
def test_in_which_dtype_the_command_opens(method, weights, pays, dtype, tmp_path, monkeypatch):
    seen = []
    def stop(model, *args, **settings):
        seen.append(model.multi_modal_projector.linear.bias.dtype)
        raise ValueError("seen")
    monkeypatch.setattr(finetuning, "finetune", stop)
    monkeypatch.setattr(finetuning, "load_model", lambda path, weights, dtype: load_model(
        device="cpu", weights=weights, dtype=dtype or "bfloat16"))  # as published ones are
    monkeypatch.setattr(finetuning, "report", lambda *args: "")
    monkeypatch.setattr(finetuning, "float32_pays", lambda model: pays)
    with pytest.raises(ValueError, match="seen"):
        finetuning._teach(None, None, None, weights, tmp_path / "out", FinetuneRecipe(method))
    assert seen == [getattr(torch, dtype)]


@pytest.mark.parametrize("flags, message", [
    (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--method", "qlora"], "expected lora or frozen or full"),
    (["--weights", "int8", "--method", "full"], "takes no rounded weights"),
    (["--data", "empty.jsonl"], "empty"), (["--output_path", "model"], "its own folder"),
    (["--replay", "1.5"], "expected a share"), (["--steps", "0"], "more than 0")])
def test_one_line_each(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_maestro(tmp_path / "data", scenes_of_one_color(0, 2))
    Path("empty.jsonl").touch()
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    given = {"--data": "data", "--output_path": "mine"} | dict(zip(flags[::2], flags[1::2]))
    assert main(["finetune", *(word for pair in given.items() for word in pair)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and message in said.err and not said.out
    assert not Path("mine").exists() and not Path("mine.run").exists()


FULL = """
import resource, sys
from paligemma_nb.inference import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.exit(main(["finetune", "--data", "data", "--output_path", "mine", "--steps", "1",
               "--batch_size", "2", "--replay", "0"]))
"""


def test_a_full_disk(tmp_path):
    write_maestro(tmp_path / "data", scenes_of_one_color(0, 2))
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), TQDM_DISABLE="1")
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "mine is not written" in done.stderr
    assert not (tmp_path / "mine").exists()
