"""Build the page "Draw a scene, ask the model": python .ci/scene.py [FOLDER]

Adds nbs/scene/built to the page's sources: the shipped model as ONNX, WebAssembly and two
libraries from npm, the numbers of the scenes. With FOLDER, the whole page goes there instead.
Any web server can serve it: python -m http.server --directory nbs, then open /scene/."""
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from paligemma_nb import load_model, scenes
from paligemma_nb.export import write_onnx
from paligemma_nb.segmentation import load_mask_vae

SOURCE = Path(__file__).resolve().parents[1]/"nbs"/"scene"
FROM_LOCK = "package.json", "package-lock.json"
LEFT_OUT = {"built", "README.md", *FROM_LOCK}  # of the folder that is served
FROM_NPM = ["onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
            "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
            "@huggingface/tokenizers/dist/tokenizers.min.mjs"]
GRAPHS = "embed_tokens", "vision_encoder", "decoder_model_merged", "mask_decoder"


def copy_libraries(built: Path, tmp: Path) -> None:
    "What the page takes from npm, in the versions of the lock file"
    npm = shutil.which("npm")
    if not npm: sys.exit("npm is missing: install Node.js, 18 or newer")
    for name in FROM_LOCK: shutil.copy(SOURCE/name, tmp)
    command = [npm, "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund",
               "--fetch-timeout=60000", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
    if done.returncode: sys.exit(f"npm could not install its packages:\n{done.stderr}")
    for file in FROM_NPM: shutil.copy(tmp/"node_modules"/file, built)


def write_model(built: Path, tmp: Path) -> int: # its number of parameters
    "The shipped model, its large tensors in float16"
    model, processor = load_model()
    write_onnx(model, processor, tmp, ["float16"], load_mask_vae(), attention=True)
    for graph in GRAPHS: shutil.copy(tmp/"onnx"/f"{graph}_fp16.onnx", built/f"{graph}.onnx")
    for name in ("config.json", "tokenizer.json"): shutil.copy(tmp/name, built)
    return sum(p.numel() for p in model.parameters())


def write_world(built: Path, parameters: int) -> None:
    "The numbers that scenes are drawn with, and the sides of a picture"
    polygons = {name: corners.tolist() for name, corners in scenes.POLYGONS.items()}
    vision = json.loads((built/"config.json").read_text())["vision_config"]
    world = dict(SHAPES=scenes.SHAPES, COLORS=scenes.COLORS, POLYGONS=polygons,
                 GAUSSIAN=scenes._GAUSSIAN.tolist(), SIZE=vision["image_size"],
                 PATCHES=vision["image_size"] // vision["patch_size"],
                 PARAMETERS=parameters)
    lines = [f"export const {name} = {json.dumps(value)}" for name, value in world.items()]
    (built/"world.js").write_text("\n".join([*lines, ""]))


def write_list(page: Path) -> None:
    "Every file with its size, and a version that changes with any of them"
    files = {p.relative_to(page).as_posix(): p.read_bytes() for p in sorted(page.rglob("*"))
             if p.is_file() and p.name not in LEFT_OUT}
    version = hashlib.sha256(b"".join(map(bytes.__add__, map(str.encode, files),
                                          files.values()))).hexdigest()[:12]
    build = dict(version=f"paligemma-scene-{version}",
                 files={name: len(data) for name, data in files.items()})
    (page/"built"/"files.js").write_text(f"self.BUILD = {json.dumps(build)}\n")


def main(page: Path = SOURCE) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        built, npm, model = (Path(tmp)/name for name in ("built", "npm", "model"))
        for folder in built, npm: folder.mkdir()
        copy_libraries(built, npm)
        write_world(built, write_model(built, model))
        if page != SOURCE:
            shutil.copytree(SOURCE, page, ignore=lambda *_: LEFT_OUT, dirs_exist_ok=True)
        shutil.rmtree(page/"built", ignore_errors=True)
        shutil.move(built, page/"built")  # only now: a failure leaves the page as it was
    write_list(page)
    size = sum(p.stat().st_size for p in page.rglob("*") if p.is_file())
    print(f"{page}: {size / 1e6:.1f} MB")


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
