import numpy as np
import pytest

from popen.data.scenes.phrases import Thing, a, distinctions, joined, names


def thing(kind: str, colour: str, x: float, y: float = 30, length: float = 20) -> Thing:
    return Thing(kind, colour, length, np.ones((1, 1), dtype=bool), x, y)


def named(*things: Thing) -> list[str] | None:
    found = names(things, 64)
    return None if found is None else [one.name for one in found]


def test_a_thing_without_a_twin_is_called_by_its_kind() -> None:
    assert named(thing("cup", "red", 10), thing("fork", "red", 30)) == ["the cup", "the fork"]


def test_place_comes_first_then_colour_then_size() -> None:
    small, near = thing("cup", "red", 10, length=14), thing("cup", "blue", 14)
    assert named(small, thing("cup", "blue", 40)) == ["the left cup", "the right cup"]
    assert named(thing("cup", "red", 10, y=50), near) == ["the bottom cup", "the top cup"]
    assert named(small, near) == ["the red cup", "the blue cup"]
    assert named(small, thing("cup", "red", 14)) == ["the small cup", "the large cup"]


def test_three_alike_are_counted_from_the_left() -> None:
    found = named(thing("cup", "red", 10), thing("cup", "red", 30), thing("cup", "red", 50))
    assert found == [f"the {word} cup from the left" for word in ("first", "second", "third")]


@pytest.mark.parametrize(
    "things",
    [
        (thing("cup", "red", 10), thing("cup", "red", 15)),
        (thing("cup", "red", 10), thing("cup", "red", 30), thing("cup", "red", 33)),
    ],
)
def test_things_that_cannot_be_told_apart_have_no_names(things: tuple[Thing, ...]) -> None:
    assert named(*things) is None


def test_distances_grow_with_the_picture() -> None:
    pair = [thing("cup", "red", 10), thing("cup", "red", 20)]
    assert names(pair, 64) is not None
    assert names(pair, 128) is None


def test_every_distinction_is_found() -> None:
    pair = [thing("cup", "red", 10, y=10, length=12), thing("cup", "blue", 40, y=40)]
    assert set(distinctions(pair, 64)) == {
        (0, "colour", "that is red"),
        (1, "colour", "that is blue"),
        (0, "size", "that is smaller"),
        (1, "size", "that is larger"),
        (0, "place", "on the left"),
        (1, "place", "on the right"),
        (0, "place", "closer to the top"),
        (1, "place", "closer to the bottom"),
    }


def test_words_are_joined() -> None:
    assert joined(["x"]) == "x"
    assert joined(["x", "y", "z"]) == "x, y and z"
    assert joined(["x", "y"], "or") == "x or y"
    assert (a("apple"), a("cup")) == ("an apple", "a cup")
