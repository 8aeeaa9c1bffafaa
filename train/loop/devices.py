"""Devices, the mesh over them, and how arrays are laid out on it: batches split by rows, everything else replicated.

Data-parallel training is plain `jit` on an `Auto` mesh: XLA inserts the all-reduces. (`shard_map` and `Explicit` meshes are
not used: lineax 0.1.1, and so every solver built on it, fails inside them.) One device is the mesh of size one, no special case.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def start(
    devices: int | None = None,
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Mesh:
    """The mesh of this run. Call it before anything else touches JAX's devices.

    `devices` is the number to use in every process (None: all). A CPU is split into that many, so that data-parallel code can
    be tried without accelerators. With `distributed`, every process runs the same script; the other arguments go to
    `jax.distributed.initialize`, which finds them by itself on the clusters it knows.
    """
    if devices is not None:
        if devices < 1:
            raise ValueError(f"devices must be at least 1, but is {devices}.")
        try:
            jax.config.update("jax_num_cpu_devices", devices)  # no effect on GPU and TPU
        except RuntimeError:
            pass  # JAX has already started; the count below decides
    if distributed:
        jax.distributed.initialize(coordinator, processes, process)
    if devices is not None and devices > jax.local_device_count():
        raise ValueError(
            f"devices is {devices}, but this process sees {jax.local_device_count()} {jax.default_backend()} device(s). "
            "Ask for fewer. (A CPU can be split only before JAX starts, so in a fresh process.)"
        )
    if devices is not None and not distributed:
        chosen = jax.local_devices()[:devices]
    else:
        chosen = jax.devices()
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Fresh copies of the array leaves, on every device of the mesh (the caller's arrays survive donation)."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    # Not `device_put`, which refuses PRNG keys on a mesh with devices of other processes (JAX 0.10.2).
    copies = jax.jit(lambda arrays: jax.tree.map(jnp.copy, arrays), out_shardings=replicated(mesh))(arrays)
    return eqx.combine(copies, rest)


def put_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """NumPy leaves whose rows are this process's share, as global arrays split by rows."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(by_rows(mesh), a), tree)
