"""The race as HTML: a card per decoder, with its picture, its window and its figures."""

from __future__ import annotations

import base64
import functools
import html
import io
import math

import torch
from PIL import Image

from ..layout import TokenLayout
from .race import Frame, LaneView

TITLES = {
    "ar": ("AR", "one token per forward pass"),
    "jacobi": ("Jacobi", "guesses ahead, keeps what stays the same"),
    "sjd": ("SJD", "guesses ahead, accepts by likelihood"),
    "sjd2": ("SJD2", "guesses ahead, denoises its guesses"),
}
WIDEST = 384  # pixels of a picture on the page; downloads have all of them


def stage(layout: TokenLayout, image_size: tuple[int, int], frame: Frame) -> str:
    """The whole race at one moment."""
    rows, columns = grid(layout, image_size)
    leader = max(lane.length for lane in frame.lanes)
    slowest = max((lane.seconds for lane in frame.lanes if lane.config.decoder == "ar"), default=0.0)
    cards = "".join(_card(lane, layout, rows, columns, leader, slowest if frame.over else 0.0) for lane in frame.lanes)
    return f'<div class="race">{_clock(frame)}<div class="lanes">{cards}</div>{LEGEND}</div>'


def waiting(text: str) -> str:
    """What stands there before a race, or instead of one."""
    return f'<div class="race"><div class="curtain">{html.escape(text)}</div></div>'


def grid(layout: TokenLayout, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of image tokens in a picture of (height, width) pixels."""
    height, width = image_size
    columns = max(1, round(math.sqrt(layout.image_count * width / height)))
    return math.ceil(layout.image_count / columns), columns


def _clock(frame: Frame) -> str:
    seconds = max(lane.seconds for lane in frame.lanes)
    said = "on each decoder’s own clock"
    if frame.over:
        said += "".join(f" · {_title(lane)} drew AR’s picture, token for token" for lane in _twins(frame))
    elif frame.slow_motion >= 1.5:
        said += f" · shown {frame.slow_motion:.0f}× slower than it runs"
    return f'<div class="clock"><b>{seconds:.2f} s</b><span>{said}</span></div>'


def _twins(frame: Frame) -> list[LaneView]:
    """Lanes whose picture has the tokens of AR's."""
    pictures = {lane.config.decoder: lane.picture for lane in frame.lanes}
    plain = pictures.get("ar")
    others = [lane for lane in frame.lanes if lane.config.decoder != "ar"]
    if plain is None or plain.failure is not None:
        return []
    return [lane for lane in others if lane.picture and torch.equal(lane.picture.tokens, plain.tokens)]


def _title(lane: LaneView) -> str:
    return TITLES[lane.config.decoder][0]


def _card(lane: LaneView, layout: TokenLayout, rows: int, columns: int, leader: int, slowest: float) -> str:
    title, saying = TITLES[lane.config.decoder]
    failed = lane.picture is not None and lane.picture.failure is not None
    state = "failed" if failed else "done" if lane.picture else "leading" if 0 < lane.length == leader else ""
    badge = ""
    if failed:
        badge = '<span class="badge">failed</span>'
    elif lane.picture is not None:
        faster = f"{slowest / lane.seconds:.1f}× faster" if slowest and lane.config.decoder != "ar" else "done"
        badge = f'<span class="badge">{faster}</span>'
    picture = f'<img alt="" decoding="sync" src="{_data_url(lane.image)}">'
    share = 100 * lane.length / lane.total
    return (
        f'<article class="lane {state}" data-decoder="{lane.config.decoder}">'
        f"<header><h3>{title}</h3>{badge}<p>{saying}</p></header>"
        f'<div class="picture">{picture}{_cells(lane, layout, rows, columns)}</div>'
        f'<div class="progress"><b style="width:{share:.1f}%"></b></div>{_strip(lane)}{_figures(lane)}</article>'
    )


def _cells(lane: LaneView, layout: TokenLayout, rows: int, columns: int) -> str:
    """Over the picture: a tint where tokens are only guessed, noise levels, and a cover over what is missing."""
    places = _places(layout)
    drawn = lane.length + next((i for i, level in enumerate(lane.levels) if level >= 0), len(lane.levels))
    parts = []
    first = next((place for place in places[drawn:] if place >= 0), None)
    if first is not None:
        row, column = divmod(first, columns)
        outline = f"M{column} {row}H{columns}V{row + 1}H{column}zM0 {row + 1}H{columns}V{rows}H0z"
        parts.append(f'<path class="missing" d="{outline}"/>')
    for place, level in zip(places[lane.length :], lane.levels):
        if place >= 0:
            row, column = divmod(place, columns)
            shape = f'x="{column + 0.06:.2f}" y="{row + 0.06:.2f}" width=".88" height=".88" rx=".16"'
            parts.append(f'<rect class="{"guess" if level < 0 else "noisy"}" {shape} fill="{_colour(lane, level)}"/>')
    return f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{"".join(parts)}</svg>' if parts else ""


@functools.lru_cache(maxsize=4)
def _places(layout: TokenLayout) -> tuple[int, ...]:
    """Which cell of the picture each position is; −1 for structure tokens."""
    places = [-1] * len(layout)
    for cell, position in enumerate(layout.image_positions):
        places[position] = cell
    return tuple(places)


def _strip(lane: LaneView) -> str:
    """The window: a bar per draft, as high as its noise."""
    bars = "".join(
        f'<i style="height:{14 + 86 * _noise(lane, level):.0f}%;background:{_colour(lane, level)}"></i>'
        for level in lane.levels
    )
    won = f"+{lane.accepted}" if lane.accepted and lane.picture is None else ""
    text = "" if bars else f"<em>{'no window' if lane.config.decoder == 'ar' else ''}</em>"
    return f'<div class="strip"><strong>{won}</strong><div>{bars}{text}</div></div>'


def _noise(lane: LaneView, level: int) -> float:
    """0 for a token, 1 for pure noise."""
    return (level + 1) / lane.config.denoise_levels


def _colour(lane: LaneView, level: int) -> str:
    if level < 0:
        return "#7dd3fc"
    # From blue, nearly a token, over violet to rose, pure noise.
    return f"hsl({225 + 115 * _noise(lane, level):.0f} 85% 68%)"


def _figures(lane: LaneView) -> str:
    rate = lane.length / lane.forward_passes if lane.forward_passes else 0.0
    figures = (
        (f"{lane.forward_passes}", "passes"),
        (f"{lane.seconds:.2f}", "seconds"),
        (f"{rate:.1f}", "tokens/pass"),
    )
    return "<dl>" + "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for value, name in figures) + "</dl>"


def _data_url(image: Image.Image) -> str:
    """A picture inside the page: small, as it is replaced ten times a second."""
    if max(image.size) > WIDEST:
        image = image.copy()
        image.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


LEGEND = (
    '<div class="legend"><span><i style="background:#7dd3fc"></i>guessed token</span>'
    '<span><i class="noise"></i>noisy guess, from nearly a token to pure noise</span>'
    '<span><i class="open"></i>not there yet</span>'
    "<span><strong>+5</strong>tokens that the last pass accepted</span></div>"
)
