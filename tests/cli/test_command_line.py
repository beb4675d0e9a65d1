"""Command lines as people type them: what Hydra is given, and the sentence for what it would not understand."""

import re

import pytest
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from normlab.common.errors import UserError
from normlab.common.installation import CONF
from normlab.config.command_line import _CHOICES, FLAGS, CommandLine, read, readable
from normlab.config.explanations import explain
from normlab.config.hydra import settings_of
from normlab.config.schema import parse

COMMANDS = {"train": ("doctor",), "report": ("status", "claims", "results", "import", "pack", "verify", "next")}


def line(text: str, script: str = "train") -> CommandLine:
    """The words are separated by two spaces where one of them has a space."""
    return read(text.split("  " if "  " in text else " "), script, COMMANDS[script])


def test_the_flags_are_hydras() -> None:
    known = {}
    for action in get_args_parser()._actions:
        if action.option_strings:
            long = next(name for name in action.option_strings if name.startswith("--"))
            known[long] = "".join(name for name in action.option_strings if name != long)
            assert tuple(action.choices or ()) == _CHOICES.get(long, ())
    assert known == FLAGS


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("study=x -m norm=bn,none", "--multirun study=x norm=bn,none"),
        ("norm=bn,none seed=0,1 -m", "--multirun norm=bn,none seed=0,1"),
        ("norm=bn --multi seed=1 -m", "--multirun norm=bn seed=1"),
        ("study=x --cfg job norm=gn", "--cfg=job study=x norm=gn"),
        ("-c job --resolve norm=gn -p norm", "--cfg=job --resolve --package=norm norm=gn"),
        ("norm=gn --info seed=1", "--info=all norm=gn seed=1"),
        ("norm=gn -i defaults seed=1", "--info=defaults norm=gn seed=1"),
        ("-- norm=gn", "norm=gn"),
        (" norm=gn   seed =1", "norm=gn seed=1"),
        ("-m norm=gn,bn norm.groups=8", "--multirun norm=gn,bn norm.groups=choice(8)"),
        ("-m norm=glob(b*) norm.eps=1,2 seed=1", "--multirun norm=glob(b*) norm.eps=choice(1,2) seed=1"),
        ("-m norm=gn,bn optimizer.lr=8", "--multirun norm=gn,bn optimizer.lr=8"),
        ("experiment=e norm.eps=1 cluster.x=1", "experiment=e norm.eps=choice(1) cluster.x=1"),
        ("norm=gn norm.groups=8", "norm=gn norm.groups=8"),
    ],
)
def test_flags_and_settings_come_in_any_order(typed, words) -> None:
    assert line(typed).words() == words.split(" ")


@pytest.mark.parametrize(
    "typed", ["doctor -m norm=bn", "-m doctor norm=bn", "norm=bn -m doctor", "-m norm=bn doctor", "norm=bn doctor -m"]
)
def test_a_command_stands_anywhere(typed) -> None:
    assert line(typed).command == "doctor"
    assert line(typed).words() == ["--multirun", "norm=bn"]
    assert line("study=x status quiet=true", "report").command == "status"


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        *((text, text) for text in ("größe", "a=b", "a:b", "out#1", "out;1", "a&b", "<a>", "50%", "it's", 'say "a"')),
        *(
            (text, text)
            for text in ("my photos (1)", "a[1]", "a{1}", "C:\\Users\\me", "ü\\", "ü'\\\"", "x!", "$HOME/x")
        ),
        ("~/out", "/home/me/out"),
        ("~/ö", "/home/me/ö"),
        ("1e-3", 0.001),
        ("08", "08"),
        ("null", None),
        ("Yes", "Yes"),
        ("True", True),
        ("[1,2]", [1, 2]),
        ("{a:1}", {"a": 1}),
        ("'~/out'", "~/out"),
        ("${a}/x", "${a}/x"),
        ("", ""),
    ],
)
def test_text_needs_no_quotes(value, read_as, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parsed = OverridesParser.create().parse_override(readable(f"key={value}"))
    assert parsed.value() == read_as
    assert type(parsed.value()) is type(read_as)


def test_each_of_several_values_is_read_as_text(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parsed = OverridesParser.create().parse_override(readable("output_dir=~/a,ö,1.5,b"))
    assert list(parsed.sweep_string_iterator()) == ["/home/me/a", "'ö'", "'1.5'", "b"]


def test_what_is_a_name_is_read_as_one() -> None:
    for value in ("1e3", "1.5", "2024", "true", "inf", ".5"):
        assert OverridesParser.create().parse_override(readable(f"study={value}")).value() == value
        assert not isinstance(OverridesParser.create().parse_override(readable(f"eps={value}")).value(), str)


REFUSED = {  # by our own reading of the words
    "norm bn": ["Did you mean: python train.py norm=bn\n"],
    "norm = bn": ["Did you mean: python train.py norm=bn\n"],
    "norm= bn": ["Did you mean: python train.py norm=bn\n"],
    "norm:bn": ["Did you mean: python train.py norm=bn\n"],
    "norm bn depth 34 seed=1": ["python train.py norm=bn depth=34 seed=1\n"],
    "optimizer.lr 0.1": ["python train.py optimizer.lr=0.1\n"],
    "norm=bn none": ["python train.py -m norm=bn,none\n"],
    "-m norm=bn, none": ["python train.py -m norm=bn,none\n"],
    "-m norm=bn ,none": ["python train.py -m norm=bn,none\n"],
    "bn": ["Did you mean norm=bn?"],
    "cifar10": ["Did you mean dataset=cifar10?"],
    "depth": ["Did you mean depth=...?"],
    "doctr": ["Did you mean doctor?"],
    "status": ["Did you mean: python report.py status\n"],
    "--norm=bn": ["no dashes", "python train.py norm=bn\n"],
    "--norm bn seed=1": ["no dashes", "python train.py norm=bn seed=1\n"],
    "-m --optimizer.lr 1": ["no dashes", "python train.py -m optimizer.lr=1\n"],
    "--batch-size 32": ["--batch-size", "Did you mean batch=...?"],
    "--mulitrun": ["Did you mean --multirun?"],
    "--bogus": ["--bogus: there is no such flag", "-m (a sweep)"],
    "-x": ["-x: there is no such flag"],
    "--multirun=1": ["--multirun takes no value"],
    "--help=1": ["--help takes no value"],
    "--cfg": ["one of job, hydra, all"],
    "--cfg norm=bn": ["one of job, hydra, all"],
    "--cfg jobs": ["Did you mean --cfg job?"],
    "--info defalts": ["Did you mean --info defaults?"],
    "-m --cfg job": ["--multirun and --cfg do not go together", "hydra/launcher=plan"],
    "--info -m": ["do not go together"],
    "-r -m": ["--run and --multirun"],
    "--resolve": ["Add --cfg job"],
    "-p norm norm=bn": ["--package", "Add --cfg job"],
    "--config-dir nothere": ["nothere: there is no such folder"],
    "--config-dir": ["--config-dir needs a value"],
    "--config-path nothere": ["nothere: there is no such folder"],
    "--experimental-rerun x.pickle": ["pickle", "config.yaml"],
    "--shell-completion": ["install=bash"],
    "-sc install=csh": ["bash, fish, zsh"],
    "-sc query=bash": ["the shell's own"],
    "norm=[bn,none]": ["a run has one norm", "python train.py -m norm=bn,none\n"],
    "-m dataset=[digits,cifar10] seed=1": ["python train.py -m dataset=digits,cifar10 seed=1\n"],
    "-m norm=[bn,none],[gn]": ["a run has one norm", "python train.py -m norm=bn,none,gn\n"],
    "hydra.launcher=plan": ["Write hydra/launcher=plan"],
    "hydra/launcher=plan norm=bn": ["a sweep needs -m", "  python train.py -m hydra/launcher=plan norm=bn\n"],
    "hydra.launcher.slots=1": ["a sweep needs -m", "python train.py -m hydra.launcher.slots=1\n"],
    "help norm=bn": ["Did you mean: python train.py --help\n"],
    "plan norm=bn,none": ["Did you mean: python train.py -m hydra/launcher=plan norm=bn,none\n"],
    "report study=x": ["Did you mean: python report.py study=x\n"],
    "train norm=bn": ["Leave train out: python train.py norm=bn\n"],
    "-cn report": ["the menu of python report.py"],
    "--cfg= norm=bn": ["--cfg needs a value"],
    "study=\udcff": ["UTF-8"],
    "-": ["no such command"],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_no_setting_is_answered_with_what_was_meant(typed, monkeypatch) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    with pytest.raises(UserError) as error:
        line(typed)
    assert len(str(error.value).splitlines()) <= 5
    for word in REFUSED[typed]:
        assert word in f"{error.value}\n"


def test_an_experiment_of_one_run_is_no_sweep(tmp_path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nepochs: 2\n")
    typed = f"--config-dir {tmp_path} experiment=mine dataset.train_size=64"
    assert line(typed).words()[-1] == "dataset.train_size=64"
    shown = line("experiment=small_batch dataset.train_size=64 --cfg job")
    assert shown.words()[-1] == "dataset.train_size=64"
    assert line("experiment=small_batch dataset.train_size=64").words()[-1] == "dataset.train_size=choice(64)"
    assert line("experiment=small_batch hydra.mode=RUN dataset.train_size=64").words()[-1] == "dataset.train_size=64"


def test_a_choice_that_another_replaces_is_told() -> None:
    assert line("norm=bn seed=1 batch=8 -m norm=none seed=1 batch=16 dataset=digits dataset=digits").replaced() == [
        "norm=bn has no effect: norm=none after it replaces it."
    ]


def test_the_words_of_a_report_are_known() -> None:
    for typed, word in {
        "study my": "python report.py study=my",
        "stauts": "Did you mean status, or study=stauts?",
        "my_study": "Did you mean study=my_study?",
        "doctor": "python train.py doctor",
        "pack import": "import: there is a command already, pack.",
        "claims --study=x": "python report.py claims study=x",
    }.items():
        with pytest.raises(UserError) as error:
            line(typed, "report")
        assert word in str(error.value)


def answer(text: str, script: str = "train") -> str:
    """The sentence for a command line that composes no valid run."""
    given = line(text, script)
    mode = RunMode.MULTIRUN if "--multirun" in given.flags else RunMode.RUN
    name = "config" if script == "train" else "report"
    words = [word for word in given.words() if not word.startswith("--")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            composed = loader.load_configuration(name, words, run_mode=mode)
            with open_dict(composed):
                composed.pop("hydra")
            parse(settings_of(composed))
        except UserError as error:
            return str(error)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return str(explain(error, given))
    raise AssertionError("this is valid")


EXPLAINED = {
    "norm=bn,none seed=1": ["needs -m", "  python train.py -m norm=bn,none seed=1"],
    "seed=range(0,3)": ["needs -m", "  python train.py -m 'seed=range(0,3)'"],
    "probe=ics,gradients": ["All of them in one run: probe=[ics,gradients]"],
    "output_dir=a,b": ["'output_dir=\"a,b\"'"],
    "doctor norm=bn,none": ["doctor looks at one set of settings", "norm=bn"],
    "--cfg job norm=bn,none": ["--cfg shows one set of settings", "norm=bn"],
    "seed=range(0,3": ["not closed: ( without )"],
    "seed=[1": ["not closed: [ without ]"],
    "norm='bn": ["quote is not closed"],
    "norm=bn,": ["A value is missing", "comma"],
    "seed=rnage(0,3)": ["rnage(...) is no function. Did you mean range(...)?"],
    "seed=range(a,b)": ["Cannot understand 'seed=range(a,b)'", "Examples"],
    "optimizer.betas[0]=3": ["optimizer.betas is set as a whole"],
    "a b=c  seed=1": ["without spaces"],
    "=bn": ["no name before"],
    "output_dir=${HOME}/x": ["output_dir refers to ${HOME}", "${oc.env:HOME}"],
    "output_dir=${oc.env:NO_SUCH}/x": ["environment variable NO_SUCH, which is not set", "${oc.env:NO_SUCH,default}"],
    "output_dir=${output_dir}/x": ["output_dir refers to itself"],
    "output_dir=${home:1}/x": ["${home:...}, which there is not"],
    "output_dir=${}": ["Cannot understand 'output_dir=${}'"],
    "+norm=bn": ["+norm=bn", "without a plus: norm=bn"],
    "++norm=bn": ["without a plus: norm=bn"],
    "+seed=1": ["without a plus: seed=1"],
    "norm=${foo}": ["norm=${foo}: a group takes the name of one of its files", "norm=..."],
    "~dataset dataset.train_size=64": ["~dataset leaves out dataset, which every run has"],
    "~probe": ["no probe is chosen"],
    "~nothing": ["~nothing: there is no such setting"],
    "norm@x=bn": ["norm@x=bn", "Write norm=bn"],
    "x/norm=bn": ["Write norm=bn"],
    "norm=5": ["norm=5: there is no such option of norm"],
    "optimizer={x:1}": ["optimizer.x"],
    "norm=bn norm.groups=8": ["norm.groups", "with norm=bn", "norm=evonorm_s0, norm=gn"],
    "probe.ics.times=7": ["It belongs to probe=ics."],
    "lr=0.1": ["Did you mean optimizer.lr=...?"],
    "launcher=plan": ["Did you mean hydra/launcher=...?"],
    "study=1,5": ["study=1,5 has several values", "python train.py -m study=1,5", "'study=\"1,5\"'"],
    "--info config norm=bn,none": ["--info shows one set"],
    "-r norm=bn,none": ["python train.py -m norm=bn,none"],
    "~hydra.launcher": ["~hydra.launcher: this cannot be left out"],
    "-m hydra.launcher.solts=2": ["Did you mean hydra.launcher.slots=...?"],
    "hydra.nothing=2": ["--cfg hydra"],
    "hydra.mode=BOTH": ["hydra.mode=BOTH is not valid: expected one of RUN, MULTIRUN"],
    "hydra.job.chdir=x": ["hydra.job.chdir=x is not valid: expected true or false"],
    "-m hydra.launcher.slots=1,2": ["one value"],
    "norm._target_=": ["norm._target_= is not valid: expected a dotted path"],
    "schedule=step schedule.milestones=0.5,0.9": [
        "Write: python train.py schedule=step 'schedule.milestones=[0.5,0.9]'"
    ],
    "norm=syncbn": ["norm=bn", "sync_stats=true"],
    "device=gpu": ["Did you mean device=cuda?"],
    "norm=bn;none": ["Did you mean norm=none?"],
    "quiet=yes": ["Did you mean quiet=true?"],
    "quiet=0": ["Did you mean quiet=false?"],
    "norm=none norm.conv_bias=on": ["Did you mean norm.conv_bias=true?"],
    "norm_batch=None": ["norm_batch=null"],
    "output_dir=": ["output_dir= is empty"],
    "batch=": ["batch= is empty"],
    "device=0": ["Did you mean device=cuda:0?"],
    "batch='8.5'": ["batch='8.5' is not valid: expected a whole number"],
    "seed=[1,2]": ["-m seed=1,2"],
    "optimizer.lr=1/3": ["optimizer.lr=1/3 is not valid: expected a number"],
}
INTERNAL = (
    r"Exception|_key|object_type|LexerNo|EOF|viable|mismatched|full_|override grammar|OmegaConf|Error\b|defaults list"
)


@pytest.mark.parametrize("typed", EXPLAINED)
def test_what_hydra_refuses_is_a_sentence(typed, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    text = answer(typed)
    assert 1 <= len([line for line in text.splitlines() if line.strip()]) <= 5, text
    assert not re.search(INTERNAL, text), text
    for word in EXPLAINED[typed]:
        assert word in text, text


def test_what_a_report_refuses_is_a_sentence() -> None:
    assert "python report.py 'arms=[bn,none]' study=x" in answer("arms=bn,none study=x", "report")
    assert "'study=\"a,b\"'" in answer("study=a,b", "report")
    assert "alpha, arms, baseline" in answer("norm=bn", "report")
    assert "\"arms=['...']\"" in answer("arms=[gn (groups=4)]  study=x", "report")
    assert "'set={name: value, other: value}'" in answer("set={a=b}", "report")


@pytest.mark.parametrize("typed", ["depth='18'", 'depth="18"', "depth=18.0", "depth=1.8e1", "depth=${oc.env:DEPTH}"])
def test_a_whole_number_is_one_however_it_is_written(make, typed, monkeypatch) -> None:
    monkeypatch.setenv("DEPTH", "18")
    assert make(typed).as_dict() == make("depth=18").as_dict()


def test_a_switch_can_come_as_a_text(make) -> None:
    assert make("dataset.flip='True'").dataset.flip is True
    assert make("norm=none", "norm.conv_bias='false'").norm.options == {"conv_bias": False}
