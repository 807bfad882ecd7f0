"""Codebook tokens, their fusion, and the look back at the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from popen.model.codebook import Codebook, spell, token_names

IMAGES = torch.arange(6) % 2


def test_an_answer_spells_every_target_with_all_tokens_in_order() -> None:
    names = token_names(2, 2)
    assert names == ["<seg_0_0>", "<seg_0_1>", "<seg_1_0>", "<seg_1_1>"]
    assert spell("a cup {seg} and {seg}.", names) == f"a cup {''.join(names)} and {''.join(names)}."


@pytest.fixture
def codebook() -> Codebook:
    torch.manual_seed(0)
    return Codebook(scales=2, tokens=3, hidden=4, width=5, vision=6)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))


def test_tokens_of_a_scale_are_averaged_at_first_then_weighted(codebook: Codebook, features: Tensor) -> None:
    hidden = torch.randn(6, 2, 3, 4)
    with torch.no_grad():
        codebook.value.weight.zero_()  # sees nothing: only the fused tokens are left
        codebook.value.bias.zero_()
        embeddings, looked = codebook(hidden, features, IMAGES)
        assert embeddings.shape == (6, 2, 5)
        assert looked.shape == (6, 2, 9)
        torch.testing.assert_close(embeddings, codebook.project(hidden.mean(2)))
        codebook.fuse[1] = torch.tensor([0.0, 100.0, 0.0])  # the second scale listens to its second token
        expected = torch.stack([hidden[:, 0].mean(1), hidden[:, 1, 1]], dim=1)
        torch.testing.assert_close(codebook(hidden, features, IMAGES)[0], codebook.project(expected))


def test_an_embedding_takes_what_is_where_it_looks_in_its_own_image(
    codebook: Codebook, features: Tensor
) -> None:
    hidden = torch.randn(6, 2, 3, 4)
    with torch.no_grad():
        codebook.query.weight.mul_(1e5)  # looks at one cell alone
        embeddings, looked = codebook(hidden, features, IMAGES)
        cells = codebook.value(codebook.norm(features.flatten(2).transpose(1, 2)))
        for target, image in enumerate(IMAGES.tolist()):
            for scale, cell in enumerate(looked[target].argmax(-1).tolist()):
                seen = embeddings[target, scale] - codebook.project(hidden[target, scale].mean(0))
                torch.testing.assert_close(seen, cells[image, cell], rtol=1e-3, atol=1e-4)


def test_an_embedding_looks_at_what_its_question_told_the_cells(features: Tensor) -> None:
    """Tokens of the language model are squares of the tower's cells: here four squares of 2 x 2 cells."""
    torch.manual_seed(0)
    codebook = Codebook(scales=1, tokens=1, hidden=4, width=5, vision=6, told=True)
    assert codebook.tell is not None
    hidden, told = torch.randn(1, 1, 1, 4), torch.zeros(1, 4, 4)
    larger = torch.nn.functional.interpolate(features[:1], size=(4, 4))
    image = torch.zeros(1, dtype=torch.long)
    _, before = codebook(hidden, larger, image, told)
    torch.testing.assert_close(before, codebook(hidden, larger, image)[1])
    told[0, 1] = torch.randn(4)  # the square at the top right
    _, after = codebook(hidden, larger, image, told)
    gained = (after - before)[0, 0].detach().view(4, 4)
    query = codebook.query(codebook.project(hidden[0, 0]))[0]
    torch.testing.assert_close(gained[:2, 2:], (query @ codebook.tell(told[0, 1]) / 5**0.5).expand(2, 2))
    gained[:2, 2:] = 0.0
    torch.testing.assert_close(gained, torch.zeros(4, 4))


def test_no_target_at_all_gives_no_embedding(codebook: Codebook, features: Tensor) -> None:
    embeddings, looked = codebook(torch.zeros(0, 2, 3, 4), features, torch.zeros(0, dtype=torch.long))
    assert embeddings.shape == (0, 2, 5)
    assert looked.shape == (0, 2, 9)
