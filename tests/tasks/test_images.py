"""Images that cannot be read are found before training starts."""

from __future__ import annotations

import pytest
from PIL import Image

from rethinker.config import ConfigError
from rethinker.samples import Query
from rethinker.tasks import images
from rethinker.tasks.images import check_images


def queries(folder, count: int, broken: int | None = None) -> list[Query]:
    result = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
        if number == broken:
            path.write_bytes(path.read_bytes()[:60])  # a whole header, and then nothing: only decoding notices
        result.append(Query(f"q{number}", "what?", "a", (str(path),)))
    return result


def test_a_truncated_image_is_named(tmp_path):
    """The query and the file are named, although the file's header is whole."""
    broken = queries(tmp_path, 5, broken=3)
    assert images.image_size(broken[3].images[0], "q3") == (32, 32)
    with pytest.raises(ConfigError, match=r"q3.*3\.png"):
        check_images(broken)


def test_each_image_is_decoded_once_and_within_the_budget(tmp_path, monkeypatch):
    """Queries about the same image share its check; a large data set costs no more than the budget."""
    decoded = []
    monkeypatch.setattr(images, "check_image", lambda reference, query_id, limit: decoded.append(reference))
    some = queries(tmp_path, 4)
    check_images(some + some)
    assert len(decoded) == 4
    decoded.clear()
    check_images(some, budget_s=-1)
    assert len(decoded) == 1
