"""Which tokens see which: the shared-prompt rule, laid out for the attention kernel at hand.

Token i attends to token j iff j <= i, both belong to the same prompt, and j is in the prompt or in i's own response.
Legend: T tokens of the packed row; B rows of L tokens as the kernel sees them; N sequences, H heads of size E.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rethinker.config import ConfigError, PolicyConfig
from rethinker.families import ATTENTION, Family
from rethinker.policy.recurrent import Sequences, runs_of, sequences_of
from rethinker.policy.segment_attention import Segments, SharedKeys, Visible, attend
from rethinker.samples import PackedBatch

# transformers' names for `row_attention` and `vision_attention`. It makes no mask for functions it does not know, and
# hands a vision tower's whole row over, with the bounds of its images or windows, if "flash" is in the name; else it
# calls the function for each of them in a Python loop, and asks the device for the bounds in every layer.
ROW = "rethinker_row"
VISION = "rethinker_flash_vision"
VISION_SDPA = "rethinker_sdpa_vision"  # `vision_by_image`


@dataclass(frozen=True)
class LayerTypes:
    """What the layers of a model need to know of a row besides the shared-prompt rule."""

    window: int | None = None  # tokens that "sliding_attention" sees, its own among them
    blocks: tuple[str, ...] = ()  # types of layers in which the tokens of an image see each other both ways
    recurrent: tuple[str, ...] = ()  # types of layers that read tokens in their order
    tail: int = 0  # earlier inputs that these layers' convolutions see

    @classmethod
    def of(cls, family: Family, text_config: Any) -> LayerTypes:
        """Those of a model."""
        types = set(getattr(text_config, "layer_types", None) or ())
        window = text_config.sliding_window if "sliding_attention" in types else None
        recurrent, blocks = sorted(types - set(ATTENTION)), family.image_blocks(text_config)
        return cls(window, blocks, tuple(recurrent), family.tail(text_config) if recurrent else 0)

    @property
    def masked(self) -> bool:
        """Whether only a mask tells what a token sees."""
        return bool(self.blocks) or self.window is not None


PLAIN = LayerTypes()


def kernel_for(config: PolicyConfig, on_gpu: bool, layers: LayerTypes) -> str:
    """The kernel that policy.attention chooses: "sdpa" or "flash".

    Raises:
        ConfigError: flash attention of a type that its kernels do not take.
    """
    wide_on_gpu = on_gpu and config.dtype == "float32"
    if config.attention == "auto":
        return "sdpa" if wide_on_gpu or layers.masked else "flash"
    if config.attention == "flash" and layers.masked:
        raise ConfigError(
            "policy.attention=flash does not know this model's sliding windows and images whose tokens see each other; "
            "set policy.attention to sdpa"
        )
    if config.attention == "flash" and wide_on_gpu:
        raise ConfigError(
            f"policy.attention=flash needs policy.dtype=bfloat16 on CUDA, not {config.dtype}; set that, or "
            "policy.attention to sdpa"
        )
    return config.attention


@dataclass
class Layout:
    """The packed row arranged for the attention kernel.

    `index[b, l]` is the row position whose token is at (b, l); padding repeats position 0 and attends to itself only.
    `position[t]` is where row token t went, in the flattened [B * L].
    Without an index the row stays as it is: nothing is copied.

    `mask` is for SDPA; flash attention has `visible` instead. Where a model has layers of several types, it is what
    those of each are given.
    """

    tokens: int  # B * L
    index: torch.Tensor | None = None  # [B, L] int64
    position: torch.Tensor | None = None  # [T] int64
    mask: torch.Tensor | dict[str, torch.Tensor | Sequences | None] | None = None  # [B, 1, L, L] bool
    visible: Visible | None = None
    depth: torch.Tensor | None = None  # [B, L]: tokens before each one in its own sequence; with sliding windows


def lay_out(batch: PackedBatch, kernel: str, layers: LayerTypes = PLAIN, padded: bool = True) -> Layout:
    """Arrange a packed batch for `kernel`, once for all layers: "flash" keeps the row as it is, "sdpa" gets several
    rows as wide as the longest prompt with its responses, each filled with prompts.

    SDPA computes every masked pair too: one row of T tokens costs T^2 of them, rows of width L only T L.

    Args:
        layers: of the model.
        padded: see `sequences_of`.
    """
    layout = Layout(batch.tokens, visible=_shared(batch)) if kernel == "flash" else _in_rows(batch, layers.window)
    if layers.recurrent:
        sequences = sequences_of(batch, layers.tail, padded=padded)
        sequences = replace(sequences, index=layout.index, position=layout.position)
        full = layout.mask if isinstance(layout.mask, dict) else {"full_attention": layout.mask}
        layout.mask = full | dict.fromkeys(layers.recurrent, sequences)
    return layout


def join_images(layout: Layout, image: torch.Tensor, layers: LayerTypes) -> None:
    """Let the tokens of an image, one run of them, see each other both ways: in the masks, in place.

    Args:
        layout: of the kernel "sdpa", on the device.
        image: [T] bool there: an image's token in a prompt.
        layers: of the model.
    """
    begins = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    block = image.new_zeros(layout.tokens, dtype=torch.int64)
    block[layout.position] = torch.where(image, begins.cumsum(0), 0)
    block = block.view(layout.index.shape)
    same = (block[:, None, :] == block[:, :, None]) & (block[:, None, :] > 0)
    masks = layout.mask if isinstance(layout.mask, dict) else {"full_attention": layout.mask}
    for kind in masks.keys() & set(layers.blocks):
        near = kind != "sliding_attention" or _near(layout.depth, layers.window)
        masks[kind] |= (same & near)[:, None]


def _in_rows(batch: PackedBatch, window: int | None) -> Layout:
    lengths = torch.bincount(batch.prompt_id)
    row, start = (torch.tensor(part) for part in _fill_rows(lengths.tolist()))  # [prompts]
    rows, width = int(row.max()) + 1, int((start + lengths).max())
    # Where each token goes: its prompt's row, and there its prompt's start and its own place in the prompt.
    place = torch.arange(batch.tokens) - (torch.cumsum(lengths, 0) - lengths)[batch.prompt_id]
    position = (row * width + start)[batch.prompt_id] + place  # [T]
    index = torch.zeros(rows * width, dtype=torch.int64)
    index[position] = torch.arange(batch.tokens)
    prompt = (-1 - torch.arange(width)).repeat(rows)  # padding: a prompt of its own
    prompt[position] = batch.prompt_id
    index, prompt = index.view(rows, width), prompt.view(rows, width)
    response = batch.response_id[index]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    shared = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    mask = (causal & same_prompt & shared)[:, None]
    if window is None:
        return Layout(rows * width, index, position, mask)
    depth = _depths(batch)[index]
    masks = {"full_attention": mask, "sliding_attention": mask & _near(depth, window)[:, None]}
    return Layout(rows * width, index, position, masks, depth=depth)


def _near(depth: torch.Tensor, window: int) -> torch.Tensor:
    """[B, L, L]: the second of two tokens of a sequence is at most so far behind the first."""
    return depth[:, None, :] > depth[:, :, None] - window


def _depths(batch: PackedBatch) -> torch.Tensor:
    """[T]: tokens that each one stands behind in its own sequence, prompt and response."""
    prompt, response = batch.prompt_id, batch.response_id
    within = torch.arange(batch.tokens) - torch.repeat_interleave(*runs_of(batch))
    return within + torch.where(response > 0, torch.bincount(prompt[response == 0])[prompt], 0)


def _fill_rows(lengths: list[int]) -> tuple[list[int], list[int]]:
    """The row and the start in it of pieces of these lengths, in rows as wide as the longest: the longest pieces first,
    each in the row with the most room."""
    width, rows = max(lengths), 0
    emptiest: list[tuple[int, int]] = []  # (tokens in it, row), the least first
    row, start = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if emptiest and emptiest[0][0] + lengths[i] <= width:
            filled, at = heapq.heappop(emptiest)
        else:
            filled, at, rows = 0, rows, rows + 1
        row[i], start[i] = at, filled
        heapq.heappush(emptiest, (filled + lengths[i], at))
    return row, start


def _shared(batch: PackedBatch) -> Visible:
    """Prompts and responses see themselves, causally; a prompt's responses, which follow it in the row, see it too."""
    prompt, response = batch.prompt_id, batch.response_id
    _, lengths = runs_of(batch)
    own = Segments.of(lengths, lengths)
    answered = torch.bincount(prompt[response > 0], minlength=int(prompt[-1]) + 1)  # response tokens of each prompt
    if not answered.any():
        return Visible(own, causal=True)
    asked = torch.bincount(prompt[response == 0])
    # Two segments a prompt: its own tokens, which see no shared key, and its responses.
    queries = torch.stack([asked, answered], dim=1).flatten()
    keys = torch.stack([torch.zeros_like(asked), torch.where(answered > 0, asked, 0)], dim=1).flatten()
    (at_keys,) = torch.nonzero((response == 0) & (answered[prompt] > 0), as_tuple=True)
    (at_queries,) = torch.nonzero(response, as_tuple=True)
    return Visible(own, causal=True, shared=SharedKeys(Segments.of(queries, keys), at_keys, at_queries))


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    visible: Visible | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a decoder layer over one row, as transformers calls it.

    Args:
        query: [1, H, L, E].
        key, value: [1, H or a divisor of it, L, E].
        visible: what each of the L tokens sees.

    Returns:
        [1, L, H, E], and no attention weights.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, visible, scaling)[None], None


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a vision layer, in one call: [1, H, L, E] to [1, L, H, E], within images or windows of a row.

    A tower whose images are a batch of tiles of one size (InternVL) has no such bounds: SDPA takes it as it is.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    own = Segments(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    visible = Visible(own, causal=False)
    return row_attention(module, query, key, value, None, scaling=scaling, visible=visible)


def vision_by_image(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `vision_attention`, by SDPA for each image. Without bounds, transformers has split the row itself."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    parts = zip(*(x.split(cu_seq_lens_q.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **others)[0] for part in parts], dim=1), None


ALL_ATTENTION_FUNCTIONS.register(ROW, row_attention)
ALL_ATTENTION_FUNCTIONS.register(VISION_SDPA, vision_by_image)
ALL_ATTENTION_FUNCTIONS.register(VISION, vision_attention)
