"""How many operations a captured step launches: each costs a GPU two to four microseconds, however little it does."""

from pathlib import Path

import pytest
from pretended import pretended

from normlab.training.run import train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
# Four steps, the last of which is captured, of torchvision's blocks with six norms.
SMALL = (
    *("model.target=small.SmallResNet", "model.name=small_resnet", "dataset.train_size=64", "epochs=1"),
    *("device=cuda", "engine=graph"),
)
LAUNCHED = {  # as measured, and three more
    "affine": 67,
    "bn": 68,
    "bn_frozen": 65,
    "bn_scaled": 68,
    "bnminus": 66,
    "bnp": 200,
    "evonorm_b0": 233,
    "evonorm_s0": 208,
    "fixup": 85,
    "frn": 202,
    "gn": 67,
    "in": 67,
    "ln": 67,
    "lp1": 158,
    "lp2": 176,
    "lpinf": 212,
    "mabn": 248,
    "mimicnorm": 77,
    "nf": 268,
    "noisy_bn": 122,
    "noisy_none": 107,
    "none": 53,
    "normprop": 147,
    "powernorm": 319,
    "renorm": 152,
    "wn": 138,
    "wn_mean": 182,
    "wn_trelu": 162,
}
# With deterministic=true they raise an error on a GPU, read values on the host, or sort their indices first.
NOT_DETERMINISTIC = (
    *("scatter", "index_put", "index_add", "index_copy", "put_", "cumsum", "histc", "bincount", "kthvalue", "median"),
    *("interpolate", "upsample", "adaptive_avg_pool", "adaptive_max_pool", "grid_sampler", "replication_pad"),
    *("reflection_pad1d", "nll_loss2d", "max_pool3d", "avg_pool3d", "embedding_bag"),
)


@pytest.mark.parametrize("norm", NORMS)
def test_a_captured_step_launches_few_operations(tiny, norm) -> None:
    extra = {"bnp": ["optimizer.precondition=bnp"]}.get(norm, [])
    with pretended() as gpu:
        train_run(tiny(*SMALL, f"norm={norm}", *extra))
    names = {str(kernel) for kernel, *_ in gpu.captures[-1]}
    assert not {name for name in names if any(f".{wrong}" in name for wrong in NOT_DETERMINISTIC)}
    assert gpu.launched() <= LAUNCHED[norm]
