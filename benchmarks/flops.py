"""Model FLOPs: what the arithmetic of the method needs, not what a machine happened to do.

With N the weights of the language model's linear layers below the head, D its width, V its vocabulary:

    forward     2 N a token + 4 D (tokens it sees) a token and layer, for the attention + 2 V D a token whose
                successor is scored; the tower's and the projector's, counted for one image
    backward    of a frozen layer as much as its forward (activations only), of the attention twice its
                forward, of what trains (head, projector, LoRA) twice its forward; the frozen tower has none

Rows that share an image share its tokens, padding is no work, nothing is recomputed. Codebook, neck, decoder
and elementwise work are left out: the utilisation is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from popen.model.batches import Batch
from popen.model.segmenter import Segmenter

PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s in bf16, dense (NVIDIA's data sheets of the SXM cards)


def peak(device: torch.device) -> float | None:
    """FLOP/s of the device in bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for card, value in PEAK.items() if card in name), None)


@dataclass(frozen=True)
class Flops:
    """Sizes that the formulas need."""

    frozen: int  # N without LoRA
    adapters: int  # weights of LoRA
    head: int  # V D
    width: int
    layers: int
    tower: float  # forward of one image
    projector: float

    @classmethod
    def of(cls, model: Segmenter) -> Flops:
        """Read the sizes off a model; tower and projector are counted on one image."""
        layers = model.causal.base_model.layers
        named = [
            (name, part.weight.numel())
            for name, part in layers.named_modules()
            if isinstance(part, nn.Linear)
        ]
        lora = sum(count for name, count in named if "lora_" in name)
        image = torch.zeros(1, 3, model.encoder.size, model.encoder.size, device=model.device)
        model.tower.requires_grad_(True)  # else attention takes a fused path that no counter sees
        with FlopCounterMode(display=False) as counter:
            features = model.tower(image)
        tower = float(counter.get_total_flops())
        model.tower.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.projector(features[0].detach())
        config = model.causal.config
        return cls(
            sum(count for _, count in named) - lora,
            lora,
            config.vocab_size * config.hidden_size,
            config.hidden_size,
            config.num_hidden_layers,
            tower,
            float(counter.get_total_flops()),
        )

    def _attention(self, pairs: float) -> float:
        """Forward over so many (token, token it sees) pairs, scores and values."""
        return 4 * self.width * self.layers * pairs

    def seen(self, images: int, prefix: int, rests: list[int]) -> float:
        """Pairs of tokens: a prefix once an image, the rest of each row behind it."""
        return images * prefix**2 / 2 + sum(rest * (prefix + rest / 2) for rest in rests)

    def step(self, batch: Batch, prefix: int) -> float:
        """One training step."""
        rests = batch.attention_mask[:, prefix:].sum(1).tolist()
        images = len(batch.images)
        tokens = images * prefix + sum(rests)
        trained = (
            2 * self.adapters * tokens + 2 * self.head * int(batch.answered.sum()) + images * self.projector
        )
        attended = self._attention(self.seen(images, prefix, rests))
        return 2 * 2 * self.frozen * tokens + 3 * (trained + attended) + images * self.tower

    def forward(self, images: int, prefix: int, rests: list[int], scored: int) -> float:
        """A forward pass alone; with a cache of keys and values word by word costs the same."""
        tokens = images * prefix + sum(rests)
        return (
            2 * (self.frozen + self.adapters) * tokens
            + self._attention(self.seen(images, prefix, rests))
            + 2 * self.head * scored
            + images * (self.tower + self.projector)
        )
