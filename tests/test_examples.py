"""Everything in examples/ runs as it stands."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sjd2_engine import Engine
from sjd2_kernels import build, reference

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PROMPT = "a red circle left of a blue square"
SCRIPTS = ["plain_module.py", "transformers_model.py", "numpy_window.py"]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment or None, cwd=ROOT
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_find_their_tokens_equal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each compares with an autoregressive loop of its own, and fails where a token differs."""
    if name == "transformers_model.py":
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [name])
    module_of(EXAMPLES / name).main()
    printed = capsys.readouterr().out
    assert "equal" in printed and "forward passes" in printed


# -------------------------------------------------------------------- AOTInductor


@pytest.fixture(scope="module")
def aoti() -> ModuleType:
    return module_of(EXAMPLES / "aoti" / "export.py")


def loop(aoti: ModuleType, programs: dict[str, Callable[..., Any]], engine: Engine, seeds: Tensor) -> list[Tensor]:
    """main.cpp in Python: the state after the decode."""
    inputs, keys, values, *state = programs["begin"](seeds)
    lengths, done = (state[aoti.STATE.index(name)] for name in ("kv_lengths", "done"))
    prompts = [engine.model.encode_prompt(text) for text in (PROMPT, "") for _ in seeds]
    for row, ids in enumerate(prompts[: len(lengths)]):
        assert len(ids) - 1 <= inputs.shape[1]
        chunk = torch.zeros_like(inputs)
        chunk[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        where = torch.full_like(lengths, keys.shape[2] - inputs.shape[1])  # other rows: out of the way
        where[row] = 0
        programs["decoder"](chunk, where, keys, values)
        lengths[row] = len(ids) - 1
    while not bool(done.all()):
        logits = programs["decoder"](inputs, lengths, keys, values)
        inputs = programs["step"](logits, seeds, *state)
    return state


@pytest.mark.parametrize("decoder, ops", [("jacobi", "sjd2"), ("sjd", "sjd2"), ("coupled", "reference")])
def test_exported_programs_decode_the_engines_tokens(aoti: ModuleType, base: Engine, decoder: str, ops: str) -> None:
    """Before any compiler: the graphs themselves, two pictures at once, on the C core and on the reference."""
    model = aoti.load_model("scenes", torch.device("cpu"), torch.float32, aoti.LoadOptions())
    config = base.config_for(decoder, seed=3)
    chosen = torch.ops.sjd2 if ops == "sjd2" else reference
    with torch.no_grad():
        programs = {name: program.module() for name, program in aoti.export(model, config, chosen, 2).items()}
        state = loop(aoti, programs, base, torch.tensor([3, 4]))
        tokens = state[aoti.STATE.index("tokens")]
        pixels = programs["pixels"](tokens)
    wanted = base.generate([PROMPT] * 2, decoder=decoder, seed=3)
    assert torch.equal(base.model.layout.image_tokens(tokens[:, : len(base.model.layout)]), wanted.tokens)
    assert state[aoti.STATE.index("steps")].tolist() == wanted.stats.forward_passes
    for drawn, image in zip(pixels, wanted.images, strict=True):
        assert image is not None
        assert int((drawn.int() - torch.from_numpy(np.array(image)).int()).abs().max()) <= 1


def test_noisy_decoders_are_refused(aoti: ModuleType, tuned: Engine) -> None:
    model = aoti.load_model("scenes-sjd2", torch.device("cpu"), torch.float32, aoti.LoadOptions())
    with pytest.raises(SystemExit, match="take another decoder"):
        aoti.modules(model, tuned.config_for("sjd2"), torch.ops.sjd2, 1)


def compiled(folder: Path, *options: str) -> Path:
    """Packages and the program that runs them."""
    run(sys.executable, EXAMPLES / "aoti" / "export.py", "--out", folder, *options, **python_environment())
    paths = [f"-Dsjd2_DIR={build.PACKAGE / 'cmake'}", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    run("cmake", "-S", EXAMPLES / "aoti", "-B", folder / "build", *paths)
    run("cmake", "--build", folder / "build")
    return folder / "build" / "decode"


def python_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


needs_build = pytest.mark.skipif(
    shutil.which("cmake") is None or build.find_compiler() is None, reason="no cmake, or no C++ compiler"
)


@pytest.mark.slow  # Inductor and a C++ compiler: about a minute of one core
@needs_build
def test_a_program_without_python_draws_the_engines_picture(base: Engine, tmp_path: Path) -> None:
    program = compiled(tmp_path, "--decoder", "jacobi")
    if shutil.which("ldd"):
        assert "libpython" not in run("ldd", program)
    # Nothing of the environment either: no PATH, no PYTHONPATH.
    printed = run(program, tmp_path, PROMPT, "5", tmp_path / "picture.ppm", OMP_NUM_THREADS="1")
    steps, *tokens = map(int, printed.split())
    wanted = base.generate(PROMPT, decoder="jacobi", seed=5)
    assert torch.equal(base.model.layout.image_tokens(torch.tensor([tokens])), wanted.tokens)
    assert [steps] == wanted.stats.forward_passes and wanted.images[0] is not None
    drawn, image = np.asarray(Image.open(tmp_path / "picture.ppm")), np.asarray(wanted.images[0])
    assert np.abs(drawn.astype(int) - image).max() <= 1
    wrong = subprocess.run([program, tmp_path, "a dragon", "5"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "does not know the word dragon" in wrong.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_build
def test_the_cuda_packages_draw_the_same_picture(base: Engine, tmp_path: Path) -> None:
    printed = run(compiled(tmp_path, "--device", "cuda"), tmp_path, PROMPT, "5", **python_environment())
    tokens = torch.tensor([list(map(int, printed.split()))[1:]])
    wanted = Engine.from_pretrained("scenes", device="cuda", dtype="float32").generate(PROMPT, decoder="jacobi", seed=5)
    agree = (base.model.layout.image_tokens(tokens) == wanted.tokens).float().mean()
    assert float(agree) > 0.9, "float32 products may round otherwise on a GPU, but only near-ties may flip"


# -------------------------------------------------------------------- the notebook


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    said = "".join(output.get("text", "") for output in outputs)
    assert said.count("the tokens of ar") == 3 and "the same tokens, in 60 passes" in said
