"""Words that look at the image, in the question and in the answer: the identity at first, taught where their
things are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from popen.masks import decode
from popen.model import IGNORED
from popen.model.batches import Batch, Encoder, Row
from popen.model.generate import generate
from popen.model.look import NOTHING, Aim, Look, Match, aim_loss, look_loss, match_loss
from popen.model.losses import sft_loss, token_logps
from popen.model.segmenter import Segmenter
from popen.samples import Sample
from tests.conftest import WEIGHTS


def test_at_first_words_stay_what_they_are() -> None:
    words, image = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    read, looked = Look(8)(words, image, torch.arange(2))
    assert torch.equal(read, words)
    assert looked.shape == (2, 5, 10)


def test_a_word_reads_where_it_looks_and_nothing_at_the_sink() -> None:
    torch.manual_seed(0)
    look = Look(6)
    torch.nn.init.normal_(look.out.weight)
    words, image = torch.randn(3, 2, 6), torch.randn(3, 4, 6)
    read, looked = look(words, image, torch.arange(3))
    values = look.out(look.value(look.norm_image(image)))
    torch.testing.assert_close(read - words, looked.softmax(-1)[..., :4] @ values)
    with torch.no_grad():
        look.query.weight.zero_()
        look.query.bias.copy_(torch.ones(6))
        look.sink.fill_(100.0)  # all that is asked for is there
    assert torch.equal(look(words, image, torch.arange(3))[0], words)


def test_look_loss_by_hand() -> None:
    dense = torch.zeros(2, 4, 4, dtype=torch.long)
    dense[0, :2, :2] = 1  # kind 0 fills the first of four cells,
    dense[0, 2, 0] = 1  # and a pixel of the third
    p = [[[0.5, 0.1, 0.2, 0.1, 0.1], [0.1, 0.2, 0.2, 0.2, 0.3]], [[0.1, 0.1, 0.1, 0.1, 0.6], [0.2] * 5]]
    kinds = torch.tensor([[0, NOTHING], [1, IGNORED]])  # the second image shows nothing of kind 1
    named = -(0.8 * math.log(0.5) + 0.2 * math.log(0.2)) - math.log(0.6)
    own = torch.tensor([0, 1])
    loss = look_loss(torch.log(torch.tensor(p)), kinds, own, dense)
    assert float(loss) == pytest.approx(named / 2 - math.log(0.3))
    # both rows about the first image, which shows nothing of kind 1
    assert float(look_loss(torch.log(torch.tensor(p)), kinds, torch.zeros_like(own), dense)) == float(loss)
    unknown = torch.full_like(kinds, IGNORED)
    assert float(look_loss(torch.log(torch.tensor(p)), unknown, own, dense)) == 0.0


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


def test_a_name_of_two_kinds_teaches_no_word_where_to_look(mini_model: Segmenter) -> None:
    """CHAIR's synonyms make one of "cup" and "mug": the word may mean either."""
    ours = mini_model.encoder
    encoder = Encoder(ours.tokenizer, ours.codebook, ours.image_tokens, ours.size, ["cup", "mug"], ours.grid)
    kinds = encoder.question_kinds("Where is the cup?")
    assert set(kinds) == {NOTHING, IGNORED}
    assert kinds.index(IGNORED) == ours.question_kinds("Where is the cup?").index(0)


def test_only_the_question_looks(mini_model: Segmenter, picture: Image.Image) -> None:
    """The answer's words are read as they are, the question's change with the image."""
    look = mini_model.look
    assert look is not None
    torch.nn.init.normal_(look.out.weight)
    batch = mini_model.encoder.batch([picture], [Row(0, "What could I use?", "It is the cup {seg}.")])
    plain = mini_model.language.get_input_embeddings()(batch.input_ids)
    image = mini_model.image_tokens(mini_model.tower(batch.images), batch.images)
    behind, _ = mini_model.read(batch.input_ids, image, batch.image_of_row, batch.asked)
    n, last = len(mini_model.encoder.prefix_ids), int(batch.asked[0])
    moved = (behind != plain[:, n:]).any(-1)[0]
    assert moved[: last + 1 - n].all()
    assert not moved[last + 1 - n :].any()
    opening, own = mini_model.prefix(image)[0], slice(n - mini_model.encoder.image_tokens, n)
    assert torch.equal(opening[own], image[0])
    assert torch.equal(opening[: own.start], plain[0, : own.start])
    prompt = mini_model.encoder.batch([picture], [Row(0, "What could I use?")])
    asking, _ = mini_model.read(prompt.input_ids, image, prompt.image_of_row)
    torch.testing.assert_close(asking[0], behind[0, : last + 1 - n])


def learnt(model: Segmenter, batch: Batch, part: str) -> float:
    """What 25 steps leave of a part of the loss, as a share of what it was."""
    weights = WEIGHTS.model_copy(update={part: 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        total, parts = sft_loss(model(batch), batch, weights)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts[part]))
    return losses[-1] / losses[0]


def test_where_words_look_is_learnt(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    row = Row(0, "Where is the cup?", "It is the cup {seg}.", kinds=["cup"])
    batch = mini_model.encoder.batch([picture], [row], [sample])
    assert learnt(mini_model, batch, "look") < 0.5


def test_aim_loss_by_hand() -> None:
    masks = torch.zeros(2, 4, 4)
    masks[1, :2, :2] = 1.0  # the second target fills the first of four cells, the first shows nothing
    p = [[[0.5, 0.1, 0.2, 0.1, 0.1], [0.1, 0.2, 0.2, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]]]
    aimed = torch.tensor([[1, 0, NOTHING]])
    loss = aim_loss(torch.log(torch.tensor(p)), aimed, masks)
    assert float(loss) == pytest.approx(-(math.log(0.5) + math.log(0.3)) / 2 - math.log(0.2))
    assert float(aim_loss(torch.log(torch.tensor(p)), torch.full_like(aimed, IGNORED), masks)) == 0.0


def test_an_answer_passes_by_what_it_has_named() -> None:
    torch.manual_seed(0)
    aim = Aim(6)
    words, image = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    rows = torch.arange(2)
    _, plain = aim(words, image, rows)
    naming = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    _, looked = aim.pass_by(words, image, rows, naming)
    torch.testing.assert_close(looked[1], plain[1])  # it has named nothing
    torch.testing.assert_close(looked[0, :2], plain[0, :2])  # so has this one when it names its first
    shares = plain[0].softmax(-1)
    first, second = (shares[at, :4] / shares[at].max() for at in (1, 3))
    taken = (plain - looked)[0, :, :4] / aim.fade
    torch.testing.assert_close(taken[2:4], first.expand(2, 4))
    torch.testing.assert_close(taken[4], first + second)
    torch.testing.assert_close(looked[..., 4], plain[..., 4])  # the sink is never used up


def test_a_cell_is_told_the_words_of_the_question_that_fit_it() -> None:
    torch.manual_seed(0)
    match = Match(6)
    torch.nn.init.normal_(match.whole)
    words, states, image = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(1, 4, 6)
    asks = torch.tensor([[True, True, False], [False, True, True]])
    both = torch.zeros(2, dtype=torch.long)
    told, fits = match(words, states, asks, image, both)
    values, cells = match.value(match.norm_states(states)), match.key(match.norm_image(image))[0]
    query = match.query(match.norm_words(words))
    for row, cell in [(0, 0), (0, 3), (1, 2)]:
        expected = sum(
            (1 / (1 + math.exp(1 - float(cells[cell] @ query[row, word]) / 6**0.5))) * values[row, word]
            for word in range(3)
            if asks[row, word]
        )
        whole = sum(float(cells[cell] @ query[row, word]) / 6**0.5 for word in range(3) if asks[row, word])
        torch.testing.assert_close(told[row, cell], expected + whole * match.whole)
        assert float(fits[row, cell]) == pytest.approx(whole, abs=1e-5)
    words[0, 2] = states[0, 2] = 100.0  # it does not ask
    torch.testing.assert_close(match(words, states, asks, image, both), (told, fits))


def test_a_question_fits_where_its_targets_are() -> None:
    fits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    masks = torch.zeros(3, 4, 4)  # cells of 2 x 2 pixels
    masks[0, :2, :2] = 1  # of row 1: all of the first cell
    masks[1, :2, 1:3] = 1  # and of row 1 again: half of the first, which both claim, and of the second
    loss = match_loss(fits, torch.tensor([1, 1, 2]), masks)  # of row 2 nothing shows, row 0 has no target
    logps = fits[1].log_softmax(0)
    assert loss.item() == pytest.approx(-float(2 / 3 * logps[0] + 1 / 3 * logps[1]))
    nothing = match_loss(fits, torch.tensor([2]), masks[2:])
    assert nothing.item() == 0.0


def test_what_only_the_question_says_is_found_in_the_image() -> None:
    """Aim and match alone, by one state that is the same for all questions: which of the cells has the colour
    that is asked for. Without the match it cannot be known."""
    colours = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))

    def loss(told: bool) -> float:
        torch.manual_seed(0)
        aim, match = Aim(8), Match(8)
        optimizer = torch.optim.AdamW([*aim.parameters(), *match.parameters()], 1e-2)
        value = torch.zeros(())
        for _ in range(200):
            shown = torch.stack([torch.randperm(5)[:4] for _ in range(32)])
            asked, shown = shown[:, :1], shown[:, torch.randperm(4)]
            image, words, rows = colours[shown], colours[asked], torch.arange(32)
            cells, _ = match(words, words, torch.ones(32, 1, dtype=torch.bool), image, rows)
            keys, _ = aim.remember(image, rows, cells if told else None)
            looked = aim.scores(torch.ones(32, 1, 8), keys)[:, 0]
            value = torch.nn.functional.cross_entropy(looked, (shown == asked).long().argmax(1))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        return value.item()

    assert loss(told=False) > 1.2  # ln 4 = 1.39
    assert loss(told=True) < 0.2


def test_an_answer_aims_at_the_target_that_it_comes_to(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    """Before each word that leads to a target, and before its first token; behind the last at nothing."""
    encoder, two = mini_model.encoder, [np.ones((32, 32), dtype=bool)] * 2
    alone = Row(0, "What?", "It is the cup {seg}.", two[:1])
    both = Row(0, "What could I use?", "It is the cup {seg} and the fork {seg}.", two)
    words_alone = Row(0, "What?", "It is the cup {seg}.")
    none = Row(0, "Where is the spoon?", "There is none.", [])
    batch = encoder.batch([picture], [alone, both, words_alone, none], [sample])
    assert batch.aimed is not None
    after = batch.input_ids.roll(-1, dims=1)  # what each place predicts
    aims = [
        {number: after[row][batch.aimed[row] == number] for number in (0, 1, 2, NOTHING)} for row in range(4)
    ]
    first = f" {encoder.codebook[0]}"

    def read(ids: torch.Tensor) -> str:
        return str(mini_model.tokenizer.decode(ids))

    assert read(aims[0][0]).strip() == f"It is the cup{first}"
    assert read(aims[0][NOTHING]).strip() == f".{mini_model.tokenizer.eos_token}"
    assert read(aims[1][1]).strip() == f"It is the cup{first}"
    assert read(aims[1][2]).strip() == f"and the fork{first}"
    assert read(aims[1][NOTHING]).strip() == f".{mini_model.tokenizer.eos_token}"
    assert (batch.aimed[2] == IGNORED).all()  # of these masks nothing is known
    assert read(aims[3][NOTHING]).strip() == f"There is none.{mini_model.tokenizer.eos_token}"
    told = [sum(len(places) for places in aim.values()) for aim in aims]
    assert told == [int((row != IGNORED).sum()) for row in batch.aimed]
    assert encoder.batch([picture], [alone]).aimed is None


def test_a_generated_answer_looks_as_a_forward_pass_does(mini_model: Segmenter, picture: Image.Image) -> None:
    """Its likelihood is that of the same tokens fed, and what is looked at changes it."""
    aim = mini_model.aim
    assert aim is not None
    question = Row(0, "What could I drink from, then?")
    before = generate(mini_model, [picture], [question], 8)[0]
    torch.manual_seed(1)
    torch.nn.init.normal_(aim.out.weight)
    answer = generate(mini_model, [picture], [question], 8)[0]
    assert answer.token_ids != before.token_ids
    batch = mini_model.encoder.batch([picture], [question])
    ids = torch.cat([batch.input_ids, torch.tensor([answer.token_ids])], dim=1)
    labels = ids.clone()
    labels[:, : batch.input_ids.shape[1]] = IGNORED
    whole = replace(batch, input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    with torch.no_grad():
        logps = token_logps(mini_model(whole).logits, whole)[0, batch.input_ids.shape[1] :]
    assert set(answer.token_ids).isdisjoint(
        mini_model.tokenizer.convert_tokens_to_ids(mini_model.encoder.codebook)
    )
    assert float(logps.mean()) == pytest.approx(answer.logp, abs=1e-4)


def test_which_cells_a_question_fits_is_learnt(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    """Also where the masks are not drawn."""
    mask = np.zeros((32, 32), dtype=bool)
    mask[:8, :8] = True  # one cell of 4 x 4
    row = Row(0, "Where is the cup?", "It is the cup {seg}.", [mask], drawn=False)
    batch = mini_model.encoder.batch([picture], [row], [sample])
    assert learnt(mini_model, batch, "match") < 0.5


def test_where_answers_look_is_learnt(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    masks = [decode(target.rle) for target in sample.targets]
    batch = mini_model.encoder.batch([picture], [Row(0, sample.question, sample.answer, masks)], [sample])
    assert learnt(mini_model, batch, "aim") < 0.7
