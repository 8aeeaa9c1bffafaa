"""Checkpoints: `config.json` beside orbax's steps. Writes are atomic: a run killed while writing resumes from the step before."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import orbax.checkpoint as ocp

T = TypeVar("T")


def open_run(directory: str | Path, config: dict[str, Any], *, resume: bool = True) -> ocp.CheckpointManager:
    """The checkpoints of the run in `directory` (made if need be), whose configuration must be `config`.

    `config` holds what determines the result (JSON types). Raises `ValueError` if the directory holds checkpoints of another
    configuration, or any at all with `resume=False`; nothing is ever overwritten.
    """
    directory = Path(directory).resolve()  # orbax constructs on a relative path, and then fails at the first save
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the run's directory {directory} cannot be made ({error.strerror}); choose another."
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"the run's directory {directory} is not writable; choose another.")
    path, config = directory / "config.json", json.loads(json.dumps(config))
    manager = ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if manager.latest_step() is None:
        if jax.process_index() == 0:
            partial = directory / "config.json.partial"
            partial.write_text(json.dumps(config, indent=2) + "\n")
            partial.replace(path)
        return manager
    try:
        if not resume:
            raise ValueError(
                f"{directory} holds a run at step {manager.latest_step()}. Choose another directory, or let it resume."
            )
        before = json.loads(path.read_text()) if path.exists() else {}
        differing = sorted(k for k in before.keys() | config.keys() if before.get(k) != config.get(k))
        if differing:
            raise ValueError(
                f"{directory} holds a run with another configuration: "
                + ", ".join(f"{k} was {before.get(k)!r} and is now {config.get(k)!r}" for k in differing)
                + ". Choose another directory, or give the same values to resume that run."
            )
    except ValueError:
        manager.close()
        raise
    return manager


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Save the arrays of `state`. They are copied before this returns (so they may be donated); writing goes on meanwhile."""
    # The functions inside a module (activations, nodes) are no arrays and orbax refuses them; `restore` takes them from its target.
    if not manager.save(step, args=ocp.args.StandardSave(eqx.filter(state, eqx.is_array)), force=True):
        raise RuntimeError(f"orbax did not save step {step} in {manager.directory}.")


def restore(manager: ocp.CheckpointManager, state: T) -> T:
    """The newest checkpoint, laid out on devices as `state` is; its number of devices may differ from the one that wrote it."""
    arrays, rest = eqx.partition(state, eqx.is_array)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)
    return eqx.combine(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target)), rest)
