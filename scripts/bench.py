"""Benchmarks, each against an opponent in the same run: scripts/bench NAME [OPTIONS]. Nothing else should run beside.

loop           the training loop against a bare one, in one process
norms          a training step with every norm, over that with bn
probes         a measurement of every probe, over a training step

`scripts/bench NAME --help` has the options.
"""

import importlib
import sys

BENCHMARKS = {
    "loop": "benchmarks.loop",
    "norms": "benchmarks.norms",
    "probes": "benchmarks.probes",
}


def main() -> None:
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    if name not in BENCHMARKS:
        sys.exit(f"{name}: there is no such benchmark. Expected one of: {', '.join(BENCHMARKS)}.")
    sys.argv = [f"scripts/bench {name}", *words]
    importlib.import_module(BENCHMARKS[name]).main()


if __name__ == "__main__":
    main()
