"""A process that ends with the one that started it (Linux): what nobody waits for is not to go on alone."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG = 1  # prctl(2)
_prctl = ctypes.CDLL(None).prctl  # looked up here: a forked child must do as little as it can


def end_with(parent: int, number: int) -> bool:
    """Ask for the signal `number` when the parent, process `parent`, ends; False if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent
