"""Draw the shipped model at work: nbs/images/social.png, which a link to the site shows, and
nbs/images/scene.png, which stands on the front page and in the tour."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from paligemma_nb import ask, draw_detections
from paligemma_nb.scenes import HELD_OUT, make_scene

IMAGES = Path(__file__).resolve().parents[1]/"nbs"/"images"
PROMPTS = ("caption en", "answer en how many objects are there?", "detect yellow cross",
           "segment red circle")
INK, PAPER, GOLD = "#22303c", "#fbf8f1", "#a8761a"


def sheet(height: int): # 1200 wide, and a function that writes on it
    page = Image.new("RGB", (1200, height), PAPER)
    draw = ImageDraw.Draw(page)

    def write(x, y, text, size, color=INK):
        draw.multiline_text((x, y), text, color, ImageFont.load_default(size), spacing=10)

    return page, write


def save(page: Image.Image, name: str) -> None:
    page.quantize(128).save(IMAGES/name, optimize=True)


def main() -> None:
    scene = make_scene(HELD_OUT + 2738, 560).image
    caption, count, cross, circle = ask(scene, list(PROMPTS))

    page, write = sheet(630)
    page.paste(draw_detections(scene, circle.detections), (605, 35))
    write(40, 50, "PaliGemma\nfrom scratch", 72)
    write(40, 250, "A notebook course in PyTorch", 34)
    write(40, 370, f"> {PROMPTS[3]}", 30, GOLD)
    write(40, 440, f"> {PROMPTS[0]}", 30, GOLD)
    write(40, 490, caption.text.replace(", ", ",\n", 1), 30)
    save(page, "social.png")

    page, write = sheet(440)
    drawn = draw_detections(scene, cross.detections + circle.detections)
    page.paste(drawn.resize((400, 400), Image.Resampling.LANCZOS), (20, 20))
    boxes, name = circle.text.split("<seg")[0], circle.text.rpartition(">")[2]
    said = caption.text, count.text, cross.text, f"{boxes}<seg… {name}"
    for i, (prompt, answer) in enumerate(zip(PROMPTS, said)):
        write(450, 24 + 102 * i, f"> {prompt}", 27, GOLD)
        write(450, 64 + 102 * i, answer, 27)
    save(page, "scene.png")


if __name__ == "__main__": main()
