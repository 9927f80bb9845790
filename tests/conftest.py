"""Settings that every test shares: no network, quiet libraries, one thread, properties that do
not depend on luck or on the clock. Tests marked `long` take minutes: they need `--all`."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
# One thread adds up in the same order on any number of cores, and waits for no other thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402  (after the environment, which it may read)

settings.register_profile("course", deadline=None, derandomize=True, database=None)
settings.load_profile("course")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long proofs, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: a proof of some minutes; runs with --all alone")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"): return
    long = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


@pytest.fixture
def random_vae():
    "A mask VAE whose codes and weights mean nothing"
    import torch
    from paligemma_nb.segmentation import MaskVAE
    torch.manual_seed(0)
    vae = MaskVAE().requires_grad_(False)
    vae._vq_vae._embedding.normal_()
    return vae
