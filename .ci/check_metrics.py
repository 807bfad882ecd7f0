"""metrics/summary.json holds every benchmark x system of params.yaml, in finite numbers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from popen import params

METRICS = ("gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing", "area_ratio", "questions")


def problems(summary: dict[str, Any], benchmarks: list[str], systems: list[str]) -> list[str]:
    """What is missing or not a finite number, one line each. A metric may be null where a benchmark
    does not define it (no objects are annotated, say), but not everywhere."""
    found = []
    seen: set[str] = set()
    for benchmark in benchmarks:
        for system in systems:
            row = summary.get(benchmark, {}).get(system)
            if row is None:
                found.append(f"{benchmark} x {system}: missing")
                continue
            for metric in METRICS:
                value = row.get(metric, math.nan)
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    found.append(f"{benchmark} x {system}: {metric} is {row.get(metric, 'missing')}")
                seen.add(metric)
    found += [f"{metric}: null in every benchmark" for metric in METRICS if metric not in seen]
    comparisons = summary.get("comparisons", [])
    if not comparisons:
        found.append("comparisons: none")
    for row in comparisons:
        bad = [key for key in ("difference", "low", "high") if not math.isfinite(row.get(key, math.nan))]
        if bad:
            name = f"{row.get('benchmark')} {row.get('metric')}"
            found.append(f"comparison {name}: {', '.join(bad)} not finite")
    return found


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    wanted = params.load(root / "params.yaml")
    summary = json.loads((root / "metrics" / "summary.json").read_text(encoding="utf-8"))
    found = problems(summary, wanted.benchmarks, wanted.systems)
    for line in found:
        print(f"metrics/summary.json: {line}", file=sys.stderr)
    if not found:
        size = f"{len(wanted.benchmarks)} benchmarks x {len(wanted.systems)} systems"
        print(f"metrics/summary.json: {size}, all there and finite")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
