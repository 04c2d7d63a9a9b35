"""The server backend: vLLM servers in processes of their own, asked over HTTP, token ids in and token ids out.

Every rank spreads its own prompts over all servers. Images travel as PNG, so servers see the policy's pixels. Weights
carry the run's name and version; every answer says with which it was sampled, and any other is an error.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
from typing import Any

import torch

from rethinker.config import Config, ConfigError
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.dialogue import Conversation
from rethinker.rollout.engine import Checksum, RolloutEngine, WeightStream, copies
from rethinker.rollout.sampling import request_seed
from rethinker.rollout.server.replicas import IN_FLIGHT, ReplicaLost, Replicas, ServerError
from rethinker.rollout.server.sync import FileTransfer, FolderWeights, NCCLTransfer
from rethinker.rollout.vllm_settings import MAX_IMAGES, MAX_LENGTH, TRANSFER, Request, VLLMRequests
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Prompt

HOW_TO_START = "start it with `rethinker serve`, the same recipe and the same settings"


class ServerEngine(RolloutEngine):
    """RolloutEngine over vLLM servers."""

    def __init__(self, config: Config, model_dir: str, ranks: Ranks):
        """Connect, and compare the servers' settings with the run's. The first `generate` sends the model's weights,
        unless `sync` came before it.

        Raises:
            ConfigError: a server does not answer, or serves something else.
        """
        self.config = config
        self._ranks = ranks
        self._model_dir, self._requests = model_dir, VLLMRequests(config, model_dir)
        self._replicas = Replicas(address.rstrip("/") for address in config.rollout.servers)
        self._transfer: FileTransfer | NCCLTransfer | None = None  # on rank 0
        self._prefix = ranks.broadcast(f"{config.run.name or 'run'}-{os.urandom(4).hex()}")
        self._label = ""
        self._asked = 0
        by_nccl = self._connect() == "nccl"
        if ranks.is_main:
            folder = config.rollout.weight_folder
            self._transfer = NCCLTransfer(self._replicas) if by_nccl else FileTransfer(self._replicas, folder)

    def _connect(self) -> str:
        """Check that every server would sample from this run's policy, from the same pixels; how they take weights."""
        with Deadline("the first contact with the rollout servers", self.config.rollout.timeout_s) as deadline:
            try:
                answers = self._replicas.worker("rethinker_settings", deadline, keep_all=True)
            except (ReplicaLost, ServerError) as error:
                raise ConfigError(f"rollout.servers: {error}; {HOW_TO_START}") from error
        transfer = next(iter(answers.values()))[TRANSFER]
        if transfer == "nccl" and not torch.cuda.is_available():
            raise ConfigError("rollout.servers take weights by nccl, which needs a GPU here too")
        ours = self._requests.shared_settings() | {TRANSFER: transfer}
        for address, theirs in answers.items():
            for name in ours | theirs:
                own, held = ours.get(name), theirs.get(name)
                fits = held >= own if name in (MAX_IMAGES, MAX_LENGTH) else held == own
                if not fits:
                    raise ConfigError(
                        f"rollout.servers: {address} was started with other settings: {name} is {held} there and "
                        f"{own} here; change it here, or {HOW_TO_START}"
                    )
        return transfer

    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; see RolloutEngine.

        Every request has a seed of its own, so that neither the servers' number nor their pace matters.
        """
        requests = self._requests.sampling(prompts, n, max_new_tokens, temperature)
        self._begin()

        async def ask(address: str, number: int) -> list[Completion]:
            return await self._ask(address, requests[number], seed, number)

        with Deadline(f"the rollout of {len(requests)} requests", self.config.rollout.timeout_s) as deadline:
            return self._replicas.spread(len(requests), ask, deadline)

    def converse(self, conversations: list[Conversation], *, temperature: float, seed: int) -> list[Completion]:
        """Sample responses of several turns; see RolloutEngine. Each goes on by itself, at the server that has its
        first turns in its cache; where that is lost, at another from the turn that it had come to."""
        self._begin()
        asked: set[int] = set()  # whose turn is to be said

        async def ask(address: str, number: int) -> Completion:
            one = conversations[number]
            if one.waits is None:
                one.open()
            while number in asked or await _goes_on(one):
                asked.add(number)
                (request,) = self._requests.sampling([one.prompt], 1, one.room, temperature)
                (turn,) = await self._ask(address, request, seed, number, one.turns)
                await asyncio.to_thread(one.say, turn)
                asked.discard(number)
            return one.completion()

        what = f"the rollout of {len(conversations)} conversations"
        with Deadline(what, self.config.rollout.timeout_s) as deadline:
            # Those that wait for their environments ask the servers nothing.
            return self._replicas.spread(len(conversations), ask, deadline, at_once=4 * IN_FLIGHT)

    def _begin(self) -> None:
        if not self._label:  # servers hold what they were started with, or another run's weights
            self.sync(FolderWeights(self._model_dir) if self._ranks.is_main else [], 0)  # rank 0 sends
        self._asked += 1  # an id is used once

    async def _ask(self, address: str, request: Request, seed: int, *numbers: int) -> list[Completion]:
        """What a server samples for a request, which `numbers` tell from the others of a rollout."""
        rank, (prompt, settings) = self._ranks.rank, request
        key = "-".join(map(str, (self._prefix, rank, self._asked, *numbers)))
        body = {
            "request_id": key,
            "token_ids": prompt.compact_ids,
            "sampling_params": settings | {"seed": request_seed(seed, rank, *numbers)},
            "return_token_ids": True,
        }
        if prompt.images:
            urls = await asyncio.to_thread(lambda: [_as_url(image) for image in prompt.images])
            body["content_parts"] = [{"type": "image_url", "url": url} for url in urls]
        answer = await self._replicas.call(address, "/inference/v1/generate", body)
        self._check_answer(address, key, answer)
        self._requests.check_prompt(prompt, answer["prompt_token_ids"])
        return self._read(answer)  # an answer, which is large, is dropped

    def _check_answer(self, address: str, key: str, answer: dict[str, Any]) -> None:
        """The answer is to this request, whole, and sampled with this policy's weights alone."""
        if not answer["request_id"].endswith(key):
            raise RuntimeError(f"{address} answered request {key} with an answer to {answer['request_id']}")
        for choice in answer["choices"]:
            if choice["finish_reason"] not in ("stop", "length"):
                raise RuntimeError(f"{address} broke request {key} off: {choice['finish_reason']}")
            used = {span["version"] for span in choice["weight_versions"] or []}
            if used - {self._label}:
                raise RuntimeError(
                    f"{address} sampled with the weights {sorted(used)} and not with {self._label}: another trainer "
                    "sends its weights to this server, or it was started again"
                )

    def _read(self, answer: dict[str, Any]) -> list[Completion]:
        completions = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            logprobs = [at["logprob"] for at in choice["logprobs"]["content"]]
            completions.append(self._requests.completion(choice["token_ids"], logprobs, choice["finish_reason"]))
        return completions

    def sync(self, weights: WeightStream, version: int) -> None:
        """Take over the policy's weights; see RolloutEngine. A server that is lost meanwhile is left out (`file`)."""
        label = f"{self._prefix}:{version}"
        sent: dict[str, Checksum] | None = {} if self.config.rollout.check_sync and self._ranks.is_main else None
        error: Exception | None = None
        with Deadline(f"the weight sync to version {version}", self.config.rollout.timeout_s) as deadline:
            self._share_losses(None)  # all ranks' rollouts have ended
            tensors = copies(weights, deadline, sent, getattr(torch, self.config.policy.dtype))
            try:
                if self._ranks.is_main:
                    self._transfer.send(weights.metadata(), tensors, deadline)
                    self._put_in_use(label, sent, deadline)
            except (RuntimeError, ConfigError) as caught:  # the other ranks must know it too
                error = caught
            for _ in tensors:  # every rank walks the stream to its end: the others wait in its collectives
                pass
            self._share_losses(error)
        self._label = label

    def _put_in_use(self, label: str, sent: dict[str, Checksum] | None, deadline: Deadline) -> None:
        """Forget what the old weights computed, and name the new ones, as every answer will name them."""
        for path in ("/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache"):
            while {"success": False} in self._replicas.each(path, deadline).values():
                deadline.check("a server is still busy with requests and cannot clear its prefix cache")
                time.sleep(0.1)
        self._replicas.each("/update_weight_version", deadline, {"new_version": label})
        if sent:
            for address, answer in self._replicas.worker("rethinker_first_difference", deadline, sent=sent).items():
                if answer["differs"]:
                    raise RuntimeError(
                        f"rollout.check_sync: after the weight sync to {label} {answer['differs']} of {address} "
                        f"differs from the policy's ({len(sent)} tensors were compared)"
                    )

    def _share_losses(self, error: Exception | None) -> None:
        """Every rank leaves out the servers that any rank lost, and stops if rank 0 failed."""
        for lost, failure in self._ranks.gather((self._replicas.lost, error and f"{type(error).__name__}: {error}")):
            for address, reason in lost.items():
                self._replicas.drop(ReplicaLost(address, reason))
            if failure and error is None:
                raise RuntimeError(f"the weight sync failed on rank 0: {failure}")
        if error is not None:
            raise error

    def close(self) -> None:
        """Leave the servers, which go on."""
        if self._transfer is not None:
            self._transfer.close()
        self._replicas.close()


async def _goes_on(one: Conversation) -> bool:
    await asyncio.wait([asyncio.wrap_future(one.waits)])
    return await asyncio.to_thread(one.goes_on)


def _as_url(image: Any) -> str:
    """An image as a data URL of its PNG: lossless, so the server sees the same pixels."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
