"""Two processes against one: the same steps, checkpoints for each other, and the same preference data."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from popen import devices, optim
from popen.checkpoints import Checkpoints
from popen.data.images import open_image
from popen.devices import DevicesError
from popen.masks import decode
from popen.model.batches import Batch, Row
from popen.model.language import load_tokenizer
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.params import AlignParams, TrainParams
from popen.preference.alignment import align_loss, collate
from popen.preference.records import MaskPairs, TextPair
from popen.samples import Sample
from popen.training import DivergedError, train
from tests import test_training as toys
from tests.conftest import CATEGORIES, WEIGHTS
from tests.model.llava import llava_params, write_llava, write_tower
from tests.preference.test_sampling import masks, texts
from tests.processes import together

Data = tuple[Path, list[Sample]]
OURS = ("dense", "describe", "point", "centres", "look", "aim", "match")
SFT = WEIGHTS.model_copy(update={"inventory": 0.25, **dict.fromkeys(OURS, 1.0)})
PARAMS = toys.PARAMS.model_copy(
    update={"steps": 5, "lr": 2e-4, "muon": 0.0, "warmup": 0.0, "checkpoint_every": 3, "eval_every": 2}
)
# the first half of each step's images is one process's: two targets each, then one, then none at all
ORDER = [0, 2, 1, 3, 1, 0, 2, 0, 3, 1, 0, 2, 0, 1, 1, 3, 2, 0, 3, 3]
UNMASKED = {6, 7}


def sft_batch(model: Segmenter, data: Data) -> Callable[[Sequence[int]], Batch]:
    def make(items: Sequence[int]) -> Batch:
        samples = [data[1][ORDER[item]] for item in items]
        rows = [
            Row(
                place,
                sample.question,
                sample.answer,
                None if item in UNMASKED else [decode(target.rle) for target in sample.targets],
                kinds=[target.category for target in sample.targets],
            )
            for place, (item, sample) in enumerate(zip(items, samples, strict=True))
        ]
        images = [open_image(data[0], sample.image, 2000) for sample in samples]
        return model.encoder.batch(images, rows, samples)

    return make


def trained(
    model: Segmenter, of: Any, batch: Callable[..., Any], folder: Path, params: TrainParams = PARAMS
) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    """Losses of the steps that were made (of this process's part of the images), the curve, the weights."""
    model = copy.deepcopy(model)
    losses, points = list[float](), list[Any]()

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value, parts = of(model, batch)
        losses.append(value.item())
        return value, parts

    train(
        model,
        params,
        lambda index: index,
        batch,
        loss,
        lambda values, step: points.append((step, values)),
        Checkpoints(folder),
        "test",
        lambda: {"val/loss": of(model, batch(range(4)))[0].item()},
    )
    return losses, points, {name: value.detach() for name, value in model.state_dict().items()}


def same(first: Any, second: Any, atol: float = 5e-5) -> None:
    """Curves and weights agree to within rounding, which AdamW enlarges where gradients are tiny, and
    Muon, which works in bf16, everywhere. The norm of all gradients is as far off as the weights are. The
    first step's margins are rounding alone, so who wins is not compared."""
    for (step, figures), (again, others) in zip(first[1], second[1], strict=True):
        assert step == again
        close = {
            name: pytest.approx(value, rel=1e-4 if name == "train/grad_norm" else 1e-5, abs=1e-5)
            for name, value in figures.items()
            if not name.endswith("accuracies")
        }
        assert figures.keys() == others.keys()
        assert {name: others[name] for name in close} == close
    for name, value in first[2].items():
        torch.testing.assert_close(second[2][name], value, atol=atol, rtol=1e-5)


def sft(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return sft_loss(model(batch), batch, SFT)


def test_two_processes_make_the_steps_of_one_and_resume_each_others(  # also of a tower that learns
    mini_model: Segmenter, data: Data, tmp_path: Path
) -> None:
    batch = sft_batch(mini_model, data)
    one = trained(mini_model, sft, batch, tmp_path / "one")

    def work() -> Any:
        straight = trained(mini_model, sft, batch, tmp_path / "two")
        torch.distributed.barrier()
        return straight, trained(mini_model, sft, batch, tmp_path / "one")

    (first, behind_one), (second, other) = together(work)
    means = [(mine + others) / 2 for mine, others in zip(first[0], second[0], strict=True)]
    assert means == pytest.approx(one[0], rel=0, abs=1e-5)
    assert first[0] != pytest.approx(second[0], rel=0.1)  # the two saw other images
    same(one, first)
    assert len(behind_one[0]) == len(other[0]) == 2  # steps of the five: the checkpoint is of step 3
    same(one, behind_one)
    behind_two = trained(mini_model, sft, batch, tmp_path / "two")
    assert len(behind_two[0]) == 2
    same(one, behind_two)


@pytest.fixture(scope="module")
def preferred(taught: Segmenter, data: Data) -> tuple[list[TextPair], MaskPairs]:
    pairs = texts(taught, data)
    return pairs, masks(taught, data, pairs, "coarse")


@pytest.mark.parametrize("form", ["embedding", "mask"])
def test_two_processes_align_as_one(
    taught: Segmenter, data: Data, preferred: tuple[list[TextPair], MaskPairs], tmp_path: Path, form: str
) -> None:
    """One process has all pairs of answers that differ, the other none; all names of the curve are there."""
    pairs, ranked = preferred
    right = [equal_answers(pair) for pair in pairs]
    wrong = [pair for pair in pairs if pair.differs]
    order = [wrong[0], wrong[-1], right[0], right[-1]]
    make = collate(taught, data[0], 2000, ranked)
    params = AlignParams(
        train=PARAMS,
        text=1.0,
        beta_t=1.0,
        gamma=2.0,
        fewer=True,
        mask=1.0,
        mask_form=form,
        beta_s=0.1,
        anchor=1.0,
    )
    of = align_loss(params, WEIGHTS)
    model = copy.deepcopy(taught)
    model.tower.requires_grad_(False)

    def run(name: str) -> Any:
        steps = PARAMS.model_copy(update={"steps": 3, "muon": 4e-4})
        return trained(
            model, of, lambda items: make([order[item % 4] for item in items]), tmp_path / name, steps
        )

    one = run("one")
    first, second = together(lambda: run("two"))
    means = [(mine + others) / 2 for mine, others in zip(first[0], second[0], strict=True)]
    assert means == pytest.approx(one[0], rel=0, abs=1e-5)
    assert {"rewards_t/margins", "rewards_s/margins", "logps_t/chosen"} <= {
        name for _, values in one[1] for name in values
    }
    same(one, first, atol=2e-4)  # half of one of Muon's steps


def equal_answers(pair: TextPair) -> TextPair:
    return dataclasses.replace(
        pair, rejected=pair.chosen, rejected_changed=pair.chosen_changed, rejected_ref=pair.chosen_ref
    )


def test_what_two_processes_cannot_share_is_refused(
    mini_model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DevicesError, match="4 images a step cannot be shared by 3 devices"):
        toys.run(toys.toy(0.0), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DevicesError, match="batch norm would see another batch on each device"):
        toys.run(toys.toy(), tmp_path)


@pytest.mark.parametrize("kind", [torch.optim.Muon, optim.Muon32])
def test_muons_matrices_are_dealt_out_and_its_state_is_whole(
    monkeypatch: pytest.MonkeyPatch, kind: type[torch.optim.Muon]
) -> None:
    """Each process orthogonalises its own matrices alone; weights and momenta are those of one process."""

    def weights() -> list[nn.Parameter]:
        noise = torch.Generator().manual_seed(0)
        shapes = [(4, 3), (8, 8), (2, 5)]
        return [nn.Parameter(torch.randn(shape, generator=noise)) for shape in shapes]

    def work() -> tuple[int, list[Tensor], list[Tensor]]:
        made, matrices = list[Tensor](), weights()
        where, name = (
            (optim, "orthogonal") if kind is optim.Muon32 else (_muon, "_zeropower_via_newtonschulz")
        )
        plain = getattr(where, name)

        def counted(updates: Tensor, *rest: Any) -> Tensor:
            made.extend(updates if updates.ndim == 3 else [updates])
            return plain(updates, *rest)

        monkeypatch.setattr(where, name, counted)
        muon = kind(matrices, lr=0.1)
        if devices.grouped():
            optim.deal(muon)
        for step in range(3):
            for matrix in matrices:
                matrix.grad = (matrix * (step + 1)).detach().sin()
            muon.step()
        state = muon.state_dict()["state"]
        momenta = [state[number]["momentum_buffer"] for number in range(len(matrices))]
        return len(made), [matrix.detach() for matrix in matrices], momenta

    (one,) = together(work, 1)
    first, second = together(work)
    assert (one[0], first[0], second[0]) == (9, 6, 3)  # the largest is the first's, the next the second's
    for process in (first, second):
        torch.testing.assert_close(process[1:], one[1:], rtol=0, atol=0)


def test_muon_is_refused_where_the_model_is_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("POPEN_SHARD", "1")
    with pytest.raises(DevicesError, match=r"Muon needs whole matrices, .* set `muon` to 0"):
        toys.run(toys.toy(0.0), tmp_path, muon=0.02)


def test_a_share_weighs_a_mean_by_what_is_in_it() -> None:
    assert devices.share(3) == 1.0

    def work() -> tuple[float, float, dict[str, float]]:
        own = [7.0] if devices.is_main() else [1.0, 2.0, 6.0]
        weighed = torch.tensor(own).mean() * devices.share(len(own))
        mean = devices.means({"mean": weighed} | ({} if devices.is_main() else {"one": 5.0}))
        nothing = devices.share(0)
        return float(weighed), float(nothing), {name: float(value) for name, value in mean.items()}

    (first, nothing, means), (second, _, told) = together(work)
    assert (first, second) == (7.0 * 2 / 4, 3.0 * 6 / 4)
    assert nothing == 0.0
    assert means == told == {"mean": 4.0, "one": 2.5}  # (7 + 1 + 2 + 6) / 4


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    def poisoned(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, parts = toys.loss(model, batch)
        return (value / 0 if 4 * 12 in batch.indices else value), parts

    def work() -> str:
        with pytest.raises(DivergedError) as caught:
            toys.run(toys.toy(0.0), tmp_path, of=poisoned)
        return str(caught.value)

    said = together(work)
    assert said[0] == said[1]
    assert "the loss is inf at step 12" in said[0]
    assert Checkpoints(tmp_path).latest() == (7, tmp_path / "step-00000007")


@pytest.mark.slow
def test_a_sharded_model_makes_the_steps_of_a_whole_one_and_resumes_its_checkpoints(
    mini_model: Segmenter, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes, from one process's checkpoint; and on four and on one, from the two's."""
    batch = sft_batch(mini_model, data)
    one = trained(mini_model, sft, batch, tmp_path / "one")

    def work() -> Any:
        os.environ["POPEN_SHARD"] = "1"
        straight = trained(mini_model, sft, batch, tmp_path / "two")
        torch.distributed.barrier()
        return straight, trained(mini_model, sft, batch, tmp_path / "one")

    (first, behind_one), (second, _) = together(work)
    means = [(mine + others) / 2 for mine, others in zip(first[0], second[0], strict=True)]
    assert means == pytest.approx(one[0], rel=0, abs=1e-5)
    same(one, first)
    assert len(behind_one[0]) == 2
    same(one, behind_one)
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    behind_two = together(lambda: work_on(mini_model, batch, tmp_path / "four"), 4)[0]
    assert len(behind_two[0]) == 2
    same(one, behind_two)
    whole = trained(mini_model, sft, batch, tmp_path / "two")
    assert len(whole[0]) == 2
    same(one, whole)


@pytest.mark.slow
def test_a_sharded_llava_in_bfloat16_makes_the_steps_of_a_whole_one(data: Data, tmp_path: Path) -> None:
    """What docs/full_scale.md advises: frozen weights in bfloat16, LoRA, checkpointing."""
    tower = write_tower(write_llava(tmp_path / "llava"), tmp_path)
    params = llava_params(tmp_path / "llava", tower, dtype="bfloat16", checkpointing=True)
    model = Segmenter(params, load_tokenizer(params.language.name), CATEGORIES)
    model.tower.requires_grad_(False)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} >= {torch.bfloat16}
    batch = sft_batch(model, data)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return sft_loss(model(batch), batch, WEIGHTS)

    one = trained(model, loss, batch, tmp_path / "one")

    def work() -> Any:
        os.environ["POPEN_SHARD"] = "1"
        straight = trained(model, loss, batch, tmp_path / "two")
        torch.distributed.barrier()
        return straight, trained(model, loss, batch, tmp_path / "one")

    (first, behind_one), (second, _) = together(work)
    means = [(mine + others) / 2 for mine, others in zip(first[0], second[0], strict=True)]
    assert means == pytest.approx(one[0], rel=5e-3)
    assert len(behind_one[0]) == 2
    before = model.state_dict()
    moved = {name for name, value in one[2].items() if not value.equal(before[name])}
    assert any("lora_" in name for name in moved)
    for other in (first[2], behind_one[2]):
        for name in moved:  # the two round apart
            torch.testing.assert_close(other[name], one[2][name], atol=2e-3, rtol=0)


def work_on(model: Segmenter, batch: Callable[..., Any], folder: Path) -> Any:
    os.environ["POPEN_SHARD"] = "1"
    return trained(model, sft, batch, folder)
