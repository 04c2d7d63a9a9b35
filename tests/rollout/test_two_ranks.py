"""vLLM on two torchrun ranks, each in its trainer's process, with a weight stream that is collective."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.rollout.dialogues import model_whose_turns_end

ROOT = Path(__file__).parents[2]


def test_every_rank_samples_its_own_prompts_from_the_synced_policy(tmp_path):
    """Law 1 on both ranks, with different numbers of prompts, and of conversations and turns: an engine per rank, and
    one engine over both."""
    folder = model_whose_turns_end(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.rollout.two_ranks", str(folder), str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for tensor_parallel_size in ("1", "2"):
        first, second = (ranks[tensor_parallel_size] for ranks in seen)
        assert (first["groups"], second["groups"]) == (4, 3)
        assert max(first["errors"] + second["errors"]) < 1e-5
        # The same prompts and seed: ranks of their own engines must not all draw the same samples.
        assert first["tokens"] != second["tokens"]
        assert [len(ranks["talks"]) for ranks in (first, second)] == [3, 6]  # with different numbers of turns, too
        assert max(turns for turns, _ in first["talks"] + second["talks"]) == 3
        assert first["talks"][0] != second["talks"][0]
