"""Correcting sampled answers by the ground truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popen.data.scenes import noise as noises
from popen.data.scenes import questions
from popen.data.scenes.composition import compose
from popen.masks import encode
from popen.params import NoiseParams
from popen.preference.text import correct
from popen.samples import SEG, Region, Sample


def thing(name: str, kind: str, place: int = 0) -> Region:
    """A region of its own at `place`; regions at one place are the same thing."""
    return Region(name, kind, {"size": [8, 8], "counts": str(place)})


CUP, FORK, KNIFE = (
    thing("the red cup", "cup", 1),
    thing("the fork", "fork", 2),
    thing("the knife", "knife", 3),
)
LEFT, RIGHT = thing("the left apple", "apple", 4), thing("the right apple", "apple", 5)
PLATE = thing("the plate", "plate", 6)
TABLE = (CUP, FORK, KNIFE, LEFT, RIGHT, PLATE)


def ask(*targets: Region, objects: tuple[Region, ...] = TABLE, answer: str | None = None) -> Sample:
    said = ", ".join(f"{target.name} {SEG}" for target in targets) or "nothing here"
    return Sample(
        uid="muse/val/0/0",
        benchmark="muse",
        split="val",
        image="0.png",
        height=8,
        width=8,
        question="What?",
        answer=answer or f"Ground truth: {said}.",
        targets=targets,
        objects=objects,
    )


@pytest.mark.parametrize(
    ("sampled", "targets", "corrected", "order"),
    [
        # right as it is, in the model's own words and order
        ("You need the knife {seg} and the fork {seg}.", (FORK, KNIFE), None, (KNIFE, FORK)),
        ("You need a cup {seg}.", (CUP,), None, (CUP,)),
        # hallucinated: a spoon that is not there; asked for something else: a plate that is
        ("You need the fork {seg} and the spoon {seg}.", (FORK,), "You need the fork {seg}.", (FORK,)),
        (
            "You need the spoon {seg}, the fork {seg}, the plate {seg} and the knife {seg}!",
            (FORK, KNIFE),
            "You need the fork {seg} and the knife {seg}!",
            (FORK, KNIFE),
        ),
        ("A {seg}, the fork {seg}, and the knife {seg}.", (FORK, KNIFE),
         "The fork {seg} and the knife {seg}.", None),
        # missing
        ("Take the fork {seg}.", (FORK, KNIFE), "Take the fork {seg} and the knife {seg}.", (FORK, KNIFE)),
        ("Take the knife {seg}.", (CUP, FORK, KNIFE),
         "Take the red cup {seg}, the fork {seg} and the knife {seg}.", None),
        ("Take the knife {seg} plus the red cup {seg}.", (CUP, FORK, KNIFE),
         "Take the fork {seg}, the knife {seg} plus the red cup {seg}.", (FORK, KNIFE, CUP)),
        # wrong one of the same kind, said where a kept list is left alone
        ("You could eat the left apple {seg}; the fork {seg} helps.", (RIGHT, FORK),
         "You could eat the right apple {seg}; the fork {seg} helps.", (RIGHT, FORK)),
        ("I see the apple {seg}.", (RIGHT,), "I see the right apple {seg}.", (RIGHT,)),
        # one of two is called wrong: both get their names, in the data set's order
        ("The left apple {seg} and the green apple {seg}.", (RIGHT, LEFT),
         "The right apple {seg} and the left apple {seg}.", (RIGHT, LEFT)),
        ("The green apple {seg}, the fork {seg} and the left apple {seg}.", (LEFT, RIGHT, FORK),
         "The left apple {seg}, the fork {seg} and the right apple {seg}.", (LEFT, FORK, RIGHT)),
        # both are right, in another order than the data set's
        ("The right apple {seg} and the left apple {seg}.", (LEFT, RIGHT), None, (RIGHT, LEFT)),
        # said twice
        ("The fork {seg}, the fork {seg} and the knife {seg}.", (FORK, KNIFE),
         "The fork {seg} and the knife {seg}.", None),
        # a capital stays at the start of the answer and nowhere else
        ("The fork {seg}.", (CUP, FORK), "The red cup {seg} and the fork {seg}.", (CUP, FORK)),
        ("The fork {seg}; the knife {seg}, the left apple {seg} or the red cup {seg}",
         (FORK, KNIFE, RIGHT, CUP),
         "The fork {seg}; the knife {seg}, the right apple {seg} or the red cup {seg}", None),
        # an invented and a forgotten thing at once: as many phrases, hence the model's own joints
        ("The spoon {seg}; the fork {seg}", (FORK, KNIFE), "The fork {seg}; the knife {seg}", None),
        # more than a list: what is said about a thing is not true of the next one
        ("Put the red cup {seg} on the spoon {seg} and the plate {seg}.", (CUP, PLATE),
         "Ground truth: the red cup {seg}, the plate {seg}.", None),
        ("Put the red cup {seg} on the plate {seg}.", (CUP, PLATE, FORK),
         "Ground truth: the red cup {seg}, the plate {seg}, the fork {seg}.", None),
        ("The spoon {seg} with the fork {seg}", (FORK, KNIFE),
         "Ground truth: the fork {seg}, the knife {seg}.", None),
        # nothing added or taken away: the sentence stays
        ("Put the left apple {seg} on the plate {seg}.", (RIGHT, PLATE),
         "Put the right apple {seg} on the plate {seg}.", None),
    ],
)  # fmt: skip
def test_correction(
    sampled: str, targets: tuple[Region, ...], corrected: str | None, order: tuple[Region, ...] | None
) -> None:
    result = correct(sampled, ask(*targets))
    assert result.answer == (corrected or sampled)
    assert result.targets == (order or targets)
    assert result.changed == (corrected is not None)


@pytest.mark.parametrize("sampled", ["It is the spoon {seg}.", "There is no such thing.", "", "{seg}"])
def test_nothing_right_gives_the_answer_of_the_data_set(sampled: str) -> None:
    sample = ask(FORK, KNIFE)
    result = correct(sampled, sample)
    assert (result.answer, result.targets, result.changed) == (sample.answer, (FORK, KNIFE), True)


@pytest.mark.parametrize(
    ("sampled", "truth", "corrected"),
    [
        ("They are the fork {seg} and the spoon {seg}.", "it is the fork {seg}.", "It is the fork {seg}."),
        ("Well, here is the fork {seg}.", "here are the fork {seg} and the knife {seg}.",
         "Well, here are the fork {seg} and the knife {seg}."),
        # a data set that says "it is" of several things keeps saying so
        ("It is the fork {seg}.", "It is the fork {seg} and the knife {seg}.",
         "It is the fork {seg} and the knife {seg}."),
        # the number did not change: neither does the opening
        ("it is the fork {seg} and the spoon {seg}.", "they are the fork {seg} and the knife {seg}.",
         "it is the fork {seg} and the knife {seg}."),
    ],
)  # fmt: skip
def test_the_opening_follows_the_number_of_things(sampled: str, truth: str, corrected: str) -> None:
    targets = (FORK, KNIFE)[: truth.count(SEG)]
    assert correct(sampled, ask(*targets, answer=truth)).answer == corrected


def test_noisy_answers_about_scenes_are_corrected_to_the_true_ones_word_for_word() -> None:
    noise = NoiseParams(absent_mentioned=1.0, present_dropped=1.0, mask_coarse=0.0)
    spoiled = 0
    for seed in range(8):
        scene, rng = compose((seed,), 64, crowded=seed % 2 == 0), np.random.default_rng(seed)
        objects = tuple(Region(shown.name, shown.kind, encode(shown.mask)) for shown in scene.things)
        for question in questions.ask(scene, rng, 6):
            right = noises.truth(scene, question)
            truth, said = (
                questions.answer_text(question.opening, [mention.name for mention in mentions])
                for mentions in (right, noises.noisy(scene, question, rng, noise))
            )
            targets = tuple(objects[mention.region] for mention in right)
            assert correct(said, ask(*targets, objects=objects, answer=truth)).answer == truth
            spoiled += said != truth
    assert spoiled > 10


def test_no_target() -> None:
    sample = ask(answer="There is nothing to drink from.")
    wrong = correct("You could use the red cup {seg}.", sample)
    assert (wrong.answer, wrong.targets, wrong.changed) == (sample.answer, (), True)
    right = correct("I see nothing of the kind.", sample)
    assert (right.answer, right.targets, right.changed) == ("I see nothing of the kind.", (), False)


def test_targets_of_one_name_are_told_apart_by_order() -> None:
    first, second = thing("the person at the left", "person", 1), thing("the person at the left", "person", 2)
    sample = ask(first, second, objects=())
    one = correct("I see the person at the left {seg}.", sample)
    assert one.answer == "I see the person at the left {seg} and the person at the left {seg}."
    assert one.targets == (first, second)


def test_targets_of_one_name_are_told_apart_by_their_masks() -> None:
    """With the masks the other way round each is compared with the truth of the other."""
    first, second = thing("the cup", "cup", 1), thing("the cup", "cup", 2)
    sample = ask(first, second, objects=(first, second))
    said = "It is the cup {seg} and the cup {seg}."
    swapped = correct(said, sample, [[0.0, 0.9], [0.9, 0.0]])
    assert (swapped.changed, swapped.targets) == (False, (second, first))
    # the second phrase is the surer one, though the first would have done
    assert correct(said, sample, [[0.6, 0.1], [0.9, 0.2]]).targets == (second, first)
    assert correct(said, sample, [[0.9, 0.0], [0.0, 0.9]]).targets == (first, second)


def test_words_about_a_target_without_a_name_are_right() -> None:
    """ReasonSeg names nothing: a pair would teach the style of its explanations."""
    target = thing("", "", 1)
    sample = ask(target, objects=(), answer="It is {seg}. Because.")
    said = correct("It is {seg}.", sample, [[0.1]])
    assert (said.answer, said.targets, said.changed) == ("It is {seg}.", (target,), False)
    assert correct("It is {seg} and {seg}.", sample, [[0.1], [0.2]]).answer == sample.answer


def test_a_target_listed_among_the_objects_by_its_kind_is_no_rival() -> None:
    sample = ask(CUP, objects=(thing("cup", "cup", 1), FORK))
    assert not correct("Use the cup {seg}.", sample).changed
    rival = ask(CUP, objects=(thing("cup", "cup", 1), thing("cup", "cup", 9)))
    assert correct("Use the cup {seg}.", rival).answer == "Use the red cup {seg}."


def test_a_phrase_of_the_right_kind_is_right_where_its_mask_is() -> None:
    """There are several true names for a thing; the mask says which thing the model means."""
    left, right = thing("the left cup", "cup", 1), thing("the right cup", "cup", 9)
    sample = ask(right, objects=(left, right))
    said = "Take the red cup {seg}."
    assert correct(said, sample).answer == "Take the right cup {seg}."  # words alone cannot tell
    assert not correct(said, sample, [[0.5]]).changed
    assert correct(said, sample, [[0.49]]).answer == "Take the right cup {seg}."
    # a name that is another thing's, or of another kind, is wrong wherever the mask lies
    assert correct("Take the left cup {seg}.", sample, [[0.9]]).answer == "Take the right cup {seg}."
    assert correct("Take the fork {seg}.", sample, [[0.9]]).answer == sample.answer
    both = ask(left, right, objects=(left, right))
    swapped = correct("Take the small cup {seg} and the big cup {seg}.", both, [[0.0, 0.8], [0.8, 0.0]])
    assert (swapped.changed, swapped.targets) == (False, (right, left))


def test_names_of_a_kind_go_together() -> None:
    """What a right mask keeps alone would name two forks "the bottom fork" and "the right fork"."""
    top, bottom = thing("the top cup", "cup", 1), thing("the bottom cup", "cup", 9)
    both = ask(top, bottom, objects=(top, bottom))
    said = "Take the left cup {seg} and the right cup {seg}."
    assert not correct(said, both, [[0.8, 0.0], [0.0, 0.8]]).changed
    one_right = correct(said, both, [[0.0, 0.4], [0.8, 0.0]])
    assert one_right.answer == "Take the top cup {seg} and the bottom cup {seg}."
    assert one_right.targets == (top, bottom)
    single = thing("the cup", "cup", 1)
    too_many = correct(said, ask(single, objects=(single,)), [[0.8], [0.0]])
    assert too_many.answer == "Take the cup {seg}."  # "the left cup" would say that there are two
    three = correct(
        "Take the left cup {seg}.", ask(top, bottom, FORK, objects=(top, bottom, FORK)), [[0.8, 0, 0]]
    )
    assert three.answer == "Take the top cup {seg}, the bottom cup {seg} and the fork {seg}."


def test_without_categories_names_decide() -> None:
    target = thing("the thing that keeps you dry", "", 1)
    sample = ask(target, objects=())
    assert not correct("It is the thing that keeps you dry {seg}.", sample).changed
    assert correct("It is the hat {seg}.", sample).answer == sample.answer


phrases = st.sampled_from([*(region.name for region in TABLE), "the spoon", "an apple", "the cup", "hats"])


@given(
    st.lists(phrases, max_size=5),
    st.lists(st.sampled_from(TABLE), max_size=4, unique_by=lambda region: region.name),
    st.sampled_from(["", "You need ", "In this picture, "]),
    st.sampled_from([", ", " and ", ", and ", " "]),
)
def test_a_corrected_answer_names_the_targets_once_each_and_needs_no_correction(
    said: list[str], targets: list[Region], prefix: str, joint: str
) -> None:
    sample = ask(*targets)
    result = correct(prefix + joint.join(f"{phrase} {SEG}" for phrase in said) + ".", sample)
    assert sorted(region.name for region in result.targets) == sorted(region.name for region in targets)
    assert result.answer.count(SEG) == len(targets)
    again = correct(result.answer, sample)
    assert not again.changed
    assert again.targets == result.targets
