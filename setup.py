"""What pyproject.toml cannot say: a wheel holds the folder conf/ as normlab/conf."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads conf/ where it is
            target = Path(self.build_lib, "normlab", "conf")
            shutil.rmtree(target, ignore_errors=True)  # a file that has left conf/ may be here from an earlier build
            shutil.copytree("conf", target)


setup(cmdclass={"build_py": BuildWithConf})
