"""Batches as a pure function of (seed, step), and readers for labelled images on disk."""

import gzip
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np


def shuffled_batches(
    arrays: tuple[np.ndarray, ...], batch_size: int, seed: int, *, process: int = 0, processes: int = 1
) -> Callable[[int], tuple[np.ndarray, ...]]:
    """A function from the step (0, 1, …) to that step's batch: the same rows of every array.

    Each epoch is a permutation drawn from (seed, epoch), cut into whole batches; the rows left over are dropped, other ones
    each time. Nothing is remembered from one step to the next, so a resumed run needs no state of the data. With several
    processes each gets its own rows of the one global batch of `batch_size`.
    """
    rows = len(arrays[0])
    if any(len(a) != rows for a in arrays):
        raise ValueError(f"all arrays need the same number of rows, but have {[len(a) for a in arrays]}.")
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size must lie between 1 and the {rows} rows of the data, but is {batch_size}.")
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, but is {batch_size}.")
    per_epoch, share = rows // batch_size, batch_size // processes

    @lru_cache(maxsize=1)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(rows)

    def batch(step: int) -> tuple[np.ndarray, ...]:
        epoch, position = divmod(step, per_epoch)
        first = position * batch_size + process * share
        chosen = permutation(epoch)[first : first + share]
        return tuple(a[chosen] for a in arrays)

    return batch


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: str | Path) -> np.ndarray:
    """One IDX file (the format of MNIST): 0, 0, type, number of axes; each axis as big-endian uint32; the data."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); copy it again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise ValueError(
            f"{path} is not an IDX file: it starts with the bytes {raw[:4].hex(' ')}, not with 00 00 <type> <axes>."
        )
    dtype, axes = np.dtype(_IDX_TYPES[raw[2]]), raw[3]
    start = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4")) if len(raw) >= start else ()
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if len(raw) < start or len(raw) != expected:
        raise ValueError(
            f"{path} holds {len(raw)} bytes, but its header promises {expected}; the copy is not complete."
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _labelled_images(images: np.ndarray, labels: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Checks, then float32 images (n, height, width) in [0, 1] and int32 labels (n,)."""
    if images.ndim != 3:
        raise ValueError(f"{source}: images must have shape (n, height, width), not {images.shape}.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{source}: labels must be integers of shape (n,), not {labels.dtype} {labels.shape}.")
    if len(images) != len(labels):
        raise ValueError(f"{source}: {len(images)} images, but {len(labels)} labels.")
    if len(images) == 0 or labels.min() < 0:
        raise ValueError(f"{source}: needs at least one image, and labels that count from 0.")
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    elif not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{source}: images must be uint8, or floats in [0, 1], not {images.dtype}.")
    elif not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{source}: float images must lie in [0, 1], but span [{images.min()}, {images.max()}].")
    return images.astype(np.float32), labels.astype(np.int32)


def load_idx(path_images: str | Path, path_labels: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Labelled images from a pair of IDX files, gzipped or not: float32 (n, height, width) in [0, 1], and int32 (n,)."""
    return _labelled_images(_read_idx(path_images), _read_idx(path_labels), f"{path_images} and {path_labels}")


def load_npz_folder(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Labelled images from every `.npz` file of a folder, in the order of their names, joined.

    Each file holds `images` (n, height, width), uint8 or floats in [0, 1], and integer `labels` (n,).
    """
    path = Path(path)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise ValueError(f"{path} is not a folder with .npz files in it.")
    parts = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as content:
                held = {name: content[name] for name in content.files}
        except (TypeError, ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is not a readable .npz file ({error}).") from error
        missing = {"images", "labels"} - held.keys()
        if missing:
            raise ValueError(f"{file} lacks {sorted(missing)}; it holds {sorted(held)}.")
        parts.append(_labelled_images(held["images"], held["labels"], str(file)))
    shapes = {images.shape[1:] for images, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"{path}: all images need one size, but the files hold {sorted(shapes)}.")
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def load_folder(path: str | Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(train, test) from a folder: either `train/` and `test/` with .npz files, or the four IDX files under MNIST's names."""
    path = Path(path)
    if (path / "train").is_dir() and (path / "test").is_dir():
        train, test = load_npz_folder(path / "train"), load_npz_folder(path / "test")
    else:
        names = {}
        for name in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ):
            found = [p for p in (path / name, path / f"{name}.gz") if p.is_file()]
            if not found:
                raise ValueError(
                    f"{path} holds neither `train/` and `test/` folders with .npz files nor the IDX file {name}[.gz]."
                )
            names[name] = found[0]
        a, b, c, d = names.values()
        train, test = load_idx(a, b), load_idx(c, d)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{path}: training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}.")
    return train, test


def sklearn_digits():
    """(train, test) of scikit-learn's digits: images (n, 8, 8) float32 in [0, 1], labels int32; a stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)  # pyright: ignore[reportAttributeAccessIssue]  (a Bunch)
    # The split does not change with the run's seed, so that runs can be compared.
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def plane(name: str, rows: int, seed) -> np.ndarray:
    """`rows` points (n, 2) float32 of a density in the plane: `moons` (two half circles) or `pinwheel` (five bent arms)."""
    rng = np.random.default_rng(seed)
    if name == "moons":
        angle, lower = rng.uniform(0, np.pi, rows), rng.integers(0, 2, rows)
        points = np.stack([np.cos(angle) - 0.5 + lower, (1 - 2 * lower) * (np.sin(angle) - 0.25)], 1)
        points = 1.5 * points + 0.12 * rng.standard_normal((rows, 2))
    elif name == "pinwheel":
        points = pinwheel(rng.integers(0, 5, rows), rng, radius=1.6, radial=0.6, tangential=0.16, rate=0.35)
    else:
        raise ValueError(f"the densities in the plane are moons and pinwheel, not {name!r}.")
    return points.astype(np.float32)


def pinwheel(
    arm: np.ndarray,
    rng: np.random.Generator,
    *,
    radius: float = 1.0,
    radial: float = 0.3,
    tangential: float = 0.05,
    rate: float = 0.25,
) -> np.ndarray:
    """A point (n, 2) of each given arm, of five: Gaussian along and across it, then turned by `rate` e^(distance from the centre)."""
    along, across = radius + radial * rng.standard_normal(arm.size), tangential * rng.standard_normal(arm.size)
    angle = 2 * np.pi * arm / 5 + rate * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([along * cos - across * sin, along * sin + across * cos], 1).astype(np.float32)


def digits_pca(components: int):
    """(train, test, to_images): the leading principal components of scikit-learn's digits, float32 (n, components), scaled to variance 1.

    Directions, mean and scale come from the training part only. `to_images` maps components to images (n, 8, 8).
    """
    from sklearn.decomposition import PCA

    (train, _), (test, _) = sklearn_digits()
    if not 1 <= components <= 61:  # three pixels are always empty
        raise ValueError(f"components must lie between 1 and 61, but is {components}.")
    pca = PCA(components, whiten=True, svd_solver="full").fit(train.reshape(len(train), -1))
    project = lambda images: pca.transform(images.reshape(len(images), -1)).astype(np.float32)
    return project(train), project(test), lambda z: pca.inverse_transform(z).reshape(-1, 8, 8)


# A set of series: times (rows, n) in [0, 1], values (rows, n, channels), and a mask of the values that a model may see. float32.
Series = tuple[np.ndarray, np.ndarray, np.ndarray]


def oscillations(
    rows: int, length: int, seed, *, end: float = 2 / 3, share: float = 0.4, noise: float = 0.05
) -> Series:
    """Damped oscillations with their own frequency, phase, size and damping, measured with noise at their own irregular times.

    A model may see `share` of the values before time `end`, at random.
    """
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 1, (rows, length)), 1)
    turns, phase, size, damping = (
        rng.uniform(low, high, (rows, 1)) for low, high in ((2, 4), (0, 2 * np.pi), (0.7, 1.3), (0.3, 1.2))
    )
    values = size * np.exp(-damping * times) * np.sin(2 * np.pi * turns * times + phase)
    values += noise * rng.standard_normal(values.shape)
    seen = (times < end) & (rng.uniform(size=times.shape) < share)
    return times.astype(np.float32), values[..., None].astype(np.float32), seen[..., None].astype(np.float32)


def eeg(length: int, seed, *, end: float = 2 / 3, share: float = 0.5) -> tuple[Series, Series]:
    """(train, test): windows of the electroencephalogram in matplotlib's sample data, 4 channels at 800 times.

    Training windows lie in the first 600 times, test windows in the last 200; they overlap within a part, never across. Of the values
    before `end` of a window a model may see `share`, at random and each channel for itself: irregular gaps on a regular grid.
    """
    import matplotlib.cbook

    if not 4 <= length <= 200:
        raise ValueError(f"length must lie between 4 and 200 for this recording, but is {length}.")
    try:
        path = Path(str(matplotlib.cbook.get_sample_data("eeg.dat", asfileobj=False)))
        recording = np.frombuffer(path.read_bytes(), np.float64).reshape(800, 4)
    except OSError as error:
        raise ValueError("this matplotlib lacks its sample data (eeg.dat); use another data set.") from error
    recording = (recording - recording[:600].mean(0)) / recording[:600].std(0)
    rng = np.random.default_rng(seed)

    def windows(part: np.ndarray, every: int) -> Series:
        values = np.stack([part[first : first + length] for first in range(0, len(part) - length + 1, every)])
        times = np.broadcast_to(np.linspace(0, 1, length), values.shape[:2])
        seen = (times[..., None] < end) & (rng.uniform(size=values.shape) < share)
        return times.astype(np.float32), values.astype(np.float32), seen.astype(np.float32)

    return windows(recording[:600], 1), windows(recording[600:], 8)
