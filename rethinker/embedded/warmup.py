"""The embedded default's first words: the tiny model built and trained, supervised, for about a minute.

It learns to look and to speak, and leaves something to learn. First the vision tower learns to name the colour and the
shape in an image, with a linear probe that is thrown away. Then the whole model learns answers that look before they
answer, `a teal circle. \\boxed{teal}`, on part of the training images. In negated questions ("is there not a red
shape?") its teacher overlooks the "not" two times in three. That mistake, and the rest of the images, are left to
reinforcement learning. (A model that never saw such questions never samples their answers, so no reward could teach it;
one that saw them answered right leaves nothing to learn.)
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch.nn import functional as F

from rethinker.config import ConfigError, DataConfig, WarmupConfig
from rethinker.data.images import image_key
from rethinker.data.prompts import PromptEncoder, select_fitting
from rethinker.data.query_stream import QueryStream
from rethinker.embedded.easy_vqa import COLORS, SHAPES, describe_images, is_negated
from rethinker.embedded.tiny import DEFAULT_SIZE, TinySize, create_tiny
from rethinker.policy.model import load_model, load_processor
from rethinker.policy.packing import joined
from rethinker.runtime.display import progress
from rethinker.samples import Query

# Colour and shape of an image, by its `image_key`.
Shown = Mapping[Hashable, tuple[str, str]]

# How often the "not" of a negated question is overlooked: clearly more than half, so that the greedy answer is wrong
# whatever the seed and the machine, and clearly less than always, so that samples are sometimes right.
NOT_OVERLOOKED = 0.65
BETAS = (0.9, 0.95)  # Adam's


def warmed_up_tiny(
    warmup: WarmupConfig,
    data: DataConfig,
    queries: list[Query],
    cache: Path,
    *,
    size: TinySize = DEFAULT_SIZE,
) -> Path:
    """The tiny model after its warm-up, from the cache or made now.

    The cache is keyed by everything that shapes the model: the settings, the training questions, and this code. It is
    safe against several processes that want the same model, and against one that is killed while it makes it.

    Raises:
        ConfigError: no question that fits the prompt's limits, or a cache that cannot be written.
    """
    given = {name: value for name, value in asdict(data).items() if not name.startswith("validation")}
    settings = {"warmup": asdict(warmup), "size": asdict(size), "data": given}
    folder = cache / f"tiny-{_digest(settings, queries)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(folder, warmup, data, size, queries)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"RETHINKER_CACHE={cache}: the warmed-up model cannot be written there ({error}); "
            "set RETHINKER_CACHE to a folder with 50 MB free"
        ) from error
    return folder


def _build(folder: Path, warmup: WarmupConfig, data: DataConfig, size: TinySize, queries: list[Query]) -> None:
    """Make the model in a folder beside its place and move it there whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        shown = describe_images(queries)
        texts = [text for q in queries for text in (q.question, response_text(q, _description(q, shown)))]
        create_tiny(partial, warmup.seed, texts=texts, size=size)
        with _all_cores(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(warmup.seed)
            processor, model = load_processor(partial), load_model(partial, torch.float32)
            encoder = PromptEncoder(processor, data)
            lessons = _lessons(queries, shown, encoder, warmup)
            model.train()
            _learn_to_look(model, encoder, lessons, shown, warmup)
            _learn_to_answer(model, encoder, lessons, shown, warmup)
            model.eval()
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lessons(queries: list[Query], shown: Shown, encoder: PromptEncoder, warmup: WarmupConfig) -> list[Query]:
    """The questions about the warm-up's share of the images.

    Images that cannot be described are passed over (unless none can): they would teach it to answer without a look.
    """
    queries = [query for query in queries if _description(query, shown)] or queries
    names = sorted({_image_name(query) for query in queries})
    random.Random(warmup.seed).shuffle(names)
    chosen = set(names[: max(1, round(warmup.data_fraction * len(names)))])
    return select_fitting([query for query in queries if _image_name(query) in chosen], encoder)[0]


def _as_taught(query: Query, rng: random.Random) -> Query:
    """The query with the answer that the warm-up teaches: its own, but for a "not" that is overlooked."""
    if query.answer in ("yes", "no") and is_negated(query.question) and rng.random() < NOT_OVERLOOKED:
        return replace(query, answer="no" if query.answer == "yes" else "yes")
    return query


def _image_name(query: Query) -> str:
    """Names a query's images, or the query itself if it has none."""
    return "|".join(str(image_key(image)) for image in query.images) or query.id


def _description(query: Query, shown: Shown) -> tuple[str, str] | None:
    return shown.get(image_key(query.images[0])) if len(query.images) == 1 else None


def response_text(query: Query, description: tuple[str, str] | None) -> str:
    """What the warm-up teaches as the response: a look at the image, where its content is known, then the answer."""
    look = f"a {description[0]} {description[1]}. " if description else ""
    return f"{look}\\boxed{{{query.answer}}}"


def _learn_to_look(model, encoder: PromptEncoder, lessons: list[Query], shown: Shown, warmup: WarmupConfig) -> None:
    """Train the vision tower to tell colour and shape by a linear probe on its tokens, pooled by a learned score."""
    images = list({_image_name(query): query for query in lessons if _description(query, shown)}.values())
    if not images:
        return
    tower = model.model.visual
    probe = torch.nn.Linear(model.config.text_config.hidden_size, len(COLORS) + len(SHAPES) + 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *probe.parameters()], betas=BETAS, weight_decay=0.0)
    rng = random.Random(warmup.seed)
    for step in progress(range(warmup.look_steps), "warm-up, looking"):
        batch = rng.sample(images, min(warmup.batch_size, len(images)))
        seen = joined([encoder.pixels(query) for query in batch])
        grid = seen["image_grid_thw"]
        tokens = tower(seen["pixel_values"], grid_thw=grid).pooler_output  # [tokens, hidden]
        scores = probe(F.rms_norm(tokens, tokens.shape[-1:]))  # [tokens, colours + shapes + 1]
        owner = torch.arange(len(batch)).repeat_interleave(grid.prod(-1) // tower.spatial_merge_unit)  # [tokens]
        weight = scores[:, -1:].clamp(-20, 20).exp()
        total = torch.zeros(len(batch), 1).index_add(0, owner, weight)
        pooled = torch.zeros(len(batch), scores.shape[1]).index_add(0, owner, weight * scores) / total
        colors, shapes = zip(*(_description(query, shown) for query in batch), strict=True)
        color_loss = F.cross_entropy(pooled[:, : len(COLORS)], torch.tensor([COLORS.index(c) for c in colors]))
        shape_loss = F.cross_entropy(pooled[:, len(COLORS) : -1], torch.tensor([SHAPES.index(s) for s in shapes]))
        _update(optimizer, color_loss + shape_loss, warmup, step / warmup.look_steps)


def _learn_to_answer(model, encoder: PromptEncoder, lessons: list[Query], shown: Shown, warmup: WarmupConfig) -> None:
    """Train the whole model on the responses; the loss is on their tokens alone."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0)
    present = {query.metadata.get("category") for query in lessons}
    weights = {category: w for category, w in encoder.config.category_weights.items() if category in present}
    stream = QueryStream(lessons, seed=warmup.seed, category_weights=weights)
    end = encoder.tokenizer.eos_token_id
    rng = random.Random(warmup.seed)
    for step in progress(range(warmup.steps), "warm-up, answering"):
        batch = stream.next(warmup.batch_size)
        prompts = [encoder.encode(query).token_ids for query in batch]
        texts = [response_text(_as_taught(query, rng), _description(query, shown)) for query in batch]
        responses = [[*ids, end] for ids in encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        input_ids = torch.full((len(batch), max(lengths)), encoder.tokenizer.pad_token_id)  # [B, L]
        taught = torch.zeros(len(batch), max(lengths), dtype=torch.bool)  # [B, L]: tokens of the responses
        for row, (prompt, response, length) in enumerate(zip(prompts, responses, lengths, strict=True)):
            input_ids[row, :length] = torch.tensor(prompt + response)
            taught[row, len(prompt) : length] = True
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
            mm_token_type_ids=(input_ids == model.config.image_token_id).long(),
            use_cache=False,
            **joined([encoder.pixels(query) for query in batch]),
        ).last_hidden_state  # [B, L, hidden]
        logits = model.lm_head(hidden[:, :-1][taught[:, 1:]])  # [response tokens, vocabulary]
        loss = F.cross_entropy(logits, input_ids[:, 1:][taught[:, 1:]])
        _update(optimizer, loss, warmup, step / warmup.steps)


def _update(optimizer: torch.optim.AdamW, loss: torch.Tensor, warmup: WarmupConfig, done: float) -> None:
    """One optimizer step; the learning rate rises over the first tenth of the stage and falls over the last third."""
    (group,) = optimizer.param_groups
    group["lr"] = warmup.learning_rate * min(1.0, 0.05 + 10 * done, 3 * (1 - done))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


@contextmanager
def _all_cores() -> Iterator[None]:
    """Use the machine's cores, up to 8: torchrun leaves each rank one thread, but only this rank works now."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, min(8, len(os.sched_getaffinity(0)))))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digest(settings: dict, queries: list[Query]) -> str:
    """A short name for everything that shapes the model: settings, questions, and the code that makes it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for query in queries:
        digest.update(f"{query.id}\n{query.question}\n{query.answer}\n".encode())
    for name in ("easy_vqa", "tiny", "tokenizer", "warmup"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]
