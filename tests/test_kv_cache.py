"The cache takes tensors of its own shape, and no more than it has room for."
import pytest
import torch

from paligemma_nb.kv_cache import KVCache


def refused(message): return pytest.raises(ValueError, match=message)


def test_a_cache_takes_only_its_own_shape():
    cache, expected = KVCache(2, 3, 2, 5, 8), r"keys and values \[3, 2, t, 8\], got \["
    def pair(b=3, k=2, t=4, d=8): return torch.ones(b, k, t, d)
    for bad in (pair(b=1), pair(b=2), pair(k=1), pair(t=1), pair(d=1), pair()[0]):
        for both in ((bad, pair()), (pair(), bad)):
            with refused(expected): cache.update(0, *both)
    for _ in range(2):  # nothing moves on before `advance`
        keys, values = cache.update(0, pair(), 2 * pair())
        assert torch.equal(keys, pair()) and torch.equal(values, 2 * pair())
    cache.advance(4)
    with refused("2 tokens do not fit: 4 of 5 used"): cache.update(1, pair(t=2), pair(t=2))
    keys, values = cache.update(0, 3 * pair(t=1), 4 * pair(t=1))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 3]
    assert values[2, 1, :, 7].tolist() == [2, 2, 2, 2, 4]
    assert cache.num_bytes == 2 * (2 * 3 * 2 * 5 * 8) * 4
