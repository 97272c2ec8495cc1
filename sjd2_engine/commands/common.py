"""What several commands do: load an engine, show progress, print a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .options import pixels


def load_engine(
    model: str,
    device: str,
    dtype: str,
    image_size: str | None = None,
    allow_pickle: bool = False,
    attention: str = "auto",
    compile: bool = False,
    quantize: str | None = None,
):
    """The engine that these options ask for."""
    from ..engine import Engine

    return Engine.from_pretrained(model, device, dtype, attention, pixels(image_size), allow_pickle, compile, quantize)


def progress(label: str, unit: str) -> Callable[[Any], Any]:
    """Something that shows how far a loop over its argument has come."""
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=label, unit=unit, leave=False, dynamic_ncols=True)


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> None:
    """Print a table on stdout, wide enough for its cells where no terminal sets the width."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, header in enumerate(headers):
        made.add_column(header, justify="left" if i < left else "right", no_wrap=True)
    for cells in rows:
        made.add_row(*cells)
    console = Console()
    Console(width=console.width if console.is_terminal else 140).print(made)
