"""PaliGemma from scratch: a vision-language model to understand, run, train and use.

    from paligemma_nb import load_model, generate
    model, processor = load_model()

Each name is imported from its module when it is first used, so `import paligemma_nb` alone is
quick: it imports neither torch nor anything else that is large."""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; at run time `_HOMES` is used
    from .checkpoint import save_model
    from .detection import Detection, draw_detections
    from .generation import generate, stream
    from .opening import Answer, ask, load_model
    from .paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from .processing import PaliGemmaProcessor
    from .quantization import quantize
    from .segmentation import find_objects
    from .speed import pack

_HOMES = {
    "load_model": "opening", "save_model": "checkpoint", "ask": "opening", "Answer": "opening",
    "generate": "generation", "stream": "generation",
    "find_objects": "segmentation", "draw_detections": "detection", "Detection": "detection",
    "quantize": "quantization", "pack": "speed",
    "PaliGemmaForConditionalGeneration": "paligemma", "PaliGemmaConfig": "paligemma",
    "PaliGemmaProcessor": "processing",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__(): return sorted({*globals(), *__all__})
