"Masks as sixteen tokens: the network, files in every layout, boxes anywhere, shipped weights."
import json
import stat
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import safe_open
from safetensors.torch import save_file

import paligemma_nb
from paligemma_nb.detection import (Detection, average_precision, format_detections,
                                    from_coco_box, mask_iou, parse_boxes)
from paligemma_nb.paligemma import PaliGemmaConfig
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import (
    add_masks, check_mask_vae, decode_mask, encode_mask, find_mask_vae, find_objects,
    load_mask_vae, mask_to_rle, mask_vae_id, object_mask, to_coco)

SHIPPED = Path(paligemma_nb.__file__).with_name("mask_vae.safetensors")


def overlap(a, b): return mask_iou([a], [b]).item()
def objects(num):
    return [o for seed in range(HELD_OUT, HELD_OUT + num) for o in make_scene(seed).objects]


# --- the network against its definition, in float64 and without torch

def conv(x, weight, bias, stride=1, padding=0): # x [i, h, w], weight [o, i, k, k]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    k, (h, w) = weight.shape[2], x.shape[1:]
    h, w = (h - k) // stride + 1, (w - k) // stride + 1
    out = np.zeros((len(weight), h, w))
    for y in range(h):
        for z in range(w):
            patch = x[:, y * stride:y * stride + k, z * stride:z * stride + k]
            out[:, y, z] = (weight * patch).sum(axis=(1, 2, 3)) + bias
    return out


# x [i, h, w], weight [i, o, 4, 4]: each value lays its kernel down, 2 further on
def conv_transpose(x, weight, bias):
    (_, h, w), o = x.shape, weight.shape[1]
    out = np.zeros((o, 2 * h + 2, 2 * w + 2))
    for y in range(h):
        for z in range(w):
            for i, value in enumerate(x[:, y, z]):
                out[:, 2 * y:2 * y + 4, 2 * z:2 * z + 4] += value * weight[i]
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def relu(x): return np.maximum(x, 0)


class Reference:
    def __init__(self, vae):
        self.t = {n: t.double().numpy() for n, t in vae.state_dict().items()}
    def layer(self, name, x, f=conv, **kwargs):
        return f(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"], **kwargs)

    def block(self, name, x):
        y = relu(self.layer(f"{name}.net.0", x, padding=1))
        return x + self.layer(f"{name}.net.4", relu(self.layer(f"{name}.net.2", y, padding=1)))

    def features(self, mask):
        x = 2 * mask[None].astype(np.float64) - 1
        for n in (0, 2, 4, 6): x = relu(self.layer(f"encoder.{n}", x, stride=2, padding=1))
        x = self.block("encoder.9", self.block("encoder.8", x))
        return self.layer("encoder.10", x).transpose(1, 2, 0)

    def encode(self, mask):
        vectors = self.features(mask).reshape(16, 512)
        return [int(np.argmin(((v - self.t["_vq_vae._embedding"]) ** 2).sum(axis=1)))
                for v in vectors]

    def decode(self, codes):
        x = self.t["_vq_vae._embedding"][codes].reshape(4, 4, 512).transpose(2, 0, 1)
        x = self.block("decoder.3", self.block("decoder.2", relu(self.layer("decoder.0", x))))
        for n in (4, 6, 8, 10): x = relu(self.layer(f"decoder.{n}", x, conv_transpose))
        return self.layer("decoder.12", x)[0]


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shipped", [False, True])
def test_network_is_its_definition(random_vae, shipped):
    vae = load_mask_vae() if shipped else random_vae
    reference, codes = Reference(vae), list(range(3, 128, 8))
    noise = np.random.default_rng(0).random((64, 64), np.float32)
    mask = object_mask(objects(1)[0]) if shipped else noise
    assert close(vae.features(torch.from_numpy(mask)[None])[0].numpy(),
                 reference.features(mask))
    assert vae.encode(torch.from_numpy(mask)[None])[0].tolist() == reference.encode(mask)
    assert close(vae.decode(torch.tensor([codes]))[0].numpy(), reference.decode(codes))


def test_parameters(random_vae):
    assert sum(p.numel() for p in random_vae.decoder.parameters()) == 1_123_457
    names = {f"{part}.{n}" for part, places in (
        ("encoder", (0, 2, 4, 6, 10)), ("decoder", (0, 4, 6, 8, 10, 12)),
        ("encoder", [f"{b}.net.{i}" for b in (8, 9) for i in (0, 2, 4)]),
        ("decoder", [f"{b}.net.{i}" for b in (2, 3) for i in (0, 2, 4)])) for n in places}
    expected = {f"{n}.{p}" for n in names for p in ("weight", "bias")} | {"_vq_vae._embedding"}
    assert random_vae.state_dict().keys() == expected


# --- files

def arrays_of(vae, jax=False, dtype=np.float32):
    "As big_vision turns them for JAX: OIHW to HWIO, IOHW to HWOI"
    def turn(a): return a.transpose(2, 3, 1, 0) if jax and a.ndim == 4 else a
    return {n: turn(t.numpy()).astype(dtype) for n, t in vae.state_dict().items()}


def test_every_layout_loads_to_the_same(tmp_path, random_vae):
    np.savez(tmp_path/"torch.npz", **arrays_of(random_vae))
    np.savez(tmp_path/"jax.npz", **arrays_of(random_vae, jax=True))
    np.savez_compressed(tmp_path/"double.npz", **arrays_of(random_vae, dtype=np.float64))
    np.savez(tmp_path/"half.npz", **arrays_of(random_vae, dtype=np.float16))
    averages = {"_vq_vae._ema_cluster_size": np.ones(128),
                "_vq_vae._ema_w": np.ones((128, 512))}
    np.savez(tmp_path/"official.npz", **arrays_of(random_vae), **averages)
    save_file({n: t.contiguous() for n, t in random_vae.state_dict().items()},
              tmp_path/"a.safetensors")
    for name in ("torch.npz", "jax.npz", "double.npz", "official.npz", "a.safetensors"):
        vae = load_mask_vae(tmp_path/name)
        found, expected = vae.state_dict(), random_vae.state_dict()
        assert all(torch.equal(t, found[n]) for n, t in expected.items()), name
        assert found.keys() == expected.keys() and not vae.training
        assert not any(p.requires_grad for p in vae.parameters())
        assert all(t.dtype == torch.float32 for t in vae.state_dict().values())
    half = load_mask_vae(str(tmp_path/"half.npz")).state_dict()
    assert all(torch.allclose(t, half[n], atol=1e-2) for n, t in expected.items())


def test_loading_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_mask_vae(SHIPPED)
    assert torch.equal(torch.rand(3), expected)


class Evil:
    def __reduce__(self): return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("decoder.0.bias"), "decoder.0.bias"),
    (lambda a: a.update(extra=np.ones(2, np.float32)), "extra"),
    (lambda a: a.update({"decoder.4.weight": np.ones((128, 128, 4, 3), np.float32)}),
     "decoder.4.weight"),
    (lambda a: a.update({"encoder.0.bias": np.arange(16)}), "encoder.0.bias.*floats"),
    (lambda a: a.update({"encoder.0.bias": np.array([Evil()] * 16)}), "encoder.0.bias"),
    (lambda a: a.update({"encoder.0.bias": np.array(["1"] * 16)}), "encoder.0.bias"),
])
def test_wrong_tensors_are_named(tmp_path, random_vae, change, message):
    content = arrays_of(random_vae)
    change(content)
    np.savez(tmp_path/"a.npz", **content)
    with pytest.raises(ValueError, match=message) as caught: load_mask_vae(tmp_path/"a.npz")
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_broken_files_are_refused(tmp_path, random_vae, suffix):
    path = tmp_path/f"a{suffix}"
    if suffix == ".npz": np.savez(path, **arrays_of(random_vae))
    else: save_file({n: t.contiguous() for n, t in random_vae.state_dict().items()}, path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    for place in range(0, min(3000, len(whole)), 7): flipped[place] ^= 0x5A
    for content in (b"", whole[:3], whole[:1000], whole[:len(whole) // 2], whole[:-1],
                    bytes(flipped), b"PK\3\4" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name): load_mask_vae(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        load_mask_vae(tmp_path/"nowhere.npz")
    with pytest.raises(FileNotFoundError): load_mask_vae(tmp_path)
    (tmp_path/"a.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="safetensors or .npz"): load_mask_vae(tmp_path/"a.pt")
    np.save(tmp_path/"one.npy", np.ones(3))
    (tmp_path/"one.npy").rename(tmp_path/"one.npz")
    with pytest.raises(ValueError, match="one.npz"): load_mask_vae(tmp_path/"one.npz")
    with zipfile.ZipFile(tmp_path/"text.npz", "w") as archive:
        archive.writestr("decoder.0.bias", "hello")
    with pytest.raises(ValueError, match="decoder.0.bias"): load_mask_vae(tmp_path/"text.npz")


# --- masks in pictures

CODES = st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)
SIDE = st.sampled_from([1, 2, 3]) | st.integers(1, 300)
PLACE = st.floats(-2, 3) | st.sampled_from([0.0, 1.0, 0.5, -1e6, 1e6, 1e-9])


# bool [height, width]: pixels whose centre lies between the nearest pixel edges
def allowed(box, size):
    x1, y1, x2, y2 = map(round, box)
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)


@given(CODES, st.tuples(PLACE, PLACE, PLACE, PLACE), st.tuples(SIDE, SIDE))
@settings(max_examples=1000)
def test_any_box_in_any_picture(codes, corners, size):
    box = tuple(v * n for v, n in zip(corners, size * 2))
    mask = decode_mask(codes, box, size)
    assert mask.shape == size[::-1] and mask.dtype == bool
    assert not (mask & ~allowed(box, size)).any()


@given(CODES, st.integers(-90, 90), st.integers(-90, 90), st.integers(1, 200),
       st.integers(1, 200))
@settings(max_examples=100)
def test_a_box_past_the_border_is_a_window_on_the_whole(codes, x, y, w, h):
    whole = decode_mask(codes, (100 + x, 100 + y, 100 + x + w, 100 + y + h), (400, 400))
    part = decode_mask(codes, (x, y, x + w, y + h), (80, 70))
    # where the value is zero to float32's last digits
    assert np.count_nonzero(part != whole[100:170, 100:180]) <= 2


def test_resized_as_big_vision_does():
    codes = encode_mask(np.ones((9, 9), bool), (0, 0, 9, 9))
    square = Image.fromarray(load_mask_vae().decode(torch.tensor([codes]))[0].numpy())
    for w, h in ((1, 1), (7, 30), (64, 64), (200, 90)):
        expected = np.asarray(square.resize((w, h), Image.Resampling.BILINEAR)) > 0
        mask = decode_mask(codes, (3.2, 4.4, 3.2 + w, 4.4 + h), (300, 300))
        assert (mask[4:4 + h, 3:3 + w] == expected).all()


def test_large_pictures_and_huge_boxes():
    o = make_scene(HELD_OUT, 4000).objects[0]
    mask = decode_mask(encode_mask(o.mask, o.box), o.box, (4000, 4000))
    assert mask.shape == (4000, 4000) and overlap(mask, o.mask) > 0.97
    middles = load_mask_vae().decode(torch.arange(128)[:, None].repeat(1, 16))[:, 16:48, 16:48]
    full = (middles > 0).flatten(1).all(1).nonzero()[:, 0].tolist()
    for far in (10**5, 10**12, 1e300):
        assert decode_mask([full[0]] * 16, (-far, -far, far, far), (50, 40)).all()


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 9, 5, 5), (5.1, 5.1, 5.4, 9),
                                 (-9, -9, 0, 0), (20, 0, 30, 9),
                                 (0, -5, 9, -1)])
def test_boxes_without_a_pixel(box):
    assert decode_mask([1] * 16, box, (20, 10)).sum() == 0
    with pytest.raises(ValueError, match="box"): encode_mask(np.ones((10, 20), bool), box)


NAN, INF = float("nan"), float("inf")

@pytest.mark.parametrize("codes, box, size, message", [
    ([1] * 15, (0, 0, 9, 9), (9, 9), "16 codes"), ([1] * 17, (0, 0, 9, 9), (9, 9), "16 codes"),
    (None, (0, 0, 9, 9), (9, 9), "16 codes"), ([], (0, 0, 9, 9), (9, 9), "16 codes"),
    ([128] + [1] * 15, (0, 0, 9, 9), (9, 9), "127"),
    ([-1] + [1] * 15, (0, 0, 9, 9), (9, 9), "127"),
    ([0.5] * 16, (0, 0, 9, 9), (9, 9), "0 … 127"),
    ([NAN] * 16, (0, 0, 9, 9), (9, 9), "0 … 127"),
    ([1] * 16, (0, 0, NAN, 9), (9, 9), "finite"),
    ([1] * 16, (-INF, 0, 9, 9), (9, 9), "finite"),
    ([1] * 16, (0, 0, 9), (9, 9), "box"), ([1] * 16, None, (9, 9), "box"),
    ([1] * 16, (0, 0, 9, 9), (9,), "size"), ([1] * 16, (0, 0, 9, 9), (0, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), (9, -1), "size"), ([1] * 16, (0, 0, 9, 9), (9.5, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), (INF, 9), "size"), ([1] * 16, (0, 0, 9, 9), (NAN, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), 9, "size"),
])
def test_bad_arguments_of_decode(codes, box, size, message):
    with pytest.raises(ValueError, match=message): decode_mask(codes, box, size)


@pytest.mark.parametrize("mask", [np.ones((5, 5)), np.ones((5, 5), np.int64),
                                  np.ones((5, 5, 1), bool), np.ones(5, bool), [[True]], None,
                                  True, torch.ones(5, 5, dtype=torch.bool),
                                  np.ones((0, 5), bool)])
def test_bad_masks(mask):
    with pytest.raises(ValueError): encode_mask(mask, (0, 0, 5, 5))


def test_numbers_of_any_kind():
    codes, box, size = tuple(range(16)), (2, 3, 40, 50), (60, 70)
    expected = decode_mask(codes, box, size)
    for other in (list(codes), np.arange(16, dtype=np.uint8), torch.arange(16)):
        mask = decode_mask(other, np.array(box, np.float32), np.array(size))
        assert (mask == expected).all()
    mask = expected.astype(np.uint8)
    found = encode_mask(expected, box)
    for other in (mask, 255 * mask, np.asfortranarray(mask)):
        assert encode_mask(other, box) == found
    assert all(type(c) is int for c in found)


def test_objects_survive_the_way_through_codes():
    scenes = [make_scene(seed, 448) for seed in range(HELD_OUT, HELD_OUT + 20)]
    found = [overlap(decode_mask(encode_mask(o.mask, o.box), o.box, (448, 448)), o.mask)
             for s in scenes for o in s.objects]
    assert np.mean(found) > 0.97 and min(found) > 0.9


def test_exact_masks_do_not_depend_on_the_pixels():
    for seed in range(HELD_OUT, HELD_OUT + 10):
        for small, large in zip(make_scene(seed, 56).objects, make_scene(seed, 896).objects):
            mask = object_mask(large)
            assert np.abs(object_mask(small) - mask).max() < 1e-3
            x1, y1, x2, y2 = map(round, large.box)
            drawn = Image.fromarray(large.mask[y1:y2, x1:x2].astype(np.float32))
            drawn = drawn.resize((64, 64), Image.Resampling.BOX)
            assert np.abs(np.asarray(drawn) - mask).mean() < 0.02


def test_text_to_masks():
    scene = make_scene(HELD_OUT + 6, 224)
    things = [Detection(o.name, o.box, encode_mask(o.mask, o.box)) for o in scene.objects]
    things.append(Detection("bare", (1, 1, 9, 9)))
    size = (224, 224)
    found = add_masks(parse_boxes(format_detections(things, size), size), size)
    assert [d.label for d in found] == [d.label for d in things] and found[-1].mask is None
    for o, d in zip(scene.objects, found): assert overlap(d.mask, o.mask) > 0.9
    assert things[0].mask is None and add_masks([], size) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_run_lengths_are_cocos(mask):
    rle = json.loads(json.dumps(mask_to_rle(mask)))
    height, width = mask.shape
    assert rle["size"] == [height, width] and sum(rle["counts"]) == mask.size
    assert all(n > 0 for n in rle["counts"][1:])
    assert (coco.decode(coco.frPyObjects(rle, height, width)) == mask).all()
    packed = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert coco.frPyObjects(rle, height, width)["counts"] == packed["counts"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_coco_reads_our_results():
    scenes = [make_scene(HELD_OUT + i) for i in range(4)]
    ids = {name: 90 - k for k, name in enumerate({o.name for s in scenes for o in s.objects})}
    found = [Detection(o.name, o.box, score=.5 + k / 10, mask=o.mask if k else None)
             for k, o in enumerate(scenes[0].objects)]
    rows = to_coco(found, 7, ids)
    assert json.loads(json.dumps(rows)) == rows and "segmentation" not in rows[0]
    assert rows[0]["area"] == pytest.approx(np.prod(rows[0]["bbox"][2:]))
    assert rows[1]["area"] == found[1].mask.sum()
    data = COCO()
    data.dataset = dict(images=[dict(id=7, width=112, height=112)], annotations=[],
                        categories=[dict(id=i, name=name) for name, i in ids.items()])
    data.createIndex()
    loaded = data.loadRes(rows)
    for d, row in zip(found, loaded.loadAnns(loaded.getAnnIds(imgIds=7))):
        assert from_coco_box(row["bbox"]) == pytest.approx(d.box)
        assert row["score"] == d.score and data.cats[row["category_id"]]["name"] == d.label
        if d.mask is not None: assert (loaded.annToMask(row) == d.mask).all()


def test_results_score_as_our_own_measure_says():
    "Results and truth written for COCO, masks and all, give what `average_precision` gives."
    scenes = [make_scene(HELD_OUT + i) for i in range(6)]
    truth = [[Detection(o.name, o.box, mask=o.mask) for o in s.objects] for s in scenes]
    rng = np.random.default_rng(0)
    found = [[replace(d, score=rng.random(), mask=np.roll(d.mask, rng.integers(9), 1))
              for d in detections if rng.random() < 0.8] for detections in truth]
    ids = {name: k for k, name in enumerate(sorted({d.label for t in truth for d in t}), 1)}
    rows = [row for i, d in enumerate(truth) for row in to_coco(d, i, ids)]
    data = COCO()
    data.dataset = dict(images=[dict(id=i, width=112, height=112) for i in range(6)],
                        annotations=[r | dict(id=k, iscrowd=0) for k, r in enumerate(rows, 1)],
                        categories=[dict(id=i) for i in ids.values()])
    data.createIndex()
    results = data.loadRes([row for i, d in enumerate(found) for row in to_coco(d, i, ids)])
    evaluation = COCOeval(data, results, "segm")
    evaluation.params.iouThrs = [0.5]
    evaluation.evaluate(), evaluation.accumulate()
    pictures = [(f, t, (112, 112)) for f, t in zip(found, truth)]
    expected = average_precision(pictures, masks=True)
    assert evaluation.eval["precision"][0, :, :, 0, -1].mean() == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_what_coco_cannot_take_is_named():
    cat = Detection("cat", (1, 2, 3, 4))
    row, = to_coco([cat], "a.jpg", {"cat": 3})
    assert row == dict(image_id="a.jpg", category_id=3, bbox=[1, 2, 2, 2], area=4, score=1)
    assert to_coco([], 1, {}) == []
    with pytest.raises(ValueError, match=r"no category id for the label 'cat'.*\['dog'\]"):
        to_coco([cat], 1, {"dog": 1})
    for wrong in ((5, 0, 1, 1), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="x1 <= x2"):
            to_coco([replace(cat, box=wrong)], 1, {"cat": 1})
    with pytest.raises(ValueError, match=r"mask \[height, width\]"):
        to_coco([replace(cat, mask=np.ones((2, 2, 1), bool))], 1, {"cat": 1})


# --- the shipped file

def test_shipped_file():
    assert SHIPPED.stat().st_size <= 6e6 and stat.S_IMODE(SHIPPED.stat().st_mode) == 0o644
    with safe_open(SHIPPED, "pt") as file: history = json.loads(file.metadata()["history"])
    assert [row.keys() for row in history] == [{"step", "loss", "seconds"}] * len(history)
    assert history[-1]["step"] == 6000 and history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert load_mask_vae() is load_mask_vae()


# --- whose codes?

OURS = "042a161050c72521"


def write_vae(vae, path): np.savez(path, **arrays_of(vae))


def config_of(mask_vae):
    content = json.loads((SHIPPED.with_name("tiny")/"config.json").read_text())
    return PaliGemmaConfig.from_dict({k: v for k, v in content.items() if k != "mask_vae"} | (
        {} if mask_vae is None else dict(mask_vae=mask_vae)))


def test_the_id_is_of_the_tensors_alone(tmp_path, random_vae):
    assert mask_vae_id(load_mask_vae()) == mask_vae_id(load_mask_vae(SHIPPED)) == OURS
    own = mask_vae_id(random_vae)
    assert len(own) == 16 and int(own, 16) and own != OURS
    assert mask_vae_id(random_vae.double()) == own
    random_vae.float()
    np.savez(tmp_path/"jax.npz", **arrays_of(random_vae, jax=True),
             **{"_vq_vae._ema_w": np.ones(3)})
    assert mask_vae_id(load_mask_vae(tmp_path/"jax.npz")) == own
    for name, change in (("_vq_vae._embedding", lambda t: t[[1, 0, *range(2, 128)]]),
                         ("decoder.12.bias", lambda t: t + 1e-6),
                         ("encoder.0.bias", lambda t: -t)):
        other = load_mask_vae(tmp_path/"jax.npz")
        tensor = other.state_dict()[name]
        tensor.copy_(change(tensor))
        assert mask_vae_id(other) != own
    a, b = load_mask_vae(tmp_path/"jax.npz"), load_mask_vae(tmp_path/"jax.npz")
    # same numbers, other names
    a.encoder[9].net[0].bias.zero_(), b.encoder[9].net[2].bias.zero_()
    assert mask_vae_id(a) != mask_vae_id(b)


def test_the_shipped_model_names_the_shipped_decoder():
    assert config_of(None).mask_vae is None
    content = json.loads((SHIPPED.with_name("tiny")/"config.json").read_text())
    config = PaliGemmaConfig.from_dict(content)
    assert config.mask_vae == content["mask_vae"] == config.to_dict()["mask_vae"] == OURS
    assert find_mask_vae(SHIPPED.with_name("tiny"), config) == (load_mask_vae(), None)
    assert "mask_vae" not in config_of(None).to_dict()


def test_every_case_of_model_and_decoder(tmp_path, random_vae):
    other, path = mask_vae_id(random_vae), tmp_path/"vae-oid.npz"
    def found(own):
        vae, warning = find_mask_vae(tmp_path, config_of(own))
        assert warning is None or "\n" not in warning
        return vae and mask_vae_id(vae), warning
    # nothing beside the model
    assert found(OURS) == (OURS, None)
    vae, warning = found(None)
    assert vae is None and "does not say" in warning
    assert "gs://big_vision/paligemma/vae-oid.npz" in warning
    vae, warning = found(other)
    assert vae is None and f"the codes of the mask VAE {other}" in warning and OURS in warning
    # a decoder beside it
    write_vae(random_vae, path)
    assert found(None) == found(other) == (other, None)
    vae, warning = found("0123456789abcdef")
    assert vae == other and "0123456789abcdef" in warning and other in warning
    vae, warning = found(OURS)
    assert vae == OURS and warning.startswith(f"{path} is passed over")
    write_vae(load_mask_vae(), path)
    assert found(OURS) == (OURS, None) and found(other)[0] == OURS and other in found(other)[1]


def test_a_broken_decoder_is_no_decoder(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path/"vae-oid.npz").write_text(pointer)
    with pytest.raises(ValueError, match="pointers instead of vae-oid.npz.*git lfs pull"):
        find_mask_vae(tmp_path, config_of(None))
    (tmp_path/"vae-oid.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="vae-oid.npz"):
        find_mask_vae(tmp_path, config_of(OURS))


def test_codes_of_another_decoder_are_warned_of(random_vae):
    mask, box, size = np.ones((40, 40), bool), (3, 3, 30, 30), (40, 40)
    answer = format_detections([Detection("a", box, encode_mask(mask, box))], size)
    calls = (lambda **kw: encode_mask(mask, box, **kw),
             lambda **kw: find_objects(answer, size, **kw),
             lambda **kw: add_masks(parse_boxes(answer, size), size, **kw))
    for call in calls:
        with pytest.warns(UserWarning, match="does not say") as caught:
            call(config=config_of(None))
        assert caught[0].filename.endswith(("test_segmentation.py", "segmentation.py"))
        with pytest.warns(UserWarning, match="this is"):
            call(config=config_of(OURS), vae=random_vae)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(), call(vae=random_vae), call(config=config_of(OURS))
            call(config=config_of(None), vae=random_vae)
            call(config=config_of(mask_vae_id(random_vae)), vae=random_vae)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = "<loc0001><loc0001><loc0500><loc0500> a"
        assert find_objects(text, size, config=config_of(None))[0].mask is None
    assert check_mask_vae(config_of(OURS)) is None


def test_wrong_decoder_costs_what_the_warning_says(random_vae):
    "The right value: with its own decoder a mask comes back, with the other's it does not."
    shuffled = load_mask_vae(SHIPPED)
    shuffled._vq_vae._embedding.copy_(shuffled._vq_vae._embedding.flip(0))
    good, bad = [], []
    for o in objects(5):
        codes = encode_mask(o.mask, o.box, shuffled)
        good.append(overlap(decode_mask(codes, o.box, (112, 112), shuffled), o.mask))
        bad.append(overlap(decode_mask(codes, o.box, (112, 112)), o.mask))
    assert np.mean(good) > 0.9 and np.mean(bad) < 0.7


def test_encode_refuses_what_holds_nothing():
    mask = np.zeros((60, 80), bool)
    mask[30:50, 20:40] = True
    assert len(encode_mask(mask, (20, 30, 40, 50))) == 16
    with pytest.raises(ValueError, match="holds no pixel of the mask"):
        encode_mask(mask, (50, 5, 70, 25))
    with pytest.raises(ValueError, match="holds no pixel of the mask"):
        encode_mask(np.zeros_like(mask), (1, 1, 9, 9))
    with pytest.raises(ValueError, match="in pixels.*from_yolo_box"):
        encode_mask(mask, (.25, .5, .5, .83))
    with pytest.raises(ValueError, match="from_coco_box"): encode_mask(mask, (20, 30, 15, 15))
    with pytest.raises(ValueError, match="outside its picture of width 80"):
        encode_mask(mask, (20, 61, 40, 70))
