"""A run on data that is not held: stopped and resumed, it is the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rethinker.runtime.state_file import read_state
from tests.integration.interruptions import STEPS, assert_equal_runs, finish, prepare, rows, start, wait_for


@pytest.mark.soak
def test_a_stopped_run_goes_on_exactly(tmp_path):
    """Images in the rows, windows smaller than an episode, replay that reaches back over windows; bit for bit."""
    prepare(tmp_path)
    table = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    for row in table:
        row["images"] = [{"bytes": Path(path).read_bytes()} for path in row["images"]]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=8)
    options = ["--data.train", str(tmp_path / "rows.parquet"), "--data.validation", "split"]
    options += ["--data.validation_share", "0.2", "--data.streaming", "true", "--data.shuffle_buffer", "10"]
    finish(tmp_path, "whole", *options)
    saved = read_state(tmp_path / "whole/checkpoints/last/trainer/rank_00000")
    assert saved["position"]["stream"]["windows"][""]["start"]["place"]  # the data was not held
    process = start(tmp_path, "stopped", *options)
    wait_for(lambda: len(rows(tmp_path / "stopped")) >= 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert 5 <= len(rows(tmp_path / "stopped")) < STEPS
    finish(tmp_path, "stopped", *options, "--resume", "auto")
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")
