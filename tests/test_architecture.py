"""The arrows between the files: each imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "sjd2_engine"
KERNELS = ROOT / "kernels" / "sjd2_kernels"

FLOORS = {
    1: {"config", "schedule", "layout", "errors", "files"},
    2: {"transformer", "fused", "attention", "cache", "linear", "quantize", "models"},
    3: {"window", "decoders", "drafts", "given", "graphs", "tuning"},
    4: {"engine", "pixels", "session", "slots", "memory", "results"},
    5: {"cli", "commands", "distributed", "serve", "demo", "generation", "doctor", "hf"},
}
BESIDE = {"training", "evaluation", "scenes"}  # use floors 1 to 4 and each other, are used only by the faces
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# Floors 2 and 3 meet in the engine only.
STRANGERS = {(a, b) for a in FLOORS[3] for b in FLOORS[2]}


def room_of(path: Path) -> str:
    """The first name under the package: a module, or the folder it lies in."""
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def _names(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level == 0:
        # `from sjd2_engine import Engine` hides where Engine lies: count it as its own name.
        if node.module == "sjd2_engine":
            return [f"sjd2_engine.{alias.name}" for alias in node.names]
        return [node.module or ""]
    package = path.relative_to(ENGINE.parent).parts[: -node.level]
    if not package:
        return []
    base = ".".join([*package, *([node.module] if node.module else [])])
    # `from . import a, b` names modules; `from .a import f` names things inside one.
    return [base] if node.module else [f"{base}.{alias.name}" for alias in node.names]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in _names(node, path):
                yield node.lineno, name


def engine_files() -> list[Path]:
    # The package's own __init__ is the sign on the door: it shows the public names of every floor.
    return [path for path in sorted(ENGINE.rglob("*.py")) if path != ENGINE / "__init__.py"]


def allowed(user: str, used: str) -> bool:
    if used == "__version__" or user == used:
        return True
    if used not in FLOOR_OF and used not in BESIDE:
        return FLOOR_OF.get(user) == 5  # a public name of the package, from nowhere in particular
    if user in BESIDE:
        return used in BESIDE or FLOOR_OF[used] <= 4
    if used in BESIDE:
        return FLOOR_OF[user] == 5
    if (user, used) in STRANGERS:
        return False
    # Rooms of one floor may use each other: a family file uses the transformer, a face another face.
    return FLOOR_OF[used] <= FLOOR_OF[user]


@pytest.mark.parametrize("path", engine_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    user = room_of(path)
    assert user in FLOOR_OF or user in BESIDE, f"{path.name} has no floor yet: give it one in FLOORS"
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "sjd2_engine" and len(parts) > 1 and not allowed(user, parts[1]):
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_kernels_never_import_the_engine() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "sjd2_engine" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sjd2_engine")
    ]
    assert files and not wrong, wrong


def test_no_top_level_package_called_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_rules_themselves() -> None:
    assert not allowed("window", "models") and not allowed("decoders", "transformer")
    assert not allowed("models", "decoders") and not allowed("transformer", "window")
    assert not allowed("config", "window") and not allowed("engine", "cli")
    assert not allowed("engine", "scenes") and not allowed("training", "cli")
    assert allowed("cli", "evaluation") and allowed("engine", "decoders") and allowed("engine", "models")
    assert not allowed("window", "Engine")
    assert allowed("evaluation", "scenes") and allowed("window", "config")
