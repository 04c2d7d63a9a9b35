"""The table of docs/families.md: what each family has been tested for. A cell is written by the test that it names:

pytest -p no:xdist tests/families tests/plan/test_families.py --families-table docs/families.md
pytest -p no:xdist -m soak tests/families/test_training.py --families-table docs/families.md
"""

from __future__ import annotations

from pathlib import Path

import pytest

# Headings, and the tests that fill the cells below them.
COLUMNS = {
    "vLLM: nats": "test_logprobs_equal_the_policys_before_and_after_every_sync",
    "turns: nats": "test_logprobs_equal_the_policys_over_turns_with_images",
    "shared prompts: nats": "test_packed_forward_equals_per_sample_forward",
    "gradients": "test_packed_forward_equals_per_sample_forward",
    "experts": "test_packed_forward_equals_per_sample_forward",
    "2 ranks": "test_a_step_of_two_ranks_is_that_of_one",
    "adapters a layer": "test_adapters_alone_have_gradients",
    "memory, planned": "test_a_forward_keeps_what_is_planned",
    "runs with vLLM": "test_a_run_trains_and_its_checkpoint_starts_the_next",
}
HEAD = "| model_type | " + " | ".join(COLUMNS) + " |"
CELLS = pytest.StashKey[dict[tuple[str, str], list]]()


@pytest.fixture
def cell(request):
    """Adds to the cell of a column, in the row of the test's family, what has been found."""
    family, cells = request.node.callspec.params["folder"], request.config.stash.setdefault(CELLS, {})

    def found(column: str, value: object) -> None:
        assert COLUMNS[column] == request.node.originalname
        cells.setdefault((family, column), []).append(value)

    return found


def read(file: Path) -> dict[str, list[str]]:
    """The table's rows: family to its cells."""
    lines = file.read_text("utf-8").split(HEAD)[1].split("\n\n")[0].splitlines()[2:]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name.strip("`"): cells for name, *cells in rows}


def write(file: Path, cells: dict[tuple[str, str], list]) -> None:
    """Put what was found into the table, beside what was found before."""
    rows = read(file)
    for (family, column), values in cells.items():
        row = rows.setdefault(family, [""] * len(COLUMNS))
        row[list(COLUMNS).index(column)] = _text(values)
    before, _, rest = file.read_text("utf-8").partition(HEAD)
    lines = [HEAD, "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| `{family}` | {' | '.join(row)} |" for family, row in sorted(rows.items())]
    file.write_text(before + "\n".join(lines) + "\n\n" + rest.partition("\n\n")[2], "utf-8")


def _text(values: list) -> str:
    if isinstance(values[0], float):  # an error: the largest
        return f"{max(values):.0e}".replace("e-0", "e-")
    return ", ".join(dict.fromkeys(map(str, values)))
