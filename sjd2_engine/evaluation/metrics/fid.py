"""Fréchet Inception distance to real pictures (Heusel et al., arXiv 1706.08500), accumulated by torchmetrics."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import BackendError, CheckpointError, ConfigError
from ...files import replace_file
from ..prompts import Case
from .base import Finding, MetricResult, Picture, Progress

SIDE = 299  # of Inception's inputs, in pixels
BATCH = 32
PUBLISHED_FEATURES = 2048  # what published distances are measured in
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EXPECTED = "expected a TorchScript file or a torch.export archive (.pt2) that maps uint8 [B, 3, 299, 299] to [B, 2048]"


class Extractor(nn.Module):
    """A feature extractor from a file; uint8 [B, 3, 299, 299] -> [B, `num_features`]."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        if not path.is_file():
            raise CheckpointError(f"there is no feature extractor at '{path}'; {EXPECTED}")
        try:
            self._options: dict[str, Any] = {}
            if path.suffix == ".pt2":
                self._body: Any = torch.export.load(path).module().to(device)
            else:
                self._body = torch.jit.load(path, map_location=device).eval()
                # NVIDIA's widely used file gives class probabilities unless it is asked for features.
                if any(argument.name == "return_features" for argument in self._body.forward.schema.arguments):
                    self._options = {"return_features": True}
            probe = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
            features = self(probe)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise CheckpointError(f"'{path}' cannot be used for FID ({said}); {EXPECTED}") from error
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != 2:
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise CheckpointError(f"'{path}' maps two pictures to {given}; {EXPECTED}")
        self.num_features = features.shape[1]

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features [B, F] of uint8 pictures [B, 3, 299, 299]."""
        return self._body(pictures, **self._options)


class Fid:
    """FID of the drawn pictures against real ones.

    Every picture, drawn or real, is brought to 299x299 by Pillow's bicubic filter, which widens with the reduction
    (Parmar et al., arXiv 2104.11222). inception: None = torch-fidelity's weights, where that package is installed.
    """

    name = "fid"

    def __init__(self, device: torch.device, inception: Path | None, reference: Path | None) -> None:
        if reference is None:
            raise ConfigError("FID needs --reference: a folder of real pictures, or an .npz with their mu and sigma")
        if not reference.exists():
            raise ConfigError(f"--reference {reference} does not exist; expected a folder of pictures, or an .npz file")
        self._device, self._inception, self._reference = device, inception, reference
        self._metric: Any = self._make_metric()
        self._features = int(self._metric.real_features_sum.shape[0])
        self._moments = None if reference.is_dir() else _read_moments(reference, self._features)
        self._real = (
            sorted(p for p in reference.rglob("*") if p.suffix.lower() in ENDINGS) if reference.is_dir() else []
        )
        if self._moments is None and len(self._real) < 2:
            raise ConfigError(f"--reference {reference} holds {len(self._real)} pictures; FID needs two at least")

    def _make_metric(self) -> Any:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise BackendError("FID needs torchmetrics: pip install 'sjd2-engine[eval]'") from error
        if self._inception is not None:
            return FrechetInceptionDistance(Extractor(self._inception, self._device)).to(self._device)
        try:
            return FrechetInceptionDistance(PUBLISHED_FEATURES).to(self._device)
        except ModuleNotFoundError as error:
            raise ConfigError(
                "FID needs a feature extractor: --inception FILE (TorchScript, such as NVIDIA's "
                "inception-2015-12-05.pt, or .pt2), or the package torch-fidelity, which brings its own"
            ) from error

    @property
    def settings(self) -> dict[str, Any]:
        """Extractor and reference."""
        return {"inception": str(self._inception or "torch-fidelity"), "reference": str(self._reference)}

    def check(self, cases: Sequence[Case], family: str) -> None:
        """Any prompt and any model will do."""

    def score(self, pictures: Sequence[Picture], out: Path, progress: Progress) -> MetricResult:
        """Compare all pictures with the reference, whose moments are kept in `fid_reference.npz`."""
        if len(pictures) < 2:
            raise ConfigError(
                f"FID of {len(pictures)} picture: two at least are needed, and thousands for a fair figure"
            )
        metric = self._metric
        metric.reset()
        if self._moments is None:
            _feed(metric, self._real, self._device, real=True, progress=progress)
            _write_moments(metric, out / "fid_reference.npz")
        else:
            _set_moments(metric, *self._moments)
        _feed(metric, [picture.path for picture in pictures], self._device, real=False, progress=progress)
        value = float(metric.compute())
        values = {
            "value": value,
            "pictures": len(pictures),
            "real_pictures": len(self._real) or None,
            "features": self._features,
            "inception_sha256": _digest(self._inception),
            **self.settings,
        }
        return MetricResult(values, [Finding("FID", str(len(pictures)), f"{value:.2f}")], self._notes(len(pictures)))

    def _notes(self, count: int) -> list[str]:
        against = f"{len(self._real)} pictures in" if self._real else "the moments in"
        notes = [f"FID: against {against} {self._reference}, features by {self.settings['inception']}"]
        if count <= self._features:
            notes.append(
                f"FID of {count} pictures in {self._features} dimensions is too large by much: it falls as pictures "
                "are added, so compare only with as many"
            )
        if self._features != PUBLISHED_FEATURES:
            notes.append(
                f"{self._features} features are not Inception's {PUBLISHED_FEATURES}: no published FID compares"
            )
        return notes


def _feed(metric: Any, paths: Sequence[Path], device: torch.device, real: bool, progress: Progress) -> None:
    for start in progress(range(0, len(paths), BATCH)):
        batch = torch.stack(list(_read(paths[start : start + BATCH])))
        metric.update(batch.to(device), real=real)


def _read(paths: Iterable[Path]) -> Iterator[Tensor]:
    for path in paths:
        try:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError) as error:
            raise ConfigError(f"'{path}' is no readable picture ({error}); remove it from the reference") from error
        yield torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _read_moments(path: Path, features: int) -> tuple[Tensor, Tensor]:
    """Mean [F] and covariance [F, F] float64 from the arrays mu and sigma of an .npz file."""
    try:
        with np.load(path) as arrays:
            mean, covariance = torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"--reference {path} cannot be read ({error}); expected an .npz with mu and sigma") from error
    if mean.shape != (features,) or covariance.shape != (features, features):
        raise ConfigError(
            f"--reference {path} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; the extractor gives "
            f"{features} features, so [{features}] and [{features}, {features}] were expected"
        )
    return mean, covariance


def _set_moments(metric: Any, mean: Tensor, covariance: Tensor) -> None:
    """Let the metric believe it had seen two pictures with these moments (their count does not enter the distance)."""
    metric.real_features_num_samples.fill_(2)
    metric.real_features_sum.copy_(2 * mean)
    metric.real_features_cov_sum.copy_(covariance + 2 * torch.outer(mean, mean))


def _write_moments(metric: Any, path: Path) -> None:
    """Keep the reference's moments as pytorch-fid and clean-fid do: an .npz with mu and sigma."""
    count = int(metric.real_features_num_samples)
    mean = metric.real_features_sum / count
    covariance = (metric.real_features_cov_sum - count * torch.outer(mean, mean)) / (count - 1)
    buffer = io.BytesIO()
    np.savez(buffer, mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy())
    replace_file(path, buffer.getvalue())


def _digest(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
