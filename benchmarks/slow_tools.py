"""What a slow environment costs a rollout: one that takes a second for a tenth of its answers, beside the same at once.

    python -m benchmarks.slow_tools [--queries 128] [--repeats 3] [--out DIR]

Responses of three turns to the questions of `crop_cpu`, by its warmed-up model in vLLM within this process. Both kinds
take turns, after a first rollout that does not count. Writes results/<cpu or gpu>/slow_tools.json: seconds and sampled
tokens of each rollout, and how much of its tokens per second a rollout loses to the delays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

from rethinker.environments import Observation

RESULTS = Path(__file__).parent / "results"
SECONDS, ONE_IN, TURNS = 1.0, 10, 3
KINDS = ("at_once", "slow")


def at_once(state: dict[str, Any], text: str) -> Observation:
    """Answers the first turns of a response."""
    state["turns"] = state.get("turns", 0) + 1
    return Observation("Once more.", done=state["turns"] == TURNS, calls=1)


def slow(state: dict[str, Any], text: str) -> Observation:
    """The same, after a second for one of ten turns."""
    answer = at_once(state, text)
    if zlib.crc32(f"{state['query'].id} {state['turns']} {text}".encode()) % ONE_IN == 0:
        time.sleep(SECONDS)
    return answer


def measure(queries: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Of each kind the seconds, sampled tokens and turns of its rollouts."""
    from rethinker.data.datasets import load_queries
    from rethinker.data.prompts import PromptEncoder
    from rethinker.embedded.files import as_files, model_folder
    from rethinker.policy.loading import load_processor
    from rethinker.rollout.dialogue import Dialogue
    from rethinker.rollout.engine import make_engine, respond
    from rethinker.runtime.distributed import ALONE
    from rethinker.settings import resolve_config

    config = resolve_config("crop_cpu", ["--rollout.max_new_tokens=192", "--environment.workers=32"])
    config.environment.max_turns = TURNS
    folder = model_folder(config, ALONE)
    encoder = PromptEncoder(load_processor(folder), config.data)
    every = load_queries(as_files(config.data, "train"), "train")
    asked = every[:: len(every) // queries][:queries]
    prompts = [encoder.encode(query) for query in asked]
    engine = make_engine(config, folder, **vars(ALONE))
    sampling = {"n": config.rollout.group_size, "max_new_tokens": 192, "temperature": 1.0}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    dialogues = {}
    for kind in KINDS:
        config.environment.use = [f"{__file__}:{kind}"]
        dialogues[kind] = Dialogue(config, encoder)
    try:
        for repeat in range(-1, repeats):
            for kind in KINDS if repeat >= 0 else KINDS[:1]:
                engine._engine.reset_prefix_cache()  # each rollout begins as one after a weight sync
                engine._engine.reset_encoder_cache()
                begin = time.perf_counter()
                groups = respond(engine, dialogues[kind], asked, prompts, seed=repeat + 1, **sampling)
                seconds = time.perf_counter() - begin
                responses = [response for group in groups for response in group]
                if repeat >= 0:
                    tokens = sum(response.sampled_tokens for response in responses)
                    turns = sum(len(response.observed) for response in responses)
                    found[kind].append({"seconds": seconds, "tokens": tokens, "answers": turns})
    finally:
        for dialogue in dialogues.values():
            dialogue.close()
        engine.close()
    return found


def main() -> None:
    """Parse the command line, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--queries", type=int, default=128, help="each with eight responses [128]")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts of each kind [3]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the folder of results is [here]")
    options = parser.parse_args()
    found = measure(options.queries, options.repeats)

    from benchmarks.machine import describe

    rates = {kind: statistics.median(run["tokens"] / run["seconds"] for run in runs) for kind, runs in found.items()}
    loss = 1 - rates["slow"] / rates["at_once"]
    machine = describe()
    folder = options.out / (machine["gpu"] or "cpu").lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "seconds_of_an_answer": SECONDS, "one_in": ONE_IN, "queries": options.queries}
    content |= {"rollouts": found, "tokens_per_s": rates, "loss": loss}
    (folder / "slow_tools.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for kind, rate in rates.items():
        print(f"{kind:8} {rate:8.0f} tokens/s  {[round(run['seconds'], 1) for run in found[kind]]} s")
    print(f"loss {loss:.1%}")


if __name__ == "__main__":
    main()
