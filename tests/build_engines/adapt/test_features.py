"""Features are kept whether more or fewer closer views are wanted, and lost with a warning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from PIL import Image
from torch import Tensor, nn

from build_engines.adapt.features import FeatureStore
from build_engines.model.texture import CHANNELS
from service.media.decoder import ImageLimits

WIDTH = 4


class Counting(nn.Module):
    """Stands for the encoder: an image's features are its mean. Counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(images)
        features = images.float().mean((1, 2, 3))[:, None, None].expand(-1, 257, WIDTH)
        maps = torch.ones(len(images), 256)
        return features, maps, maps, torch.ones(len(images), len(CHANNELS), 16, 16)


def pictures(folder: Path, number: int = 20) -> list[Path]:
    """Every third one is large enough for a closer view."""
    paths = [folder / f"{place:02}.png" for place in range(number)]
    for place, path in enumerate(paths):
        side = 448 if place % 3 == 0 else 224
        Image.new("RGB", (side, side), (place, place, place)).save(path)
    return paths


def filled(work: Path, paths: list[Path], closer: int, stop_after: int | None = None) -> tuple[FeatureStore, int]:
    """The store, and how many images were encoded for it."""
    encoder, store = Counting(), FeatureStore(work, paths, WIDTH, closer, "encoder")
    store.fill(encoder, ImageLimits(), stop_after)
    return store, encoder.seen


@pytest.mark.parametrize("stop_after", [None, 1])
def test_more_or_fewer_closer_views_keep_the_features(tmp_path: Path, stop_after: int | None) -> None:
    paths = pictures(tmp_path)
    fresh, _ = filled(tmp_path / "fresh", paths, 5)
    _, seen = filled(tmp_path / "work", paths, 0, stop_after)
    first, first_seen = filled(tmp_path / "work", paths, 3)
    assert seen + first_seen == 20 + 4 * 3
    assert first.closer == {0: 0, 3: 1, 6: 2}
    none, more = filled(tmp_path / "work", paths, 0)
    assert (none.closer, more) == ({}, 0)
    again, more = filled(tmp_path / "work", paths, 5)
    assert more == 4 * 2
    assert again.closer == fresh.closer == {0: 0, 3: 1, 6: 2, 9: 3, 12: 4}
    for ours, theirs in ((again.features, fresh.features), (again.maps, fresh.maps), (again.crops, fresh.crops)):
        assert (ours == theirs).all()
    assert (again.take_crops([12]) == 12).all()
    assert len({first.key, none.key, again.key}) == 3  # lessons depend on the closer views
    assert filled(tmp_path / "work", paths, 5)[1] == 0


def test_features_of_an_earlier_version_are_kept(tmp_path: Path) -> None:
    """It had the number of closer views in the key, and did not tell how many images it had looked at for one."""
    paths = pictures(tmp_path)
    store, _ = filled(tmp_path / "work", paths, 3)
    record = tmp_path / "work" / "features.json"
    told = ["encoder", str(WIDTH), "3", *(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths)]
    assert store.key == blake3("\n".join(told).encode()).hexdigest()
    before = record.read_text().replace('"looked": 7, ', "")
    assert before != record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"key": store.key}))
    assert filled(tmp_path / "work", paths, 3)[1] == 0


def test_features_that_are_computed_again_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = pictures(tmp_path)
    filled(tmp_path / "work", paths, 3)
    assert "computed again" not in capsys.readouterr().err
    FeatureStore(tmp_path / "work", paths[:5], WIDTH, 3, "encoder")  # killed before it has encoded anything
    assert "the features of 20 images are computed again" in capsys.readouterr().err
    store = FeatureStore(tmp_path / "work", paths, WIDTH, 3, "encoder")
    assert not np.any(store.features)
    assert filled(tmp_path / "work", paths, 3)[1] == 20 + 4 * 3  # not taken for what was there before


def test_closer_views_without_their_file_are_encoded_again(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    filled(tmp_path / "work", paths, 2)
    (tmp_path / "work" / "crops.f16").unlink()
    store, seen = filled(tmp_path / "work", paths, 2)
    assert seen == 4 * 2
    assert (store.take_crops([3]) == 3).all()
