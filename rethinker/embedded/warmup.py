"""The embedded default's first words: the tiny model built and trained, supervised, for two minutes or so.

It learns to look and to speak, and leaves something to learn. First the vision tower learns to name what an image
shows, with a linear probe that is thrown away. Then the language model learns responses on part of the training
questions. What they are like is the data set's own: a teacher beside it says what its images show and how they are
answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch.nn import functional as F

from rethinker.config import ConfigError, DataConfig, PolicyConfig, WarmupConfig
from rethinker.data.images import image_key
from rethinker.data.mixture import category_of, check_category_weights
from rethinker.data.prompts import PromptEncoder, select_fitting
from rethinker.data.query_stream import QueryStream
from rethinker.embedded.easy_vqa import EasyVqaTeacher
from rethinker.embedded.sums import SumsTeacher
from rethinker.embedded.tiny import DEFAULT_SIZE, TinySize, create_tiny
from rethinker.policy.model import Policy, load_model, load_processor
from rethinker.policy.packing import joined, pack
from rethinker.runtime.display import progress
from rethinker.samples import Bundle, Completion, Query, Rethought, Sample

Teacher = EasyVqaTeacher | SumsTeacher
BETAS = (0.9, 0.95)  # Adam's
MUON = 3.0  # Muon's learning rate over Adam's: in 5 steps it learns as much about sums as Adam in 8


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
        teacher, rng = teacher_of(queries), random.Random(warmup.seed)
        texts = []
        for query in queries:
            texts += [query.question, *(text for parts in teacher.responses(query, rng) for text, _ in parts)]
        create_tiny(partial, warmup.seed, texts=texts, size=size)
        with _cores_of_idle_ranks(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(warmup.seed)
            processor, model = load_processor(partial), load_model(partial, torch.float32)
            encoder = PromptEncoder(processor, data)
            lessons = _lessons(queries, teacher, encoder, warmup)
            model.train()
            looked = _learn_to_look(model, encoder, lessons, teacher, warmup)
            _learn_to_answer(model, encoder, lessons, teacher, warmup, freeze_vision=looked)
            model.eval()
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def teacher_of(queries: list[Query]) -> Teacher:
    """Who teaches these questions; of a mixture of data sets, one for all."""
    return SumsTeacher() if all(map(SumsTeacher().sees, queries)) else EasyVqaTeacher(queries)


def _lessons(queries: list[Query], teacher: Teacher, encoder: PromptEncoder, warmup: WarmupConfig) -> list[Query]:
    """The questions about the warm-up's share of the images.

    Images of which nothing is known are passed over (unless that is all): they would teach it to answer without a look.
    """
    queries = list(filter(teacher.sees, queries)) or queries
    names = sorted({_image_name(query) for query in queries})
    random.Random(warmup.seed).shuffle(names)
    chosen = set(names[: max(1, round(warmup.data_fraction * len(names)))])
    return select_fitting([query for query in queries if _image_name(query) in chosen], encoder)[0]


def _image_name(query: Query) -> str:
    """Names a query's images, or the query itself if it has none."""
    return "|".join(str(image_key(image)) for image in query.images) or query.id


def _stream(lessons: list[Query], warmup: WarmupConfig, data: DataConfig) -> QueryStream:
    """The lessons in the mix of the warm-up, else in that of the data; of this one a share of them may lack some."""
    present = set(map(category_of, lessons))
    if warmup.category_weights:
        check_category_weights(warmup.category_weights, present, "policy.warmup.category_weights")
    weights = warmup.category_weights or {c: w for c, w in data.category_weights.items() if c in present}
    return QueryStream(lessons, seed=warmup.seed, category_weights=weights)


def _learn_to_look(model, encoder: PromptEncoder, lessons: list[Query], teacher: Teacher, warmup: WarmupConfig) -> bool:
    """Train the vision tower to tell what its tokens show by a linear probe on them; False where nobody knows."""
    images = list({_image_name(query): query for query in lessons if teacher.sees(query)}.values())
    if not images or not warmup.look_steps:
        return False
    tower = model.model.visual
    probe = torch.nn.Linear(model.config.text_config.hidden_size, teacher.classes)
    optimizers = {_adam([*tower.parameters(), *probe.parameters()]): 1.0}
    rng = random.Random(warmup.seed)
    for step in progress(range(warmup.look_steps), "warm-up, looking"):
        batch = rng.sample(images, min(warmup.batch_size, len(images)))
        seen = joined([encoder.pixels(query) for query in batch])
        grid = seen["image_grid_thw"]
        tokens = tower(seen["pixel_values"], grid_thw=grid).pooler_output  # [tokens, hidden]
        scores = probe(F.rms_norm(tokens, tokens.shape[-1:]))  # [tokens, classes]
        owner = torch.arange(len(batch)).repeat_interleave(grid.prod(-1) // tower.spatial_merge_unit)  # [tokens]
        _update(optimizers, teacher.look_loss(scores, owner, batch), warmup, step / warmup.look_steps)
    return True


def _learn_to_answer(
    model, encoder: PromptEncoder, lessons: list[Query], teacher: Teacher, warmup: WarmupConfig, freeze_vision: bool
) -> None:
    """Train the model on the responses; the loss is on those tokens alone that are taught."""
    policy = Policy(model, PolicyConfig(freeze_vision=freeze_vision))
    embedding = model.get_input_embeddings().weight
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and p is not embedding]
    others = [p for p in trained if p.ndim != 2 or p is embedding]
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizers = {_adam(others): 1.0, muon: MUON}
    stream = _stream(lessons, warmup, encoder.config)
    rng = random.Random(warmup.seed)
    for step in progress(range(warmup.steps), "warm-up, answering"):
        bundles = []
        for query in stream.next(warmup.batch_size):
            prompt_tokens = len(encoder.encode(query).token_ids)
            taught = [_completion(parts, encoder.tokenizer) for parts in teacher.responses(query, rng)]
            samples = [Sample(query, completion, 0.0, 0, prompt_tokens=prompt_tokens) for completion in taught]
            bundles.append(Bundle(query, tuple(samples)))
        batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
        logps, _ = policy(batch)  # [R]
        _update(optimizers, -logps[batch.loss_mask].mean(), warmup, step / warmup.steps)


def _completion(parts: list[tuple[str, bool]], tokenizer) -> Completion:
    """A response of these parts, as if it had been sampled; what stands before the first taught part is masked."""
    pieces = tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"]
    ids = [*(token for piece in pieces for token in piece), tokenizer.eos_token_id]
    untaught = sum(map(len, pieces[: [taught for _, taught in parts].index(True)]))
    # As the forced part of a rethought response: of a completion's tokens only those can be masked.
    masked = Rethought(0, 0, "", 0, untaught) if untaught else None
    return Completion(ids, [0.0] * len(ids), "".join(text for text, _ in parts), "stop", masked)


def _adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0)


def _update(
    optimizers: dict[torch.optim.Optimizer, float], loss: torch.Tensor, warmup: WarmupConfig, done: float
) -> None:
    """One optimizer step; the learning rate, of each optimizer by its factor, rises over the first tenth of the stage
    and falls over the last third."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer, factor in optimizers.items():
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = factor * warmup.learning_rate * min(1.0, 0.05 + 10 * done, 3 * (1 - done))
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()


@contextmanager
def _cores_of_idle_ranks() -> Iterator[None]:
    """Of several ranks, which torchrun leaves one thread each, only this one works now: use the machine's cores, up to
    8. A process of its own has the threads that it was given."""
    threads = torch.get_num_threads()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
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
    for name in ("easy_vqa", "sums", "tiny", "tokenizer", "warmup"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]
