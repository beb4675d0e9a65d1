import multiprocessing
import os
import shutil
import signal
from itertools import islice
from typing import Any

import pytest
import torch
from data.equality import equal
from launchers.commands import wait_for
from PIL import Image
from torchvision import transforms

from normlab.common.errors import UserError
from normlab.data.datasets import Data
from normlab.data.streaming import Files, worker_context

MIXED = ((20, 16), (14, 14), (9, 30))


def streams(data: Data) -> bool:
    return isinstance(data.train.source, Files)


def test_streamed_batches_equal_those_from_memory(image_folder, load_it) -> None:
    settings: dict[str, Any] = {
        "path": str(image_folder(sizes=MIXED)),
        "image_size": 12,
        "flip": True,
        "crop_padding": 2,
        "val_size": 4,
    }
    memory, stream = (load_it("image_folder", storage=storage, **settings) for storage in ("memory", "stream"))
    assert (streams(memory), streams(stream)) == (False, True)
    assert equal(memory.train.batches(3), stream.train.batches(3))
    assert equal(memory.test.batches(), stream.test.batches())
    assert memory.val is not None
    assert stream.val is not None
    assert equal(memory.val.batches(), stream.val.batches())
    assert equal(stream.train.batches(0), stream.train.batches(0)), "two at a time do not disturb each other"


def test_random_crops_depend_on_neither_workers_nor_batch(image_folder, load_it) -> None:
    settings: dict[str, Any] = {
        "path": str(image_folder(sizes=MIXED)),
        "image_size": 12,
        "flip": True,
        "crop_scale": [0.2, 1.0],
    }
    here = load_it("image_folder", **settings)
    elsewhere = load_it("image_folder", workers=2, **settings)
    assert equal(here.train.batches(1), elsewhere.train.batches(1))
    assert equal(here.train.batches(1, start=1), islice(elsewhere.train.batches(1), 1, None))
    by_threes = load_it("image_folder", batch=3, **settings)
    images, again = (torch.cat([i for i, _ in data.train.batches(1)]) for data in (here, by_threes))
    assert torch.equal(images, again)
    assert not torch.equal(images, torch.cat([i for i, _ in here.train.batches(2)]))


def test_auto_streams_what_does_not_fit(image_folder, load_it) -> None:
    path = str(image_folder(count=10))  # 40 images of 192 bytes
    assert not streams(load_it("image_folder", path=path, memory_limit_gb=7.681e-6))
    assert streams(load_it("image_folder", path=path, memory_limit_gb=7.679e-6))
    assert streams(load_it("image_folder", path=path, crop_scale=[0.5, 1.0]))


def test_the_evaluation_of_random_crops_sees_the_central_part(image_folder, load_it) -> None:
    root = image_folder(sizes=((40, 30),))
    data = load_it("image_folder", path=str(root), image_size=14, crop_scale=[0.2, 1.0], input_norm="none")
    oracle = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(14), transforms.ToTensor()])
    images, _ = next(data.test.batches())
    assert torch.equal(images[0], oracle(Image.open(root / "test/cat/0.png")))


def test_no_worker_outlives_its_iterator(image_folder, load_it) -> None:
    data = load_it("image_folder", path=str(image_folder()), storage="stream", workers=2, batch=1)
    half_read = data.train.batches(0)
    next(half_read)
    assert multiprocessing.active_children()
    half_read.close()
    list(data.test.batches())
    wait_for(lambda: not multiprocessing.active_children(), "the workers' end")


def test_a_signal_that_stops_a_run_leaves_its_workers(image_folder, load_it) -> None:
    """A terminal and SLURM send it to them as well; the run still needs their batches."""
    train = load_it("image_folder", path=str(image_folder()), storage="stream", workers=1).train
    undisturbed, batches = list(train.batches(0)), train.batches(0)
    disturbed = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid or 0, number)
    disturbed += batches
    assert equal(iter(disturbed), iter(undisturbed))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_no_worker_outlives_a_killed_run(image_folder, tmp_path) -> None:
    code = f"""
import multiprocessing, pathlib, time, torch
from normlab.data.images import Decoder
from normlab.data.streaming import Files, worker_context
decoder = Decoder(pathlib.Path({str(image_folder())!r}), 8, 8, one_size=True, crop_scale=None)
files = Files(decoder, ("train/cat/0.png",), seed=0, workers=2, device=torch.device("cpu"))
batches = files.read(torch.zeros(1000, dtype=torch.int64), batch=1)
next(batches)
workers = " ".join(str(worker.pid) for worker in multiprocessing.active_children())
pathlib.Path({str(tmp_path)!r}, "half").write_text(workers)
pathlib.Path({str(tmp_path)!r}, "half").rename({str(tmp_path / "workers")!r})
time.sleep(600)
"""
    run = worker_context().Process(target=exec, args=(code,))
    run.start()
    wait_for((tmp_path / "workers").exists, "the workers", 120)
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert workers
    run.kill()
    run.join()
    wait_for(lambda: not any(map(alive, workers)), "the workers' end")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(image_folder, load_it, workers) -> None:
    root = image_folder()
    data = load_it("image_folder", path=str(root), storage="stream", workers=workers)
    (root / "train" / "dog" / "4.png").write_text("no image")
    with pytest.raises(UserError, match=r"^The image .*train/dog/4\.png cannot be read: [^\n]*\n[^\n]*$"):
        list(data.train.batches(0))
    Image.new("RGB", (8, 12)).save(root / "train" / "dog" / "4.png")
    with pytest.raises(UserError, match=r"4\.png is 8x12"):
        list(data.train.batches(0))


def test_streaming_leaves_the_global_stream_alone(image_folder, load_it) -> None:
    data = load_it("image_folder", path=str(image_folder()), storage="stream", crop_scale=[0.5, 1.0])
    before = torch.get_rng_state()
    list(data.train.batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_of_a_stream_are_a_fixed_samples(image_folder, load_it, monkeypatch) -> None:
    settings: dict[str, Any] = {"path": str(image_folder(count=20)), "storage": "stream"}
    exact = load_it("image_folder", **settings)
    monkeypatch.setattr("normlab.data.batches.SAMPLE", 10)
    one, other = (load_it("image_folder", seed=seed, **settings) for seed in (0, 1))
    assert equal(one.test.batches(), other.test.batches())
    assert not equal(one.test.batches(), exact.test.batches())


def test_the_fingerprint_follows_the_files_and_not_their_place(image_folder, load_it) -> None:
    root = image_folder()
    copy = shutil.copytree(root, root.with_name("copy"), copy_function=shutil.copy)
    streamed = [load_it("image_folder", path=str(path), storage="stream").fingerprint for path in (root, copy)]
    decoded = [load_it("image_folder", path=str(path)).fingerprint for path in (root, copy)]
    assert streamed[0] == streamed[1]
    assert decoded[0] == decoded[1]
    file = copy / "train" / "cat" / "0.png"
    pixels = bytearray(file.read_bytes())
    pixels[-30] ^= 1
    file.write_bytes(pixels)
    changed = load_it("image_folder", path=str(copy), storage="stream", input_norm="none")
    assert changed.fingerprint != streamed[0], "at an equal size"
