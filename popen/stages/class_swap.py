"""Stage `class_swap`: what the SFT model loses when a target's embedding is replaced by its class mean."""

from __future__ import annotations

import json
from pathlib import Path

from popen.stages.artifacts import samples, threshold
from popen.stages.run import stage

OUT = Path("metrics/class_swap.json")


def main() -> None:
    with stage("class_swap") as run:
        from popen import devices
        from popen.evaluation.swap import class_mean_swap
        from popen.stages.systems import load_plain

        params = run.params
        asked = [sample for name in params.benchmarks if name.startswith("muse_") for sample in samples(name)]
        model = load_plain("sft", devices.device())  # autocast would keep the weights that it starts with
        with devices.autocast(params.evaluate.bf16):
            figures = class_mean_swap(
                model,
                Path(params.data.root),
                asked,
                params.evaluate.batch,
                params.data.max_pixels,
                threshold("sft"),
            )
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        run.log_metrics(figures)
        run.say("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
