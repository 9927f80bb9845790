"""Packaging. Every value comes from settings.ini, the file that nbdev reads too. A wheel holds
the course as well: its notebooks, without their outputs, and the records that they read."""
import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser()
config.read(root/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
package = cfg["lib_path"]
COURSE = "index.ipynb", "nbs/*.ipynb", "nbs/data/*.json", "bench/results/**/*.json"


def without_outputs(notebook: str) -> str:
    content = json.loads(notebook)
    for cell in content["cells"]:
        if "outputs" in cell: cell |= {"outputs": [], "execution_count": None}
    return json.dumps(content, ensure_ascii=False)


class BuildWithCourse(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return  # the notebooks lie beside the package
        for path in (path for pattern in COURSE for path in root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            target = Path(self.build_lib, package, "course", path.relative_to(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(without_outputs(text) if path.suffix == ".ipynb" else text,
                              encoding="utf-8")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=[package],
    cmdclass={"build_py": BuildWithCourse},
    package_data={package: cfg["package_data"].split()},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split()
                    for name in ("train", "onnx", "ray", "serve", "course", "dev")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package} = {package}._modidx:d"],  # for links from `names` in prose
    },
)
