"""What C and C++ programs get: sjd2.hpp, find_package(sjd2), `sjd2 config`, and all of it inside the wheel."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_engine.cli import app
from sjd2_engine.commands.config import library_facts
from sjd2_engine.errors import BackendError
from sjd2_kernels import build

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "cpp"
SEEDS = [17, 2**40 + 5, 0]
SPECS = ("ar", "jacobi", "sjd", "coupled", "coupled:maximal", "sjd2", "sjd2:ratio", "sjd2:paper")

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Toy:
    """The model of examples/cpp/decode.cpp."""

    vocab, mask = 16, 2**32 - 1
    layout = TokenLayout.raster(4, 4, image_vocab=16)
    embedding = torch.tensor([[row + 1.0, row * 7 % 16 / 4.0] for row in range(17)])

    def __init__(self, prompt: int) -> None:
        self.prompt, self.caches = prompt, [[] for _ in SEEDS]

    def mix(self, state: int, symbol: int) -> int:
        state = ((state ^ symbol) * 2654435761 + 0x9E3779B9) & self.mask
        return state ^ (state >> 15)

    def row(self, cache: list[int], length: int, values: list[float], levels: list[int]) -> Tensor:
        del cache[length:]
        state, logits = cache[-1] if cache else self.prompt, []
        for value, level in zip(values, levels, strict=True):
            clean = level < 0
            symbol = int(value) if clean else int(torch.tensor(value * 8.0).floor()) + 10000 * (level + 1)
            state = self.mix(state, symbol & self.mask)
            cache.append(state)
            logits.append([(self.mix(state, token) >> 27) / 8.0 for token in range(self.vocab)])
        return torch.tensor(logits)

    def __call__(self, window: JacobiWindow, embeds: Tensor, levels: Tensor) -> Tensor:
        rows = zip(self.caches, window.lengths.tolist(), embeds[..., 0].tolist(), levels.tolist(), strict=True)
        return torch.stack([self.row(*row) for row in rows])


def python_lines(spec: str, slots: int) -> list[list[int]]:
    """Steps and tokens of every picture, as JacobiWindow has them."""
    decoder, _, option = spec.partition(":")
    options: dict[str, Any] = {}
    if option:
        options = {"coupling": option} if decoder == "coupled" else {"verification": option}
    config = DecodeConfig(
        decoder=decoder, window=slots, guidance_scale=1.5, temperature=0.9, top_k=12, repeat_distance=5, **options
    )
    starts = torch.tensor([[100.0 + row, 0.0] for row in range(len(SEEDS))])
    window = JacobiWindow(config, Toy.layout, Toy.embedding, starts, seeds=SEEDS)
    models = Toy(1), Toy(2)
    while not window.done:
        inputs = window.inputs()
        assert inputs.embeds is not None
        window.step(torch.stack([model(window, inputs.embeds, inputs.levels) for model in models]))
    return [[steps, *tokens] for steps, tokens in zip(window.steps.tolist(), window.tokens.tolist(), strict=True)]


def lines(program: Path, spec: str, slots: int, seeds: Sequence[int] = SEEDS) -> list[list[int]]:
    return [list(map(int, line.split())) for line in run(program, spec, str(slots), *map(str, seeds)).splitlines()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built package as a wheel lays it out, in another place: nothing in it may name the folder it came from."""
    prefix = tmp_path_factory.mktemp("site packages") / "sjd2_kernels"
    for name in (*build.SHARED, build.LIBRARY, build.FACTS):
        source = build.PACKAGE / name
        if source.is_dir():
            shutil.copytree(source, prefix / name)
        else:
            shutil.copy2(source, prefix / name)
    return prefix


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with every warning an error, and sanitizers around the header's own memory."""
    program, facts = tmp_path_factory.mktemp("cpp") / "decode", library_facts()
    flags = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    flags += ["-fsanitize=address,undefined", *shlex.split(facts["include"])]
    command = [*(build.find_compiler() or ()), *flags, str(EXAMPLE / "decode.cpp"), *shlex.split(facts["libs"])]
    try:
        build.run_compiler([*command, "-o", str(program)])
    except build.BuildError as error:
        if "sanitize" in str(error) or "asan" in str(error):
            pytest.skip(f"the compiler has no sanitizers: {error}")
        raise
    return program


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("slots", [2, 7])
def test_the_class_writes_the_tokens_of_the_window(sanitized: Path, spec: str, slots: int) -> None:
    assert lines(sanitized, spec, slots) == python_lines(spec, slots)


def test_a_window_of_one_slot(sanitized: Path) -> None:
    assert lines(sanitized, "jacobi", 1) == lines(sanitized, "ar", 9) == python_lines("jacobi", 1)


def test_errors_are_exceptions_that_say_what_is_wrong(sanitized: Path) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sanitized, *arguments], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr.strip()

    assert said("jacobi", "0", "1") == (1, "sjd2::Window: window is not in 1 ... 4096")
    assert said("beam", "4", "1") == (1, "unknown decoder beam")
    assert said("jacobi", "4")[0] == 2


@needs_cmake
def test_find_package_from_an_installed_copy(installed: Path, tmp_path: Path) -> None:
    found = f"-Dsjd2_DIR={installed / 'cmake'}"
    run("cmake", "-S", EXAMPLE, "-B", tmp_path, found, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", tmp_path)
    assert lines(tmp_path / "decode", "sjd", 7) == python_lines("sjd", 7)


@needs_cmake
def test_find_package_by_prefix_and_version(installed: Path, tmp_path: Path) -> None:
    def configure(request: str, prefix: Path) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "CMakeLists.txt"
        script.write_text(f"cmake_minimum_required(VERSION 3.16)\nproject(p LANGUAGES CXX)\n{request}\n")
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)

    facts = 'message(STATUS "got ${sjd2_VERSION} ${sjd2_TORCH_OPS_SOURCE}")'
    done = configure(f"find_package(sjd2 1.0 REQUIRED)\n{facts}", installed)
    assert done.returncode == 0 and f"got 1.0.0 {installed / 'src' / 'torch_ops.cpp'}" in done.stdout, done.stderr
    assert configure("find_package(sjd2 2 REQUIRED)", installed).returncode != 0
    without = tmp_path / "without"
    shutil.copytree(installed, without, ignore=shutil.ignore_patterns(build.LIBRARY))
    assert "python -m sjd2_kernels.build" in configure("find_package(sjd2 REQUIRED)", without).stderr


def test_the_config_command() -> None:
    def ask(*options: str):
        return CliRunner().invoke(app, ["config", *options])

    assert ask("--prefix").stdout.strip() == str(build.PACKAGE)
    assert (Path(ask("--cmake-dir").stdout.strip()) / "sjd2Config.cmake").is_file()
    both = ask("--include", "--libs").stdout.splitlines()
    assert both == [f"-I{build.PACKAGE / 'include'}", library_facts()["libs"]] and "-lsjd2" in both[1]
    nothing = ask()
    assert nothing.exit_code == 2 and "--cmake-dir" in nothing.stderr


def test_without_a_library_there_is_nothing_to_link(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"python -m sjd2_kernels\.build"):
        library_facts(tmp_path)


@pytest.mark.slow  # compiles the whole core once more, as pip does
@needs_cmake
def test_the_wheel_carries_everything(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "weights", build.LIBRARY, build.FACTS)
    for name in ("csrc", "kernels", "sjd2_engine"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--no-compile", "--target", tmp_path / "site", sources)
    prefix = tmp_path / "site" / "sjd2_kernels"
    assert build.why_unusable(prefix) is None and (prefix / "csrc" / "window.cpp").is_file()
    run("cmake", "-S", EXAMPLE, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "b")
    assert lines(tmp_path / "b" / "decode", "coupled", 7) == python_lines("coupled", 7)
