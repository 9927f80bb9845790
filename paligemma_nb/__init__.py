"""PaliGemma from scratch: a vision-language model to understand, run, train and use.

    from paligemma_nb import load_model, generate
    model, processor = load_model()

Each name is imported from its module when it is first used, so that `import paligemma_nb` alone
waits for nothing."""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; `_HOMES` is what runs
    from .checkpoint import load_model, save_model
    from .detection import Detection, draw_detections
    from .generation import generate, stream
    from .paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from .processing import PaliGemmaProcessor
    from .segmentation import find_objects

_HOMES = {
    "load_model": "checkpoint", "save_model": "checkpoint",
    "generate": "generation", "stream": "generation",
    "find_objects": "segmentation", "draw_detections": "detection", "Detection": "detection",
    "PaliGemmaForConditionalGeneration": "paligemma", "PaliGemmaConfig": "paligemma",
    "PaliGemmaProcessor": "processing",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__(): return sorted({*globals(), *__all__})
