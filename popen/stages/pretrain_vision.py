"""Stage `pretrain_vision`: an own tower learns to see, and the decoder to draw; a named tower needs none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from popen.stages.run import Run, stage

OUT = Path("artifacts/vision")
HELD_OUT = 128  # images that validation looks at


def pretrain(run: Run) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from torch import Tensor, nn

    from popen.data.images import open_image
    from popen.model.dense import categories_of, dense_accuracy, dense_loss, image_array
    from popen.model.losses import bce, dice
    from popen.model.sight import Pixels, Seen, Sight, paint_loss
    from popen.model.tally import centre_loss, count_accuracy
    from popen.samples import Sample
    from popen.stages.learning import INDEX, fit, image_plan, samples

    params, train_samples = run.params, samples("train")
    categories = categories_of(train_samples)
    root, size = Path(params.data.root), params.model.vision.image_size
    torch.manual_seed(params.seed)
    model = Sight(params.model, categories)

    def drawing(sample: Sample, number: int) -> tuple[Sample, list[int]]:
        order = np.random.default_rng([params.seed, 2, number]).permutation(len(sample.objects))
        return sample, order[: params.pretrain_vision.questions].tolist()

    def collate(items: Sequence[tuple[Sample, list[int]]]) -> Pixels:
        opened = [open_image(root, sample.image, params.data.max_pixels) for sample, _ in items]
        arrays, grid = [image_array(image, size) for image in opened], model.tower.grids[-1]
        return Pixels.of(arrays, [one for one, _ in items], [some for _, some in items], categories, grid)

    def loss(model: nn.Module, batch: Pixels) -> tuple[Tensor, dict[str, Tensor]]:
        seen: Seen = model(batch)
        masks, whole = seen.masks.float(), torch.ones_like(batch.things)
        parts = {
            "dense": dense_loss(seen.dense, batch.labels),
            "paint": paint_loss(seen.painted, batch.images),
            "centres": centre_loss(seen.centres, batch.centres),
            "bce": bce(masks, batch.things, whole).mean(),
            "dice": dice(masks, batch.things, whole).mean(),
        }
        total = torch.stack([4 * value if name == "bce" else value for name, value in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    plan, held_out = (
        image_plan([one for one in some if one.objects], 1, params.seed)
        for some in (train_samples, samples("val"))
    )
    known = [drawing(held_out.item(i)[0], i) for i in range(min(len(held_out.groups), HELD_OUT))]
    batch = collate(known)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        here = batch.to(next(model.parameters()).device)
        seen: Seen = model(here)
        every, things = dense_accuracy(seen.dense, here.labels)
        drawn, true = seen.masks > 0, here.things > 0
        ious = (drawn & true).sum((1, 2)) / (drawn | true).sum((1, 2)).clamp(min=1)
        return {
            "val/pixel_accuracy": every,
            "val/thing_accuracy": things,
            "val/paint": float(paint_loss(seen.painted, here.images)),
            "val/count_accuracy": count_accuracy(seen.centres, here.centres),
            "val/mask_iou": float(ious.mean()),
        }

    fit(
        run,
        model,
        params.pretrain_vision,
        lambda number: drawing(plan.item(number)[0], number),
        collate,
        loss,
        evaluate,
        [INDEX / "train.jsonl", INDEX / "val.jsonl"],
        [params.model],
        lambda: save_file(model.shared(), OUT / "model.safetensors"),
    )


def main() -> None:
    with stage("pretrain_vision") as run:
        OUT.mkdir(parents=True, exist_ok=True)
        if run.params.model.vision.untrained:
            pretrain(run)
        else:
            (OUT / "skipped.txt").write_text(
                f"the tower {run.params.model.vision.name} has weights of its own\n"
            )


if __name__ == "__main__":
    main()
