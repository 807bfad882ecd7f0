"""What a training step sees: a function of the seed and of the item's number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class PlanError(ValueError):
    """There is nothing to draw from; the message says where to look."""


class Plan(Generic[T]):
    """Item i is one group (an image) with up to `count` of its members; every group comes once an epoch."""

    def __init__(self, members: Sequence[T], count: int, seed: int, key: Callable[[T], str]) -> None:
        groups: dict[str, list[T]] = {}
        for member in members:
            groups.setdefault(key(member), []).append(member)
        if not groups:
            raise PlanError("nothing to train on; look at the roles of `data.splits` in params.yaml")
        self.groups = list(groups.values())
        self.count, self.seed = count, seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def item(self, index: int) -> list[T]:
        """The members of item `index`, all of one group, in an order of the seed's."""
        epoch, place = divmod(index, len(self.groups))
        group = self.groups[self._order(epoch)[place]]
        rng = np.random.default_rng([self.seed, 1, index])
        picks = rng.choice(len(group), size=min(self.count, len(group)), replace=False)
        return [group[pick] for pick in picks]
