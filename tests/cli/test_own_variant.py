"""A variant from outside the package: one class, one YAML file in a folder of the user's own, a sweep."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# docs/extending.md shows these two files; a test below holds them together.
VARIANT = '''\
from normlab.norms import BatchStatistics, Variant, option


class HalfNorm(BatchStatistics):
    """y = gamma · x / E[x²]^power + beta: between no normalization (power 0) and that by the mean square (1/2)."""

    averages = {"running_square": 1.0}

    def normalize(self, x, groups):
        square = self.batch_mean(x.float().square())
        return self.scaled(x, square, groups), (square.detach(),)

    def evaluate(self, x):
        return self.scaled(x, self.running_square)

    def averages_of(self, mean, square):
        return (square,)

    def scaled(self, x, square, groups=1):
        scale = self.weight.repeat(groups) * (square + 1e-5) ** -self.power
        return x * scale[:, None, None] + self.bias.repeat(groups)[:, None, None]


class Half(Variant):
    power: float = option(0.25, ge=0)
    momentum: float = option(0.1, gt=0, le=1)

    def norm(self, norm):
        return HalfNorm(norm.num_features, **self.options)
'''
OPTIONS = """\
_target_: half_norm.Half
name: half
power: 0.25
momentum: 0.1
"""


@pytest.mark.slow
def test_it_runs_in_a_sweep_beside_the_shipped_ones(tmp_path, command) -> None:
    assert len([line for line in (VARIANT + OPTIONS).splitlines() if line]) < 30
    (tmp_path / "own" / "norm").mkdir(parents=True)
    (tmp_path / "half_norm.py").write_text(VARIANT)
    (tmp_path / "own" / "norm" / "half.yaml").write_text(OPTIONS)
    status, _, error = command(
        *("train.py", "-m", "--config-dir", "own", "norm=half,bn", "norm_batch=4,null", "model=custom", "batch=16"),
        *("model.target=small.SmallResNet", "model.name=small", "dataset.train_size=40", "epochs=1", "device=cpu"),
        "eval_stats=precise",
    )
    assert status == 0, error
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("outputs/default/*/config.yaml")]
    found = sorted((c["norm"]["name"], c["norm_batch"] or 0) for c in configs)
    assert found == [("bn", 0), ("bn", 4), ("half", 0), ("half", 4)]
    assert {c["norm"]["power"] for c in configs if c["norm"]["name"] == "half"} == {0.25}


def test_the_recipe_shows_exactly_this() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    assert VARIANT in page
    assert OPTIONS in page
