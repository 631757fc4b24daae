"""The one thing pyproject.toml cannot say: a wheel carries resources/ as mistudio/resources."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResources(build_py):
    """Copy the top-level resources folder into the package, except for an editable install."""

    def run(self) -> None:
        super().run()
        source = Path(__file__).parent / "resources"
        if not self.editable_mode and source.is_dir():
            target = Path(self.build_lib) / "mistudio" / "resources"
            shutil.copytree(source, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithResources})
