"""Codebook tokens and their fusion."""

from __future__ import annotations

import torch

from popen.model.codebook import Codebook, spell, token_names


def test_an_answer_spells_every_target_with_all_tokens_in_order() -> None:
    names = token_names(2, 2)
    assert names == ["<seg_0_0>", "<seg_0_1>", "<seg_1_0>", "<seg_1_1>"]
    assert spell("a cup {seg} and {seg}.", names) == f"a cup {''.join(names)} and {''.join(names)}."


def test_tokens_of_a_scale_are_averaged_at_first_then_weighted() -> None:
    torch.manual_seed(0)
    codebook = Codebook(scales=2, tokens=3, hidden=4, width=5)
    hidden = torch.randn(6, 2, 3, 4)
    assert codebook(hidden).shape == (6, 2, 5)
    torch.testing.assert_close(codebook(hidden), codebook.project(hidden.mean(2)))
    with torch.no_grad():
        codebook.fuse[1] = torch.tensor([0.0, 100.0, 0.0])  # the second scale listens to its second token
    expected = torch.stack([hidden[:, 0].mean(1), hidden[:, 1, 1]], dim=1)
    torch.testing.assert_close(codebook(hidden), codebook.project(expected))
