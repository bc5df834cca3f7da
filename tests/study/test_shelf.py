"""`lightning-dni recipes`, in a checkout and from an installed wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_dni
from lightning_dni.errors import StudyError
from lightning_dni.study.shelf import copy_recipe, main, recipe_files

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_every_recipe_is_listed_with_claim_and_minutes(capsys):
    assert list(recipe_files().values()) == RECIPES
    assert main([]) == 0
    said = capsys.readouterr().out
    for name in recipe_files():
        assert f"│ {name} " in said
    assert re.search(r"│ approximators +│ study ", said)
    assert re.search(r"│ gpt_pipeline +│ fit ", said)
    assert "The yardstick" in said


def test_a_recipe_is_copied_and_never_over_another(capsys):
    assert main(["copy", "digits_dni"]) == 0
    assert capsys.readouterr().out == "digits_dni.yaml\n"
    assert main(["copy", "digits_dni", "some/where/mine.yaml"]) == 0
    Path("folder").mkdir()
    assert copy_recipe("digits_dni", "folder") == Path("folder/digits_dni.yaml")
    assert copy_recipe("digits_dni", "new/") == Path("new/digits_dni.yaml")
    original = recipe_files()["digits_dni"].read_bytes()
    for copy in ("digits_dni.yaml", "some/where/mine.yaml", "folder/digits_dni.yaml"):
        assert Path(copy).read_bytes() == original
    with pytest.raises(StudyError, match=r"Expected DEST to be free, but 'digits_dni.yaml' exists"):
        copy_recipe("digits_dni")


def test_wrong_words_are_named(capsys):
    assert main(["copy", "digits"]) == 2
    assert f"Expected NAME to be one of {RECIPES[0].stem}, " in capsys.readouterr().err
    assert main(["copy"]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: lightning-dni recipes") == 2


@pytest.fixture(scope="module")
def installed(pytestconfig, tmp_path_factory):
    """The wheel that is made of the sdist, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="what builds the package")
    folder = tmp_path_factory.mktemp("build")
    for name in ("lightning_dni", "recipes"):
        shutil.copytree(
            pytestconfig.rootpath / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(pytestconfig.rootpath / name, folder)
    _build("sdist", folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder)
    source = next(folder.glob("lightning_dni-*/"))
    _build("wheel", source)
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def _build(kind, folder):
    code = f"from setuptools import build_meta; build_meta.build_{kind}('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=120)


def test_the_wheel_has_the_recipes_and_they_are_found_there(installed, monkeypatch):
    inside = sorted((installed / "lightning_dni/recipes").iterdir())
    assert [file.name for file in inside] == [file.name for file in RECIPES]
    monkeypatch.setattr(lightning_dni, "__file__", str(installed / "lightning_dni/__init__.py"))
    assert list(recipe_files().values()) == inside
    assert main(["copy", RECIPES[0].stem]) == 0
    assert Path(RECIPES[0].name).read_bytes() == RECIPES[0].read_bytes()
