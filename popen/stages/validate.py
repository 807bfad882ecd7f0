"""Read the native splits of every role, check the data contract, write the indices that stages read.

artifacts/index/<role>.jsonl     accepted samples, only when the contract is kept
artifacts/contract/report.html   what was checked and found, for people
artifacts/contract/report.json   the same for programs
artifacts/contract/quarantine.jsonl   records left out, and why
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from popen.data.contract import FITTED, ContractError, Report, validate
from popen.data.contract_page import render
from popen.samples import write_index
from popen.stages.artifacts import CONTRACT, index
from popen.stages.run import stage


def main() -> None:
    with stage("validate") as run:
        data = run.params.data
        try:
            report = validate(Path(data.root), data.splits, data.max_pixels, run.params.contract)
        except ContractError as error:
            write_report(CONTRACT, error.report)
            run.log_artifact(CONTRACT)
            raise
        write_report(CONTRACT, report)
        run.log_artifact(CONTRACT)
        lacking = [role for role in FITTED if role not in data.splits]
        if lacking:  # said before a night of training, not behind it
            run.say(f"data.splits has no role {' and no '.join(lacking)}: a stage that needs it will stop")
        for role, samples in report.samples.items():
            write_index(index(role), samples)
        run.log_metrics(
            {
                "records": report.records,
                "broken_share": report.broken_share,
                **{f"questions/{role}": len(samples) for role, samples in report.samples.items()},
            }
        )


def write_report(folder: Path, report: Report) -> None:
    """report.html, report.json and quarantine.jsonl (one broken record a line) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    lines = [json.dumps(asdict(item)) + "\n" for item in report.broken]
    (folder / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
