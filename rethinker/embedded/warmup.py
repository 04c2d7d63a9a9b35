"""The embedded default's first words: the tiny model built and trained, supervised, for about two minutes on 2 cores.

It learns to look and to speak, and leaves something to learn. First the vision tower learns to name what an image
shows, with a linear probe that is thrown away. Then the language model learns responses on part of the training
questions. What they are like is the data set's own: a teacher beside it says what its images show and how they are
answered. All ranks of a run share each batch.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch.nn import functional as F

from rethinker.config import (
    Config,
    ConfigError,
    DataConfig,
    EnvironmentConfig,
    PolicyConfig,
    RethinkConfig,
    WarmupConfig,
)
from rethinker.data.images import image_key
from rethinker.data.mixture import category_of, check_category_weights
from rethinker.data.prompts import PromptEncoder, select_fitting
from rethinker.data.query_stream import QueryStream
from rethinker.embedded import own_files
from rethinker.embedded.boards import BoardsTeacher
from rethinker.embedded.easy_vqa import EasyVqaTeacher
from rethinker.embedded.sums import Parts, SumsTeacher
from rethinker.embedded.tiny import DEFAULT_SIZE, TinySize, create_tiny
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from rethinker.policy.packing import joined, pack
from rethinker.rollout.dialogue import Conversation, Dialogue
from rethinker.runtime.display import progress
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Bundle, Completion, Query, Rethought, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
LONGEST = 1024  # tokens of a response of several turns
Teacher = EasyVqaTeacher | SumsTeacher | BoardsTeacher
BETAS = (0.9, 0.95)  # Adam's
MUON = 3.0  # Muon's learning rate over Adam's: in 5 steps it learns as much about sums as Adam in 8


def warmed_up_tiny(
    warmup: WarmupConfig,
    data: DataConfig,
    queries: list[Query],
    cache: Path,
    ranks: Ranks,
    *,
    size: TinySize = DEFAULT_SIZE,
) -> Path:
    """The tiny model after its warm-up, from the cache or made now.

    Collective over `ranks`, which share the work and must see rank 0's cache; the answer is rank 0's.
    The cache is keyed by everything that shapes the model (but for rounding, which depends on the number of ranks):
    the settings, the training questions, the default triggers, and this folder's code and texts. It is safe against
    several runs that want the same model, and against one that is killed while it makes it.

    Raises:
        ConfigError: no question that fits the prompt's limits, or a cache that cannot be written.
    """
    given = {name: value for name, value in asdict(data).items() if not name.startswith("validation")}
    settings = {"warmup": asdict(warmup), "size": asdict(size), "data": given}
    folder = cache / f"tiny-{_digest(settings, queries)}"
    try:
        if ranks.is_main:
            cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock") if ranks.is_main else nullcontext():
            if ranks.broadcast(ranks.is_main and not folder.is_dir()):
                _build(folder, warmup, data, size, queries, ranks)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"RETHINKER_CACHE={cache}: the warmed-up model cannot be written there ({error}); "
            "set RETHINKER_CACHE to a folder with 50 MB free"
        ) from error
    return ranks.broadcast(folder)  # which is there when it arrives


def _build(
    folder: Path, warmup: WarmupConfig, data: DataConfig, size: TinySize, queries: list[Query], ranks: Ranks
) -> None:
    """Make the model in a folder beside its place; rank 0 moves it there whole."""
    partial, teacher = folder.with_name(f".{folder.name}.partial"), teacher_of(queries)
    try:
        if ranks.is_main:
            _write_untrained(partial, warmup, size, queries, teacher)
        ranks.gather(None)  # it is there
        if ranks.any(not partial.is_dir()):
            raise ConfigError(
                f"RETHINKER_CACHE={folder.parent}: a rank does not see what rank 0 writes there; "
                "set RETHINKER_CACHE to a folder that all ranks share"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(warmup.seed)
            processor, model = load_processor(partial), load_model(partial, torch.float32)
            encoder = PromptEncoder(processor, data)
            lessons = _lessons(queries, teacher, encoder, warmup)
            model.train()
            course, stream = Course(model, encoder, lessons, teacher, warmup, ranks), _stream(lessons, warmup, data)
            course.learn_to_answer(stream, freeze_vision=course.learn_to_look())
        ranks.gather(None)  # all have read the folder, of which rank 0 now writes over parts
        if ranks.is_main:
            model.eval()
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            partial.rename(folder)
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _write_untrained(
    folder: Path, warmup: WarmupConfig, size: TinySize, queries: list[Query], teacher: Teacher
) -> None:
    """Write the tiny model as it begins, with a tokenizer for these questions and their responses."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    rng, texts = random.Random(warmup.seed), list(teacher.hears)
    for query in queries:
        texts += [query.question, *(text for parts in teacher.responses(query, rng) for text, _ in parts)]
    create_tiny(folder, warmup.seed, texts=texts, size=size)


def teacher_of(queries: list[Query]) -> Teacher:
    """Who teaches these questions; of a mixture of data sets, one for all."""
    for teacher in (SumsTeacher(), BoardsTeacher()):
        if all(map(teacher.sees, queries)):
            return teacher
    return EasyVqaTeacher(queries)


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


@dataclass(frozen=True)
class Course:
    """Trains a model on its lessons: every rank does its part of each batch, and all keep the same weights."""

    model: PreTrainedModel
    encoder: PromptEncoder
    lessons: list[Query]
    teacher: Teacher
    warmup: WarmupConfig
    ranks: Ranks

    def learn_to_look(self) -> bool:
        """Train the vision tower to tell what its tokens show by a linear probe on them; False where nobody knows."""
        teacher, warmup = self.teacher, self.warmup
        images = list({_image_name(query): query for query in self.lessons if teacher.sees(query)}.values())
        if not images or not warmup.look_steps:
            return False
        tower = self.model.model.visual
        probe = torch.nn.Linear(self.model.config.text_config.hidden_size, teacher.classes)
        optimizers = {_adam([*tower.parameters(), *probe.parameters()]): 1.0}
        rng = random.Random(warmup.seed)
        for step in self._steps(warmup.look_steps, "warm-up, looking"):
            asked = rng.sample(images, min(warmup.batch_size, len(images)))
            batch, counts = self._share([teacher.view(query, rng) for query in asked])
            seen = joined([self.encoder.pixels(query) for query in batch])
            grid = seen["image_grid_thw"]
            tokens = tower(seen["pixel_values"], grid_thw=grid).pooler_output  # [tokens, hidden]
            scores = probe(F.rms_norm(tokens, tokens.shape[-1:]))  # [tokens, classes]
            owner = torch.arange(len(grid)).repeat_interleave(grid.prod(-1) // tower.spatial_merge_unit)  # [tokens]
            loss, number = teacher.look_loss(scores, owner, batch)
            self._update(optimizers, loss, counts * number, step / warmup.look_steps)
        return True

    def learn_to_answer(self, stream: QueryStream, freeze_vision: bool) -> None:
        """Train the model on responses to the stream's lessons; the loss is on those tokens alone that are taught."""
        model, encoder, warmup = self.model, self.encoder, self.warmup
        policy = Policy(model, PolicyConfig(freeze_vision=freeze_vision))
        embedding = model.get_input_embeddings().weight
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and p is not embedding]
        others = [p for p in trained if p.ndim != 2 or p is embedding]
        muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers = {_adam(others): 1.0, muon: MUON}
        rng = random.Random(warmup.seed)
        environment = dialogue_of(self.teacher, encoder)
        for step in self._steps(warmup.steps, "warm-up, answering"):
            answered = [(query, self.teacher.responses(query, rng)) for query in stream.next(warmup.batch_size)]
            own, counts = self._share(answered)
            bundles = [as_bundle(query, responses, encoder, environment) for query, responses in own]
            batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
            logps, _ = policy(batch)  # [R]
            taught = logps[batch.loss_mask]
            self._update(optimizers, -taught.mean(), counts * len(taught), step / warmup.steps)
        if environment:
            environment.close()

    def _steps(self, number: int, label: str) -> Iterable[int]:
        return progress(range(number), label) if self.ranks.is_main else range(number)

    def _share(self, batch: Sequence[T]) -> tuple[Sequence[T], bool]:
        """This rank's part of a batch, and whether it counts: a rank that has none repeats the first one's."""
        own = batch[self.ranks.rank :: self.ranks.world_size]
        return own or batch[:1], bool(own)

    def _update(
        self, optimizers: dict[torch.optim.Optimizer, float], loss: torch.Tensor, weight: int, done: float
    ) -> None:
        """One optimizer step on all ranks' losses together, each of them the mean of `weight` terms; the learning rate,
        of each optimizer by its factor, rises over the first tenth of the stage and falls over the last third."""
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        for optimizer, factor in optimizers.items():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = factor * self.warmup.learning_rate * min(1.0, 0.05 + 10 * done, 3 * (1 - done))
        (weight * loss).backward()
        sums = self.ranks.sum(torch.cat([loss.new_tensor([weight]), *(p.grad.flatten() for p in parameters)]))
        total, *gradients = sums.split([1, *(p.numel() for p in parameters)])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.view_as(p) / total
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()


def as_bundle(
    query: Query, responses: list[Parts], encoder: PromptEncoder, environment: Dialogue | None = None
) -> Bundle:
    """A query with these responses, as if they had been sampled.

    Without an environment, what comes before a response's first taught part is masked. With one, each part is a turn,
    which the environment answers.
    """
    prompt = encoder.encode(query)
    if environment:
        completions = [
            _spoken(parts, Conversation(environment, query, prompt, LONGEST), encoder) for parts in responses
        ]
    else:
        completions = [_completion(parts, encoder.tokenizer) for parts in responses]
    return Bundle(query, tuple(Sample(query, c, 0.0, 0, prompt_tokens=len(prompt.token_ids)) for c in completions))


def dialogue_of(teacher: Teacher, encoder: PromptEncoder) -> Dialogue | None:
    """The environment that the teacher's responses are turns for; of other teachers none."""
    if not teacher.environment:
        return None
    return Dialogue(Config(environment=EnvironmentConfig(use=[teacher.environment])), encoder)


def _spoken(turns: Parts, conversation: Conversation, encoder: PromptEncoder) -> Completion:
    """The response in which the policy says these turns, with what it is answered between them."""
    conversation.open()
    for text, _ in turns:
        assert conversation.goes_on()
        conversation.say(_completion([(text, True)], encoder.tokenizer))
    assert not conversation.goes_on()
    return conversation.completion()


def _completion(parts: Parts, tokenizer) -> Completion:
    """A response of these parts, as if it had been sampled; what stands before the first taught part is masked."""
    pieces = tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"]
    ids = [*(token for piece in pieces for token in piece), tokenizer.eos_token_id]
    untaught = sum(map(len, pieces[: [taught for _, taught in parts].index(True)]))
    # As the forced part of a rethought response: of a completion's tokens only those can be masked.
    masked = Rethought(0, 0, "", 0, untaught) if untaught else None
    return Completion(ids, [0.0] * len(ids), "".join(text for text, _ in parts), "stop", masked)


def _adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0)


def _digest(settings: dict, queries: list[Query]) -> str:
    """A short name for everything that shapes the model: settings, questions, triggers, and the code that makes it."""
    digest = hashlib.sha256(json.dumps([settings, RethinkConfig().triggers], sort_keys=True).encode())
    for query in queries:
        digest.update(f"{query.id}\n{query.question}\n{query.answer}\n".encode())
    for file in own_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
