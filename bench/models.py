"""The models that are measured, in several sizes, opened by this package and transformers."""
from pathlib import Path

import torch


def wide_processor():
    from paligemma_nb.processing import PaliGemmaProcessor
    from paligemma_nb.tasks import tiny_processor
    return PaliGemmaProcessor(tiny_processor().tokenizer, image_size=224, num_image_tokens=256)


def write_middle(folder):
    "About 300 M random weights: more than in the shipped model, fewer than in published ones."
    from paligemma_nb.checkpoint import save_model
    from paligemma_nb.gemma import GemmaConfig
    from paligemma_nb.paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from paligemma_nb.siglip import SiglipVisionConfig
    processor = wide_processor()
    vision = SiglipVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                num_attention_heads=12, patch_size=14, image_size=224)
    text = GemmaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
                       num_attention_heads=8, num_key_value_heads=1, head_dim=128,
                       vocab_size=32_000)
    config = PaliGemmaConfig(vision, text, image_token_index=processor.image_token_id)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config)
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.02)
    save_model(model.bfloat16(), processor, folder)


def write_full_size(size, folder, num_layers=None):
    "The published sizes, written by transformers: nothing of ours has touched the file."
    from transformers import PaliGemmaConfig as TheirConfig, PaliGemmaForConditionalGeneration
    from paligemma_nb.gemma import GemmaConfig
    from paligemma_nb.gemma2 import Gemma2Config
    from paligemma_nb.paligemma import PaliGemmaConfig
    from paligemma_nb.siglip import SiglipVisionConfig
    processor = wide_processor()
    text = (GemmaConfig(2048, 16384, num_layers or 18, 8, 1, 257_216) if size == "3b" else
            Gemma2Config(2304, 9216, num_layers or 26, 8, 4, 257_216))
    vision = SiglipVisionConfig(1152, 4304, 27, 16, patch_size=14)
    config = TheirConfig(**PaliGemmaConfig(vision, text, processor.image_token_id).to_dict())
    torch.manual_seed(0)
    with torch.device("meta"): model = PaliGemmaForConditionalGeneration(config).bfloat16()
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        # so that layers outweigh the embedding: else the model would repeat its last token,
        # and comparing says little
        is_layer = "language_model" in name and p.ndim > 1
        std = 0.005 if "embed_tokens" in name else 0.05 if is_layer else 0.02
        # LayerNorm's scale is around 1; RMSNorm's is around 0
        is_scale = "vision" in name and name.endswith("weight") and p.ndim == 1
        torch.nn.init.normal_(p, mean=float(is_scale), std=std)
    model.tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def full_size(size, folder): # -> its folder in that one, written if it is not there yet
    path = Path(folder) / size
    if not path.exists():
        part = path.with_suffix(".part")  # a kill leaves no half of it under its name
        write_full_size(size, part)
        part.rename(path)
    return path


def open_ours(folder, way="as stored", dtype=None):
    from paligemma_nb import load_model
    how = dict(dtype=dtype) if way == "as stored" else dict(weights="packed")
    model, processor = load_model(folder, device="cpu", **how)
    model.config.eos_token_id = -1  # every answer takes the full number of tokens
    return model, processor


def open_theirs(folder, dtype):
    from transformers import PaliGemmaForConditionalGeneration, logging
    logging.set_verbosity_error(), logging.disable_progress_bar()
    dtype = getattr(torch, dtype)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def write_small(folder, weights, target): # "int8" or "int4" -> target
    from paligemma_nb import load_model, save_model
    model, processor = load_model(folder, device="cpu", weights=weights)
    save_model(model, processor, target)
    return target


def decoder_bytes(folder): # of its weights in the file: what each further token must read
    from safetensors import safe_open
    count = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if "language_model" in name]
            count += sum(file.get_tensor(name).nbytes for name in names)
    return count


def make_inputs(processor, rows=1):
    from paligemma_nb.scenes import HELD_OUT, make_scene
    images = [make_scene(HELD_OUT + i).image for i in range(rows)]
    return processor(images, ["caption en"] * rows)
