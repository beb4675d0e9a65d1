"""The launchers, in the package that Hydra searches. Thin: every Hydra program of this environment imports this module.

(No __init__.py beside it: hydra_plugins is a namespace package that several distributions share.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from normlab.launchers.sweep import Sweep


class SweepLauncher(Launcher):
    """A launcher that is given a whole sweep, and checks every run of it before any starts."""

    here = True  # whether the runs will be on this machine

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the sweep's configuration."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the runs of these overrides.

        Raises:
            HydraException: in one of several processes.
            UserError: if a run is misconfigured or failed.
        """
        from normlab.launchers import sweep
        from normlab.training.distributed.processes import find

        if find().world > 1:
            raise HydraException(
                "A sweep (-m) starts processes of its own, and torchrun or srun has started several already.\n"
                "Start one run with torchrun, or the sweep without it; hydra/launcher=slurm can do both."
            )
        results = self.run(sweep.read(self.hydra_context, self.config, job_overrides, here=self.here))
        ended = []
        for overrides, result in zip(job_overrides, results, strict=True):
            ended.append(JobReturn(overrides=overrides, status=JobStatus.COMPLETED, task_name="normlab"))
            ended[-1].return_value = result
        return ended

    def run(self, sweep: "Sweep") -> Sequence[float | None]:
        """Launch a sweep; return each run's result, in the order of `sweep.folders`."""
        raise NotImplementedError


class PoolLauncher(SweepLauncher):
    """`hydra/launcher=pool`: see `normlab.launchers.pool`."""

    def __init__(self, slots: int | None, per_gpu: int | None, pack: int | None, mps: bool) -> None:
        self.slots, self.per_gpu, self.pack, self.mps = slots, per_gpu, pack, mps

    def run(self, sweep: "Sweep") -> Sequence[float | None]:
        """Train the runs on this machine."""
        from normlab.launchers import pool

        return pool.launch(sweep, self.slots, self.per_gpu, self.pack, self.mps)


class PlanLauncher(SweepLauncher):
    """`hydra/launcher=plan`: see `normlab.launchers.plan`."""

    def __init__(
        self, slots: int | None, per_gpu: int | None, pack: int | None, mps: bool, calibrate_seconds: float
    ) -> None:
        self.slots, self.per_gpu, self.pack, self.calibrate_seconds = slots, per_gpu, pack, calibrate_seconds

    def run(self, sweep: "Sweep") -> Sequence[float | None]:
        """Print the runs with their estimated costs."""
        from normlab.launchers import plan

        plan.show(sweep, self.slots, self.per_gpu, self.pack, self.calibrate_seconds)
        return sweep.results()


class SlurmLauncher(SweepLauncher):
    """`hydra/launcher=slurm`: see `normlab.launchers.slurm`."""

    here = False

    def __init__(self, cluster: DictConfig, **needs: Any) -> None:
        self.settings = {**needs, "cluster": OmegaConf.to_container(cluster, resolve=True)}

    def run(self, sweep: "Sweep") -> Sequence[float | None]:
        """Submit the runs."""
        from normlab.launchers import slurm

        return slurm.launch(sweep, slurm.parse(self.settings))
