"""The 13-channel texture array and the luminance entropy of every patch.

The channels are those of ARR-COC 0.1's texture array. Its channels 11 and 12 are copies of others; here they are
computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 14
HISTOGRAM_BINS = 16
ORIENTATIONS = 8
CHANNELS = (
    "red", "green", "blue", "lightness", "red_green", "sobel_x", "sobel_y", "sobel_magnitude",
    "y", "x", "eccentricity", "contrast", "orientation_entropy",
)  # fmt: skip


class Texture(nn.Module):
    """RGB in [0, 1], float [B, 3, 224, 224] -> texture [B, 13, 16, 16] and entropy [B, 256], all finite.

    Ranges: red_green is in [-1, 1] (a* / 128); every other channel and the entropy are in [0, 1]. Gradients are
    computed at every second pixel (49 samples a patch). Lightness and red_green are those of the patch's mean colour.
    Sources: luma by ITU-R BT.601; CIELAB with D65 white from IEC 61966-2-1 sRGB.
    """

    luma: Tensor
    steered: Tensor
    to_xyz: Tensor
    position: Tensor

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        grid = image_size // PATCH
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1), persistent=False)
        sobel_x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        angles = torch.arange(ORIENTATIONS) * (math.pi / ORIENTATIONS)
        # Sobel steered to eight directions: 0 is Sobel x, 4 is Sobel y.
        steered = torch.cos(angles).view(-1, 1, 1) * sobel_x + torch.sin(angles).view(-1, 1, 1) * sobel_x.T
        self.register_buffer("steered", steered.unsqueeze(1), persistent=False)
        white = torch.tensor([0.95047, 1.0, 1.08883]).view(3, 1)
        to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) / white
        self.register_buffer("to_xyz", to_xyz[:2].view(2, 3, 1, 1), persistent=False)
        line = (torch.arange(grid) + 0.5) / grid
        y, x = torch.meshgrid(line, line, indexing="ij")
        eccentricity = torch.hypot(y - 0.5, x - 0.5) / math.sqrt(0.5)
        self.register_buffer("position", torch.stack([y, x, eccentricity]).unsqueeze(0), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        luminance = (image * self.luma).sum(1, keepdim=True)  # [B, 1, 224, 224]
        colour = F.avg_pool2d(image, PATCH)
        gradients, orientation_entropy = self._gradients(luminance)
        position = self.position.expand(image.shape[0], -1, -1, -1)
        channels = [colour, self._lab(colour), gradients, position, self._contrast(luminance), orientation_entropy]
        return torch.cat(channels, dim=1), self._entropy(luminance)

    def _lab(self, colour: Tensor) -> Tensor:
        """Mean colour [B, 3, 16, 16] -> L* / 100 and a* / 128, [B, 2, 16, 16]."""
        linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        ratio = F.conv2d(linear, self.to_xyz)
        cube_root = torch.where(ratio > 0.008856, ratio.clamp(min=1e-6) ** (1 / 3), 7.787 * ratio + 16 / 116)
        x, y = cube_root[:, :1], cube_root[:, 1:]
        return torch.cat([(116 * y - 16) / 100, 500 * (x - y) / 128], dim=1)

    def _gradients(self, luminance: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, 224, 224] -> mean |Sobel x|, |Sobel y|, magnitude [B, 3, 16, 16]; their entropy [B, 1, 16, 16]."""
        padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")
        response = F.conv2d(padded, self.steered, stride=2).abs()  # [B, 8, 112, 112]
        x, y = response[:, :1], response[:, ORIENTATIONS // 2 : ORIENTATIONS // 2 + 1]
        magnitude = torch.sqrt(x * x + y * y)
        strongest = response >= response.amax(1, keepdim=True)
        mass = F.avg_pool2d(strongest.float() * magnitude, PATCH // 2)  # [B, 8, 16, 16]
        share = mass / (mass.sum(1, keepdim=True) + 1e-4)
        entropy = -(share * torch.log2(share.clamp(min=1e-6))).sum(1, keepdim=True) / math.log2(ORIENTATIONS)
        means = F.avg_pool2d(torch.cat([x, y, magnitude / math.sqrt(2)], dim=1), PATCH // 2)
        return means, entropy.clamp(0.0, 1.0)

    def _contrast(self, luminance: Tensor) -> Tensor:
        """Standard deviation of luminance, doubled, [B, 1, 16, 16]. A patch half black and half white has 1."""
        mean = F.avg_pool2d(luminance, PATCH)
        variance = F.avg_pool2d(luminance * luminance, PATCH) - mean * mean
        return 2 * torch.sqrt(variance.clamp(min=0.0))

    def _entropy(self, luminance: Tensor) -> Tensor:
        """Shannon entropy of each patch's 16-bin luminance histogram, in bits / 4: [B, 256] in [0, 1]."""
        batch, _, height, width = luminance.shape
        rows, columns = height // PATCH, width // PATCH
        pixels = luminance.reshape(batch, rows, PATCH, columns, PATCH).transpose(2, 3)
        pixels = pixels.reshape(batch, 1, rows * columns, PATCH * PATCH)
        upper = torch.arange(1, HISTOGRAM_BINS, device=luminance.device).view(1, -1, 1, 1) / HISTOGRAM_BINS
        below = (pixels < upper).float().mean(3)  # [B, 15, 256]: cumulative histogram
        empty, full = torch.zeros_like(below[:, :1]), torch.ones_like(below[:, :1])
        share = torch.cat([below, full], dim=1) - torch.cat([empty, below], dim=1)
        bits = -(share * torch.log2(share.clamp(min=1e-6))).sum(1)
        return (bits / math.log2(HISTOGRAM_BINS)).clamp(0.0, 1.0)
