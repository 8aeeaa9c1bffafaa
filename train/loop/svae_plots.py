"""Figure of a structured autoencoder: what its components are, before and behind the network, and how gradients differ."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np

from .log import read_metrics

LINES = {"implicit": "#1f4e9c", "one-step": "#d9822b", "none": "#c0392b"}
NAMES = {"implicit": "implicit function theorem", "one-step": "one sweep", "none": "term left out"}


def plot_svae(model: Any, rows: np.ndarray, local: Any, folder: Path, *, seed: int) -> None:
    """Rows and their latent means by component, samples of the model, and errors of gradients over the run."""
    decode = jax.jit(jax.vmap(lambda z: model.decoder(z)))
    keys, D = jr.split(jr.key(seed), 3), model.config.latent
    shares = np.asarray(local.r)
    if model.mixture is None:  # one component, the prior
        used, means, covariances = [], jnp.zeros((1, D), jnp.float32), jnp.eye(D, dtype=jnp.float32)[None]
        weights = jnp.zeros(1, jnp.float32)
    else:
        mixture = model.mixture
        used = [k for k, share in enumerate(shares.mean(0)) if share > 0.01]
        means, covariances = mixture.h / mixture.kappa[:, None], mixture.scale() / (mixture.nu - D + 1)[:, None, None]
        weights = jnp.log(mixture.alpha)
    label = np.argmax(shares, axis=1)
    chosen = jr.categorical(keys[0], weights, shape=(2000,))
    noise = jr.normal(keys[1], (2000, D), jnp.float32)
    z = means[chosen] + jnp.einsum("nij,nj->ni", jnp.linalg.cholesky(covariances)[chosen], noise)
    location, log_scale = decode(z)
    drawn = np.asarray(location + jnp.exp(log_scale) * jr.normal(keys[2], location.shape, jnp.float32))

    metrics = [row for row in read_metrics(folder / "metrics.jsonl") if "error/encoder/none" in row]
    figure, axes = plt.subplots(1, 4 if metrics else 3, figsize=(18 if metrics else 12, 4.4), layout="constrained")
    distinct = {k: plt.get_cmap("tab10")(i % 10) for i, k in enumerate(used)}
    colours = [distinct.get(k, (0.6, 0.6, 0.6, 1)) for k in label]
    limit = 1.15 * np.max(np.abs(rows))
    for ax, points, title in ((axes[0], rows, "held-out rows"), (axes[1], np.asarray(local.mean), "means of q(z)")):
        ax.scatter(*points.T[:2], s=8, c=colours, lw=0)
        ax.set(title=f"{title}, by component" if used else title, aspect="equal")
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for k in used:
        ring = np.asarray(means)[k] + 2 * (np.linalg.cholesky(np.asarray(covariances)[k]) @ circle).T
        axes[1].plot(*ring.T[:2], color=distinct[k], lw=1.2)
        axes[0].plot(*np.asarray(decode(jnp.asarray(ring, jnp.float32))[0]).T[:2], color=distinct[k], lw=1.2)
    axes[2].scatter(*drawn.T[:2], s=3, color="#1f3b73", alpha=0.5, lw=0)
    axes[2].set(title="samples of the model", aspect="equal")
    for ax in (axes[0], axes[2]):
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    for ax in axes[:3]:
        ax.set(xticks=[], yticks=[])

    for name, colour in LINES.items() if metrics else ():
        for part, style in (("encoder", "-"), ("mixture", ":")):
            values = [row[f"error/{part}/{name}"] for row in metrics]
            line = f"{NAMES[name]}, {part}"
            axes[3].plot([row["step"] for row in metrics], values, style, color=colour, lw=1.5, label=line)
    if metrics:
        axes[3].set(yscale="log", xlabel="step", title="relative error of the gradient")
        axes[3].legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "svae.png", dpi=110)
    plt.close(figure)
