"""Where Hydra looks for launchers. Thin: every Hydra program of this environment imports this module.

(No __init__.py beside it: hydra_plugins is a namespace package that several distributions share.)
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PoolLauncher(Launcher):
    """`hydra/launcher=pool`: see `normlab.launchers.pool`."""

    def __init__(self, slots: int | None) -> None:
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from normlab.launchers import pool

        loader = self.hydra_context.config_loader
        composed = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        values = pool.launch(composed, self.slots)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value, task_name="normlab")
            for overrides, value in zip(job_overrides, values, strict=True)
        ]
