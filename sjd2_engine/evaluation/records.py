"""JSON lines that grow one record at a time and survive being killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replace_file


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a last line cut short by a kill is dropped from the file."""
    if not path.exists():
        return []
    # Bytes, and not splitlines(): a cut may go through a character, and strings may hold Unicode's line separators.
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(
                    f"line {number} of '{path}' is damaged ({error}); remove it or choose another --out"
                ) from error
            replace_file(path, b"".join(kept + b"\n" for kept in lines[:-1]))
            return records
    if lines and not path.read_bytes().endswith(b"\n"):
        # Killed between the record and its end of line: the next one must not continue it.
        replace_file(path, b"".join(kept + b"\n" for kept in lines))
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a record and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
