"""Checkpoints: files checked before anything is allocated, then read parameter by parameter into their place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import CheckpointError
from ..transformer import Transformer, TransformerConfig

PICKLES = ("pytorch_model*.bin", "model*.bin", "model*.pt", "model*.pth")  # not the optimisers beside them
SHOW_PROGRESS_ABOVE = 2**30  # bytes
ROWS_AT_ONCE = 8192  # of a reordered table: bounds the temporary copy
ORIGIN = "origin"  # attribute of a loaded core
# Not weights: some exporters store the rotary frequencies.
NEVER_WEIGHTS = ("rotary_emb.inv_freq", "num_batches_tracked")

Module = TypeVar("Module", bound=nn.Module)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; CheckpointError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class Rows:
    """A tensor of a checkpoint, or some of its rows in the order of `rows` (int64; None = all as they are)."""

    name: str
    rows: Tensor | None = None


# What a parameter is filled with, one below the other: stored rows, or a tensor that the family computed.
Sources = Mapping[str, Sequence[Rows | Tensor]]


class Checkpoint:
    """The named tensors of a folder (one or several safetensors files) or of one file; nothing is read up front.

    Every file is opened and compared with the index at once, so that a missing, truncated or foreign one is found
    before memory is taken. Pickled files can run code when they are loaded: they are refused unless `allow_pickle`,
    and even then only tensors are unpickled. Raises CheckpointError.
    """

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self.path = path
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in self._find(allow_pickle) if path.is_dir() else [path]:
            self._files[file] = _open(file, allow_pickle)
            # Not a dict: safe_open has keys() only.
            self._file_of.update(dict.fromkeys(self._files[file].keys(), file))
        index = path / "model.safetensors.index.json"
        if path.is_dir() and index.is_file() and index.with_name("model.safetensors") not in self._files:
            self._compare_with(index)

    def _find(self, allow_pickle: bool) -> list[Path]:
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.path / missing[0]} is missing: {index.name} names {len(names)} files and {len(missing)} "
                    "of them are not there; fetch the checkpoint again"
                )
            return [self.path / name for name in names]
        pickles = sorted(file for pattern in PICKLES for file in self.path.glob(pattern))
        if not pickles:
            raise CheckpointError(f"{single} is missing: the folder is not a complete checkpoint")
        if not allow_pickle:
            raise _refused(pickles[0])
        return pickles

    def _compare_with(self, index: Path) -> None:
        for name, file in _weight_map(index).items():
            if self._file_of.get(name) != self.path / file:
                raise CheckpointError(
                    f"{self.path / file} does not hold {name!r}, which {index.name} says it does: the files "
                    "are of different checkpoints; fetch them again"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; CheckpointError if none does."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; the checkpoint does not match its config.json")
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which must be of a floating-point type."""
        file = self.file_of(name)
        stored = self._files[file]
        kind = str(stored[name].dtype) if isinstance(stored, dict) else stored.get_slice(name).get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16") and not kind.startswith(("torch.float", "torch.bfloat")):
            raise CheckpointError(
                f"{file}: {name!r} holds {kind} numbers, expected floating-point weights; quantised checkpoints "
                "cannot be read, take the original one"
            )
        return tuple(stored[name].shape if isinstance(stored, dict) else stored.get_slice(name).get_shape())

    def size(self, prefix: str = "") -> int:
        """How many numbers the tensors of a prefix hold, without reading them."""
        return sum(
            torch.Size(self.shape(name)).numel()
            for name in self.names()
            if name.startswith(prefix) and not name.endswith(NEVER_WEIGHTS)
        )

    def stored_name(self, name: str) -> str:
        """What a tensor is called in its file."""
        return name

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        file = self.file_of(name)
        stored = self._files[file]
        try:
            return stored[name] if isinstance(stored, dict) else stored.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file} is damaged at {name!r} ({error}); fetch the checkpoint again") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; CheckpointError names the file."""
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
    return names


def _refused(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickled file, which can run code when it is loaded: convert it to safetensors, or say "
        "allow_pickle=True (--allow-pickle) to read the tensors in it and nothing else"
    )


def _open(file: Path, allow_pickle: bool) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the folder is not a complete checkpoint")
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        if not allow_pickle:
            raise _refused(file)
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds, all of them mean the same
        raise CheckpointError(f"{file} is damaged ({error}); fetch the checkpoint again") from error
    # Training frameworks wrap the weights in a dictionary of their own.
    for key in ("state_dict", "model", "module"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Origin:
    """Where a loaded core's parameters were read from, for writing trained ones back."""

    checkpoint: Checkpoint
    sources: Sources

    @staticmethod
    def of(model: Transformer) -> Origin:
        """That of a loaded core; CheckpointError for one that was built otherwise."""
        found = vars(model).get(ORIGIN)
        if found is None:
            raise CheckpointError("the model was not read from a checkpoint, so there is no format to write it back in")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # open files are not copied, and nothing here is ever changed


def load_transformer(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    vocabulary: int,
    image_vocabulary: int,
    sources: Sources,
    device: torch.device,
    dtype: torch.dtype,
    ignore: Iterable[str] = (),
) -> Transformer:
    """The core on `device` in `dtype`, filled from the checkpoint; `ignore`: prefixes of tensors not for it.

    Everything is compared first and memory is taken after that; one stored tensor at a time is in memory beside the
    model. Raises CheckpointError for what is missing, left over, or of another shape or type.
    """
    model = Transformer.outline(config, vocabulary, image_vocabulary)
    check(model, checkpoint, sources, ignore)
    if device.type == "meta":  # a model that only tells pictures and prompts from tokens
        return model
    model.allocate(device, dtype)
    fill(model, checkpoint, sources)
    outlines = {name: [_outline(part) for part in parts] for name, parts in sources.items()}
    vars(model)[ORIGIN] = Origin(checkpoint, outlines)  # the transformer itself knows nothing of files
    return model.eval().requires_grad_(False)


def _outline(part: Rows | Tensor) -> Rows | Tensor:
    """The same without the numbers of a computed tensor."""
    return part if isinstance(part, Rows) else torch.empty_like(part, device="meta")


def load_module(build: Callable[[], Module], checkpoint: Checkpoint, prefix: str, device: torch.device) -> Module:
    """A module in float32 on `device` whose weights lie in the checkpoint under their own names behind `prefix`.

    For picture tokenizers: 16 bits would show as banding. Raises CheckpointError.
    """
    with torch.device("meta"):
        module = build()
    sources = {name: [Rows(prefix + name)] for name in weights_of(module)}
    check(module, checkpoint, sources, ignore=("",))
    module.to_empty(device=device)
    fill(module, checkpoint, sources)
    return module.eval().requires_grad_(False)


def load_encoder(build: Callable[[], Module], checkpoint: Checkpoint, prefix: str, device: torch.device) -> Module:
    """As `load_module`, for the encoder of a picture tokenizer, which some checkpoints lack."""
    require_encoder(checkpoint, prefix)
    return load_module(build, checkpoint, prefix, device)


def require_encoder(checkpoint: Checkpoint, prefix: str) -> None:
    """Raise CheckpointError where a picture tokenizer was stored without its encoder."""
    name = f"{prefix}encoder.conv_in.weight"
    if name not in checkpoint:
        raise CheckpointError(
            f"{checkpoint.path} has no {name!r}: its picture tokenizer turns tokens into pictures and not the other "
            "way; fetch or convert the released checkpoint again, with the encoder"
        )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Everything that a checkpoint has to fill: parameters, and statistics that batch norms keep as buffers."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def check(model: nn.Module, checkpoint: Checkpoint, sources: Sources, ignore: Iterable[str] = ()) -> None:
    """Compare names, shapes and types with the model's parameters; raises CheckpointError."""
    used = {part.name for parts in sources.values() for part in parts if isinstance(part, Rows)}
    for name, parameter in weights_of(model).items():
        shapes = [_shape(part, checkpoint) for part in sources[name]]
        odd = [i for i, shape in enumerate(shapes) if shape[1:] != tuple(parameter.shape[1:])]
        rows = sum(shape[0] for shape in shapes)
        if odd or rows != parameter.shape[0]:
            wrong = odd[:1] or range(len(shapes))
            stored = [_label(sources[name][i], name) for i in wrong]
            shape = shapes[odd[0]] if odd else (rows, *shapes[0][1:])
            wanted = (shape[0] if odd and len(shapes) > 1 else parameter.shape[0], *parameter.shape[1:])
            place = checkpoint.file_of(stored[0]) if stored[0] in checkpoint else checkpoint.path
            raise CheckpointError(f"{place}: {' + '.join(stored)} has shape {shape}, config.json asks for {wanted}")
    known = (*ignore,)
    rest = [name for name in checkpoint.names() if name not in used and not name.endswith(NEVER_WEIGHTS)]
    rest = sorted(name for name in rest if not name.startswith(known))
    if rest:
        raise CheckpointError(
            f"{checkpoint.file_of(rest[0])} holds unexpected tensors: {', '.join(rest[:3])}"
            f"{' …' if len(rest) > 3 else ''}; the checkpoint does not match its config.json"
        )


def _label(part: Rows | Tensor, name: str) -> str:
    return part.name if isinstance(part, Rows) else name


def _shape(part: Rows | Tensor, checkpoint: Checkpoint) -> tuple[int, ...]:
    if not isinstance(part, Rows):
        return tuple(part.shape)
    shape = checkpoint.shape(part.name)
    if part.rows is None:
        return shape
    needed = int(part.rows.max()) + 1
    if shape[0] < needed:
        raise CheckpointError(
            f"{checkpoint.file_of(part.name)}: {part.name!r} has {shape[0]} rows and {needed} are needed: its "
            "vocabulary is not the one of config.json and the tokenizer"
        )
    return (len(part.rows), *shape[1:])


@torch.no_grad()
def fill(model: nn.Module, checkpoint: Checkpoint, sources: Sources) -> None:
    """Copy the sources into the model's parameters, casting and moving as they need; checked beforehand."""
    parameters = weights_of(model)
    total = sum(parameter.nbytes for parameter in parameters.values())
    with tqdm(
        total=total, desc=f"loading {checkpoint.path.name}", unit="B", unit_scale=True, leave=False,
        disable=total < SHOW_PROGRESS_ABOVE,
    ) as bar:  # fmt: skip
        for name, parameter in parameters.items():
            start = 0
            for part in sources[name]:
                start += _copy(part, checkpoint, parameter[start:])
            bar.update(parameter.nbytes)


def _copy(part: Rows | Tensor, checkpoint: Checkpoint, target: Tensor) -> int:
    """Fill the first rows of `target`; returns how many."""
    stored = checkpoint.read(part.name) if isinstance(part, Rows) else part
    order = part.rows if isinstance(part, Rows) else None
    if order is None:
        target[: len(stored)].copy_(stored)
        return len(stored)
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = stored[order[start : start + ROWS_AT_ONCE]]
        target[start : start + len(rows)].copy_(rows)
    return len(order)


class TokenRows:
    """Where a tokenizer's ids lie in the input table: image ids, then the layout's structure tokens, then the rest.

    `ids` int64 [vocabulary]: the tokenizer's id of every row, the first `images` of them image ids. Calling it maps
    ids to rows. Raises CheckpointError where ids lie outside the vocabulary.
    """

    def __init__(self, vocabulary: int, image_ids: Iterable[int], structure: Iterable[int] = ()) -> None:
        image = [*image_ids]
        self.images = len(image)
        first = torch.tensor([*image, *structure])
        if int(first.max()) >= vocabulary:
            raise CheckpointError(
                f"the model's image and structure tokens go up to id {int(first.max())}, config.json has a vocabulary "
                f"of {vocabulary}: it is of another model"
            )
        others = torch.ones(vocabulary, dtype=torch.bool)
        others[first] = False
        self.ids = torch.cat([first, others.nonzero().flatten()])
        self._row = torch.empty_like(self.ids)
        self._row[self.ids] = torch.arange(vocabulary)

    def __call__(self, ids: Sequence[int]) -> list[int]:
        if any(not 0 <= i < len(self._row) for i in ids):
            raise CheckpointError(
                f"the tokenizer gives id {max(ids)}, the model has a vocabulary of {len(self._row)}: tokenizer and "
                "weights are of different models"
            )
        return self._row[torch.tensor(ids, dtype=torch.int64)].tolist()
