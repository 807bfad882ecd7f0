from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from popen import masks
from popen.data import tree
from popen.data.grandf import QUESTION, find_spans
from popen.data.nouns import head_noun
from popen.data.records import Absent, Broken, RecordError
from popen.samples import Sample
from tests.data.trees import grandf_record, mask, write_grandf, write_grandf_eval

ONE, TWO = masks.encode(mask(1, 2, 4)), masks.encode(mask(8, 5, 3))


def test_a_caption_becomes_a_sample_with_a_mark_after_each_phrase(tmp_path: Path) -> None:
    write_grandf(tmp_path, [grandf_record()])
    (sample,) = tree.read(tmp_path, "grandf/train")
    assert isinstance(sample, Sample)
    assert sample.question == QUESTION
    assert sample.answer == "A table with two cups {seg} and a fork {seg}."
    assert [(t.name, t.category) for t in sample.targets] == [("two cups", "cup"), ("a fork", "fork")]
    assert (masks.decode(sample.targets[0].rle) == (mask(1, 2, 4) | mask(2, 3, 5))).all()
    assert sample.objects == sample.targets
    assert sample.image == "GranDf/GranDf_HA_images/train/g.png"


def test_the_coco_form_is_joined_on_the_image(tmp_path: Path) -> None:
    write_grandf_eval(tmp_path, "The dog sees a dog.", ["a dog", "the dog"], [ONE, TWO])
    (sample,) = tree.read(tmp_path, "grandf/val")
    assert isinstance(sample, Sample)
    assert sample.answer == "The dog {seg} sees a dog {seg}."
    assert [t.rle for t in sample.targets] == [TWO, ONE]  # in the caption's order, not the labels'
    assert sample.image == "GranDf/GranDf_HA_images/val_test/v.png"


def test_spans_are_whole_words_and_taken_once() -> None:
    assert find_spans(["a cat", "a cat"], "A cat and a cat.") == [(0, 5), (10, 15)]
    assert find_spans(["cat"], "Concatenate the cat") == [(16, 19)]
    assert find_spans(["man", "man in red"], "A man in red is near a man.") == [(23, 26), (2, 12)]
    assert find_spans(["a dog", "a cat", "a dog"], "A dog.") == [(0, 5), (6, 6), (6, 6)]
    with pytest.raises(RecordError, match="a label is not a text"):
        find_spans(["a dog", " "], "A dog.")


def test_a_label_without_a_place_in_the_caption_is_asked_for_behind_it(tmp_path: Path) -> None:
    write_grandf_eval(tmp_path, "Two dogs play.", ["dogs", "dogs"], [ONE, TWO])
    (sample,) = tree.read(tmp_path, "grandf/val")
    assert isinstance(sample, Sample)
    assert sample.answer == "Two dogs {seg} play. {seg}"
    assert [(t.name, t.rle) for t in sample.targets] == [("dogs", ONE), ("dogs", TWO)]


def test_images_of_the_coco_form_may_have_an_id_alone(tmp_path: Path) -> None:
    """So other public readers take them: the name from the id, the size from the image."""
    write_grandf_eval(tmp_path, "The dog.", ["the dog"], [ONE])
    file = tmp_path / "GranDf/annotations/val_test/val_gcg_coco_mask_gt.json"
    content = json.loads(file.read_text())
    content["images"] = [{"id": "sa_1"}]
    for annotation in content["annotations"]:
        annotation["image_id"] = "sa_1"
    file.write_text(json.dumps(content))
    captions = tmp_path / "GranDf/annotations/val_test/val_gcg_coco_caption_gt.json"
    told = json.loads(captions.read_text())
    for annotation in told["annotations"]:
        annotation["image_id"] = "sa_1"
    captions.write_text(json.dumps(told))
    (absent,) = tree.read(tmp_path, "grandf/val")
    assert isinstance(absent, Absent)
    assert absent.image == "GranDf/GranDf_HA_images/val_test/sa_1.jpg"
    path = tmp_path / absent.image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12)).save(path)
    (sample,) = tree.read(tmp_path, "grandf/val")
    assert isinstance(sample, Sample)
    assert (sample.image, sample.height, sample.width) == (absent.image, 12, 16)


@pytest.mark.parametrize(
    ("caption", "phrase", "at", "answer"),
    [
        ("A woman and a man", "man", 4, "A woman and a man {seg}"),
        ("A street with a tree", "tree", 3, "A street with a tree {seg}"),
        ("A man and a woman", "man", 2, "A man {seg} and a woman"),
        ("A woman", "man", 4, None),
    ],
)
def test_positions_inside_of_a_word_are_not_meant(
    tmp_path: Path, caption: str, phrase: str, at: int, answer: str | None
) -> None:
    """GLaMM's positions are the first place where the letters stand."""
    places = {phrase: {"token_positives": [at, at + len(phrase)], "rle_masks": [ONE]}}
    write_grandf(tmp_path, [grandf_record(caption=caption, groundings=places)])
    (found,) = tree.read(tmp_path, "grandf/train")
    if answer is None:
        assert isinstance(found, Broken)
        assert "inside of a word alone" in found.rule
    else:
        assert isinstance(found, Sample)
        assert found.answer == answer


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"file_name": "../g.png"}, "leaves its folder"),
        ({"file_name": "none.png"}, "no such file"),
        ({"file_name": "g\0.png"}, "'file_name' has a null character"),
        ({"file_name": "long" * 75 + ".png"}, "no usable path (File name too long)"),
        ({"caption": "A \ud83d.", "groundings": {}}, "'caption' has half a character"),
        ({"caption": 3}, "'caption' is a int"),
        ({"groundings": []}, "'groundings' is a list"),
        ({"groundings": {"a fork": None}}, "not an object with the key 'token_positives'"),
        (
            {"groundings": {"a fork": {"token_positives": [26, 90], "rle_masks": [ONE]}}},
            "no 'a fork' at 26:90",
        ),
        (
            {"groundings": {"a fork": {"token_positives": [25, 31], "rle_masks": [ONE]}}},
            "no 'a fork' at 25:31",
        ),
        ({"groundings": {"a fork": {"token_positives": ["26", 32], "rle_masks": [ONE]}}}, "[start, end]"),
        ({"groundings": {"a fork": {"token_positives": [26, 32], "rle_masks": []}}}, "has no mask"),
        (
            {
                "groundings": {
                    "a fork": {"token_positives": [26, 32], "rle_masks": [ONE]},
                    "fork": {"token_positives": [28, 32], "rle_masks": [ONE]},
                }
            },
            "overlap",
        ),
        (
            {
                "groundings": {
                    "a fork": {
                        "token_positives": [26, 32],
                        "rle_masks": [{"size": [2, 2], "counts": [4]}],
                    }
                }
            },
            "the mask's size [2, 2]",
        ),
        ({"caption": "a fork {seg}", "groundings": {}}, "contains {seg} already"),
    ],
)
def test_broken_captions_are_named(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    write_grandf(tmp_path, [grandf_record(**changes), grandf_record()])
    broken, sound = tree.read(tmp_path, "grandf/train")
    assert isinstance(broken, tree.Broken)
    assert broken.record == "0"
    assert rule in broken.rule
    assert isinstance(sound, Sample)


@pytest.mark.parametrize(
    ("caption", "labels", "rules"),
    [
        ("A dog.", ["a dog"], "1 labels but 2 masks"),
        ("A dog.", ["a dog", " "], "a label is not a text"),
        ("A dog.", ["a dog", 4], "a label is not a text"),
    ],
)
def test_broken_evaluation_captions_are_named(
    tmp_path: Path, caption: str, labels: list[Any], rules: str
) -> None:
    write_grandf_eval(tmp_path, caption, labels, [ONE, TWO])
    (broken,) = tree.read(tmp_path, "grandf/val")
    assert isinstance(broken, tree.Broken)
    assert rules in broken.rule


def test_captions_without_their_masks(tmp_path: Path) -> None:
    write_grandf_eval(tmp_path, "A dog.", ["a dog"], [ONE])
    (tmp_path / "GranDf/annotations/val_test/val_gcg_coco_mask_gt.json").unlink()
    with pytest.raises(tree.TreeError, match=r"no .*val_gcg_coco_mask_gt\.json"):
        list(tree.read(tmp_path, "grandf/val"))


@pytest.mark.parametrize(
    ("phrase", "kind"),
    [
        ("12 people", "person"),
        ("a tennis racket", "racket"),
        ("a man in a red shirt", "man"),
        ("two women wearing hats", "woman"),
        ("a pair of shoes", "shoe"),
        ("a glass of wine", "glass"),
        ("one of the dogs", "dog"),
        ("several of the pairs of shoes", "shoe"),
        ("three brushes", "brush"),
        ("the cherries", "cherry"),
        ("a bus", "bus"),
        ("The Cups", "cup"),
        ("4", ""),
    ],
)
def test_head_nouns(phrase: str, kind: str) -> None:
    assert head_noun(phrase) == kind
