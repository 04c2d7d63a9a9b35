"""The policy under DeepSpeed ZeRO-3: one optimizer step on a global batch, full weights out, models saved.

This is the only module that knows DeepSpeed. Every method is collective: all ranks call it with the same samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rethinker.algorithm.objective import loss_normalizer, supervised_weight, surrogate_inputs
from rethinker.config import Config, ConfigError
from rethinker.policy.model import Policy, load_model
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.ownership import bring
from rethinker.runtime.profiling import phase
from rethinker.samples import Bundle, PackedBatch, Sample
from rethinker.tasks.prompts import PromptEncoder
from rethinker_kernels import LINEAR_GRPO_STATS


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
    ) -> None:
        """
        Args:
            config: the run's settings.
            model_dir: Hugging Face folder or name of the policy to start from.
            encoder: turns queries into prompts and pixels.
            ranks: this process's place.
            total_steps: length of the learning-rate schedule.
            reference_dir: the model that algorithm.kl_coef keeps the policy close to; by default model_dir.
        """
        self.config, self.encoder, self.ranks, self.total_steps = config, encoder, ranks, total_steps
        self.steps = 0  # optimizer steps attempted
        self.version = 0  # weight syncs: the policy version that rollouts carry
        self.skipped_steps = 0
        # DeepSpeed would compile a shared-memory all-reduce at its first start. Only CPU inference calls it, and a run
        # killed meanwhile would leave a lock that every later start waits on for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = zero3_settings(config, ranks)
        # Announced before the model is loaded, so that transformers partitions each weight as it reads it.
        from transformers.integrations import HfDeepSpeedConfig

        announced = HfDeepSpeedConfig(settings)
        dtype = getattr(torch, config.policy.dtype)
        policy = Policy(load_model(model_dir, dtype), config.policy)
        self.reference = None
        if config.algorithm.kl_coef > 0:
            reference = Policy(load_model(reference_dir or model_dir, dtype), config.policy)
            reference.requires_grad_(False)
            without_optimizer = {k: v for k, v in settings.items() if k not in ("optimizer", "gradient_clipping")}
            self.reference, *_ = deepspeed.initialize(model=reference, config=without_optimizer)
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
        self._numel = {name: math.prod(shape) for name, _, shape in self.weights.metadata()}

    def train_step(self, samples: list[Sample]) -> dict[str, float]:
        """One optimizer step on a global batch.

        Args:
            samples: the whole batch over all ranks, in the same order on every rank; each rank holds the tokens of
                those that it owns.

        Returns:
            `loss`, `entropy`, `kl`, `clip_fraction_low`, `clip_fraction_high`, `old_kl` (k3 of the current policy from
            the behaviour policy, on samples of the current version), `grad_norm`, `learning_rate`, `train_tokens`
            (processed, over all ranks), `supervised_loss` (the part of `loss` from rethought responses), `skipped`
            (1 if a non-finite number kept the step from being applied). An empty batch (every query all right or all
            wrong, and nothing to replay) leaves the weights as they are.
        """
        config = self.config
        if not samples:
            self.steps += 1
            return dict.fromkeys(METRICS, 0.0)
        normalizer = loss_normalizer(samples, config.algorithm, config.rollout.max_new_tokens)
        nll_weight = supervised_weight(samples, config.rethink.supervised_weight)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.ranks.device)
        for batch in self._micro_batches(samples, nll_weight):
            with phase("forward"):
                surrogate = surrogate_inputs(batch, config.algorithm, normalizer, self._reference_logps(batch))
                loss, logps, stats = self.engine(batch, config.rollout.temperature, surrogate)
            with phase("backward"):
                # ZeRO averages gradients over ranks; the normalizer is global already. A non-finite loss poisons the
                # gradient on purpose: ZeRO then sees a non-finite norm on every rank and leaves the weights alone.
                poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                self.engine.backward(loss * poison * self.ranks.world_size)
            with torch.no_grad():
                sums += torch.cat([stats, self._extra_sums(loss, logps, batch)])
        rate = learning_rate(self.steps, self.total_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with phase("optimizer"):
            self.engine.step()
        self.steps += 1
        values = dict(zip(_SUMS, self.ranks.sum(sums).tolist(), strict=True))
        grad_norm = float(self.engine.get_global_grad_norm())
        skipped = not (math.isfinite(grad_norm) and math.isfinite(values["loss"]))
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
        )
        return dict(zip(METRICS, metrics, strict=True))

    @torch.no_grad()
    def score(self, samples: list[Sample]) -> None:
        """Set `completion.trainer_logprobs` of the samples that this rank holds, from the current policy's forward."""
        mine = [sample for sample in samples if sample.owner == self.ranks.rank]
        (plan,) = plan_micro_batches(mine, budget=self.config.train.micro_batch_tokens, world_size=1)
        # ZeRO-3 gathers weights by collectives: the ranks run equally many forwards, some of them on nothing.
        plan += [[]] * (max(self.ranks.gather(len(plan))) - len(plan))
        for bundles in plan:
            batch = self._pack(bundles, correction_cap=None, nll_weight=0.0)
            logps, _ = self.engine(batch, self.config.rollout.temperature)
            scores = iter(logps.tolist())  # a batch without a token has one score too many
            for sample in (sample for bundle in bundles for sample in bundle.samples):
                sample.completion.trainer_logprobs = list(itertools.islice(scores, sample.completion.tokens))

    @property
    def weights(self) -> FullWeights:
        """The policy's full weights under their Hugging Face names, gathered a few at a time."""
        return FullWeights(self.policy.hf)

    def model_snapshot(self) -> Callable[[Path], None]:
        """The policy as it is now (collective); what comes back writes it, in Hugging Face format, on rank 0.

        vLLM and transformers load that folder as it is; the processor is in it.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights if self.ranks.is_main}

        def write(folder: Path) -> None:
            self.policy.hf.save_pretrained(folder, state_dict=state)
            self.encoder.processor.save_pretrained(folder)

        return write

    def optimizer_snapshot(self) -> Callable[[Path], None]:
        """This rank's part of the fp32 weights and AdamW's moments as they are now; what comes back writes a file."""
        state = {f"{kind}.{name}": piece.to("cpu", copy=True) for kind, name, piece in self._optimizer_pieces()}

        def write(folder: Path) -> None:
            save_file(state, folder / f"optimizer_{self.ranks.rank:05d}.safetensors")

        return write

    def load_optimizer(self, folder: Path, adam_steps: int) -> None:
        """Continue with the optimizer that `optimizer_snapshot` wrote, on any number of ranks.

        Args:
            folder: where it lies; the model itself has been loaded.
            adam_steps: steps that AdamW had applied, as `state_dict` says.

        Raises:
            ConfigError: it belongs to a model with other parameters.
        """
        zero = self.optimizer
        with ExitStack() as stack:
            paths = sorted(folder.glob("optimizer_*.safetensors"))
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            if adam_steps:
                for flat in zero.fp32_partitioned_groups_flat:
                    moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
                    zero.optimizer.state[flat] = {"step": torch.tensor(float(adam_steps)), **moments}
            expected = {f"{kind}.{name}" for kind, name, _ in self._optimizer_pieces()}
            if expected != set(files[0].keys()):
                other = min(expected ^ set(files[0].keys()))
                raise ConfigError(
                    f"resume: {folder} is of a model with other parameters ({other}); set that policy.model"
                )
            for kind, name, piece in self._optimizer_pieces():
                parts = [file.get_slice(f"{kind}.{name}") for file in files]
                piece.copy_(_repartitioned(parts, self._numel[name], piece.numel(), self.ranks.rank))

    def _optimizer_pieces(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, parameter, this rank's flat piece of it, padding included), views of what the optimizer works on."""
        zero = self.optimizer
        kinds = {"fp32": None} | ({name: name for name in _MOMENTS} if zero.optimizer.state else {})
        for name, parameter in self.policy.hf.named_parameters():
            if parameter.requires_grad:
                for kind, key in kinds.items():
                    yield kind, name, zero.get_local_fp32_param(parameter, key).detach()

    def state_dict(self) -> dict[str, int]:
        """Counters; the weights and the optimizer have snapshots of their own."""
        states = self.optimizer.optimizer.state.values()
        adam_steps = next((int(state["step"]) for state in states), 0)  # a skipped or an empty step is none of them
        return {name: getattr(self, name) for name in _COUNTERS} | {"adam_steps": adam_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counters over."""
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _micro_batches(self, samples: list[Sample], nll_weight: float) -> Iterator[PackedBatch]:
        budget = self.config.train.micro_batch_tokens
        plan = plan_micro_batches(samples, budget=budget, world_size=self.ranks.world_size)
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
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.reference(batch, self.config.rollout.temperature)[0]

    def _extra_sums(self, loss: torch.Tensor, logps: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the loss's own statistics lack, as sums over tokens: the last fields of `_SUMS`."""
        counted = batch.loss_mask & (batch.weights != 0)
        of_sample = torch.repeat_interleave(batch.age, batch.cu_seqlens.diff(), output_size=len(logps))
        fresh = counted & (of_sample == 0)
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
)
_COUNTERS = ("steps", "version", "skipped_steps")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SUMS = (*LINEAR_GRPO_STATS, "loss", "fresh_kl_sum", "fresh_tokens", "processed", "supervised_loss")


class FullWeights:
    """A policy's weights as (name, full tensor), re-iterable; each pass gathers one decoder layer at a time.

    Iterating is collective: every rank must take the whole pass.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._named = list(model.named_parameters())

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of every weight, in the order of iteration, without gathering any."""
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for _, members in _by_layer(self._named):
            with deepspeed.zero.GatheredParameters([p for _, p in members]):
                for name, parameter in members:
                    yield name, parameter.detach()


def _repartitioned(parts: list[Any], total: int, length: int, rank: int) -> torch.Tensor:
    """This rank's piece of a flat tensor that lies in equal parts in other ranks' files.

    Args:
        parts: slices (safetensors) of equal length; the last ones are padded beyond `total` elements.
        length: elements of the piece; those beyond `total` are padding.
    """
    per_part = parts[0].get_shape()[0]
    start, end = rank * length, min((rank + 1) * length, total)
    piece = torch.zeros(length)
    while start < end:
        part, offset = divmod(start, per_part)
        taken = min(per_part - offset, end - start)
        piece[start - rank * length :][:taken] = parts[part][offset : offset + taken]
        start += taken
    return piece


def _by_layer(named: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, list[tuple[str, torch.nn.Parameter]]]]:
    """Consecutive parameters that share everything up to their first index: `model.language_model.layers.3`."""
    layers: list[tuple[str, list[tuple[str, torch.nn.Parameter]]]] = []
    for name, parameter in named:
        parts = name.split(".")
        digit = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = name if digit is None else ".".join(parts[: digit + 1])
        if not layers or layers[-1][0] != key:
            layers.append((key, []))
        layers[-1][1].append((name, parameter))
    return layers


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then train.schedule."""
    train = config.train
    warmup = round(train.warmup_ratio * total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    floor = train.min_lr_ratio
    return train.learning_rate * (floor + (1 - floor) * shape[train.schedule])


def zero3_settings(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed configuration, with `train.deepspeed` merged over it."""
    settings: dict[str, Any] = {
        # Micro-batches differ in number from step to step, so the step's end is ours to say.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.policy.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": ranks.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": 500_000_000 if ranks.device.type == "cuda" else 5_000_000,
            "stage3_prefetch_bucket_size": 50_000_000 if ranks.device.type == "cuda" else 500_000,
            "stage3_param_persistence_threshold": 100_000 if ranks.device.type == "cuda" else 0,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return _merge(settings, config.train.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
