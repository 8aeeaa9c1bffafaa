"""The training stack: data, logs, checkpoints, the loop, and `train.digits` from the command line."""

import contextlib
import gzip
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import tyro

from declarative import value_and_grad_with_health
from models.attention import TransformerConfig, VisionTransformer
from train.digits import Config, main
from train.loop.data import load_folder, load_idx, load_npz_folder, shuffled_batches
from train.loop.devices import start
from train.loop.fit import NonFiniteError, fit, mean_over
from train.loop.log import MetricsLog, read_metrics

ROOT = Path(__file__).parent.parent
MAPS = ("softmax", "sparsemax", "entmax", "entmax-fixed")


def write_idx(path: Path, array: np.ndarray) -> None:
    codes = {"uint8": 0x08, "int32": 0x0C, "float32": 0x0D}
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, codes[array.dtype.name], array.ndim, *array.shape)
    raw = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def make_images(n: int, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bright squares whose place is their class, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    images = rng.integers(0, 100, (n, size, size))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(label, 2)
        half = size // 2
        image[row * half : (row + 1) * half, column * half : (column + 1) * half] += 120
    return images.astype(np.uint8), labels.astype(np.uint8)


# Data


def test_batches_are_a_function_of_seed_and_step():
    x = np.arange(103)
    batches = shuffled_batches((x, -x), 10, seed=3)
    in_order = [batches(step) for step in range(25)]
    again = shuffled_batches((x, -x), 10, seed=3)
    for step in (24, 3, 17, 3, 0):  # no memory of the steps before
        a, b = again(step)
        np.testing.assert_array_equal(a, in_order[step][0])
        np.testing.assert_array_equal(b, -a)
    first, second = (np.concatenate([a for a, _ in in_order[i : i + 10]]) for i in (0, 10))
    assert len(set(first)) == len(set(second)) == 100, "an epoch repeats a row"
    assert not np.array_equal(first, second), "epochs are in the same order"
    assert not np.array_equal(shuffled_batches((x,), 10, seed=4)(0)[0], in_order[0][0])


def test_batches_of_processes_make_up_the_whole_batch():
    x = np.arange(50)
    whole = shuffled_batches((x,), 12, seed=0)
    shares = [shuffled_batches((x,), 12, seed=0, process=p, processes=3) for p in range(3)]
    for step in (0, 5):
        np.testing.assert_array_equal(np.concatenate([share(step)[0] for share in shares]), whole(step)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((np.zeros(5), np.zeros(4)), 2), "same number of rows"),
        (((np.zeros(5),), 6), "between 1 and the 5 rows"),
        (((np.zeros(5),), 0), "between 1 and the 5 rows"),
    ],
)
def test_batches_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        shuffled_batches(*arguments, seed=0)
    with pytest.raises(ValueError, match="multiple of the 2 processes"):
        shuffled_batches((np.zeros(9),), 3, seed=0, processes=2)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_load_idx(tmp_path, suffix):
    images, labels = make_images(7, size=6)
    write_idx(tmp_path / f"images{suffix}", images)
    write_idx(tmp_path / f"labels{suffix}", labels)
    x, y = load_idx(tmp_path / f"images{suffix}", tmp_path / f"labels{suffix}")
    assert x.dtype == np.float32
    assert y.dtype == np.int32
    np.testing.assert_allclose(x, images / 255, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)
    # Big-endian words, and floats.
    write_idx(tmp_path / "words", labels.astype(np.int32))
    write_idx(tmp_path / "floats", x)
    again = load_idx(tmp_path / "floats", tmp_path / "words")
    np.testing.assert_array_equal(again[0], x)
    np.testing.assert_array_equal(again[1], y)


def test_load_idx_refuses(tmp_path):
    images, labels = make_images(7)
    write_idx(tmp_path / "images", images)
    write_idx(tmp_path / "labels", labels)
    write_idx(tmp_path / "few", labels[:5])
    write_idx(tmp_path / "zip.gz", images)
    (tmp_path / "cut").write_bytes((tmp_path / "images").read_bytes()[:-9])
    (tmp_path / "head").write_bytes((tmp_path / "images").read_bytes()[:9])
    (tmp_path / "cut.gz").write_bytes((tmp_path / "zip.gz").read_bytes()[:-20])
    (tmp_path / "text").write_text("label,pixel0,pixel1\n")
    for a, b, message in [
        ("nowhere", "labels", "nowhere does not exist"),
        ("text", "labels", "not an IDX file"),
        ("cut", "labels", "the copy is not complete"),
        ("head", "labels", "the copy is not complete"),
        ("cut.gz", "labels", "damaged gzip"),
        ("images", "few", "7 images, but 5 labels"),
        ("labels", "labels", r"must have shape \(n, height, width\)"),
        ("images", "images", r"labels must be integers of shape \(n,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_idx(tmp_path / a, tmp_path / b)


def test_load_npz_folder(tmp_path):
    images, labels = make_images(9)
    np.savez(tmp_path / "b.npz", images=images[4:] / np.float32(255), labels=labels[4:])
    np.savez_compressed(tmp_path / "a.npz", images=images[:4], labels=labels[:4])
    x, y = load_npz_folder(tmp_path)
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(x, images / 255, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)


def test_load_npz_folder_refuses(tmp_path):
    images, labels = make_images(4)
    with pytest.raises(ValueError, match="not a folder with .npz files"):
        load_npz_folder(tmp_path / "nowhere")
    for content, message in [
        (dict(x=images, labels=labels), r"lacks \['images'\]; it holds"),
        (dict(images=images.astype(np.float32), labels=labels), r"must lie in \[0, 1\]"),
        (dict(images=images.astype(np.int64), labels=labels), "uint8, or floats"),
        (dict(images=images, labels=labels.astype(np.float32)), "labels must be integers"),
        (dict(images=images, labels=labels.astype(np.int64) - 5), "count from 0"),
    ]:
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(ValueError, match=message):
            load_npz_folder(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="not a readable .npz"):
        load_npz_folder(tmp_path)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", images=images[:, :6], labels=labels)
    with pytest.raises(ValueError, match="one size"):
        load_npz_folder(tmp_path)


def test_load_folder(tmp_path):
    train, test = make_images(6), make_images(3, seed=1)
    with pytest.raises(ValueError, match=r"neither .* nor the IDX file train-images-idx3-ubyte"):
        load_folder(tmp_path)
    for name, (images, labels) in {"train": train, "t10k": test}.items():
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels)
    from_idx = load_folder(tmp_path)
    for name, (images, labels) in {"train": train, "test": test}.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "0.npz", images=images, labels=labels)
    jax.tree.map(np.testing.assert_array_equal, from_idx, load_folder(tmp_path))
    np.savez(tmp_path / "test" / "0.npz", images=test[0][:, :4], labels=test[1])
    with pytest.raises(ValueError, match="training images are"):
        load_folder(tmp_path)


# Logs


def test_log_drops_what_runs_again(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write([{"step": s, "loss": 1.0 / s} for s in range(1, 9)])
    log.write([{"step": 9, "loss": float("nan")}])
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 9, "loss": None}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    log = MetricsLog(tmp_path, 6, tensorboard=False)
    log.write([{"step": 7, "loss": 0.5}])
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[-1]["loss"] == 0.5


# The model and the loop, in this process (x64 on and strict promotion: everything must stay float32 by itself)


def tiny(attention: Any, adjoint: Any = "closed-form", image=(8, 8)) -> VisionTransformer:
    config = TransformerConfig(image, classes=4, width=16, depth=1, heads=2, attention=attention, adjoint=adjoint)
    return VisionTransformer(config, key=jr.key(0))


def classify(model, batch, key):
    del key
    images, labels = batch
    logits = jax.vmap(model)(images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), {}


class Linear(eqx.Module):
    """What the tests of the loop train: it compiles at once."""

    weight: jax.Array

    def __init__(self):
        self.weight = 0.1 * jr.normal(jr.key(0), (4, 64), jnp.float32)

    def __call__(self, image):
        return self.weight @ image.ravel()


IMAGES, LABELS = make_images(64)
DATA = (IMAGES / np.float32(255), LABELS.astype(np.int32))


def small_fit(directory, model=None, loss=classify, optimizer=None, **kwargs):
    settings: dict[str, Any] = dict(steps=6, config={"lr": 0.01}, mesh=start(), key=jr.key(1), tensorboard=False)
    settings["batches"] = shuffled_batches(DATA, 16, seed=0)
    model, optimizer = Linear() if model is None else model, optax.adam(0.01) if optimizer is None else optimizer
    return fit(model, optimizer, loss, directory=directory, **(settings | kwargs))


@pytest.mark.parametrize("attention", MAPS)
def test_every_attention_map_trains(tmp_path, attention):
    model = tiny(attention)
    before = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    one_batch = tuple(a[:16] for a in DATA)
    state = small_fit(tmp_path, model, steps=2, batches=lambda step: one_batch)
    after = jax.tree.leaves(eqx.filter(state.model, eqx.is_array))
    assert int(state.step) == 2
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.all(np.isfinite(b))
        assert not np.array_equal(a, b), f"a parameter of shape {a.shape} has not moved"
    alphas, learnt = state.model.alphas(), attention == "entmax"
    assert (alphas is not None) == learnt
    if learnt:
        assert np.all(np.abs(np.asarray(alphas) - 1.5) > 1e-4)
        assert len(set(np.asarray(alphas).ravel().tolist())) == 2, "the heads share one alpha"
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert second["loss"] < first["loss"]
    assert first["solver/solves"] == 0, "a closed form has no linear solve"


@pytest.mark.parametrize("adjoint", ["closed-form", "implicit"])
def test_the_gradient_lowers_for_cuda_and_tpu(adjoint):
    dynamic, static = eqx.partition(tiny("entmax", adjoint), eqx.is_array)

    def gradient(dynamic, *batch):
        model = eqx.combine(dynamic, static)
        out = value_and_grad_with_health(classify, has_aux=True, per_element=False)(model, batch, None)
        return eqx.filter(out, eqx.is_array)

    batch = tuple(a[:4] for a in DATA)
    exported = jax.export.export(jax.jit(gradient), platforms=("cpu", "cuda", "tpu"))(dynamic, *batch)
    called = re.findall(r"custom_call @([\w.]+)", exported.mlir_module())
    assert not [name for name in called if "callback" in name]


def test_model_shapes_and_errors():
    model = tiny("sparsemax", image=(6, 8))
    logits, maps = jax.eval_shape(model.with_maps, jnp.ones((6, 8), jnp.float32))
    assert (logits.shape, maps.shape) == ((4,), (1, 2, 13, 13))
    assert logits.dtype == maps.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"use jax\.vmap"):
        model(jnp.ones((3, 6, 8), jnp.float32))
    for wrong, message in [
        (dict(patch=3), "3 does not divide 8 x 8. Both sides are multiples of 1, 2, 4, 8"),
        (dict(attention="hard"), "attention must be one of softmax, sparsemax, entmax, entmax-fixed"),
        (dict(attention="entmax", alpha=2.5), "strictly between 1 and 2 where it is learnt"),
        (dict(attention="entmax-fixed", alpha=4.5), r"alpha must lie in \(1, 4\]"),
        (dict(width=10), "width must be a multiple of heads"),
        (dict(depth=0), "depth must be at least 1"),
        (dict(overlap=-1), "overlap must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**wrong)


def spoil(step):
    """The batches of `small_fit`, with NaN in the one of a step."""
    batches = shuffled_batches(DATA, 16, seed=0)

    def spoilt(s):
        images, labels = batches(s)
        return (np.where(s == step - 1, np.float32(np.nan), images), labels)

    return spoilt


def test_solver_health_is_logged_and_a_stop_names_what_failed(tmp_path):
    solves = 16 * 2 * 17  # images, heads, rows of scores: as many linear solves
    message = rf"step 3: the loss is nan.*solver/forward_failures = {solves}\..*No checkpoint exists"
    with pytest.raises(NonFiniteError, match=message):
        small_fit(tmp_path, tiny("entmax", "implicit"), batches=spoil(3))
    good, _, bad = read_metrics(tmp_path / "metrics.jsonl")
    assert good["solver/solves"] == bad["solver/solves"] == solves
    assert good["solver/forward_failures"] == good["solver/backward_failures"] == 0
    assert 0 < good["solver/steps"] < 50
    assert good["solver/forward_residual"] < 1e-5
    assert good["solver/backward_residual"] < 1e-5
    assert bad["loss"] is None


def test_stops_on_a_loss_that_is_not_finite(tmp_path):
    message = r"step 5: the loss is nan and .*No solve failed.*checkpoint is step 4"
    settings = dict(steps=9, save_every=2, log_every=4)
    with pytest.raises(NonFiniteError, match=message):
        small_fit(tmp_path, batches=spoil(5), **settings)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] is None
    # The last good checkpoint is good: with the data mended, the run goes on from it and ends as if nothing had been.
    resumed = small_fit(tmp_path, **settings)
    whole = small_fit(tmp_path / "whole", steps=9)
    jax.tree.map(np.testing.assert_array_equal, arrays(resumed), arrays(whole))
    rows, expected = (without_time(read_metrics(run / "metrics.jsonl")) for run in (tmp_path, tmp_path / "whole"))
    assert rows == expected


def test_stops_on_a_gradient_that_is_not_finite(tmp_path):
    def loss(model, batch, key):
        value, aux = classify(model, batch, key)
        return value + jnp.sqrt(0 * model.weight[0, 0]), aux

    with pytest.raises(NonFiniteError, match=r"step 1: the gradient norm is (nan|inf)"):
        small_fit(tmp_path, loss=loss)


def test_stops_on_weights_that_are_not_finite(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1: the parameter norm is (nan|inf)"):
        small_fit(tmp_path, optimizer=optax.sgd(float("inf")))


def test_another_configuration_is_refused(tmp_path):
    before = small_fit(tmp_path, steps=2, config={"lr": 0.01, "attention": "softmax"})
    with pytest.raises(ValueError, match=r"lr was 0.01 and is now 0.1, width was None and is now 3\. Choose another"):
        small_fit(tmp_path, steps=2, config={"lr": 0.1, "attention": "softmax", "width": 3})
    with pytest.raises(ValueError, match="holds a run at step 2"):
        small_fit(tmp_path, steps=2, config={"lr": 0.01, "attention": "softmax"}, resume=False)
    again = small_fit(tmp_path, steps=2, config={"lr": 0.01, "attention": "softmax"})  # complete: nothing to do
    jax.tree.map(np.testing.assert_array_equal, arrays(before), arrays(again))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        small_fit(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="steps must be at least 1, but is -3"):
        small_fit(tmp_path / "other", steps=-3)


def test_the_callers_model_survives(tmp_path):
    model = Linear()
    before = np.array(model.weight)
    small_fit(tmp_path, model, steps=1)  # which donates its own copies
    np.testing.assert_array_equal(model.weight, before)


def test_evaluators_are_logged_with_their_step(tmp_path):
    def metric(model, image, label):
        return {"accuracy": (jnp.argmax(model(image)).astype(label.dtype) == label).astype(jnp.float32)}

    evaluate = mean_over(metric, DATA, mesh=start(), prefix="test")
    state = small_fit(tmp_path, steps=5, eval_every=2, log_every=3, evaluate=evaluate)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "test/accuracy" in row] == [2, 4, 5]
    logits = jax.vmap(state.model)(DATA[0])
    assert rows[-1]["test/accuracy"] == pytest.approx(np.mean(np.argmax(np.asarray(logits), -1) == DATA[1]))


def test_mean_over_counts_every_row_once():
    x = np.arange(23, dtype=np.float32)
    evaluate = mean_over(lambda model, a: {"mean": model * a}, (x,), mesh=start(), prefix="test", batch_size=5)
    assert list(evaluate(jnp.float32(2))) == [("test/mean", pytest.approx(2 * x.mean()))]


def test_tensorboard_events_are_written(tmp_path):
    small_fit(tmp_path, steps=1, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 100


def arrays(state):
    return jax.tree.map(
        lambda a: np.asarray(jr.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a),
        eqx.filter(state, eqx.is_array),
    )


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# The command line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attention", "hardmax"], "softmax"),
        (["--steps", "-5"], "steps must be at least 1"),
        (["--alpha", "0.5"], "alpha must lie in"),
        (["--attention", "entmax", "--alpha", "2"], "alpha must lie in"),
        (["--batch-size", "100", "--devices", "8"], "Try --batch-size 104"),
        (["--lr", "-1"], "lr must not be negative"),
        (["--seed", "-1"], "seed must not be negative"),
    ],
)
def test_wrong_arguments_are_explained(args, message, capsys):
    with pytest.raises(SystemExit):
        main(args)
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed


def test_other_wrong_arguments(tmp_path):
    assert jax.devices()  # before JAX has started, as many devices of a CPU as are asked for are made
    with pytest.raises(ValueError, match="devices is 64, but this process sees"):
        start(64)
    with pytest.raises(ValueError, match="patch must divide the image"):
        main(["--patch", "3", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="neither .* nor the IDX file"):
        main(["--data", str(tmp_path), "--out", str(tmp_path)])
    assert tyro.cli(Config, args=[]) == Config()


# Whole runs, in processes of their own

STEPS = 40
TINY = {"steps": STEPS, "batch_size": 16, "width": 16, "depth": 1, "heads": 2, "attention": "entmax"}
TINY |= {"log_every": 1, "eval_every": 10, "save_every": 7, "plots": False, "tensorboard": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, n in (("train", 100), ("test", 30)):
        images, labels = make_images(n, seed=n)
        (folder / name).mkdir()
        np.savez(folder / name / "0.npz", images=images, labels=labels)
    return folder


def launch(config: dict, final: Path) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")} | {"JAX_PLATFORMS": "cpu"}
    with open(final.with_suffix(".log"), "a") as log:
        command = [sys.executable, "-m", "tests.train_worker", json.dumps(config, default=str), str(final)]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, final: Path, timeout: float = 200) -> None:
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = "a timeout"
    assert code == 0, f"the run ended with {code}:\n{final.with_suffix('.log').read_text()[-3000:]}"


def assert_same_losses(run: Path, reference: Path) -> None:
    """The order of float32 sums differs, nothing else: 1e-5 at the first steps, growing slowly as training goes on."""
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, reference))
    assert [row["step"] for row in ours] == list(range(1, len(ours) + 1))
    assert len(ours) >= 6
    for a, b in zip(ours, theirs[: len(ours)], strict=True):
        rtol = 1e-5 if a["step"] <= 6 else 2e-3
        assert a["loss"] == pytest.approx(b["loss"], rel=rtol), f"step {a['step']}"
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=10 * rtol), f"step {a['step']}"


def kill_after(process: subprocess.Popen, run: Path, step: int, final: Path) -> None:
    """SIGKILL once `metrics.jsonl` holds that many steps."""
    limit, metrics = time.monotonic() + 150, run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < limit:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.001)
    process.kill()
    code, written = process.wait(), final.with_suffix(".log").read_text()[-3000:]
    assert code == -9, f"the run ended with {code} before it was killed after step {step}:\n{written}"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two runs at once: an uninterrupted one on one device (directory, final arrays), and the start of one on eight."""
    folder = tmp_path_factory.mktemp("runs")
    one, eight = folder / "one.npz", folder / "eight.npz"
    process = launch(TINY | {"data": data, "out": folder / "one"}, one)
    beside = launch(TINY | {"data": data, "out": folder / "eight", "devices": 8}, eight)
    try:
        kill_after(beside, folder / "eight", 6, eight)  # eight devices on two cores are slow, and six steps say enough
        finish(process, one)
    finally:
        process.kill()
        process.wait()
    return folder / "one", one, folder / "eight"


def test_eight_devices_equal_one(runs):
    assert_same_losses(runs[2], runs[0])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(runs, data, tmp_path):
    step = random.SystemRandom().randint(1, STEPS - 10)
    config, final = TINY | {"data": data, "out": tmp_path / "run"}, tmp_path / "final.npz"
    kill_after(launch(config, final), tmp_path / "run", step, final)
    finish(launch(config, final), final)

    about, (reference, reference_final, _) = f"killed after step {step}", runs
    with np.load(final) as ours, np.load(reference_final) as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in theirs.files:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].tobytes() == theirs[name].tobytes(), f"{about}: {name} differs"
    ours, theirs = (without_time(read_metrics(run / "metrics.jsonl")) for run in (tmp_path / "run", reference))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1)), about
    assert ours == theirs, about


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.full
def test_two_processes_equal_one(runs, data, tmp_path):
    config = TINY | {"data": data, "out": tmp_path / "run", "devices": 1, "distributed": True, "processes": 2}
    config |= {"coordinator": f"127.0.0.1:{free_port()}"}
    finals = [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [launch(config | {"process": p}, finals[p]) for p in range(2)]
    try:
        for process, final in zip(processes, finals, strict=True):
            finish(process, final)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert_same_losses(tmp_path / "run", runs[0])


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attention", MAPS[:3])
def test_digits_to_97_percent(attention, tmp_path, capsys):
    main(["--attention", attention, "--out", str(tmp_path)])
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 500
    assert last["test/accuracy"] >= 0.97
    assert last["attention/failures"] == 0
    for name in ("curves.png", "attention.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    assert "test accuracy" in capsys.readouterr().out
