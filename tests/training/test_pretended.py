"""The tests of the files pretended_*.py, in a few processes of their own.

PyTorch makes a thread for each device at the first backward pass of a process. So a pretended GPU has to be there
before, and a process that had one cannot fork another that trains, as other tests do.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PROCESSES = 3  # a start takes as long as three tests; fewer would be longer than what else there is for another worker


def functions() -> Iterator[str]:
    for file in sorted(HERE.glob("pretended_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{file.name}::{node.name}"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of PyTorch for CUDA")
@pytest.mark.parametrize("part", range(PROCESSES))
def test_on_a_pretended_gpu(tmp_path, part) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path}/of_it"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    tests = [str(HERE / function) for function in [*functions()][part::PROCESSES]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=HERE.parents[1],
        env=environment | {"NORMLAB_PRETENDED_GPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
