import numpy as np
import pytest

from popen.data.scenes.composition import SMALLEST, Scene, compose


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose([3, 0, number], 64, crowded=number % 4 == 3) for number in range(40)]


def test_a_scene_is_a_function_of_its_seed(scenes: list[Scene]) -> None:
    again = compose([3, 0, 5], 64, crowded=False)  # drawn alone, not after five others
    assert again.picture.tobytes() == scenes[5].picture.tobytes()
    assert [thing.name for thing in again.things] == [thing.name for thing in scenes[5].things]
    assert len({scene.picture.tobytes() for scene in scenes}) == len(scenes)


def test_masks_never_overlap_and_are_large_enough(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks = np.stack([thing.mask for thing in scene.things])
        assert masks.shape[1:] == (64, 64)
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= SMALLEST


def test_numbers_of_things(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        low, high = (6, 8) if number % 4 == 3 else (3, 6)
        assert low <= len(scene.things) <= high


def test_things_run_from_left_to_right_and_have_names_of_their_own(scenes: list[Scene]) -> None:
    for scene in scenes:
        centres = [thing.x for thing in scene.things]
        assert centres == sorted(centres)
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            rows, columns = np.nonzero(thing.mask)
            assert (thing.x, thing.y) == pytest.approx((columns.mean(), rows.mean()))


def test_things_stand_out_from_the_table(scenes: list[Scene]) -> None:
    contrasts = []
    for scene in scenes:
        pixels = np.asarray(scene.picture).astype(float)
        covered = np.any([thing.mask for thing in scene.things], axis=0)
        table = np.median(pixels[~covered], axis=0)
        contrasts += [np.linalg.norm(pixels[thing.mask] - table, axis=1).mean() for thing in scene.things]
    assert np.min(contrasts) > 40
    assert np.mean(contrasts) > 100


def test_other_sizes_hold_the_same_kinds_of_scenes() -> None:
    scene = compose([3, 0, 0], 96, crowded=False)
    assert scene.picture.size == (96, 96)
    assert all(np.count_nonzero(thing.mask) >= SMALLEST * (96 / 64) ** 2 for thing in scene.things)
