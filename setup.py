"""What pyproject.toml cannot say: the recipes, which lie beside the package, go into it in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Modules, and the YAMLs of `recipes/` as `lightning_dni/recipes/`."""

    def run(self) -> None:
        """Build; an editable install finds the recipes where they are."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "lightning_dni" / "recipes"
            self.mkpath(str(folder))
            for file in sorted(Path("recipes").glob("*.yaml")):
                self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithRecipes})
