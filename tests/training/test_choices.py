"""What a run does about speed on its own: tried once, remembered, and without a change of its results."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Make

from normlab import models, runs
from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.training import choices, device
from normlab.training.choices import Choice
from normlab.training.interrupt import StopRequest
from normlab.training.run import carry_out, data_of

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tiny: Make) -> Make:
    """With a network that draws no random numbers."""
    return lambda *settings: tiny("model.target=small.SmallResNet", "model.name=small_resnet", *settings)


@pytest.fixture
def planted(monkeypatch) -> dict:
    """Seconds of a step by (memory format, threads), in place of real trials; and a list of those that were made."""
    times: dict = {"tried": []}

    class Planted:
        def __init__(self, config, device, *, memory_format, **_):
            names = {value: name for name, value in choices.FORMATS.items()}
            self.key = (names[memory_format], torch.get_num_threads())
            times["tried"].append(self.key)
            if times.get(self.key, 1.0) is None:
                raise RuntimeError("view size is not compatible")

        def fastest(self, steps, limit_seconds):
            return times.get(self.key, 1.0)

    monkeypatch.setattr(choices, "Trial", Planted)
    monkeypatch.setattr(choices, "ALL_THREADS", 4)
    threads = torch.get_num_threads()
    yield times
    torch.set_num_threads(threads)


def chosen(config: RunConfig, threads: int | None = 4, saved: dict | None = None) -> Choice:
    data = data_of(config, CPU, lambda line: None)
    network = models.build(config, num_classes=len(data.classes), image_size=data.image_size)
    return choices.choose(config, network, data, CPU, threads, saved, lambda line: None)


def test_the_faster_memory_format_is_chosen_once_and_remembered(tiny, planted) -> None:
    config = tiny("memory_format=auto")
    planted["channels_last", 4] = 0.5
    assert chosen(config) == Choice("channels_last", 4)
    assert len(planted["tried"]) == 2
    planted["channels_last", 4] = 2.0  # another measurement would say
    assert chosen(config) == Choice("channels_last", 4)
    assert len(planted["tried"]) == 2


def test_where_random_numbers_are_drawn_in_the_order_of_memory_nothing_is_tried(tiny, planted) -> None:
    planted["channels_last", 4] = 0.5
    dropout = ("model.target=small.SmallNet", "model.name=small")
    for words in (dropout, ("norm=noisy_bn",)):
        assert chosen(tiny("memory_format=auto", *words)) == Choice("contiguous", 4)
    assert not planted["tried"]


def test_a_small_difference_is_left_to_chance_and_changes_nothing(tiny, planted) -> None:
    planted["channels_last", 4] = 0.97
    assert chosen(tiny("memory_format=auto")) == Choice("contiguous", 4)


@pytest.mark.parametrize("changed", ["batch=8", "dataset.image_size=12", "precision=bf16", "optimizer=adam"])
def test_another_shape_is_tried_anew(tiny, planted, changed: str) -> None:
    chosen(tiny("memory_format=auto"))
    chosen(tiny("memory_format=auto", changed))
    assert len(planted["tried"]) == 4


def test_another_arm_or_seed_gets_what_the_first_one_got(tiny, planted) -> None:
    """So that arms of a comparison differ by the arm."""
    planted["channels_last", 4] = 0.5
    for words in ((), ("norm=none",), ("seed=3",)):
        assert chosen(tiny("memory_format=auto", *words)) == Choice("channels_last", 4)
    assert len(planted["tried"]) == 2


def test_a_run_by_itself_may_use_fewer_threads(tiny, planted) -> None:
    planted["contiguous", 4], planted["contiguous", 2], planted["contiguous", 1] = 1.0, 0.7, 0.69
    config = tiny("memory_format=auto", "threads=null")
    assert chosen(config, threads=None) == Choice("contiguous", 2)
    torch.set_num_threads(2)  # as that run does; the next one of this process finds the same
    assert chosen(config, threads=None) == Choice("contiguous", 2)
    assert len(planted["tried"]) == 4


def test_what_the_user_or_the_launcher_says_is_not_tried(tiny, planted) -> None:
    assert chosen(tiny("memory_format=channels_last")) == Choice("channels_last", 4)
    assert not planted["tried"]


def test_a_network_that_cannot_do_with_it_keeps_its_format(tiny, planted) -> None:
    planted["channels_last", 4] = None
    assert chosen(tiny("memory_format=auto")) == Choice("contiguous", 4)


def test_a_resumed_run_keeps_what_it_began_with(tiny, planted) -> None:
    planted["channels_last", 4] = 0.5
    config = tiny("memory_format=auto")
    assert chosen(config, saved={"memory_format": "contiguous"}) == Choice("contiguous", 4)
    assert chosen(config, saved={"threads": 4}) == Choice("contiguous", 4)  # from before there was a choice
    assert not planted["tried"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1', "null"])
def test_a_damaged_memory_is_found_out_anew(tiny, planted, content: str) -> None:
    config = tiny("memory_format=auto")
    path = Path(config.data_dir) / "cache" / "choices.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    planted["channels_last", 4] = 0.5
    assert chosen(config) == Choice("channels_last", 4)
    assert len(json.loads(path.read_text())) == 1


@pytest.mark.parametrize("wrong", [{"memory_format": "diagonal", "threads": 4}, {"threads": 4}, 7, None])
def test_a_senseless_memory_is_left_out(tiny, planted, wrong: object) -> None:
    config = tiny("memory_format=auto")
    chosen(config)
    path = Path(config.data_dir) / "cache" / "choices.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), wrong)))
    assert chosen(config) == Choice("contiguous", 4)


def test_without_a_place_to_remember_a_run_still_starts(tiny, planted, tmp_path) -> None:
    (tmp_path / "data").write_text("a file")
    assert chosen(tiny("memory_format=auto")) == Choice("contiguous", 4)


def test_a_real_trial_changes_no_result(tiny) -> None:
    for study, words in (("auto", ["memory_format=auto"]), ("plain", ["memory_format=contiguous"])):
        carry_out(tiny(f"study={study}", *words))
    auto, plain = (runs.Run(tiny(f"study={study}").as_dict()).folder for study in ("auto", "plain"))
    rows = [[row["train_loss"] for row in runs.read_metrics(folder)[0]] for folder in (auto, plain)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    assert json.loads((plain / "provenance.json").read_text())["memory_format"] == "contiguous"
    assert json.loads((auto / "provenance.json").read_text())["memory_format"] in choices.FORMATS
    assert "tried once: contiguous, 1 threads" in (auto / "run.log").read_text()


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_an_interrupted_run_goes_on_in_its_format_to_the_same_bits(tiny, memory_format: str) -> None:
    words = (f"memory_format={memory_format}",)
    whole = tiny(*words, "study=whole")
    carry_out(whole)
    stop = StopRequest()
    stop.requested = "SIGTERM"
    with pytest.raises(InterruptedRunError):
        carry_out(tiny(*words), stop=stop)
    other = "channels_last" if memory_format == "contiguous" else "contiguous"
    status = carry_out(tiny(f"memory_format={other}"))
    assert status["weights_sha256"] == (runs.read_status(runs.Run(whole.as_dict()).folder) or {})["weights_sha256"]


def test_freed_memory_is_kept_only_where_the_c_library_can(monkeypatch) -> None:
    class Without:
        pass

    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Without())
    device._keep_freed_memory()
