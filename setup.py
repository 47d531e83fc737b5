"""Installs aligned_mllm from settings.ini, so that nbdev and pip read the same facts."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {name: settings[f"{name}_requirements"].split() for name in ("data", "handcrafted")}
apart = {"lmms": settings["lmms_requirements"].split()}  # about 60 packages: not among those of dev

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    options={"editable_wheel": {"mode": "compat"}},  # found also from the folder that holds the clone
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["aligned_mllm", "aligned_mllm.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={**extras, **apart, "dev": [*settings["dev_requirements"].split(), *sum(extras.values(), [])]},
    entry_points={
        "nbdev": [f"aligned_mllm={settings['lib_path']}._modidx:d"],
        "console_scripts": ["aligned-mllm=aligned_mllm.cli:main"],
        "lmms_eval.models": ["aligned_mllm=aligned_mllm.evals.lmms_adapter:lmms_manifest"],
    },
)
