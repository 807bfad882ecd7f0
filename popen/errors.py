"""Errors in words: what a user reads instead of a stack trace."""

from __future__ import annotations

import errno
import re


class ModelError(ValueError):
    """A model cannot be read or built; the message says which file or parameter, and what to do."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries whose errors have no number word it: safetensors, then torch.save, which does not know why
# a write failed; a full disk is the likely cause.
_WORDS = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk (or the quota) is full, also as other libraries word it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error) for words in _WORDS)


def explain(error: BaseException) -> str | None:
    """The message for errors whose text is all a user needs, None for what only a stack trace explains.

    The exceptions that `popen` and `flows` define are written to be read (file, record, rule, remedy);
    everything else but a full disk, and the end of another process of the stage, is a bug.
    """
    if type(error).__module__.partition(".")[0] in ("popen", "flows"):
        return error.strerror or str(error) if isinstance(error, OSError) else str(error)
    if is_full(error):
        where = error.filename if isinstance(error, OSError) and error.filename else "an output"
        return f"disk full while writing {where}: free space and run `dvc repro` again, it resumes"
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        return "another process of this stage has ended; run `dvc repro` again, it resumes"
    return None


def one_line(error: BaseException) -> str:
    """The first line of an error's text, 200 characters at most and no passwords; its type where there is no
    text."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def flat(error: BaseException) -> str:
    """All lines of a library's error as one, 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def without_password(text: str) -> str:
    """A text in which no address names a password: "http://me:secret@host" -> "http://me@host".

    All up to the last "@" of the word goes, for a password may hold an unquoted "/" or "@".
    """
    return re.sub(r"(://[^\s:/@]*):\S*@", r"\1@", text)
