"""Packages only: everything else about the distribution stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ has no __init__.py, so that no top-level package called `kernels` appears.
    packages=[*find_packages(include=["sjd2_engine", "sjd2_engine.*"]), *find_packages("kernels")],
    package_dir={"sjd2_kernels": "kernels/sjd2_kernels"},
    include_package_data=False,
    package_data={
        "sjd2_engine": [f"weights/**/*.{ending}" for ending in ("safetensors", "json", "txt")],
    },
    zip_safe=False,
)
