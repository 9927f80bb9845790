"""Draw nbs/images/social.png, the picture that a link to the site shows: the shipped model
points at what it was asked for."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from paligemma_nb import ask, draw_detections
from paligemma_nb.scenes import HELD_OUT, make_scene

PROMPTS = "segment red circle", "caption en"
INK, PAPER, GOLD = "#22303c", "#fbf8f1", "#a8761a"


def main() -> None:
    scene = make_scene(HELD_OUT + 2738, 560).image
    found, caption = ask(scene, list(PROMPTS))
    page = Image.new("RGB", (1200, 630), PAPER)
    page.paste(draw_detections(scene, found.detections), (605, 35))
    draw = ImageDraw.Draw(page)

    def write(y, text, size, color=INK):
        draw.multiline_text((40, y), text, color, ImageFont.load_default(size), spacing=10)

    write(50, "PaliGemma\nfrom scratch", 72)
    write(250, "A notebook course in PyTorch", 34)
    write(370, f"> {PROMPTS[0]}", 30, GOLD)
    write(440, f"> {PROMPTS[1]}", 30, GOLD)
    write(490, caption.text.replace(", ", ",\n", 1), 30)
    page.quantize(128).save(Path(__file__).resolve().parents[1]/"nbs/images/social.png",
                            optimize=True)


if __name__ == "__main__": main()
