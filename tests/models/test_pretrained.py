"""Starts from trained weights: what is put where, what is refused, and what is read of a file."""

import argparse
import copy
import hashlib
import os
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small import SmallNet, SmallResNet
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from normlab import models, runs
from normlab.cli import doctor
from normlab.common.errors import UserError
from normlab.config.schema import parse
from normlab.launchers import preflight
from normlab.launchers.pool import check_networks
from normlab.launchers.single import train_config
from normlab.launchers.sweep import Job
from normlab.launchers.unchanged import Unchanged
from normlab.models import pretrained
from normlab.models.build import variant
from normlab.training import device
from normlab.training.run import train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
SMALL = ("model=custom", "model.target=small.SmallResNet", "model.name=small_resnet")
SCALES, SHIFTS, MEANS, VARIANCES = "weight", "bias", "running_mean", "running_var"


def trained(num_classes: int = 10, network: nn.Module | None = None) -> nn.Module:
    """A network whose norms are as training leaves them."""
    torch.manual_seed(7)
    network = network or SmallResNet(num_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            module.get_buffer("running_mean").normal_()
            module.get_buffer("running_var").uniform_(0.5, 2)
            module.get_buffer("num_batches_tracked").fill_(1000)
    return network.eval()


def images(size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, content: object, name: str = "start.pt") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


def built(make, path: object, *settings: str, classes: int = 10, said: list[str] | None = None) -> nn.Module:
    config = make(*SMALL, *settings)
    model = config.model.model_copy(update={"weights": str(path)})
    lines: list[str] = [] if said is None else said
    return models.build(config.model_copy(update={"model": model}), num_classes=classes, image_size=8, log=lines.append)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "fixup"])
def test_each_norm_takes_of_trained_norms_what_it_says_and_trains(make, tmp_path: Path, norm: str) -> None:
    """By planted changes: what a norm takes changes the network that it starts as, what it leaves out does not."""
    start, said = trained().state_dict(), list[str]()
    network = built(make, saved(tmp_path, start), f"norm={norm}", said=said)
    assert not [line for line in said if "classifier" in line]
    takes = variant(make(*SMALL, f"norm={norm}")).takes
    for part, names in {"scales": (SCALES,), "shifts": (SHIFTS,), "running statistics": (MEANS, VARIANCES)}.items():
        norms = [name for name in start if name.rpartition(".")[2] in (MEANS,)]
        parents = {name.rpartition(".")[0] for name in norms}
        changed = {
            name: value * 1.5 if name.rpartition(".")[0] in parents and name.rpartition(".")[2] in names else value
            for name, value in start.items()
        }
        other = built(make, saved(tmp_path, changed, f"{part}.pt"), f"norm={norm}").state_dict()
        same = all(torch.equal(value, other[name]) for name, value in network.state_dict().items())
        assert same == (part not in takes), part
        assert any(part in line for line in said) == (part not in takes), part
    F.cross_entropy(network.train()(images()), torch.arange(4)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("norm", ["bn", "bn_scaled", "bn_frozen", "renorm"])
def test_the_trained_network_is_the_start_of_norms_that_evaluate_by_its_statistics(make, tmp_path, norm) -> None:
    reference = trained()
    said: list[str] = []
    network = built(make, saved(tmp_path, reference.state_dict()), f"norm={norm}", said=said).eval()
    assert [line for line in said if "norm.scale_init=0.1 is for a fresh start" in line] == said
    assert len(said) == (norm == "bn_scaled")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if norm == "renorm" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(network(images()), reference(images()), **tolerance)
    if norm == "bn":
        assert all(torch.equal(v, reference.state_dict()[name]) for name, v in network.state_dict().items())


@pytest.mark.parametrize("affine", [False, True])
def test_bn_frozen_is_torchvisions_frozen_batch_norm(make, tmp_path: Path, affine: bool) -> None:
    """In training, forward and backward; only convolutions and the classifier learn, and by choice scale and shift."""
    reference = trained()
    settings = ("norm=bn_frozen", f"norm.train_affine={affine}")
    network = built(make, saved(tmp_path, reference.state_dict()), *settings).train()
    for name, module in list(reference.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features)
            frozen.load_state_dict(module.state_dict())
            reference.set_submodule(name, frozen)
    for each in (network, reference.train()):
        each(images()).square().sum().backward()
    torch.testing.assert_close(network(images()), reference(images()), rtol=1e-5, atol=1e-5)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in network.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-5)
        else:
            assert (parameter.grad is not None) == parameter.requires_grad == affine, name


def test_bn_frozen_that_was_not_trained_is_said_to_normalize_nothing(make) -> None:
    said: list[str] = []
    models.build(make(*SMALL, "norm=bn_frozen"), num_classes=10, image_size=8, log=said.append)
    assert "it normalizes nothing" in said[0]


@pytest.mark.parametrize(
    "wrap", ["plain", "state_dict", "model", "_orig_mod.module.", "headless", "one_batch_uncounted"]
)
def test_the_classifier_starts_afresh_where_classes_differ_and_all_else_is_the_files(make, tmp_path, wrap) -> None:
    start = trained(1000).state_dict()
    content: object = start
    if wrap in ("state_dict", "model"):
        content = {"epoch": 3, wrap: start}
    elif wrap == "_orig_mod.module.":
        content = {f"{wrap}{name}": value for name, value in start.items()}
    elif wrap == "headless":
        content = {name: value for name, value in start.items() if not name.startswith("fc.")}
    elif wrap == "one_batch_uncounted":
        content = {name: value for name, value in start.items() if not name.endswith("num_batches_tracked")}
    said: list[str] = []
    network = built(make, saved(tmp_path, content), "norm=bn", classes=7, said=said)
    assert len(said) == 1
    assert said[0].startswith("The classifier starts afresh: fc.weight (7, ")
    plain = models.build(make(*SMALL, "norm=bn"), num_classes=7, image_size=8).state_dict()
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, plain[name] if name.startswith("fc.") else start[name]), name


def test_a_networks_own_module_is_no_wrapper() -> None:
    network = nn.Sequential(OrderedDict(module=nn.Linear(2, 1)))
    ones = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    pretrained.put(network, ones, pretrained.Trained("", ones, ""), lambda: network)
    assert all(torch.equal(value, ones[name]) for name, value in network.state_dict().items())


def test_a_first_weight_without_dimensions_is_a_sentence() -> None:
    network = torchvision.models.resnet18(num_classes=2)
    start = network.state_dict() | {"conv1.weight": torch.tensor(1.0)}
    with pytest.raises(UserError, match=r"1 of another shape or kind \(conv1.weight \(\) for \(64, "):
        pretrained.put(network, start, pretrained.Trained("", start, ""), lambda: network)


def test_all_arms_of_a_seed_and_all_seeds_start_from_the_same_convolutions(make, tmp_path: Path) -> None:
    path = saved(tmp_path, trained().state_dict())
    starts = [built(make, path, *each).conv1.weight for each in (("norm=bn",), ("norm=gn", "norm.groups=1", "seed=3"))]
    assert torch.equal(*starts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("conv1.weight"), "1 missing (conv1.weight)"),
        (lambda s: s.update({"more.weight": torch.zeros(2)}), "1 unknown (more.weight)"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(1, 3, 3, 3)}),
            "1 of another shape or kind (conv1.weight (1, 3, 3, 3)",
        ),
        (
            lambda s: s.update({"conv1.weight": s["conv1.weight"].int()}),
            "conv1.weight whole numbers for floating-point",
        ),
        (lambda s: s.update({"conv1.weight": s["conv1.weight"].double() * 1e300}), "conv1.weight that are not finite"),
        (lambda s: s["bn1.running_var"].neg_(), "bn1.running_var that are below 0"),
        (lambda s: s["conv1.weight"].fill_(torch.nan), "conv1.weight that are not finite"),
        (lambda s: s.update({"epoch": 3}), "other things than weights in it: epoch"),
        (lambda s: s.clear(), "it is empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(make, tmp_path: Path, change, says: str) -> None:
    start = dict(trained().state_dict())
    change(start)
    with pytest.raises(UserError) as error:
        built(make, saved(tmp_path, start), "norm=bn")
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


class _Command:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed_and_a_damaged_one_is_a_sentence(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = Path(saved(tmp_path, trained().state_dict()))
    content = good.read_bytes()
    files = {"half.pt": content[: len(content) // 2], "text.pt": b"weights", "none.safetensors": content}
    for name, each in files.items():
        (tmp_path / name).write_bytes(each)
    saved(tmp_path, {"weights": _Command()}, "command.pt")
    saved(tmp_path, {"args": argparse.Namespace(lr=1), "state_dict": {}}, "script.pt")
    saved(tmp_path, [1, 2], "list.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    says = {"command.pt": "more in it than tensors", "script.pt": "argparse.Namespace", "bomb.pt": "unpacks to"}
    for name in (*files, "command.pt", "script.pt", "list.pt", "bomb.pt"):
        with pytest.raises(UserError, match=says.get(name, "cannot be read as weights|it is a list")) as error:
            built(make, tmp_path / name)
        assert len(str(error.value).splitlines()) <= 5
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["nothing", "folder", "empty", "fifo"])
def test_a_file_that_is_none_is_refused_before_a_sweep_starts(make, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "start.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    says = {"nothing": "is not there", "folder": "is a folder", "empty": "is empty", "fifo": "is no regular file"}
    with pytest.raises(UserError, match=says[kind]):
        preflight.check(make("model=resnet", f"model.weights={path}"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *((f"init={init}", "would write over the weights") for init in ("lsuv", "glorot", "zero_gamma", "fixup")),
        ("model=cifar_resnet depth=20 model.weights=IMAGENET1K_V1", "is no file"),
        ("model=resnet norm=fixup", "norm=fixup cannot start from"),
        ("model=resnet model.weights=IMAGENET1K_V2", "Did you mean model.weights=IMAGENET1K_V1?"),
        ("model=timm model.name=resnet10t model.weights=c3_in1", "Did you mean model.weights=c3_in1k?"),
        ("model=timm model.name=resnet10t.c3_in1k", "model.name=resnet10t model.weights=c3_in1k?"),
        ("model=resnet model.stem=imagenet", "These weights have another stem: model.stem=small."),
    ],
)
def test_what_cannot_start_from_weights_is_a_sentence(make, tmp_path: Path, settings: str, says: str) -> None:
    start = trained(network=models.build(make("model=resnet"), num_classes=10, image_size=8)).state_dict()
    given = settings.split()
    if not any("weights=" in each or "timm" in each for each in given):
        given.append(f"model.weights={saved(tmp_path, start)}")
    with pytest.raises(UserError) as error:
        models.build(make(*given), num_classes=10, image_size=8)
    assert says in str(error.value)


def test_a_name_is_downloaded_once_and_its_hash_is_compared(make, tmp_path: Path, monkeypatch) -> None:
    """From a library of the test's own, whose server is a folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    start = trained(network=torchvision.models.resnet18(num_classes=1000)).state_dict()
    content = Path(saved(tmp_path, start)).read_bytes()
    served = tmp_path / f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served.write_bytes(content)
    one = types.SimpleNamespace(name="ONE", url=served.as_uri())

    class Library:
        DEFAULT = one

        def __iter__(self):
            return iter([one])

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: Library())
    config, said = make("model=torchvision", "model.name=resnet18", "model.weights=true"), list[str]()
    network = models.build(config, num_classes=10, image_size=8, log=said.append)
    assert torch.equal(network.conv1.weight, start["conv1.weight"])
    assert said[0].startswith("Downloading model.weights=ONE of torchvision")
    served.unlink()  # it is there now
    record = pretrained.recorded(config)
    assert record == {"weights": "DEFAULT", "sha256": hashlib.sha256(content).hexdigest()}
    kept = tmp_path / "hub" / "checkpoints" / served.name
    kept.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        models.build(config, num_classes=10, image_size=8)


@pytest.mark.parametrize("network", ["torchvision model.name=resnet18", "timm model.name=resnet10t"])
def test_without_internet_a_name_is_a_sentence(make, tmp_path: Path, monkeypatch, network: str) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "unreachable", lambda url: "no network")
    with pytest.raises(UserError, match=r"cannot be had: no network\.(.|\n)*or model.weights=FILE\."):
        models.build(make(*f"model={network} model.weights=DEFAULT".split()), num_classes=10, image_size=32)


def test_weights_of_a_run_of_timm_and_of_timm_itself_start_the_same_network(make, tmp_path: Path) -> None:
    """Whose norms are apart from their activations in the one and not in the other."""
    settings = ("model=timm", "model.name=lcnet_035")
    own = trained(network=models.build(make(*settings), num_classes=10, image_size=32)).state_dict()
    assert any(".bn1.norm." in f".{name}" for name in own)
    theirs = {name.replace(".norm.", ".").replace("bn1.norm", "bn1"): value for name, value in own.items()}
    for content in (own, theirs):
        path = saved(tmp_path, content, f"{len(str(list(content)))}.pt")
        network = models.build(make(*settings, f"model.weights={path}"), num_classes=10, image_size=32)
        assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())


def test_timm_makes_a_network_once_for_all_runs_of_a_process(make, monkeypatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(pretrained, "_require_timm", lambda *arguments: None)
    monkeypatch.setattr("timm.create_model", lambda name, **options: made.append(name) or nn.Linear(1, 1))
    config = make("model=timm", "model.name=resnet10t", "model.weights=DEFAULT")
    for _ in range(2):
        pretrained.read(config, lambda sentence: None)
        pretrained.recorded(config)
    assert len(made) == 1


def test_folding_starts_affine_as_the_trained_network(make, tmp_path: Path) -> None:
    path = saved(tmp_path, trained().state_dict())
    config = make(*SMALL, "norm=affine", "init=bn_folded", f"model.weights={path}")
    network = models.build(config, num_classes=10, image_size=8)
    models.start(config, network, images(), num_classes=10, image_size=8)
    torch.testing.assert_close(network(images()), trained().train()(images()), rtol=1e-3, atol=1e-3)


def test_a_file_identifies_a_run_by_its_name_and_not_by_its_folder(make, tmp_path: Path) -> None:
    def identity(weights: str | None) -> str:
        settings = make(*SMALL).as_dict()
        return runs.run_id(parse({**settings, "model": {**settings["model"], "weights": weights}}).as_dict())

    assert identity("a/start.pt") == identity("/b/start.pt") != identity("a/other.pt")
    assert identity("a/weights.pt") != identity("b/weights.pt")  # as runs call theirs
    old = copy.deepcopy(make(*SMALL).as_dict())
    del old["model"]["weights"]
    assert runs.run_id(old) == identity(None)


class SpareNet(SmallNet):
    """With a parameter that the forward pass does not use, as of an auxiliary classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(4, 4)


def start_of(tiny, tmp_path: Path, *settings: str) -> str:
    network = models.build(tiny(*settings), num_classes=10, image_size=8)
    return saved(tmp_path, trained(network=network).state_dict())


def test_a_finished_run_is_compared_with_the_file_as_it_is_now(tiny, tmp_path: Path, capsys) -> None:
    path = start_of(tiny, tmp_path)
    settings = (f"model.weights={path}", "schedule=constant", "epochs=1")
    config = tiny(*settings)
    train_run(config)
    run = runs.Run(config.as_dict())
    record = runs.read_provenance(run.folder)["weights"]
    assert record == {"weights": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    Unchanged().check(run, config)
    content = torch.load(path)
    content[next(iter(content))].add_(1)
    saved(tmp_path, content)
    with pytest.raises(UserError, match=r"The file of model\.weights=.* changed after"):
        Unchanged().check(run, config)
    train_run(longer := tiny(*settings, "epochs=2"))
    assert runs.read_provenance(runs.Run(longer.as_dict()).folder)["weights"] != record, "it started anew"
    Path(path).unlink()
    Unchanged().check(run, config)
    assert "is not there now: it is not compared" in capsys.readouterr().err


def test_a_run_that_goes_on_does_not_read_the_weights_again(tiny, tmp_path: Path, steps) -> None:
    """And ends as one that was not interrupted; its record keeps the digest."""
    network = f"model.target={__name__}.SpareNet"
    path = start_of(tiny, tmp_path, network)
    settings = (network, f"model.weights={path}", "norm=bn_frozen", "checkpoint_seconds=0")
    whole = train_run(tiny(*settings, f"output_dir={tmp_path}/whole"))
    config = tiny(*settings)
    steps.interrupt(config, after=3)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    Path(path).unlink()
    assert train_run(config)["weights_sha256"] == whole["weights_sha256"]
    assert runs.read_provenance(runs.Run(config.as_dict()).folder)["weights"]["sha256"] == digest


def test_a_single_run_with_weights_that_are_none_leaves_no_folder(tiny, tmp_path: Path) -> None:
    config = tiny(f"model.weights={saved(tmp_path, [1, 2])}")
    with pytest.raises(UserError, match="it is a list"):
        train_config(config)
    assert not runs.Run(config.as_dict()).folder.exists()


def test_the_idle_accelerator_of_a_machine_is_told_once_per_sweep(tiny, monkeypatch) -> None:
    """Simulated: none of these machines has one."""
    assert device.left_idle() is None
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    config = tiny("device=auto")
    assert device.choose(config.device).type == "cpu"
    jobs = [Job(config, runs.Run(config.as_dict()), preflight.check(config))] * 3
    assert sum("has not been tried on this machine's mps" in line for line in check_networks(jobs)) == 1
    assert not any("mps" in line for line in check_networks(jobs, False))
    (finding,) = (each for each in doctor.gpus("auto") if each.subject == "GPU")
    assert "mps" in finding.text
