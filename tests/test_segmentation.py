"Masks as sixteen tokens: the network by its definition, files in every layout, boxes anywhere, the shipped weights."
import json
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco
from safetensors import safe_open
from safetensors.torch import save_file

from paligemma_nb import segmentation
from paligemma_nb.detection import Detection, format_detections, parse_boxes
from paligemma_nb.scenes import HELD_OUT, SHAPES, make_scene
from paligemma_nb.segmentation import (MASK_SIZE, UNSEEN, Codebook, CodebookTrainer, MaskVAE, add_masks, decode_mask,
                                       encode_mask, evaluate_mask_vae, load_mask_vae, make_masks, mask_to_rle,
                                       mask_vae_loss, object_mask, train_mask_vae, unseen_mask)

SHIPPED = segmentation.Path(segmentation.paligemma_nb.__file__).with_name("mask_vae.safetensors")


def iou(a, b): return coco.iou(*([coco.encode(np.asfortranarray(m, dtype=np.uint8))] for m in (a, b)), [0])[0, 0]
def objects(num): return [o for seed in range(HELD_OUT, HELD_OUT + num) for o in make_scene(seed).objects]


@pytest.fixture
def random_vae():
    torch.manual_seed(0)
    vae = MaskVAE().requires_grad_(False)
    vae._vq_vae._embedding.normal_()
    return vae


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


def conv_transpose(x, weight, bias): # x [i, h, w], weight [i, o, 4, 4]: each value lays its kernel down, 2 further on
    (_, h, w), o = x.shape, weight.shape[1]
    out = np.zeros((o, 2 * h + 2, 2 * w + 2))
    for y in range(h):
        for z in range(w):
            for i, value in enumerate(x[:, y, z]): out[:, 2 * y:2 * y + 4, 2 * z:2 * z + 4] += value * weight[i]
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def relu(x): return np.maximum(x, 0)


class Reference:
    def __init__(self, vae): self.t = {n: t.double().numpy() for n, t in vae.state_dict().items()}
    def layer(self, name, x, f=conv, **kwargs): return f(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"], **kwargs)

    def block(self, name, x):
        y = relu(self.layer(f"{name}.net.0", x, padding=1))
        return x + self.layer(f"{name}.net.4", relu(self.layer(f"{name}.net.2", y, padding=1)))

    def features(self, mask):
        x = 2 * mask[None].astype(np.float64) - 1
        for n in (0, 2, 4, 6): x = relu(self.layer(f"encoder.{n}", x, stride=2, padding=1))
        return self.layer("encoder.10", self.block("encoder.9", self.block("encoder.8", x))).transpose(1, 2, 0)

    def encode(self, mask):
        vectors = self.features(mask).reshape(16, 512)
        return [int(np.argmin(((v - self.t["_vq_vae._embedding"]) ** 2).sum(axis=1))) for v in vectors]

    def decode(self, codes):
        x = self.t["_vq_vae._embedding"][codes].reshape(4, 4, 512).transpose(2, 0, 1)
        x = self.block("decoder.3", self.block("decoder.2", relu(self.layer("decoder.0", x))))
        for n in (4, 6, 8, 10): x = relu(self.layer(f"decoder.{n}", x, conv_transpose))
        return self.layer("decoder.12", x)[0]


def close(found, expected): return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shipped", [False, True])
def test_network_is_its_definition(random_vae, shipped):
    vae = load_mask_vae() if shipped else random_vae
    reference, codes = Reference(vae), list(range(3, 128, 8))
    mask = object_mask(objects(1)[0]) if shipped else np.random.default_rng(0).random((64, 64), np.float32)
    assert close(vae.features(torch.from_numpy(mask)[None])[0].numpy(), reference.features(mask))
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


def same(a, b, atol=0.0): return all(torch.allclose(t, b.state_dict()[n], atol=atol) for n, t in a.state_dict().items())


def test_every_layout_loads_to_the_same(tmp_path, random_vae):
    np.savez(tmp_path/"torch.npz", **arrays_of(random_vae))
    np.savez(tmp_path/"jax.npz", **arrays_of(random_vae, jax=True))
    np.savez_compressed(tmp_path/"double.npz", **arrays_of(random_vae, dtype=np.float64))
    np.savez(tmp_path/"half.npz", **arrays_of(random_vae, dtype=np.float16))
    averages = {"_vq_vae._ema_cluster_size": np.ones(128), "_vq_vae._ema_w": np.ones((128, 512))}
    np.savez(tmp_path/"official.npz", **arrays_of(random_vae), **averages)
    save_file({n: t.contiguous() for n, t in random_vae.state_dict().items()}, tmp_path/"a.safetensors")
    for name in ("torch.npz", "jax.npz", "double.npz", "official.npz", "a.safetensors"):
        vae = load_mask_vae(tmp_path/name)
        assert same(vae, random_vae) and not vae.training and not any(p.requires_grad for p in vae.parameters()), name
        assert all(t.dtype == torch.float32 for t in vae.state_dict().values())
    assert same(load_mask_vae(str(tmp_path/"half.npz")), random_vae, atol=1e-2)


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
    (lambda a: a.update({"decoder.4.weight": np.ones((128, 128, 4, 3), np.float32)}), "decoder.4.weight"),
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
    for content in (b"", whole[:3], whole[:1000], whole[:len(whole) // 2], whole[:-1], bytes(flipped), b"PK\3\4" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name): load_mask_vae(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"): load_mask_vae(tmp_path/"nowhere.npz")
    with pytest.raises(FileNotFoundError): load_mask_vae(tmp_path)
    (tmp_path/"a.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="safetensors or .npz"): load_mask_vae(tmp_path/"a.pt")
    np.save(tmp_path/"one.npy", np.ones(3))
    (tmp_path/"one.npy").rename(tmp_path/"one.npz")
    with pytest.raises(ValueError, match="one.npz"): load_mask_vae(tmp_path/"one.npz")
    with zipfile.ZipFile(tmp_path/"text.npz", "w") as archive: archive.writestr("decoder.0.bias", "hello")
    with pytest.raises(ValueError, match="decoder.0.bias"): load_mask_vae(tmp_path/"text.npz")


# --- masks in pictures

CODES = st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)
SIDE = st.sampled_from([1, 2, 3]) | st.integers(1, 300)
PLACE = st.floats(-2, 3) | st.sampled_from([0.0, 1.0, 0.5, -1e6, 1e6, 1e-9])


def allowed(box, size): # bool [height, width]: pixels whose centre lies between the nearest pixel edges
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


@given(CODES, st.integers(-90, 90), st.integers(-90, 90), st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=100)
def test_a_box_past_the_border_is_a_window_on_the_whole(codes, x, y, w, h):
    whole = decode_mask(codes, (100 + x, 100 + y, 100 + x + w, 100 + y + h), (400, 400))
    part = decode_mask(codes, (x, y, x + w, y + h), (80, 70))
    assert np.count_nonzero(part != whole[100:170, 100:180]) <= 2  # where the value is zero to float32's last digits


def test_resized_as_big_vision_does():
    codes = encode_mask(np.ones((9, 9), bool), (0, 0, 9, 9))
    square = Image.fromarray(load_mask_vae().decode(torch.tensor([codes]))[0].numpy())
    for w, h in ((1, 1), (7, 30), (64, 64), (200, 90)):
        expected = np.asarray(square.resize((w, h), Image.Resampling.BILINEAR)) > 0
        assert (decode_mask(codes, (3.2, 4.4, 3.2 + w, 4.4 + h), (300, 300))[4:4 + h, 3:3 + w] == expected).all()


def test_large_pictures_and_huge_boxes():
    o = make_scene(HELD_OUT, 4000).objects[0]
    mask = decode_mask(encode_mask(o.mask, o.box), o.box, (4000, 4000))
    assert mask.shape == (4000, 4000) and iou(mask, o.mask) > 0.97
    full = [c for c in range(128) if (load_mask_vae().decode(torch.full((1, 16), c))[0, 16:48, 16:48] > 0).all()]
    for far in (10**5, 10**12, 1e300): assert decode_mask([full[0]] * 16, (-far, -far, far, far), (50, 40)).all()


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 9, 5, 5), (5.1, 5.1, 5.4, 9), (-9, -9, 0, 0), (20, 0, 30, 9),
                                 (0, -5, 9, -1)])
def test_boxes_without_a_pixel(box):
    assert decode_mask([1] * 16, box, (20, 10)).sum() == 0
    with pytest.raises(ValueError, match="box"): encode_mask(np.ones((10, 20), bool), box)


NAN, INF = float("nan"), float("inf")

@pytest.mark.parametrize("codes, box, size, message", [
    ([1] * 15, (0, 0, 9, 9), (9, 9), "16 codes"), ([1] * 17, (0, 0, 9, 9), (9, 9), "16 codes"),
    (None, (0, 0, 9, 9), (9, 9), "16 codes"), ([], (0, 0, 9, 9), (9, 9), "16 codes"),
    ([128] + [1] * 15, (0, 0, 9, 9), (9, 9), "127"), ([-1] + [1] * 15, (0, 0, 9, 9), (9, 9), "127"),
    ([0.5] * 16, (0, 0, 9, 9), (9, 9), "whole"), ([NAN] * 16, (0, 0, 9, 9), (9, 9), "whole"),
    ([1] * 16, (0, 0, NAN, 9), (9, 9), "finite"), ([1] * 16, (-INF, 0, 9, 9), (9, 9), "finite"),
    ([1] * 16, (0, 0, 9), (9, 9), "box"), ([1] * 16, None, (9, 9), "box"),
    ([1] * 16, (0, 0, 9, 9), (9,), "size"), ([1] * 16, (0, 0, 9, 9), (0, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), (9, -1), "size"), ([1] * 16, (0, 0, 9, 9), (9.5, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), (INF, 9), "size"), ([1] * 16, (0, 0, 9, 9), (NAN, 9), "size"),
    ([1] * 16, (0, 0, 9, 9), 9, "size"),
])
def test_bad_arguments_of_decode(codes, box, size, message):
    with pytest.raises(ValueError, match=message): decode_mask(codes, box, size)


@pytest.mark.parametrize("mask", [np.ones((5, 5)), np.ones((5, 5), np.int64), np.ones((5, 5, 1), bool),
                                  np.ones(5, bool), [[True]], None, torch.ones(5, 5, dtype=torch.bool),
                                  np.ones((0, 5), bool)])
def test_bad_masks(mask):
    with pytest.raises(ValueError): encode_mask(mask, (0, 0, 5, 5))


def test_numbers_of_any_kind():
    codes, box, size = tuple(range(16)), (2, 3, 40, 50), (60, 70)
    expected = decode_mask(codes, box, size)
    for other in (list(codes), np.arange(16, dtype=np.uint8), torch.arange(16)):
        assert (decode_mask(other, np.array(box, np.float32), np.array(size)) == expected).all()
    mask = expected.astype(np.uint8)
    found = encode_mask(expected, box)
    assert encode_mask(mask, box) == encode_mask(255 * mask, box) == encode_mask(np.asfortranarray(mask), box) == found
    assert all(type(c) is int for c in found)


def test_objects_survive_the_way_through_codes():
    scenes = [make_scene(seed, 448) for seed in range(HELD_OUT, HELD_OUT + 20)]
    found = [iou(decode_mask(encode_mask(o.mask, o.box), o.box, (448, 448)), o.mask) for s in scenes for o in s.objects]
    assert np.mean(found) > 0.97 and min(found) > 0.9


def test_exact_masks_do_not_depend_on_the_pixels():
    for seed in range(HELD_OUT, HELD_OUT + 10):
        for small, large in zip(make_scene(seed, 56).objects, make_scene(seed, 896).objects):
            mask = object_mask(large)
            assert np.abs(object_mask(small) - mask).max() < 1e-3
            x1, y1, x2, y2 = map(round, large.box)
            drawn = Image.fromarray(large.mask[y1:y2, x1:x2].astype(np.float32)).resize((64, 64), Image.Resampling.BOX)
            assert np.abs(np.asarray(drawn) - mask).mean() < 0.02


def test_text_to_masks():
    scene = make_scene(HELD_OUT + 6, 224)
    things = [Detection(o.name, o.box, encode_mask(o.mask, o.box)) for o in scene.objects]
    things.append(Detection("bare", (1, 1, 9, 9)))
    size = (224, 224)
    found = add_masks(parse_boxes(format_detections(things, size), size), size)
    assert [d.label for d in found] == [d.label for d in things] and found[-1].mask is None
    for o, d in zip(scene.objects, found): assert iou(d.mask, o.mask) > 0.9
    assert things[0].mask is None and add_masks([], size) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_run_lengths_are_cocos(mask):
    rle = json.loads(json.dumps(mask_to_rle(mask)))
    height, width = mask.shape
    assert rle["size"] == [height, width] and sum(rle["counts"]) == mask.size and all(n > 0 for n in rle["counts"][1:])
    assert (coco.decode(coco.frPyObjects(rle, height, width)) == mask).all()
    packed = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert coco.frPyObjects(rle, height, width)["counts"] == packed["counts"]


# --- the shipped file

def test_shipped_file():
    assert SHIPPED.stat().st_size <= 6e6 and stat.S_IMODE(SHIPPED.stat().st_mode) == 0o644
    with safe_open(SHIPPED, "pt") as file: history = json.loads(file.metadata()["history"])
    assert [row.keys() for row in history] == [{"step", "loss", "seconds"}] * len(history)
    assert history[-1]["step"] == 6000 and history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert load_mask_vae() is load_mask_vae()


def test_shipped_file_keeps_shapes():
    ious, uses = evaluate_mask_vae(load_mask_vae(), 60)
    assert np.concatenate([ious[shape] for shape in SHAPES]).mean() > 0.98
    assert np.concatenate([ious[kind] for kind in UNSEEN]).mean() > 0.88
    assert ious["random"].mean() > 0.9 and min(v.mean() for v in ious.values()) > 0.8
    assert (uses > 0).all() and uses.sum() == 16 * sum(map(len, ious.values()))


# --- training

def test_codes_are_running_means():
    torch.manual_seed(0)
    vectors, book = torch.randn(40, 3), Codebook(4, 3)
    trainer = CodebookTrainer(book, vectors, decay=0.9)
    sums, counts = book._embedding.clone(), torch.ones(4)
    for _ in range(5):
        codes = trainer.update(vectors, revive=False)
        for k in range(4):
            chosen = vectors[codes == k]
            counts[k] = 0.9 * counts[k] + 0.1 * len(chosen)
            sums[k] = 0.9 * sums[k] + 0.1 * chosen.sum(dim=0)
        assert torch.allclose(book._embedding, sums / counts[:, None], atol=1e-5)


def test_dead_codes_stay_finite_and_come_back():
    torch.manual_seed(0)
    book = Codebook(8, 2)
    trainer = CodebookTrainer(book, 0.01 * torch.randn(20, 2))
    heaps = torch.tensor([[5., 5.], [-5., 5.], [5., -5.], [-5., -5.]])
    before = book._embedding.clone()
    for _ in range(15_000): trainer.update(heaps, revive=False)
    dead = trainer.counts < 1e-40  # counts and sums are down to float32's last bits
    assert dead.sum() == 5 and torch.allclose(book._embedding[dead], before[dead], rtol=1e-3)
    for _ in range(30): trainer.update(heaps.repeat(8, 1), revive=True)
    assert torch.cdist(heaps, book._embedding).min(dim=1).values.max() < 0.1


def test_the_gradient_goes_straight_through(random_vae):
    vae, masks = random_vae.requires_grad_(True), make_masks(np.random.default_rng(0), 8)
    trainer = CodebookTrainer(vae._vq_vae, vae.features(masks).detach().flatten(0, 2))
    before = vae._vq_vae._embedding.clone()
    error, commitment = mask_vae_loss(vae, masks, trainer)
    slope, = torch.autograd.grad(error, vae.encoder[10].bias, retain_graph=True)
    nearest = vae._vq_vae(vae.encode(masks)).unflatten(1, (4, 4)).requires_grad_()  # what the decoder sees
    at_codes, = torch.autograd.grad((vae.reconstruct(nearest) - (2 * masks - 1)).square().mean(), nearest)
    expected = at_codes.sum(dim=(0, 1, 2))
    assert torch.nn.functional.cosine_similarity(slope, expected, dim=0) > 0.95  # bfloat16 against float32
    assert commitment > 0 and not torch.equal(vae._vq_vae._embedding, before)


def test_training_runs_learns_and_writes_aside(tmp_path, monkeypatch):
    path = tmp_path/"new"/"a.safetensors"
    monkeypatch.setattr(segmentation, "tqdm", lambda steps, **_: steps)
    assert train_mask_vae(path, steps=150, batch_size=8, free_steps=120) == path
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"] and stat.S_IMODE(path.stat().st_mode) == 0o644
    with safe_open(path, "pt") as file: last = json.loads(file.metadata()["history"])[-1]
    assert last["step"] == 150 and last["loss"] < 0.9  # 1 for an answer of zero everywhere, 0.5 or so in the end
    vae, masks = load_mask_vae(path), make_masks(np.random.default_rng(HELD_OUT), 32)
    assert (vae.decode(vae.encode(masks)) - (2 * masks - 1)).square().mean() < 0.8
    before = path.read_bytes()
    monkeypatch.setattr(segmentation.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"): segmentation.save_mask_vae(vae, path, [])
    assert path.read_bytes() == before


def test_masks_for_training_are_reproducible():
    one, other = (make_masks(np.random.default_rng([0, 7]), 16) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (16, MASK_SIZE, MASK_SIZE)
    assert 0 <= one.min() and one.max() <= 1 and not torch.equal(one, make_masks(np.random.default_rng([0, 8]), 16))


@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_shapes_fill_their_square(kind):
    for seed in range(10):
        inside = unseen_mask(kind, np.random.default_rng(seed)) > 0
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any() and not inside.all()


# --- the command line

def command(*arguments):
    words = [sys.executable, "-m", "paligemma_nb.segmentation", *arguments]
    return subprocess.run(words, capture_output=True, text=True)


def test_evaluate_prints_a_table():
    done = command("evaluate", "--num", "3")
    assert done.returncode == 0 and "| kind | masks | mean IoU | lowest IoU |" in done.stdout
    assert "| letter | 3 |" in done.stdout and "codes used" in done.stdout


@pytest.mark.parametrize("arguments", [
    ("evaluate", "--path", "nowhere.npz"), ("evaluate", "--nun", "3"), ("evaluate", "--num", "0"),
    ("train", "--steps", "400"), ("train", "--output_path", "a.npz"), ("train", "--step", "9")])
def test_command_line_says_what_is_wrong(arguments):
    done = command(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
