"""Stage `control`: SFT trained on by all its losses, on its own corpus, for the steps and questions that
alignment gets."""

from __future__ import annotations

from popen.params import TrainParams
from popen.stages.artifacts import MODELS, index, samples
from popen.stages.run import stage

MODEL, OUT = MODELS / "sft", MODELS / "control"


def at_rate(train: TrainParams, share: float) -> TrainParams:
    """The same training at a share of its learning rates."""
    return train.model_copy(update={"lr": share * train.lr, "muon": share * train.muon})


def main() -> None:
    with stage("control", shared=True) as run:
        from torch import Tensor, nn

        from popen.model.batches import Batch
        from popen.model.losses import sft_loss
        from popen.model.segmenter import Segmenter
        from popen.stages.learning import both_stages, fit, image_plan, sft_collate

        params = run.params
        model = Segmenter.load(MODEL)
        model.tower.requires_grad_(False)

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(model(batch), batch, params.sft.loss)

        train = at_rate(both_stages(params.align.train), params.control.rate)
        plan = image_plan(samples("train"), 1, params.seed + 1)  # a pair is one question, too
        fit(
            run,
            model,
            train,
            plan.item,
            sft_collate(model, run, 1, auxiliary=params.sft.loss.of_the_image),
            loss,
            None,
            [MODEL, index("train")],
            [params.sft.loss],
            lambda: model.save(OUT),
        )


if __name__ == "__main__":
    main()
