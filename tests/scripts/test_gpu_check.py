"""`scripts/gpu_check`: tried whole on a pretended GPU; its parts keep to their limits, and are not repeated."""

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch

from gpu_checks import bundle, engines, limited, needs, parts, stages
from gpu_checks.parts import Checked, Part

ROOT = Path(__file__).parents[2]
FACTS: dict[str, Any] = {
    "tiny": False,
    "lacking": [],
    "machine": {
        **{"gpu": "a GPU", "memory_bytes": 2**30, "processor": "a CPU", "cores": 2, "cuda": "13"},
        **{"versions": {"torch": "2"}, "date": "2026-01-01"},
    },
}


needs_pretence = pytest.mark.skipif(not torch.version.cuda, reason="a pretended GPU needs a CUDA build of PyTorch")


# The whole


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`check("correct")`: the exit status and the output of the command, in which every Python sees a GPU."""

    def command(*words: str) -> tuple[int, str]:
        paths = [ROOT / "tests" / "everywhere", ROOT / "src", ROOT / "tests"]
        environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        script = [ROOT / "scripts" / "gpu_check", tmp_path / "found", "--tiny", "--bundle", tmp_path / "bundle"]
        options = {"capture_output": True, "text": True, "env": {**os.environ, **environment}}
        done = subprocess.run([*script, "--limit", "3000", *words], check=False, **options)
        return done.returncode, done.stdout + done.stderr

    return command


@pytest.mark.slow
@needs_pretence
def test_all_stages_on_a_pretended_gpu_and_once_more(tmp_path: Path, check: Callable[..., tuple[int, str]]) -> None:
    """Of which the profiler alone sees nothing; torch.compile leaves its steps as they are."""
    status, output = check()
    folder = tmp_path / "found"
    results = json.loads((folder / "results.json").read_text())
    states = {
        f"{stage} {name}": one["state"] for stage, each in results["stages"].items() for name, one in each.items()
    }
    assert states.pop("correct profile") == "failed"
    assert set(states.values()) == {"ok"}, output
    assert status == 1
    assert "Not finished: correct profile (failed)" in output
    why = results["stages"]["correct"]["profile"]["why"]
    assert why.startswith("The profiler of PyTorch cannot see kernels here")

    assert sorted(path.name for path in folder.iterdir()) == [
        *("correct.log", "records.zip", "results.json", "speed.json", "speed.log", "summary.md", "sweeps.log")
    ]
    found = results["found"]
    assert {one["outcome"] for one in found["correct"]["tests"]["outcomes"].values()} == {"passed"}
    assert [one["wrong"] for one in found["correct"]["engines"]["launched"].values()] == [{}, {}, {}]
    assert found["sweeps"]["sweep"]["states"] == {"done": 2}
    assert found["sweeps"]["sweep"]["captured"] == 2
    assert found["sweeps"]["again"]["trained"] == 0
    assert found["sweeps"]["plain"]["extrapolated"] == found["sweeps"]["plain"]["measured"]  # of one seed
    assert found["sweeps"]["experiments"]["studies"] == {"one_more": {"done": 1}}
    (measured,) = json.loads((folder / "speed.json").read_text())["speed"]
    assert measured["rounds"].keys() >= {"normlab", "plain", "compile"}
    assert not measured["unavailable"]
    with zipfile.ZipFile(folder / "records.zip") as packed:
        assert packed.namelist() == ["sweep.normlab.zip", "one_more.normlab.zip"]
    summary = (folder / "summary.md").read_text()
    assert "Tiny sizes" in summary
    assert "Pretended GPU (80 GiB)" in summary
    assert all(f"## {stage}: {name}" in summary for stage, each in found.items() for name in each)

    status, output = check()
    again = json.loads((folder / "results.json").read_text())
    assert status == 1
    assert output.count("done before") == len(states)
    assert again["stages"]["correct"]["profile"]["tries"] == 2
    assert again["found"] == found
    assert {name: one["tries"] for name, one in again["stages"]["sweeps"].items()} == dict.fromkeys(
        results["stages"]["sweeps"], 1
    )


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py", tmp_path / "found"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "It needs Python 3.11 or newer" in done.stdout
    assert "finds no CUDA device here" in done.stderr


def test_an_unknown_word_is_a_folder_and_two_are_refused() -> None:
    words = [sys.executable, ROOT / "scripts" / "gpu_check.py", "corect", "sped"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "corect and sped: one folder at most. Stages: correct, speed, sweeps" in done.stderr


# Parts


def python(code: str, name: str = "part", limit: float = 30.0, **options: Any) -> Part:
    return Part(name, "does something", limit, [sys.executable, "-c", code], **options)


def state(checked: Checked, name: str = "part") -> dict[str, Any]:
    written = json.loads((checked.folder / "results.json").read_text())
    outcome: dict[str, Any] = written["stages"]["correct"][name]
    return outcome


def test_a_part_that_is_finished_is_not_repeated_and_one_that_failed_is(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    for expected in ("x", "x"):
        Checked(tmp_path, FACTS).carry_out("correct", python(count))
        assert (tmp_path / "count").read_text() == expected
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python(count), again=True)
    assert (tmp_path / "count").read_text() == "xx"
    for tries in (1, 2):
        checked = Checked(tmp_path, FACTS)
        checked.carry_out("correct", python("raise SystemExit('it is broken')", "broken"))
        assert (state(checked, "broken")["tries"], state(checked, "broken")["why"]) == (tries, "it is broken")
    assert not checked.carry_out("correct", python(count))
    assert checked.carry_out("correct", python(count + " # with another size"))
    assert checked.unfinished(["correct"]) == ["correct broken (failed)"]
    assert "| correct | broken | failed: it is broken |" in checked.summary.read_text()


def test_a_part_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    child = "import time; open('alive', 'w').close(); time.sleep(600)"
    code = f"import os, subprocess, sys, time; os.chdir({str(tmp_path)!r})\n"
    code += f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); time.sleep(600)"
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python(code, limit=parts.SHORTEST_SECONDS))
    assert state(checked)["state"] == "timed out"
    number = int(state(checked)["said"][-1])
    ends = time.monotonic() + 30
    while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
        assert time.monotonic() < ends


def test_a_part_is_not_begun_without_time_and_one_that_was_cut_off_is_tried_again(tmp_path: Path) -> None:
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python("print('here')", limit=1.0))
    assert state(checked) == {
        **{"state": "not run", "tries": 0, "why": "no time was left"},
        **{"what": "does something", "fills": False},
    }
    results = json.loads((tmp_path / "results.json").read_text())
    results["stages"]["correct"]["part"] |= {"state": "cut off", "tries": 1}  # as a killed command leaves it
    (tmp_path / "results.json").write_text(json.dumps(results))
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python("print('here')"))
    assert (state(checked)["state"], state(checked)["tries"]) == ("ok", 2)


def test_a_part_that_fills_the_time_may_end_in_part(tmp_path: Path) -> None:
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python(f"raise SystemExit({parts.UNFINISHED})", fills=True))
    assert state(checked)["state"] == "in part"
    assert not checked.unfinished(["correct"])


def test_what_a_part_found_is_in_the_summary(tmp_path: Path) -> None:
    found = tmp_path / "engines.json"
    code = f"import json; json.dump({{'table': 'all is well', 'runs': 3}}, open({str(found)!r}, 'w'))"
    checked = Checked(tmp_path, FACTS)
    checked.carry_out("correct", python(code, found=found))
    assert "## correct: engines\n\nall is well" in checked.summary.read_text()
    assert Checked(tmp_path, FACTS).found["correct"]["engines"]["runs"] == 3


@pytest.mark.parametrize("images", [None, Path("images")])
@pytest.mark.parametrize("sizes", [stages.SMALL, stages.TINY], ids=["small", "tiny"])
def test_the_limits_of_what_has_to_be_done_fit_into_those_of_the_stage(
    tmp_path: Path, sizes: stages.Sizes, images: Path | None
) -> None:
    for name in stages.STAGES:
        listed = stages.stage_parts(name, sizes, tmp_path, tmp_path, images)
        assert sum(part.limit for part in listed if not part.fills) <= gpu_check.STAGE_SECONDS
        assert len({part.name for part in listed}) == len(listed)


def test_tiny_results_and_others_do_not_share_a_folder(tmp_path: Path) -> None:
    Checked(tmp_path, FACTS)
    with pytest.raises(SystemExit, match="has results without --tiny"):
        Checked(tmp_path, FACTS | {"tiny": True})


# Tests with a limit each

HANGING = """
import time
def test_one(): pass
def test_two(): time.sleep(600)
def test_three(): assert False
def test_four(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_five(): pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_or_spoils_its_process_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    begun, run = [], subprocess.run

    def here(command: list[str], **_: Any) -> Any:
        begun.append(command)
        code = f"import sys, pytest; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        code += f"from gpu_checks.limited import Limited; plugin = Limited(Path({command[4]!r}), limit=5)\n"
        code += "sys.exit(pytest.main(['-p', 'no:cacheprovider', '-c', '/dev/null', '.'], plugins=[plugin]))"
        return run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)

    monkeypatch.setattr(limited.subprocess, "run", here)
    assert limited.main(tmp_path / "tests.json", []) == 1
    outcomes = json.loads((tmp_path / "tests.json").read_text())["outcomes"]
    expected = {"one": "passed", "two": limited.NOT_ENDED, "three": "failed", "four": "failed", "five": "passed"}
    assert {name.rpartition("_")[2]: one["outcome"] for name, one in outcomes.items()} == expected
    assert len(begun) == 3
    (tmp_path / "test_hanging.py").write_text(HANGING.replace("time.sleep(600)", "pass"))
    limited.main(tmp_path / "tests.json", [])
    outcomes = json.loads((tmp_path / "tests.json").read_text())["outcomes"]
    assert outcomes["test_hanging.py::test_two"]["outcome"] == "passed"


def test_the_tests_marked_gpu_are_found() -> None:
    assert str(ROOT / "tests" / "training" / "test_gpu.py") in limited.marked()


# Engines


@pytest.mark.parametrize(
    ("one", "wrong"),
    [
        (
            {"state": "done", "losses": [1.0, 2.0], "capture_seconds": 1.0, "refused": "A step cannot be captured"},
            "A step cannot be captured",
        ),
        ({"state": "done", "losses": [1.0, 2.0005], "capture_seconds": 0.1}, ""),
        ({"state": "done", "losses": [1.0, 2.1], "capture_seconds": 0.1}, "differs by 5.0e-02"),
        ({"state": "done", "losses": [1.0, float("nan")], "capture_seconds": 0.1}, "differs by nan"),
        ({"state": "done", "losses": [1.0, 2.0], "capture_seconds": None}, "was not captured"),
        ({"state": "failed", "losses": [], "error": "no memory"}, "failed (no memory), eagerly done"),
    ],
)
def test_a_run_is_compared_with_the_eager_one(one: dict[str, Any], wrong: str) -> None:
    assert engines.compared(one, {"state": "done", "losses": [1.0, 2.0]})[0] == wrong


# What is brought along


def test_a_package_that_is_missing_has_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "no_such.package>=3"]')
    first, *others = needs.lacking(tmp_path / "pyproject.toml", tmp_path)
    assert first == "Missing: no_such.package>=3; bring it along: scripts/gpu_check bundle."
    assert all("torch" not in one for one in others)
    assert needs.name_of("No_Such.package[extra]>=3; python_version<'3'") == "no-such-package"


def wheel(folder: Path, name: str, *requires: str) -> Path:
    """A package with one module, which says its name."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {one}" for one in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"NAME = {name!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_wheels_are_those_of_requirements_but_for_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = {"one": ["two>=2", "torch", "windows; sys_platform == 'win32'", "docs; extra == 'docs'"], "two": ["one"]}
    asked: list[tuple[str, ...]] = []

    def pip(*words: str) -> "subprocess.CompletedProcess[str]":
        asked.append((words[0], words[-1]))
        if words[0] == "download" and words[-1] == "two>=2":  # which has no wheel, but can be built
            return subprocess.CompletedProcess(words, 1, "", "no wheel")
        folder = Path(words[1 + max(words.index(flag) for flag in ("--dest", "--wheel-dir") if flag in words)])
        name = needs.name_of(words[-1])
        wheel(folder, name, *requires.get(name, []))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(bundle, "pip", pip)
    bundle.Wheels(tmp_path, "3.12", bundle.PLATFORMS).collect(["one", "Torch>=2.9"], ["torch"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"]
    assert ("wheel", "two>=2") in asked


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four images to train on and two to test on, and a file that is no image of theirs."""
    for part, number in {"train": 4, "test": 2}.items():
        for kind in ("cat", "dog"):
            (tmp_path / "images" / part / kind).mkdir(parents=True)
            for index in range(number):
                (tmp_path / "images" / part / kind / f"{index}.jpg").write_bytes(f"{part} {kind} {index}".encode())
    (tmp_path / "images" / "README.md").write_text("no image")
    return tmp_path / "images"


def test_images_are_brought_evenly_from_a_folder_or_an_archive(tmp_path: Path, images: Path) -> None:
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.add(images, ".")
    for source in (images, tmp_path / "images.tar.gz"):
        bundle.pack_images(source, tmp_path / "part.tar.xz", {"train": 4, "test": 2})
        with tarfile.open(tmp_path / "part.tar.xz") as packed:
            found = {member.name: packed.extractfile(member).read() for member in packed}  # type: ignore[union-attr]
        assert found == {
            f"cifar10_jpeg/{part}/{kind}/{index}.jpg": f"{part} {kind} {index}".encode()
            for part, number in {"train": 2, "test": 1}.items()
            for kind in ("cat", "dog")
            for index in range(number)
        }
    with pytest.raises(SystemExit, match="10 images of train/ cannot be had evenly over its classes"):
        bundle.pack_images(images, tmp_path / "part.tar.xz", {"train": 10})


def test_a_bundle_that_is_too_large_is_refused(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle.Wheels, "collect", lambda self, *_: wheel(self.folder, "one"))
    words = [str(tmp_path / "bundle"), "--data", str(images), "--images", "4", "--test-images", "2"]
    with pytest.raises(SystemExit, match=r"are more than the 0\.0001 that it may have"):
        bundle.main([*words, "--mib", "0.0001"])
    assert not [*tmp_path.glob("bundle*")]
    bundle.main(words)
    assert sorted(path.name for path in (tmp_path / "bundle").rglob("*")) == [
        *("images.tar.xz", "one-1.0-py3-none-any.whl", "wheels")
    ]


@pytest.mark.slow
def test_what_was_brought_is_used(tmp_path: Path, images: Path) -> None:
    (tmp_path / "bundle" / "wheels").mkdir(parents=True)
    wheel(tmp_path / "bundle" / "wheels", "brought", "torch>=99")  # which is there, in a version of its own
    bundle.pack_images(images, tmp_path / "bundle" / needs.IMAGES, {"train": 8, "test": 4})
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):
        assert gpu_check.unpack(tmp_path / "bundle", work) == work / "data"
        assert (work / "packages" / "brought.py").read_text() == "NAME = 'brought'\n"
        assert len([*(work / "data" / "cifar10_jpeg" / "train").rglob("*.jpg")]) == 8
    assert gpu_check.unpack(tmp_path / "nothing", tmp_path) is None
    (tmp_path / "bundle" / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="cannot be installed here"):
        gpu_check.unpack(tmp_path / "bundle", tmp_path / "other")
