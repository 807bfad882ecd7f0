"""Which questions a training step sees: a function of the seed and of the item's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from popen.samples import Sample


class Plan:
    """Item i is one image with up to `questions` of its questions; every image comes once an epoch."""

    def __init__(self, samples: Sequence[Sample], questions: int, seed: int) -> None:
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.image, []).append(sample)
        if not groups:
            raise ValueError("no samples to train on; look at the roles of `data.splits` in params.yaml")
        self.groups = list(groups.values())
        self.questions, self.seed = questions, seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def item(self, index: int) -> list[Sample]:
        """The samples of item `index`, all of one image."""
        epoch, place = divmod(index, len(self.groups))
        group = self.groups[self._order(epoch)[place]]
        rng = np.random.default_rng([self.seed, 1, index])
        picks = rng.choice(len(group), size=min(self.questions, len(group)), replace=False)
        return [group[pick] for pick in sorted(picks)]
