"""The policy under DeepSpeed ZeRO-3: one optimizer step on a global batch, full weights out, models saved.

Only this module, full_weights.py, zero3.py and out_of_memory.py know DeepSpeed. Every method is collective: all ranks
call it with the same samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch

from rethinker.algorithm.objective import load_loss, loss_inputs, loss_normalizer, supervised_weight
from rethinker.config import Config, ConfigError
from rethinker.data.prompts import PromptEncoder
from rethinker.policy import lora, optimizer_state
from rethinker.policy.full_weights import FullWeights
from rethinker.policy.model import Policy, load_model
from rethinker.policy.out_of_memory import (
    OutOfMemory,
    Plan,
    ZeroState,
    note_budget,
    noted_budget,
    ran_out,
    smaller_budget,
)
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.policy.schedule import learning_rate
from rethinker.policy.zero3 import gather_whole_layers, reference_settings, zero3_settings
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.ownership import bring
from rethinker.runtime.profiling import phase
from rethinker.samples import Bundle, PackedBatch, Sample
from rethinker_kernels import LINEAR_GRPO_STATS

log = logging.getLogger(__name__)
T = TypeVar("T")


class PolicyEngine:
    """The trained policy, its optimizer and its learning-rate schedule, sharded over the ranks by ZeRO-3."""

    def __init__(
        self,
        config: Config,
        model_dir: str | Path,
        encoder: PromptEncoder,
        ranks: Ranks,
        total_steps: int,
        reference_dir: str | Path | None = None,
        budget_file: Path | None = None,
    ) -> None:
        """
        Args:
            config: the run's settings.
            model_dir: Hugging Face folder or name of the policy to start from. A checkpoint of a run with policy.lora
                names in its adapters the model that they belong to, and that one is loaded.
            encoder: turns queries into prompts and pixels.
            ranks: this process's place.
            total_steps: length of the learning-rate schedule.
            reference_dir: the model that algorithm.kl_coef keeps the policy close to; by default the one loaded. With
                policy.lora that one needs no second copy.
            budget_file: where a rank that ran out of memory notes the smaller micro-batch budget for the next start;
                a note that is there is followed.
        """
        self.config, self.encoder, self.ranks, self.total_steps = config, encoder, ranks, total_steps
        self.steps = 0  # optimizer steps attempted
        self.version = 0  # weight syncs: the policy version that rollouts carry
        self.skipped_steps = 0
        self.oom_retries = 0  # times that memory ran out and the work was repeated in smaller micro-batches
        self.budget_file = budget_file
        self.loss = load_loss(config.algorithm)
        setting = config.train.micro_batch_tokens
        # On several nodes only one may see the note, and all must cut the same micro-batches.
        self.micro_batch_tokens = min(ranks.gather(noted_budget(budget_file, setting) if budget_file else setting))
        # DeepSpeed would compile a shared-memory all-reduce at its first start. Only CPU inference calls it, and a run
        # killed meanwhile would leave a lock that every later start waits on for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = zero3_settings(config, ranks)
        # Announced before the model is loaded, so that transformers partitions each weight as it reads it.
        from transformers.integrations import HfDeepSpeedConfig

        announced = HfDeepSpeedConfig(settings)
        dtype = getattr(torch, config.policy.dtype)
        going_on = lora.resumed(config, model_dir)
        self.base_dir = lora.base_of(going_on, config.policy.model) if going_on else model_dir
        model = load_model(self.base_dir, dtype)
        self.adapters = lora.add_adapters(model, config.policy.lora, config.seed) if config.policy.lora.rank else {}
        if going_on:
            lora.load(self.adapters, going_on)
        policy = Policy(model, config.policy)
        if config.policy.compile:
            gather_whole_layers(policy)
        reference_dir = reference_dir or self.base_dir
        self.reference = None
        if config.algorithm.kl_coef > 0 and not (self.adapters and lora.is_same_model(reference_dir, self.base_dir)):
            frozen = reference_settings(settings)
            announced = HfDeepSpeedConfig(frozen)
            reference = Policy(load_model(reference_dir, dtype), config.policy)
            reference.requires_grad_(False)
            if config.policy.compile:
                gather_whole_layers(reference)
            self.reference, *_ = deepspeed.initialize(model=reference, config=frozen)
        del announced  # or the rollout's own copy of the model would be partitioned too
        # eval(): no dropout in the policy, the ratio would not be 1 on policy.
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.train.learning_rate, betas=config.train.betas, weight_decay=config.train.weight_decay
        )
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=policy.eval(), optimizer=optimizer, config=settings, model_parameters=trained
        )
        self.policy = policy
        # Resumed adapters need the very weights that they were trained beside.
        self._base = lora.fingerprint(FullWeights(lora.base_parameters(policy.hf))) if self.adapters else None
        self._at_rest = ZeroState(*(engine for engine in (self.engine, self.reference) if engine))

    def train_step(self, samples: list[Sample]) -> dict[str, float]:
        """One optimizer step on a global batch.

        Args:
            samples: the whole batch over all ranks, in the same order on every rank; each rank holds the tokens of
                those that it owns.

        Returns:
            `loss`, `entropy`, `kl`, `clip_fraction_low`, `clip_fraction_high`, `old_kl` (k3 of the current policy from
            the one that the ratio is taken against, on samples no older than rollout.max_staleness), `grad_norm`,
            `learning_rate`, `train_tokens` (processed, over all ranks), `supervised_loss` (the part of `loss` from
            rethought responses), `skipped` (1 if a non-finite number kept the step from being applied), `oom_retries`
            (since the run began: times that memory ran out and the work was repeated in smaller micro-batches). An
            empty batch (every query all right or all wrong, and nothing to replay) leaves the weights as they are.

        Raises:
            OutOfMemory: memory ran out on one of several ranks, or in the optimizer's step.
            ConfigError: memory ran out, and smaller micro-batches would not help; or the user's own loss is not finite
                where every log-prob is.
        """
        config = self.config
        if not samples:
            self.steps += 1
            return dict.fromkeys(METRICS, 0.0) | {"oom_retries": float(self.oom_retries)}

        def plan_for(budget: int) -> Plan:
            return self._plan(samples, budget, self.ranks.world_size)

        sums = self._fitting(plan_for, lambda plan: self._accumulate(samples, plan))
        rate = learning_rate(self.steps, self.total_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with phase("optimizer"):
            try:
                self.engine.step()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                raise OutOfMemory(  # some of the weights may have moved: there is nothing to repeat
                    f"out of memory in the optimizer's part of step {self.steps + 1}, whose size does not depend on "
                    "train.micro_batch_tokens; lower rollout.gpu_memory_utilization, take more ranks, or put the "
                    "optimizer on the host (train.deepspeed), and go on from the last checkpoint"
                ) from error
        self.steps += 1
        values = dict(zip(_SUMS, self.ranks.sum(sums).tolist(), strict=True))
        grad_norm = float(self.engine.get_global_grad_norm())
        skipped = not (math.isfinite(grad_norm) and math.isfinite(values["loss"]))
        if not (math.isfinite(values["loss"]) or values["nonfinite"] or config.algorithm.loss == "grpo"):
            raise ConfigError(
                f"algorithm.loss={config.algorithm.loss}: it is {values['loss']} in step {self.steps}, though every "
                "log-prob of the batch is finite; it must be finite for any finite logps, old_logps and advantages"
            )
        self.skipped_steps += skipped
        tokens = max(values["tokens"], 1.0)
        metrics = (
            values["loss"],
            values["entropy_sum"] / tokens,
            values["kl_sum"] / tokens,
            values["clipped_low"] / tokens,
            values["clipped_high"] / tokens,
            values["fresh_kl_sum"] / max(values["fresh_tokens"], 1.0),
            grad_norm,
            rate,
            values["processed"],
            values["supervised_loss"],
            float(skipped),
            float(self.oom_retries),
        )
        return dict(zip(METRICS, metrics, strict=True))

    @torch.no_grad()
    def score(self, samples: list[Sample]) -> float:
        """Set `completion.trainer_logprobs` of the samples that this rank holds, from the current policy's forward.

        Returns:
            k3 of the policy from the behaviour policy, nats per sampled token, over the samples of all ranks.
        """
        mine = [sample for sample in samples if sample.owner == self.ranks.rank]
        self._fitting(lambda budget: self._plan(mine, budget, 1), self._score)
        held = [np.zeros((2, 0)), *((s.completion.logprobs, s.completion.trainer_logprobs) for s in mine)]
        behaviour, own = np.concatenate(held, axis=1, dtype=np.float64)
        gap = (behaviour - own)[~np.isnan(behaviour)]  # without the forced tokens, which were not sampled
        sums = torch.tensor([(np.expm1(gap) - gap).sum(), len(gap)], dtype=torch.float64, device=self.ranks.device)
        kl, tokens = self.ranks.sum(sums).tolist()
        return kl / max(tokens, 1.0)

    def _plan(self, samples: list[Sample], budget: int, world_size: int) -> Plan:
        shared = self.policy.kernel != "varlen"
        return plan_micro_batches(samples, budget=budget, world_size=world_size, shared=shared)

    def _score(self, mine: Plan) -> None:
        (plan,) = mine
        # ZeRO-3 gathers weights by collectives: the ranks run equally many forwards, some of them on nothing.
        plan += [[]] * (max(self.ranks.gather(len(plan))) - len(plan))
        scores = []  # [R] per micro-batch, on the device: the host waits for them once
        for bundles in plan:
            batch = self._pack(bundles, correction_cap=None, nll_weight=0.0)
            logps, _ = self.engine(batch, self.config.rollout.temperature)
            scores.append(logps)
        held = torch.cat(scores).float().cpu().split([len(logps) for logps in scores])
        for bundles, logps in zip(plan, held, strict=True):
            start = 0  # a batch without a token has one score too many
            for completion in (sample.completion for bundle in bundles for sample in bundle.samples):
                completion.trainer_logprobs = logps[start : start + completion.tokens].numpy().copy()
                start += completion.tokens

    @property
    def weights(self) -> FullWeights:
        """The policy's full weights under their Hugging Face names, adapters merged in, gathered a few at a time."""
        return FullWeights(lora.base_parameters(self.policy.hf), self.adapters)

    def model_snapshot(self) -> Callable[[Path], None]:
        """The policy as it is now (collective); what comes back writes it, in Hugging Face format, on rank 0.

        vLLM and transformers load that folder as it is; the processor is in it. With policy.lora its weights are
        merged, and its folder `adapter` has the adapters alone, in peft's format.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights if self.ranks.is_main}
        adapters = FullWeights(lora.adapter_parameters(self.adapters))
        trained = {name: tensor.to("cpu", copy=True) for name, tensor in adapters if self.ranks.is_main}

        def write(folder: Path) -> None:
            self.policy.hf.save_pretrained(folder, state_dict=state)
            self.encoder.processor.save_pretrained(folder)
            if trained:
                lora.save(folder / lora.FOLDER, self.policy.hf, trained, self.base_dir)

        return write

    def optimizer_snapshot(self) -> Callable[[Path], None]:
        """This rank's part of the optimizer as it is now; what comes back writes it into a folder."""
        return optimizer_state.snapshot(self.policy.hf, self.optimizer, self.ranks.rank)

    def load_optimizer(self, folder: Path, adam_steps: int) -> None:
        """Continue with the optimizer of `optimizer_snapshot`, on any number of ranks; see optimizer_state.load."""
        optimizer_state.load(self.policy.hf, self.optimizer, folder, adam_steps, self.ranks.rank)

    def state_dict(self) -> dict[str, Any]:
        """Counters; the weights and the optimizer have snapshots of their own."""
        return {name: getattr(self, name) for name in _COUNTERS} | {
            "adam_steps": optimizer_state.applied_steps(self.optimizer),
            "micro_batch_tokens": {"setting": self.config.train.micro_batch_tokens, "budget": self.micro_batch_tokens},
            "base": self._base,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters; the reduced micro-batch budget too, unless train.micro_batch_tokens has been changed.

        Raises:
            ConfigError: the frozen weights under the adapters are not those of the run that is continued.
        """
        if state.get("base") != self._base:
            raise ConfigError(
                f"resume: the model {self.base_dir} is no longer the one that this run's adapters were trained beside; "
                "bring that one back, or start a new run with policy.model=<the checkpoint>, whose weights are merged"
            )
        for name in _COUNTERS:
            setattr(self, name, state[name])
        if state["micro_batch_tokens"]["setting"] == self.config.train.micro_batch_tokens:
            self.micro_batch_tokens = min(self.micro_batch_tokens, state["micro_batch_tokens"]["budget"])

    def _fitting(self, plan_for: Callable[[int], Plan], work: Callable[[Plan], T]) -> T:
        """Do `work` on a plan of micro-batches; when memory runs out, from the start again on smaller ones.

        The smaller budget stays for all later steps. On several ranks it is noted for the next start instead.
        """
        while True:
            try:
                return work(plan_for(self.micro_batch_tokens))
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                reason = str(error).split("\n")[0]
                before, self.micro_batch_tokens = (
                    self.micro_batch_tokens,
                    smaller_budget(self.micro_batch_tokens, plan_for),
                )
                change = f"train.micro_batch_tokens={before} is reduced to {self.micro_batch_tokens}"
                if self.ranks.world_size > 1:
                    raise self._give_up(change) from error
            # Only here, past the handler, has the error let go of the failed pass and its memory.
            self.oom_retries += 1
            log.warning("step %d ran out of memory and is repeated: %s (%s)", self.steps + 1, change, reason)
            self._at_rest.restore()

    def _give_up(self, change: str) -> OutOfMemory:
        """The end of a rank whose peers wait for it in a collective; the next start finds the smaller budget."""
        advice = f"set train.micro_batch_tokens={self.micro_batch_tokens} and start again"
        if self.budget_file:
            note_budget(self.budget_file, self.config.train.micro_batch_tokens, self.micro_batch_tokens)
            advice = f"{self.budget_file} says so to the next start of this run (torchrun --max-restarts makes one)"
        return OutOfMemory(
            f"rank {self.ranks.rank} ran out of memory in step {self.steps + 1}, and ranks cannot repeat a step "
            f"together: {change}; {advice}"
        )

    def _accumulate(self, samples: list[Sample], plan: Plan) -> torch.Tensor:
        """Forward and backward of all micro-batches: gradients in ZeRO-3, this rank's sums [len(_SUMS)] returned."""
        config = self.config
        normalizer = loss_normalizer(samples, config.algorithm, config.rollout.max_new_tokens)
        nll_weight = supervised_weight(samples, config.rethink.supervised_weight)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.ranks.device)
        for batch in self._micro_batches(plan, nll_weight):
            with phase("forward"):
                reference = self._reference_logps(batch)
                objective = loss_inputs(self.loss, batch, config.algorithm, normalizer, reference)
                loss, logps, stats = self.engine(batch, config.rollout.temperature, objective)
            with phase("backward"):
                # ZeRO averages gradients over ranks; the normalizer is global already. A non-finite loss poisons the
                # gradient on purpose: ZeRO then sees a non-finite norm on every rank and leaves the weights alone.
                poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                self.engine.backward(loss * poison * self.ranks.world_size)
            with torch.no_grad():
                sums += torch.cat([stats, self._extra_sums(loss, logps, batch)])
        return sums

    def _micro_batches(self, plan: Plan, nll_weight: float) -> Iterator[PackedBatch]:
        for bundles in bring(plan, self.ranks):
            with phase("pack"):
                batch = self._pack(bundles, self.config.algorithm.rollout_correction, nll_weight)
            yield batch

    def _pack(self, bundles: list[Bundle], correction_cap: float | None, nll_weight: float) -> PackedBatch:
        return pack(
            bundles,
            self.encoder.encode,
            self.encoder.pixels,
            self.policy.positions,
            policy_version=self.version,
            correction_cap=correction_cap,
            nll_weight=nll_weight,
        ).to(self.ranks.device)

    def _reference_logps(self, batch: PackedBatch) -> torch.Tensor | None:
        if self.config.algorithm.kl_coef == 0:
            return None
        with torch.no_grad():
            if self.reference is not None:
                return self.reference(batch, self.config.rollout.temperature)[0]
            with lora.adapters_off(self.adapters):
                return self.engine(batch, self.config.rollout.temperature)[0]

    def _extra_sums(self, loss: torch.Tensor, logps: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the loss's own statistics lack, as sums over tokens: the last fields of `_SUMS`."""
        counted = batch.loss_mask & (batch.weights != 0)
        of_sample = torch.repeat_interleave(batch.age, batch.cu_seqlens.diff(), output_size=len(logps))
        fresh = counted & (of_sample <= self.config.rollout.max_staleness)
        gap = (batch.old_logps - logps).double()  # near 1e-6 on policy, where fp32 would lose its square
        kl = torch.where(fresh, gap.expm1() - gap, 0.0).sum()
        processed = torch.full((), float(batch.tokens), device=loss.device)
        nll = kl.new_zeros(()) if batch.nll_weights is None else -(batch.nll_weights * logps).sum()
        return torch.stack([x.double() for x in (loss.detach(), kl, fresh.sum(), processed, nll)])


METRICS = (
    "loss",
    "entropy",
    "kl",
    "clip_fraction_low",
    "clip_fraction_high",
    "old_kl",
    "grad_norm",
    "learning_rate",
    "train_tokens",
    "supervised_loss",
    "skipped",
    "oom_retries",
)
_COUNTERS = ("steps", "version", "skipped_steps", "oom_retries")
_SUMS = (*LINEAR_GRPO_STATS, "loss", "fresh_kl_sum", "fresh_tokens", "processed", "supervised_loss")
