"""The code in the documents runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("decoders", "embedding", "engine", "finetuning", "scenes")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them in."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    text = (ROOT / name).read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
        exec(compile(code, f"<block {number} of {name}>", "exec"), names)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in ROOT.glob("docs/*.md")]])
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name} links to {target}"
