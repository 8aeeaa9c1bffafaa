r"""The status of the linear solves of the backward pass, where a solve can return nothing.

Under reverse mode the adjoint's linear solve runs inside a transposed function, whose only outputs are cotangents. So every
implicit solve takes a *probe*, a vector of zeros on which its value does not depend: it is appended to the right-hand side of
the tangent equation, and the transposed solve hands its report back as the probe's cotangent. Cotangents add up, hence the
report is a vector of counts and sums.

    value, grads, health = value_and_grad_with_health(loss)(model, batch)

differentiates with respect to the probes too. Nodes find their probe in a context that is part of JAX's trace-cache key, so a
cached trace of an inner `jit` or `scan` body cannot smuggle in an old one.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from .failure import message

# The entries of a probe's cotangent.
_FIELDS = (
    "solves",
    "forward_failures",
    "backward_failures",
    "forward_residual",
    "backward_residual",
    "steps",
    "forward_code",
    "backward_code",
)
PROBE_SIZE = len(_FIELDS)

_context = jax.make_user_context(None)


def report(
    forward_code: Int[Array, ""],
    backward_code: Int[Array, ""],
    forward_residual: Float[Array, ""],
    backward_residual: Float[Array, ""],
    steps: Int[Array, ""],
    dtype,
) -> Float[Array, " fields"]:
    """One backward linear solve, as the cotangent of its probe. Residuals of failed solves are left out of the sums."""
    forward_ok, backward_ok = forward_code == 0, backward_code == 0
    return jnp.stack(
        [
            jnp.ones((), dtype),
            1 - forward_ok.astype(dtype),
            # A backward solve after a failed forward one is not attempted, so that the two can be told apart.
            (forward_ok & ~backward_ok).astype(dtype),
            jnp.where(forward_ok, forward_residual, 0).astype(dtype),
            jnp.where(forward_ok & backward_ok, backward_residual, 0).astype(dtype),
            steps.astype(dtype),
            forward_code.astype(dtype),
            jnp.where(forward_ok, backward_code, 0).astype(dtype),
        ]
    )


class _Recorder:
    """The probes of one call of `value_and_grad_with_health`, in the order in which nodes ask for them."""

    def __init__(self, per_element: bool, probes: list[Array] | None, known: list[tuple[int, ...]] | None):
        self.per_element = per_element
        # Both None in the discovery pass, which finds how many there are, and the batch shape of each.
        self.probes, self.known = probes, known
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def probe(self, name: str, witness: Bool[Array, ""]) -> Float[Array, " fields"]:
        slot = len(self.names)
        self.names.append(name)
        self.shapes.append(())
        if self.known is not None and slot >= len(self.known):
            raise RuntimeError("`loss` met more nodes when it was differentiated than before: is it a pure function?")
        if self.per_element:
            whole = None if self.known is None else self.known[slot]
            lane = _lane(witness, (), whole, lambda shape: self.shapes.__setitem__(slot, shape))
        else:
            lane = 0
        if self.probes is None:
            return jnp.zeros(PROBE_SIZE, jnp.float32)
        return self.probes[slot][lane]


def _lane(witness, shape: tuple[int, ...], whole: tuple[int, ...] | None, note: Callable[[tuple[int, ...]], None]):
    """The index of this example in the flattened batch of the vmaps around it; `witness` is batched where they are.

    `whole` is the batch shape inside `value_and_grad_with_health`, once it is known: a vmap outside of it makes copies of the
    whole report, not more of its elements.
    """
    indices = jnp.arange(int(np.prod(shape)), dtype=jnp.int32).reshape(shape)
    if shape == whole:
        return indices

    @custom_vmap
    def lane(witness):
        del witness
        return indices

    @lane.def_vmap
    def _(axis_size, in_batched, witness):
        del in_batched
        # Called for the innermost vmap first: each further one adds its axis in front.
        note((axis_size, *shape))
        return _lane(witness, (axis_size, *shape), whole, note), True

    return lane(witness)


def probe_for(name: str, inputs) -> Float[Array, " fields"]:
    """The probe of one node call: zeros, unless `value_and_grad_with_health` is listening."""
    recorder = _context.value
    if recorder is None:
        return jnp.zeros(PROBE_SIZE, jnp.float32)
    leaves = [leaf for leaf in jtu.tree_leaves(inputs) if eqx.is_array(leaf) and leaf.size > 0]
    flat = [jr_data(leaf).ravel()[0] for leaf in leaves]
    witness = reduce(or_, [leaf != leaf for leaf in flat], jnp.zeros((), bool))  # noqa: PLR0124
    return recorder.probe(name, witness)


def jr_data(leaf):
    """A PRNG key as plain integers; other arrays unchanged."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def unobserved():
    """Context in which no node reports: the inside of a node, whose own solves are part of the node's."""
    return _context(None)


class Health(eqx.Module):
    """What the implicit solves on a gradient's path report.

    With `per_element=False` every entry is a scalar: sums over all solves of the step for the three counts, means for the
    rest. With `per_element=True` every entry maps the name of a node call (class name and position, in call order) to an
    array with the shape of the vmaps around that call; a call inside a `scan` adds its iterations up.

    - `solves`: linear solves done for the gradient. A solve that the gradient does not pass through counts 0.
    - `forward_failures`: of these, how many had a forward solution that failed (the linear solve is then not attempted).
    - `backward_failures`: how many had a good forward solution and a failed linear solve.
    - `forward_residual`, `backward_residual`: mean relative residuals of the solves that succeeded.
    - `steps`: mean number of solver steps of the forward solve.
    - `forward_result`, `backward_result`: status codes (`RESULTS`) where there was one failure (sums of codes where there were more,
      as in a scan); only with `per_element=True`, else None.
    """

    solves: Any
    forward_failures: Any
    backward_failures: Any
    forward_residual: Any
    backward_residual: Any
    steps: Any
    forward_result: Any = None
    backward_result: Any = None

    def report(self) -> str:
        """In words, one line a node call (concrete arrays only)."""
        calls = self.solves if isinstance(self.solves, dict) else {"all nodes": self.solves}
        lines = []
        for name in calls:
            pick = lambda field, name=name: np.asarray(field[name] if isinstance(field, dict) else field)
            forward, backward = pick(self.forward_failures), pick(self.backward_failures)
            lines.append(
                f"{name}: {int(pick(self.solves).sum())} backward solves, {int(forward.sum())} with a failed forward "
                f"solution, {int(backward.sum())} failed themselves."
            )
            if isinstance(self.forward_result, dict):
                for direction, codes, failed in (
                    ("forward", pick(self.forward_result), forward),
                    ("backward", pick(self.backward_result), backward),
                ):
                    for lane in np.argwhere(failed > 0)[:8]:
                        where = f", element {', '.join(map(str, lane.tolist()))}" if lane.size else ""
                        # Codes add up like everything else, so only a single failure has a cause to name.
                        count = int(failed[tuple(lane)])
                        cause = message(codes[tuple(lane)]) if count == 1 else f"{count} failures (`solve` says why)"
                        lines.append(f"  {direction}{where}: {cause}")
        return "\n".join(lines) if lines else "No implicit solve on the gradient's path."


def _summarise(cotangents: list[Array], names: list[str], shapes: list[tuple[int, ...]], per_element: bool) -> Health:
    def fields(total):
        solves, forward, backward, forward_residual, backward_residual, steps, *codes = jnp.moveaxis(total, -1, 0)
        good_forward = jnp.maximum(solves - forward, 1)
        good_backward = jnp.maximum(solves - forward - backward, 1)
        means = forward_residual / good_forward, backward_residual / good_backward, steps / jnp.maximum(solves, 1)
        return (solves, forward, backward, *means, *(code.astype(jnp.int32) for code in codes))

    if not per_element:
        total = sum((cotangent.sum(0) for cotangent in cotangents), jnp.zeros(PROBE_SIZE, jnp.float32))
        return Health(*fields(total)[:6])
    labels = [f"{name} #{i}" for i, name in enumerate(names)]
    columns = [
        fields(cotangent[: int(np.prod(shape))].reshape(*shape, PROBE_SIZE))
        for cotangent, shape in zip(cotangents, shapes, strict=True)
    ]
    return Health(*({label: column[i] for label, column in zip(labels, columns, strict=True)} for i in range(8)))


def value_and_grad_with_health(loss: Callable, *, has_aux: bool = False, per_element: bool = True) -> Callable:
    """`equinox.filter_value_and_grad` that also says how every implicit solve behind the gradient ended.

    **Arguments:**

    - `loss`: `loss(model, *args) -> scalar`, or `(scalar, aux)` with `has_aux=True`; differentiated with respect to the
      inexact arrays of its first argument.
    - `per_element`: report each element of each vmap (traces `loss` once more, to learn the batch shapes), or only sums over
      the step, which is cheaper and what a training loop logs.

    **Returns:** a function `(model, *args) -> (value, grads, health)`, value being `(scalar, aux)` with `has_aux=True`;
    `health` is a [`declarative.Health`][]. Use it inside `jit`, with nodes whose policy is `throw=False`. Nodes with a closed
    form, and unrolled ones, have no backward solve and do not appear.

    **Raises:** `RuntimeError` if `loss` does not meet the same nodes each time that it is traced.
    """

    def wrapped(model, *args, **kwargs):
        def traced(model, args, kwargs, probes, known):
            recorder = _Recorder(per_element, probes, known)
            with _context(recorder):
                out = loss(model, *args, **kwargs)
            recorder.probes = None  # No tracer outlives its trace.
            value, aux = out if has_aux else (out, None)
            return value, (aux, recorder)

        # All inputs are abstract here, so that a vmap around the whole of this is not seen.
        discover = lambda model, args, kwargs: _Static(traced(model, args, kwargs, None, None)[1][1])
        recorder = eqx.filter_eval_shape(discover, model, args, kwargs).value
        probes = [
            jnp.zeros((max(1, int(np.prod(shape))) if per_element else 1, PROBE_SIZE), jnp.float32)
            for shape in recorder.shapes
        ]

        def pair(pair):
            model, probes = pair
            value, (aux, seen) = traced(model, args, kwargs, probes, recorder.shapes)
            if seen.shapes != recorder.shapes:
                raise RuntimeError("`loss` met other nodes when it was differentiated: is it a pure function?")
            return value, aux

        (value, aux), (grads, cotangents) = eqx.filter_value_and_grad(pair, has_aux=True)((model, probes))
        health = _summarise(cotangents, recorder.names, recorder.shapes, per_element)
        return (value, aux) if has_aux else value, grads, health

    return wrapped


class _Static(eqx.Module):
    value: Any = eqx.field(static=True)
