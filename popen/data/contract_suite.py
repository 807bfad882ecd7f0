"""The Great Expectations suite of the data contract, one part a table of `contract_tables`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from popen.params import ContractParams

if TYPE_CHECKING:
    from popen.data.contract_tables import Tables

EXAMPLES = 5  # unexpected values that a report shows


@dataclass(frozen=True)
class Expectation:
    """One rule and how it fared: rows checked and refused, a few of the values refused."""

    name: str
    table: str
    success: bool
    observed: str
    checked: int
    unexpected: int
    rows: tuple[int, ...] = field(repr=False)


def suite(contract: ContractParams, known: list[str]) -> dict[str, list[Any]]:
    """Table -> expectations; `meta["rule"]` is the rule in words."""
    import great_expectations.expectations as gxe  # 4-9 s, so only where it is needed

    def rule(text: str) -> dict[str, Any]:
        return {"meta": {"rule": text}}

    empty = gxe.ExpectColumnValuesToBeNull
    equal = gxe.ExpectColumnPairValuesToBeEqual
    match = gxe.ExpectColumnValuesToMatchRegex
    between = gxe.ExpectColumnValuesToBeBetween
    either: dict[str, Any] = {"ignore_row_if": "either_value_is_missing"}
    smallest = f"targets have {contract.min_area} pixels or more"
    balance = f"no kind of question has more than {contract.max_kind_share:.0%} (of three or more kinds)"
    return {
        "records": [empty(column="rule", **rule("every record can be read"))],
        "images": [empty(column="error", **rule("every image is readable and within limits"))],
        "photographs": [empty(column="leak", **rule("no photograph is in two roles that must not share"))],
        "samples": [
            gxe.ExpectCompoundColumnsToBeUnique(
                column_list=["role", "uid"], **rule("ids are unique within a role")
            ),
            match(column="question", regex=r"\S", **rule("questions are not empty")),
            match(column="answer", regex=r"\S", **rule("answers are not empty")),
            equal(column_A="marks", column_B="targets", **rule("answers have one {seg} a target")),
            equal(column_A="height", column_B="image_height", **either, **rule("height is the image file's")),
            equal(column_A="width", column_B="image_width", **either, **rule("width is the image file's")),
        ],
        "targets": [
            equal(column_A="mask_height", column_B="height", **rule("masks are as high as their image")),
            equal(column_A="mask_width", column_B="width", **rule("masks are as wide as their image")),
            between(column="area", min_value=contract.min_area, **rule(smallest)),
            match(column="name", regex=r"\S", **rule("targets have a name")),
            gxe.ExpectColumnValuesToBeInSet(
                column="category", value_set=known, **rule("categories are among the annotated ones")
            ),
        ],
        "roles": [
            between(column="samples", min_value=1, **rule("every role has samples")),
            between(column="kind_share", max_value=contract.max_kind_share, **rule(balance)),
        ],
    }


def run(tables: Tables, contract: ContractParams) -> list[Expectation]:
    """Check every table, in the suite's order, in an ephemeral context that writes and sends nothing."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when it is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("contract")
    out: list[Expectation] = []
    for table, expectations in suite(contract, tables.known).items():
        definition = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        batch = definition.get_batch({"dataframe": tables.frames[table]})
        result = batch.validate(
            gx.ExpectationSuite(name=table, expectations=expectations),
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
        )
        found = {item.name: item for item in (_expectation(table, entry) for entry in result.results)}
        out += [found[expectation.meta["rule"]] for expectation in expectations]  # GX has its own order
    return out


def _expectation(table: str, result: Any) -> Expectation:
    name = result.expectation_config.meta["rule"]
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"the rule '{name}' could not be checked: {result.exception_info}")
    rows = tuple(sorted({int(index["row"]) for index in result.result["unexpected_index_list"]}))
    values = [entry["value"] for entry in result.result["partial_unexpected_counts"]]
    return Expectation(
        name=name,
        table=table,
        success=bool(result.success),
        observed=", ".join(dict.fromkeys(_show(value) for value in values[:EXAMPLES])),
        checked=int(result.result["element_count"]),
        unexpected=len(rows),
        rows=rows,
    )


def _show(value: Any) -> str:
    """A value without numpy's type names, shortened."""
    parts = value if isinstance(value, tuple | list) else [value]
    return " / ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in parts)[:160]
