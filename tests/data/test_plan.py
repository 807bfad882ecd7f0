"""The plan of a training run: a function of seed and number alone."""

from __future__ import annotations

import pytest

from popen.data.plan import Plan, PlanError

MEMBERS = [(group, number) for number in range(4) for group in "abcde"]


def plan(count: int = 2, seed: int = 0) -> Plan[tuple[str, int]]:
    return Plan(MEMBERS, count, seed, key=lambda member: member[0])


def test_every_group_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    items = [plan().item(number) for number in range(50)]
    epochs = ["".join(item[0][0] for item in items[at : at + 5]) for at in range(0, 50, 5)]
    assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcde"}
    assert len(set(epochs)) > 5


def test_an_item_is_of_one_group_without_repeats() -> None:
    for number in range(50):
        item = plan(3).item(number)
        assert len({group for group, _ in item}) == 1
        assert len(item) == 3
        assert len({n for _, n in item}) == 3
    assert sorted(n for _, n in plan(9).item(0)) == [0, 1, 2, 3]  # no more than there are
    assert {plan(9).item(number)[0][1] for number in range(50)} == {0, 1, 2, 3}  # each is the first at times
    assert len({tuple(plan(1).item(number)) for number in range(200)}) == len(MEMBERS)  # all have their turn


def test_a_number_gives_the_same_item_whatever_came_before() -> None:
    straight = plan()
    expected = [straight.item(number) for number in range(30)]
    assert [plan().item(number) for number in reversed(range(30))] == expected[::-1]
    assert [plan(seed=1).item(number) for number in range(30)] != expected


def test_nothing_to_train_on_says_where_to_look() -> None:
    with pytest.raises(PlanError, match=r"roles of `data\.splits`"):
        Plan([], 1, 0, key=str)
