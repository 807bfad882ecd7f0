"""The contract's page, and the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

from popen.data.contract_page import render
from popen.stages.validate import write_report
from tests.data.test_contract import check, records, refusal
from tests.data.trees import muse_record, muse_tree


def test_the_page_and_files_show_a_broken_contract_and_escape_it(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    content = records(1, muse_record(file_name=f"{evil}.png", question_kinds=[evil, evil, "use"]))
    muse_tree(tmp_path / "data", train=[content[0]])
    (tmp_path / "data/muse/muse_train.json").write_text(json.dumps(content))
    error = refusal(tmp_path / "data")
    page = render(error.report)
    assert "Broken: the pipeline stops here" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page  # works offline
    write_report(tmp_path / "out", error.report)
    assert (tmp_path / "out/report.html").read_text() == page
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert (written["accepted"], written["records"]) == (False, 2)
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["1/0", "1/1", "1/2"]


def test_the_page_of_a_kept_contract_shows_roles_and_kinds(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(2))
    page = render(check(tmp_path))
    assert '<p class="verdict good">Kept</p>' in page
    assert page.count("&#10007;") == 0
    assert ">use<" in page
    assert "33.3%" in page
    assert '<td class="number">2</td><td class="number">6</td>' in page  # images, questions
