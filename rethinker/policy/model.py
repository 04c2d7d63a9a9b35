"""The policy's forward: a packed batch in, the loss of its response tokens (or their log-probabilities) out.

Legend: T tokens of the packed row, R response tokens, B rows of L tokens as the attention kernel sees them, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rethinker.config import ConfigError, PolicyConfig
from rethinker.families import family_of
from rethinker.policy.attention import ROW, VISION, VISION_SDPA, LayerTypes, join_images, kernel_for, lay_out
from rethinker.policy.cpu_layers import use_cpu_layers
from rethinker.policy.experts import take_over
from rethinker.policy.segment_attention import moved
from rethinker.samples import PackedBatch, Prompt
from rethinker_kernels import linear_policy_loss, linear_selective_log_softmax
from rethinker_kernels.devices import to_device


class LossHead(nn.Linear):
    """The LM head as training needs it: hidden states and token ids in, the loss or log-probs out, never the logits.

    Being a module whose forward is the whole loss, ZeRO-3's hooks gather its weight (tied to the embedding or not) once
    for the three matrix products of a micro-batch.
    """

    @classmethod
    def around(cls, linear: nn.Linear, softcap: float | None = None) -> LossHead:
        """A head that holds `linear`'s very parameters, so tying and names stay as they were.

        Args:
            softcap: Gemma's `final_logit_softcapping`.
        """
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias = linear.weight, linear.bias
        head.softcap = softcap
        return head

    def forward(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor | None = None,
        temperature: float = 1.0,
        objective: dict[str, Any] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Loss, log-probs and statistics of the tokens `index`, as `rethinker_kernels.linear_policy_loss` returns them.

        Without `objective` the log-probs and entropies, fp32 [R] each; without `index` the logits [R, V], which a model
        with a cap caps itself.

        Args:
            hidden: [R, D].
            index: [R] int64.
            temperature: of the sampled distribution.
            objective: from `rethinker.algorithm.objective.loss_inputs`.
        """
        if index is None:
            return super().forward(hidden)
        head = {"bias": self.bias, "temperature": temperature, "softcap": self.softcap}
        if objective is None:
            return linear_selective_log_softmax(hidden, self.weight, index, **head, return_entropy=True)
        return linear_policy_loss(hidden, self.weight, index, **head, **objective)


class Policy(nn.Module):
    """A policy of any supported family that reads shared-prompt packed batches."""

    def __init__(self, model: nn.Module, config: PolicyConfig) -> None:
        """
        Args:
            model: from loading.py's `load_model`.
            config: `attention`, `freeze_vision`, `lora`, `gradient_checkpointing` and `compile` are read here.
        """
        super().__init__()
        self.family = family_of(model.config.model_type)
        text_config = model.config.get_text_config()
        self.layers = LayerTypes.of(self.family, text_config)
        self.kernel = kernel_for(config, torch.cuda.is_available(), self.layers)
        # Only flash-linear-attention's kernels read runs of tokens by their bounds.
        self.padded = not (torch.cuda.is_available() and find_spec("fla"))
        self.freeze_vision = config.freeze_vision or bool(config.lora.rank)
        cap = getattr(text_config, "final_logit_softcapping", None)
        if cap is not None and not 0 < cap < math.inf:
            raise ConfigError(f"policy.model: its final_logit_softcapping is {cap}; set a number above 0, or null")
        model.lm_head = LossHead.around(model.lm_head, cap)
        use_cpu_layers(model)
        self.family.prepare(model)
        self.routers = take_over(self.family.routers(model))
        if config.compile:
            compile_layers(self.family.language_model(model))
        text, vision = ("sdpa", VISION_SDPA) if self.kernel == "sdpa" else (ROW, VISION)
        if config.compile and text == ROW:  # it launches kernels of its own: compiled layers call it
            text = f"{ROW}_apart"
            ALL_ATTENTION_FUNCTIONS.register(text, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[ROW]))
        model.set_attn_implementation({"text_config": text, "vision_config": vision})
        if hasattr(text_model := self.family.language_model(model), "_deepstack_process"):
            text_model._deepstack_process = _add_at
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.freeze_vision:
            for module in self.family.vision_modules(model):
                module.requires_grad_(False)
        model.config.use_cache = False
        self.hf = model
        self.image_token_id = model.config.image_token_id

    def train(self, mode: bool = True) -> Policy:
        """As in nn.Module; but with policy.gradient_checkpointing the layers recompute in eval mode too.

        transformers checkpoints only layers that are in training mode, and the policy trains in eval mode, without
        dropout. The flag is the layer's alone: what is inside it, dropout included, keeps the mode.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True
        return self

    def positions(self, prompt: Prompt, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions of a prompt's tokens, [3, P] under M-RoPE, else [1, P]."""
        return self.family.positions(self.hf, torch.tensor([prompt.token_ids]), image_inputs)

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, objective: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Loss, log-probs [R] and statistics of the batch's response tokens; see `LossHead.forward`.

        Without `objective` log-probs [R] and the entropies [R] of their distributions, fp32 nats.
        """
        device = batch.input_ids.device
        image = self._is_image(batch)
        embeds, spots, deep = self._embed(batch, image)  # [T, D]
        if torch.is_grad_enabled() and not embeds.requires_grad:  # a frozen embedding, under adapters
            # ZeRO-3 takes a whole layer's gradients away in a hook that comes before them if no input has one.
            embeds.requires_grad_()
        layout = moved(lay_out(batch, self.kernel, self.layers, self.padded), device)
        if self.layers.blocks:
            join_images(layout, image, self.layers)
        positions, sources = batch.position_ids[:, 0], batch.source_index
        inputs = self.family.token_inputs(self.hf, batch.input_ids[0], image)
        inputs = {name: part[None] if layout.index is None else part[layout.index] for name, part in inputs.items()}
        if layout.visible:
            inputs["visible"] = layout.visible
        if layout.index is None:
            embeds, positions, experts = embeds[None], positions[:, None], batch.experts
        else:
            embeds, positions = embeds[layout.index], positions[:, layout.index]
            sources = layout.position[sources]
            spots = layout.position[spots] if deep else None
            experts = None if batch.experts is None else batch.experts[layout.index.flatten()]
        if deep:
            inputs |= {"visual_pos_masks": spots, "deepstack_visual_embeds": deep}
        # They stay until the next forward: a layer that is recomputed in the backward needs them again.
        for number, router in self.routers.items():
            router.real, router.chosen = layout.position, None if experts is None else experts[:, number]
        hidden = self.family.language_model(self.hf)(
            inputs_embeds=embeds,  # [B, L, D]
            position_ids=positions.squeeze(0),  # [3, B, L], or [B, L] without M-RoPE
            attention_mask=layout.mask,
            use_cache=False,
            **inputs,
        ).last_hidden_state
        # Only response tokens reach the head: [R, D].
        rows = hidden.flatten(0, 1)[sources]
        return self.hf.lm_head(rows, batch.target_ids, temperature, objective)

    def _embed(
        self, batch: PackedBatch, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Token embeddings [T, D] with each image's features in place of its placeholders, at `image` [T]; where those
        are, [N]; and the features that decoder layers add there, [N, D] each."""
        ids = batch.input_ids[0]
        embeds = self.hf.model.get_input_embeddings()(ids)
        if not batch.image_inputs:
            # ZeRO-3 gathers the vision tower by collectives, so a rank without images must run it too: on one blank
            # image of weight 0.
            blank = self.family.blank(self.hf)
            pixels = {name: to_device(part, ids.device) for name, part in blank.items() if part.is_floating_point()}
            seen = self._see(blank | pixels)
            return embeds + 0.0 * sum(part.sum() for part in seen).to(embeds.dtype), None, []
        features, *deep = self._see(batch.image_inputs)
        # That they are as many as the features is known: to count them would stop the host until the device is there.
        torch._assert_async(image.sum() == len(features))
        spots = torch.nonzero_static(image, size=len(features))[:, 0]
        return embeds.index_copy(0, spots, features.to(embeds.dtype)), spots, deep

    def _is_image(self, batch: PackedBatch) -> torch.Tensor:
        """[T] bool. Placeholders that the policy sampled are no images."""
        ids = batch.input_ids[0]
        return (ids == self.image_token_id) & to_device(batch.given, ids.device)

    def _see(self, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Image features [N, D], and those for the decoder layers."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            return self.family.features(self.hf, image_inputs)


def gather_by_layer(model: nn.Module, largest: float) -> None:
    """Let ZeRO-3 gather the weights of a decoder or vision layer at once, before DeepSpeed has the model.

    Its hooks around every linear layer and norm would take a small model a fifth of its step, and cut compiled layers.

    Args:
        model: of transformers.
        largest: elements of the largest layer for which it does so. Such a layer waits for all of its weights, which
            have been fetched by then if ZeRO-3's prefetch bucket holds them.
    """
    from deepspeed.utils import set_z3_leaf_modules  # takes seconds to import

    sizes: dict[type[nn.Module], int] = {}
    for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        size = sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters())  # of partitioned weights, too
        sizes[type(layer)] = max(size, sizes.get(type(layer), 0))
    if kinds := [kind for kind, size in sizes.items() if size <= largest]:
        set_z3_leaf_modules(model, kinds)


def compile_layers(language_model: nn.Module, backend: str = "inductor") -> None:
    """Compile the forwards of its decoder layers in place (policy.compile), before DeepSpeed has it.

    There is one graph for batches laid out in one row and one for several, each with and without gradients: four at
    most, whatever the shapes, since the layers share their class's code; experts, which are called as they are, cut
    each in two. ZeRO-3 gathers a layer's weights in hooks around the whole of it (`gather_by_layer`); what is compiled
    is its `forward`, which stands inside them.
    """
    for layer in language_model.layers:
        # Their products are a library's kernels; and on a CPU they ask how many tokens each expert has, which inductor
        # cannot compile.
        for module in layer.modules():
            if experts := getattr(module, "experts", None):
                experts.forward = torch.compiler.disable(experts.forward)
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def _add_at(hidden: torch.Tensor, spots: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Qwen3-VL's DeepStack: features [N, D] added to the tokens `spots` [N] of hidden states [B, L, D].

    transformers' own takes a mask of the tokens, and asks the device twice a layer how many they are.
    """
    return hidden.flatten(0, 1).index_add(0, spots, features.to(hidden.dtype)).view_as(hidden)
