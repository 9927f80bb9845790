"""What users of transformers type, word for word where the names agree: it works, or a line
says what to write."""
import pytest
import torch

from paligemma_nb import PaliGemmaForConditionalGeneration, PaliGemmaProcessor, load_model
from paligemma_nb.generation import stream
from paligemma_nb.hub import SHIPPED
from paligemma_nb.scenes import HELD_OUT, make_scene

SCENES = [make_scene(HELD_OUT + i) for i in (4, 9)]


@pytest.fixture(scope="module")
def opened():
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED, dtype="float32").eval()
    return model.to("cpu"), PaliGemmaProcessor.from_pretrained(SHIPPED)


def inputs_of(opened, text="caption en"):
    model, processor = opened
    inputs = processor(text=text, images=SCENES[0].image, return_tensors="pt")
    return inputs.to(model.device)


def test_load_and_caption(opened):
    model, processor = opened
    with torch.inference_mode(): generation = model.generate(
        **inputs_of(opened), max_new_tokens=100, do_sample=False)
    assert processor.decode(generation[0], skip_special_tokens=True) == SCENES[0].caption


def test_the_prompt_is_not_among_the_new_tokens(opened):
    model, processor = opened
    inputs = inputs_of(opened)
    sliced = model.generate(**inputs)[0][inputs["input_ids"].shape[-1]:]
    assert not len(sliced)  # the docstring of generate says so


def test_batch(opened):
    model, processor = opened
    inputs = processor(text=["caption en"] * 2, images=[scene.image for scene in SCENES],
                       padding="longest", return_tensors="pt").to(model.device, model.dtype)
    texts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert texts == [scene.caption for scene in SCENES]


def test_detect(opened):
    model, processor = opened
    name = SCENES[0].objects[0].name
    ids = model.generate(**inputs_of(opened, f"detect {name}"), max_new_tokens=64)
    assert f"> {name}" in processor.batch_decode(ids)[0]


def test_stream(opened):
    with pytest.raises(TypeError, match="instead of streamer= write generation.stream"):
        opened[0].generate(**inputs_of(opened), streamer=object())
    assert "".join(stream(*opened, inputs_of(opened))) == SCENES[0].caption


def test_sample(opened):
    def drawn(seed):
        torch.manual_seed(seed)
        return opened[0].generate(
            **inputs_of(opened), do_sample=True, temperature=3.0, top_k=50, top_p=0.95,
            repetition_penalty=1.2, max_new_tokens=20).tolist()
    assert drawn(0) == drawn(0) and len({str(drawn(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", ["num_beams", "stopping_criteria", "logits_processor"])
def test_settings_that_have_another_name(opened, name):
    with pytest.raises(TypeError, match=f"instead of {name}= write"):
        opened[0].generate(**inputs_of(opened), **{name: 4})


def test_save_and_open_again(opened, tmp_path):
    model, processor = opened
    with pytest.raises(ValueError, match=r"model.save_pretrained\(folder, processor\)"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", processor)
    processor.save_pretrained(tmp_path / "saved")
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, processor = load_model(device="cpu")
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    inputs = processor(text="caption en", images=SCENES[0].image).to(dtype=dtype)
    assert processor.batch_decode(model.generate(**inputs)) == [SCENES[0].caption]


@pytest.mark.parametrize("name, way", [
    ("torch_dtype", "dtype="), ("device_map", "device="), ("quantization_config", "weights="),
    ("attn_implementation", "nothing"), ("low_cpu_mem_usage", "nothing")])
def test_ways_to_open_that_have_another_name(name, way):
    with pytest.raises(TypeError, match=f"instead of {name}= write {way}"):
        PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED, **{name: "auto"})


def test_quantise():
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED, weights="int8")
    processor = PaliGemmaProcessor.from_pretrained(SHIPPED)
    inputs = processor(text="caption en", images=SCENES[0].image, return_tensors="pt")
    assert processor.batch_decode(model.generate(**inputs)) == [SCENES[0].caption]


@pytest.mark.parametrize("wrong", [dict(return_tensors="np"), dict(padding="max_length")])
def test_forms_of_inputs_that_there_are_not(opened, wrong):
    with pytest.raises(ValueError, match="expected return_tensors='pt' and padding=True"):
        opened[1](text="caption en", images=SCENES[0].image, **wrong)
