"""Images read from a .zip or .tar as it is: the same questions as from a folder, by any number of readers."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data import archives
from rethinker.data.datasets import load_queries
from rethinker.data.images import UnreadableImageError, image_size, open_image
from tests.data.virl39k import make_rows, picture, write_fixture

FIELDS = {"images": "image", "id": "qid"}


def pack(folder, kind: str, members: dict[str, bytes]) -> str:
    path = folder / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w") as file:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_virl39k_from_an_archive_equals_the_folder(tmp_path, kind):
    """The questions are the same but for where their images start, and every image has the same pixels."""
    path = write_fixture(tmp_path)
    names = [name for row in make_rows(200) for name in row["image"]]
    archive = pack(tmp_path, kind, {f"./{name}" if n % 2 else name: picture(name) for n, name in enumerate(names)})
    folder = load_queries(DataConfig(train=str(path), fields=FIELDS), "train")
    packed = load_queries(DataConfig(train=str(path), fields=FIELDS, image_root=archive), "train")
    assert len(packed) == 200 and {len(q.images) for q in packed} == {0, 1, 2}
    assert (
        packed[3].metadata == {k: make_rows(4)[3][k] for k in packed[3].metadata} and packed[3].answer[:7] == "\\boxed{"
    )
    for a, b in zip(folder, packed, strict=True):
        assert (a.id, a.question, a.answer, a.metadata) == (b.id, b.question, b.answer, b.metadata)
        for one, other in zip(a.images, b.images, strict=True):
            assert other == f"{archive}/{os.path.relpath(one, tmp_path)}"
            assert open_image(one, a.id).tobytes() == open_image(other, a.id).tobytes()
    # A reference is a text: it pickles, and another process opens the archive for itself.
    assert pickle.loads(pickle.dumps(packed)) == packed
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sizes = pool.starmap(image_size, [(q.images[0], q.id) for q in packed[1:9]])
    assert sizes == [image_size(q.images[0], q.id) for q in packed[1:9]]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_threads_read_at_once(tmp_path, kind):
    """Threads share the open file; each gets its own member's bytes."""
    members = {f"{n}.bin": bytes([n]) * 200_000 for n in range(40)}
    archive = pack(tmp_path, kind, members)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: archives.open_member(archive, name, 10**6).read(), list(members) * 5))
    assert read == list(members.values()) * 5


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_path_leads_out_of_an_archive(tmp_path, kind):
    """Members that point outside are not there, `..` in a row finds nothing in the archive, links are no files."""
    (tmp_path / "secret.png").write_bytes(picture("1_red.png"))
    names = ["ok.png", "../secret.png", "/secret.png", "a/../../secret.png"]
    archive = pack(tmp_path, kind, dict.fromkeys(names, picture("1_red.png")))
    if kind == "tar":
        with tarfile.open(archive, "a") as file:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
            file.addfile(link)
    assert list(archives._members(archive)) == ["ok.png"]
    for name in ("../secret.png", "/secret.png", "a/../../secret.png", "link.png", "", "."):
        assert not archives.in_archive(f"{archive}/{name}")
        with pytest.raises(ValueError, match="has no file"):
            archives.open_member(archive, name, 10**6)
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a", "images": "a/../../secret.png"}\n')
    with pytest.raises(ConfigError, match="no image file"):
        load_queries(DataConfig(train=str(tmp_path / "rows.jsonl"), image_root=archive), "train")


def test_a_member_that_claims_gigabytes_is_not_read(tmp_path):
    """A zip bomb is refused by the size in its directory, naming the query."""
    archive = pack(tmp_path, "zip", {"bomb.png": bytes(30 * 2**20)})
    assert os.path.getsize(archive) < 10**5
    with pytest.raises(UnreadableImageError, match=r"query q.*bomb\.png .*31457280 bytes are too many"):
        open_image(f"{archive}/bomb.png", "q", max_pixels=1000)


def test_broken_archives_are_named(tmp_path):
    """What is no archive, or a compressed .tar, is one line that says what works; a damaged member names its query."""
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a", "images": "a.png"}\n')
    for kind, content in (("zip", b"nothing"), ("tar", b"\x1f\x8b" + bytes(600))):
        (tmp_path / f"images.{kind}").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"images\.{kind} is not a readable"):
            load_queries(
                DataConfig(train=str(tmp_path / "rows.jsonl"), image_root=str(tmp_path / f"images.{kind}")), "train"
            )
    archive = tmp_path / "damaged.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", picture("1_red.png"))
    content = bytearray(archive.read_bytes())
    content[60] ^= 255
    archive.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"query q: cannot read the image .*a\.png"):
        open_image(f"{archive}/a.png", "q")


def test_paths_through_archives_in_the_rows(tmp_path):
    """A row may lead into an archive itself; a folder that is called like one is a folder."""
    archive = pack(tmp_path, "zip", {"a.png": picture("1_red.png")})
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "folder.zip/b.png").write_bytes(picture("1_blue.png"))
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "q", "answer": "a", "images": ["images.zip/a.png", "folder.zip/b.png"]}\n'
    )
    (query,) = load_queries(DataConfig(train=str(tmp_path / "rows.jsonl")), "train")
    assert query.images == (f"{archive}/a.png", str(tmp_path / "folder.zip/b.png"))
    assert [open_image(image, "q").getpixel((0, 0)) for image in query.images] == [(255, 0, 0), (0, 0, 255)]
    assert Image.open(tmp_path / "folder.zip/b.png").size == (32, 32)
