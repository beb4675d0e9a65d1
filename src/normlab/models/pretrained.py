"""Trained weights that a network starts from: read, checked, and put into it before its norms are rewritten."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from filelock import FileLock
from torch import Tensor, nn

from normlab.common.download import DOWNLOADING, fetch, unreachable
from normlab.common.errors import UserError, described, did_you_mean, first_line, listed
from normlab.config import schema, weights
from normlab.models import networks

Log = Callable[[str], None]
NAMED = 4  # parameters that an error lists
_ODD = "of another shape or kind"
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers of torchvision's weights that networks here are without
_BESIDE = ("state_dict", "model", "model_state_dict")  # where training scripts keep weights beside other things
_WRAPPER = re.compile(r"module\.|_orig_mod\.")  # of DataParallel and torch.compile


@dataclass(frozen=True)
class Trained:
    """Trained weights.

    Attributes:
        title: as sentences call them.
        tensors: by the names of their library, on the CPU.
        sha256: of the file; of weights that timm reads, of the tensors.
    """

    title: str
    tensors: Mapping[str, Tensor]
    sha256: str


def read(config: schema.RunConfig, log: Log) -> Trained:
    """Return the weights that `model.weights` names; the latest of a process are kept.

    Args:
        config: a run's settings, with such weights.
        log: called with a sentence while they are downloaded.

    Raises:
        UserError: if the library knows no such name, it cannot be downloaded, or the file cannot be read.
    """
    named = config.weights
    assert named is not None
    if weights.is_file(named):
        return _of_file(f"model.weights={named}", weights.check_file(named))
    if isinstance(config.model, schema.TimmConfig):
        return _of_timm(config.model.name, named, json.dumps(config.model.kwargs), log)
    of_depth = {"resnet": f"resnet{config.depth}", "vgg": f"vgg{config.depth}_bn"}
    return _of_torchvision(of_depth.get(config.model.kind, config.model.name), named, log)


def recorded(config: schema.RunConfig) -> dict[str, str] | None:
    """Return what a run records of its trained weights: the setting and the SHA-256; None without any."""
    if config.weights is None:
        return None
    return {"weights": config.weights, "sha256": read(config, lambda sentence: None).sha256}


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors and their names, equal exactly for bit-identical ones; 64 hex digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def put(network: nn.Module, names: Iterable[str], trained: Trained, other: Callable[[], nn.Module]) -> str:
    """Put weights into a network before its norms are rewritten, in place; return a line about what starts afresh.

    The classifier starts afresh where the weights are of other classes, or without one.

    Args:
        network: with its norms and activations apart.
        names: those of its state before they were taken apart.
        trained: the weights.
        other: makes the same network with other classes, by which the classifier is known.

    Raises:
        UserError: if anything else is missing, left over, or of another shape.
    """
    own = network.state_dict()
    renamed = dict(zip(names, own, strict=True))
    tensors = trained.tensors
    while tensors.keys().isdisjoint(renamed.keys() | own) and (wrapper := _WRAPPER.match(next(iter(tensors)))):
        tensors = {name.removeprefix(wrapper[0]): tensor for name, tensor in tensors.items()}
    given = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in given.items() if name in own or not name.startswith(_AUXILIARY)}
    odd = [name for name in own if not name.endswith("num_batches_tracked") or name in given]
    odd = [name for name in odd if name not in given or _kind(given[name]) != _kind(own[name])]
    classifier: set[str] = set()
    if odd:
        shapes = [tensor.shape for tensor in other().state_dict().values()]
        classifier = {name for (name, tensor), shape in zip(own.items(), shapes, strict=True) if tensor.shape != shape}
    wrong = {
        "missing": [name for name in odd if name not in given and name not in classifier],
        "unknown": [name for name in given if name not in own],
        _ODD: [name for name in odd if name in given and name not in classifier],
    }
    if any(wrong.values()):
        raise _does_not_fit(network, trained, wrong, given, own)
    afresh = [name for name in odd if name in classifier]
    for name in given.keys() - set(afresh):
        own[name].copy_(given[name])
        no_variance = name.endswith("running_var") and bool((own[name] < 0).any())
        if no_variance or not own[name].isfinite().all():  # float64 may be finite there and not here
            kind = "are below 0, as no variance is" if no_variance else "are not finite"
            raise UserError(f"{trained.title} has values in {name} that {kind}.\nUse other weights.")
    shown = ", ".join(f"{name} {tuple(own[name].shape)}" for name in afresh)
    there = next((f"{name} is {tuple(given[name].shape)} there" for name in afresh if name in given), "there is none")
    return f"The classifier starts afresh: {shown}. In {trained.title} {there}." if afresh else ""


def _kind(tensor: Tensor) -> tuple[object, ...]:
    numbers = "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"
    quantized = "quantized" if tensor.is_quantized else "not quantized"
    return tuple(tensor.shape), f"{numbers} numbers", quantized, tensor.layout, tensor.device.type


def _difference(name: str, given: Tensor, own: Tensor) -> str:
    there, here = next((a, b) for a, b in zip(_kind(given), _kind(own), strict=True) if a != b)
    return f"{name} {there} for {here}"


def _does_not_fit(
    network: nn.Module,
    trained: Trained,
    wrong: Mapping[str, list[str]],
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> UserError:
    shown: dict[str, Callable[[str], str]] = {
        "missing": str,
        "unknown": str,
        _ODD: lambda name: _difference(name, given[name], own[name]),
    }
    parts = [
        f"{len(names)} {what} ({listed([shown[what](name) for name in names], NAMED)})"
        for what, names in wrong.items()
        if names
    ]
    remedy = "Give weights of this very network, as its library or a run with norm=bn has them."
    if isinstance(network, torchvision.models.ResNet) and "conv1.weight" in wrong[_ODD]:
        stem = "imagenet" if given["conv1.weight"].shape[-1:] == (7,) else "small"
        remedy = f"These weights have another stem: model.stem={stem}."
    elif isinstance(network, torchvision.models.VGG) and any(
        name.startswith("classifier.") for name in (*wrong["missing"], *wrong["unknown"])
    ):
        head = "small" if "classifier.6.weight" in own else "imagenet"
        remedy = f"These weights have another head: model.head={head}."
    return UserError(f"{trained.title} does not fit {type(network).__name__}: {', '.join(parts)}.\n{remedy}")


# --- Files ------------------------------------------------------------------------------------------


def _of_file(title: str, path: Path) -> Trained:
    return Trained(title, _tensors(title, path, *weights.state(path)), weights.sha256(str(path)))


@lru_cache(maxsize=1)
def _tensors(title: str, path: Path, *state: int) -> dict[str, Tensor]:
    """Return the tensors of a file by their names; nothing in it is executed."""
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{title} does not fit into memory.\nUse other weights, or another machine.") from None
    except Exception as error:  # of whatever a damaged or hostile file leads to
        more = re.search(r"GLOBAL (\S+)", str(error))
        if more:
            raise UserError(
                f"{title} has more in it than tensors ({more[1]}), and nothing else is read from a file.\n"
                "Save the weights alone: torch.save(network.state_dict(), ...)."
            ) from None
        reason = first_line(error)[:120]
        why = f": {reason}" if " " in reason and "weights_only" not in str(error) else ""
        raise UserError(
            f"{title} cannot be read as weights, it is damaged or of another format{why}.\n"
            "Give a file that torch.save(network.state_dict(), ...) or safetensors wrote."
        ) from None
    for key in _BESIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{title} has no weights by their names: it is {_what(content)}.\nGive a state_dict.")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise UserError(
            f"{title} has other things than weights in it: {listed(others, NAMED)}.\n"
            f"Give a state_dict, by itself or below {' or '.join(_BESIDE)}."
        )
    return dict(content)


def _what(content: object) -> str:
    return "empty" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _pickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > path.stat().st_size:  # torch.save compresses nothing
            raise ValueError(f"it unpacks to {unpacked / 1e9:.1f} GB")
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"model.weights={path} needs safetensors, and importing it failed: {error}.\n"
            "Install it: pip install safetensors (timm brings it, too)."
        ) from error
    return load_file(path)


# --- Names of libraries -----------------------------------------------------------------------------


def _of_torchvision(architecture: str, named: str, log: Log) -> Trained:
    networks.check_torchvision(architecture)
    known = torchvision.models.get_model_weights(architecture)
    names = [each.name for each in known]
    if named != weights.DEFAULT and named not in names:
        raise _unknown(named, names, f"torchvision {torchvision.__version__} for {architecture}")
    chosen = known[named] if named != weights.DEFAULT else known.DEFAULT
    title = f"model.weights={chosen.name} of torchvision"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(chosen.url).path).name
    if not file.exists():
        _download(chosen.url, file, title, log)
    trained = _of_file(title, weights.check_file(str(file)))
    expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if expected and not trained.sha256.startswith(expected[1]):
        raise UserError(
            f"{title} is damaged: the SHA-256 of {file} is {trained.sha256[:8]}...\nDelete it, and start again."
        )
    return trained


def _download(url: str, file: Path, title: str, log: Log) -> None:
    """Download to where torchvision itself keeps weights (TORCH_HOME)."""
    try:
        if reason := unreachable(url):
            raise OSError(reason)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():  # another process may have had it
                fetch(url, file, title, log)
    except Exception as error:  # of the network or the disk
        raise _not_there(title, error, f"Put {url}\ninto {file.parent} (TORCH_HOME names another folder)") from None


def _of_timm(architecture: str, named: str, kwargs: str, log: Log) -> Trained:
    networks.check_timm(architecture)
    import timm
    from huggingface_hub.utils.tqdm import disable_progress_bars

    listing = timm.list_pretrained(f"{architecture}.*")
    tags = [name.partition(".")[2] for name in listing if name.partition(".")[0] == architecture]
    default = timm.models.get_pretrained_cfg(architecture)
    tag = default.tag if named == weights.DEFAULT and default and tags else named
    if tag not in tags:
        raise _unknown(named, tags, f"timm {timm.__version__} for {architecture}")
    title = f"model.weights={tag} of timm"
    disable_progress_bars()  # they would land amid the lines about runs
    try:
        _require_timm(timm.models.get_pretrained_cfg(f"{architecture}.{tag}"), title, log)
        return _made_by_timm(f"{architecture}.{tag}", title, kwargs)
    except Exception as error:  # of the network, the disk, or arguments that make another network
        raise _not_there(title, error, "Download it where there is internet, torch.save its state_dict()") from None


@lru_cache(maxsize=1)
def _made_by_timm(name: str, title: str, kwargs: str) -> Trained:
    import timm

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(name, pretrained=True, **json.loads(kwargs))
    return Trained(title, network.state_dict(), digest(network.state_dict()))


def _require_timm(found: Any, title: str, log: Log) -> None:
    """Check that the files are in the cache of Hugging Face's hub, or that it can be reached."""
    from huggingface_hub import constants, try_to_load_from_cache

    files = (found.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if found.hf_hub_id and any(isinstance(try_to_load_from_cache(found.hf_hub_id, f), str) for f in files if f):
        return
    if reason := unreachable(constants.ENDPOINT if found.hf_hub_id else found.url):
        raise OSError(reason)
    log(f"{DOWNLOADING} {title}.")


def _unknown(named: str, names: list[str], library: str) -> UserError:
    if not names:
        return UserError(f"model.weights={named}: there are none in {library}.\nGive a file, or model.weights=null.")
    hint = did_you_mean(named, [*names, weights.DEFAULT], "model.weights=")
    return UserError(
        f"model.weights={named} is not in {library}: expected {weights.DEFAULT}, {listed(names, 12)},"
        f" or a file ({', '.join(weights.SUFFIXES)}).{hint}"
    )


def _not_there(title: str, error: Exception, remedy: str) -> UserError:
    reason = getattr(error, "reason", error)
    why = first_line(reason) if isinstance(error, OSError) else first_line(described(error))
    return UserError(f"{title} is not on this machine and cannot be had: {why}.\n{remedy},\nor model.weights=FILE.")
