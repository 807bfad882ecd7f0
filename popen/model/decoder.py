"""Light multi-scale pixel decoder: two-way attention a scale; the coarse mask guides the finer scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.params import DecoderParams


class Neck(nn.Module):
    """Tower levels [(B, width, h, w)] -> decoder features [(B, C, h, w)], with a learned place code."""

    def __init__(self, widths: list[int], grids: list[int], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 1), nn.GroupNorm(1, width)) for width_in in widths
        )
        self.places = nn.ParameterList(torch.randn(1, width, grid, grid) * 0.02 for grid in grids)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in widths
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """From coarse to fine, each level with the coarser one added (a feature pyramid's top-down path)."""
        out: list[Tensor] = []
        for level, place, smooth, feature in zip(
            self.levels, self.places, self.smooth, features, strict=True
        ):
            here = level(feature) + place
            if out:
                here = here + F.interpolate(out[-1], size=here.shape[-2:], mode="bilinear")
            out.append(here + smooth(here))
        return out


class TwoWay(nn.Module):
    """Tokens attend to pixels, then pixels to tokens (Segment Anything's two-way block without
    self-attention)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_tokens, self.norm_pixels, self.norm_mlp, self.norm_back = (
            nn.LayerNorm(width) for _ in range(4)
        )
        self.q, self.kv, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.q_back, self.kv_back = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out_back = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def _attend(self, q: Tensor, kv: Tensor) -> Tensor:
        n, length, width = q.shape
        key, value = kv.chunk(2, dim=-1)
        q, key, value = (
            x.view(n, -1, self.heads, width // self.heads).transpose(1, 2) for x in (q, key, value)
        )
        return F.scaled_dot_product_attention(q, key, value).transpose(1, 2).reshape(n, length, width)

    def forward(self, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, t, C), pixels (N, hw, C) -> the same shapes."""
        normed = self.norm_pixels(pixels)
        tokens = tokens + self.out(self._attend(self.q(self.norm_tokens(tokens)), self.kv(normed)))
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        back = self._attend(self.q_back(normed), self.kv_back(self.norm_back(tokens)))
        return tokens, pixels + self.out_back(back)


class Scale(nn.Module):
    """The blocks of one scale and the head that turns token and pixels into a mask at twice the grid."""

    def __init__(self, params: DecoderParams) -> None:
        super().__init__()
        width = params.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(TwoWay(width, params.heads) for _ in range(params.layers))
        self.up = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.hyper = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width // 2))

    def forward(self, embedding: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """embedding (N, C), pixels (N, C, h, w) -> mask logits (N, 2h, 2w) and the refined tokens (N, 2C)."""
        n, width, h, w = pixels.shape
        tokens = torch.cat([embedding[:, None], self.mask_token.expand(n, 1, width)], dim=1)
        flat = pixels.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens, flat = block(tokens, flat)
        up = F.gelu(self.up(flat.transpose(1, 2).reshape(n, width, h, w)))
        refined = tokens.flatten(1)
        # pixel by pixel, as convolutions have them in memory
        logits = up.flatten(2).transpose(1, 2) @ self.hyper(refined).unsqueeze(-1) / (width // 2) ** 0.5
        return logits.view(n, 2 * h, 2 * w), refined


class PixelDecoder(nn.Module):
    """Embeddings (N, S, C) and features of their images -> mask logits (N, H, W).

    Scale 0 is the deepest level. The mask of a scale multiplies the next scale's features by
    1 + sigmoid(mask) (PixelLM); the logits of the scales are summed with learned weights. Where
    `params.detail` asks for it, a branch on the RGB pixels sharpens the sum (ours: a grid of
    16 x 16 patches alone cannot draw a fork).
    """

    def __init__(self, params: DecoderParams, scales: int, image_size: int) -> None:
        super().__init__()
        self.size = image_size
        self.scales = nn.ModuleList(Scale(params) for _ in range(scales))
        self.weights = nn.Parameter(torch.full((scales,), 1.0 / scales))
        self.bias = nn.Parameter(torch.tensor(-2.0))  # most pixels are background
        self.detail = params.detail
        if params.detail:
            d = params.detail
            self.stem = nn.Sequential(
                nn.Conv2d(3, d, 3, padding=1), nn.GELU(), nn.Conv2d(d, d, 3, padding=1), nn.GELU()
            )
            self.select = nn.Linear(2 * params.width, d)
            self.sharpen = nn.Sequential(
                nn.Conv2d(d + 1, d, 3, padding=1), nn.GELU(), nn.Conv2d(d, 1, 3, padding=1)
            )

    def forward(self, embeddings: Tensor, features: list[Tensor], images: Tensor, image_of: Tensor) -> Tensor:
        """embeddings (N, S, C), features [(B, C, h, w)], images (B, 3, H, W), image_of (N,) -> (N, H, W)."""
        masks: list[Tensor] = []
        refined = embeddings[:, 0]
        for index, scale in enumerate(self.scales):
            pixels = features[index].index_select(0, image_of)
            if masks:
                guide = F.interpolate(masks[-1], size=pixels.shape[-2:], mode="bilinear")
                pixels = pixels * (1 + guide.sigmoid())
            mask, refined = scale(embeddings[:, index], pixels)
            masks.append(mask[:, None])
        finest = masks[-1].shape[-2:]
        total = self.bias + sum(
            weight * F.interpolate(mask, size=finest, mode="bilinear")
            for weight, mask in zip(self.weights, masks, strict=True)
        )
        logits = F.interpolate(total, size=(self.size, self.size), mode="bilinear")
        if self.detail:
            detail = self.stem(images).index_select(0, image_of) * self.select(refined)[:, :, None, None]
            logits = logits + self.sharpen(torch.cat([logits, detail], dim=1))
        return logits[:, 0]
