"""Tables, figures and verdicts of a study: python report.py study=my_study. conf/report.yaml is the manual.

A bare word in front of the settings is a command: `python report.py status` shows how far a study's runs are,
`python report.py claims` judges all claims over all studies, `python report.py results` puts all studies on one page,
`python report.py import source=results.csv` brings runs made elsewhere into a study.
"""

from normlab.cli.commands import report

if __name__ == "__main__":
    report()
