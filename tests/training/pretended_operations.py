"""How many operations a captured step launches: each costs a GPU two to four microseconds, however little it does."""

from pretended import PretendedGPU

LAUNCHED = {  # in a step of `small.SmallResNet`, torchvision's blocks with six norms, as measured, and three more
    "affine": 67,
    "bn": 68,
    "bn_frozen": 65,
    "bn_mean": 134,
    "bn_scaled": 68,
    "bn_var": 230,
    "bnminus": 66,
    "bnn_free": 333,
    "bnp": 200,
    "cbn": 824,
    "derf": 175,
    "dyt": 133,
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
    "mbn_style": 674,
    "mimicnorm": 77,
    "nf": 268,
    "noisy_bn": 122,
    "noisy_none": 107,
    "none": 53,
    "normprop": 147,
    "online": 704,
    "powernorm": 319,
    "renorm": 152,
    "skipinit": 62,
    "tbbn": 543,
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


def assert_few_operations(gpu: PretendedGPU, norm: str) -> None:
    """Of the last step that was captured."""
    names = {str(kernel) for kernel, *_ in gpu.captures[-1]}
    assert not {name for name in names if any(f".{wrong}" in name for wrong in NOT_DETERMINISTIC)}
    assert gpu.launched() <= LAUNCHED[norm]
