"""What every rollout engine does: sample, report log-probs, take over weights, sleep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pkgutil import resolve_name
from typing import Any, Protocol

import torch

from rethinker.config import Config
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.dialogue import Conversation, Dialogue
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Prompt, Query

LOOK_S = 0.05
"""How often a wait for environments looks at the deadline."""
SEED_OF_A_TURN = 7919
"""Seeds of two turns are so far apart."""
Checksum = tuple[str, int]
"""SHA-256 of a tensor's bytes as one type, and its length along the first dimension."""


class WeightStream(Protocol):
    """The policy's weights, as its engine gives them to the rollout."""

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name (as in a checkpoint), type and full shape of every tensor, in the order of iteration; no collective."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors, one at a time, each valid until the next. Collective: every rank iterates to the end."""


class RolloutEngine(Protocol):
    """Samples responses and reports the log-probability of every token it sampled.

    A backend inherits from this class, defines `generate` and `sync`, has its settings as `config`, and is named in
    ENGINES.
    """

    config: Config

    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt from the whole distribution.

        Args:
            prompts: this rank's prompts.
            n: completions per prompt.
            max_new_tokens: longest completion; one number, or one per prompt.
            temperature: 0 is greedy.
            seed: the same on every rank, which draw different samples from it. The same prompts, weights and seed
                give the same completions. The caller's random state is left as it was.

        Returns:
            [prompt][sample].

        Raises:
            TimeoutError: after `rollout.timeout_s`.
            ConfigError: a prompt does not fit, or its image tokens differ from the engine's.
        """

    def converse(self, conversations: list[Conversation], *, temperature: float, seed: int) -> list[Completion]:
        """Sample responses of several turns, each until it does not go on.

        Here all conversations say their turns together; a backend that can lets each go on by itself.

        Args:
            conversations: this rank's, not opened yet.
            temperature, seed: as in `generate`. Every turn draws other samples.

        Returns:
            The response of each conversation.

        Raises:
            TimeoutError: after `rollout.timeout_s`, environments included.
            RuntimeError: the environment was closed meanwhile.
        """
        for one in conversations:
            one.open()
        going, turn = conversations, 0
        with Deadline(f"the rollout of {len(conversations)} conversations", self.config.rollout.timeout_s) as deadline:
            while True:
                while open_ones := [one.waits for one in going if not one.waits.done()]:
                    wait(open_ones, LOOK_S)
                    deadline.check(f"the environment has not answered turn {turn} everywhere")
                going = [one for one in going if one.goes_on()]
                if not self._any(bool(going)):
                    return [one.completion() for one in conversations]
                prompts, rooms = [one.prompt for one in going], [one.room for one in going]
                drawn = seed + turn * SEED_OF_A_TURN
                said = self.generate(prompts, n=1, max_new_tokens=rooms, temperature=temperature, seed=drawn)
                for one, (completion,) in zip(going, said, strict=True):
                    one.say(completion)
                turn += 1
                deadline.check(f"{turn} turns are said")

    def _any(self, here: bool) -> bool:
        """Whether a rank that must call `generate` whenever this one does still has prompts."""
        return here

    def sync(self, weights: WeightStream, version: int) -> None:
        """Take over the policy's weights (collective). After it, `generate` samples from policy `version`.

        Raises:
            TimeoutError: after `rollout.timeout_s`.
            RuntimeError: a tensor is missing, unknown, or (with `rollout.check_sync`) differs from the policy's.
        """

    def sleep(self) -> None:
        """Free the GPU memory while the policy trains; `sync` and `generate` take it back themselves."""

    def state_dict(self) -> dict[str, Any]:
        """What the next rollouts depend on besides weights, prompts and seed: nothing, where sampling is real."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""

    def close(self) -> None:
        """Release the engine."""


def respond(
    engine: RolloutEngine,
    dialogue: Dialogue | None,
    queries: Sequence[Query],
    prompts: list[Prompt],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Completion]]:
    """Sample n responses to every query, [query][response]: of one turn, or of several where there is a dialogue; the
    other arguments are those of `RolloutEngine.generate`."""
    if dialogue is None:
        return engine.generate(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    asked = zip(queries, prompts, strict=True)
    begun = [Conversation(dialogue, query, prompt, max_new_tokens) for query, prompt in asked for _ in range(n)]
    responses = engine.converse(begun, temperature=temperature, seed=seed)
    return [responses[i : i + n] for i in range(0, len(responses), n)]


def checksum(tensor: torch.Tensor, dtype: torch.dtype) -> Checksum:
    """Checksum of a tensor as `dtype`, in row-major order, whatever its device."""
    flat = tensor.detach().to(dtype).cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest(), len(torch.atleast_1d(tensor))


def copies(
    weights: WeightStream, deadline: Deadline, checksums: dict[str, Checksum] | None, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of the stream's tensors, which may be kept, while the deadline is watched.

    Args:
        checksums: if given, gets every tensor's checksum as `dtype`.
    """
    for name, tensor in weights:
        deadline.check(f"at {name}")
        if checksums is not None:
            checksums[name] = checksum(tensor, dtype)
        yield name, tensor.detach().clone()


ENGINES = {
    "vllm": "rethinker.rollout.vllm_engine:VLLMEngine",
    "server": "rethinker.rollout.server.engine:ServerEngine",
    "hf": "rethinker.rollout.hf_engine:HFEngine",
    "recorded": "rethinker.rollout.recorded:RecordedEngine",
}
"""A class for each backend, made of (settings, model folder, ranks)."""


def make_engine(config: Config, model_dir: str, *, rank: int, world_size: int, local_rank: int) -> RolloutEngine:
    """Build the engine of `rollout.backend` from the model in `model_dir` (Hugging Face format).

    Called on every rank, after the process group exists if there are several. Leaves the random state as it was.
    """
    return resolve_name(ENGINES[config.rollout.backend])(config, model_dir, Ranks(rank, world_size, local_rank))
