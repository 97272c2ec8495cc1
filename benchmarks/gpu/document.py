"""How a benchmark hands its JSON document over: the last line of stdout, and a file that is never half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sjd2_engine.files import replace_file


def dump(document: dict[str, Any], out: Path) -> None:
    """Replace the file `out`."""
    replace_file(out, (json.dumps(document) + "\n").encode())


def write(document: dict[str, Any], out: Path | None = None) -> None:
    """Print the document, and put it into `out` if that is given."""
    if out:
        dump(document, out)
    print(json.dumps(document), flush=True)
