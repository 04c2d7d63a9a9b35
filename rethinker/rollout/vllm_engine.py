"""The vLLM backend: one engine per rank, inside the trainer's process, fed by reference.

Under torchrun every rank builds its own engine with the `external_launcher` executor, which takes over the process
group that exists: ranks of one tensor-parallel engine work on the same prompts, engines on different ones.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from rethinker.config import Config, ConfigError
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import WeightStream
from rethinker.rollout.sampling import limits, preserved_random_state, seeded
from rethinker.rollout.vllm_settings import Asking, engine_arguments
from rethinker.samples import Completion, Prompt

T = TypeVar("T")


class EngineFailure(RuntimeError):
    """vLLM failed in a rollout or a weight sync; its engine cannot be used any more."""


class VLLMEngine:
    """RolloutEngine over `vllm.LLM` in this process (see rethinker.rollout.RolloutEngine)."""

    def __init__(self, config: Config, model_dir: str, *, rank: int, world_size: int):
        """Load the model. Takes about 6 s for the tiny model on CPU.

        Raises:
            ConfigError: `rollout.tensor_parallel_size` does not divide the ranks, or does not fit `rollout.check_sync`.
        """
        settings = config.rollout
        if world_size % settings.tensor_parallel_size:
            raise ConfigError(
                f"rollout.tensor_parallel_size={settings.tensor_parallel_size} must divide the number of ranks "
                f"({world_size}); 1 always does"
            )
        if settings.check_sync and settings.tensor_parallel_size > 1:
            raise ConfigError(
                "rollout.check_sync=true compares whole tensors and needs rollout.tensor_parallel_size=1, not "
                f"{settings.tensor_parallel_size}"
            )
        self.config = config
        self._gpu = torch.cuda.is_available()
        self._asleep = False
        self._requests = 0
        self._replica = rank // settings.tensor_parallel_size
        self._asking = Asking(config, model_dir)
        with preserved_random_state():
            self._llm = self._build(model_dir, world_size)
        self._engine = self._llm.llm_engine

    def _build(self, model_dir: str, world_size: int) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Its warnings here are about choices made on purpose. The first ones come before it reads the variable.
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(level.upper())
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM

        from rethinker.rollout import weight_sync
        from rethinker.runtime import logs

        logs.follow("vllm")  # which has just configured its logger

        weight_sync.register()
        _register_classes(self._asking.model_config.architectures)
        settings = self.config.rollout
        arguments = engine_arguments(self.config, self._asking, gpu=self._gpu)
        if self._gpu:
            arguments["enable_sleep_mode"] = settings.sleep
        if world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        set_num_threads = torch.set_num_threads
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # vLLM's own imports
                return LLM(
                    model_dir,
                    weight_transfer_config={"backend": weight_sync.BACKEND},
                    use_tqdm_on_load=False,
                    **arguments,
                )
        except ValueError as error:
            if "memory" not in str(error):
                raise
            setting = "gpu_memory_utilization" if self._gpu else "kv_cache_gb"
            raise ConfigError(
                f"rollout.{setting}={getattr(settings, setting)} does not fit: {str(error).split('Try ')[0]}"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM's CPU worker turns it into a warning for the whole process

    def generate(
        self, prompts: list[Prompt], *, n: int, max_new_tokens: int | list[int], temperature: float, seed: int
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; see RolloutEngine. Prompt and images are sent once for all n."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(longest: int) -> SamplingParams:
            return SamplingParams(
                **self._asking.sampling(n, temperature, longest),
                output_kind=RequestOutputKind.FINAL_ONLY,
                flat_logprobs=True,  # a few lists per response, not a few objects per token
            )

        inputs, own = self._share(list(zip(prompts, limits(max_new_tokens, len(prompts)), strict=True)))
        for prompt, longest in inputs:
            self._asking.check_length(prompt, longest)
        with seeded(seed + 1_000_003 * self._replica):
            return self._run([(prompt, [], params(longest)) for prompt, longest in inputs], "rollout", self._read, own)

    def logprobs(self, prompts: list[Prompt], completions: list[Completion]) -> list[list[float]]:
        """Score given tokens; see RolloutEngine. The last token is a label only, so it may be a placeholder.

        Raises:
            ConfigError: `rollout.temperature` is not 1: vLLM scores prompt tokens at temperature 1.
        """
        from vllm import SamplingParams

        inputs, own = self._share(list(zip(prompts, completions, strict=True)))
        requests = []
        for prompt, completion in inputs:
            *body, last = completion.token_ids.tolist() or [0]
            requests.append((prompt, body, SamplingParams(**self._asking.scoring(last))))
        with preserved_random_state():
            outputs = self._run(requests, "scoring", lambda output: output, own)
        scores = []
        for (prompt, completion), output in zip(inputs[own], outputs, strict=True):
            start = len(prompt.token_ids)
            token_ids = completion.token_ids.tolist()
            row = [output.prompt_logprobs[start + i][token].logprob for i, token in enumerate(token_ids[:-1])]
            if token_ids:
                row.append(output.outputs[0].logprobs[0][token_ids[-1]].logprob)
            scores.append(row)
        return scores

    def sync(self, weights: WeightStream, version: int) -> None:
        """Take over the policy's weights; see RolloutEngine. Wakes the weights' memory, not the key-value cache's."""
        from rethinker.rollout import weight_sync

        if self._asleep:
            torch.cuda.empty_cache()  # memory that the trainer's allocator holds is not free to vLLM's
            self._engine.wake_up(["weights"])
        sent: dict[str, weight_sync.Checksum] = {}
        dtype = getattr(torch, self.config.policy.dtype)
        with self._deadline("the weight sync") as deadline:

            def watch(name: str, tensor: torch.Tensor) -> None:
                deadline.check(f"at {name}")
                if self.config.rollout.check_sync:
                    sent[name] = weight_sync.checksum(tensor, dtype)

            client = weight_sync.InProcessClient(self._engine)
            source = weight_sync.StreamSource(weights, watch)
            client.announce(source)
            with _named(f"the weight sync to version {version}"):
                weight_sync.send_weights(client, source)
                self._reset_caches()
            if sent:
                name = self._engine.apply_model(lambda model: weight_sync.first_difference(model, sent, dtype))[0]
                if name is not None:
                    raise RuntimeError(
                        f"rollout.check_sync: after the weight sync to version {version} vLLM's {name} differs from "
                        f"the policy's ({len(sent)} tensors were compared)"
                    )

    def _reset_caches(self) -> None:
        """Forget what the old weights computed: keys and values, and image embeddings."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("weight sync: vLLM could not clear its prefix cache; requests are still running")
        self._engine.reset_encoder_cache()

    def sleep(self) -> None:
        """Free the GPU memory: weights go to the host, the key-value cache is dropped."""
        if self._gpu and self.config.rollout.sleep and not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the GPU memory back, whatever of it `sync` has left asleep."""
        if self._asleep:
            torch.cuda.empty_cache()
            self._engine.wake_up()
            self._asleep = False

    def state_dict(self) -> dict[str, Any]:
        """See RolloutEngine."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See RolloutEngine."""

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.engine_core.shutdown()

    def _run(
        self, requests: list[tuple[Prompt, list[int], Any]], what: str, read: Callable[[Any], T], own: slice
    ) -> list[T]:
        """Run requests (prompt, tokens after it, sampling parameters) to their end.

        Returns:
            What `read` makes of the outputs of requests[own], in their order. An output, which is large, is read and
            dropped when it comes.
        """
        self.wake()
        finished: dict[str, T | None] = {}
        ids: list[str] = []
        with self._deadline(f"the {what} of {len(requests)} requests") as deadline:
            try:
                for prompt, continuation, params in requests:
                    inputs = {"prompt_token_ids": prompt.compact_ids + continuation}
                    if prompt.images:
                        inputs["multi_modal_data"] = {"image": prompt.images}
                    (rendered,) = self._llm.renderer.render_cmpl([inputs])
                    self._asking.check_prompt(prompt, rendered["prompt_token_ids"], continuation)
                    request_id = f"{what}-{self._requests}"
                    self._requests += 1
                    self._engine.add_request(request_id, rendered, params)
                    ids.append(request_id)
                    deadline.check(f"{len(ids)} requests prepared")
                kept = set(ids[own])
                while self._engine.has_unfinished_requests():
                    with _named(f"the {what} of {len(requests)} requests, after {len(finished)} of them"):
                        outputs = self._engine.step()
                    for output in outputs:
                        if output.finished:
                            key = output.request_id
                            finished[key] = read(output) if key in kept else None
                    deadline.check(f"{len(finished)} requests ended")
            except BaseException:
                with suppress(Exception):  # an engine that is dead cannot do that either; the cause is what matters
                    self._engine.abort_request([request_id for request_id in ids if request_id not in finished])
                raise
        return [finished[request_id] for request_id in ids[own]]

    def _deadline(self, what: str) -> Deadline:
        return Deadline(what, self.config.rollout.timeout_s, "rollout.timeout_s")

    def _share(self, items: list[Any]) -> tuple[list[Any], slice]:
        """All items of the ranks of this tensor-parallel engine, in rank order, and where this rank's are."""
        if self.config.rollout.tensor_parallel_size == 1:
            return items, slice(None)
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, items, group=group.cpu_group)
        start = sum(len(part) for part in gathered[: group.rank_in_group])
        return [item for part in gathered for item in part], slice(start, start + len(items))

    def _read(self, output: Any) -> list[Completion]:
        return [self._completion(sample) for sample in sorted(output.outputs, key=lambda sample: sample.index)]

    def _completion(self, sample: Any) -> Completion:
        flat, token_ids = sample.logprobs, list(sample.token_ids)
        at = flat.start_indices  # of each position the sampled token comes first
        assert [flat.token_ids[i] for i in at] == token_ids
        return self._asking.completion(token_ids, [flat.logprobs[i] for i in at], sample.finish_reason)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of vLLM say during what they happened; those that name a setting already pass."""
    try:
        yield
    except (ConfigError, TimeoutError):
        raise
    except Exception as error:
        raise EngineFailure(
            f"vLLM failed in {what}: {type(error).__name__}: {error}; the run can go on from its last checkpoint"
        ) from error


def _register_classes(architectures: list[str]) -> None:
    """Load vLLM's model classes here: it would inspect them in a subprocess, without torchvision's repair."""
    from vllm.model_executor.models import ModelRegistry

    for name in architectures:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
