"""The policy under DeepSpeed ZeRO-3: one optimizer step on a global batch, full weights out, models saved.

Every method is collective: all ranks call it with the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from transformers.integrations import HfDeepSpeedConfig

from rethinker.algorithm.objective import (
    has_gradient,
    is_users,
    load_loss,
    loss_inputs,
    loss_normalizer,
    supervised_weight,
)
from rethinker.config import AlgorithmConfig, Config, ConfigError, one_line
from rethinker.data.prompts import PromptEncoder
from rethinker.policy import lora, optimizer_state, saved_model
from rethinker.policy.experts import load_statistics
from rethinker.policy.loading import load_model
from rethinker.policy.lora import FullWeights
from rethinker.policy.model import Policy, gather_by_layer
from rethinker.policy.out_of_memory import Plan, explained, noted_budget, reduce_budget
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.policy.reference import MovingReference
from rethinker.policy.zero3 import deepspeed_config, without_optimizer
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.ownership import fetch
from rethinker.runtime.profiling import phase
from rethinker.samples import Bundle, Completion, PackedBatch, Sample
from rethinker_kernels import LINEAR_GRPO_STATS
from rethinker_kernels.losses import LossError

_SUMS = (*LINEAR_GRPO_STATS, "loss", "fresh_kl_sum", "fresh_tokens", "processed", "supervised_loss")
_OPTIMIZER_IS_FULL = (
    "out of memory in the optimizer's part of step {}, whose size does not depend on train.micro_batch_tokens; lower "
    "rollout.gpu_memory_utilization, take more ranks, or put the optimizer on the host (train.deepspeed), and resume "
    "from the last checkpoint"
)


@dataclass(frozen=True)
class Scores:
    """What `PolicyEngine.score` finds."""

    mismatch: float
    """k3 of the policy from the behaviour policy, nats per sampled token, over the samples of all ranks."""
    entropies: list[np.ndarray]
    """Of the policy at each token, fp32 [L], nats: of the samples that this rank holds, in their order."""


class PolicyEngine:
    """The trained policy, its optimizer and its learning-rate schedule, sharded over the ranks by ZeRO-3."""

    def __init__(
        self,
        config: Config,
        model_dir: str | Path,
        encoder: PromptEncoder,
        ranks: Ranks,
        total_steps: int,
        initial_dir: str | Path | None = None,
        budget_file: Path | None = None,
    ) -> None:
        """
        Args:
            config: the run's settings.
            model_dir: Hugging Face folder or name of the policy to start from.
            encoder: turns queries into prompts and pixels.
            ranks: this process's place.
            total_steps: length of the learning-rate schedule.
            initial_dir: where training started, if not at model_dir: the model that algorithm.kl_coef keeps the policy
                close to. A checkpoint's adapters (policy.lora) are put beside its weights again, because merged weights
                cannot be taken apart exactly.
            budget_file: where a rank that runs out of memory notes the smaller micro-batch budget for the next start;
                a note that is there is followed.
        """
        self.config, self.encoder, self.ranks, self.total_steps = config, encoder, ranks, total_steps
        self.steps = 0  # optimizer steps attempted
        self.budget_spent = 0.0  # share of train.max_generated_tokens sampled before the samples that are trained on
        self.version = 0  # weight syncs: the policy version that rollouts carry
        self.budget_file = budget_file
        self.loss = load_loss(config.algorithm, ranks.device)
        # On several nodes only one may see the note, and all must cut the same micro-batches.
        self.micro_batch_tokens = min(ranks.gather(noted_budget(budget_file, config.train.micro_batch_tokens)))
        # DeepSpeed would compile a shared-memory all-reduce at its first start. Only CPU inference calls it, and a run
        # killed meanwhile would leave a lock that every later start waits on for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = deepspeed_config(config, ranks.world_size, on_gpu=ranks.device.type == "cuda")
        dtype = getattr(torch, config.policy.dtype)
        # Announced before a model is loaded, so that transformers partitions each weight as it reads it.
        announced = HfDeepSpeedConfig(settings)
        initial_dir, saved = Path(initial_dir or model_dir), Path(model_dir, lora.FOLDER)
        resumed = config.policy.lora.rank and initial_dir != Path(model_dir) and saved.is_dir()
        self.base_dir = initial_dir if resumed else model_dir
        model = load_model(self.base_dir, dtype)
        self.adapters = lora.add_adapters(model, config.policy.lora, config.seed) if config.policy.lora.rank else {}
        moves = config.algorithm.reference_every is not None
        pairs = lora.add_reference(self.adapters) if moves else {}
        if resumed:
            lora.load(self.adapters, saved)
        self.policy = Policy(model, config.policy)
        bucket = settings["zero_optimization"]["stage3_prefetch_bucket_size"]
        largest = math.inf if config.policy.compile else bucket
        self.reference = None
        if config.algorithm.kl_coef > 0 and not (self.adapters and (moves or initial_dir == Path(self.base_dir))):
            frozen = without_optimizer(settings)
            announced = HfDeepSpeedConfig(frozen)
            reference = Policy(load_model(initial_dir, dtype), config.policy).requires_grad_(False)
            gather_by_layer(reference.hf, largest)
            self.reference, *_ = deepspeed.initialize(model=reference, config=frozen)
            if moves:
                kept = dict(reference.named_parameters())
                pairs = {name: (p, kept[name]) for name, p in self.policy.named_parameters() if p.requires_grad}
        self.moving = MovingReference(pairs, ranks.rank) if moves else None
        del announced  # or the rollout's own copy of the model would be partitioned too
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.train.learning_rate, betas=config.train.betas, weight_decay=config.train.weight_decay
        )
        gather_by_layer(model, largest)
        # eval(): no dropout in the policy, the ratio would not be 1 on policy.
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=self.policy.eval(), optimizer=optimizer, config=settings, model_parameters=trained
        )
        self._files = self._files_beside_weights()
        # Resumed adapters need the very weights that they were trained beside.
        self._base = lora.fingerprint(FullWeights(lora.base_weights(model))) if self.adapters else None

    def train_step(self, samples: list[Sample]) -> dict[str, float | None]:
        """One optimizer step on a global batch, of which samples without a gradient (`has_gradient`) are not computed.

        Args:
            samples: the whole batch over all ranks, in the same order on every rank; each rank holds the tokens of
                those that it owns.

        Returns:
            `loss`, `entropy`, `kl`, `clip_fraction_low`, `clip_fraction_high`, `old_kl` (k3 of the current policy from
            the one that the ratio is taken against, on samples no older than rollout.max_staleness), `grad_norm`,
            `learning_rate`, `train_tokens` (processed, over all ranks), `supervised_loss` (the part of `loss` from
            rethought responses), `skipped` (1 if a non-finite number kept the step from being applied), and
            `load_statistics` where the model has experts; means are over the tokens that were computed. An empty
            batch (every query all right or all wrong, and nothing to replay) leaves the weights as they are.

        Raises:
            OutOfMemory: memory ran out on this rank.
            ConfigError: memory ran out, and smaller micro-batches would not help; or the user's own loss fails, or is
                not finite where every log-prob is.
        """
        if not samples:
            self.steps += 1
            return _metrics(dict.fromkeys(_SUMS, 0.0), self._no_load().cpu(), grad_norm=0.0, rate=0.0)
        computed = [sample for sample in samples if has_gradient(sample, self.config.algorithm)]
        plan = plan_micro_batches(computed, budget=self.micro_batch_tokens, world_size=self.ranks.world_size)
        named = f"algorithm.loss={self.config.algorithm.loss}"
        with explained(lambda: self._smaller_next_time(plan)):
            try:
                sums, load = self._accumulate(samples, plan)
            except LossError as error:
                raise ConfigError(f"{named}: in step {self.steps + 1}, {one_line(error)}") from error
        rate = learning_rate(self.steps, self.total_steps, self.config, self.budget_spent)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with phase("optimizer"), explained(lambda: _OPTIMIZER_IS_FULL.format(self.steps + 1)):
            self.engine.step()
        self.steps += 1
        totals = self.ranks.sum(torch.cat([sums, load.flatten()])).cpu()
        sums = dict(zip(_SUMS, totals[: len(_SUMS)].tolist(), strict=True))
        if is_users(self.config.algorithm) and not (math.isfinite(sums["loss"]) or sums["nonfinite"]):
            raise ConfigError(
                f"{named}: it is {sums['loss']} in step {self.steps}, though every log-prob of the "
                "batch is finite; it must be finite for any finite logps, old_logps and advantages"
            )
        return _metrics(sums, totals[len(_SUMS) :].view(load.shape), float(self.engine.get_global_grad_norm()), rate)

    @torch.no_grad()
    def score(self, samples: list[Sample]) -> Scores:
        """Set `completion.trainer_logprobs` of the samples that this rank holds, from the current policy's forward."""
        mine = [sample for sample in samples if sample.owner == self.ranks.rank]
        (plan,) = plan_micro_batches(mine, budget=self.micro_batch_tokens, world_size=1)
        # ZeRO-3 gathers weights by collectives: the ranks run equally many forwards, some of them on nothing.
        plan += [[]] * (max(self.ranks.gather(len(plan))) - len(plan))
        scores = []  # [2, R] per micro-batch, on the device: the host waits for them once
        with explained(lambda: self._smaller_next_time([plan])):
            for bundles in plan:
                batch = self._pack(bundles, AlgorithmConfig(), nll_weight=0.0)
                scores.append(torch.stack(self.engine(batch, self.config.rollout.temperature)))
            parts = torch.cat(scores, dim=1).float().cpu().split([part.shape[1] for part in scores], dim=1)
        entropies: dict[int, np.ndarray] = {}
        for bundles, part in zip(plan, parts, strict=True):
            start = 0  # a batch without a token has one score too many
            for completion in (sample.completion for bundle in bundles for sample in bundle.samples):
                own = part[:, start : start + completion.tokens].numpy()
                completion.trainer_logprobs, entropies[id(completion)] = own[0].copy(), own[1].copy()
                start += completion.tokens
        held = [np.zeros((2, 0)), *(_sampled(sample.completion) for sample in mine)]
        behaviour, own = np.concatenate(held, axis=1, dtype=np.float64)
        gap = behaviour - own
        sums = torch.tensor([(np.expm1(gap) - gap).sum(), len(gap)], dtype=torch.float64, device=self.ranks.device)
        kl, tokens = self.ranks.sum(sums).tolist()
        return Scores(kl / max(tokens, 1.0), [entropies[id(sample.completion)] for sample in mine])

    @property
    def weights(self) -> FullWeights:
        """The policy's full weights under their Hugging Face names, adapters merged in, gathered a few at a time."""
        return FullWeights(lora.base_weights(self.policy.hf), self.adapters)

    def model_snapshot(self) -> Callable[[Path], None]:
        """The policy as it is now (collective); what comes back writes it, in Hugging Face format, on rank 0.

        vLLM and transformers load that folder as it is; the processor is in it. With policy.lora its weights are
        merged, and its folder `adapter` has the adapters alone, in peft's format.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights if self.ranks.is_main}
        adapters = FullWeights(lora.adapter_parameters(self.adapters))
        trained = {name: tensor.to("cpu", copy=True) for name, tensor in adapters if self.ranks.is_main}

        def write(folder: Path) -> None:
            saved_model.save_weights(folder, self.policy.hf, state, trained)
            self.save_files(folder)

        return write

    def save_files(self, folder: Path) -> None:
        """Write what a saved model has beside its weights, on rank 0."""
        saved_model.save_files(folder, self._files)

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint: the model, fp32 weights and AdamW's two moments of what is trained, and a reference
        that moves."""
        model = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.weights.metadata())
        model += self.moving.bytes() if self.moving else 0
        return model + sum(3 * 4 * p.ds_numel for p in self.policy.parameters() if p.requires_grad)

    def optimizer_snapshot(self) -> Callable[[Path], None]:
        """This rank's part of the optimizer as it is now; what comes back writes it into a folder."""
        return optimizer_state.snapshot(self.policy.hf, self.optimizer, self.ranks.rank)

    def load_optimizer(self, folder: Path, adam_steps: int) -> None:
        """Continue with the optimizer of `optimizer_snapshot`, on any number of ranks; see optimizer_state.load."""
        optimizer_state.load(self.policy.hf, self.optimizer, folder, adam_steps, self.ranks.rank)

    def state_dict(self) -> dict[str, Any]:
        """Counters; the weights and the optimizer have snapshots of their own."""
        return {
            "steps": self.steps,
            "version": self.version,
            "budget_spent": self.budget_spent,
            "adam_steps": optimizer_state.applied_steps(self.optimizer),
            "base": self._base,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters.

        Raises:
            ConfigError: the frozen weights under the adapters are not those of the run that is continued.
        """
        if state.get("base") != self._base:
            raise ConfigError(
                f"resume: the model {self.base_dir} is no longer the one that this run's adapters were trained beside; "
                "restore that one, or start a new run with policy.model=<the checkpoint>, whose weights are merged"
            )
        self.steps, self.version = state["steps"], state["version"]
        self.budget_spent = state.get("budget_spent", 0.0)  # 0.1.0 did not note it

    def _files_beside_weights(self) -> dict[str, bytes]:
        """All that a checkpoint's model has but its weights, on rank 0, which writes it; a fault is every rank's."""
        files, fault = {}, None
        if self.ranks.is_main:
            try:
                files = saved_model.files_beside_weights(self.policy.hf, self.encoder.processor, self.base_dir)
            except (ConfigError, OSError) as error:  # OSError: no folder for temporary files
                fault = str(error)
        if fault := self.ranks.broadcast(fault):
            raise ConfigError(fault)
        return files

    def _smaller_next_time(self, plan: Plan) -> str:
        """Note a smaller budget for the next start, and say so; the other ranks wait for this one in a collective."""
        setting = self.config.train.micro_batch_tokens
        change = reduce_budget(self.budget_file, setting, self.micro_batch_tokens, plan)
        return f"rank {self.ranks.rank} ran out of memory in step {self.steps + 1}: {change}"

    def _accumulate(self, samples: list[Sample], plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of all micro-batches: gradients in ZeRO-3; this rank's sums [len(_SUMS)] and experts'
        load [layers, experts] returned."""
        config = self.config
        normalizer = loss_normalizer(samples, config.algorithm, config.rollout.max_new_tokens)
        nll_weight = supervised_weight(samples, config.rethink.supervised_weight)
        sums, load = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.ranks.device), self._no_load()
        for bundles in fetch(plan, self.ranks):
            with phase("pack"):
                batch = self._pack(bundles, config.algorithm, nll_weight)
            with phase("forward"):
                reference = self._reference_logps(batch)
                objective = loss_inputs(self.loss, batch, config.algorithm, normalizer, reference)
                loss, logps, stats = self.engine(batch, config.rollout.temperature, objective)
            if bundles and len(load):
                load += torch.stack([router.load for router in self.policy.routers.values()])
            with phase("backward"):
                # ZeRO averages gradients over ranks; the normalizer is global already. A non-finite loss poisons the
                # gradient on purpose: ZeRO then sees a non-finite norm on every rank and leaves the weights alone.
                poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                self.engine.backward(loss * poison * self.ranks.world_size)
            with torch.no_grad():
                sums += torch.cat([stats, self._extra_sums(loss, logps, batch)])
        return sums, load

    def _no_load(self) -> torch.Tensor:
        """Zeros [layers, experts], of the layers that have experts."""
        routers = list(self.policy.routers.values())
        size = len(routers), routers[0].num_experts if routers else 0
        return torch.zeros(size, dtype=torch.float64, device=self.ranks.device)

    def _pack(self, bundles: list[Bundle], algorithm: AlgorithmConfig, nll_weight: float) -> PackedBatch:
        factors = {"policy_version": self.version, "algorithm": algorithm, "nll_weight": nll_weight}
        row = pack(bundles, self.encoder.encode, self.encoder.pixels, self.policy.positions, **factors)
        return row.to(self.ranks.device)

    def _reference_logps(self, batch: PackedBatch) -> torch.Tensor | None:
        if self.config.algorithm.kl_coef == 0:
            return None
        batch = replace(batch, experts=None)  # another policy, which chooses for itself
        with torch.no_grad():
            if self.reference is not None:
                return self.reference(batch, self.config.rollout.temperature)[0]
            with lora.reference_on(self.adapters):
                return self.engine(batch, self.config.rollout.temperature)[0]

    def _extra_sums(self, loss: torch.Tensor, logps: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the loss's own statistics lack, as sums over tokens: the last fields of `_SUMS`."""
        counted = batch.loss_mask
        of_sample = torch.repeat_interleave(batch.age, batch.cu_seqlens.diff(), output_size=len(logps))
        fresh = counted & (of_sample <= self.config.rollout.max_staleness)
        gap = (batch.old_logps - logps).double()  # near 1e-6 on policy, where fp32 would lose its square
        kl = torch.where(fresh, gap.expm1() - gap, 0.0).sum()
        processed = torch.full((), float(batch.tokens), device=loss.device)
        nll = kl.new_zeros(()) if batch.nll_weights is None else -(batch.nll_weights * logps).sum()
        return torch.stack([x.double() for x in (loss.detach(), kl, fresh.sum(), processed, nll)])


def _sampled(completion: Completion) -> np.ndarray:
    """Behaviour's and trainer's log-probs [2, tokens] of what the policy sampled."""
    return np.stack([completion.logprobs, completion.trainer_logprobs])[:, completion.sampled]


def learning_rate(step: int, total_steps: int, config: Config, budget_spent: float = 0.0) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then train.schedule, which is as far as the
    steps are, or the share `budget_spent` of train.max_generated_tokens if that is further."""
    train = config.train
    warmup = round(train.warmup_ratio * total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    progress = max((step - warmup) / max(1, total_steps - warmup), budget_spent)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    floor = train.min_lr_ratio
    return train.learning_rate * (floor + (1 - floor) * shape[train.schedule])


def _metrics(of: dict[str, float], load: torch.Tensor, grad_norm: float, rate: float) -> dict[str, float | None]:
    """What `train_step` returns, from the sums over all ranks by their names in `_SUMS`, and the experts' load."""
    tokens = max(of["tokens"], 1.0)
    return {
        "loss": of["loss"],
        "entropy": of["entropy_sum"] / tokens,
        "kl": of["kl_sum"] / tokens,
        "clip_fraction_low": of["clipped_low"] / tokens,
        "clip_fraction_high": of["clipped_high"] / tokens,
        "old_kl": of["fresh_kl_sum"] / max(of["fresh_tokens"], 1.0),
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "train_tokens": of["processed"],
        "supervised_loss": of["supervised_loss"],
        "skipped": float(not (math.isfinite(grad_norm) and math.isfinite(of["loss"]))),
        **load_statistics(load),
    }
