"""P_t corrected by a judge: a model behind any endpoint that speaks OpenAI's chat completions.

Every reply is kept as it comes, in a file named by all that shapes it; a stage that is started again reads
those and asks only for the rest. The budget counts what is kept, so it holds for all tries and all processes
of a stage together. Prompt and format are ours.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from popen.checkpoints import fingerprint, write_whole
from popen.data.images import open_image
from popen.errors import one_line
from popen.params import JudgeParams
from popen.preference.records import Skipped
from popen.preference.sources import Skip, UnfitError, first_wrong, fitted, known
from popen.preference.text import Correction
from popen.samples import Sample

if TYPE_CHECKING:
    from popen.model.generate import Answer

KEY = "OPENAI_API_KEY"  # the client's own variable
PROMPT = """\
You correct the answers of a model that answers a question about an image in words and masks. Behind the \
name of every thing that its answer consists of stands {seg}, the place of that thing's mask.

You get the image, the question, the model's answer, the things annotated in the image by number, and the \
answer of the data set. Annotations and that answer may have gaps and mistakes: the image decides.

Write the model's answer corrected. Remove what is not in the image or not asked for, rename what is called \
by a wrong name, add what is missing. Keep the model's own words and their order wherever they are right; an \
answer that is right is repeated letter by letter. Put {seg} behind every thing that the answer consists of.

In `targets` give for every {seg} of the corrected answer, in order, the number of the annotated thing that \
it means, or 0 where it is none of them."""


class JudgeError(RuntimeError):
    """The judge cannot be asked; the message says what to do. Replies so far are kept."""


class _Reply(BaseModel):
    """What the judge writes; its JSON schema goes with the request."""

    model_config = ConfigDict(extra="forbid")

    answer: str
    targets: list[int]


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """The part of a chat completion that is read; endpoints differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)


class _Usage(BaseModel):
    total_tokens: int | None = Field(default=None, ge=0)


class _Bill(BaseModel):
    """What a reply cost; apart from the completion, for it is paid whether the rest can be read or not."""

    usage: _Usage | None = None


class Judge:
    """A source of corrections (`popen.preference.sources.Source`). An answer whose judgement is refused,
    malformed or beyond the budget is skipped with the reason, and the question's next one is judged."""

    def __init__(self, params: JudgeParams, root: Path, max_pixels: int, kept: Path) -> None:
        """`root` holds the images; the replies go into a folder of this judge's own below `kept`. Raises
        JudgeError without a key in the environment."""
        if not os.environ.get(KEY):
            raise JudgeError(
                f"text_preferences.source is judge, and {KEY} is not set: put the key into the environment"
                " (any word where the endpoint asks for none)"
            )
        self.params, self.root, self.max_pixels = params, root, max_pixels
        self.schema = _Reply.model_json_schema()
        self.kept = kept / fingerprint(params.base_url, params.model, PROMPT, self.schema)
        self.client = openai.OpenAI(
            base_url=params.base_url, max_retries=params.retries, timeout=params.timeout
        )
        self.spent = False

    def __call__(
        self, answers: Sequence[Answer], sample: Sample, skip: Skip
    ) -> tuple[str, Correction] | None:
        """Raises JudgeError where the endpoint gives no answer at all (after the client's retries)."""
        return first_wrong(self._judged(dict.fromkeys(said.text for said in answers), sample, skip))

    def _judged(self, texts: dict[str, None], sample: Sample, skip: Skip) -> Iterator[tuple[str, Correction]]:
        for text in texts:
            try:
                correction = self.correct(text, sample)
            except UnfitError as error:
                skip(Skipped(sample.uid, text, str(error)))
            else:
                yield text, correction

    def correct(self, sampled: str, sample: Sample) -> Correction:
        """One answer judged, or its kept judgement. Raises UnfitError (no correction) and JudgeError."""
        image = open_image(self.root, sample.image, self.max_pixels)
        question = json.dumps(
            {
                "question": sample.question,
                "model's answer": sampled,
                "image": {"width": image.width, "height": image.height},
                "annotated": known(sample),
                "data set's answer": sample.answer,
            },
            ensure_ascii=False,
            indent=1,
        )
        pixels = hashlib.sha256(image.tobytes()).hexdigest()  # not the PNG's, which changes with its encoder
        key = fingerprint(question, pixels)
        path = next(self.kept.glob(f"{key}-*.json"), None)
        if path is not None:
            body = path.read_bytes()
        else:
            self._within_budget()
            body = self._post(question, image)
            write_whole(self.kept / f"{key}-{_tokens(body)}.json", body)  # read or not, it is paid for
        reply = _reply(_completion(body).choices[0])
        return fitted(sampled, reply.answer, reply.targets, sample)

    def used(self) -> tuple[int, int]:
        """Requests and tokens of all replies that are kept of this judge."""
        tokens = [int(path.stem.partition("-")[2]) for path in self.kept.glob("*.json")]
        return len(tokens), sum(tokens)

    def _within_budget(self) -> None:
        most_of = ("requests", self.params.requests), ("tokens", self.params.tokens)
        for (name, most), used in zip(most_of, self.used(), strict=True):
            if used >= most:
                reason = (
                    f"the judge's budget of {most} {name} is spent; raise text_preferences.judge.{name}"
                    " and run again: what was judged is kept"
                )
                if not self.spent:
                    tqdm.write(f"text_preferences: {reason}")
                self.spent = True
                raise UnfitError(reason)

    def _post(self, question: str, image: Image.Image) -> bytes:
        """The body of the endpoint's reply."""
        url = "data:image/png;base64," + base64.b64encode(_png(image)).decode("ascii")
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        request: dict[str, Any] = {
            "model": self.params.model,
            "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": content}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "correction", "strict": True, "schema": self.schema},
            },
        }
        try:
            return self.client.chat.completions.with_raw_response.create(**request).content
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            # content filters answer so, about one image; a wrong parameter, about all of them
            raise UnfitError(f"the judge's endpoint refused the request: {one_line(error)}") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise JudgeError(  # without the endpoint's words, which may repeat the key
                f"{self.params.base_url} refuses the key in {KEY} (HTTP {error.status_code}); set another one"
            ) from None
        except openai.OpenAIError as error:
            raise JudgeError(
                f"the judge {self.params.model} at {self.params.base_url} does not answer"
                f" ({one_line(error)}); check text_preferences.judge or wait, then run again: what was judged"
                " is kept"
            ) from None


def _tokens(body: bytes) -> int:
    """The tokens that a reply cost, 0 where it does not tell."""
    try:
        usage = _Bill.model_validate_json(body).usage
    except ValidationError:
        return 0
    return (usage.total_tokens or 0) if usage else 0


def _completion(body: bytes) -> _Completion:
    try:
        return _Completion.model_validate_json(body)
    except ValidationError as error:
        raise UnfitError(f"the judge's endpoint sent no chat completion: {_problem(error)}") from None


def _reply(choice: _Choice) -> _Reply:
    if choice.message.refusal:
        raise UnfitError(f"the judge refused: {choice.message.refusal}")
    if choice.finish_reason in ("content_filter", "length"):
        raise UnfitError(f"the judge's reply was cut off ({choice.finish_reason})")
    try:
        return _Reply.model_validate_json(choice.message.content or "")
    except ValidationError as error:
        raise UnfitError(f"the judge's reply does not fit the format: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
