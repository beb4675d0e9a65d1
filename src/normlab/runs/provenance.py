"""Compare what is recorded of how runs were made: code, versions, machine, threads.

provenance.json describes the process that trained last. Of a run that went on under other circumstances, `earlier` has
those of the segments before, oldest first, each with `until_step`: the number of steps after which the next one began.
Those that a finished run of fewer epochs trained have its name as `run`.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

UNKNOWN = "not recorded"
OWN_CODE = ("model.target", "norm._target_")  # settings that may name a user's own
_VERSIONS = {"torch": "torch", "torchvision": "torchvision", "numpy": "NumPy", "python": "Python"}
_NOT_COMPARED = ("normlab", "hydra-core")  # the first is in `code`, the other computes nothing
_FACTS = ("device", "instructions", "threads", "processes")


def code(made: Mapping[str, Any]) -> str:
    """Return the version of normlab and, of a checkout, its commit, with a digest of changes that are not in it."""
    versions, git = made.get("versions"), made.get("git")
    version = f"normlab {versions.get('normlab') if isinstance(versions, Mapping) else UNKNOWN}"
    if not isinstance(git, Mapping):
        return version
    if not git.get("commit"):
        return f"{version}, commit {UNKNOWN}"
    diff = str(git.get("diff") or "")
    changed = f" with changes {hashlib.sha256(diff.encode()).hexdigest()[:7]}" if diff else ""
    return f"{version}, commit {str(git['commit'])[:7]}{changed}"


def circumstances(made: Mapping[str, Any]) -> dict[str, str]:
    """Return what can change a result although no setting says so, in words, as far as it is recorded."""
    versions, own = made.get("versions"), made.get("own_code")
    own = own if isinstance(own, Mapping) else {}
    found = {}
    if isinstance(versions, Mapping):
        found = {"code": code(made)} | {
            word: str(versions[name]) for name, word in _VERSIONS.items() if name in versions
        }
        found |= libraries(made)
    found |= {name: str(made[name]) for name in _FACTS if name in made}
    codes = {name: own[name].get("code") for name in OWN_CODE if isinstance(own.get(name), Mapping)}
    if digest := weights_digest(made):
        found["trained weights"] = digest
    return found | {name: f"code {str(digest)[:7]}" for name, digest in codes.items()}


def weights_digest(made: Mapping[str, Any]) -> str:
    """Return the first digits of the digest of the trained weights that a run started from, or nothing."""
    start = made.get("weights")
    return str(start.get("sha256") or "")[:10] if isinstance(start, Mapping) else ""


def libraries(made: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the libraries that a run's network comes from, beside torch and torchvision."""
    versions = made.get("versions")
    known = versions.items() if isinstance(versions, Mapping) else ()
    return {name: str(version) for name, version in known if name not in {*_VERSIONS, *_NOT_COMPARED}}


def versions_of(modules: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed library that one of these modules is of.

    Not of torch and torchvision, which every run records, and not of one's own code.
    """
    packages = {module.partition(".")[0] for module in modules} - {"torch", "torchvision", "normlab"}
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    found = {}
    for package in sorted(packages):
        file = getattr(sys.modules.get(package), "__file__", None)
        if file and any(Path(file).resolve().is_relative_to(folder) for folder in installed):
            for name in metadata.packages_distributions().get(package, []):
                found[name] = metadata.version(name)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two provenances, e.g. `threads 1, then 2`; what one of them lacks is left out."""
    old, new = circumstances(before), circumstances(after)
    return [f"{name} {old[name]}, then {new[name]}" for name in old if old[name] != new.get(name, old[name])]


def segments(made: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the provenance of each segment of a run, the last one's at the end."""
    earlier = made.get("earlier")
    return [*(part for part in earlier if isinstance(part, Mapping)), made] if isinstance(earlier, list) else [made]


def earlier_segments(
    before: Mapping[str, Any], now: Mapping[str, Any], step: int, of: str = ""
) -> Sequence[Mapping[str, Any]]:
    """Return the segments of a run that goes on, without those that were like the one that follows.

    Args:
        before: the provenance that the run has.
        now: that of the process that goes on.
        step: the number of steps before it.
        of: the name of the run that it goes on from, if that is another one.
    """
    *earlier, last = segments(before)
    if of:
        own = {key: value for key, value in last.items() if key != "earlier"}
        return [*({"run": of, **part} for part in earlier), {**own, "until_step": step, "run": of}]
    if not last or not (differences(last, now) or last.get("host") != now.get("host")):
        return earlier
    return [*earlier, {key: value for key, value in last.items() if key != "earlier"} | {"until_step": step}]
