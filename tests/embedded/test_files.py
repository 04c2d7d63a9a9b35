"""Embedded data sets as files: read as any other data set, the same questions as their packages have, never half."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from rethinker.config import Config, ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.query_stream import QueryStream
from rethinker.embedded import files
from rethinker.embedded.digits import digits
from rethinker.embedded.easy_vqa import easy_vqa
from rethinker.embedded.files import as_files, model_folder
from rethinker.embedded.sums import sums
from rethinker.runtime.distributed import ALONE
from rethinker.samples import Query
from tests.speed import least_cpu_s


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache, monkeypatch):
    monkeypatch.setenv("RETHINKER_CACHE", str(cache))


def load(data: DataConfig, which: str):
    return load_queries(as_files(data, which), which)


@pytest.mark.parametrize("name", files.DATA_SETS)
def test_the_files_hold_what_the_packages_hold(name):
    """Of each: ids, questions, answers, images and metadata, in their order; quickly, once the file is there."""
    source, (trained, held_out, *_), *_ = files.DATA_SETS[name]
    data = DataConfig(train=name, validation=name, fields={"question": "problem", "choices": "options"})
    given = asdict(data)
    assert load(data, "train") == source(trained) and load(data, "validation") == source(held_out)
    assert asdict(data) == given  # the user's words: what the run's config.yaml says
    assert least_cpu_s(lambda: load(data, "train"), times=2) < 4


def test_a_split_by_its_name():
    """`sums:test` is neither what is trained on nor what validates; an unknown one is a line with those there are."""
    data = DataConfig(train="sums:validation", validation="sums:test")
    assert load(data, "validation") == sums("test") and load(data, "train") == sums("validation")
    with pytest.raises(ConfigError, match="data.validation=sums:tset: sums has no split 'tset', but train, validation"):
        as_files(DataConfig(validation="sums:tset"), "validation")


def test_easy_vqa():
    """Both splits, stable ids, three categories, images that exist."""
    train, test = easy_vqa("train"), easy_vqa("test")
    assert (len(train), len(test)) == (38575, 9673)
    assert train[123].id == "easy_vqa/train/123" and test[0].id == "easy_vqa/test/0"
    assert len({q.id for q in train + test}) == len(train) + len(test)
    for query in train[::500] + test[::500]:
        (path,) = query.images
        assert Path(path).stem == str(query.metadata["image_id"]) and Image.open(path).size == (64, 64)
    answers = {}
    for query in train:
        answers.setdefault(query.metadata["category"], set()).add(query.answer)
    assert answers["yes/no"] == {"yes", "no"} and answers["shape"] == {"circle", "rectangle", "triangle"}
    assert "red" in answers["color"] and set(answers) == {"yes/no", "shape", "color"}


def test_embedded_data_can_be_split():
    """No image on both sides; the sides are those of the images' own names, wherever the package is installed."""
    data = DataConfig(validation="split")
    train, validation = load(data, "train"), load(data, "validation")
    assert len(train) + len(validation) == 38575 and len(validation) == 816
    assert not {q.images for q in train} & {q.images for q in validation}


def test_embedded_data_as_a_source(tmp_path):
    """Beside a data set with columns of its own; categories can be weighted."""
    (tmp_path / "own.jsonl").write_text('{"problem": "2 + 2?", "answer": "4", "options": ["3", "4"]}\n')
    sources = {"a": {"train": "digits"}, "b": {"train": str(tmp_path / "own.jsonl")}}
    fields = {"question": "problem", "choices": "options"}
    *of_digits, own = load(DataConfig(train="sources", sources=sources, fields=fields), "train")
    assert [query.id for query in of_digits] == [f"a/{query.id}" for query in digits("train")]
    assert (own.id, own.question, own.metadata) == ("b/0", "2 + 2?", {"choices": ["3", "4"]})
    stream = QueryStream(of_digits, seed=0, category_weights={"read": 0.5, "add": 0.5})
    assert Counter(query.metadata["category"] for query in stream.next(100)) == {"read": 50, "add": 50}


@pytest.mark.parametrize("name", ["esay_vqa", "easy-vqa", "digit"])
def test_a_misspelt_name(name):
    """The nearest one is named; other words are left to `data/`."""
    with pytest.raises(ConfigError, match=rf"data\.train={name}: .* did you mean (easy_vqa|digits)\?"):
        as_files(DataConfig(train=name), "train")
    with pytest.raises(ConfigError, match=rf"data\.validation={name}: .* did you mean"):
        as_files(DataConfig(validation=name), "validation")
    for other in ("owner/digits", "digits.jsonl", "squad", None):
        assert as_files(DataConfig(validation=other), "validation").validation == other


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """One line with the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETHINKER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"RETHINKER_CACHE=.*data\.train=easy_vqa .* set RETHINKER_CACHE"):
        as_files(DataConfig(), "train")


def test_several_at_once(tmp_path, monkeypatch):
    """Ranks that find no file each write it whole; another version of the package has another file, and so have
    other sums, of which boards are made."""
    monkeypatch.setenv("RETHINKER_CACHE", str(tmp_path))
    monkeypatch.setitem(files.DATA_SETS, "digits", (few, ("train", "test"), "sklearn", "scikit-learn"))
    asked = (DataConfig(train="digits"), "train")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(load, [asked] * 3)
    assert found == [few("train")] * 3 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(files, "version", lambda name: "another")
    load(*asked)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(files, "sums", few)  # of another file
    load(*asked)
    assert len(list(tmp_path.iterdir())) == 3


def few(split: str):
    return [Query(f"{split}/{i}", f"{i}?", "1", ({"bytes": b"1"},) * i, {"category": "a"}) for i in range(3)]


def test_a_model_of_ones_own_is_its_folder(tmp_path, monkeypatch):
    """And a name on the hub is that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config()
    for name, folder in (("~/model", f"{tmp_path}/model"), ("owner/name", "owner/name")):
        config.policy.model = name
        assert model_folder(config, ALONE) == folder
