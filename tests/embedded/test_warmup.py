"""The warm-up: what it teaches, that it never sees the test split, and a cache that cannot hold half a model."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rethinker import embedded
from rethinker.config import Config, ConfigError, DataConfig, WarmupConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded import files, own_files
from rethinker.embedded import warmup as module
from rethinker.embedded.boards import boards
from rethinker.embedded.easy_vqa import EasyVqaTeacher, describe_images, easy_vqa, is_negated
from rethinker.embedded.sums import SumsTeacher, sums
from rethinker.embedded.tiny import TinySize, create_tiny
from rethinker.embedded.warmup import warmed_up_tiny
from rethinker.runtime import distributed
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.samples import Query
from tests import forked

SMALL = TinySize(
    hidden=64, intermediate=64, layers=1, heads=2, kv_heads=1, vision_hidden=32, vision_heads=1, merges=300
)
DATA = DataConfig(prompt="{question}", min_pixels=4096, max_pixels=4096)
QUERIES = easy_vqa("train")[:3000]  # about 250 images that can be described
BRIEF = WarmupConfig(look_steps=3, steps=3, batch_size=8, data_fraction=0.16)
TEXT_ONLY = [Query(str(i), f"what is {i} + 1?", str(i + 1)) for i in range(20)]


def made(warmup, data, queries, cache, ranks=ALONE):
    return warmed_up_tiny(warmup, data, queries, cache, ranks, size=SMALL)


def question(text, answer, image="a.png"):
    return Query(id=text, question=text, answer=answer, images=(image,))


def test_descriptions_are_read_off_the_questions():
    """Open answers, confirmed statements and denied absences tell what is there; the rest tells nothing."""
    asked = [
        question("what color is the shape?", "teal", "a"),
        question("is there a circle?", "yes", "a"),
        question("is no red shape present?", "no", "b"),
        question("what is the red shape?", "triangle", "b"),
        question("is there a blue shape?", "no", "c"),
        question("is there not a rectangle?", "yes", "c"),
        question("does the image contain a rectangle?", "yes", "d"),
    ]
    assert describe_images(asked) == {"a": ("teal", "circle"), "b": ("red", "triangle")}


def test_descriptions_of_easy_vqa_contradict_no_question():
    """Every question of the training split agrees with the description of its image."""
    queries = easy_vqa("train")
    shown = describe_images(queries)
    assert len(shown) > 3000
    for query in queries:
        if query.images[0] not in shown:
            continue
        color, shape = shown[query.images[0]]
        if query.answer in ("yes", "no"):
            mentioned = {color, shape} & set(query.question.rstrip("?").split())
            assert (query.answer == "yes") == (bool(mentioned) != is_negated(query.question)), query
        else:
            assert query.answer in (color, shape), query


def test_the_response_looks_before_it_answers():
    """A description first, the boxed answer last; only the answer where nothing is known of the image."""
    query, rng = question("is there a red shape?", "no"), random.Random(0)
    known = [query, question("what color is it?", "teal"), question("what is the teal shape?", "circle")]
    assert EasyVqaTeacher(known).responses(known[0], rng) == [[("a teal circle. \\boxed{no}", True)]]
    assert EasyVqaTeacher([query]).responses(query, rng) == [[("\\boxed{no}", True)]]


def test_lessons_are_about_a_share_of_the_training_images(tmp_path):
    """No undescribed image, and no more images than `data_fraction`, which the seed chooses."""
    encoder = PromptEncoder(AutoProcessor.from_pretrained(create_tiny(tmp_path, size=SMALL)), DATA)
    queries = QUERIES
    teacher, shown = EasyVqaTeacher(queries), describe_images(queries)

    def lessons(**settings):
        return module._lessons(queries, teacher, encoder, WarmupConfig(data_fraction=0.1, **settings))

    def images(of):
        return {query.images[0] for query in of}

    everything = lessons()
    assert {query.metadata["category"] for query in everything} == {"yes/no", "color", "shape"}
    assert images(everything) < set(shown) and len(images(everything)) == round(0.1 * len(shown))
    assert images(lessons(seed=1)) != images(everything)


def test_the_not_of_negated_questions_is_overlooked_two_times_in_three():
    """Negated questions are taught wrong in a share well off one half; all other answers are the data's."""
    teacher, rng = EasyVqaTeacher([]), random.Random(0)
    for answer, other in (("yes", "no"), ("no", "yes")):
        negated = question("is there not a red shape?", answer)
        taught = [teacher.responses(negated, rng)[0][0][0][7:-1] for _ in range(400)]
        assert set(taught) == {"yes", "no"} and 230 < taught.count(other) < 290
    for query in (question("is there a red shape?", "no"), question("what color is the shape?", "red")):
        assert teacher.responses(query, rng) == [[(f"\\boxed{{{query.answer}}}", True)]]


def test_sums_are_taught_by_their_own_teacher():
    """Where every question knows what its image shows; a mixture has the other one."""
    queries = sums("test")[::600]
    assert isinstance(module.teacher_of(queries), SumsTeacher)
    assert isinstance(module.teacher_of([*queries, question("is there a red shape?", "no")]), EasyVqaTeacher)


def test_the_mix_of_the_warmup():
    """Its own weights, which name categories that there are; else the data's, as far as the lessons have them."""
    lessons = sums("test")[:600]  # 2 and 3 terms
    data = DataConfig(category_weights={"3 terms": 1, "6 terms": 1})

    def drawn(**weights):
        stream = module._stream(lessons, WarmupConfig(category_weights=weights), data)
        return Counter(query.metadata["category"] for query in stream.next(40))

    assert drawn() == {"3 terms": 40} and drawn(**{"2 terms": 3, "3 terms": 1}) == {"2 terms": 30, "3 terms": 10}
    with pytest.raises(ConfigError, match="policy.warmup.category_weights.2 term: "):
        drawn(**{"2 term": 1})


def test_a_slip_is_not_taught(tmp_path):
    """Its tokens are masked, those of the trigger, the second answer and the end are not, and none is lost."""
    tokenizer = AutoProcessor.from_pretrained(create_tiny(tmp_path, size=SMALL)).tokenizer
    parts = [("1+1=3\n\\boxed{3}", False), ("\n\nWait, let's double check", True), ("\n\\boxed{2}", True)]
    completion = module._completion(parts, tokenizer)
    mask = completion.trainable
    assert tokenizer.decode(completion.token_ids[~mask]) == parts[0][0]
    assert tokenizer.decode(completion.token_ids[mask]) == parts[1][0] + parts[2][0] + "<|im_end|>"
    assert module._completion(parts[1:], tokenizer).trainable.all()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A model warmed up for three steps per stage."""
    return made(BRIEF, DATA, QUERIES, tmp_path_factory.mktemp("cache"))


def test_a_brief_warmup_trains_every_part(warm, tmp_path):
    """The folder loads as any model does, and every weight moved from where it began, with finite values."""
    trained = AutoModelForImageTextToText.from_pretrained(warm).state_dict()
    texts = [text for q in QUERIES for text in (q.question, f"a teal circle. \\boxed{{{q.answer}}}")]
    fresh = AutoModelForImageTextToText.from_pretrained(create_tiny(tmp_path, BRIEF.seed, texts=texts, size=SMALL))
    fresh = {name: value for name, value in fresh.state_dict().items() if value.shape == trained[name].shape}
    assert any("visual" in name for name in fresh)
    for name, value in fresh.items():
        assert torch.isfinite(trained[name]).all() and not torch.equal(trained[name], value), name


# Batches that three ranks cannot share evenly, of sums that differ in length; one leaves nothing to the third rank.
SHARED = [WarmupConfig(look_steps=3, steps=3, batch_size=size, data_fraction=0.05) for size in (7, 2)]
UNTRAINED = WarmupConfig(look_steps=0, steps=0, data_fraction=0.05)


def warmups(cache, ranks=ALONE):
    cells = DataConfig(prompt="{question}", min_pixels=256, max_pixels=4096)
    asked = [(warmup, cells, sums("train")[::40]) for warmup in (*SHARED, UNTRAINED)]
    asked += [(SHARED[0], DATA, QUERIES), (SHARED[0], DATA, TEXT_ONLY)]  # another teacher; nothing to look at
    asked.append((SHARED[0], replace(cells, max_pixels=2048), boards("train")[::10]))  # responses of several turns
    return [made(warmup, data, queries, cache, ranks) for warmup, data, queries in asked]


def on_a_rank(cache):
    ranks = distributed.start(60)
    folders = warmups(cache, ranks)
    assert ranks.gather(folders) == [folders] * 3
    assert warmups(cache, ranks) == folders  # from the cache now


def test_ranks_make_the_model_of_one(tmp_path):
    """But for rounding, though their parts of a batch weigh differently. Where one writes they all find it."""
    forked.run(partial(on_a_rank, tmp_path / "three"), tmp_path / "log", ranks=3)
    for folder in warmups(tmp_path / "one"):
        one, three = (load_file(tmp_path / cache / folder.name / "model.safetensors") for cache in ("one", "three"))
        for name, value in one.items():
            assert (three[name] - value).norm() <= 1e-3 * value.norm(), (folder.name, name)


def test_ranks_share_a_batch():
    """Each has its own part, together they have all of it; what is done twice does not count."""

    def shares(batch, world_size):
        courses = [module.Course(None, None, [], None, BRIEF, Ranks(rank, world_size, 0)) for rank in range(world_size)]
        return [course._share(batch) for course in courses]

    assert shares([1, 2, 3, 4, 5], 2) == [([1, 3, 5], True), ([2, 4], True)]
    assert shares([1, 2], 3) == [([1], True), ([2], True), ([1], False)]


def test_a_cache_that_a_rank_does_not_see(tmp_path, monkeypatch):
    """Ranks on several nodes need one that they share: a line says so, on each of them."""
    monkeypatch.setattr(module, "_write_untrained", lambda *rest: None)
    with pytest.raises(ConfigError, match="RETHINKER_CACHE=.*: a rank does not see .* a folder that all ranks share"):
        made(BRIEF, DATA, QUERIES, tmp_path)


def test_the_warmup_never_opens_a_test_image(tmp_path, monkeypatch):
    """The test split is held out: neither its questions nor its images are read."""
    read, opened = [], []
    with monkeypatch.context() as patch:
        patch.setattr(module, "warmed_up_tiny", lambda warmup, data, queries, cache, ranks: queries)
        patch.setattr(files, "load_queries", lambda data, which: read.append(which))
        files.model_folder(Config(), ALONE)
    assert read == ["train"]
    pixels = PromptEncoder.pixels
    monkeypatch.setattr(PromptEncoder, "pixels", lambda self, q: opened.append(q.images[0]) or pixels(self, q))
    made(BRIEF, DATA, QUERIES, tmp_path)
    assert len(opened) > 40 and all("/train/images/" in image for image in opened)


def test_a_mix_that_cannot_be_is_told_before_anything_is_learned(tmp_path, monkeypatch):
    """A recipe's mix of sums, given another data set."""
    monkeypatch.setattr(module.Course, "learn_to_look", None)
    with pytest.raises(ConfigError, match="policy.warmup.category_weights.2 terms: "):
        made(replace(BRIEF, category_weights={"2 terms": 1}), DATA, QUERIES, tmp_path)


def test_the_loss_falls(tmp_path, monkeypatch):
    """Thirty steps per stage bring both losses well below their start."""
    losses = []
    update = module.Course._update

    def noted(self, optimizers, loss, *rest):
        losses.append(loss.item())
        update(self, optimizers, loss, *rest)

    monkeypatch.setattr(module.Course, "_update", noted)
    brief = WarmupConfig(look_steps=30, steps=30, batch_size=16, data_fraction=0.3)
    made(brief, DATA, QUERIES, tmp_path)
    look, answer = losses[:30], losses[30:]
    assert sum(look[-5:]) < 0.8 * sum(look[:5])
    assert sum(answer[-5:]) < 0.4 * sum(answer[:5])


def test_a_finished_model_is_reused_and_another_setting_makes_another(warm, monkeypatch, tmp_path):
    """The same call builds nothing; a change of what shapes the model, setting or text, does not get the old one."""
    built = []
    monkeypatch.setattr(module, "_build", lambda folder, *rest: built.append(folder))
    assert made(BRIEF, DATA, QUERIES, warm.parent) == warm and built == []
    for warmup, data in (
        (WarmupConfig(look_steps=3, steps=4, batch_size=8, data_fraction=0.16), DATA),
        (WarmupConfig(look_steps=3, steps=3, batch_size=8, data_fraction=0.16, seed=1), DATA),
        (BRIEF, DataConfig(prompt="{question} ", min_pixels=4096, max_pixels=4096)),
    ):
        folder = made(warmup, data, QUERIES, warm.parent)
        assert built.pop() == folder != warm
    with monkeypatch.context() as patch:  # the tokenizer learns from the folder's texts, as the teacher from triggers
        copies = [Path(shutil.copy(file, tmp_path)) for file in own_files()]
        patch.setattr(module, "own_files", lambda: copies)
        assert made(BRIEF, DATA, QUERIES, warm.parent) == warm and built == []
        (tmp_path / "common_texts.json").write_text("[]")
        assert made(BRIEF, DATA, QUERIES, warm.parent) == built.pop() != warm
    with monkeypatch.context() as patch:
        patch.setattr(module, "RethinkConfig", lambda: SimpleNamespace(triggers={"doubt": "\n\nWait"}))
        assert made(BRIEF, DATA, QUERIES, warm.parent) == built.pop() != warm
    # What only validation reads does not shape the model.
    data = DataConfig(prompt="{question}", min_pixels=4096, max_pixels=4096, validation=None)
    assert made(BRIEF, data, QUERIES, warm.parent) == warm


def test_own_files_are_code_and_texts(tmp_path, monkeypatch):
    """No folder, nothing that an editor leaves."""
    assert {"warmup.py", "common_texts.json", "chat_template.jinja"} < {file.name for file in own_files()}
    for name in ("a.py", "b.json", ".a.py", "a.py.orig", "a.py~"):
        (tmp_path / name).touch()
    (tmp_path / "__pycache__").mkdir()
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    assert [file.name for file in own_files()] == ["a.py", "b.json"]


def test_a_half_written_model_is_not_taken(tmp_path):
    """A builder killed while it works leaves nothing that looks like a model, and the next one starts afresh."""

    def killed(folder, *arguments, **options):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        os._exit(9)

    if not (child := os.fork()):
        module.create_tiny = killed
        made(BRIEF, DATA, QUERIES, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.name.endswith(".partial") for path in left] == [True]
    folder = made(BRIEF, DATA, QUERIES, tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_two_builders_at_once_make_one_model(tmp_path, monkeypatch):
    """The second waits for the first and takes its model."""
    built, results = [], []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda folder, *rest: built.append(folder) or build(folder, *rest))

    def work():
        results.append(made(BRIEF, DATA, QUERIES, tmp_path))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(built) == 1 and results == [built[0], built[0]]


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    """`RETHINKER_CACHE` names it; one that cannot be written is refused by name."""
    monkeypatch.setattr(module, "_build", lambda *rest: None)
    monkeypatch.setenv("RETHINKER_CACHE", str(tmp_path / "here"))
    assert warmed_up_tiny(BRIEF, DATA, QUERIES, files.cache_folder(), ALONE).parent == tmp_path / "here"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="RETHINKER_CACHE"):
        warmed_up_tiny(BRIEF, DATA, QUERIES, tmp_path / "file", ALONE)


def test_the_callers_generator_is_left_alone(tmp_path):
    """The warm-up does not move torch's generator."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    brief = WarmupConfig(look_steps=1, steps=1, batch_size=2, data_fraction=0.16)
    made(brief, DATA, QUERIES, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
