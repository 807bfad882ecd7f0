"""Answers to single questions: what `popen predict` and the served model share.

A bundle, written by the stage `calibrate`, holds all that this needs:
    model/                  the aligned model
    reference/              the one before alignment, where the members' score is the implicit reward
    score.json, attention.safetensors
    settings.json           threshold, ensemble parameters, longest answer, precision
A plain model folder (artifacts/models/sft, ...) will do for answers without an ensemble.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image
from safetensors import SafetensorError

from popen import devices
from popen.ensemble import members
from popen.ensemble.members import Ensemble
from popen.ensemble.score import FEATURES, REWARD, Score
from popen.evaluation.answering import prediction
from popen.evaluation.prediction import Prediction
from popen.model.batches import Row
from popen.model.generate import generate
from popen.model.segmenter import ModelError, Segmenter
from popen.params import EnsembleParams
from popen.samples import Sample

PLAIN_THRESHOLD, PLAIN_LENGTH = 0.0, 128  # where a folder brings no settings


class QuestionError(ValueError):
    """A question cannot be asked; the message says why."""


@dataclass(frozen=True)
class Settings:
    threshold: float  # logit
    max_new_tokens: int
    ensemble: EnsembleParams
    bf16: bool = False  # see `EvaluateParams`; bundles of before are without it

    def to_json(self) -> str:
        record = {**vars(self), "ensemble": self.ensemble.model_dump(mode="json")}
        return json.dumps(record, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        record = json.loads(text)
        return cls(**(record | {"ensemble": EnsembleParams.model_validate(record["ensemble"])}))


def write_bundle(
    folder: Path,
    model: Path,
    reference: Path | None,
    score: Score,
    attention: members.RefinementAttention,
    settings: Settings,
) -> None:
    """Put a calibrated ensemble into one folder; `model` and `reference` are saved models."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder / "model")
    if reference is not None:
        shutil.copytree(reference, folder / "reference")
    members.save(folder, score, attention)
    (folder / "settings.json").write_text(settings.to_json(), encoding="utf-8")


def load_ensemble(folder: Path) -> tuple[Ensemble, Settings]:
    """The ensemble of a bundle, on the CPU. Raises ModelError where a part is missing, or is not as this
    version of popen writes it."""
    for name in ("settings.json", "score.json", "attention.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no whole bundle here ({name} is missing); run `make repro`")
    model = Segmenter.load(folder / "model")
    try:
        settings = Settings.from_json((folder / "settings.json").read_text(encoding="utf-8"))
        score, attention = members.load(folder, model)
        if score.features not in (FEATURES, REWARD):
            raise ValueError(f"the score weighs {', '.join(score.features)}, not {', '.join(FEATURES)}")
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: not a bundle as this version of popen writes it ({' '.join(str(error).split())}); "
            "make it again (`dvc repro calibrate`), or use the version that made it"
        ) from None
    reference = Segmenter.load(folder / "reference") if score.features == REWARD else None
    ensemble = Ensemble(model, reference, score, attention, settings.ensemble, settings.threshold)
    return ensemble, settings


class Predictor:
    """A loaded model that answers one question at a time, on the GPU where there is one."""

    def __init__(self, folder: Path) -> None:
        """Load a bundle or a plain model folder. Raises ModelError."""
        self.ensemble: Ensemble | None = None
        self.threshold, self.bf16 = PLAIN_THRESHOLD, False
        if (folder / "settings.json").is_file():
            ensemble, settings = load_ensemble(folder)
            self.ensemble = ensemble.to(devices.device())
            self.model = self.ensemble.model
            self.threshold, self.length = settings.threshold, settings.max_new_tokens
            self.bf16 = settings.bf16
        else:
            self.model = Segmenter.load(folder).to(devices.device())
            self.length = min(PLAIN_LENGTH, self.model.room // 2)

    def __call__(
        self,
        image: Image.Image,
        question: str,
        members: int = 1,
        threshold: float | None = None,
        seed: int = 0,
    ) -> Prediction:
        """Words and masks. `members` > 1 asks an ensemble; `threshold` None means the calibrated one.

        Raises ModelError for an ensemble of a plain model folder, QuestionError for a question that leaves
        the language model no room to answer.
        """
        began = time.perf_counter()
        encoder = self.model.encoder
        tokens, most = len(encoder.question_ids(question)), self.model.room - self.length
        if tokens > most:
            raise QuestionError(
                f"the question has {tokens} tokens, {most} at most fit; ask it in fewer words"
            )
        if members > 1 and self.ensemble is None:
            raise ModelError(
                "this folder is a plain model without an ensemble; ask for one answer, or name a bundle"
            )
        with devices.autocast(self.bf16):
            if self.ensemble is None or members == 1:
                answer = generate(self.model, [image], [Row(0, question)], self.length)[0]
            else:
                answer = self.ensemble.answer([image], [question], members, self.length, seed)[0]
        asked = Sample("question", "", "", "", image.height, image.width, question, "", ())
        level = self.threshold if threshold is None else threshold
        return prediction(asked, answer, level, time.perf_counter() - began)
