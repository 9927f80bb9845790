"One door: every kind of folder and of weights, read once; and answers in one call."
import ast
import copy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import paligemma_nb
from paligemma_nb import opening
from paligemma_nb.checkpoint import load_checkpoint, save_model
from paligemma_nb.generation import generate
from paligemma_nb.hub import PICTURES, SHIPPED, find_model
from paligemma_nb.lora import load_adapter, lora_layers, merge_adapter, save_adapter
from paligemma_nb.opening import Answer, answer, ask, load_model, read_objects
from paligemma_nb.quantization import quantize, weights_of
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.speed import can_pack, pack
from test_checkpoint import edit_json, fails, same
from test_lora import adapted
from test_parity import relative

packs = can_pack(torch.zeros(1, 1, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def scenes(): return [make_scene(HELD_OUT + i, 150) for i in range(3, 6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "The shipped model in bfloat16, and rounded: a folder for each"
    root = tmp_path_factory.mktemp("folders")
    for weights in (None, "int8", "int4"):
        model, processor = load_checkpoint(device="cpu", dtype="bfloat16")
        if weights: quantize(model, weights)
        save_model(model, processor, root/str(weights))
    return root


# --- kinds

@pytest.mark.filterwarnings("ignore:on this processor int4")
@pytest.mark.parametrize("stored", ["None", "int8", "int4"])
@pytest.mark.parametrize("weights", [None, "packed", "int8", "int4"])
def test_every_kind_from_every_folder(folders, stored, weights, scenes):
    folder = folders/stored
    if stored != "None" and weights in {"int8", "int4"} - {stored}:
        with fails(ValueError, str(folder), f"holds {stored} weights, not {weights}"):
            load_model(folder, weights=weights)
        return
    model, processor = load_model(folder, device="cpu", weights=weights)
    small = weights if weights in ("int8", "int4") else stored
    assert weights_of(model).startswith("bfloat16" if small == "None" else small)
    expected, _ = load_checkpoint(folders/"None", device="cpu")
    if small != "None": quantize(expected, small)
    inputs = processor([s.image for s in scenes], ["caption en"] * 3)
    got, truth = (processor.decode(generate(m, inputs)) for m in (model, expected))
    # packed, two tokens that are nearly as likely may change places
    assert sum(map(str.__eq__, got, truth)) >= (2 if weights == "packed" else 3)
    if weights != "packed": assert same(model, expected) and same(copy.deepcopy(model), model)


def test_an_ordinary_module_unless_asked(scenes, tmp_path):
    model, processor = load_model(device="cpu")
    lesson = processor([scenes[0].image], ["caption en"], suffix=[scenes[0].caption])
    copied = copy.deepcopy(model)
    before = copied(**lesson).loss
    before.backward()
    torch.optim.SGD(copied.parameters(), lr=1e-3).step()
    assert copied(**lesson).loss < before and not same(copied, model)
    save_model(copied.bfloat16(), processor, tmp_path/"new")
    assert same(load_model(tmp_path/"new", device="cpu")[0], copied)
    assert next(load_model(dtype="float64",
                           device="cpu")[0].parameters()).dtype == torch.float64


def test_what_cannot_be_had(folders):
    small = folders/"int8"
    for wish, words in (
        (dict(weights="int2"),
         "weights: expected None, packed, int8 or int4, got 'int2'"),
        (dict(weights=""), "got ''"),
        (dict(model_path=small, dtype="float32"),
         f"{small} holds quantised weights: they run on"),
        (dict(model_path=small, device="meta"), "run on the CPU"),
        (dict(device="meta", weights="int8", dtype="float16.5"), "unknown dtype"),
    ):
        with fails(ValueError, words): load_model(**wish)


def test_small_weights_with_a_processor_from_elsewhere(folders, tmp_path):
    import shutil
    alone = Path(shutil.copytree(folders/"int8", tmp_path/"alone"))
    (alone/"tokenizer.json").unlink()
    with fails(FileNotFoundError, "no tokenizer.json", "processor_path"): load_model(alone)
    model, processor = load_model(alone, processor_path=folders/"None")
    assert weights_of(model) == "int8" and processor.encode("detect red circle")


@pytest.mark.parametrize("dtype, weights, pays, expected", [
    ("float32", "int8", True, "in float32, int8 weights save memory and no time"),
    ("bfloat16", "int4", False, "on this processor int4 weights save memory"),
    ("bfloat16", "int4", True, None), ("bfloat16", "int8", False, None),
    ("bfloat16", "packed", False, None), ("bfloat16", None, False, None)])
def test_says_where_small_weights_do_not_pay(dtype, weights, pays, expected, monkeypatch):
    monkeypatch.setattr(opening, "int4_pays", lambda: pays)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(device="cpu", dtype=dtype, weights=weights)
    said = [w for w in caught if w.category is UserWarning]
    assert len(said) == bool(expected) and all(str(w.message).startswith(expected)
                                               for w in said)
    assert all(w.filename == __file__ for w in said)  # it points at the line that asked


OPENED = """
import sys
from collections import Counter
opened = Counter()
def listen(event, args):
    if event == "open": opened[str(args[0])] += 1

sys.addaudithook(listen)
from paligemma_nb import load_model
load_model(sys.argv[1], weights=sys.argv[2] if len(sys.argv) > 2 else None)
print(opened[f"{sys.argv[1]}/config.json"])
"""


@pytest.mark.parametrize("stored, weights", [("None", ()), ("None", ("packed",)),
                                             ("None", ("int8",)), ("int8", ("packed",))])
def test_a_folder_is_read_once(folders, stored, weights):
    command = [sys.executable, "-c", OPENED, str(folders/stored), *weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"  # how often config.json was opened


# --- with an adapter

@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "A folder of an adapter for the shipped model"
    folder = tmp_path_factory.mktemp("adapters")/"one"
    save_adapter(adapted(load_model(device="cpu")[0], rank=2, std=.05), folder, SHIPPED)
    return folder


def logits(model, scenes):
    _, processor = load_model(device="cpu")
    inputs = processor([s.image for s in scenes], ["caption en"] * len(scenes))
    with torch.inference_mode(): return model(**inputs.to(dtype=model.dtype)).logits


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.filterwarnings("ignore:in float32")
def test_an_adapter_is_that_of_load_adapter(adapter, scenes, weights):
    model, _ = load_model(device="cpu", weights=weights)
    before = logits(model, scenes)
    expected = logits(load_adapter(model, adapter), scenes)
    assert relative(before, expected) > 1e-2
    for given in (dict(adapter=adapter), dict(adapter=str(adapter)), dict(model_path=adapter)):
        model, processor = load_model(device="cpu", weights=weights, **given)
        assert torch.equal(logits(model, scenes), expected) and not model.training
        assert lora_layers(model) and processor.image_size == 112
        assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_an_adapter_finds_its_base_in_a_folder(adapter, folders, scenes, tmp_path):
    save_adapter(load_model(folders/"None", device="cpu", adapter=adapter)[0],
                 tmp_path/"mine", folders/"None")
    expected = logits(load_model(folders/"None", adapter=adapter, device="cpu")[0], scenes)
    for given in (dict(adapter=tmp_path/"mine"), dict(model_path=tmp_path/"mine")):
        model, _ = load_model(device="cpu", **given)
        assert model.dtype == torch.bfloat16 and torch.equal(logits(model, scenes), expected)


def test_packing_merges_an_adapter(adapter, folders, scenes):
    merged = merge_adapter(load_model(folders/"None", device="cpu", adapter=adapter)[0])
    expected = pack(merged)
    model, _ = load_model(folders/"None", device="cpu", adapter=adapter, weights="packed")
    assert not lora_layers(model)
    assert torch.equal(logits(model, scenes), logits(expected, scenes))
    assert weights_of(model) == weights_of(expected)
    with fails(ValueError, "merge the model's adapter first"):
        pack(load_model(device="cpu", adapter=adapter)[0])


def test_adapters_that_cannot_be_had(adapter, folders, tmp_path):
    beside = tmp_path/"beside"
    model, processor = load_model(device="cpu")
    save_model(model, processor, beside)
    for file in adapter.iterdir(): shutil.copy(file, beside)
    for given in ((beside, None), (beside, adapter)):
        with fails(ValueError, str(beside), "holds an adapter that was not asked for"):
            load_model(given[0], adapter=given[1])
    with fails(ValueError, "holds an adapter that was not asked for"):
        ask(np.zeros((9, 9, 3), dtype=np.uint8), "caption en", beside)
    assert lora_layers(load_model(beside, device="cpu", adapter=beside)[0])
    with fails(FileNotFoundError, "no adapter_config.json"): load_model(adapter=tmp_path)
    edit_json(beside/"adapter_config.json", base_model_name_or_path=str(tmp_path/"gone"))
    (beside/"config.json").unlink()
    for call in (lambda: load_model(beside), lambda: ask("x.png", "caption en", beside)):
        with fails(FileNotFoundError, "is an adapter for", "name its folder, too"): call()


def test_ask_an_adapter(adapter, scenes, tmp_path, monkeypatch):
    model, processor = load_model(device="cpu")
    save_model(model, processor, tmp_path/"base")
    mine = tmp_path/"mine"
    opened, opens = [], opening.load_model
    def watched(*args, **how):
        opened.append(args)
        return opens(*args, **how)

    def expected():
        changed, _ = load_model(tmp_path/"base", device="cpu", adapter=mine)
        return processor.decode(generate(changed, processor(scenes[0].image, "caption en"),
                                         max_new_tokens=20))[0]
    def told(): return ask(scenes[0].image, "caption en", mine, max_new_tokens=20).text
    monkeypatch.setattr(opening, "load_model", watched)
    answers = []
    for seed in (1, 2):  # trained anew
        save_adapter(adapted(copy.deepcopy(model), seed, std=.5), mine, tmp_path/"base")
        answers.append(told())
        assert told() == answers[-1] == expected() and len(opened) == seed
    assert len({scenes[0].caption, *answers}) == 3
    with torch.no_grad(): model.language_model.model.norm.weight.fill_(-1)
    save_model(model, processor, tmp_path/"base")  # its base, too
    assert told() == expected() != answers[-1] and len(opened) == 3


# --- answers

BOXES = ("<loc0100><loc0100><loc0500><loc0500> red circle ; "
         "<loc0600><loc0100><loc0900><loc0400> bl")


@pytest.mark.parametrize("text, whole", [
    (BOXES, 1), (BOXES + "ue ring", 1), (BOXES + "ue ring ;", 2), (BOXES[:20], 0), ("a ring",
                                                                                    0),
    (BOXES[:40], 0), ("", 0)])
def test_half_an_object_is_none(text, whole):
    assert len(read_objects(text, (112, 112), cut_off=True)) == whole


def test_several_are_answered_picture_by_picture(scenes):
    model, processor = load_model(device="cpu")
    prompts = ["caption en", f"detect {scenes[0].objects[0].name}",
               "answer en how many shapes?"]
    expected = [processor.decode(generate(model, processor([s.image], [p])))[0]
                for s in scenes for p in prompts]
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda module, x: seen.append(len(x[0])))
    for size in (1, 2, 3, 8, 100):  # of a batch: fewer rows than prompts, and more
        seen.clear()
        got = answer(model, processor, [s.image for s in scenes], prompts, batch_size=size)
        assert [a.text for a in got] == expected and sum(seen) == 3
    truth = scenes[0].things()[scenes[0].objects[0].name]
    assert len(got[1].detections) == len(truth)
    for d, o in zip(got[1].detections, truth):
        assert np.abs(np.subtract(d.box, o.box)).max() < 8


def test_boxes_are_in_pixels_of_their_own_picture(scenes):
    model, processor = load_model(device="cpu")
    square, wide = scenes[0].image, scenes[0].image.resize((600, 75))
    prompts = [f"detect {scenes[0].objects[0].name}"]
    answers = answer(model, processor, [square, wide], prompts)
    a, b = (found.detections[0].box for found in answers)
    shares = np.divide(a, 150), np.divide(b, (600, 75, 600, 75))
    assert np.abs(np.subtract(*shares)).max() < .05


def test_ask(scenes, tmp_path):
    image, path = scenes[0].image, tmp_path/"a picture.png"
    image.save(path)
    one = ask(image, "caption en")
    assert one == Answer(scenes[0].caption, [], False)
    for same_image in (path, str(path), np.asarray(image)):
        assert ask(same_image, " \n caption en\n") == one
    assert ask([image], "caption en") == ask(image, ["caption en"]) == [one]
    name = scenes[0].objects[0].name
    four = ask([path, scenes[1].image], ["caption en", f"segment {name}"])
    assert four[0] == one and four[2].text == scenes[1].caption
    mask = four[1].detections[0].mask
    assert mask.shape == (150, 150) and mask.any()
    assert ask([], "caption en") == ask(image, []) == []
    short = ask(image, "caption en", max_new_tokens=4)
    assert short.cut_off and one.text.startswith(short.text)


def test_ask_refuses(tmp_path):
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    for prompt in ("", " \n", ["caption en", ""], [3]):
        with fails(ValueError, "expected some text as prompt"): ask(image, prompt)
    with fails(FileNotFoundError, "no such picture", "nothing.png"):
        ask(tmp_path/"nothing.png", "caption en")
    with fails(FileNotFoundError, "no model folder"): ask(image, "caption en", tmp_path/"none")
    with fails(ValueError, "max_new_tokens"): ask(image, "caption en", max_new_tokens=0)


def test_a_model_stays_open_until_its_folder_changes(scenes, tmp_path, monkeypatch):
    model, processor = load_model(device="cpu")
    save_model(model, processor, tmp_path/"mine")
    opened, opens = [], opening.load_model
    def watched(folder, **how):
        opened.append((folder, how))
        return opens(folder, **how)

    monkeypatch.setattr(opening, "load_model", watched)
    def caption(): return ask(scenes[0].image, "caption en", tmp_path/"mine").text
    assert caption() == caption() == scenes[0].caption
    assert opened == [(tmp_path/"mine", dict(weights="packed", adapter=None))]
    monkeypatch.chdir(tmp_path)
    ask(scenes[0].image, "caption en", "mine")  # the same folder under another name
    assert len(opened) == 1
    # all logits are alike
    with torch.no_grad(): model.language_model.model.norm.weight.fill_(-1)
    save_model(model, processor, tmp_path/"mine")
    assert caption() != scenes[0].caption and len(opened) == 2


def test_masks_of_another_decoder(scenes, tmp_path, random_vae):
    """A model that does not say whose codes it writes gets a warning, and only where it
    writes some."""
    model, processor = load_model(device="cpu")
    model.config.mask_vae = None
    save_model(model, processor, tmp_path/"theirs")
    prompt = f"segment {scenes[0].objects[0].name}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(scenes[0].image, "caption en", tmp_path/"theirs")
    with pytest.warns(UserWarning, match="whose mask codes it writes"):
        ask(scenes[0].image, prompt, tmp_path/"theirs")
    # the folder's own decoder is used
    np.savez(tmp_path/"theirs"/"vae-oid.npz",
             **{name: x.numpy() for name, x in random_vae.state_dict().items()})
    own, = ask(scenes[0].image, prompt, tmp_path/"theirs").detections
    shipped, = ask(scenes[0].image, prompt).detections
    assert own.codes == shipped.codes and (own.mask != shipped.mask).any()


# --- the package's names

def test_importing_the_package_imports_nothing_large():
    code = ("import sys, paligemma_nb; dir(paligemma_nb)\n"
            "print({'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True)
    assert done.stdout == "set()\n"


def test_names_of_the_package():
    source = ast.parse(Path(paligemma_nb.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == paligemma_nb._HOMES and list(typed) != []
    assert paligemma_nb.__all__ == list(paligemma_nb._HOMES) and 10 <= len(typed) <= 14
    for name, home in typed.items():
        assert getattr(paligemma_nb, name).__module__ == f"paligemma_nb.{home}"
        assert name in dir(paligemma_nb)
    assert not hasattr(paligemma_nb, "open_model")
    # noqa
    with pytest.raises(ImportError, match="nonsense"): from paligemma_nb import nonsense
    assert (Path(paligemma_nb.__file__).parent/"py.typed").exists()
    from test_house import SETTINGS
    assert paligemma_nb.__version__ == SETTINGS["version"]
    assert "py.typed" in SETTINGS["package_data"]


def test_the_snippet_of_the_front_page(scenes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from paligemma_nb import draw_detections, find_objects, generate, load_model
    image = scenes[0].image
    model, processor = load_model()
    inputs = processor(images=image, text=f"detect {scenes[0].objects[0].name}")
    text = processor.decode(generate(model, inputs))[0]
    assert draw_detections(image, find_objects(text, image.size)).size == image.size
