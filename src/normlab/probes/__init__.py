"""Measurements while a network trains, none of which changes the training: every one works on a copy of the run."""

from normlab.probes.base import Probe, ProbedNetwork
from normlab.probes.registry import Probes
from normlab.probes.snapshot import StepSnapshot

__all__ = ["Probe", "ProbedNetwork", "Probes", "StepSnapshot"]
