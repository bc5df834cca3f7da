"""The reader's way through the papers names what exists, and every claim."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = (ROOT / "docs/paper.md").read_text()
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")))
CLAIMS = range(1, 31)


def named(pattern):
    found = sorted(set(re.findall(pattern, PAPER)))
    assert found, f"docs/paper.md has nothing like {pattern}: this test checks nothing"
    return found


@pytest.mark.parametrize("name", named(r"`(test_\w+)`"))
def test_each_test_exists(name):
    assert re.search(rf"^ *def {name}\(", TESTS, re.MULTILINE), f"no test is called {name}"


@pytest.mark.parametrize("file", named(r"`((?:tests|recipes|lightning_dni|benchmarks)/[\w/]+\.\w+)`"))
def test_each_file_exists(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("target", named(r"\]\(([^)#:]+)(?:#[^)]*)?\)"))
def test_each_page_and_picture_exists(target):
    assert (ROOT / "docs" / target).is_file()


def test_each_test_is_in_the_file_that_is_named_before_it():
    pairs = re.findall(r"`(tests/[\w/]+\.py)`,\s+`(test_\w+)`", PAPER)
    assert len(pairs) > 5
    for file, name in pairs:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{name} is not in {file}"


@pytest.mark.parametrize("number", CLAIMS)
def test_each_claim_has_one_row_with_what_holds_it_and_a_number(number):
    (row,) = re.findall(rf"^\| {number} \|.*$", PAPER, re.MULTILINE)
    _, _, claim, held_by, found, _ = row.split("|")
    assert claim.strip()
    assert found.strip()
    words = re.findall(r"`([^`]+)`", held_by)
    assert words, f"claim {number} is held by nothing"
    for word in words:
        known = [ROOT / word, ROOT / "recipes" / f"{word}.yaml"]
        assert word.startswith("test_") or any(path.is_file() for path in known), f"there is no {word}"
