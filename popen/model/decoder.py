"""Light multi-scale pixel decoder: two-way attention a scale; the coarse mask guides the finer scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.devices import as_read
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

    def forward(self, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, t, C), pixels (N, P, C) -> the same shapes.

        Few tokens meet many pixels, so the maps that attention makes of each pixel (its key, value and query)
        are made of the tokens instead: q (W x) is (q W) x. The same numbers for a twelfth of the work. A
        key's bias, which adds the same to all pixels, is nothing to the softmax.
        """
        n, t, width = tokens.shape
        shape = (self.heads, width // self.heads)
        scale = shape[1] ** -0.5
        normed = as_read(self.norm_pixels(pixels))
        key, value = self.kv.weight.view(2, *shape, width)
        asked = torch.einsum("nthd,hdc->nthc", self.q(self.norm_tokens(tokens)).unflatten(2, shape), key)
        looked = (asked.flatten(1, 2) @ normed.transpose(1, 2) * scale).softmax(-1)
        seen = (looked @ normed).view(n, t, self.heads, width)
        seen = torch.einsum("nthc,hdc->nthd", seen, value).flatten(2) + self.kv.bias[width:]
        tokens = tokens + self.out(seen)
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        key, value = self.kv_back(self.norm_back(tokens)).unflatten(2, (2, *shape)).unbind(2)
        asked = torch.einsum("nthd,hdc->nthc", key, self.q_back.weight.view(*shape, width)).flatten(1, 2)
        offset = torch.einsum("nthd,hd->nth", key, self.q_back.bias.view(shape)).flatten(1).unsqueeze(1)
        shares = ((normed @ asked.transpose(1, 2) + offset) * scale).unflatten(2, (t, -1)).softmax(2)
        said = torch.einsum("nthd,chd->nthc", value, self.out_back.weight.view(width, *shape)).flatten(1, 2)
        return tokens, pixels + torch.baddbmm(self.out_back.bias.view(1, 1, -1), shares.flatten(2), said)


class Scale(nn.Module):
    """The blocks of one scale and the head that turns token and pixels into a mask at twice the grid."""

    def __init__(self, params: DecoderParams) -> None:
        super().__init__()
        width = params.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(TwoWay(width, params.heads) for _ in range(params.layers))
        self.up = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.hyper = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width // 2))

    def forward(self, embedding: Tensor, pixels: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """embedding (N, C), pixels (N, grid * grid, C) -> mask logits (N, 2 grid, 2 grid) and the refined
        tokens (N, 2C)."""
        n, _, width = pixels.shape
        tokens = torch.cat([embedding[:, None], self.mask_token.expand(n, 1, width)], dim=1)
        for block in self.blocks:
            tokens, pixels = block(tokens, pixels)
        refined = tokens.flatten(1)
        # a convolution that steps by its own size is a linear map of each pixel; so the layout can stay
        weight = self.up.weight.permute(2, 3, 1, 0).flatten(0, 2)
        assert self.up.bias is not None
        up = F.gelu(F.linear(pixels, weight, self.up.bias.repeat(4))).view(n, -1, width // 2)
        logits = up @ self.hyper(refined).unsqueeze(-1) / (width // 2) ** 0.5
        return F.pixel_shuffle(logits.view(n, grid, grid, 4).permute(0, 3, 1, 2), 2)[:, 0], refined


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
            grid = features[index].shape[-2:]
            pixels = features[index].flatten(2).transpose(1, 2).index_select(0, image_of)
            if masks:
                guide = F.interpolate(masks[-1], size=grid, mode="bilinear")
                pixels = pixels * (1 + guide.flatten(1).sigmoid().unsqueeze(-1))
            mask, refined = scale(embeddings[:, index], pixels, grid[0])
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
