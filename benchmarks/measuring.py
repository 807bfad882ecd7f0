"""One measurement after the other: each is written as soon as it is known, one that fails stops no other."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import peak

Record = dict[str, Any]


class Measuring:
    """What is measured on a device. `out` gets a JSON line a record; after `end`, on the clock of
    `time.monotonic`, no measurement is started."""

    def __init__(self, device: torch.device, out: Path) -> None:
        self.device, self.out, self.end = device, out, float("inf")
        self.peak = peak(device)
        self.records: list[Record] = []
        out.write_text("", encoding="utf-8")

    def measure(self, name: str, work: Callable[[], Record]) -> Record | None:
        """Write the record that `work` returns, or why there is none."""
        found: Record | None = None
        if time.monotonic() > self.end:
            record: Record = {"name": name, "failed": "no time left"}
        else:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                found = work()
                record = {"name": name, **found}
                if self.device.type == "cuda":
                    record["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            except torch.OutOfMemoryError:
                record = {"name": name, "failed": "out of memory"}
            except Exception as error:  # the next figure may still come
                traceback.print_exc()
                record = {"name": name, "failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.records.append(record)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        return found

    def sync(self) -> float:
        """Seconds on a clock, once the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def speed(self, seconds: float, samples: int, tokens: int, flops: float) -> Record:
        record = {"seconds": seconds, "samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}
        record["tflop_per_s"] = flops / seconds / 1e12
        return record if self.peak is None else record | {"utilisation": flops / seconds / self.peak}


def table(records: Sequence[Record]) -> str:
    """Markdown, one line a record."""
    columns = ("seconds", "samples_per_s", "tokens_per_s", "utilisation", "peak_gb", "ratio", "failed")
    lines = ["| measured | s | samples/s | tokens/s | of the peak | GB | ratio | |", "|" + " --- |" * 8]
    for record in records:
        cells = [record.get(column, "") for column in columns]
        told = [f"{cell:,.3g}" if isinstance(cell, float) and cell < 100 else cell for cell in cells]
        told = [f"{cell:,.0f}" if isinstance(cell, float) else cell for cell in told]
        lines.append("| " + " | ".join([record["name"], *told]) + " |")
    return "\n".join(lines)
