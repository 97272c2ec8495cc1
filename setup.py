"""Packages and the C core; everything else about the distribution stands in pyproject.toml.

The core needs a C++ compiler and nothing else. Without one the install succeeds all the same: the ops then run on
their PyTorch reference until `python -m sjd2_kernels.build` has been called.
"""

import logging
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "kernels" / "sjd2_kernels"


# The package's own build module, without the package around it (which needs torch).
core = SimpleNamespace(**runpy.run_path(str(PACKAGE / "build.py")))


class BuildWithCore(build_py):
    """Ship the C sources and the library made from them; an editable install builds it in the source tree."""

    def run(self):
        super().run()
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / "sjd2_kernels"
        if not self.editable_mode:
            for name in core.source_files():
                copy = target / "csrc" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / "csrc" / name, copy)
        try:
            core.build(target, ROOT / "csrc")
        except core.BuildError as error:
            logging.warning("the C core of sjd2_kernels is left out, its ops run in PyTorch: %s", error)


class PlatformWheel(bdist_wheel):
    """With a library inside a wheel belongs to a platform, but to no version of Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = core.find_compiler() is None

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    # kernels/ has no __init__.py, so that no top-level package called `kernels` appears.
    packages=[*find_packages(include=["sjd2_engine", "sjd2_engine.*"]), *find_packages("kernels")],
    package_dir={"sjd2_kernels": "kernels/sjd2_kernels"},
    include_package_data=False,
    package_data={
        "sjd2_engine": [
            *(f"weights/**/*.{ending}" for ending in ("safetensors", "json", "txt")),
            "evaluation/templates/*.j2",
        ],
    },
    cmdclass={"build_py": BuildWithCore, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
