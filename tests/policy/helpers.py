"""Queries, samples and the ordinary per-sample forward that the packed one is held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rethinker.config import DataConfig
from rethinker.data.images import open_image
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.loading import load_processor
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Observed, Query, Sample
from rethinker.trajectory import Trajectory
from tests.data.image_kinds import noise, saved


def picture(folder, number: int, size: tuple[int, int] = (64, 64)) -> str:
    """A noise image on disk."""
    path = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def queries_of_every_kind(folder) -> list[Query]:
    """One image, two images of different extents, text only."""
    return [
        Query("one", "what is the blue shape?", "circle", (picture(folder, 0),)),
        Query("two", "<image> and <image>: same?", "no", (picture(folder, 1, (96, 48)), picture(folder, 2, (48, 64)))),
        Query("text", "is two more than one?", "yes"),
    ]


def late_image(folder) -> Query:
    """An image behind more text than a tiny model's sliding windows see."""
    question = "of all that is seen here and there, and of all that was said of it before, what is this? <image>"
    return Query("late", question, "circle", (picture(folder, 3),))


def samples_for(queries, encoder, lengths, *, seed: int = 0, vocabulary: int = 260) -> list[Sample]:
    """Random responses of the given lengths to each query, with random behaviour log-probs and advantages."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, query in enumerate(queries):
        prompt_tokens = len(encoder.encode(query).token_ids)
        for index, length in enumerate(lengths):
            completion = Completion(
                token_ids=rng.integers(0, vocabulary, length).tolist(),
                logprobs=(-6 + 0.1 * rng.standard_normal(length)).tolist(),
                text="",
                finish_reason="stop",
            )
            samples.append(
                Sample(
                    query,
                    completion,
                    float(rng.standard_normal()),
                    policy_version=0,
                    prompt_tokens=prompt_tokens,
                    group=number,
                    index=index,
                )
            )
    return samples


def observing(sample: Sample, encoder: PromptEncoder, *places: int) -> Sample:
    """The sample with an image and some words observed behind so many of its tokens, at each of the places."""
    response, done, observed = Trajectory(encoder.encode(sample.query), 10**6), 0, []
    for number, place in enumerate(places):
        response.say(cut(sample.completion, done, place))
        image = {"bytes": saved(Image.fromarray(noise(48 - 16 * number, 32, seed=number)))}
        heard = encoder.observation("so: <image>", (image,), "")
        response.hear(heard.token_ids, heard.compact_ids, heard.images)
        observed.append(Observed(response.tokens - len(heard.token_ids), response.tokens, 0, images=(image,)))
        done = place
    response.say(cut(sample.completion, done, None))
    return replace(sample, completion=response.completion("", observed=tuple(observed)))


def cut(completion: Completion, start: int, end: int | None) -> Completion:
    return replace(completion, token_ids=completion.token_ids[start:end], logprobs=completion.logprobs[start:end])


def encoder_and_samples(model: str, scratch: Path, ranks: Ranks) -> tuple[PromptEncoder, list[Sample]]:
    """A model's encoder, and on every rank the same four responses: two with an image, two without."""
    pictures = scratch / f"pictures_{ranks.world_size}_{ranks.rank}"
    pictures.mkdir()
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    one, _, text = queries_of_every_kind(pictures)
    return encoder, samples_for([one, text], encoder, [5, 9])


def per_sample_log_softmax(model, encoder, sample: Sample) -> torch.Tensor:
    """[L, V] of one response by transformers' own forward on the one ordinary sequence."""
    prompt = encoder.encode(sample.query)
    ids = torch.tensor([[*prompt.token_ids, *sample.completion.token_ids]])
    family, inputs = encoder.family, {}
    seen = [open_image(image, "") for image in sample.completion.images]
    if images := [*prompt.images, *seen]:
        arguments = family.image_arguments(encoder.processor)
        made = encoder.processor.image_processor(images=images, return_tensors="pt", **arguments)
        inputs = {name: made[name] for name in family.IMAGE_INPUTS}
    if family.TOKEN_TYPES:
        is_image = (ids == model.config.image_token_id).int()
        is_image[:, len(prompt.token_ids) :] *= torch.from_numpy(~sample.completion.sampled)
        inputs[family.TOKEN_TYPES] = is_image
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    return logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)


def per_sample_logps(model, encoder, sample: Sample) -> torch.Tensor:
    """Log-probs [L] of its tokens."""
    logps = per_sample_log_softmax(model, encoder, sample)
    return logps.gather(1, torch.tensor(sample.completion.token_ids)[:, None])[:, 0]
