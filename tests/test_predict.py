"""Answers to single questions, from a bundle and from a plain model."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from popen import devices
from popen.ensemble.attention import RefinementAttention
from popen.ensemble.members import Ensemble
from popen.ensemble.score import FEATURES, Score, reward_score
from popen.evaluation.answering import prediction
from popen.masks import area, decode, iou
from popen.model.batches import Row
from popen.model.generate import generate
from popen.model.segmenter import ModelError, Segmenter
from popen.params import EnsembleParams
from popen.predict import Predictor, QuestionError, Settings, load_ensemble, write_bundle
from popen.samples import Sample

Data = tuple[Path, list[Sample]]
SCORE = Score(FEATURES, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (1.0, 0.5, -0.1))


def settings(**changes: object) -> Settings:
    ensemble = EnsembleParams(
        members=3, mode="attention", score="calibrated", temperature=0.7, sigma=0.3, side=(0.1, 0.3), steps=1
    )
    return Settings(0.25, 24, ensemble.model_copy(update=changes))


@pytest.fixture(scope="module")
def models(taught: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model and its reference, which differs."""
    root = tmp_path_factory.mktemp("models")
    taught.save(root / "popen")
    other = copy.deepcopy(taught)
    with torch.no_grad():
        other.causal.lm_head.weight.mul_(0.9)
    other.save(root / "sft")
    return root


@pytest.fixture
def bundle(taught: Segmenter, models: Path, tmp_path: Path) -> Path:
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    with torch.no_grad():
        attention.gate.fill_(0.5)
    write_bundle(tmp_path / "bundle", models / "popen", None, SCORE, attention, settings())
    return tmp_path / "bundle"


def picture(data: Data, number: int = 0) -> tuple[Image.Image, str]:
    root, samples = data
    return Image.open(root / samples[number].image), samples[number].question


def test_settings_survive_their_file() -> None:
    assert Settings.from_json(settings().to_json()) == settings()
    assert settings().to_json() == settings().to_json()


def test_a_bundle_comes_back_whole(bundle: Path, models: Path, taught: Segmenter, data: Data) -> None:
    ensemble, found = load_ensemble(bundle)
    assert found == settings()
    assert ensemble.score == SCORE
    assert ensemble.threshold == 0.25
    assert ensemble.params == settings().ensemble
    assert ensemble.attention.gate.tolist() == [0.5, 0.5]
    assert ensemble.reference is None
    image, question = picture(data)
    batch = taught.encoder.batch([image], [Row(0, question, "It is the cup {seg}.")])
    with torch.no_grad():
        torch.testing.assert_close(ensemble.model(batch).logits, taught(batch).logits)


def test_a_bundle_whose_score_is_the_reward_holds_the_reference(
    tmp_path: Path, models: Path, taught: Segmenter, data: Data
) -> None:
    folder = tmp_path / "bundle"
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    rewarded = settings(score="reward")
    write_bundle(folder, models / "popen", models / "sft", reward_score(), attention, rewarded)
    ensemble, _ = load_ensemble(folder)
    assert ensemble.score == reward_score()
    assert ensemble.reference is not None
    image, question = picture(data)
    batch = taught.encoder.batch([image], [Row(0, question, "It is the cup {seg}.")])
    with torch.no_grad():
        before = Segmenter.load(models / "sft")(batch).logits
        torch.testing.assert_close(ensemble.reference(batch).logits, before)
        assert not torch.allclose(before, ensemble.model(batch).logits, atol=1e-2)
    assert Predictor(folder)(image, question, members=2).text
    shutil.rmtree(folder / "reference")
    with pytest.raises(ModelError, match=r"reference.*make repro"):
        Predictor(folder)


def test_a_bundle_replaces_an_older_one(bundle: Path, models: Path, taught: Segmenter) -> None:
    (bundle / "model" / "left over").touch()
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    write_bundle(bundle, models / "popen", None, SCORE, attention, settings(members=7))
    assert not (bundle / "model" / "left over").exists()
    assert load_ensemble(bundle)[1].ensemble.members == 7


@pytest.mark.parametrize("part", ["score.json", "attention.safetensors", "model/config.json"])
def test_a_part_that_is_missing_is_named(bundle: Path, part: str) -> None:
    path = bundle / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=f"{Path(part).parts[0]}.*make repro"):
        Predictor(bundle)
    with pytest.raises(ModelError, match=r"settings\.json is missing"):
        load_ensemble(bundle / "model")


@pytest.mark.parametrize(
    ("part", "old", "new", "why"),
    [
        ("score.json", "agreement", "reward", "the score weighs logp, confidence, reward, not logp"),
        ("score.json", '"weight"', '"weights"', "weights"),
        ("settings.json", '"sigma"', '"noise"', "noise"),
        ("settings.json", '"max_new_tokens"', '"longest"', "longest"),
        ("settings.json", "{", "", "Extra data"),
        ("attention.safetensors", "gate", "date", "date"),
    ],
)
def test_a_bundle_of_another_version_is_refused(
    bundle: Path, part: str, old: str, new: str, why: str
) -> None:
    """Of three features, not two: an older version's third one would be weighed as if it were ours."""
    changed = (bundle / part).read_bytes().replace(old.encode(), new.encode(), 1)
    (bundle / part).write_bytes(changed)
    with pytest.raises(ModelError, match=rf"not a bundle as this version of popen writes it \(.*{why}"):
        Predictor(bundle)


def test_one_answer_is_the_models_own_at_the_calibrated_threshold(
    bundle: Path, taught: Segmenter, data: Data
) -> None:
    predict = Predictor(bundle)
    for number in range(2):
        image, question = picture(data, number)
        found = predict(image, question)
        (answer,) = generate(taught, [image], [Row(0, question)], 24)
        expected = prediction(data[1][number], answer, 0.25, 0.0)
        assert found.text == expected.text == data[1][number].answer
        assert found.masks == expected.masks
        assert (found.loglik, found.confidence) == pytest.approx((expected.loglik, expected.confidence))
        assert 0 < found.seconds < 60
    low, high = (sum(map(area, predict(image, question, threshold=t).masks)) for t in (-99.0, 99.0))
    assert low == 32 * 32 * len(found.masks) > sum(map(area, found.masks)) > high == 0


def test_a_bundle_answers_in_the_precision_of_its_calibration(
    taught: Segmenter, models: Path, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popen.devices.halves", lambda: True)  # emulated where need be
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    half = dataclasses.replace(settings(), bf16=True)
    write_bundle(tmp_path / "half", models / "popen", None, SCORE, attention, half)
    predict, (image, question) = Predictor(tmp_path / "half"), picture(data)
    found = predict(image, question)
    with torch.autocast("cpu", torch.bfloat16):
        (answer,) = generate(taught, [image], [Row(0, question)], 24)
    assert (found.loglik, found.masks) == (answer.logp, prediction(data[1][0], answer, 0.25, 0.0).masks)
    (whole,) = generate(taught, [image], [Row(0, question)], 24)
    assert found.loglik != whole.logp
    assert found.loglik == pytest.approx(whole.logp, abs=0.05)
    several = predict(image, question, members=3)
    assert several.text == found.text
    assert [area(rle) for rle in several.masks] == pytest.approx([area(rle) for rle in found.masks], rel=0.3)


def test_masks_have_the_images_size(bundle: Path, data: Data) -> None:
    image, question = picture(data)
    found = Predictor(bundle)(image.resize((80, 48), Image.Resampling.NEAREST), question)
    assert [rle["size"] for rle in found.masks] == [[48, 80]] * 2
    cup = decode(data[1][0].targets[0].rle)
    large = np.asarray(Image.fromarray(cup).resize((80, 48), Image.Resampling.NEAREST))
    assert iou(decode(found.masks[0]), large) > 0.4


def test_an_ensemble_answers_as_asked_under_its_seed(bundle: Path, data: Data) -> None:
    predict = Predictor(bundle)
    assert predict.ensemble is not None
    image, question = picture(data)
    found = predict(image, question, members=3, seed=5)
    (answer,) = predict.ensemble.answer([image], [question], 3, 24, 5)
    assert (found.text, found.masks) == (answer.text, prediction(data[1][0], answer, 0.25, 0.0).masks)
    assert predict(image, question, members=3, seed=5).masks == found.masks


def test_a_plain_model_answers_but_makes_no_ensemble(models: Path, data: Data) -> None:
    predict = Predictor(models / "popen")
    assert (predict.ensemble, predict.threshold, predict.length) == (None, 0.0, predict.model.room // 2)
    image, question = picture(data)
    assert predict(image, question).text == data[1][0].answer
    with pytest.raises(ModelError, match="plain model without an ensemble; ask for one answer"):
        predict(image, question, members=2)


def placed(model: Segmenter | Ensemble) -> set[str]:
    """Where the weights of a model, or of all models of an ensemble, are."""
    parts = [model.model, model.reference, model.attention] if isinstance(model, Ensemble) else [model]
    return {weight.device.type for part in parts if part is not None for weight in part.parameters()}


def test_the_weights_are_on_the_device_of_a_stage(
    tmp_path: Path, models: Path, taught: Segmenter, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without values stands for the GPU: it shows where the weights are, and can answer nothing."""
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    rewarded = settings(score="reward")
    write_bundle(tmp_path / "bundle", models / "popen", models / "sft", reward_score(), attention, rewarded)
    monkeypatch.setattr(devices, "device", lambda: torch.device("meta"))
    ensemble = Predictor(tmp_path / "bundle").ensemble
    assert ensemble is not None
    assert ensemble.reference is not None
    assert placed(ensemble) == {"meta"}
    assert placed(Predictor(models / "popen").model) == {"meta"}


def test_a_question_that_leaves_no_room_for_an_answer(models: Path, data: Data) -> None:
    image = Image.open(data[0] / data[1][0].image)
    with pytest.raises(QuestionError, match=r"the question has \d+ tokens, \d+ at most fit"):
        Predictor(models / "popen")(image, "where is the cup? " * 200)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model here \(config\.json is missing\)"):
        Predictor(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not of a model of popen's, or damaged"):
        Predictor(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json is not of a model of popen's, or damaged"):
        Predictor(tmp_path)
