"""Memory of one rank, term by term: what stays between steps, and the worst moment of a training step.

Legend: N parameters, w ranks, b bytes of a weight, T tokens and P patches of a micro-batch, R rows of the head,
V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rethinker.checks import lora_targets
from rethinker.config import Config, ConfigError, one_line
from rethinker.plan.activations import text_activations, vision_activations
from rethinker.plan.shapes import Shape
from rethinker.policy.attention import kernel_for
from rethinker.policy.zero3 import deepspeed_config
from rethinker.rollout.weight_sync import BUCKET_BYTES
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, chunk_bytes

GIB = 2**30
H100_PROCESSORS = 132  # the loss head's chunks depend on them; other GPUs' differ by a few percent


@dataclass(frozen=True)
class Term:
    """One line of a budget: what, how many bytes, and where the number comes from."""

    name: str
    bytes: float
    note: str = ""


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch that a rank meets."""

    tokens: int  # T
    rows: int  # R
    row: int  # tokens of a prompt with its responses: what SDPA's mask is quadratic in
    patches: int  # P


def zero3(config: Config, ranks: int, on_gpu: bool) -> tuple[Any, int]:
    """(DeepSpeed's ZeRO settings of a run, bytes of an accumulated gradient's entry).

    Raises:
        ConfigError: train.deepspeed holds what DeepSpeed does not take.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = deepspeed_config(config, ranks, on_gpu)
    try:
        zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValueError as error:
        raise ConfigError(f"train.deepspeed.zero_optimization: {one_line(error)}") from error
    return zero, 4 if settings["data_types"]["grad_accum_dtype"] in ("fp32", "float32") else 2


def on_host(part: Any) -> bool:
    """Whether an `offload_*` section of DeepSpeed's moves its part to the host."""
    return part is not None and part.device != "none"


def weight_bytes(config: Config) -> int:
    """b."""
    return 2 if config.policy.dtype == "bfloat16" else 4


def lora_parameters(config: Config, shape: Shape) -> int:
    """A and B of policy.lora; 0 without."""
    chosen = lora_linears(config, shape)
    return shape.text.num_hidden_layers * (config.policy.lora.rank or 0) * sum(wide + high for wide, high in chosen)


def lora_linears(config: Config, shape: Shape) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of a decoder layer that get adapters.

    Raises:
        ConfigError: policy.lora.target_modules names another one.
    """
    lora = config.policy.lora
    sizes = {name: (wide, high) for name, wide, high in shape.linears}
    return [sizes[name] for name in lora_targets(sizes, lora.target_modules)] if lora.rank else []


def trained_parameters(config: Config, shape: Shape) -> int:
    """Those that have gradients and optimizer state."""
    if config.policy.lora.rank:
        return lora_parameters(config, shape)
    return shape.text_parameters if config.policy.freeze_vision else shape.parameters


def training_state(config: Config, shape: Shape, ranks: int, on_gpu: bool) -> tuple[list[Term], list[Term]]:
    """What a rank holds between steps: (on its device, offloaded to the host)."""
    (zero, entry), b = zero3(config, ranks, on_gpu), weight_bytes(config)
    whole, trained = shape.parameters / ranks, trained_parameters(config, shape) / ranks
    adapters = lora_parameters(config, shape) / ranks
    parameters = [Term("parameters", b * (whole + adapters), f"{b} bytes / ranks")]
    optimizer = [Term("gradients", entry * trained, f"{entry} bytes / ranks")]
    # An fp32 policy is not its own master: DeepSpeed compares a torch.device with a text and copies (measured).
    optimizer.append(Term("fp32 master weights", 4 * trained, "4 bytes / ranks"))
    optimizer.append(Term("AdamW moments", 8 * trained, "8 bytes / ranks"))
    device = [Term("gradient bucket", zero.reduce_bucket_size * b, "reduce_bucket_size")]
    if (sharing := min(zero.zero_hpz_partition_size, ranks)) > 1:
        copied = b * shape.parameters / sharing
        device.append(Term("the node's copy of the weights", copied, f"{b} bytes / {sharing}, zero_hpz_partition_size"))
    if config.algorithm.kl_coef > 0 and not adapters:
        device.append(Term("reference policy", b * whole, "algorithm.kl_coef > 0"))
    host: list[Term] = []
    if on_host(zero.offload_optimizer):
        optimizer.append(Term("fp32 gradients", 4 * trained, "4 bytes / ranks"))
    for terms, away in ((parameters, zero.offload_param), (optimizer, zero.offload_optimizer)):
        (host if on_host(away) else device).extend(terms)
    return device[1:] + device[:1], host


def step_moments(config: Config, shape: Shape, batch: MicroBatch, ranks: int, on_gpu: bool) -> list[list[Term]]:
    """What a step adds at each moment that may be its worst.

    Moments: the head (its gradients are made in its forward), the head's and the layers' backward, the vision tower's
    backward, the embedding's gradient, and the optimizer.
    """
    (zero, _), b = zero3(config, ranks, on_gpu), weight_bytes(config)
    kernel = kernel_for(config.policy, on_gpu)
    T, P, R = batch.tokens, batch.patches, batch.rows
    row = batch.row if kernel == "sdpa" else 0
    lora = config.policy.lora
    given = {"dtype": config.policy.dtype, "kernel": kernel, "checkpointing": config.policy.gradient_checkpointing}
    text = text_activations(shape, **given, row=row, rank=lora.rank or 0, targets=tuple(lora.target_modules))
    vision = vision_activations(shape, **given)
    frozen = config.policy.freeze_vision or bool(lora.rank)

    head = b * shape.head_parameters  # also the head's gradient, and the embedding's
    learned = 0 if lora.rank else head  # either of them, where it has one
    rows, states = b * R * shape.hidden, b * T * shape.hidden
    work = _chunk_bytes(shape, R, b, on_gpu)
    # A full bucket is copied once more to be scattered; a gradient larger than the bucket goes alone.
    flush = b * min(zero.reduce_bucket_size, trained_parameters(config, shape))
    large = max(flush, learned)
    waits = learned if shape.tied else 0  # the head's gradient waits for the embedding's
    gathered = 0.0
    if ranks > 1:
        at_turn = max(shape.head_parameters, min(zero.max_reuse_distance / 2, shape.parameters))
        gathered = b * (at_turn + min(zero.prefetch_bucket_size, shape.parameters))

    tokens, patches = f"{T:,} tokens", f"{P:,} patches"
    kept = [Term("activations, language model", text.kept * T, tokens)]
    seen = [] if frozen or not P else [Term("activations, vision tower", vision.kept * P, patches)]
    seen += [Term("pixels", P * shape.patch_values * (4 + b), patches)] if P else []
    # The hidden states and their gradient, the weight's fp32 gradient, and a chunk of logits; in the backward pass both
    # gradients scaled, the weight's from fp32, where it waits until then.
    made = Term(
        "loss head",
        2 * rows + learned * 4 / b + work,
        f"{R:,} rows, of which {work / GIB:.2g} GiB are a chunk of logits",
    )
    live = [Term("gathered weights", gathered, "the head, a layer, prefetched ones")] if gathered else []
    see = [
        Term("vision tower's backward", (vision.extra * P + vision.fixed) + states + waits + flush)
        if not frozen
        else Term("vision tower's forward", vision.forward * P + states)
    ]
    trained = trained_parameters(config, shape) / ranks
    moments = [
        [*kept, *seen, *live, made],
        [*kept, *seen, *live, Term("loss head's backward", 2 * rows + learned * (1 + 4 / b) + states + large)],
        [*kept, *seen, *live, Term("layers' backward", text.extra * T + text.fixed + waits + flush)],
        [*seen, *live, *see],
    ]
    if learned:
        moments.append([*live, Term("embedding's gradient", states + (3 if shape.tied else 1) * head + large)])
    if not on_host(zero.offload_optimizer):
        # A sub-group ends with the parameter that fills it. It takes an fp32 gradient, and AdamW's temporaries: one on
        # a GPU (foreach), two on a CPU.
        group = min(trained, zero.sub_group_size + shape.head_parameters / ranks)
        moments.append([Term("optimizer step", group * (8 if on_gpu else 12))])
    return moments


def worst(moments: list[list[Term]]) -> list[Term]:
    """The moment that takes most."""
    return max(moments, key=total)


def total(terms: list[Term]) -> float:
    """Bytes of a budget."""
    return sum(term.bytes for term in terms)


def _chunk_bytes(shape: Shape, rows: int, b: int, on_gpu: bool) -> float:
    """Logits of a chunk of rows and their gradient, and on a CPU the fp32 copies that its functions work on."""
    size = chunk_bytes(rows, shape.hidden, shape.vocabulary, b, H100_PROCESSORS if on_gpu else 0)
    if on_gpu:
        return size
    widened = CPU_LOGITS_BYTES if b < 4 else 0  # products of 16-bit factors are made of fp32 copies of a part
    return size + max(widened, 2 * min(size, CPU_LOGITS_BYTES))


def sync_peak(config: Config, shape: Shape) -> list[Term]:
    """What a weight sync adds: one gathered group, and the bucket of full tensors on its way to vLLM."""
    b = weight_bytes(config)
    terms = [
        Term("gathered group", b * shape.largest_group, "a decoder layer or the embedding"),
        Term("bucket of tensors", BUCKET_BYTES + b * shape.head_parameters, "full tensors, copied"),
    ]
    if config.policy.lora.rank:
        merged = max(wide * high for wide, high in lora_linears(config, shape))
        terms.append(Term("a merged weight", (8 if b < 4 else 4) * merged, "in fp32, and rounded"))
    return terms
