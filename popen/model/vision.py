"""Vision tower: an open_clip image encoder whose intermediate features make the levels."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from popen.errors import ModelError, flat
from popen.params import VisionParams

# OpenAI CLIP's normalisation of images in [0, 1]; used for towers of our own too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
OWN = "timm:"  # prefix of a tower that starts untrained


class Tower(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> features of each level, [(B, width, h, w)], in `levels`' order."""

    mean: Tensor
    std: Tensor

    def __init__(self, params: VisionParams, pretrained: bool = True) -> None:
        """`pretrained` False leaves published weights out: the tower starts at random.

        Raises ModelError for weights that cannot be read or do not fit, and for a level that is not there.
        """
        super().__init__()
        self.net: Any = _build(params, pretrained)
        self.levels = params.levels
        self.places: nn.ParameterList | None = None
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            probe = self.eval()(torch.zeros(1, 3, params.image_size, params.image_size))
        self.widths = [level.shape[1] for level in probe]
        self.grids = [level.shape[-1] for level in probe]
        # a ViT's features know their place; those of convolutions must be told it
        own = params.name.startswith(OWN)
        self.places = nn.ParameterList(_sincos(*level.shape[1:]) for level in probe) if own else None
        if not params.untrained:
            self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        order = sorted(set(self.levels))
        output = self.net.forward_intermediates(
            (images - self.mean) / self.std, indices=order, stop_early=True, intermediates_only=True
        )
        by_level = dict(zip(order, output["image_intermediates"], strict=True))
        features = [by_level[level] for level in self.levels]
        if self.places is None:
            return features
        return [feature + place for feature, place in zip(features, self.places, strict=True)]


def _sincos(width: int, height: int, breadth: int) -> nn.Parameter:
    """Two-dimensional sine-cosine code (1, width, height, breadth), where a learned one starts."""
    with torch.device("cpu"):  # also where the model is built on another one
        rates = math.pi * 2.0 ** torch.arange(width // 4).float().div(width // 4).mul(4)
        y, x = torch.linspace(0, 1, height), torch.linspace(0, 1, breadth)
        rows, columns = (
            torch.cat([(at[:, None] * rates).sin(), (at[:, None] * rates).cos()], 1) for at in (y, x)
        )
        grid = torch.cat([rows[:, None].expand(-1, breadth, -1), columns[None].expand(height, -1, -1)], -1)
    return nn.Parameter(0.5 * grid.permute(2, 0, 1)[None].to(torch.get_default_device()))


def _build(params: VisionParams, pretrained: bool) -> nn.Module:
    """The image encoder, cut down to what the levels need (what none needs would never train)."""
    import open_clip  # 4 s of imports: only where a tower is built
    from open_clip.timm_model import TimmModel

    if params.name.startswith(OWN):
        try:
            net = TimmModel(
                params.name.removeprefix(OWN),
                embed_dim=1,
                image_size=params.image_size,
                pool="avg",
                proj="linear",
            )
            net.trunk.prune_intermediate_layers(params.levels, prune_head=True)
        except Exception as error:  # of timm: an unknown name, a level that is not there
            raise ModelError(
                f"model.vision: {params.name} with the levels {params.levels} cannot be built "
                f"({flat(error)}); name a tower of timm's, and levels that it has"
            ) from error
        net.head = nn.Identity()
        return net
    try:
        model = open_clip.create_model(
            params.name,
            pretrained=(pretrained and params.pretrained) or None,
            device=torch.get_default_device(),  # open_clip's own default is the CPU, whatever torch's is
            force_image_size=params.image_size,  # position embeddings of another size are interpolated
            force_quick_gelu=params.pretrained == "openai",
            require_pretrained=pretrained and not params.untrained,
        )
        visual = cast(Any, model.visual)
        visual.prune_intermediate_layers(params.levels, prune_norm=True)
    except Exception as error:  # of open_clip, torch, safetensors or the hub
        raise ModelError(
            f"model.vision: {params.name} with the weights {params.pretrained or 'none'!r} cannot be built "
            f"({flat(error)}); name a tag of open_clip's or a whole checkpoint file in pretrained"
        ) from error
    return cast(nn.Module, visual)
