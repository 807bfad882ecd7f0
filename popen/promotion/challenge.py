"""After training: register the result, let it answer beside the champion, promote it or say why not."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from popen import params as parameters
from popen import pipeline, tracking
from popen.params import Params
from popen.promotion import opponent, registry
from popen.promotion.card import card
from popen.promotion.gate import Verdict, judge
from popen.stages.artifacts import BUNDLE
from popen.stages.model_record import record

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Outcome:
    """What became of the clone's results. `verdict` is None where there was nothing to judge."""

    version: str
    champion: bool  # whether that version is the champion now
    words: str  # Markdown
    verdict: Verdict | None = None


def challenge(root: Path, home: Path, reason: str) -> Outcome:
    """Register the results in `root` and promote them if the gate lets them pass.

    All of it is recorded as a run `retrain` in MLflow; `reason` says what it was done for. May be killed and
    called again at any point. Raises RegistryError, GateError, EvaluationError, ModelError (a champion that
    the present code cannot load).
    """
    run = tracking.start_parent(home)  # a run of its own, which no stage is below
    status: tracking.Status = "FAILED"
    try:
        client = registry.connect(home)
        client.set_tag(run, "stage", "retrain")
        client.update_run(run, name=time.strftime("retrain %Y-%m-%d %H:%M:%S"))
        params = parameters.load(root / "params.yaml")
        facts = registry.lineage(root)
        if registry.recorded(client, facts.bundle) is None:  # MLflow was away, or DVC's cache had the bundle
            record(tracking.tracking_uri(home), run, root / BUNDLE)
        version = registry.register(client, root, facts, card(root, facts))
        outcome = _decide(client, root, params, version)
        _record(client, run, outcome, reason)
        status = "FINISHED"
    finally:
        tracking.end_parent(home, run, status)
    return outcome


def _decide(client: MlflowClient, root: Path, params: Params, version: ModelVersion) -> Outcome:
    number, champion = str(version.version), registry.version(client, registry.CHAMPION)
    if champion is not None and str(champion.version) == number:
        words = f"Version {number} is the champion already: these results are its own."
        return Outcome(number, True, f"{words}\n\n{version.description}")  # a retry has no other verdict
    undone = registry.rolled_back(client, version)
    if undone is not None:
        return Outcome(
            number,
            False,
            f"Version {number} is not promoted: its weights are those of version {undone.version}, which was "
            f"rolled back on {undone.tags[registry.ROLLED_BACK]}. While that one is the previous one, "
            "`popen models rollback` makes it the champion again.",
        )
    if champion is not None and _refused(version, champion, params):
        words = f"Version {number} stays a challenger: the same champion and gate refused it before."
        return Outcome(number, False, f"{words}\n\n{version.description}")
    asked = opponent.questions(root, params)
    ours = opponent.challenger_rows(root, params, asked)
    theirs = None
    if champion is not None:
        with tempfile.TemporaryDirectory(prefix="popen-champion-") as folder:
            bundle = opponent.download(champion, Path(folder))
            theirs = opponent.champion_rows(bundle, root, params, asked)
    verdict = judge(theirs, ours, params.gate, params.evaluate.bootstrap, params.seed)
    if pipeline.lock_digest(root) != version.tags[registry.LOCK]:
        raise registry.RegistryError(
            f"the results in {root} changed while version {number} was judged; run `retrain` again"
        )
    promoted = registry.promote(client, version, verdict, champion, params.gate)
    result = f"Version {number} is the champion." if promoted else f"Version {number} stays a challenger."
    before = "" if champion is None else f" Champion before: version {champion.version}."
    return Outcome(number, promoted, f"{result}{before}\n\n{verdict.words}", verdict)


def _refused(version: ModelVersion, champion: ModelVersion, params: Params) -> bool:
    """Whether this gate has judged these results against this champion and refused them: the champion's
    answers would be the same tonight."""
    if registry.GATE not in version.tags:
        return False
    told, gate = json.loads(version.tags[registry.GATE]), params.gate.model_dump(mode="json")
    # a verdict that an older version of this package wrote does not tell its gate
    return (told["passed"], told["against"], told.get("gate")) == (False, str(champion.version), gate)


def _record(client: MlflowClient, run: str, outcome: Outcome, reason: str) -> None:
    from mlflow.entities import Metric, RunTag

    checks = outcome.verdict.checks if outcome.verdict else ()
    now = int(time.time() * 1000)
    values = {
        f"gate/{check.metric}/{name}": value
        for check in checks
        for name, value in (("gain", check.gain), ("low", check.low), ("challenger", check.challenger))
        if value is not None
    }
    tags = {"version": outcome.version, "champion": json.dumps(outcome.champion), "reason": reason}
    client.log_batch(
        run,
        metrics=[Metric(name, value, now, 0) for name, value in values.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    client.log_text(run, outcome.words, "verdict.md")
