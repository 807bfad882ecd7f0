"""The registry's versions as a table in words."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from popen.promotion import registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

HEAD = ("version", "alias", "made", "commit", "data", "dvc.lock", "gate", "gate's metrics")
_SHORT = 8  # digits of a hash


def table(client: MlflowClient) -> str:
    """A line a version, the newest first. Raises RegistryError where there is none."""
    found = registry.versions(client)
    if not found:
        raise registry.RegistryError(
            "no version is registered yet; `python -m flows.retraining` makes and registers one"
        )
    names: dict[str, list[str]] = {}
    for alias, number in registry.aliases(client).items():
        names.setdefault(number, []).append(alias)
    lines = [HEAD, *(_line(one, sorted(names.get(str(one.version), []))) for one in reversed(found))]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _line(version: ModelVersion, aliases: list[str]) -> tuple[str, ...]:
    tags = version.tags
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.creation_timestamp / 1000))
    hashes = [_short(tags.get(name, "-")) for name in ("git.commit", "data", registry.LOCK)]
    return (str(version.version), ",".join(aliases) or "-", made, *hashes, *_gate(tags))


def _short(digest: str) -> str:
    digits, dash, dirty = digest.partition("-dirty")
    return f"{digits[:_SHORT]}{dash}{dirty}"


def _gate(tags: dict[str, str]) -> tuple[str, str]:
    """The gate's result and the metrics that it looked at, those that broke a rule marked with "!"."""
    if registry.GATE not in tags:
        return "not judged", "-"
    found = json.loads(tags[registry.GATE])
    against = "first" if found["against"] is None else f"against {found['against']}"
    result = f"{'passed' if found['passed'] else 'refused'} ({against})"
    if registry.ROLLED_BACK in tags:
        result += ", rolled back"
    return result, " ".join(map(_metric, found["checks"])) or "-"


def _metric(check: dict[str, object]) -> str:
    value, gain = check["challenger"], check["gain"]
    shown = f"{value:.3f}" if isinstance(value, float) else "?"
    moved = f"({gain:+.3f})" if isinstance(gain, float) else ""
    return f"{check['metric']}={shown}{moved}{'' if check['passed'] else '!'}"
