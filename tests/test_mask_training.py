"Masks to learn from, a gradient past a choice, codes that do not die, and the shipped file."
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from paligemma_nb import mask_training
from paligemma_nb.mask_training import (
    UNSEEN, CodebookTrainer, evaluate_mask_vae, make_masks, mask_vae_loss, measure_mask_vae,
    train_mask_vae, unseen_mask)
from paligemma_nb.scenes import HELD_OUT, SHAPES
from paligemma_nb.segmentation import MASK_SIZE, Codebook, load_mask_vae


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
    # what the decoder sees
    nearest = vae._vq_vae(vae.encode(masks)).unflatten(1, (4, 4)).requires_grad_()
    loss = (vae.reconstruct(nearest) - (2 * masks - 1)).square().mean()
    at_codes, = torch.autograd.grad(loss, nearest)
    expected = at_codes.sum(dim=(0, 1, 2))
    # bfloat16 against float32
    assert torch.cosine_similarity(slope, expected, dim=0) > 0.95
    assert commitment > 0 and not torch.equal(vae._vq_vae._embedding, before)


def test_training_runs_learns_and_writes_aside(tmp_path, monkeypatch):
    path = tmp_path/"new"/"a.safetensors"
    monkeypatch.setattr(mask_training, "tqdm", lambda steps, **_: steps)
    assert train_mask_vae(path, steps=150, batch_size=8, free_steps=120) == path
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with safe_open(path, "pt") as file: last = json.loads(file.metadata()["history"])[-1]
    # 1 for an answer of zero everywhere, 0.5 or so in the end
    assert last["step"] == 150 and last["loss"] < 0.9
    vae, masks = load_mask_vae(path), make_masks(np.random.default_rng(HELD_OUT), 32)
    assert (vae.decode(vae.encode(masks)) - (2 * masks - 1)).square().mean() < 0.8
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"): mask_training.save_mask_vae(vae, path, [])
    assert path.read_bytes() == before


def test_masks_for_training_are_reproducible():
    one, other = (make_masks(np.random.default_rng([0, 7]), 16) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (16, MASK_SIZE, MASK_SIZE)
    assert 0 <= one.min() and one.max() <= 1
    assert not torch.equal(one, make_masks(np.random.default_rng([0, 8]), 16))


@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_shapes_fill_their_square(kind):
    for seed in range(10):
        inside = unseen_mask(kind, np.random.default_rng(seed)) > 0
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any()
        assert inside[:, -1].any() and not inside.all()


# --- measuring, and bad input

def test_measuring_prints_a_table(capsys):
    measure_mask_vae(num=3)
    table = capsys.readouterr().out
    assert table.startswith("| kind | masks | mean IoU | lowest IoU |\n|---|---|---|---|\n")
    assert "| letter | 3 |" in table and "| **scene shapes** |" in table
    assert table.endswith(" of 128 codes used\n")


@pytest.mark.parametrize("call, error, message", [
    (lambda: measure_mask_vae("nowhere.npz"), FileNotFoundError, "no file nowhere.npz"),
    (lambda: measure_mask_vae(num=0), ValueError, "num, a whole number above 0, got 0"),
    (lambda: measure_mask_vae(num=2.5), ValueError, "num, a whole number above 0, got 2.5"),
    (lambda: train_mask_vae(steps=400), ValueError, "a whole number above 400, got 400"),
    (lambda: train_mask_vae(steps="9"), ValueError, "a whole number above 400, got '9'"),
    (lambda: train_mask_vae("a.npz"), ValueError, "ending in .safetensors, got a.npz")])
def test_what_is_wrong_is_said_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught: call()
    assert "\n" not in str(caught.value)
