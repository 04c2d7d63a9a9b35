"""A run on data that is not held: killed and resumed, it is the run that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rethinker.checkpoint.resume import read_state
from tests.integration.interruptions import assert_equal_runs, finish, kill, newest, prepare, rows, start, wait_for


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_exactly(tmp_path, ranks):
    """Images in the rows, replay that reaches back over episodes; bit for bit."""
    prepare(tmp_path)
    table = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    for row in table:
        row["images"] = [{"bytes": Path(path).read_bytes()} for path in row["images"]]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=8)
    options = ["--data.train", str(tmp_path / "rows.parquet"), "--data.validation", "split"]
    options += ["--data.validation_share", "0.2", "--data.streaming", "true"]
    finish(tmp_path, "whole", *options, ranks=ranks)
    process = start(tmp_path, "killed", *options, ranks=ranks)
    wait_for(lambda: newest(tmp_path / "killed") == 6 and len(rows(tmp_path / "killed")) > 6, process)
    kill(process)
    assert read_state(tmp_path / "killed/checkpoints/last/trainer/run")["queries"]
    finish(tmp_path, "killed", *options, "--resume", "auto", ranks=ranks)
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
