"""The frozen encoder's outputs for every image, computed once and kept on disk.

    WORK/features.json   key, number of finished images, broken images, rows of the closer views, and the number of
                         images that were looked at for one
    WORK/features.f16    [N, 257, D]: features, CLS first
    WORK/maps.f32        [N, 2, 256]: propositional and perspectival
    WORK/crops.f16       [M, 4, 257, D]: features of the closer view's four quarters

The files are memory-mapped. A stopped run continues after its last finished block. The key covers the encoder's
fingerprint and every image's name, size and time: other images or another encoder start again. The number of closer
views is no part of it: the first ones are kept, whether more or fewer are wanted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from tqdm import tqdm

from build_engines.model.allocation import GRID, PATCH_COUNT
from build_engines.model.knowing import perspectival
from build_engines.model.vision import VisionEncoder
from service.core.errors import GlimpseError
from service.core.vision import CLOSER_SIZE, CROPS, IMAGE_SIZE
from service.media.decoder import Decoded, ImageLimits, decode

BLOCK = 16  # images between two records of progress
TOKENS = 1 + PATCH_COUNT
LEAST_CLOSER_SIDE = 2 * IMAGE_SIZE  # pixels of the shorter side: smaller images have nothing to see from nearer


@dataclass
class _Progress:
    key: str
    done: int = 0
    looked: int = 0  # the images before this one were large enough for a closer view, or have one
    broken: dict[int, str] = field(default_factory=dict)
    closer: dict[int, int] = field(default_factory=dict)  # image -> row of crops.f16

    def as_json(self) -> dict[str, Any]:
        return vars(self)


class FeatureStore:
    """Features of a list of images, on disk."""

    def __init__(self, work: Path, images: Sequence[Path], width: int, most_closer: int, fingerprint: str) -> None:
        """width: D. most_closer: the most images whose closer view is kept."""
        self._work, self._images, self._width, self._most_closer = work, list(images), width, most_closer
        work.mkdir(parents=True, exist_ok=True)
        self._progress = _Progress(self._key(fingerprint, str(width)))
        self.key = self._key(fingerprint, str(width), str(most_closer))  # of what is learned from the store
        self._record = work / "features.json"
        self._resume()
        # The images with a closer view, by number, and their rows.
        self.closer = {image: row for image, row in self._progress.closer.items() if row < self._most_closer}

    @property
    def broken(self) -> dict[int, str]:
        """The images that cannot be decoded, by number, with the reason."""
        return self._progress.broken

    def _key(self, *told_first: str) -> str:
        told = list(told_first)
        for path in self._images:
            about = path.stat()
            told.append(f"{path} {about.st_size} {about.st_mtime_ns}")
        return blake3("\n".join(told).encode()).hexdigest()

    def _resume(self) -> None:
        try:
            kept = json.loads(self._record.read_text())
        except (OSError, ValueError):
            kept = {}
        # Earlier versions had the number of closer views in the key.
        whole = kept.get("key") in (self._progress.key, self.key) and (self._work / "features.f16").exists()
        if whole:
            self._progress.done = kept["done"]
            self._progress.broken = {int(number): reason for number, reason in kept["broken"].items()}
            if (self._work / "crops.f16").exists():
                self._progress.closer = {int(number): row for number, row in kept["closer"].items()}
                self._progress.looked = kept.get("looked", max(self._progress.closer, default=-1) + 1)
        elif done := kept.get("done"):
            print(
                f"{self._work}: the features of {done} images are computed again, because the images or the encoder "
                "have changed",
                file=sys.stderr,
            )
        if not whole:
            self._record.unlink(missing_ok=True)  # before its files are emptied
        count, mode = len(self._images), "r+" if whole else "w+"
        self.features = self._mapped("features.f16", np.float16, (count, TOKENS, self._width), mode)
        self.maps = self._mapped("maps.f32", np.float32, (count, 2, PATCH_COUNT), mode)
        crops = mode if (self._work / "crops.f16").exists() else "w+"
        self.crops = self._mapped("crops.f16", np.float16, (self._most_closer, CROPS, TOKENS, self._width), crops)

    def _mapped(self, name: str, dtype: type, shape: tuple[int, ...], mode: Any) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self._work / name, dtype, mode, shape=shape)

    @torch.no_grad()
    def fill(self, encoder: VisionEncoder, limits: ImageLimits, stop_after: int | None = None) -> None:
        """Encode the images that are missing. stop_after: end after this many blocks, as a kill would."""
        device = next(encoder.parameters()).device
        self._fill_crops(encoder, limits, device)
        bar = tqdm(total=len(self._images), initial=self._progress.done, desc="features", unit="image", mininterval=2)
        with ThreadPoolExecutor(2) as pool:
            blocks = 0
            while self._progress.done < len(self._images) and blocks != stop_after:
                first = self._progress.done
                numbers = list(range(first, min(first + BLOCK, len(self._images))))
                for number, found in zip(numbers, pool.map(self._decoded(limits), numbers), strict=True):
                    if isinstance(found, str):
                        self.broken[number] = found
                    else:
                        self._encode(encoder, number, found, device)
                self._progress.done = first + len(numbers)
                if self._has_room:
                    self._progress.looked = self._progress.done
                self._record_progress()
                bar.update(len(numbers))
                blocks += 1
        bar.close()

    def _fill_crops(self, encoder: VisionEncoder, limits: ImageLimits, device: torch.device) -> None:
        """Encode the closer views of finished images, if fewer were wanted when they were finished."""
        decoded = self._decoded(limits)
        missing = range(self._progress.looked, self._progress.done) if self._has_room else range(0)
        for number in tqdm(missing, desc="closer views", unit="image", mininterval=2, disable=not missing):
            if not self._has_room:
                break
            if number not in self.broken and number not in self._progress.closer:
                found = decoded(number)
                if isinstance(found, Decoded) and self._is_large(found):
                    self._keep_crops(number, encoder(torch.from_numpy(found.crops).to(device))[0])
            self._progress.looked = number + 1
            if number % BLOCK == 0:
                self._record_progress()
        if missing:
            self._record_progress()

    @property
    def _has_room(self) -> bool:
        return len(self._progress.closer) < self._most_closer

    @staticmethod
    def _is_large(decoded: Decoded) -> bool:
        return min(decoded.width, decoded.height) >= LEAST_CLOSER_SIDE

    def _decoded(self, limits: ImageLimits) -> Any:
        def decoded(number: int) -> Decoded | str:
            try:
                return decode(self._images[number].read_bytes(), limits, (IMAGE_SIZE, CLOSER_SIZE))
            except (GlimpseError, OSError) as exc:
                return str(exc)

        return decoded

    def _encode(self, encoder: VisionEncoder, number: int, decoded: Decoded, device: torch.device) -> None:
        closely = self._has_room and self._is_large(decoded)
        views = np.concatenate([decoded.pixels[None], *([decoded.crops] if closely else [])])
        features, saliency, entropy, texture = encoder(torch.from_numpy(views).to(device))
        self.features[number] = features[0].cpu().numpy()
        maps = torch.stack([entropy[:1], perspectival(saliency[:1], texture[:1])], dim=1)[0]
        self.maps[number] = maps.float().cpu().numpy()
        if closely:
            self._keep_crops(number, features[1:])

    def _keep_crops(self, number: int, features: Tensor) -> None:
        row = len(self._progress.closer)
        self.crops[row] = features.cpu().numpy()
        self._progress.closer[number] = self.closer[number] = row
        self._progress.looked = number + 1

    def _record_progress(self) -> None:
        for array in (self.features, self.maps, self.crops):
            if isinstance(array, np.memmap):
                array.flush()
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(self._progress.as_json()))
        os.replace(partial, self._record)

    def take(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features [n, 257, D] and maps [n, 2, 256], float32."""
        index = list(images)
        return torch.from_numpy(self.features[index]).float(), torch.from_numpy(self.maps[index]).float()

    def take_crops(self, images: Sequence[int]) -> Tensor:
        """Features of the quarters, float32 [n, 4, 257, D]."""
        return torch.from_numpy(self.crops[[self.closer[number] for number in images]]).float()


def detail_of(crops: Tensor) -> Tensor:
    """Put the quarters' patches [n, 4, 257, D] on one grid of 32x32: [n, 1024, D]."""
    grid = crops[:, :, 1:].unflatten(1, (2, 2)).unflatten(3, (GRID, GRID))  # [n, 2, 2, 16, 16, D]
    return grid.transpose(2, 3).flatten(1, 4)


def bytes_of(images: int, closer: int, width: int) -> int:
    """Disk that the features of so many images and closer views take."""
    return images * (TOKENS * width * 2 + 2 * PATCH_COUNT * 4) + closer * CROPS * TOKENS * width * 2
