"""The vLLM backend: one engine per rank, inside the trainer's process, fed by reference.

Under torchrun every rank builds its own engine with the `external_launcher` executor, which takes over the process
group that exists: ranks of one tensor-parallel engine work on the same prompts, engines on different ones.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeVar

import torch

from rethinker.config import Config, ConfigError, one_line
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.dialogue import Conversation
from rethinker.rollout.engine import LOOK_S, Checksum, RolloutEngine, WeightStream, copies
from rethinker.rollout.sampling import preserved_random_state, request_seed, seeded
from rethinker.rollout.vllm_settings import Request, VLLMRequests, engine_arguments
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.garbage import frozen
from rethinker.samples import Completion, Prompt

T = TypeVar("T")
OPEN = 2  # conversations for each sequence that vLLM advances at a time: open ones hold images and states


class VLLMEngine(RolloutEngine):
    """RolloutEngine over `vllm.LLM` in this process."""

    def __init__(self, config: Config, model_dir: str, ranks: Ranks):
        """Load the model. Takes about 6 s for the tiny model on CPU.

        Raises:
            ConfigError: `rollout.tensor_parallel_size` does not divide the ranks, or vLLM's memory does not fit.
        """
        if ranks.world_size % config.rollout.tensor_parallel_size:
            raise ConfigError(
                f"rollout.tensor_parallel_size={config.rollout.tensor_parallel_size} must divide the number of ranks "
                f"({ranks.world_size}); 1 always does"
            )
        self.config = config
        self._gpu = torch.cuda.is_available()
        self._asleep = False
        self._asked = 0
        self._replica, self._place = divmod(ranks.rank, config.rollout.tensor_parallel_size)  # engine, rank in it
        self._requests = VLLMRequests(config, model_dir)
        with preserved_random_state():
            self._llm = self._build(model_dir, ranks.world_size)
        self._engine = self._llm.llm_engine

    def _build(self, model_dir: str, world_size: int) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Its warnings here are about choices made on purpose. The first ones come before it reads the variable.
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(level.upper())
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM
        from vllm.model_executor.models import ModelRegistry

        from rethinker.runtime import logs

        logs.follow("vllm")  # which has just configured its logger

        # vLLM would inspect the model's class in a subprocess, without torchvision's fix: it is loaded here.
        for name in set(self._requests.model_config.architectures) & ModelRegistry.models.keys():
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        if not self._gpu:
            from rethinker.rollout import vllm_cpu_ops  # noqa: F401  # registers its classes
        settings = self.config.rollout
        arguments = engine_arguments(self.config, self._requests, gpu=self._gpu)
        if self._gpu:
            arguments["enable_sleep_mode"] = settings.sleep
        if settings.router_replay:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the one that says which experts it took
        if world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        set_num_threads = torch.set_num_threads
        try:
            with frozen(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # vLLM's own imports
                return LLM(model_dir, use_tqdm_on_load=False, **arguments)
        except ValueError as error:
            if settings.router_replay and "Model Runner V2" in str(error):
                raise ConfigError(
                    "rollout.router_replay=true needs vLLM's model runner V2, which does not run here "
                    f"({one_line(error)}); set it to false"
                ) from error
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
        requests, own = self._share(self._requests.sampling(prompts, n, max_new_tokens, temperature))
        with seeded(seed, self._replica):
            return self._run(requests, own)

    def converse(self, conversations: list[Conversation], *, temperature: float, seed: int) -> list[Completion]:
        """Sample responses of several turns; see RolloutEngine. Each goes on by itself: the engine computes others
        while an environment thinks. The ranks of a tensor-parallel engine, which must ask the same, go together."""
        if self.config.rollout.tensor_parallel_size > 1:
            return super().converse(conversations, temperature=temperature, seed=seed)
        unopened, running = deque(range(len(conversations))), dict[str, int]()  # by request
        waiting = dict[int, None]()  # for their environments, in a fixed order
        most = OPEN * self._engine.vllm_config.scheduler_config.max_num_seqs
        what = f"the rollout of {len(conversations)} conversations"
        with preserved_random_state(), Deadline(what, self.config.rollout.timeout_s) as deadline:
            try:
                while unopened or running or waiting:
                    while unopened and len(running) + len(waiting) < most:
                        waiting[place := unopened.popleft()] = None
                        conversations[place].open()
                    for place in [place for place in waiting if conversations[place].waits.done()]:
                        del waiting[place]
                        one = conversations[place]
                        if one.goes_on():
                            ((prompt, settings),) = self._requests.sampling([one.prompt], 1, one.room, temperature)
                            drawn = request_seed(seed, self._replica, place, one.turns)
                            running[self._add(prompt, settings | {"seed": drawn})] = place
                        deadline.check(f"{len(running)} turns under way, {len(waiting)} waited for")
                    if not running:
                        wait([conversations[place].waits for place in waiting], LOOK_S, FIRST_COMPLETED)
                    for output in self._step(what) if running else ():
                        place = running.pop(output.request_id)
                        conversations[place].say(*self._read(output))
                        waiting[place] = None
                    deadline.check(f"{len(running)} turns under way, {len(waiting)} waited for")
            except BaseException:
                self._abort(running)
                raise
        return [one.completion() for one in conversations]

    def _any(self, here: bool) -> bool:
        """See RolloutEngine: of the ranks of this engine."""
        return any(self._gather(here))

    def sync(self, weights: WeightStream, version: int) -> None:
        """Take over the policy's weights; see RolloutEngine. Wakes the weights' memory, not the key-value cache's."""
        from rethinker.rollout import vllm_weights

        if self._asleep:
            torch.cuda.empty_cache()  # memory that the trainer's allocator holds is not free to vLLM's
            self._engine.wake_up(["weights"])
        names = [name for name, *_ in weights.metadata()]
        sent: dict[str, Checksum] | None = {} if self.config.rollout.check_sync else None
        with Deadline("the weight sync", self.config.rollout.timeout_s) as deadline:
            tensors = copies(weights, deadline, sent, getattr(torch, self.config.policy.dtype))
            with _named(f"the weight sync to version {version}"):
                self._in_model(vllm_weights.load, names, tensors)
                # Forget what the old weights computed: keys and values, and image embeddings.
                if not self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM could not clear its prefix cache; requests are still running")
                self._engine.reset_encoder_cache()
            if sent and (name := self._in_model(vllm_weights.first_difference, sent)):
                raise RuntimeError(
                    f"rollout.check_sync: after the weight sync to version {version} vLLM's {name} differs from "
                    f"the policy's ({len(sent)} tensors were compared)"
                )

    def _in_model(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What function(vLLM's model, vLLM's config, *arguments) returns."""
        return self._engine.apply_model(lambda model: function(model, self._engine.vllm_config, *arguments))[0]

    def sleep(self) -> None:
        """Free the GPU memory: weights go to the host, the key-value cache is dropped."""
        if self._gpu and self.config.rollout.sleep and not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut the engine down."""
        with frozen():
            self._engine.engine_core.shutdown()
        gc.unfreeze()  # as vLLM leaves it

    def _run(self, requests: list[Request], own: slice) -> list[list[Completion]]:
        """The completions of requests[own], after all have run. An output, which is large, is read and dropped."""
        finished: dict[str, list[Completion]] = {}
        ids: list[str] = []
        places, what = range(len(requests))[own], f"the rollout of {len(requests)} requests"
        with Deadline(what, self.config.rollout.timeout_s) as deadline:
            try:
                for prompt, settings in requests:
                    ids.append(self._add(prompt, settings))
                    deadline.check(f"{ids[-1]} is prepared")
                kept = {ids[place] for place in places}
                while self._engine.has_unfinished_requests():
                    for output in self._step(f"{what}, after {len(finished)} of them"):
                        finished[output.request_id] = self._read(output) if output.request_id in kept else []
                    deadline.check(f"{len(finished)} requests ended")
            except BaseException:
                self._abort([request_id for request_id in ids if request_id not in finished])
                raise
        return [finished[ids[place]] for place in places]

    def _add(self, prompt: Prompt, settings: dict[str, Any]) -> str:
        """Give vLLM a request; its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._asleep:  # or in part, after `sync`
            torch.cuda.empty_cache()
            self._engine.wake_up()
            self._asleep = False
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.compact_ids}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": prompt.images}
        (rendered,) = self._llm.renderer.render_cmpl([inputs])
        self._requests.check_prompt(prompt, rendered["prompt_token_ids"])
        # flat_logprobs: a few lists per response, not a few objects per token.
        params = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True)
        request_id = f"rollout-{self._asked}"
        self._asked += 1
        self._engine.add_request(request_id, rendered, params)
        return request_id

    def _step(self, what: str) -> list[Any]:
        """The requests that have ended after another step of vLLM."""
        with _named(what):
            return [output for output in self._engine.step() if output.finished]

    def _abort(self, request_ids: Iterable[str]) -> None:
        with suppress(Exception):  # an engine that is dead cannot do that either; the cause is what matters
            self._engine.abort_request(list(request_ids))

    def _share(self, requests: list[Request]) -> tuple[list[Request], slice]:
        """All requests of the ranks of this tensor-parallel engine, in rank order, and where this rank's are."""
        gathered = self._gather(requests)
        start = sum(len(part) for part in gathered[: self._place])
        return list(chain.from_iterable(gathered)), slice(start, start + len(requests))

    def _gather(self, mine: T) -> list[T]:
        """What each rank of this tensor-parallel engine gives, in rank order."""
        if self.config.rollout.tensor_parallel_size == 1:
            return [mine]
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, mine, group=group.cpu_group)
        return gathered

    def _read(self, output: Any) -> list[Completion]:
        completions = []
        for sample in sorted(output.outputs, key=lambda sample: sample.index):
            flat, token_ids = sample.logprobs, list(sample.token_ids)
            at = flat.start_indices  # of each position the sampled token comes first
            assert [flat.token_ids[i] for i in at] == token_ids
            logprobs = [flat.logprobs[i] for i in at]
            experts = sample.routed_experts
            if experts is None and self.config.rollout.router_replay:
                raise RuntimeError("rollout.router_replay: vLLM returned a response without the experts that it took")
            completions.append(self._requests.completion(token_ids, logprobs, sample.finish_reason, experts))
        return completions


@contextmanager
def _named(what: str) -> Iterator[None]:
    """vLLM's errors say during what they happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This happened in {what}; the run can go on from its last checkpoint.")
        raise
