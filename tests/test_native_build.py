"""How the C core is built, what a plain C program makes of it, and what sanitizers say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_kernels import build, dispatch

SOURCES = build.source_directory()
C_COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SANITIZED = (*build.STRICT, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None or SOURCES is None, reason="no C++ compiler, no sources"
)
needs_c = pytest.mark.skipif(C_COMPILER is None or SOURCES is None, reason="no C compiler, or no sources")


def sources() -> Path:
    assert SOURCES is not None
    return SOURCES


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


# -------------------------------------------------------------------- the build


@needs_compiler
def test_the_build_says_what_it_built() -> None:
    if build.why_unusable() is not None:
        build.build()
    facts = json.loads((build.PACKAGE / build.FACTS).read_text())
    assert facts["sources"] == build.source_hash(sources()) and facts["system"] == sys.platform
    assert facts["compiler"] and "-O3" in facts["flags"]


def placed(folder: Path, **changed: str) -> Path:
    """A folder with the library's files as a build leaves them, but for `changed` facts."""
    assert SOURCES is not None
    facts = {"system": sys.platform, "machine": build.platform.machine(), "sources": build.source_hash(SOURCES)}
    (folder / build.LIBRARY).write_bytes(b"")
    (folder / build.FACTS).write_text(json.dumps(facts | changed))
    return folder


def test_a_library_that_does_not_fit_is_not_used(tmp_path: Path) -> None:
    assert f"not built: `{build.COMMAND}`" in (build.why_unusable(tmp_path) or "")
    assert build.why_unusable(placed(tmp_path)) is None
    assert "other sources" in (build.why_unusable(placed(tmp_path, sources="0")) or "")
    assert "was built for" in (build.why_unusable(placed(tmp_path, machine="pdp11")) or "")
    (tmp_path / build.FACTS).write_text("{")
    assert "unreadable" in (build.why_unusable(tmp_path) or "")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_compiler() is None
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found: install"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(sources(), tmp_path / "csrc")
    for unit in build.UNITS:
        (tmp_path / "csrc" / unit).write_text("no C++\n" if unit == "cpu.cpp" else "")
    with pytest.raises(build.BuildError, match=r"cpu\.cpp:1:1"):
        build.build(tmp_path / "out", tmp_path / "csrc")
    assert not (tmp_path / "out").exists()


def test_the_reference_takes_over_and_the_reason_helps(tmp_path: Path) -> None:
    """In a process of its own, from a copy of the package that has no library."""
    shutil.copytree(build.PACKAGE, tmp_path / "sjd2_kernels", ignore=shutil.ignore_patterns("libsjd2*", "__pycache__"))
    script = (
        "import logging, torch; logging.basicConfig(level=logging.INFO); from sjd2_kernels import dispatch, ops\n"
        "for _ in range(2): torch.ops.sjd2.embed_window(torch.tensor([[0]]), torch.tensor([[-1]]).int(), "
        "torch.ones(1, 2), torch.ones(1, 2), None, None, None)\n"
        "print(*dispatch.choice('verify', 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.startswith("reference c cannot be loaded: the C core is not built"), done.stderr
    assert done.stderr.count(f"`{build.COMMAND}` builds it") == 1


def test_the_ops_run_in_c_by_default() -> None:
    if (reason := build.why_unusable()) is not None:
        pytest.skip(reason)
    for op in dispatch.C:
        assert dispatch.choice(op, "cpu") == ("c", "the first choice on cpu")


# -------------------------------------------------------------------- the header


@needs_c
@pytest.mark.parametrize("standard", ["-std=c99", "-xc++ -std=c++11"])
def test_the_header_is_plain_c(standard: str, tmp_path: Path) -> None:
    (tmp_path / "only.c").write_text('#include "sjd2.h"\nint main(void) { return sjd2_version() != SJD2_VERSION; }\n')
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", sources(), "-c", tmp_path / "only.c"]
    run(C_COMPILER or "", *standard.split(), *flags, "-o", tmp_path / "only.o")


def test_python_knows_this_version_of_the_header() -> None:
    native: Any = pytest.importorskip("sjd2_kernels.native", reason=build.why_unusable() or "", exc_type=ImportError)
    text = (sources() / "sjd2.h").read_text()
    assert f"#define SJD2_VERSION {native.VERSION} " in text
    for name, layout in native.LAYOUTS.items():
        body = re.search(rf"typedef struct sjd2_{name}_params \{{\n    size_t size;\n(.*?)\}}", text, re.S)
        assert body is not None
        code = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
        fields = [field for line in code.split(";") for field in line.split(",") if field.strip()]
        kinds = "".join("P" if "*" in f else "d" if "double" in f else "q" for f in fields_with_types(fields))
        assert kinds == layout, name


def fields_with_types(fields: Sequence[str]) -> list[str]:
    """`double a`, `b` → `double a`, `double b`: a declarator takes the type of the one before it."""
    typed: list[str] = []
    for field in fields:
        words = field.split()
        typed.append(field if len(words) > 1 else f"{typed[-1].split()[0]} {field}")
    return typed


def test_calls_that_are_refused() -> None:
    native: Any = pytest.importorskip("sjd2_kernels.native", reason=build.why_unusable() or "", exc_type=ImportError)
    seeds, positions, out = torch.zeros(1).long(), torch.zeros(1).long(), torch.full((1,), 7.0)
    good = [1, 1, 1, 0, 0, 0, 1, seeds.data_ptr(), positions.data_ptr(), out.data_ptr()]
    call = native._call["random"]
    for index, value, status in ((0, -1, 3), (2, 2**40, 3), (3, 3, 4), (5, 9, 4), (6, -1, 3), (7, 0, 2), (9, 0, 2)):
        assert call.status(*good[:index], value, *good[index + 1 :]) == status
    assert call._call(call._struct.pack(call._struct.size + 8, *good)) == 1 and call._call(None) == 2
    assert out.item() == 7.0
    assert call.status(*good) == 0 and 0.0 <= out.item() < 1.0
    messages = {native._library.sjd2_status_string(status).decode() for status in range(9)}
    assert len(messages) == 8 and "unknown status" in messages


# -------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core with AddressSanitizer and UBSan as a shared library."""
    if build.find_compiler() is None or SOURCES is None:
        pytest.skip("no C++ compiler, or no C sources")
    library = tmp_path_factory.mktemp("sanitized") / "libsjd2.so"
    units = [SOURCES / unit for unit in build.UNITS]
    flags = [*SANITIZED, "-fPIC", "-shared", "-fvisibility=hidden", "-DSJD2_MAX_WIDTH=128"]
    try:
        build.run_compiler(build.compile_command(library, units, flags, SOURCES))
    except build.BuildError as error:
        if "sanitize" in str(error) or "asan" in str(error):
            pytest.skip(f"the compiler has no sanitizers: {error}")
        raise
    return library


def linked(library: Path) -> list[str | Path]:
    return [library, f"-Wl,-rpath,{library.parent}"]


def test_fuzzing_finds_nothing(sanitized: Path) -> None:
    program = sanitized.parent / "fuzz"
    units = [sources() / "fuzz" / name for name in ("fuzz_ops.cpp", "driver.cpp")]
    command = build.compile_command(program, units, [*SANITIZED, "-Wall", "-Wextra", "-Werror"], sources())
    build.run_compiler([*command, *map(str, linked(sanitized))])
    outcomes = [list(map(int, line.split())) for line in run(program, "15000", "0").splitlines()]
    assert len(outcomes) == 7
    for row in outcomes:  # every op was served often, and refused for every common reason
        assert row[0] > 500 and all(row[1:4]), outcomes
    assert sum(row[5] for row in outcomes) > 50 and sum(row[6] for row in outcomes) > 5


@needs_compiler
def test_accuracy_of_the_elementary_functions(tmp_path: Path) -> None:
    program = tmp_path / "accuracy"
    command = build.compile_command(program, [sources() / "fuzz" / "accuracy.cpp"], [*build.STRICT, "-O2"], sources())
    build.run_compiler(command)
    errors = {name: float(value) for name, value in (line.split() for line in run(program, "9973").splitlines())}
    assert errors["log_ulp"] < 1.0 and errors["exp_ulp"] < 1.0 and errors["exponential_ulp"] < 1.5
    assert errors["gumbel_absolute"] < 1e-6 and errors["angle_absolute"] < 1e-7
    assert errors["half_round_trip_failures"] == 0


class Toy:
    """The model of csrc/examples/toy_decode.c."""

    vocab, mask = 16, 2**32 - 1
    layout = TokenLayout.raster(4, 4, image_vocab=16)
    embedding = torch.stack((torch.arange(1.0, 18.0), torch.zeros(17)), 1)

    def mix(self, state: int, symbol: int) -> int:
        state = ((state ^ symbol) * 2654435761 + 0x9E3779B9) & self.mask
        return state ^ (state >> 15)

    def __call__(self, cache: list[int], length: int, embeds: Tensor) -> Tensor:
        state = cache[length - 1] if length else 0
        del cache[length:]
        logits = []
        for symbol in embeds[:, 0].long().tolist():
            state = self.mix(state, symbol)
            cache.append(state)
            logits.append([(self.mix(state, token) >> 27) / 8.0 for token in range(self.vocab)])
        return torch.tensor(logits)

    def decode(self, decoder: str, window: int, seeds: Sequence[int]) -> JacobiWindow:
        """The tokens that JacobiWindow writes with this model."""
        config = DecodeConfig(decoder=decoder) if decoder == "ar" else DecodeConfig(decoder=decoder, window=window)
        starts = torch.tensor([[100.0 + image, 0.0] for image in range(len(seeds))])
        state = JacobiWindow(config, self.layout, self.embedding, starts, seeds=seeds)
        caches: list[list[int]] = [[] for _ in seeds]
        while not state.done:
            embeds = state.inputs().embeds
            assert embeds is not None
            rows = zip(caches, state.lengths.tolist(), embeds)
            state.step(torch.stack([self(*row) for row in rows]))
        return state


@needs_c
@pytest.mark.parametrize(
    "decoder, window", [("ar", 1), ("jacobi", 1), ("jacobi", 7), ("sjd", 2), ("sjd", 8), ("sjd", 30)]
)
def test_the_c_program_writes_the_tokens_of_the_window(sanitized: Path, decoder: str, window: int) -> None:
    """Under sanitizers: the whole loop of a decoder with nothing but sjd2.h."""
    program, seeds = sanitized.parent / "toy_decode", [17, 2**40 + 5, 0]
    if not program.exists():
        flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-fsanitize=address,undefined"]
        example = sources() / "examples" / "toy_decode.c"
        run(C_COMPILER or "", *flags, "-I", sources(), example, *linked(sanitized), "-o", program)
    lines = run(program, decoder, str(window), *map(str, seeds)).splitlines()
    expected = Toy().decode(decoder, window, seeds)
    assert [list(map(int, line.split())) for line in lines] == [
        [steps, *tokens] for steps, tokens in zip(expected.steps.tolist(), expected.tokens.tolist())
    ]
