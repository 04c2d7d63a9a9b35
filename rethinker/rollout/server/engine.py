"""The server backend: vLLM servers in processes of their own, asked over HTTP, token ids in and token ids out.

Every rank spreads its own prompts over all servers. Images travel as PNG, so servers see the policy's pixels. Weights
carry the run's name and version; every answer says with which it was sampled, and any other is refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rethinker.config import Config, ConfigError
from rethinker.rollout.checksums import checksum
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import WeightStream
from rethinker.rollout.sampling import limits
from rethinker.rollout.server.replicas import ReplicaLost, Replicas, ServerError
from rethinker.rollout.server.sync import Checkpoint, FileTransfer, NCCLTransfer
from rethinker.rollout.vllm_settings import WORKER, Asking, outline
from rethinker.samples import Completion, Prompt

T = TypeVar("T")

HOW_TO_START = "start it with `rethinker serve`, the same recipe and the same settings"


class ServerEngine:
    """RolloutEngine over vLLM servers (see rethinker.rollout.RolloutEngine)."""

    def __init__(self, config: Config, model_dir: str, *, rank: int, world_size: int):
        """Connect, compare the servers' settings with the run's, and give them the weights in `model_dir`.

        Raises:
            ConfigError: a server does not answer, or serves something else.
        """
        self.config = config
        self._rank, self._world_size = rank, world_size
        self._asking = Asking(config, model_dir)
        self._replicas = Replicas(address.rstrip("/") for address in config.rollout.servers)
        self._transfer: FileTransfer | NCCLTransfer | None = None
        self._prefix = self._agree(f"{config.run.name or 'run'}-{os.urandom(4).hex()}")[0]
        self._label = ""
        self._asked = 0
        try:
            self._connect()
            self._sync(Checkpoint(model_dir, self._transfer.device) if rank == 0 else _NOTHING, 0)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        replicas = self._replicas
        with self._deadline("the first contact with the rollout servers") as deadline:
            try:
                ask = {"method": "rethinker_outline"}
                infos = replicas.run(
                    replicas.each("/server_info?config_format=json", get=True, keep_all=True), deadline
                )
                for address, info in infos.items():
                    self._check_settings(address, info["vllm_config"])
                outlines = replicas.run(replicas.each("/collective_rpc", ask, keep_all=True), deadline)
            except ReplicaLost as error:
                raise ConfigError(
                    f"rollout.servers: nothing answers at {error.address} ({error.reason}); {HOW_TO_START}"
                ) from error
            except ServerError as error:
                raise ConfigError(f"rollout.servers: {error}; {HOW_TO_START}") from error
        own = outline(self._asking.model_config)
        for address, answer in outlines.items():
            theirs = answer["results"][0]
            for name in own.keys() | theirs.keys():
                if own.get(name) != theirs.get(name):
                    raise ConfigError(
                        f"rollout.servers: {address} serves another model: its {name} is {theirs.get(name)}, that of "
                        f"policy.model={self.config.policy.model} is {own.get(name)}; {HOW_TO_START}"
                    )
        backends = {info["vllm_config"]["weight_transfer_config"]["backend"] for info in infos.values()}
        if len(backends) > 1:
            raise ConfigError(f"rollout.servers must all take weights in the same way, not by {sorted(backends)}")
        if backends == {"nccl"}:
            if not torch.cuda.is_available():
                raise ConfigError("rollout.servers take weights by nccl, which needs a GPU here too")
            self._transfer = NCCLTransfer(replicas, self._rank)
        else:
            self._transfer = FileTransfer(replicas, self.config.rollout.weight_folder, self._rank == 0)

    def _check_settings(self, address: str, theirs: dict[str, Any]) -> None:
        """Refuse a server that would sample something else than this run's policy."""
        model, images = theirs["model_config"], theirs["model_config"].get("multimodal_config") or {}
        transfer = (theirs.get("weight_transfer_config") or {}).get("backend")
        extension = theirs["parallel_config"]["worker_extension_cls"]
        most_images = (images.get("limit_per_prompt", {}).get("image") or {}).get("count", 0)
        pixels = images.get("mm_processor_kwargs")
        data, needed, longest = self.config.data, self._asking.max_length, model["max_model_len"]
        for setting, own, held, fits in (
            ("policy.dtype", self.config.policy.dtype, str(model["dtype"]).removeprefix("torch."), None),
            ("data.min_pixels, data.max_pixels", self._asking.image_settings, pixels, None),
            ("data.max_images", data.max_images, most_images, most_images >= data.max_images),
            ("data.max_prompt_tokens + rollout.max_new_tokens", needed, longest, longest >= needed),
            ("vLLM's logprobs_mode", "processed_logprobs", model["logprobs_mode"], None),
            ("vLLM's worker extension", WORKER, extension, None),
            ("vLLM's weight transfer", "nccl or file", transfer, transfer in ("nccl", "file")),
        ):
            if not (own == held if fits is None else fits):
                raise ConfigError(
                    f"rollout.servers: {address} was started with other settings: {setting} is {held} there and {own} "
                    f"here; {HOW_TO_START}"
                )

    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; see RolloutEngine.

        Every request has a seed of its own, so that neither the servers' number nor their pace matters.
        """
        bodies = []
        for i, (prompt, longest) in enumerate(zip(prompts, limits(max_new_tokens, len(prompts)), strict=True)):
            self._asking.check_length(prompt, longest)
            sampling = self._asking.sampling(n, temperature, longest) | {"seed": _seed(seed, self._rank, i)}
            bodies.append((prompt, [], sampling))
        return self._ask(bodies, "rollout", self._read)

    def logprobs(self, prompts: list[Prompt], completions: list[Completion]) -> list[list[float]]:
        """Score given tokens; see RolloutEngine and VLLMEngine.logprobs."""
        bodies = []
        for prompt, completion in zip(prompts, completions, strict=True):
            *body, last = completion.token_ids.tolist() or [0]
            bodies.append((prompt, body, self._asking.scoring(last)))
        scores = []
        answers = self._ask(bodies, "scoring", lambda answer: answer)
        for prompt, completion, answer in zip(prompts, completions, answers, strict=True):
            given = answer["prompt_logprobs"][len(prompt.token_ids) :]
            token_ids = completion.token_ids.tolist()
            row = [at[str(token)]["logprob"] for at, token in zip(given, token_ids[:-1], strict=True)]
            if token_ids:
                (last,) = answer["choices"][0]["logprobs"]["content"]
                found = {top["token_id"]: top["logprob"] for top in last["top_logprobs"]}
                row.append(found[token_ids[-1]])
            scores.append(row)
        return scores

    def _ask(
        self,
        requests: list[tuple[Prompt, list[int], dict[str, Any]]],
        what: str,
        read: Callable[[dict[str, Any]], T],
    ) -> list[T]:
        """The servers' answers to requests (prompt, tokens after it, sampling parameters), in the requests' order.

        An answer, which is large, is read when it comes and dropped.
        """
        self._asked += 1  # an id is used once
        keys = {f"{self._prefix}-{self._rank}-{self._asked}-{i}": request for i, request in enumerate(requests)}
        answers: dict[str, T] = {}

        async def ask(address: str, key: str) -> T:
            prompt, continuation, sampling = keys[key]
            body = {
                "request_id": key,
                "token_ids": prompt.compact_ids + continuation,
                "sampling_params": sampling,
                "return_token_ids": True,
            }
            if prompt.images:
                urls = await asyncio.to_thread(lambda: [_as_url(image) for image in prompt.images])
                body["content_parts"] = [{"type": "image_url", "url": url} for url in urls]
            answer = await self._replicas.call(address, "/inference/v1/generate", body)
            self._check_answer(address, key, answer)
            self._asking.check_prompt(prompt, answer["prompt_token_ids"], continuation)
            return read(answer)

        def progress() -> str:
            return f"{len(answers)} requests ended"

        with self._deadline(f"the {what} of {len(requests)} requests") as deadline:
            self._replicas.run(self._replicas.spread(keys, ask, answers), deadline, progress)
        return [answers[key] for key in keys]

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
        return [self._completion(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        logprobs = [at["logprob"] for at in choice["logprobs"]["content"]]
        return self._asking.completion(choice["token_ids"], logprobs, choice["finish_reason"])

    def sync(self, weights: WeightStream, version: int) -> None:
        """Take over the policy's weights; see RolloutEngine. A server that is lost meanwhile is left out (`file`)."""
        self._sync(weights, version)

    def _sync(self, weights: WeightStream, version: int) -> None:
        label = f"{self._prefix}:{version}"
        sent: dict[str, Any] = {}
        dtype = getattr(torch, self.config.policy.dtype)
        error: Exception | None = None
        with self._deadline(f"the weight sync to version {version}") as deadline:
            self._share_losses(None)  # all ranks' rollouts have ended

            def watch(name: str, tensor: torch.Tensor) -> None:
                deadline.check(f"at {name}")
                if self.config.rollout.check_sync and self._rank == 0:
                    sent[name] = astuple(checksum(tensor, dtype))

            try:
                if self._rank == 0:
                    body = {"method": "rethinker_end_broken_update"}
                    self._replicas.run(self._replicas.each("/collective_rpc", body), deadline)
                self._transfer.send(weights, deadline, watch)
                if self._rank == 0:
                    self._put_in_use(label, sent, deadline)
            except (RuntimeError, ConfigError) as caught:  # the other ranks must know it too
                error = caught
            self._share_losses(error)
        self._label = label

    def _put_in_use(self, label: str, sent: dict[str, Any], deadline: Deadline) -> None:
        """Forget what the old weights computed, name the new ones, and see that every server has them."""
        replicas = self._replicas
        for path in ("/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache"):
            while any(answer == {"success": False} for answer in replicas.run(replicas.each(path), deadline).values()):
                deadline.check("a server is still busy with requests and cannot clear its prefix cache")
                time.sleep(0.1)
        replicas.run(replicas.each("/update_weight_version", {"new_version": label}), deadline)
        for address, info in replicas.run(replicas.each("/weight_info", get=True), deadline).items():
            if info["weight_version"] != label:
                raise RuntimeError(f"weight sync: {address} reports weights {info['weight_version']}, not {label}")
        if sent:
            arguments = {"sent": sent, "dtype": self.config.policy.dtype}
            body = {"method": "rethinker_first_difference", "kwargs": arguments}
            for address, answer in replicas.run(replicas.each("/collective_rpc", body), deadline).items():
                if name := answer["results"][0]["differs"]:
                    raise RuntimeError(
                        f"rollout.check_sync: after the weight sync to {label} {name} of {address} differs from the "
                        f"policy's ({len(sent)} tensors were compared)"
                    )

    def _share_losses(self, error: Exception | None) -> None:
        """Every rank leaves out the servers that any rank lost, and stops if rank 0 failed."""
        for lost, failure in self._agree((self._replicas.lost, error and f"{type(error).__name__}: {error}")):
            for address, reason in lost.items():
                self._replicas.drop(ReplicaLost(address, reason))
            if failure and error is None:
                raise RuntimeError(f"the weight sync failed on rank 0: {failure}")
        if error is not None:
            raise error

    def _agree(self, value: Any) -> list[Any]:
        values = [value] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def sleep(self) -> None:
        """Nothing: the servers have GPUs of their own."""

    def wake(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """See RolloutEngine."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See RolloutEngine."""

    def close(self) -> None:
        """Leave the servers, which go on."""
        if self._transfer is not None:
            self._transfer.close()
        self._replicas.close()

    def _deadline(self, what: str) -> Deadline:
        return Deadline(what, self.config.rollout.timeout_s, "rollout.timeout_s")


class _Nothing:
    """A weight stream without weights: the ranks that do not send need not read the model's files."""

    def metadata(self) -> list[Any]:
        return []

    def __iter__(self) -> Any:
        return iter(())


_NOTHING = _Nothing()


def _seed(seed: int, rank: int, index: int) -> int:
    """A request's own seed, 0 <= seed < 2**62; vLLM adds the sample's number to it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{index}".encode()).digest()[:8], "big") >> 2


def _as_url(image: Any) -> str:
    """An image as a data URL of its PNG: lossless, so the server sees the same pixels."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
