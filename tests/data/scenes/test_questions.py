import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from popen.data.scenes.composition import Scene, compose
from popen.data.scenes.facts import DANGER, MATERIAL, NUTRITION, USES
from popen.data.scenes.kinds import KINDS, PARTNERS, plural
from popen.data.scenes.noise import noisy, truth
from popen.data.scenes.phrases import Thing, names
from popen.data.scenes.questions import NOTHING, Asked, answer_text, ask, possible
from popen.data.scenes.referring import by_look, by_place, in_a_sentence
from popen.params import NoiseParams

CLEAN = NoiseParams(absent_mentioned=0, present_dropped=0, mask_coarse=0)


def hand_made(*things: tuple[str, str, float, float]) -> Scene:
    """A scene of (kind, colour, x, y), left to right; masks of growing area."""
    made = []
    for number, (kind, colour, x, y) in enumerate(things):
        mask = np.zeros((64, 64), dtype=bool)
        mask[0, : 3 + number] = True
        made.append(Thing(kind, colour, 20, mask, x, y))
    named = names(made, 64)
    assert named is not None
    return Scene(Image.new("RGB", (64, 64)), tuple(named))


@pytest.fixture(scope="module")
def table() -> Scene:
    return hand_made(
        ("cup", "red", 10, 10), ("bowl", "blue", 22, 50), ("cup", "blue", 36, 20), ("apple", "red", 55, 44)
    )


def everything(scene: Scene) -> dict[str, tuple[int, ...]]:
    """Every question that can be asked, with its targets."""
    questions = possible(scene, np.random.default_rng(0))
    return {text: question.targets for question in questions for text, _ in question.wordings}


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("which is the second cup from the left?", (2,)),
        ("counting from the right, where is the second cup?", (0,)),
        ("which cup is not red?", (2,)),
        ("where are the cups?", (0, 2)),
        ("what would i need to eat soup?", (1,)),
        ("which things are red?", (0, 3)),
        ("which things are not red?", (1, 2)),
        ("what could i use to drink hot tea? i like the one on the right.", (2,)),
        ("what would break into pieces if it fell?", (0, 1, 2)),
        ("what can i eat here?", (3,)),
        ("what is to the left of the apple?", (0, 1, 2)),
        ("what do you see two of?", (0, 2)),
        ("what is in the left half?", (0, 1)),
        ("what is closest to the bottom edge?", (1,)),
    ],
)
def test_questions_have_the_targets_a_person_would_name(
    table: Scene, text: str, targets: tuple[int, ...]
) -> None:
    assert everything(table)[text] == targets


def test_answers_name_only_what_is_there() -> None:
    assert answer_text("it is", ["the red cup"]) == "it is the red cup {seg}."
    assert answer_text("here is", ["the cup", "the fork"]) == "here are the cup {seg} and the fork {seg}."
    assert answer_text("it is", []) == NOTHING


Population = list[tuple[Scene, list[Asked]]]


@pytest.fixture(scope="module")
def population() -> Population:
    scenes = [compose([11, 0, number], 64, number % 8 == 7) for number in range(120)]
    return [(scene, ask(scene, np.random.default_rng([11, n]), 5)) for n, scene in enumerate(scenes)]


def test_most_targets_have_a_twin_in_their_picture(population: Population) -> None:
    twins = [
        scene.counts[scene.things[target].kind] > 1
        for scene, questions in population
        for question in questions
        for target in question.targets
    ]
    assert np.mean(twins) > 0.6
    singles = [
        scene.counts[scene.things[question.targets[0]].kind] > 1
        for scene, questions in population
        for question in questions
        if len(question.targets) == 1
    ]
    assert np.mean(singles) > 0.5  # told apart by place, colour, size or order, not by kind


def test_kinds_of_questions_are_balanced(population: Population) -> None:
    kinds = Counter(question.kind for _, questions in population for question in questions)
    total = sum(kinds.values())
    assert {*kinds} >= {
        "use",
        "nutrition",
        "danger",
        "material",
        "order",
        "place",
        "colour",
        "size",
        "number",
        "list",
    }
    assert max(kinds.values()) / total < 0.3
    assert 0 < kinds["absent"] / total < 0.06
    assert total == 5 * len(population)


def test_the_vocabulary_is_small(population: Population) -> None:
    texts = []
    for scene, questions in population:
        for question in questions:
            named = [scene.things[n].name for n in question.targets]
            texts += [question.text, answer_text(question.opening, named)]
    words = set(re.findall(r"[a-z]+", " ".join(texts)))
    assert 150 < len(words) < 400
    assert all(text == text.lower() for text in texts)


def test_a_list_answers_with_everything_asked_for_that_is_there(population: Population) -> None:
    checked = absent = 0
    for scene, questions in population:
        for question in questions:
            if question.kind != "list" or "table" in question.text or "all the things" in question.text:
                continue
            named = {kind for kind in KINDS if re.search(rf"\b({kind}|{plural(kind)})\b", question.text)}
            expected = tuple(n for n, thing in enumerate(scene.things) if thing.kind in named)
            assert question.targets == expected
            checked += 1
            absent += len(named - set(scene.counts)) > 0
    assert checked > 40
    assert absent / checked > 0.3  # a plausible thing is asked for and not there


def test_targets_run_from_left_to_right(population: Population) -> None:
    for scene, questions in population:
        for question in questions:
            centres = [scene.things[n].x for n in question.targets]
            assert centres == sorted(centres)


def test_only_questions_with_enough_targets_are_asked() -> None:
    scene = compose([5, 0, 1], 64, crowded=True)
    for question in ask(scene, np.random.default_rng(0), 4, least=4, most=6):
        assert 4 <= len(question.targets) <= 6


def test_every_fact_speaks_of_known_kinds() -> None:
    groups = [*USES.values(), *(kinds for _, kinds in NUTRITION + DANGER + MATERIAL)]
    assert {kind for kinds in groups for kind in kinds} <= set(KINDS)
    assert set(PARTNERS) == set(KINDS)


def test_referring_words_single_one_thing_out() -> None:
    scene = hand_made(
        ("cup", "red", 10, 10), ("cup", "red", 30, 40), ("cup", "blue", 50, 20), ("fork", "red", 60, 50)
    )
    assert by_look(scene, 2) == []  # two of the three cups look alike
    assert "second cup from the left" in by_place(scene, 1)
    assert "second cup from the right" in by_place(scene, 1)
    assert by_look(scene, 3) == ["red fork", "fork that is red", "fork"]
    assert "the red fork that lies on the right half of the table" in in_a_sentence(scene, 3)


def test_zero_noise_is_the_truth(population: Population) -> None:
    for scene, questions in population:
        for question in questions:
            assert noisy(scene, question, np.random.default_rng(0), CLEAN) == truth(scene, question)


def test_an_absent_partner_is_named_as_often_as_asked(population: Population) -> None:
    noise = NoiseParams(absent_mentioned=0.55, present_dropped=0, mask_coarse=0)
    rng = np.random.default_rng(3)
    inviting = invented = 0
    for _ in range(6):
        for scene, questions in population:
            for question in questions:
                right, wrong = truth(scene, question), noisy(scene, question, rng, noise)
                partners = {PARTNERS[mention.kind] for mention in right} - set(scene.counts)
                if question.kind not in ("list", "use") or not partners:
                    assert wrong == right
                    continue
                inviting += 1
                extra = [mention for mention in wrong if mention not in right]
                invented += len(extra)
                for mention in extra:
                    assert mention.kind in partners
                    trigger = next(m for m in right if m.region == mention.region)  # whose region it shows
                    assert PARTNERS[trigger.kind] == mention.kind
    assert invented / inviting == pytest.approx(0.55, abs=0.05)


def test_answers_tell_kind_by_kind() -> None:
    scene = hand_made(
        ("cup", "red", 5, 30), ("fork", "red", 15, 50), ("fork", "red", 15.5, 10), ("apple", "red", 30, 30),
        ("cup", "red", 44, 30),
    )  # fmt: skip
    asked = Asked("list", "", "here are", (0, 1, 2, 3, 4), named=("fork", "apple"))
    names = ["the top fork", "the bottom fork", "the apple", "the left cup", "the right cup"]
    assert [mention.name for mention in truth(scene, asked)] == names
    unasked = Asked("material", "", "it is", (0, 1, 2, 3, 4))
    assert [mention.name for mention in truth(scene, unasked)] == [*names[2:], *names[:2]]


def test_a_list_is_told_in_the_order_of_its_question(population: Population) -> None:
    seen = 0
    for scene, questions in population:
        for question in questions:
            if len({scene.things[n].kind for n in question.targets}) < 2 or not question.named:
                continue
            seen += 1
            kinds = list(dict.fromkeys(mention.kind for mention in truth(scene, question)))
            at = [question.text.index(plural(kind) if plural(kind) in question.text else kind)
                  for kind in kinds]  # fmt: skip
            assert at == sorted(at)
    assert seen > 20


def test_the_smallest_target_is_dropped(table: Scene) -> None:
    noise = NoiseParams(absent_mentioned=0, present_dropped=0.11, mask_coarse=0)
    question = Asked("danger", "", "it is", (1, 2, 3))
    rng = np.random.default_rng(0)
    answers = [[mention.region for mention in noisy(table, question, rng, noise)] for _ in range(2000)]
    assert all(answer in ([3, 2, 1], [3, 2]) for answer in answers)  # thing 1 has the smallest mask of them
    assert np.mean([len(answer) == 2 for answer in answers]) == pytest.approx(0.11, abs=0.025)
    single = Asked("danger", "", "it is", (2,))
    assert all(noisy(table, single, rng, noise) == truth(table, single) for _ in range(100))
