"""The pixel decoder: shapes, gradients, and what depends on what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.model.decoder import Neck, PixelDecoder, Scale, TwoWay
from popen.params import DecoderParams

WIDTH, SIZE = 8, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(detail: int = 3, layers: int = 2) -> tuple[Neck, PixelDecoder]:
    torch.manual_seed(0)
    neck = Neck([6, 5], [2, 4], WIDTH)
    params = DecoderParams(width=WIDTH, heads=2, layers=layers, tokens=1, detail=detail)
    return neck, PixelDecoder(params, 2, SIZE)


def levels(images: int) -> list[Tensor]:
    return [normal(images, 6, 2, 2, seed=1), normal(images, 5, 4, 4, seed=2)]


@pytest.mark.parametrize("detail", [0, 3])
def test_shapes_and_a_gradient_for_every_parameter(detail: int) -> None:
    neck, decoder = parts(detail)
    features = neck(levels(2))
    assert [tuple(feature.shape) for feature in features] == [(2, WIDTH, 2, 2), (2, WIDTH, 4, 4)]
    embeddings = normal(3, 2, WIDTH).requires_grad_()
    masks = decoder(embeddings, features, torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 1, 1]))
    assert masks.shape == (3, SIZE, SIZE)
    masks.pow(2).sum().backward()
    for module in (neck, decoder):
        for name, parameter in module.named_parameters():
            # the tokens of the last scale feed the detail branch alone
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(-1) > 0).all()  # of every target and scale


def test_a_target_sees_its_own_image_and_embedding_alone() -> None:
    neck, decoder = parts()
    features, images = neck(levels(2)), torch.rand(2, 3, SIZE, SIZE)
    embeddings, image_of = normal(3, 2, WIDTH), torch.tensor([0, 1, 1])
    masks = decoder(embeddings, features, images, image_of)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(decoder(embeddings[order], features, images, image_of[order]), masks[order])
    alone = decoder(embeddings[2:], [f[1:] for f in features], images[1:], torch.tensor([0]))
    torch.testing.assert_close(alone[0], masks[2])
    assert not torch.allclose(masks[1], masks[2])  # the same image, another embedding
    other = decoder(embeddings, features, images, torch.tensor([1, 1, 1]))
    assert not torch.allclose(other[0], masks[0])  # the same embedding, another image


def test_the_coarse_mask_guides_the_finer_scale() -> None:
    """With the coarse logits themselves left out of the sum, its embedding still moves the mask."""
    neck, decoder = parts()
    with torch.no_grad():
        decoder.weights[0] = 0.0
    features, images = neck(levels(1)), torch.rand(1, 3, SIZE, SIZE)
    embeddings, image_of = normal(1, 2, WIDTH), torch.tensor([0])
    moved = embeddings.clone()
    moved[:, 0] += 1.0
    before, after = (decoder(e, features, images, image_of) for e in (embeddings, moved))
    assert not torch.allclose(before, after, atol=1e-6)


def test_untrained_masks_are_mostly_background() -> None:
    neck, decoder = parts(detail=0)
    masks = decoder(normal(4, 2, WIDTH), neck(levels(1)), torch.rand(1, 3, SIZE, SIZE), torch.zeros(4).long())
    assert float((masks > 0).float().mean()) < 0.1


def test_attention_is_torchs_with_a_key_value_and_query_of_every_pixel() -> None:
    torch.manual_seed(0)
    block = TwoWay(WIDTH, heads=2)
    tokens, pixels = normal(3, 2, WIDTH, seed=3), normal(3, 16, WIDTH, seed=4)

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        q, key, value = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
        return F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)

    normed = block.norm_pixels(pixels)
    said = tokens + block.out(attend(block.q(block.norm_tokens(tokens)), block.kv(normed)))
    said = said + block.mlp(block.norm_mlp(said))
    back = pixels + block.out_back(attend(block.q_back(normed), block.kv_back(block.norm_back(said))))
    torch.testing.assert_close(block(tokens, pixels), (said, back))


def test_a_mask_is_the_convolutions_at_twice_the_grid() -> None:
    scale = parts()[1].scales[0]
    assert isinstance(scale, Scale)
    scale.blocks = nn.ModuleList()
    pixels, embedding = normal(2, 16, WIDTH, seed=5), normal(2, WIDTH, seed=6)
    mask, refined = scale(embedding, pixels, 4)
    up = F.gelu(scale.up(pixels.transpose(1, 2).unflatten(2, (4, 4))))
    expected = torch.einsum("nchw,nc->nhw", up, scale.hyper(refined)) / (WIDTH // 2) ** 0.5
    torch.testing.assert_close(mask, expected)
