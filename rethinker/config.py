"""Every setting of a run, once.

A recipe is a YAML file with these sections; a dotted option overrides one value:
`rethinker train sums_cpu --train.max_steps 20`. `--print_config` prints the resolved settings with these docs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rethinker import ranges


class ConfigError(ValueError):
    """A mistake in the settings or the data they name; its message says which setting to change and to what.

    A message quotes what was given; of a megabyte that was, the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= 2000 else f"{text[:1200]} [...] {text[-600:]}"


def one_line(error: BaseException, longest: int = 300) -> str:
    """What a library's error says, as one line of at most `longest` characters: part of a ConfigError's message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:longest]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistaken one is probably meant to be: what a message's "did you mean" names."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


FormatName = Literal["verl", "trl", "swift", "r1v", "auto"]


@dataclass
class RunConfig:
    """Where a run lives and who watches it."""

    dir: ranges.Folder = "runs"
    """Folder that holds the run folders."""
    name: ranges.FolderName | None = None
    """Name of the run's folder; by default the recipe's name and the time."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where metrics go besides metrics.jsonl."""
    save_completions: bool = True
    """Write every episode's completions to completions/*.parquet, and greedy answers to the first 32 held-out
    questions to validation/*.parquet."""
    stall_s: ranges.Seconds = 600.0
    """After so long without progress every rank writes its threads' stacks to logs/rank_*.log; nothing is ended."""


@dataclass
class DataConfig:
    """The questions: which data set, which columns, which prompt."""

    train: ranges.PathOrName = "easy_vqa"
    """`sums`, `boards`, `easy_vqa` or `digits` (embedded), a Hugging Face data set name or folder, or a .parquet,
    .jsonl or .json file; `sources` mixes those of data.sources."""
    sources: dict[str, dict] = field(default_factory=dict)
    """Data sets to mix: `{geometry: {train: a.parquet, weight: 2}, charts: {train: b.jsonl, weight: 1}}`. Weights are
    shares of the questions drawn, given for all or for none (then by size). An entry may have its own train_split,
    format, fields, image_root, pass_rate, max_bad_rows and category_weights."""
    streaming: bool = False
    """Read a row of data.train when it is drawn, for a data set that does not fit in memory: `datasets` keeps an
    uncompressed copy in its cache on disk. Needs train.max_steps, and no data.category_weights."""
    train_split: str = "train"
    """Split of a Hugging Face data set to train on."""
    validation: ranges.PathOrName | None = None
    """Held-out questions, named as `train` is; `split` holds out a part of data.train; null: no validation."""
    validation_share: ranges.Fraction = 0.02
    """With data.validation=split: share of the images held out, with all questions about them. The hash of an image (or
    of a question without one) decides, not the order, the seed, or rows added later."""
    pass_rate: str | None = None
    """Column of a model's pass rates: train only on questions with 0 < pass rate < 1. -1 is not measured: left out."""
    validation_split: str = "test"
    """Split of a Hugging Face data set to validate on."""
    format: FormatName | None = None
    """Whose columns the data has: `verl`, `trl`, `swift` (ms-swift), `r1v` (R1-V, EasyR1, LLaVA), or `auto` to tell by
    their names, plain `question` and `answer` too. Any of them also takes answers out of <answer></answer> and from
    behind GSM8K's `####`, and options from columns A, B, C. null: the columns of data.fields, and texts as they are."""
    fields: dict[str, str] = field(
        default_factory=lambda: {"question": "question", "answer": "answer", "images": "images", "id": "id"}
    )
    """Which column holds the question, the answer, the images (a path, a list, or bytes) and the id, or which entry of
    a column, as `reward_model.ground_truth`. With data.format those that differ from these go before the format's."""
    max_bad_rows: ranges.Share = 0.01
    """Share of the rows that may be unusable (no question, odd answer, broken image): they are left out and counted.
    Beyond it, and at any such row of a data set too small for a share, the run stops."""
    image_root: ranges.PathOrName | None = None
    """Folder that relative image paths start from; by default the data file's own. It may be a .zip or .tar, and paths
    may lead through one (`images.zip/a/1.png`). A path may lead anywhere, but is read only as a regular file, and only
    as an image (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF; of an animation the first frame). Nothing is downloaded."""
    prompt: str = "{question}\nPut your final answer within \\boxed{}."
    """Prompt template; `{question}` stands for the question."""
    system: str | None = None
    """System message, if any."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the model's chat template lets one choose, as `{enable_thinking: false}` for Qwen3.5."""
    max_prompt_tokens: ranges.Count = 2048
    """Queries with longer prompts are left out, whole, and counted."""
    min_pixels: ranges.Count = 256 * 28 * 28
    """Smaller images are enlarged to this many pixels (InternVL: rounded down to whole tiles; no such limit: Gemma 3
    and 4, LLaVA-OneVision, Mistral 3, SmolVLM)."""
    max_pixels: ranges.Count = 1280 * 28 * 28
    """Larger images are reduced to this many pixels (InternVL, LLaVA-OneVision, SmolVLM: rounded down to whole tiles;
    Mistral 3: to a square's side; Gemma 3: all images have one size; Gemma 4: all, smaller ones too, to one of five
    sizes)."""
    max_images: ranges.Natural = 8
    """Queries with more images are left out and counted."""
    max_image_pixels: ranges.ImagePixels = 89_000_000
    """An image with more pixels (width x height in its header) is not decoded: a few bytes can claim gigabytes."""
    category_weights: dict[str, ranges.NotNegative] = field(default_factory=dict)
    """Share of each `metadata["category"]` in the order of training; by default as the data has them. A category
    without one is neither trained on nor validated on."""
    draw: Literal["uniform", "variance", "difficulty"] = "uniform"
    """Which queries come: each once in every pass (`uniform`), or more often those whose latest responses had rewards
    of a large `variance`, or a low mean (`difficulty`); see docs/data.md. Not with data.streaming."""
    draw_uniform: ranges.Share = 0.5
    """With another data.draw: share of the queries that still come in the order of `uniform`."""


@dataclass
class WarmupConfig:
    """The short supervised stage that gives the embedded tiny model its first words. Only for `policy.model: tiny`."""

    look_steps: ranges.Natural = 200
    """Optimizer steps in which the vision tower alone learns to name what an image shows."""
    steps: ranges.Natural = 90
    """Optimizer steps in which the language model learns to answer, and a vision tower that could not learn to look."""
    batch_size: ranges.Count = 64
    """Question-answer pairs per step."""
    learning_rate: ranges.Positive = 2e-3
    """Peak learning rate of both stages."""
    data_fraction: ranges.PositiveShare = 0.25
    """Share of the training images that the warm-up may see."""
    category_weights: dict[str, ranges.NotNegative] = field(default_factory=dict)
    """Share of each category in what it learns to answer; by default data.category_weights."""
    seed: ranges.Seed = 0
    """Seed of the tiny model's weights and of the warm-up's data order."""


@dataclass
class LoraConfig:
    """Low-rank adapters: train W + (alpha / rank) B A with W frozen, for linear layers of the language model's decoder
    layers. Everything else, the vision tower too, stays as it was. Rollouts and checkpoints get the merged weights."""

    rank: ranges.Natural | None = None
    """Columns of B and rows of A; null or 0: off, all weights are trained."""
    alpha: ranges.Positive = 32.0
    """The product is multiplied by alpha / rank."""
    target_modules: list[str] = field(default_factory=list)
    """Linear layers of a decoder layer that get adapters, by the end of their names, as [q_proj, mlp.up_proj]; by
    default all of them."""


@dataclass
class PolicyConfig:
    """The model that is trained."""

    model: ranges.PathOrName = "tiny"
    """`tiny` (built and warmed up here), or a Hugging Face model name or folder: Qwen2-VL, Qwen2.5-VL, Qwen3-VL or
    InternVL3 in transformers' format."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the forward pass; the optimizer keeps fp32 masters."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Kernel of the language model's attention: flash attention (exact, without a mask) or SDPA, which computes masked
    pairs, too; auto takes flash, but sdpa for float32 on CUDA, where flash takes 16 bits alone."""
    freeze_vision: bool = False
    """Train the language model only; with policy.lora always so."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    compile: bool = False
    """torch.compile of the decoder layers: less memory for activations, after a first step that compiles. ZeRO-3 then
    gathers a whole layer's weights at a time, however large the layer is."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    backend: Literal["vllm", "server", "hf", "recorded"] = "vllm"
    """`vllm` in the trainer's own processes; `server`: the vLLM servers of `rethinker serve`; `hf` (transformers'
    generate); or `recorded`: read them from another run's completions."""
    servers: list[ranges.Address] = field(default_factory=list)
    """Addresses of the `server` backend's servers, as `[http://127.0.0.1:8100]`; prompts are spread over them, and one
    that is lost is left out and reported."""
    weight_folder: ranges.PathOrName | None = None
    """Folder through which servers without NCCL (on CPU) get weights: one that trainer and servers both see. By default
    a temporary one, for servers on this machine."""
    recording: ranges.PathOrName | None = None
    """Folder `runs/<name>/completions` that the `recorded` backend reads."""
    group_size: ranges.Count = 8
    """Responses per query (G)."""
    max_new_tokens: ranges.Count = 2048
    """Longest response, in tokens."""
    temperature: ranges.Positive = 1.0
    """Sampling temperature; log-probs are of the tempered distribution, sampled whole: no top-k, no top-p."""
    gpu_memory_utilization: ranges.Fraction = 0.4
    """Share of the GPU that vLLM may hold beside the trainer."""
    kv_cache_gb: ranges.Positive = 1.0
    """Size of vLLM's key-value cache on CPU, GiB."""
    tensor_parallel_size: ranges.Count = 1
    """GPUs per vLLM engine."""
    sleep: bool = True
    """Free vLLM's GPU memory while the policy trains (CUDA only)."""
    check_sync: bool = False
    """After every weight sync compare a checksum of every tensor on both sides (vllm and server)."""
    router_replay: bool = False
    """Of a mixture of experts: train with the experts that vLLM took for each token, whatever the trainer's rounding
    would choose; their weights are the trainer's own. Only `vllm`, with its model runner V2."""
    max_staleness: ranges.ZeroOrOne = 0
    """Episodes by which rollouts may lag behind the policy: 0, or 1 to sample the next episode while this one trains
    (`server` only, with algorithm.rollout_correction). mismatch_kl then holds what an episode's steps changed, too."""
    max_mismatch_kl: ranges.PositiveOrAuto | None = "auto"
    """The run stops when mismatch_kl (k3 in nats per token between rollout and trainer, first step after a sync)
    exceeds this, and warns from a tenth of it: rounding stays below, images that are read differently and large moves
    that did not arrive do not. auto: 1e-3 in float32, 1e-2 in bfloat16, 0.1 with max_staleness=1. null: never."""
    timeout_s: ranges.Seconds = 1800.0
    """Deadline of one rollout or one weight sync; after it the run stops and says what hung."""

    def mismatch_ceiling(self, dtype: str) -> float | None:
        """What max_mismatch_kl comes to with `policy.dtype`; None: no ceiling."""
        if self.max_mismatch_kl != "auto":
            return self.max_mismatch_kl
        return 0.1 if self.max_staleness else {"float32": 1e-3, "bfloat16": 1e-2}[dtype]


@dataclass
class EnvironmentConfig:
    """What answers the policy within a response: tools, or an environment of yours (docs/environments.md)."""

    use: list[ranges.PathOrName] = field(default_factory=list)
    """`[crop, python]`: tools, which the policy may call in any turn; `[verify]`; or `[path/to/file.py:Name]`, a class
    with reset and step or a function. Empty: a response is one turn."""
    max_turns: ranges.Count = 4
    """Most turns of the policy in a response. rollout.max_new_tokens is for all of them, and for what they are
    answered."""
    max_calls: ranges.Count = 4
    """Most tool calls of a turn; further ones are refused."""
    max_images: ranges.Natural = 4
    """Most images that a response is shown, besides the question's."""
    max_text_tokens: ranges.Count = 512
    """About the longest text of an answer; a longer one loses its middle."""
    boxes: Literal["pixels", "thousandths"] = "pixels"
    """What the coordinates of a box count: pixels of the image as the model sees it (Qwen2.5-VL), or thousandths of its
    width and height (Qwen2-VL, Qwen3-VL)."""
    describe: bool = True
    """Tell the model of its tools, through its chat template where that knows of tools, else in the system message."""
    reward_weight: ranges.NotNegative = 0.0
    """Weight, in a response's reward, of the sum of what the environment gave its turns."""
    workers: ranges.Processes = 4
    """Processes of each rank in which `python` and environments of yours run."""
    timeout_s: ranges.Seconds = 10.0
    """Deadline of an answer; after it its process is killed."""
    memory_gb: ranges.Positive = 2.0
    """Most memory, GiB, that such a process may take."""


@dataclass
class RethinkConfig:
    """Forced Rethinking: after a first answer a trigger lets the model go on. The second stage's settings."""

    fraction: ranges.Share = 0.0
    """Share of the eligible responses that are forced to rethink; 0 is off."""
    first_answers: Literal["all", "wrong"] = "all"
    """Which first answers are eligible: all, as in the paper, or wrong ones, where a second can only help."""
    preset: Literal["paper", "released_code"] = "paper"
    """Rules of the paper, or of its released code (cut-back first answers, bounds on length and waits, its reward)."""
    triggers: dict[str, str] = field(
        default_factory=lambda: {
            "self_questioning": "\n\nWait, does it seem right?",
            "self_correction": "\n\nWait, there might be a mistake",
            "self_verification": "\n\nWait, let's double check",
        }
    )
    """Name and text of each trigger; one is drawn at random for every forced response."""
    temperature: ranges.Positive | None = None
    """Of the second pass; by default rollout.temperature (paper) or 0.9 (released_code)."""
    max_kept: ranges.Count = 2
    """Most rethought responses that a query keeps; only right ones are."""
    mask_trigger_tokens: bool = True
    """Forced tokens were not sampled: leave them out of the policy gradient."""
    mask_first_answer: bool = False
    """Leave the first answer of a kept response out of it, too."""
    supervised_weight: ranges.NotNegative = 0.05
    """Weight of the mean -log p over the tokens of kept responses, added to the loss."""

    def second_temperature(self, first: float) -> float:
        """The temperature of the second pass, where that of the first is `first`."""
        default = 0.9 if self.preset == "released_code" else first
        return default if self.temperature is None else self.temperature


@dataclass
class RewardConfig:
    """How a response is judged."""

    function: ranges.PathOrName = "boxed"
    """`boxed` (last \\boxed{} against the answer), or `path/to/file.py:function` taking (response, answer, query)."""
    functions: list[dict] = field(default_factory=list)
    """Several functions in its place, whose weighted values add up to the reward: `[{function: boxed, weight: 0.9},
    {function: format, weight: 0.1}]`. Beside these an entry may have name, timeout_s, concurrency, on_failure (zero or
    stop) and arguments of its function (docs/rewards.md). The first one says which answers are right."""
    workers: ranges.Processes = 2
    """Answer-checking processes."""
    timeout_s: ranges.Seconds = 10.0
    """Deadline of one check; a check that exceeds it is killed, scores 0 and is counted."""
    memory_gb: ranges.Positive = 4.0
    """Most memory, GiB, that the checks of one process may take; a check that wants more scores 0 and is counted."""
    rounding: ranges.Share = 1e-4
    """`boxed`: a decimal equals the fraction or root that it is the rounding of, if their relative distance is smaller.
    A question that asks to round accepts any number of digits; two decimals, or whole numbers, are equal or not."""
    percent: bool = True
    """`boxed`: 60% equals 0.6."""
    degrees: bool = True
    """`boxed`: 30 degrees equal pi/6."""


@dataclass
class AlgorithmConfig:
    """The learning rule: GRPO, or VL-Rethinker's SSR."""

    name: Literal["grpo", "filter", "ssr"] = "ssr"
    """`grpo` keeps all samples in its mean, `filter` drops those without advantage, `ssr` fills up from replay."""
    advantage_baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What a reward is compared with: the mean of its group, of the others in its group (RLOO), or of all responses of
    the episode (REINFORCE++: responses of equal reward to a query then have an advantage, too)."""
    refill_rounds: ranges.Natural = 0
    """DAPO's dynamic sampling: drop an episode's queries whose responses all have one reward and sample others in their
    place, in at most so many further rounds; what is missing then is filled up with dropped ones. 0 is off."""
    advantage_scale: Literal["std", "none", "batch"] = "std"
    """Divide centred rewards by the group's standard deviation (with advantage_baseline=batch the episode's), by
    nothing, or by their own over all responses of the episode."""
    advantages_per_reward: bool = False
    """Several reward functions: an advantage by each one's values alone, then their weighted sum over its standard
    deviation over the episode (GDPO); false: one by the weighted sum of the values."""
    loss: ranges.PathOrName = "grpo"
    """The loss of a token: `grpo`, `cispo`, `sapo`, `gmpo`, or yours as `path/to/file.py:function` (docs/losses.md)."""
    clip_low: ranges.Fraction = 0.2
    """The ratio is clipped below 1 - clip_low; `gmpo`: its logarithm below -clip_low."""
    clip_high: ranges.Positive = 0.2
    """The ratio is clipped above 1 + clip_high; `gmpo`: its logarithm above clip_high."""
    dual_clip: ranges.AboveOne | None = None
    """Bound c > 1 on the surrogate of negative advantages (dual-clip PPO)."""
    tau_positive: ranges.Positive = 1.0
    """`sapo`: how fast a token's gradient fades as its ratio leaves 1, where the advantage is positive."""
    tau_negative: ranges.Positive = 1.05
    """`sapo`: the same where it is negative."""
    kl_coef: ranges.NotNegative = 0.0
    """Weight of the KL to the reference policy, the model where training started, in any loss; 0 loads none, and
    policy.lora needs none: its frozen weights are the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    reference_every: ranges.Count | None = None
    """After every so many episodes the policy becomes the reference policy of the KL; null keeps the first one."""
    entropy_coef: ranges.NotNegative = 0.0
    """Weight of the entropy bonus: the loss of a token less entropy_coef times the policy's entropy there, in nats."""
    importance: Literal["token", "sequence"] = "token"
    """Ratio per token (GRPO) or per sequence (GSPO)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens, mean of per-sequence means, or sum over a constant length (Dr. GRPO)."""
    rollout_correction: ranges.RolloutCorrection | None = None
    """What a token is weighted by for the mismatch of rollout engine and trainer (docs/losses.md): the ratio of their
    probabilities, of the token or of its whole response, cut to the bounds (truncate) or 0 outside of them (mask);
    geometric_mask: 1, or 0 where the response's mean ratio is outside. It costs a forward of every episode."""
    correction_low: ranges.BelowOne | None = None
    """Lower bound of that ratio; null: none for truncation, 1 / correction_high for masks; 0: none."""
    correction_high: ranges.AboveOne | None = None
    """Upper bound of that ratio; null: 2.0, for geometric_mask, whose ratio is near 1, 1.01."""
    top_entropy: ranges.PositiveShare | None = None
    """Share of an episode's tokens, those with the highest entropy, that carries the policy gradient (0.2 in the paper,
    docs/losses.md); null: all. It costs the same forward."""
    max_advantage: ranges.Positive | None = None
    """`filter` and `ssr`: also drop samples whose |advantage| is this or more, before replay (the upper threshold of
    PAD)."""


@dataclass
class ReplayConfig:
    """Selective Sample Replay."""

    priority: Literal["advantage", "correctness"] = "advantage"
    """Draw by advantages, or by the share of a query's responses that are right (ExGRPO; docs/how_it_works.md)."""
    alpha: ranges.NotNegative = 1.0
    """Draw with probability proportional to |advantage|^alpha; 0 is uniform."""
    age_decay: ranges.Positive | None = None
    """Also in proportion to exp(-age / age_decay), age in training steps since the sample was added (FreshPER)."""
    unit: Literal["sample", "group"] = "sample"
    """Draw single samples, or all effective samples of a query at once, with the sum of their |advantage|."""
    capacity: ranges.Capacity = 65536
    """Most samples kept; the oldest leave first."""
    clear_every_episode: bool = True
    """Empty the buffer when an episode ends."""
    max_age: ranges.Natural | None = None
    """If kept across episodes: drop samples older than this many policy versions."""
    replacement: bool = True
    """Whether one draw may return a sample twice."""
    importance_exponent: ranges.NotNegative = 0.0
    """Weight draws by (1 / (n P(j)))^exponent, as prioritised experience replay does; 0 is off. Try 1 (or
    replay.unit=group) where most responses are right: plain draws then have a mean advantage below 0."""
    importance_exponent_end: ranges.NotNegative | None = None
    """Where importance_exponent gets to, linearly over the run (0.4 to 1 in prioritised replay); null: it stays."""


@dataclass
class TrainConfig:
    """The optimizer and the geometry of a step."""

    max_steps: ranges.Count | None = None
    """Stop after this many optimizer steps; by default `epochs` decides."""
    max_generated_tokens: ranges.Count | None = None
    """Also stop after the episode in which the responses sampled so far reach this many tokens: equal budgets compare
    methods that sample more and less per step. After its warm-up the learning rate follows whichever limit is nearer,
    by the tokens that were sampled before the episode."""
    epochs: ranges.Positive = 3.0
    """Passes over the training queries."""
    episode_queries: ranges.Count = 1024
    """Queries rolled out between two weight syncs."""
    batch_pairs: ranges.Count = 512
    """Query-response pairs per optimizer step (N)."""
    micro_batch_tokens: ranges.Count = 16384
    """Most tokens per forward pass and rank, shared prompts counted once."""
    learning_rate: ranges.Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after its warm-up."""
    warmup_ratio: ranges.Share = 0.03
    """Share of the steps over which the learning rate rises."""
    min_lr_ratio: ranges.Share = 0.0
    """Where the schedule ends, as a share of the peak."""
    betas: tuple[ranges.Beta, ranges.Beta] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: ranges.NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: ranges.Positive = 1.0
    """Clip the global gradient norm here."""
    mask_truncated: bool = False
    """Do not train on responses that rollout.max_new_tokens ended (DAPO's overlong filtering): they count in their
    group's statistics, but neither in the loss nor in replay."""
    deepspeed: dict = field(default_factory=dict)
    """Entries merged over the ZeRO-3 configuration this project writes."""


@dataclass
class ValidationConfig:
    """Greedy pass@1 on held-out questions."""

    every: ranges.Count = 1
    """Validate after every this many episodes, and always before the first and after the last step."""
    size: ranges.Count = 512
    """How many held-out questions (the first ones of a seeded shuffle)."""


@dataclass
class CheckpointConfig:
    """What a killed run is resumed from; each is also a model folder that vLLM and transformers load as it is."""

    every: ranges.Count | None = 20
    """Save every this many steps, and always at the end and when the run is asked to stop; null: only then."""
    keep: ranges.Count = 2
    """How many of the newest are kept; `best` is kept besides."""
    keep_every: ranges.Count | None = None
    """Also keep those whose step is a multiple of this."""


@dataclass
class ProfileConfig:
    """Looking inside a step."""

    steps: ranges.Steps | None = None
    """`3:5` writes a torch profiler trace of steps 3 and 4."""


@dataclass
class Config:
    """All settings of a run."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}

    seed: ranges.Seed = 0
    """Seed of data order, sampling and replay."""
    resume: str | None = None
    """`auto` continues the run `run.name` from its newest whole checkpoint, or starts it if it has none; the name of
    one of its checkpoints (`step_000040`) goes back to that."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    rethink: RethinkConfig = field(default_factory=RethinkConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
