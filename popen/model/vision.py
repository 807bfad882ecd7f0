"""Vision tower: an open_clip ViT whose blocks give the features of several levels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from popen.params import VisionParams

# OpenAI CLIP's normalisation of images in [0, 1]; used for towers of our own too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Tower(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> features of each level, [(B, width, h, w)], in the order of `levels`."""

    mean: Tensor
    std: Tensor

    def __init__(self, params: VisionParams) -> None:
        super().__init__()
        self.vit: Any = _build_vit(params)
        blocks = len(self.vit.transformer.resblocks)
        self.levels = [level % blocks for level in params.levels]
        self.width = int(self.vit.conv1.out_channels)
        self.grid = params.image_size // int(self.vit.patch_size[0])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.vit.prune_intermediate_layers(self.levels, prune_norm=True)  # what no level needs would never train

    def forward(self, images: Tensor) -> list[Tensor]:
        output = self.vit.forward_intermediates(
            (images - self.mean) / self.std, indices=self.levels, stop_early=True, intermediates_only=True
        )
        by_depth = dict(zip(sorted(set(self.levels)), output["image_intermediates"], strict=True))
        return [by_depth[level] for level in self.levels]


def _build_vit(params: VisionParams) -> nn.Module:
    import open_clip  # 4 s of imports: only where a tower is built
    from open_clip.transformer import VisionTransformer

    if params.name == "custom":
        return VisionTransformer(
            image_size=params.image_size,
            patch_size=params.patch_size,
            width=params.width,
            layers=params.layers,
            heads=params.heads,
            mlp_ratio=3.0,
            output_dim=params.width,
        )
    model = open_clip.create_model(
        params.name,
        pretrained=params.pretrained or None,
        force_image_size=params.image_size,
        force_quick_gelu=params.pretrained == "openai",
        require_pretrained=bool(params.pretrained),
    )
    return cast(nn.Module, model.visual)
