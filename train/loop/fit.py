"""The training loop. Fork it: everything that happens in a run is in `fit`, top to bottom."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from declarative import value_and_grad_with_health

from .checkpoint import open_run, restore, save
from .devices import by_rows, put_replicated, put_rows, replicated
from .log import MetricsLog

# What `Health` reports of a step's implicit solves; all zero where every node has a closed form.
HEALTH = ("solves", "forward_failures", "backward_failures", "forward_residual", "backward_residual", "steps")


class TrainState(eqx.Module):
    """All that changes in a run, and all that a checkpoint holds. `step` counts finished updates; `key` never changes.

    `carried` is what the loss hands from step to step without a gradient, such as guesses of inner solves; None, nothing.
    """

    step: Int[Array, ""]
    model: PyTree
    opt_state: PyTree
    key: PRNGKeyArray
    carried: PyTree = None


class NonFiniteError(FloatingPointError):
    """The loss, the gradient or the weights of a step were not finite."""


def fit(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., tuple[Array, Any]],
    batches: Callable[[int], PyTree],
    *,
    steps: int,
    directory: str | Path,
    config: dict[str, Any],
    mesh: Mesh,
    key: PRNGKeyArray,
    carried: PyTree = None,
    evaluate: Callable[[PyTree], Iterable[tuple[str, float]]] | None = None,
    log_every: int = 10,
    eval_every: int = 100,
    save_every: int = 100,
    resume: bool = True,
    tensorboard: bool = True,
) -> TrainState:
    """Train `model` for `steps` updates, or finish the run that `directory` holds.

    **Arguments:**
    - `loss(model, batch, key)` returns the mean over the batch, and a flat dict of scalars that is logged. A name that ends
      in `failures` is a count, and is named in the error if the run stops.
    - `carried`: with it, `loss(model, batch, key, carried)` returns the mean, and a pair: the dict, and `carried` for the next step.
    - `batches(step)`: this process's rows of the batch of update `step + 1`, NumPy. A pure function of `step` (see
      `data.shuffled_batches`): with the key of step s folded from (key, s), an interrupted run continues exactly.
    - `config`: what determines the result, as JSON; a directory that holds a run of another one is refused.
    - `evaluate(model)` yields `(name, value)`; called every `eval_every` steps, and after the last, on every process.
    - `log_every`: how often metrics are fetched and written, a line a step; the host runs ahead of the devices in between.

    **Raises:** `NonFiniteError`, naming step and cause; the newest checkpoint is then the last good one.
    """
    for name, value in dict(steps=steps, log_every=log_every, eval_every=eval_every, save_every=save_every).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}.")

    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer step count
        opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    state = put_replicated(TrainState(jnp.zeros((), jnp.int32), model, opt_state, key, carried), mesh)

    manager = open_run(directory, config, resume=resume)
    if manager.latest_step() is not None:
        state = restore(manager, state)
    start = int(state.step)

    @eqx.filter_jit(donate="all")  # the old state's memory is reused for the new one
    def update(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        state = eqx.filter_shard(state, replicated(mesh))
        batch = eqx.filter_shard(batch, by_rows(mesh))
        step_key = jr.fold_in(state.key, state.step)
        gradient_of = value_and_grad_with_health(loss, has_aux=True, per_element=False)
        more = () if state.carried is None else (state.carried,)
        (value, aux), gradient, health = gradient_of(state.model, batch, step_key, *more)
        aux, kept = (aux, None) if state.carried is None else aux
        params = eqx.filter(state.model, eqx.is_inexact_array)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        model = eqx.apply_updates(state.model, updates)
        parameters = eqx.filter(model, eqx.is_inexact_array)
        norms = {"gradient_norm": optax.tree.norm(gradient), "parameter_norm": optax.tree.norm(parameters)}
        metrics = {"loss": value, **norms, **aux}
        metrics |= {f"solver/{name}": getattr(health, name) for name in HEALTH}
        new = TrainState(state.step + 1, model, opt_state, state.key, kept)
        return eqx.filter_shard((new, metrics), replicated(mesh))

    main = jax.process_index() == 0  # only this process writes metrics and draws the bar
    log = MetricsLog(Path(directory).resolve(), start, tensorboard=tensorboard) if main else None
    pending: list[dict[str, Array]] = []
    began = fetched = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}"), disable=not main)
    try:
        with bar:
            task = bar.add_task(
                "training", total=steps, completed=start, rate="compiling" if start < steps else "", status=""
            )
            for step in range(start + 1, steps + 1):
                state, metrics = update(state, put_rows(batches(step - 1), mesh))
                pending.append(metrics)
                last = step == steps
                evaluating, saving = last or step % eval_every == 0, last or step % save_every == 0
                if not (evaluating or saving or step % log_every == 0):
                    continue

                rows = [{"step": step - len(pending) + 1 + i, **m} for i, m in enumerate(jax.device_get(pending))]
                rows = [{name: np.asarray(value).item() for name, value in row.items()} for row in rows]
                pending.clear()
                bad = next((i for i, row in enumerate(rows) if not _finite(row)), None)
                if bad is None and evaluating and evaluate is not None:
                    rows[-1] |= {name: float(value) for name, value in evaluate(state.model)}
                now = time.perf_counter()
                rate, fetched = f"{len(rows) / (now - fetched):.1f} steps/s", now
                rows[-1]["seconds"] = round(now - began, 3)
                if log is not None:
                    log.write(rows if bad is None else rows[: bad + 1])
                if bad is not None:
                    manager.wait_until_finished()
                    raise NonFiniteError(_explain(rows[bad], manager.latest_step(), directory))
                if saving:
                    save(manager, step, state)
                bar.update(task, completed=step, rate=rate, status=f"loss {rows[-1]['loss']:.4f}")
    finally:
        manager.close()  # waits for the last write
        if log is not None:
            log.close()
    return state


# What must be finite for a step to count; the last of them is of the weights after the step, so that none is saved unseen.
_VITAL = ("loss", "gradient_norm", "parameter_norm")


def _finite(row: dict[str, float]) -> bool:
    return all(math.isfinite(row[name]) for name in _VITAL)


def _explain(row: dict[str, float], saved: int | None, directory: str | Path) -> str:
    causes = [f"the {name.replace('_', ' ')} is {row[name]}" for name in _VITAL if not math.isfinite(row[name])]
    failures = [f"{name} = {value:g}" for name, value in row.items() if name.endswith("failures") and value > 0]
    solves = f"Solves failed in this step: {', '.join(failures)}." if failures else "No solve failed in this step."
    good = f"The last good checkpoint is step {saved} in {directory}." if saved else "No checkpoint exists yet."
    also = (
        "for failed solves also better scaled inputs, or on_failure='zero'"
        if failures
        else "and check that step's data"
    )
    return (
        f"step {row['step']}: {' and '.join(causes)}. {solves} {good} Try a smaller learning rate or clipping; {also}."
    )


def mean_over(
    metric: Callable[..., dict[str, Array]],
    arrays: tuple[np.ndarray, ...],
    *,
    mesh: Mesh,
    prefix: str,
    batch_size: int = 512,
) -> Callable[[PyTree], Iterator[tuple[str, float]]]:
    """An evaluator: yields the mean of each value of `metric(model, *example)` over all rows of `arrays`."""
    rows, processes, process = len(arrays[0]), jax.process_count(), jax.process_index()
    # One shape, so one compilation: the last batch is filled up with rows of weight zero, and every device gets as many.
    batch_size = -(-min(batch_size, rows) // mesh.size) * mesh.size
    share = batch_size // processes

    @eqx.filter_jit
    def totals(model: PyTree, batch: tuple[Array, ...], weight: Array) -> dict[str, Array]:
        values = jax.vmap(lambda *example: metric(model, *example))(*batch)
        return eqx.filter_shard({k: jnp.sum(weight * v) for k, v in values.items()}, replicated(mesh))

    def evaluate(model: PyTree) -> Iterator[tuple[str, float]]:
        sums: dict[str, float] = {}
        for first in range(process * share, process * share + rows, batch_size):
            index = np.arange(first, first + share)
            weight = (index < rows).astype(np.float32)
            local = tuple(a[np.minimum(index, rows - 1)] for a in arrays)
            for name, value in totals(model, *put_rows((local, weight), mesh)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in sums.items():
            yield f"{prefix}/{name}", value / rows

    return evaluate
