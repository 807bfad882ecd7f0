"""Words that look at the image: the identity at first, taught where their things are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from popen.model import IGNORED
from popen.model.batches import Row
from popen.model.look import Look, look_loss
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.samples import Sample
from tests.conftest import WEIGHTS


def test_at_first_words_stay_what_they_are() -> None:
    words, image = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    assert torch.equal(Look(8)(words, image), words)


def test_what_words_read_is_the_attention_that_is_taught() -> None:
    """One word, one head: its values weighted as `where` says, the sink's with them."""
    torch.manual_seed(0)
    look = Look(6)  # no multiple of HEADS: one head
    torch.nn.init.normal_(look.out.weight)
    torch.nn.init.normal_(look.sink)
    words, image = torch.randn(3, 6), torch.randn(3, 4, 6)
    weights = look.where(words, image).softmax(-1)
    assert weights.shape == (3, 5)
    values = torch.cat([look.kv(look.norm_image(image)), look.sink.expand(3, -1, -1)], 1)[..., 6:]
    expected = words + look.out(torch.einsum("np,npd->nd", weights, values))
    torch.testing.assert_close(look(words[:, None], image)[:, 0], expected)


def test_look_loss_by_hand() -> None:
    dense = torch.zeros(2, 4, 4, dtype=torch.long)
    dense[0, :2, :2] = 1  # kind 0 fills the first of four cells,
    dense[0, 2, 0] = 1  # and a pixel of the third
    logits = torch.log(torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]]))
    first = -(0.8 * torch.log(torch.tensor(0.5)) + 0.2 * torch.log(torch.tensor(0.2)))
    absent = -torch.log(torch.tensor(0.6))  # the second image shows nothing of kind 1
    loss = look_loss(logits, torch.tensor([0, 1]), dense)
    assert float(loss) == pytest.approx(float(first + absent) / 2)
    assert float(look_loss(logits[:0], torch.tensor([], dtype=torch.long), dense[:0])) == 0.0


def test_names_in_a_question_are_found(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    question = "Where are the cup and the fork?"
    tokens = mini_model.encoder.question_ids(question)
    kinds = mini_model.encoder.question_kinds(question)
    assert len(tokens) == len(kinds)
    read = {
        mini_model.tokenizer.decode([t]).strip(): k
        for t, k in zip(tokens, kinds, strict=True)
        if k != IGNORED
    }
    assert read == {"cup": 0}  # "fork" is two tokens of this small vocabulary
    row = Row(0, question, "It is the cup {seg} and the fork {seg}.")
    batch = mini_model.encoder.batch([picture], [row], [sample])
    assert batch.named is not None
    rows, places = (batch.named != IGNORED).nonzero(as_tuple=True)
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
    embeds = mini_model.embed(batch.input_ids, image, batch.image_of_row, batch.asked)
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
