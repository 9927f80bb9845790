"The page nbs/scene in a real browser: it draws, reads and answers as the package does."
import base64
import copy
import functools
import gzip
import io
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma_nb import find_objects, generate, load_model
from paligemma_nb.processing import image_to_tensor
from paligemma_nb.scenes import HELD_OUT, make_scene
from paligemma_nb.segmentation import load_mask_vae
from paligemma_nb.tasks import scene_examples

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(HELD_OUT, HELD_OUT + 30)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def need(found, what):
    "What was found. Without it the tests are skipped, but where CI is set they fail"
    if not found: (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is missing")
    return found


def test_sources_fit_the_page():
    files = [p for p in (ROOT/"nbs"/"scene").iterdir() if p.suffix in (".js", ".html", ".css")]
    lines = [line for path in files for line in path.read_text().splitlines()]
    assert lines and not [line for line in lines if len(line) > 95]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built page, and its address"
    need(next(filter(shutil.which, BROWSERS), None), "a browser (Chromium or Chrome)")
    need(shutil.which("npm"), "npm")
    folder = tmp_path_factory.mktemp("site")/"scene"
    done = subprocess.run([sys.executable, ROOT/".ci"/"scene.py", folder], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if "npm" in done.stderr: need(done.returncode == 0, f"what npm fetches ({done.stderr})")
    assert done.returncode == 0, done.stderr
    handler = functools.partial(Quiet, directory=folder.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/scene/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = shutil.which(next(filter(shutil.which, BROWSERS)))
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def open_page(browser, address, **settings):
    "A page whose mistakes and requests are written down"
    page = browser.new_context(reduced_motion="reduce", **settings).new_page()
    page.set_default_timeout(600_000)  # a hang; no page is that slow
    page.mistakes, page.asked = [], []
    bad = "error", "warning"
    page.on("console", lambda line: line.type in bad and page.mistakes.append(line.text))
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    return page


def said(page):
    "What the page says once nothing is left to answer"
    page.wait_for_selector("#talk[aria-busy=false]")
    return page.inner_text("#said")


# bytes come back as text: as a list of numbers they would take a minute
TEXT = """
    const text = array => Array.from(new Uint8Array(array.buffer, array.byteOffset,
        array.byteLength), byte => String.fromCharCode(byte)).join("")
"""


def from_text(text, dtype=np.uint8): return np.frombuffer(text.encode("latin1"), dtype)


@pytest.fixture(scope="module")
def page(browser, site):
    page = open_page(browser, site[1], viewport=dict(width=1200, height=900))
    said(page)
    yield page
    assert page.mistakes == []
    page.context.close()


@pytest.fixture(scope="module")
def rounded():
    "The shipped model, its processor and its mask VAE, with the page's weights: float16"
    model, processor = load_model(device="cpu")
    return model.half().float(), processor, copy.deepcopy(load_mask_vae()).half().float()


# --- the same pictures

def test_scenes_of_seeds_are_the_same_pictures(page):
    drawn = page.evaluate("async seeds => {" + TEXT + """
        const {makeScene, paintScene} = await import("./scenes.js")
        return seeds.map(seed => text(paintScene(makeScene(seed), 112)))}""", [0, 7, *SEEDS])
    for seed, rgba in zip([0, 7, *SEEDS], drawn):
        pixels = from_text(rgba).reshape(112, 112, 4)[..., :3].astype(int)
        distance = abs(pixels - make_scene(seed, 112).pixels)
        assert distance.max() <= 1 and (distance > 0).sum() <= 3, seed  # sums are rounded


@pytest.mark.parametrize("size", [(300, 200), (50, 700), (1000, 37), (111, 113), (112, 112)])
def test_pictures_are_resized_as_by_pillow(page, size):
    width, height = size
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    noise[: height // 2] //= 3
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    seen = page.evaluate("async url => {" + TEXT + """
        const {openPicture, resize, toTensor} = await import("./pixels.js")
        const {rgba, size} = await openPicture(await (await fetch(url)).blob())
        return text(toTensor(resize(rgba, size, [112, 112], "bicubic")))}""",
        "data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    image = Image.fromarray(noise)
    if height - 112 > 2 * (width - 112):  # Pillow before 13 begins with the width here, too
        image = image.resize((width, 112), Image.Resampling.BICUBIC)
    expected = image_to_tensor(image, 112).flatten().numpy()
    assert np.array_equal(from_text(seen, np.float32), expected)


def test_what_is_no_picture_is_said(page):
    line = page.evaluate("""async () => {
        const {openPicture} = await import("./pixels.js")
        return openPicture(new File(["text"], "a.txt")).catch(error => error.message)}""")
    assert line == "a.txt is no picture that this browser can open."


# --- the same answers

ASK = "async rows => {" + TEXT + """
    const [{RemoteModel}, scenes, pixels, {parseBoxes}] = await Promise.all(
        ["client", "scenes", "pixels", "answers"].map(name => import(`./${name}.js`)))
    let start = performance.now()
    const model = new RemoteModel(() => {}), answers = []
    await model.ready
    const opened = performance.now() - start
    start = performance.now()
    for (const [seed, prompts] of rows) {
        const rgba = scenes.paintScene(scenes.makeScene(seed), 112)
        for (const prompt of prompts) {
            const {ids, text: said} = await model.ask(pixels.toTensor(rgba), prompt)
            const masks = []
            for (const {box, codes} of parseBoxes(said)) if (codes) {
                const square = await model.mask(codes), edges = box.map(v => 112 * v)
                masks.push(text(pixels.boxMask(square, edges, [112, 112])))
            }
            answers.push({seed, prompt, rgba: text(rgba), ids, said, masks})
        }
    }
    return {opened, asked: performance.now() - start, answers}
}"""


@torch.no_grad()
def is_tie(model, inputs, ids, other):
    "Are the first tokens that differ as likely in torch, up to rounding?"
    same = next(i for i, (a, b) in enumerate(zip(ids, other)) if a != b)
    suffix = torch.tensor([ids[:same]], dtype=torch.long)
    text = torch.cat((inputs["input_ids"], suffix), dim=1)
    types = torch.cat((torch.zeros_like(inputs["input_ids"]), torch.ones_like(suffix)), dim=1)
    logits = model(text, inputs["pixel_values"], token_type_ids=types).logits[0, -1]
    return abs(logits[ids[same]] - logits[other[same]]) < 1e-4


def test_answers_and_masks_are_those_of_torch(page, site, rounded, capsys):
    model, processor, vae = rounded
    rows = []
    for seed in SEEDS:
        examples = scene_examples(make_scene(seed), np.random.default_rng(seed))
        kinds = "caption", "detect", "segment", "count"
        rows.append([seed, [examples[kind][0].prompt for kind in kinds]])
    found = page.evaluate(ASK, rows)
    full, shipped, masks = load_model(device="cpu")[0], 0, 0
    images = [from_text(a["rgba"]).reshape(112, 112, 4)[..., :3] for a in found["answers"]]
    inputs = processor(images, [answer["prompt"] for answer in found["answers"]])
    batches = [generate(m, inputs, max_new_tokens=100).tolist() for m in (model, full)]
    for answer, image, ids, others in zip(found["answers"], images, *batches):
        ids, others = ([*takewhile(bool, row)] for row in (ids, others))  # without padding
        shipped += others == answer["ids"]
        if ids != answer["ids"]:
            alone = processor([image], [answer["prompt"]])
            where = answer["seed"], answer["prompt"]
            assert is_tie(model, alone, ids, answer["ids"]), where
            continue
        assert answer["said"] == processor.decode(ids)
        drawn = [d.mask for d in find_objects(answer["said"], (112, 112), vae=vae)
                 if d.mask is not None]
        assert len(drawn) == len(answer["masks"])
        for ours, theirs in zip(drawn, answer["masks"]):
            assert np.array_equal(ours.ravel(), from_text(theirs)), answer["seed"]
            masks += 1
    files = [path.read_bytes() for path in site[0].rglob("*") if path.is_file()]
    total, packed = sum(map(len, files)), sum(len(gzip.compress(f, 6)) for f in files)
    with capsys.disabled():
        print(f"\npage: {total / 1e6:.1f} MB ({packed / 1e6:.1f} gzipped), opened in "
              f"{found['opened'] / 1e3:.1f} s, {found['asked'] / 120:.0f} ms an answer; of 120"
              f" answers {shipped} are the float32 model's, too; {masks} masks compared")
    assert shipped >= 108 and masks >= 25


# --- what a visitor does

def test_answer_follows_the_shape_that_is_dragged(page, site):
    page.goto(site[1] + f"#seed={HELD_OUT + 2738}")
    page.reload()
    said(page)
    assert page.locator("#objects button").count() == 3
    box = page.locator("#objects button").nth(1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    assert page.input_value("#prompt") == "detect red circle"
    before = said(page)
    page.mouse.move(x + 30, y + 20, steps=3)
    page.mouse.up()
    assert said(page) != before and before.startswith("red circle from")
    assert "objects=" in page.url  # the changed scene can be sent
    page.locator("#tokens button").first.hover()
    assert page.locator("#probs div").count() == 5 and page.is_visible("#zoom")
    assert page.locator("#maps button").count() == 17  # the mean, 4 layers x 4 heads
    page.mouse.move(0, 0)
    assert page.is_hidden("#zoom")


def test_everything_works_by_keyboard(page):
    said(page)
    page.focus("#objects button")
    before = said(page)
    for key in ("ArrowRight", "+", "]"): page.keyboard.press(key)
    assert said(page) != before
    count = page.locator("#objects button").count()
    page.focus("#add button:nth-child(3)")
    page.keyboard.press("Enter")
    assert page.locator("#objects button").count() == count + 1
    page.locator("#objects button").last.focus()
    page.keyboard.press("Delete")
    assert page.locator("#objects button").count() == count
    page.fill("#prompt", "caption en")
    page.keyboard.press("Enter")
    assert said(page).endswith("cross")
    page.focus("#tokens button")
    page.keyboard.press("Tab")
    assert page.locator("#tokens [aria-pressed=true]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tokens [aria-pressed=true]").count() == 0


def test_what_is_covered_makes_the_answer_less_likely(page):
    page.click("#cover")
    page.focus("#patches")
    page.keyboard.press(" ")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        page.keyboard.press(" ")
    said(page)
    assert page.inner_text("#more").startswith("With the cover on, this answer is ")
    assert page.locator("#tokens .compared").count() and page.is_visible("#key")
    page.click("#uncover")
    page.click("#cover")
    said(page)
    assert "tokens in" in page.inner_text("#more") and page.is_hidden("#key")


def test_mistakes_are_said_in_a_line(page):
    def ask(prompt):
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        return said(page)
    assert ask(" ") == "Type a prompt: “caption en”, for example."
    assert "leave out <image>" in ask("<image> caption en")
    assert "tokens too long" in ask("caption " * 400)
    page.fill("#seed", "-1")
    page.press("#seed", "Enter")
    assert page.inner_text("#note").startswith("A seed is a whole number")


def test_picture_of_ones_own(page):
    page.click("[data-task=detect]")
    page.set_input_files("#file", ROOT/"paligemma_nb"/"sample.png")
    page.wait_for_selector("#note:has-text('photograph')")
    assert said(page) and page.input_value("#prompt") == "caption en"
    assert page.locator("#objects button").count() == 0
    page.click("#new")
    assert said(page) and page.locator("#objects button").count()


def test_nothing_comes_from_another_host(page, site):
    assert page.asked and all(url.startswith((site[1], "data:")) for url in page.asked)


PHONE = dict(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)


@pytest.fixture(scope="module")
def phone(browser, site):
    page = open_page(browser, site[1], color_scheme="dark", **PHONE)
    said(page)
    yield page
    assert page.mistakes == []
    page.context.close()


def test_phone_shows_it_without_scrolling_sideways(phone):
    phone.tap("#tokens li:nth-child(1)")
    assert phone.locator("#probs div").count() == 5
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_page_works_offline_once_loaded(phone):
    phone.wait_for_function("navigator.serviceWorker.controller")
    phone.context.set_offline(True)
    phone.reload()
    assert said(phone)


LESSON = """<!doctype html>
<meta name="viewport" content="width=device-width"><link rel="icon" href="scene/icon.svg">
<body class="quarto-dark">
<figure><p><a href="scene/index.html"><img src="scene/icon.svg" alt="The scene"></a></p>
<figcaption>The scene</figcaption></figure>
<p>It has <a href="scene/index.html">a page</a>.</p>
<script type="module" src="scene/embed.js"></script>
"""


def test_link_of_another_page_becomes_the_live_scene(browser, site):
    "Once it is asked for, on a phone, light or dark as that page is"
    (site[0].parent/"lesson.html").write_text(LESSON)
    page = open_page(browser, site[1].replace("scene/", "lesson.html"), **PHONE)
    page.wait_for_selector("button")
    total = sum(path.stat().st_size for path in site[0].rglob("*") if path.is_file())
    assert f"loads {total / 1e6:.0f} MB" in page.inner_text("button")
    assert not any("onnx" in url or "wasm" in url for url in page.asked)
    page.tap("button")
    frame = page.frame_locator("iframe[title='The scene']")
    frame.locator("#talk[aria-busy=false]").wait_for()
    assert page.locator("a, button, figure").count() == 1  # the link in the sentence
    width, height = (frame.locator("html").evaluate(f"e => e.scroll{side}")
                     for side in ("Width", "Height"))
    box = page.locator("iframe").bounding_box()
    assert width <= box["width"] and abs(box["height"] - height) <= 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert frame.locator("header").is_hidden() and frame.locator("#cover").is_hidden()
    assert frame.locator("#open").get_attribute("href") == "index.html"
    for theme, media in (("dark", "all"), ("light", "not all")):
        page.evaluate("theme => { document.body.className = `quarto-${theme}` }", theme)
        frame.locator(f"#dark[media='{media}']").wait_for(state="attached")
    assert page.mistakes == []
    page.context.close()
