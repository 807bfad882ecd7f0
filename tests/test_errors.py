"""Errors in words."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from flows.stage_process import StageStopped
from popen import devices
from popen.errors import explain, is_full
from popen.params import ParamsError
from tests.processes import together


def disk_full() -> OSError:
    """A real ENOSPC from the kernel."""
    try:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        return error
    raise AssertionError("/dev/full took a byte")


def test_a_full_disk_is_recognised_in_every_wording() -> None:
    assert is_full(disk_full())
    assert is_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    for content in ({"weights": torch.zeros(100_000)}, {"step": 1}):  # it fails in writing, or in closing
        with pytest.raises(RuntimeError) as caught:
            torch.save(content, "/dev/full")
        assert is_full(caught.value)
    assert not is_full(RuntimeError("shape mismatch"))
    assert not is_full(PermissionError(errno.EACCES, "denied"))


def test_the_end_of_another_process_is_no_bug() -> None:
    def work() -> str | None:
        if not devices.is_main():
            return None
        with pytest.raises(RuntimeError) as caught:
            torch.distributed.barrier()
        return explain(caught.value)

    said, _ = together(work)
    assert said == "another process of this stage has ended; run `dvc repro` again, it resumes"


def test_own_errors_speak_for_themselves_and_bugs_need_their_trace() -> None:
    assert explain(ParamsError("sft.lr: must be positive")) == "sft.lr: must be positive"
    assert explain(StageStopped("a was stopped")) == "a was stopped"  # of the flows, too
    assert explain(KeyError("lr")) is None
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_a_full_disk_says_which_file_and_what_to_do() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "artifacts/sft/model.safetensors")
    expected = "disk full while writing artifacts/sft/model.safetensors: free space and run `dvc repro` again"
    assert expected in str(explain(error))
    assert "disk full while writing an output" in str(explain(disk_full()))
