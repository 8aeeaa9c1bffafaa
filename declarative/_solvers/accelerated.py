r"""What accelerated fixed-point solvers share: when an extrapolation is taken back, what is kept as the best point, and the loop of a batch.

An extrapolation after which $\|T(y) - y\|$ is more than `growth` times the least since the last failure, or not finite, is taken back: what
the solver has learnt is forgotten, and $y \leftarrow T(y)$ is done from the point before. It can leave the domain of T, or the region
where T is nearly affine.

That alone does not lead out of places where $\|T(y) - y\|$ has a minimum that is no fixed point: extrapolations go back there again and again,
where Picard iteration drifts through. (The cells of trained networks have such places once they are no contractions.) So a failure is
followed by a run of plain steps, twice as long as the run before, until the residual has fallen by a tenth. Under a map that only
the acceleration can solve, plain steps stray: where a run makes the residual a hundred times the least, the solve goes back to its best
point, and there are no more runs until the residual has fallen by a tenth.

*Memory.* A solver keeps rows, one a step, in a ring; which of them count is a mask beside them, so that a row is written once and a restart
moves nothing. Under `jax.vmap` a while loop whose condition differs from lane to lane writes everything that it carries in every step, to keep
finished lanes as they are: several times the cost of the step. `accelerate` therefore runs a batch as one loop, until all are done. Every
example still has its own rows, coefficients and restarts.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._core.arguments import check_tolerances, integer, require_tolerances
from .._linear.lanes import one_loop
from .._linear.norms import finite_largest

_LONGEST = 2**20  # run of plain steps


class Progress(eqx.Module):
    """What is known of a solve: T(y) and T(y) - y at the last point that was not taken back, the least residual, the best value."""

    value: Float[Array, " n"]
    change: Float[Array, " n"]
    size: Float[Array, ""]
    started: Bool[Array, ""]
    extrapolated: Bool[Array, ""]
    # Least |T(y) - y| since the last failure, and over all, with T there; T where it settled, if it has.
    least: Float[Array, ""]
    best: Float[Array, ""]
    best_value: Float[Array, " n"]
    # The residual to be reached next; plain steps to come; how many after the next failure.
    goal: Float[Array, ""]
    due: Int[Array, ""]
    run: Int[Array, ""]
    settled: Bool[Array, ""]
    # A plain step has left the numbers: nothing will come of it.
    lost: Bool[Array, ""]

    @property
    def over(self) -> Bool[Array, "*lanes"]:
        return self.settled | self.lost


class Step(NamedTuple):
    """One evaluation of T: its outcome, beside what was known before it.

    - `back`: the step to this point is taken back. `learn`: the two points are neighbours to learn from.
    - `put(rows, row, where)` writes the row of this step, at `here`.
    """

    value: Float[Array, " n"]
    change: Float[Array, " n"]
    size: Float[Array, ""]
    before: Progress
    back: Bool[Array, ""]
    learn: Bool[Array, ""]
    here: Bool[Array, " m"]
    put: Callable[[Array, Array, Array], Array]


class _State(eqx.Module):
    progress: Progress
    memory: PyTree
    count: Int[Array, ""]


class AbstractAccelerated(optx.AbstractFixedPointSolver):
    """Subclasses say what they remember, and what follows a step."""

    rtol: eqx.AbstractVar[Any]
    atol: eqx.AbstractVar[Any]
    history: eqx.AbstractVar[int]
    growth: eqx.AbstractVar[float]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        integer(self.history, "history")
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}.")

    def room(self, n: int) -> int:
        """How many rows are of use for n unknowns."""
        del n
        return self.history

    @abc.abstractmethod
    def memory(self, rows: Float[Array, "m n"]) -> PyTree:
        """Nothing learnt yet: `rows` are zeros. It has a mask `known` of them."""

    @abc.abstractmethod
    def extrapolate(self, memory: PyTree, step: Step) -> tuple[Float[Array, " n"], PyTree]:
        """The next point, and what is remembered then."""

    def advance(
        self,
        y: Float[Array, " n"],
        value: Float[Array, " n"],
        before: Progress,
        memory: PyTree,
        count: Int[Array, ""],
        together: bool,
    ) -> tuple[Float[Array, " n"], Progress, PyTree]:
        """After T was evaluated at `y`: the next point, and all that is known.

        `count` says how many evaluations came before; `together`: it is the same for all lanes of a batch.
        """
        slot, rows = count % memory.known.size, memory.known.size
        change, going = value - y, ~before.over
        # They decide and are not differentiated.
        size = jax.lax.stop_gradient(finite_largest(change))
        back = going & before.extrapolated & ~(size <= self.growth * before.least)  # true for NaN
        settles = going & (size <= self.rtol * jax.lax.stop_gradient(finite_largest(value)) + self.atol)
        better = going & (size < before.best) | settles
        reached = going & (size <= before.goal)
        strayed = going & (before.due > 0) & ~(size <= 100 * before.best)
        undone = back | strayed
        keep = lambda new, old: jnp.where(undone, old, new)
        progress = Progress(
            value=keep(value, before.value),
            change=keep(change, before.change),
            size=keep(size, before.size),
            started=jnp.ones((), bool),
            extrapolated=before.started & ~undone & (reached | (before.due == 0)),
            least=jnp.where(undone, jnp.inf, jnp.minimum(size, before.least)),
            best=jnp.where(better, size, before.best),
            best_value=jnp.where(better, value, before.best_value),
            goal=jnp.where(reached, 0.9 * size, before.goal),
            due=jnp.maximum(jnp.where(back, before.run, jnp.where(reached | strayed, 0, before.due)) - 1, 0),
            run=jnp.where(
                back,
                jnp.minimum(2 * before.run, _LONGEST),
                jnp.where(strayed, 0, jnp.where(reached, 1, before.run)),
            ),
            settled=before.settled | settles,
            lost=before.lost | going & ~before.extrapolated & ~strayed & ~jnp.isfinite(size),
        )
        here = jnp.arange(rows, dtype=jnp.int32) == slot
        put = _in_place(slot) if together else _masked(here)
        learn = going & before.started & ~undone
        following, memory = self.extrapolate(memory, Step(value, change, size, before, back, learn, here, put))
        following = jnp.where(progress.extrapolated, following, jnp.where(back, before.value, value))
        following = jnp.where(strayed, progress.best_value, following)
        # A lane that is done stays where it was: further steps would be made of rounding, and might lead anywhere.
        return jnp.where(progress.over, y, following), progress, memory

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        require_tolerances(self, "FixedPoint")
        vector, _ = ravel_pytree(y)
        return _State(_begin(vector), _empty(self, vector), jnp.zeros((), jnp.int32))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        vector, unravel = ravel_pytree(y)
        new, aux = fn(y, args)
        value, _ = ravel_pytree(new)
        vector, progress, memory = self.advance(vector, value, state.progress, state.memory, state.count, False)
        return unravel(vector), _State(progress, memory, state.count + 1), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        vector, unravel = ravel_pytree(y)
        return unravel(_answer(vector, state.progress)), aux, {}


def _begin(vector: Float[Array, " n"]) -> Progress:
    zero = jnp.zeros((), jnp.int32)
    nothing, infinite, no = jnp.zeros_like(vector), jnp.full((), jnp.inf, vector.dtype), jnp.zeros((), bool)
    return Progress(nothing, nothing, infinite, no, no, infinite, infinite, nothing, infinite, zero, zero + 1, no, no)


def _empty(solver: AbstractAccelerated, vector: Float[Array, " n"], most: int | None = None) -> PyTree:
    # No more rows than there can be: to clear them takes longer than a step.
    rows = solver.room(vector.size)
    return solver.memory(jnp.zeros((rows if most is None else min(rows, most), vector.size), vector.dtype))


def _answer(y: Float[Array, " n"], progress: Progress) -> Float[Array, " n"]:
    return jnp.where(jnp.isfinite(progress.best), progress.best_value, y)


def _masked(here):
    return lambda rows, row, where: jnp.where((here & where)[:, None], row[None], rows)


def _in_place(slot):
    def put(rows, row, where):
        old = jax.lax.dynamic_index_in_dim(rows, slot, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(where, row, old), slot, 0)

    return put


class Solve(NamedTuple):
    """`lost`: it has left the numbers."""

    y: PyTree
    settled: Bool[Array, ""]
    lost: Bool[Array, ""]
    steps: Int[Array, ""]
    memory: PyTree


def accelerate(
    solver: AbstractAccelerated, fn: Callable[[PyTree, PyTree], PyTree], y0: PyTree, args: PyTree, max_steps: int | None
) -> Solve:
    """What `optimistix.fixed_point` does, with a batch (`jax.vmap`) in one loop. Not differentiable. `fn` must not close over arrays."""
    endless = np.iinfo(np.int32).max
    most = endless if max_steps is None else min(max_steps, endless)
    arrays, static = eqx.partition((solver, fn, y0, args), eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    rebuild = lambda leaves: eqx.combine(jtu.tree_unflatten(treedef, leaves), static)

    def start(*leaves):
        solver, _, y0, _ = rebuild(leaves)
        vector, _ = ravel_pytree(y0)
        return vector, _begin(vector), _empty(solver, vector, most), jnp.zeros((), jnp.int32)

    def step(carry, count, *leaves):
        vector, progress, memory, steps = carry
        solver, fn, y0, args = rebuild(leaves)
        _, unravel = ravel_pytree(y0)
        value, _ = ravel_pytree(fn(unravel(vector), args))
        steps = steps + (~progress.over).astype(jnp.int32)
        return *solver.advance(vector, value, progress, memory, count, True), steps

    def end(carry, *leaves):
        vector, progress, memory, steps = carry
        _, unravel = ravel_pytree(rebuild(leaves)[2])
        return Solve(unravel(_answer(vector, progress)), progress.settled, progress.lost, steps, memory)

    @one_loop
    def run(axes, *leaves):
        def lanes(function, *own):
            for which in reversed(axes):
                function = jax.vmap(function, (*own, *(0 if has else None for has in which)))
            return function

        stepped = lanes(step, 0, None)
        unfinished = lambda carry: (carry[0] < most) & ~jnp.all(carry[1][1].over)
        body = lambda carry: (carry[0] + 1, stepped(carry[1], carry[0], *leaves))
        _, last = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), lanes(start)(*leaves)))
        return lanes(end, 0)(last, *leaves)

    return run(*leaves)


def reciprocal_length(vector: Float[Array, " n"], size: Float[Array, ""]) -> Float[Array, ""]:
    """1 / |vector| for a vector with entries of at most about `size`; 0 if it is nothing beside that, or not finite.

    One pass, where a norm that is safe on its own takes two. A constant in derivatives: any length will do that is right to a few digits.
    """
    unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    scaled = vector * unit
    length = jnp.sqrt(scaled @ scaled)
    return jax.lax.stop_gradient(jnp.where(length > 0, unit / jnp.where(length > 0, length, 1), 0))
