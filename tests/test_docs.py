"""What the documentation tells a reader to type exists: parameters, splits, make targets, linked pages."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from popen.data.tree import parse
from popen.params import compose, load

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


def experiments() -> list[list[str]]:
    """The overrides (-S) of every `dvc exp run` in the code blocks of the pages."""
    blocks = "\n".join(
        block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    )
    commands = [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines() if "exp run" in line]
    return [[word for flag, word in pairwise(words) if flag == "-S"] for words in commands]


@pytest.mark.parametrize("overrides", experiments(), ids=lambda words: f"{len(words)} overrides")
def test_documented_experiments_are_valid_parameters(overrides: list[str]) -> None:
    params = compose(ROOT / "conf", overrides)
    assert overrides
    assert params != load(ROOT / "params.yaml")
    assert set(params.benchmarks) <= params.data.splits.keys()
    for specs in params.data.splits.values():
        assert all(parse(spec) for spec in specs)


def test_the_street_example_is_among_them() -> None:
    assert any("benchmarks=[muse_test]" in overrides for overrides in experiments())


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(READY)", ".venv/.ready")
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS[name], re.S)
    spans = re.findall(r"`([^`\n]+)`", TEXTS[name])
    commands = [line for text in [*blocks, *spans] for line in text.splitlines()]
    asked = [found[1] for line in commands if (found := re.match(r"make ([\w./-]+)", line.strip()))]
    assert len(asked) >= {"README.md": 8, "operations.md": 4}.get(name, 0)
    for target in asked:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_linked_pages_and_sections_exist(name: str) -> None:
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        page, _, section = link.partition("#")
        if not page.endswith(".png"):
            assert not page or (folder / page).is_file(), link
            assert not section or section in headings(TEXTS[Path(page or name).name]), link
