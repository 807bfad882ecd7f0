"""The model as a whole: shapes, padding, saving, and masks from the pass that generates."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from popen.masks import decode
from popen.model import IGNORED, segmenter
from popen.model.batches import Row
from popen.model.generate import generate
from popen.model.losses import cross_entropy, token_logps
from popen.model.segmenter import ModelError, Segmenter
from popen.samples import Sample


def rows(sample: Sample) -> list[Row]:
    masks = [decode(target.rle) for target in sample.targets]
    return [
        Row(0, sample.question, sample.answer, masks),
        Row(0, "Where?", "It is the cup {seg}.", masks[:1]),
    ]


def test_forward_shapes(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    batch = mini_model.encoder.batch([picture], rows(sample), [sample])
    output = mini_model(batch)
    assert output.embeddings.shape == (3, 2, 16)
    assert output.masks.shape == (3, 32, 32)
    assert len(output.logits) == int((batch.labels != IGNORED).sum())
    assert output.dense.shape[:2] == (1, 3)
    first = mini_model.encoder.first_id
    assert (batch.input_ids[batch.row_of_target, batch.positions[:, 0]] == first).all()


def test_only_what_is_drawn_costs_a_mask(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    """The undrawn targets keep their embeddings and where the words look for them; nothing else changes."""
    asked = [rows(sample)[0], dataclasses.replace(rows(sample)[1], drawn=False)]
    whole, part = (mini_model.encoder.batch([picture], some, [sample]) for some in (rows(sample), asked))
    assert whole.drawn is None
    assert part.of_drawn(part.row_of_target).tolist() == [0, 0]
    every, some = mini_model(whole), mini_model(part)
    torch.testing.assert_close(some.masks, every.masks[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.embeddings, every.embeddings)
    assert part.aimed is not None
    assert whole.aimed is not None
    assert part.aimed.tolist() == whole.aimed.tolist()
    none = mini_model.encoder.batch([picture], [dataclasses.replace(row, drawn=False) for row in asked])
    assert mini_model(none).masks.shape == (0, 32, 32)


def test_convolutions_have_their_channels_last(
    mini_model: Segmenter, picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    """Also when read back; where they lie in memory changes no number that matters."""
    batch = mini_model.encoder.batch([picture], rows(sample))
    mini_model.save(tmp_path)
    again = Segmenter.load(tmp_path)
    for model in (mini_model, again):
        weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    plain = Segmenter.load(tmp_path).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(again(batch).masks, mini_model(batch).masks)
    torch.testing.assert_close(plain(batch).masks, mini_model(batch).masks, atol=1e-4, rtol=1e-4)


def test_the_tower_keeps_its_statistics_in_training(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    """What is trained is what answers: the same masks, and no statistic of the batch is kept."""
    before = {name: value.clone() for name, value in mini_model.state_dict().items()}
    batch = mini_model.encoder.batch([picture], rows(sample))
    asked = mini_model(batch).masks
    torch.testing.assert_close(mini_model.train()(batch).masks, asked)
    assert mini_model.neck.training
    assert all(torch.equal(value, before[name]) for name, value in mini_model.state_dict().items())


def test_padding_changes_nothing(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    both = mini_model(mini_model.encoder.batch([picture], rows(sample)))
    alone = mini_model(mini_model.encoder.batch([picture], rows(sample)[1:]))
    torch.testing.assert_close(both.masks[2:], alone.masks, atol=1e-4, rtol=1e-4)


def test_masks_decoded_in_parts_are_those_decoded_at_once(
    mini_model: Segmenter, picture: Image.Image, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = mini_model.encoder.batch([picture], rows(sample))
    features = mini_model.tower(batch.images)
    embeddings = torch.randn(3, 2, 16)
    whole = mini_model.decode(embeddings, features, batch.images, batch.image_of_target)
    monkeypatch.setattr(segmenter, "AT_ONCE", 2)
    parts = mini_model.decode(embeddings, features, batch.images, batch.image_of_target)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    none = mini_model.decode(embeddings[:0], features, batch.images, batch.image_of_target[:0])
    assert none.shape == (0, 32, 32)


def test_generation_equals_a_teacher_forced_pass(mini_model: Segmenter, picture: Image.Image) -> None:
    """Masks, embeddings and likelihoods of a generated answer are those of a forward over the same tokens."""
    prompt_only = mini_model.encoder.batch([picture], [Row(0, "What?")])
    with torch.no_grad():  # an untrained model names no target: make the first codebook token likely
        last = mini_model.hidden(
            prompt_only, mini_model.image_tokens(mini_model.tower(prompt_only.images), prompt_only.images)
        )[0, -1]
        mini_model.causal.lm_head.weight[mini_model.encoder.first_id] = 3 * last / last.norm()
    question = [Row(0, "What?"), Row(0, "What could I drink from, then?")]
    found = 0
    for seed in range(4):
        for answer, row in zip(
            generate(mini_model, [picture], question, 24, temperature=1.0, seed=seed), question, strict=True
        ):
            n = len(answer.masks)
            found += n
            assert answer.text.count("{seg}") == n
            masks = [torch.zeros(32, 32, dtype=torch.bool).numpy()] * n
            batch = mini_model.encoder.batch([picture], [Row(0, row.question, "", masks[:0])])
            prompt = mini_model.encoder.prefix_ids + mini_model.encoder.question_ids(row.question)
            ids = torch.tensor([prompt + answer.token_ids])
            starts = [i for i, t in enumerate(ids[0].tolist()) if t == mini_model.encoder.first_id]
            batch = dataclasses.replace(
                batch,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                labels=torch.where(torch.arange(ids.shape[1]) < len(prompt), IGNORED, ids),
                row_of_target=torch.zeros(n, dtype=torch.long),
                positions=torch.tensor([list(range(s, s + 4)) for s in starts], dtype=torch.long).view(-1, 4),
            )
            output = mini_model(batch)
            torch.testing.assert_close(output.embeddings, answer.embeddings, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(output.masks, answer.masks, atol=1e-3, rtol=1e-3)
    assert found > 3


def test_greedy_answers_repeat_and_rows_are_independent(mini_model: Segmenter, picture: Image.Image) -> None:
    both = generate(mini_model, [picture], [Row(0, "What?"), Row(0, "Where is the cup?")], 12)
    alone = generate(mini_model, [picture], [Row(0, "What?")], 12)
    assert both[0].token_ids == alone[0].token_ids
    assert both[0].logp == pytest.approx(alone[0].logp, abs=1e-4)


def test_sampling_obeys_its_seed(mini_model: Segmenter, picture: Image.Image) -> None:
    def once(seed: int) -> list[int]:
        return generate(mini_model, [picture], [Row(0, "What?")], 12, 1.0, seed)[0].token_ids

    assert once(1) == once(1) != once(2)


def test_token_logps_by_hand(mini_model: Segmenter, picture: Image.Image) -> None:
    batch = mini_model.encoder.batch([picture], [Row(0, "What?"), Row(0, "What?", "")])
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, -2:] = torch.tensor([[IGNORED, 0], [1, 0]])
    batch = dataclasses.replace(batch, labels=labels)
    logits = torch.log(torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.25, 0.75]]))
    expected = torch.log(torch.tensor([[1.0, 0.2], [0.5, 0.25]]))
    logps = token_logps(logits, batch)
    torch.testing.assert_close(logps[:, -2:], expected)
    assert not logps[:, :-2].any()
    assert float(cross_entropy(logits, batch)) == pytest.approx(-float(expected.sum()) / 3)


def test_save_and_load(mini_model: Segmenter, picture: Image.Image, sample: Sample, tmp_path: Path) -> None:
    mini_model.save(tmp_path)
    again = Segmenter.load(tmp_path)
    batch = mini_model.encoder.batch([picture], rows(sample))
    torch.testing.assert_close(again(batch).masks, mini_model(batch).masks)
    torch.testing.assert_close(again(batch).logits, mini_model(batch).logits)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_image_tokens_that_cannot_be_put_together_are_refused(mini_model: Segmenter) -> None:
    params = mini_model.params
    three = params.model_copy(update={"vision": params.vision.model_copy(update={"shuffle": 3})})
    with pytest.raises(ModelError, match=r"model\.vision\.shuffle: 3 does not divide the tower's 4 places"):
        Segmenter(three, copy.deepcopy(mini_model.tokenizer), mini_model.categories)


def test_load_names_what_is_wrong(mini_model: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Segmenter.load(tmp_path)
    mini_model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    state.pop("decoder.bias")
    save_file(state, weights)
    with pytest.raises(ModelError, match=r"decoder\.bias"):
        Segmenter.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        Segmenter.load(tmp_path)
