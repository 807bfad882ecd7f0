"""Words that look at the image: the identity at first, taught where their things are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from popen.model import IGNORED
from popen.model.batches import Row
from popen.model.look import NOTHING, Look, look_loss
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.samples import Sample
from tests.conftest import WEIGHTS


def test_at_first_words_stay_what_they_are() -> None:
    words, image = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    read, looked = Look(8)(words, image)
    assert torch.equal(read, words)
    assert looked.shape == (2, 5, 10)


def test_a_word_reads_where_it_looks_and_nothing_at_the_sink() -> None:
    torch.manual_seed(0)
    look = Look(6)
    torch.nn.init.normal_(look.out.weight)
    words, image = torch.randn(3, 2, 6), torch.randn(3, 4, 6)
    read, looked = look(words, image)
    values = look.out(look.value(look.norm_image(image)))
    torch.testing.assert_close(read - words, looked.softmax(-1)[..., :4] @ values)
    with torch.no_grad():
        look.query.weight.zero_()
        look.query.bias.copy_(torch.ones(6))
        look.sink.fill_(100.0)  # all that is asked for is there
    assert torch.equal(look(words, image)[0], words)


def test_look_loss_by_hand() -> None:
    dense = torch.zeros(2, 4, 4, dtype=torch.long)
    dense[0, :2, :2] = 1  # kind 0 fills the first of four cells,
    dense[0, 2, 0] = 1  # and a pixel of the third
    p = [[[0.5, 0.1, 0.2, 0.1, 0.1], [0.1, 0.2, 0.2, 0.2, 0.3]], [[0.1, 0.1, 0.1, 0.1, 0.6], [0.2] * 5]]
    kinds = torch.tensor([[0, NOTHING], [1, IGNORED]])  # the second image shows nothing of kind 1
    named = -(0.8 * math.log(0.5) + 0.2 * math.log(0.2)) - math.log(0.6)
    loss = look_loss(torch.log(torch.tensor(p)), kinds, dense)
    assert float(loss) == pytest.approx(named / 2 - math.log(0.3))
    unknown = torch.full_like(kinds, IGNORED)
    assert float(look_loss(torch.log(torch.tensor(p)), unknown, dense)) == 0.0


def test_names_in_a_question_are_found(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    question = "Where are the cup and the fork?"
    tokens = mini_model.encoder.question_ids(question)
    kinds = mini_model.encoder.question_kinds(question)
    assert len(tokens) == len(kinds)
    read = {
        mini_model.tokenizer.decode([t]).strip(): k
        for t, k in zip(tokens, kinds, strict=True)
        if k != NOTHING
    }
    assert read == {"cup": 0}  # "fork" is two tokens of this small vocabulary
    row = Row(0, question, "It is the cup {seg} and the fork {seg}.")
    batch = mini_model.encoder.batch([picture], [row], [sample])
    assert batch.named is not None
    rows, places = (batch.named >= 0).nonzero(as_tuple=True)
    assert (batch.named == NOTHING).sum() == len(tokens) - 1
    assert mini_model.tokenizer.decode(batch.input_ids[rows[-1], places[-1]]).strip() == "cup"
    assert int(places[-1]) < int(batch.asked[0])
    elsewhere = replace(sample, benchmark="reasonseg")  # where not everything is annotated, nothing is absent
    unknown = mini_model.encoder.batch([picture], [row], [elsewhere]).named
    assert unknown is not None
    assert (unknown == IGNORED).all()
    assert mini_model.encoder.batch([picture], [row]).named is None


def test_only_the_question_looks(mini_model: Segmenter, picture: Image.Image) -> None:
    """The answer's words are read as they are, the question's change with the image."""
    look = mini_model.look
    assert look is not None
    torch.nn.init.normal_(look.out.weight)
    batch = mini_model.encoder.batch([picture], [Row(0, "What could I use?", "It is the cup {seg}.")])
    plain = mini_model.language.get_input_embeddings()(batch.input_ids)
    image = mini_model.image_tokens(mini_model.tower(batch.images))
    embeds, _ = mini_model.embed(batch.input_ids, image, batch.image_of_row, batch.asked)
    moved = (embeds != plain).any(-1)[0]
    n, last = len(mini_model.encoder.prefix_ids), int(batch.asked[0])
    assert moved[n : last + 1].all()
    assert not moved[last + 1 :].any()
    assert not moved[: n - mini_model.encoder.image_tokens].any()


def test_where_words_look_is_learnt(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    row = Row(0, "Where is the cup?", "It is the cup {seg}.", kinds=["cup"])
    batch = mini_model.encoder.batch([picture], [row], [sample])
    weights = WEIGHTS.model_copy(update={"look": 1.0})
    optimizer = torch.optim.AdamW(mini_model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        total, parts = sft_loss(mini_model(batch), batch, weights)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts["look"]))
    assert losses[-1] < 0.5 * losses[0]
