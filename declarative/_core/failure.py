"""`throw=True`: one error that names every failed element, under jit and vmap as well as eagerly.

`equinox.error_if` reduces the predicate over the batch before it looks at it, which loses the lane. Here a batching rule
collects the statuses of the whole batch into one array, and one callback, reached only when something failed, reads it.
"""

from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from .results import RESULTS

_SUCCESS = 0  # An Enumeration numbers its members in order of definition, and `successful` is the root's first.
_SHOWN = 8


class SolveError(RuntimeError):
    """A forward or backward solve failed and its node's policy is `throw=True`."""


def describe(codes, title: str) -> str:
    """The message for an array of status codes of any rank; `title` says what was being solved."""
    codes = np.asarray(codes)
    failed = np.argwhere(codes != _SUCCESS)
    lines = [title + (" failed." if codes.ndim == 0 else f" failed for {len(failed)} of {codes.size} elements.")]
    for code in np.unique(codes[codes != _SUCCESS]):
        lanes = [tuple(int(i) for i in lane) for lane in np.argwhere(codes == code)]
        names = ", ".join(str(lane[0] if len(lane) == 1 else lane) for lane in lanes[:_SHOWN])
        more = f" and {len(lanes) - _SHOWN} more" if len(lanes) > _SHOWN else ""
        where = "" if codes.ndim == 0 else f"element{'s' if len(lanes) > 1 else ''} {names}{more}: "
        lines.append(f"  {where}{message(code)}")
    return "\n".join(lines)


_GO_ON = "\n  (To go on instead: `throw=False` with `on_failure='nan'` or 'zero'; `node.solve(x)` returns the status of each element.)"

# lineax and optimistix speak to whoever called them; here that was a node.
_MESSAGES = {
    int(RESULTS.singular._value): (
        "A linear solve inside the solver gave NaN or infinity: the Jacobian is singular at an iterate, or the iteration ran off to "
        "infinity. Is there a solution? If so, give a better `y0`, or another `solver`."
    ),
    int(RESULTS.nonlinear_max_steps_reached._value): (
        "The solver took `max_steps` steps and was not done. Is there a solution (a root, a minimum, a fixed point)? If so: a better `y0`, "
        "another `solver`, better scaled data, a larger `max_steps`."
    ),
    int(RESULTS.nonlinear_divergence._value): (
        "The solver diverged. Is there a solution (a root, a minimum, a fixed point)? If so: a better `y0`, another `solver`, better scaled "
        "data."
    ),
}


def message(code) -> str:
    """The first paragraph of the message of a status code."""
    text = _MESSAGES.get(int(code)) or " ".join(RESULTS._index_to_message[int(code)].split("\n\n")[0].split())
    return text or "successful"


def raise_failures(codes: Int[Array, "..."], title: str) -> Int[Array, "..."]:
    """Returns `codes` unchanged, or raises `SolveError` if any is not `successful`. The result must be used."""

    @custom_vmap
    def guard(codes):
        return _raise_now(codes, title)

    @guard.def_vmap
    def _(axis_size, in_batched, codes):
        del axis_size, in_batched
        return raise_failures(codes, title), True

    return guard(codes) if _is_traced(codes) else _raise_now(codes, title)


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _raise_now(codes, title):
    if not _is_traced(codes):
        if np.any(np.asarray(codes) != _SUCCESS):
            raise SolveError(describe(codes, title) + _GO_ON)
        return codes

    def callback(codes):
        raise SolveError(describe(codes, title) + _GO_ON)

    def fail(codes):
        return jax.pure_callback(callback, jax.ShapeDtypeStruct(codes.shape, codes.dtype), codes)

    identity: Callable = lambda codes: codes
    return jax.lax.cond(jnp.any(codes != _SUCCESS), fail, identity, codes)
