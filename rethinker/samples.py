"""The nouns of the trainer: what a question, an answer and a training example are.

Everything that moves between the parts (rollout, reward, advantage, replay, packing) is one of these plain
dataclasses. They hold references to images, never pixels, so they are cheap to keep, to pickle and to send.

Shapes: L tokens of one response, T tokens of a packed row, R response tokens of a row, S responses of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a checking process needs Query, not numpy and torch
    import numpy as np
    import torch

IMAGE_MARK = "<image>"
"""Where an image stands in a text."""


@dataclass(frozen=True)
class Query:
    """One question about zero or more images.

    `question` marks the place of each image with `<image>`; without marks the images come first.
    `images` are references: a path, or `{"bytes": ...}` / `{"path": ...}` as Hugging Face data sets store them.
    """

    id: str
    question: str
    answer: str
    images: tuple[Any, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def category(self) -> str:
        """What accuracies are told apart by: `metadata["category"]` as text, "all" without one."""
        return str(self.metadata.get("category", "all"))


@dataclass(frozen=True)
class Prompt:
    """A query as the model reads it.

    `token_ids` are what the policy's forward sees: each image stands as one placeholder id per image token.
    `compact_ids` are what the rollout engine takes: one placeholder id per image, which it expands itself.
    `images` are the decoded RGB images, in order of appearance.
    """

    query_id: str
    token_ids: list[int]
    compact_ids: list[int]
    images: list[Any]


@dataclass(frozen=True)
class Rethought:
    """Where the parts of a rethought response lie: y1 = [0, trigger_start), y2 = [trigger_end, L).

    [masked_start, masked_end) carries no policy gradient: the trigger, unless the settings say otherwise.
    """

    trigger_start: int
    trigger_end: int
    name: str
    masked_start: int
    masked_end: int


@dataclass(frozen=True)
class Observed:
    """What an environment answered to a turn: tokens [start, end) of the response, which nobody sampled.

    `place` counts the characters of the response's text that stand before it. `text` is what the model reads, without
    the chat template's own tokens, and `images` are what it sees there, as `Query.images`. `reward` is that of the turn
    before it, `calls` are the tools called in that turn, and `failures` name, a word each, why calls of it failed.
    """

    start: int
    end: int
    place: int
    text: str = ""
    images: tuple[Any, ...] = ()
    reward: float = 0.0
    calls: int = 0
    failures: tuple[str, ...] = ()


LIMITS = ("turns", "room", "end")
"""Of the reasons in `Observed.failures` those for which no call failed: a limit ended the response."""


@dataclass
class Rethinking:
    """What forced rethinking did to a group: responses forced, kept, wrong before and right after, and the reverse."""

    forced: int = 0
    kept: int = 0
    fixed: int = 0
    broken: int = 0


@dataclass
class Completion:
    """One response: L token ids, its end token included when it ended by itself.

    `logprobs[i]` is the behaviour policy's log-probability of `token_ids[i]` under the distribution that was
    sampled (nats; NaN for a token that was forced). `text` is what rewards judge: the policy's own words of all turns,
    without what an environment answered. `finish_reason` is "stop" or "length". Any sequences of numbers may be given;
    arrays are kept: 8 bytes a token.
    """

    token_ids: np.ndarray  # [L] int32
    logprobs: np.ndarray  # [L] fp32
    text: str
    finish_reason: str
    rethought: Rethought | None = None
    trainer_logprobs: np.ndarray | None = None  # [L] fp32
    """The same from the trainer's forward, where the response was scored (episode.score_again)."""
    kept: np.ndarray | None = None  # [L] bool
    """Whether a token is among those that carry the policy gradient, when algorithm.top_entropy."""
    experts: np.ndarray | None = None  # [P + L - 1, layers, k] uint8, or int16 for more than 256 experts
    """Which experts the rollout engine took for the prompt's P tokens and the response's but its last, with
    rollout.router_replay; layers without experts have any."""
    observed: tuple[Observed, ...] = ()
    """What an environment answered, in order; each but perhaps the last stands between two turns."""

    def __post_init__(self) -> None:
        import numpy as np

        self.token_ids = np.asarray(self.token_ids, np.int32)
        self.logprobs = np.asarray(self.logprobs, np.float32)
        if self.trainer_logprobs is not None:
            self.trainer_logprobs = np.asarray(self.trainer_logprobs, np.float32)
        if self.kept is not None:
            self.kept = np.asarray(self.kept, bool)

    def __eq__(self, other: object) -> bool:
        """Field by field; a NaN equals a NaN."""
        import numpy as np

        pairs = zip(vars(self).values(), vars(other).values(), strict=True) if isinstance(other, Completion) else ()
        return bool(pairs) and all(np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray)) for a, b in pairs)

    @property
    def tokens(self) -> int:
        """L."""
        return len(self.token_ids)

    @property
    def sampled(self) -> np.ndarray:
        """bool [L]: whether the policy sampled a token; nobody sampled a forced trigger or an observation."""
        forced = [(self.rethought.trigger_start, self.rethought.trigger_end)] if self.rethought else []
        return self._all_but(forced)

    @property
    def trainable(self) -> np.ndarray:
        """bool [L]: whether a token carries a policy gradient.

        A non-finite log-prob of such a token is a fault and stays in, to be noticed where the sample is computed.
        """
        masked = [(self.rethought.masked_start, self.rethought.masked_end)] if self.rethought else []
        return self._all_but(masked)

    def _all_but(self, spans: list[tuple[int, int]]) -> np.ndarray:
        import numpy as np

        mask = np.ones(self.tokens, bool)
        for start, end in (*spans, *((part.start, part.end) for part in self.observed)):
            mask[start:end] = False
        return mask

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return int(self.sampled.sum())

    @property
    def trainable_tokens(self) -> int:
        """Tokens that carry a policy gradient: all but masked ones and observations."""
        return int(self.trainable.sum())

    @property
    def images(self) -> tuple[Any, ...]:
        """References to the images that observations show, in order."""
        return tuple(image for part in self.observed for image in part.images)

    @property
    def turns(self) -> int:
        """Turns of the policy; each but perhaps the last was answered."""
        return len(self.observed) + (not self.observed or self.observed[-1].end < self.tokens)

    @property
    def calls(self) -> int:
        """Tools that it called."""
        return sum(part.calls for part in self.observed)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why calls or the environment failed, a word each."""
        return tuple(reason for part in self.observed for reason in part.failures)

    @property
    def truncated(self) -> bool:
        """Whether the longest length ended it."""
        return self.finish_reason == "length"

    @property
    def supervised(self) -> bool:
        """Whether the supervised term applies: to rethought responses, which are kept only if they are right."""
        return self.rethought is not None

    @property
    def mean_nll(self) -> float:
        """Mean -log p of the tokens that were sampled (nats per token), an estimate of their entropy; 0 without any."""
        import numpy as np

        sampled = self.logprobs[~np.isnan(self.logprobs)]
        return -float(sampled.mean(dtype=np.float64)) if sampled.size else 0.0


@dataclass(frozen=True)
class RemoteCompletion:
    """What a rank knows of a completion that another rank sampled and holds: enough to choose, plan and normalise."""

    tokens: int
    trainable_tokens: int
    supervised: bool = False


@dataclass
class Group:
    """One query and its G completions, with a reward and an advantage each once they are known.

    `number` counts the groups of a run, the same on all ranks; `owner` is the rank that holds the completions.
    """

    query: Query
    completions: list[Completion] | list[RemoteCompletion]
    policy_version: int
    prompt_tokens: int = 0  # length of the prompt's token_ids: what packing plans with
    rewards: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)  # per reward function its values, one per completion
    advantages: list[float] = field(default_factory=list)
    rethinks: list[bool] = field(default_factory=list)  # per completion: does it rethink of its own accord
    fast: list[bool] = field(default_factory=list)  # per completion: is it nothing but the answer
    nlls: list[float] = field(default_factory=list)  # per completion: `Completion.mean_nll` as it was sampled
    truncated: list[bool] = field(default_factory=list)  # per completion: did the longest length end it
    lengths: list[int] = field(default_factory=list)  # per completion: tokens that the policy sampled
    turns: list[int] = field(default_factory=list)  # per completion: turns of the policy
    calls: list[int] = field(default_factory=list)  # per completion: tools that it called
    failures: dict[str, int] = field(default_factory=dict)  # why calls or environments failed, over all completions
    rethinking: Rethinking = field(default_factory=Rethinking)
    sampled_tokens: int = 0  # by the policy for this query, discarded second passes included
    number: int = 0
    owner: int = 0

    @property
    def effective(self) -> bool:
        """Whether a response has an advantage: only then does the query carry a gradient. Before the advantages are
        known, whether the rewards differ."""
        if self.advantages:
            return any(advantage != 0 for advantage in self.advantages)
        return bool(self.rewards) and max(self.rewards) != min(self.rewards)

    @property
    def right(self) -> list[bool]:
        """Per completion whether its answer is right: at least 1 by the first reward function, whatever the others
        say."""
        return [value >= 1.0 for value in next(iter(self.scores.values()), self.rewards)]

    def samples(self) -> list[Sample]:
        """One sample per completion; rewards and advantages must be known."""
        right = self.right
        shared = {"prompt_tokens": self.prompt_tokens, "group": self.number, "owner": self.owner}
        shared["correctness"] = sum(right) / max(1, len(right))
        nlls = self.nlls or [0.0] * len(self.completions)
        known = zip(self.completions, self.advantages, self.rewards, right, nlls, strict=True)
        return [
            Sample(
                self.query, completion, advantage, self.policy_version, reward, index=i, right=good, nll=nll, **shared
            )
            for i, (completion, advantage, reward, good, nll) in enumerate(known)
        ]


@dataclass
class Sample:
    """One query-response pair with its advantage: the unit of replay and of training.

    `policy_version` counts weight syncs: the version whose log-probs `completion.logprobs` are.
    `weight` multiplies the sample's loss (1, or an importance weight of prioritised replay).
    (`group`, `index`) name the response on every rank; only `owner` holds its tokens until the sample is trained.
    `right` (see `Group.right`), `correctness` (the share of its group's responses that are right) and `nll`
    (`Completion.mean_nll` as it was sampled) are what replay.priority=correctness draws by.
    """

    query: Query
    completion: Completion | RemoteCompletion
    advantage: float
    policy_version: int
    reward: float = 0.0
    weight: float = 1.0
    prompt_tokens: int = 0
    group: int = 0
    index: int = 0
    owner: int = 0
    right: bool = False
    correctness: float = 0.0
    nll: float = 0.0

    @property
    def input_tokens(self) -> int:
        """Tokens the response adds to a row: its last one is a label only, never an input."""
        return max(0, self.completion.tokens - 1)


@dataclass(frozen=True)
class Bundle:
    """Some responses of one query: the smallest piece that micro-batches are made of."""

    query: Query
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Tokens this piece adds to a micro-batch."""
        return self.samples[0].prompt_tokens + sum(sample.input_tokens for sample in self.samples)


@dataclass
class PackedBatch:
    """One row of shared-prompt sequences: `[prompt][r1]..[rG] [next prompt]...` (see policy/packing.py).

    Response tokens are listed in sample order: entry r of the [R] tensors is one response token, S samples in all.
    """

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [3, 1, T] int64 under M-RoPE (temporal, height, width), else [1, 1, T]
    prompt_id: torch.Tensor  # [T] int64 on the host: which prompt a token belongs to
    response_id: torch.Tensor  # [T] int64 on the host: 0 in the prompt, 1.. in its responses
    given: torch.Tensor  # [T] bool on the host: of a prompt or an observation, where placeholders are images
    source_index: torch.Tensor  # [R] int64: the row position whose hidden state predicts the token
    target_ids: torch.Tensor  # [R] int64: the response tokens
    old_logps: torch.Tensor  # [R] fp32: behaviour log-probs
    advantages: torch.Tensor  # [S] fp32
    weights: torch.Tensor  # [R] fp32: the sample's times the token's (corrections.py); 0 in a row that only keeps step
    age: torch.Tensor  # [S] int64: policy versions since the response was sampled
    loss_mask: torch.Tensor  # [R] bool: False where a token counts nowhere: forced, or its sample's weight is 0
    cu_seqlens: torch.Tensor  # [S + 1] int32: response boundaries within [R]
    image_inputs: dict[str, torch.Tensor]  # pixels and kin by the model's names for them; empty without images
    nll_weights: torch.Tensor | None = None  # [R] fp32: factor of the supervised term -log p, where there is one
    experts: torch.Tensor | None = None  # [T, layers, k] int16: the experts to take, with router_replay

    @property
    def tokens(self) -> int:
        """T: tokens the model processes, shared prompts counted once."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device, without stopping the host. What layouts are made of stays on the host:
        `prompt_id`, `response_id`, `given` and the extents of images."""
        from rethinker_kernels.devices import to_device

        stay = ("prompt_id", "response_id", "given", "image_inputs")
        moved = {k: v if k in stay or v is None else to_device(v, device) for k, v in vars(self).items()}
        pixels = {k: to_device(v, device) for k, v in self.image_inputs.items() if v.is_floating_point()}
        return PackedBatch(**moved | {"image_inputs": self.image_inputs | pixels})


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers: overall, and for each `metadata["category"]` (all in 0..1)."""

    overall: float
    by_category: dict[str, float]
    questions: int
    right: str = ""
    """`1` or `0` for each question, in the order in which they were asked."""
    asked: str = ""
    """Names the questions and that order: runs with equal ones are compared question by question."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    folder: Path
    """runs/<name>: config.yaml, metrics.jsonl, completions/, checkpoints/."""
    metrics: list[dict[str, Any]]
    """One entry per optimizer step, as in metrics.jsonl."""
    best_checkpoint: Path
    """The checkpoint with the best validation accuracy (the last one without validation)."""
    accuracy_before: Accuracy | None
    accuracy_after: Accuracy | None
