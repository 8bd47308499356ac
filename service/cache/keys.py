"""Define the key of vision features, in memory and in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from service.core.vision import CLOSER_SIZE, IMAGE_SIZE, CloserFeatures, VisionFeatures

AS_INT8 = ".int8"  # after the encoder's fingerprint, for features whose rows are rounded
Features = TypeVar("Features", VisionFeatures, CloserFeatures)


@dataclass(frozen=True, slots=True)
class FeatureKey(Generic[Features]):
    """Equal keys mean equal features. The 224-pixel view gives VisionFeatures, the closer one CloserFeatures."""

    fingerprint: str  # of the vision encoder's weights
    view: int  # pixels a side that the encoder saw
    digest: str  # blake3 of the image's bytes, and the viewport if it is not the whole image squashed


def first_view(fingerprint: str, digest: str) -> FeatureKey[VisionFeatures]:
    return FeatureKey(fingerprint, IMAGE_SIZE, digest)


def closer_view(fingerprint: str, digest: str) -> FeatureKey[CloserFeatures]:
    return FeatureKey(fingerprint, CLOSER_SIZE, digest)
