"""Measurements while a network trains, none of which changes the training: every one works on a copy of the run."""

from normlab.probes.activations import Activations
from normlab.probes.affine import Affine
from normlab.probes.base import Probe, Subject
from normlab.probes.gradients import Gradients
from normlab.probes.ics import ICS
from normlab.probes.landscape import Landscape
from normlab.probes.schedule import Probes
from normlab.probes.sharpness import Sharpness
from normlab.probes.snapshot import StepSnapshot

__all__ = [
    "ICS",
    "Activations",
    "Affine",
    "Gradients",
    "Landscape",
    "Probe",
    "Probes",
    "Sharpness",
    "StepSnapshot",
    "Subject",
]
