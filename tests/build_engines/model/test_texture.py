"""The texture array against plain NumPy on images with known values."""

import numpy as np
import pytest
import torch

from build_engines.model.texture import CHANNELS, Texture

TEXTURE = Texture()


def channel(image: torch.Tensor, name: str) -> np.ndarray:
    return TEXTURE(image)[0][0, CHANNELS.index(name)].numpy()


def grey(values: np.ndarray) -> torch.Tensor:
    """[224, 224] in [0, 1] -> [1, 3, 224, 224]."""
    return torch.from_numpy(np.broadcast_to(values.astype(np.float32), (1, 3, 224, 224)).copy())


@pytest.mark.parametrize(
    "image",
    [torch.zeros(1, 3, 224, 224), torch.ones(1, 3, 224, 224), torch.full((1, 3, 224, 224), 0.37),
     torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))],
    ids=["black", "white", "constant", "noise"],
)  # fmt: skip
def test_finite_and_in_range(image):
    texture, entropy = TEXTURE(image)
    assert texture.shape == (len(image), 13, 16, 16)
    assert entropy.shape == (len(image), 256)
    assert bool(texture.isfinite().all() and entropy.isfinite().all())
    least = torch.zeros(13)
    least[CHANNELS.index("red_green")] = -1
    assert bool((texture.amin((0, 2, 3)) >= least - 1e-5).all())
    assert float(texture.max()) <= 1 + 1e-5
    assert float(entropy.min()) >= 0
    assert float(entropy.max()) <= 1


def test_entropy_is_that_of_the_luminance_histogram():
    values = np.random.default_rng(0).random((224, 224))
    entropy = TEXTURE(grey(values))[1].reshape(16, 16).numpy()
    patch = (values.astype(np.float32)[14:28, 28:42] * np.float32(0.299 + 0.587 + 0.114)).ravel()
    share = np.histogram(patch, bins=16, range=(0, 1))[0] / patch.size
    bits = -sum(p * np.log2(p) for p in share if p)
    assert entropy[1, 2] == pytest.approx(bits / 4, abs=0.01)


def test_contrast_of_half_black_half_white_is_one():
    values = np.zeros((224, 224))
    values[::2] = 1
    assert channel(grey(values), "contrast") == pytest.approx(1.0, abs=1e-3)


def test_a_vertical_edge_is_sobel_x_and_one_orientation():
    values = np.zeros((224, 224))
    values[:, 7:] = 1  # an edge inside the first column of patches
    image = grey(values)
    assert channel(image, "sobel_x")[:, 0].min() > 10 * channel(image, "sobel_y").max() + 0.01
    assert channel(image, "orientation_entropy").max() < 0.05


def test_noise_has_every_orientation():
    values = np.random.default_rng(0).random((224, 224))
    assert channel(grey(values), "orientation_entropy").mean() > 0.85


def test_red_is_red_and_green_is_green():
    red, green = torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 224, 224)
    red[:, 0], green[:, 1] = 1, 1
    # CIELAB of sRGB red and green: L* 53.2 and 87.7, a* 80.1 and -86.2.
    assert channel(red, "lightness") == pytest.approx(0.532, abs=0.01)
    assert channel(red, "red_green") == pytest.approx(80.1 / 128, abs=0.01)
    assert channel(green, "lightness") == pytest.approx(0.877, abs=0.01)
    assert channel(green, "red_green") == pytest.approx(-86.2 / 128, abs=0.01)
