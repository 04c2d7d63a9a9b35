"""Images that lie in the data itself: in memory up to a limit, then in a file, and nobody can tell which."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data import image_cache as embedded
from rethinker.data.datasets import load_queries
from rethinker.data.images import open_image


def noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Twenty questions about ten images, room for three of them in memory."""
    monkeypatch.setenv("RETHINKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "IN_MEMORY_BYTES", 3 * len(noise(0)) + 100)
    rows = [{"question": f"{i}", "answer": "1", "images": [{"bytes": noise(i % 10), "path": None}]} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    return DataConfig(train=str(tmp_path / "d.parquet"))


def test_images_beyond_the_limit_are_references(data, tmp_path):
    """Every image comes back to the bit; equal ones have one place; what is kept in memory stays within the limit."""
    queries = load_queries(data, "train")
    (file,) = (tmp_path / "cache").glob("*.zip")
    references = [query.images[0] for query in queries]
    in_memory = [reference for reference in references[:10] if isinstance(reference, dict)]
    assert len(in_memory) == 3 and references[:10] == references[10:]
    assert all(str(file) in reference for reference in references if isinstance(reference, str))
    for number, reference in enumerate(references):
        assert open_image(reference, "q").tobytes() == Image.open(io.BytesIO(noise(number % 10))).tobytes()
    assert len(pickle.dumps(references[3])) < 300


def test_the_file_is_written_once_and_belongs_to_one_version_of_the_data(data, tmp_path):
    """A second load finds it; changed data has another; a load that fails leaves none."""
    queries = load_queries(data, "train")
    (file,) = (tmp_path / "cache").glob("*.zip")
    before = file.stat()
    assert load_queries(data, "train") == queries and file.stat() == before
    rows = [{"question": "q", "answer": "1", "images": [{"bytes": noise(100 + i), "path": None}]} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist([*rows, {"question": None, "answer": None}]), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match="no question text"):
        load_queries(data, "train")
    assert list((tmp_path / "cache").glob("*.zip")) == [file] and not list((tmp_path / "cache").glob(".*"))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert len(load_queries(data, "train")) == 9 and len(list((tmp_path / "cache").glob("*.zip"))) == 2


def test_a_cache_that_cannot_be_written_is_named(data, tmp_path, monkeypatch):
    """One line with the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETHINKER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="RETHINKER_CACHE=.*room for all of them"):
        load_queries(data, "train")
