"""The page on oracles shows the names that are compared, and every column with a figure that keeps its promise."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.oracles import bridge, test_loops, test_transformer_lens
from tests.oracles.worst import COLUMNS

DOCS = Path(__file__).parents[2] / "docs" / "oracles.md"


def table(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without code marks, headings first."""
    section = DOCS.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|--")
    ]


def test_the_names_are_those_that_are_compared() -> None:
    shown = {
        row[0].replace("blocks.{l}.", ""): row[1].replace("blocks.{l}.", "") for row in table("Names")[1:]
    }
    assert shown == bridge.NAMES | bridge.LAYER_NAMES


def test_every_column_and_hook_point_has_its_figure() -> None:
    for heading, families, names, tolerance in (
        ("Loops", tiny.FAMILY_NAMES, [*COLUMNS, "every column of the layers table"], test_loops.TOLERANCE),
        ("TransformerLens", bridge.FAMILIES, COLUMNS, test_transformer_lens.TOLERANCE),
        (
            "Hook points",
            bridge.FAMILIES,
            [*bridge.NAMES, *bridge.LAYER_NAMES],
            test_transformer_lens.TOLERANCE,
        ),
    ):
        (_, *shown), *rows = table(heading)
        assert tuple(shown) == families
        assert [row[0] for row in rows] == list(names)
        for name, *figures in rows:
            for family, figure in zip(families, figures, strict=True):
                if figure == "-":
                    assert name in bridge.MISSING[family]
                else:
                    assert figure == "equal" or 0 < float(figure) < tolerance
