"""A file is downloaded whole and verified from the first mirror that has it, or not at all."""

import hashlib
import re
from functools import partial

import pytest

from lightning_dni.demos.mirror import fetch

CONTENT = b"what the mirror serves"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def good(serve, tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "file.gz").write_bytes(CONTENT)
    return serve(folder)


@pytest.fixture
def empty(serve, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return serve(folder)


@pytest.fixture
def tampered(serve, tmp_path):
    folder = tmp_path / "tampered"
    folder.mkdir()
    (folder / "file.gz").write_bytes(CONTENT + b"?")
    return serve(folder)


@pytest.fixture
def fetch_file(tmp_path):
    return partial(fetch, "file.gz", DIGEST, data_dir=tmp_path / "new" / "data")


def test_file_arrives_in_a_new_folder(good, fetch_file, tmp_path, capsys):
    path = fetch_file([good])
    assert path == tmp_path / "new" / "data" / "file.gz"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["file.gz"]
    assert "100%" in capsys.readouterr().err


def test_slash_after_the_mirror_is_optional(good, fetch_file):
    assert fetch_file([good.rstrip("/")]).read_bytes() == CONTENT


@pytest.mark.parametrize("bad", ["dead_mirror", "empty", "tampered"])
def test_next_mirror_is_tried(request, bad, good, fetch_file):
    assert fetch_file([request.getfixturevalue(bad), good]).read_bytes() == CONTENT


def test_all_mirrors_failing_names_file_folder_addresses_and_remedy(
    dead_mirror, empty, tampered, fetch_file, tmp_path
):
    with pytest.raises(ConnectionError, match=r"Expected `file\.gz` in `data_dir`") as caught:
        fetch_file([dead_mirror, empty, tampered])
    folder = tmp_path / "new" / "data"
    reasons = (
        f"{dead_mirror}file.gz: .*refused",
        f"{empty}file.gz: 404",
        f"{tampered}file.gz: .* does not match the known hash: expected sha256:{DIGEST} but got ",
        re.escape(f"Put the file into `{folder}` by hand"),
    )
    for reason in reasons:
        assert re.search(reason, str(caught.value))
    assert list(folder.iterdir()) == []


def test_no_mirrors_is_an_error(fetch_file):
    with pytest.raises(ConnectionError, match="every download failed: no mirrors were given"):
        fetch_file([])
