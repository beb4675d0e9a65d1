"""Benchmarks, each against an opponent in the same run: scripts/bench [NAME] [OPTIONS]. Nothing else should run beside.

speed          normlab, a plain PyTorch loop, Lightning and a tuned loop: images per second, memory, sweep, start
sweep, start   that part of `speed` alone
packing        the sweep at five seeds, 60 runs, against as many of the plain loop one after the other
records        reading the records of 10,000 runs, against pandas
page           the HTML page of 1,000 runs in a real Chromium, against that of 12
where          where the time of a training step goes
loop           the training loop against a bare one, in one process
norms          a training step with every norm, over that with bn
probes         a measurement of every probe, over a training step

Without a name: speed. `scripts/bench NAME --help` has the options.
"""

import importlib
import sys

BENCHMARKS = {  # the module, and words that go before those of the command line
    "speed": ["benchmarks.speed"],
    "sweep": ["benchmarks.speed", "--what", "sweep"],
    "start": ["benchmarks.speed", "--what", "start"],
    "packing": ["benchmarks.speed", "--what", "sweep", "--seeds", "5", "--contender", "normlab", "plain"],
    "records": ["benchmarks.records"],
    "page": ["benchmarks.page"],
    "where": ["benchmarks.where"],
    "loop": ["benchmarks.loop"],
    "norms": ["benchmarks.norms"],
    "probes": ["benchmarks.probes"],
}


def main() -> None:
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    name = words.pop(0) if words and not words[0].startswith("-") else "speed"
    if name not in BENCHMARKS:
        sys.exit(f"{name}: there is no such benchmark. Expected one of: {', '.join(BENCHMARKS)}.")
    module, *first = BENCHMARKS[name]
    sys.argv = [f"scripts/bench {name}", *first, *words]
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
