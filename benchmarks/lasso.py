r"""The lasso as a layer: what does its solution cost, and what its hypergradient, by the size of the buffer for the support?

    uv run --group bench python -m benchmarks.lasso            n = 500, p = 2000 and p = 500, float64; about a minute on 2 CPU cores
    uv run --group bench python -m benchmarks.lasso --quick    n = 100, p = 200; writes no files

$\min_\beta \|y - X\beta\|^2 / 2n + \lambda \|\beta\|_1$ on a correlated design, $\lambda = 0.1\,\lambda_{max}$; the hypergradient is that of a random
linear function of $\beta$ in p separate weights.

- `solve`: from the data to the coefficients. `hypergradient`: from a cotangent to the gradient, the solution being known (for jaxopt, and
  where it cannot be told apart: value and gradient, less `solve`). Medians over rounds in which the methods take turns.
- *Error*: of the gradient, against $-n (X_S^\top X_S)^{-1}$ on the support of a solution found with NumPy by active sets from our own
  support, whose optimality is checked there.
- `masked p x p`: the same derivative by a Cholesky factor of the whole matrix, identity off the support.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import statistics
import sys
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import declarative as dn

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"


def problem(n: int, p: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    for j in range(1, p):
        X[:, j] = 0.5 * X[:, j - 1] + np.sqrt(0.75) * X[:, j]
    beta = np.zeros(p)
    beta[rng.choice(p, p // 20, replace=False)] = rng.standard_normal(p // 20)
    y = X @ beta + rng.standard_normal(n)
    return X, y, np.full(p, 0.1 * np.abs(X.T @ y).max() / n), rng.standard_normal(p)


def truth(X, y, lam, cotangent, beta):
    """The hypergradient, from the support and signs of `beta`, which are checked to be those of the solution."""
    n, on = len(y), beta != 0
    sign = np.sign(beta[on])
    gram = X[:, on].T @ X[:, on] / n
    exact = np.linalg.solve(gram, X[:, on].T @ y / n - lam[on] * sign)
    c = X.T @ (y - X[:, on] @ exact) / n
    assert np.all(np.sign(exact) == sign), "signs"
    assert np.all(np.abs(c[~on]) < lam[~on]), "support"
    gradient = np.zeros_like(lam)
    gradient[on] = -np.linalg.solve(gram, cotangent[on]) * sign
    return gradient, np.bincount(np.flatnonzero(on), exact, len(lam))


def layer(solve, cotangent):
    """(solve, state of the backward pass, backward pass), each compiled by itself."""
    forward = jax.jit(solve)
    record = jax.jit(lambda *data: jax.vjp(lambda lam: solve(*data[:2], lam), data[2]))
    backward = jax.jit(lambda pull: pull(cotangent)[0])
    return forward, record, backward


def masked(forward, cotangent):
    """The hypergradient by the p x p matrix."""

    @jax.jit
    def backward(X, y, lam, beta):
        del y, lam
        on = beta != 0
        both = on[:, None] & on[None, :]
        gram = jnp.where(both, X.T @ X / X.shape[0], jnp.eye(beta.size, dtype=X.dtype))
        factor = jax.scipy.linalg.cho_factor(gram)
        return -jnp.where(on, jax.scipy.linalg.cho_solve(factor, jnp.where(on, cotangent, 0)) * jnp.sign(beta), 0)

    return forward, backward


def contenders(X, y, lam, cotangent, k: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Method -> {what: function without arguments}, and what is missing."""
    data = tuple(map(jnp.asarray, (X, y, lam)))
    c = jnp.asarray(cotangent)
    found, missing = {}, {}
    for name, k_max in ((f"declarative, k_max = {k}", k), ("declarative, k_max = None", None)):
        forward, record, backward = layer(dn.Lasso(k_max, throw=False), c)
        _, pull = record(*data)
        found[name] = {
            "solve": lambda forward=forward: forward(*data),
            "hypergradient": lambda backward=backward, pull=pull: backward(pull),
        }
    forward, backward = masked(jax.jit(dn.Lasso(k, throw=False)), c)
    beta = forward(*data)
    found["masked p x p Cholesky"] = {"hypergradient": lambda: backward(*data, beta)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jaxopt = importlib.import_module("jaxopt")
    except ImportError:
        missing["jaxopt"] = "not installed"
    else:
        for tol in (1e-3, 1e-8):
            loss = lambda beta, data: jnp.sum((data[0] @ beta - data[1]) ** 2) / (2 * data[1].size)
            solver = jaxopt.ProximalGradient(loss, jaxopt.prox.prox_lasso, tol=tol, maxiter=5000)
            solve = jax.jit(
                lambda X, y, lam, solver=solver: (
                    solver.run(jnp.zeros_like(lam), hyperparams_prox=lam, data=(X, y)).params
                )
            )
            both = jax.jit(lambda X, y, lam, solve=solve: jax.value_and_grad(lambda lam: c @ solve(X, y, lam))(lam)[1])
            found[f"jaxopt proximal gradient, {tol:.0e}"] = {
                "solve": lambda solve=solve: solve(*data),
                "both": lambda both=both: both(*data),
            }
    try:
        from sklearn.linear_model import Lasso
    except ImportError:
        missing["scikit-learn"] = "not installed"
    else:
        model = Lasso(alpha=float(lam[0]), fit_intercept=False, tol=1e-10, max_iter=10**5)
        columns = np.asfortranarray(X)
        found["scikit-learn, 1e-10"] = {"solve": lambda: model.fit(columns, y).coef_}
    return found, missing


def measure(n: int, p: int, k: int, rounds: int) -> list[dict[str, Any]]:
    X, y, lam, cotangent = problem(n, p)
    found, missing = contenders(X, y, lam, cotangent, k)
    beta = np.asarray(jax.jit(dn.Lasso())(*map(jnp.asarray, (X, y, lam))))
    gradient, exact = truth(X, y, lam, cotangent, beta)
    outcomes, times = {}, {(name, what): [] for name, parts in found.items() for what in parts}
    for name, what in times:
        outcomes[name, what] = np.asarray(jax.block_until_ready(found[name][what]()))
    for _ in range(rounds):
        for name, what in times:
            start = time.perf_counter()
            jax.block_until_ready(found[name][what]())
            times[name, what].append(1e3 * (time.perf_counter() - start))
    off = lambda got, want: float(np.abs(got - want).max() / np.abs(want).max())
    rows = []
    for name, parts in found.items():
        row: dict[str, Any] = {"method": name, "n": n, "p": p, "k_max": k, "support": int(np.sum(beta != 0))}
        median = {what: statistics.median(times[name, what]) for what in parts}
        row["solve ms"] = median.get("solve")
        row["hypergradient ms"] = median.get(
            "hypergradient", median["both"] - median["solve"] if "both" in median else None
        )
        row["solution error"] = off(outcomes[name, "solve"], exact) if "solve" in parts else None
        what = next((what for what in ("hypergradient", "both") if what in parts), None)
        row["hypergradient error"] = None if what is None else off(outcomes[name, what], gradient)
        rows.append(row)
    return rows + [{"method": name, "n": n, "p": p, "state": why} for name, why in missing.items()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'method':32}{'solve':>12}{'hypergradient':>16}{'error of solution':>20}{'of hypergradient':>18}"]
    show = lambda value, form: "-" if value is None else format(value, form)
    for row in rows:
        if "state" in row:
            lines.append(f"{row['method']:32}{row['state']}")
            continue
        lines.append(
            f"{row['method']:32}{show(row['solve ms'], '.2f'):>9} ms{show(row['hypergradient ms'], '.2f'):>13} ms"
            f"{show(row['solution error'], '.0e'):>20}{show(row['hypergradient error'], '.0e'):>18}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n = 100, p = 200; writes no files")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for lasso.jsonl")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    about = {
        "benchmark": "lasso",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions("jax", "jaxlib", "equinox", "numpy", "jaxopt", "scikit-learn"),
        "machine": machine(),
    }
    failed = False
    for n, p in ((100, 200),) if arguments.quick else ((500, 500), (500, 2000)):
        k = p // 10 if p > n else p // 5
        rows = measure(n, p, k, 3 if arguments.quick else arguments.rounds)
        ours, whole = (next(row for row in rows if start in row["method"]) for start in (f"k_max = {k}", "masked"))
        print(f"\nn = {n}, p = {p}, {ours['support']} coefficients\n{table(rows)}", flush=True)
        ratio = whole["hypergradient ms"] / ours["hypergradient ms"]
        checks = [("hypergradient error at most 1e-6", ours["hypergradient error"] <= 1e-6)]
        if p >= 2000:
            checks.append((f"k_max = {k} at least 10 times cheaper than p x p: {ratio:.0f} times", ratio >= 10))
        for what, ok in checks:
            print(f"{'ok' if ok else 'FAIL'}: {what}")
            failed |= not ok
        if not arguments.quick:
            arguments.out.mkdir(parents=True, exist_ok=True)
            with open(arguments.out / "lasso.jsonl", "a") as file:
                file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
    return failed


if __name__ == "__main__":
    sys.exit(main())
