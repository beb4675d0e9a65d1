"""Train one run, or a sweep with -m. `conf/config.yaml` is the menu; `python train.py --help` shows it.

`python train.py doctor`, with or without settings, trains nothing and tells what a run would meet on this machine.
"""

from normlab.cli.commands import train

if __name__ == "__main__":
    train()
