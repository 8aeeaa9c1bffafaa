r"""How gradients flow through a solve: one switch for every node.

All are `optimistix` adjoints, so they also work in a plain `optx.root_find(..., adjoint=...)`; a node uses the richer path of
`node.py`, which adds structure, status and policy. With $b = \partial_x F\,\mathrm dx$ and, where a contraction
`step` $T$ is declared, $F = T(y, x) - y$:

| adjoint             | derivative                                              | exact             | memory in steps |
|---------------------|---------------------------------------------------------|-------------------|-----------------|
| `ImplicitAdjoint`   | $-(\partial_y F)^{-1} b$                                | at a solution     | none            |
| damped              | $-(J^\top J + \delta^2 I)^{-1} J^\top b$, $J = \partial_yF$ | no: shrunk    | none            |
| `NeumannAdjoint(k)` | $\sum_{i=0}^{k} (\partial_y T)^i\, \partial_x T\,\mathrm dx$ | no: truncated | none            |
| `OneStepAdjoint`    | $\partial_x T\,\mathrm dx$ (Jacobian-free)              | no                | none            |
| `PhantomAdjoint(k, d)` | $d\sum_{i<k} ((1 - d)I + d\,\partial_y T)^i\, \partial_x T\,\mathrm dx$ | no: truncated | none |
| `QuasiNewtonAdjoint` | $-H\, b$, $H$ what Broyden's method learnt             | no                | none            |
| `UnrolledAdjoint`   | of the iterations themselves                            | for the iterate   | about log       |

The truncated ones apply their approximate inverse wherever (IFT) has the exact one, at every order of differentiation.
"""

import abc
from functools import partial
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from . import health
from .arguments import integer, number
from .implicit import (
    LinearSystem,
    Problem,
    Run,
    implicit_solution,
    norm,
    solve_system,
)
from .results import RESULTS

ALL_MODES = frozenset({"forward", "reverse", "higher-order"})

lax_loop = partial(eqxi.while_loop, kind="lax")
bounded_loop = partial(eqxi.while_loop, kind="bounded")


class AbstractAdjoint(optx.AbstractAdjoint):
    """Our adjoints: optimistix's, with the modes that they support.

    `modes` is a subset of {"forward", "reverse", "higher-order"}; `needs_step` says that the node must define a contraction
    `step(y, x)`; `unrolls` that the solver's own iterations are differentiated.
    """

    modes: ClassVar[frozenset[str]]
    needs_step: ClassVar[bool]
    unrolls: ClassVar[bool]

    @abc.abstractmethod
    def linear_solve(self, matvec, vector, system: LinearSystem | None) -> tuple[Any, Any, bool]:
        """Solves (or approximates) `matvec(v) = vector`: `(v, status code, whether v claims to be exact)`."""


class ImplicitAdjoint(AbstractAdjoint):
    """The implicit function theorem. The default of every node without a closed form.

    **Arguments:**

    - `linear_solver`: any lineax solver, applied to the Jacobian as a matrix-free operator. None: the node's own structure if
      it has one, else dense elimination up to 512 unknowns and conjugate gradients on the normal equations above.
    - `damping`: if positive, solves the least-squares problem `min |Jv - b|^2 + damping^2 |v|^2` instead of `Jv = b`: defined
      for a singular Jacobian, at the price of a bias towards zero of about `damping^2 / sigma_min^2`. In the units of dF/dy.

    **Modes:** forward, reverse, any order. A guess `y0` gets no gradient.
    """

    linear_solver: lx.AbstractLinearSolver | None = None
    damping: float = eqx.field(static=True, default=0.0)

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False

    def __check_init__(self):
        if not (self.linear_solver is None or isinstance(self.linear_solver, lx.AbstractLinearSolver)):
            raise ValueError(
                f"linear_solver must be a lineax solver or None, got {self.linear_solver!r}. (`damping=` is named.)"
            )
        number(self.damping, "damping", closed="low")

    def linear_solve(self, matvec, vector, system):
        struct = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
        if self.damping > 0:
            # The transpose comes from the matvec itself, which is linear by construction.
            rmatvec = lambda v: jax.linear_transpose(matvec, vector)(v)[0]
            normal = lambda v: rmatvec(matvec(v)) + jnp.asarray(self.damping**2, v.dtype) * v
            # J^T J + damping^2 I is symmetric positive definite whatever J is.
            operator = lx.FunctionLinearOperator(normal, struct, lx.positive_semidefinite_tag)
            solver = default_linear_solver(vector, positive=True) if self.linear_solver is None else self.linear_solver
            solution, code = solve_system(LinearSystem(operator, solver), rmatvec(vector))
            return solution, code, False
        if system is None or self.linear_solver is not None:
            # FunctionLinearOperator: the matvec is the JVP of the optimality function, materialised only by direct solvers.
            solver = default_linear_solver(vector) if self.linear_solver is None else self.linear_solver
            system = LinearSystem(lx.FunctionLinearOperator(matvec, struct), solver)
        # Krylov solvers stop on absolute tolerances as well, entry by entry: the cotangent of a mean loss may lie below any of them.
        size = norm(vector)
        size = jnp.where((size > 0) & jnp.isfinite(size), size, 1).astype(vector.dtype)
        solution, code = solve_system(system, vector / size)
        return solution * size, code, True

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        return _apply_rule(self, primal_fn, rewrite_fn, inputs, tags)


class NeumannAdjoint(AbstractAdjoint):
    """The first `terms + 1` terms of the Neumann series of the inverse (`terms=0` is `OneStepAdjoint`).

    For nodes with a contraction `step` of factor g the relative error of the derivative is at most about `g**(terms + 1)`. Costs
    `terms` Jacobian products and no solve; there is nothing that can fail to converge, and nothing that says when it is wrong:
    the residual that it leaves is reported (`Health.backward_residual`), not judged. **Modes:** forward, reverse, any order.

    In a plain `optx.fixed_point` the step is the function itself; use it for nothing else there.
    """

    terms: int = eqx.field(static=True)

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False

    def __check_init__(self):
        integer(self.terms, "terms", 0)

    def linear_solve(self, matvec, vector, system):
        del system
        return _neumann(matvec, vector, self.terms), _zero_code(), False

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        return _apply_rule(self, primal_fn, rewrite_fn, inputs, tags)


class OneStepAdjoint(AbstractAdjoint):
    """Differentiates one application of `step` at the solution, the solution held fixed: Jacobian-free backpropagation.

    A descent direction under the conditions of Fung et al. 2021 (arXiv:2103.12803), Theorem 0.2; biased. Parameters that do not
    enter the last step get zero. **Modes:** forward, reverse, any order.
    """

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False

    def linear_solve(self, matvec, vector, system):
        del system
        return _neumann(matvec, vector, 0), _zero_code(), False

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        return _apply_rule(self, primal_fn, rewrite_fn, inputs, tags)


class PhantomAdjoint(AbstractAdjoint):
    """Differentiates `steps` damped applications of `step`, `y <- (1 - damping) y + damping * step(y, x)`, at the solution.

    The phantom gradient of Geng et al. 2021 (arXiv:2111.05177): `steps=1, damping=1` is `OneStepAdjoint`. Damping below 1 converges,
    with many steps, also where an eigenvalue of the step's Jacobian is below -1, and regularises where one is near 1. Costs `steps - 1`
    Jacobian products; biased; the residual that it leaves is reported, not judged. **Modes:** forward, reverse, any order.
    """

    steps: int = eqx.field(static=True, default=5)
    damping: float = eqx.field(static=True, default=0.5)

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False

    def __check_init__(self):
        integer(self.steps, "steps")
        number(self.damping, "damping", 0.0, 1.0, closed="high")

    def linear_solve(self, matvec, vector, system):
        del system
        return _neumann(matvec, vector, self.steps - 1, self.damping), _zero_code(), False

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        return _apply_rule(self, primal_fn, rewrite_fn, inputs, tags)


class QuasiNewtonAdjoint(AbstractAdjoint):
    """Takes what `Broyden` learnt of the inverse on its way for the inverse: no Jacobian product at all.

    For `FixedPoint(fn, solver=Broyden(...))`. The idea of Ramzi et al. 2022 (SHINE, arXiv:2106.00553). How good it is depends on the path:
    measured on random maps of 256 unknowns, off by 20 to 30 %, hardly better than `OneStepAdjoint`; the residual that it leaves is
    reported, not judged. **Modes:** forward, reverse, any order.
    """

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False

    def linear_solve(self, matvec, vector, system):
        from .._linear.biconjugate import NearIdentityState

        del matvec
        if system is None or not isinstance(system.state, NearIdentityState):
            raise ValueError("QuasiNewtonAdjoint applies to FixedPoint(fn, solver=Broyden(...)) only.")
        return system.state.stand_in(vector), _zero_code(), False

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        raise ValueError("QuasiNewtonAdjoint applies to FixedPoint(fn, solver=Broyden(...)) only.")


class UnrolledAdjoint(AbstractAdjoint):
    """Differentiates the iterations.

    Memory grows far slower than `max_steps` (measured: by 1.1 to 1.6 from 10 to 10 000 steps), because equinox's bounded loop
    recomputes itself recursively; a plain unrolled `scan` is the one whose memory is linear. Time is what it costs.

    Exact for the iterate that is returned, hence also with respect to the guess `y0` and to step sizes. **Modes:** forward,
    reverse, any order (`optx.RecursiveCheckpointAdjoint` needs less memory and is reverse mode, first order only).
    """

    modes: ClassVar[frozenset[str]] = ALL_MODES
    needs_step: ClassVar[bool] = False
    unrolls: ClassVar[bool] = True

    def linear_solve(self, matvec, vector, system):
        raise AssertionError("Unrolling solves no linear system.")

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        del rewrite_fn, tags
        return primal_fn((*inputs, bounded_loop))


class PlainLoop(optx.AbstractAdjoint):
    """Runs a solver's loop with the given `while_loop` and adds no derivative rule: the solve inside a node's own rule."""

    loop: Any

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        del rewrite_fn, tags
        return primal_fn((*inputs, self.loop))


def modes(adjoint: optx.AbstractAdjoint | dfx.AbstractAdjoint | None) -> frozenset[str]:
    """The differentiation modes of an adjoint, those of optimistix and diffrax included (None: a closed form, all of them)."""
    if isinstance(adjoint, AbstractAdjoint):
        return adjoint.modes
    if isinstance(adjoint, dfx.AbstractAdjoint) and not isinstance(adjoint, dfx.DirectAdjoint | dfx.ImplicitAdjoint):
        return frozenset({"forward"} if isinstance(adjoint, dfx.ForwardMode) else {"reverse"})
    if isinstance(adjoint, optx.RecursiveCheckpointAdjoint):
        return frozenset({"reverse"})
    return ALL_MODES


def refuse_unrolling(adjoint: optx.AbstractAdjoint | None, why: str) -> None:
    """Raises for an adjoint that differentiates iterations, in a node that has none to differentiate: `why` goes on "UnrolledAdjoint ..."."""
    if isinstance(adjoint, optx.RecursiveCheckpointAdjoint) or (
        isinstance(adjoint, AbstractAdjoint) and adjoint.unrolls
    ):
        raise ValueError(f"{type(adjoint).__name__} {why}")


_DENSE = 512


def default_linear_solver(vector, *, positive: bool = False) -> lx.AbstractLinearSolver:
    """Dense elimination while the matrix is small, Krylov above; the residual of either is checked by the core."""
    from .._linear.dense import Dense

    if vector.size <= _DENSE:
        return Dense()
    tol = float(jnp.finfo(vector.dtype).eps) ** 0.75
    if positive:
        return lx.CG(rtol=tol, atol=tol, max_steps=4 * vector.size)
    # On the normal equations: slower than BiCGStab where that works, but it has no breakdown (a rotation is enough for one).
    return lx.Normal(lx.CG(rtol=tol, atol=tol, max_steps=10 * vector.size))


def _neumann(matvec, vector, terms: int, damping: float = 1.0):
    # matvec is (d step/dy - I) v, so M v = v + d * matvec(v) is the damped step's Jacobian, and the inverse -d (I + M + M^2 + ...).
    def body(carry, _):
        total, term = carry
        term = damping * matvec(term) + term
        return (total + term, term), None

    (total, _), _ = jax.lax.scan(body, (vector, vector), None, length=terms)
    return -damping * total


def _zero_code():
    return jnp.zeros((), jnp.int32)


def _apply_rule(adjoint: AbstractAdjoint, primal_fn, rewrite_fn, inputs, tags):
    """(IFT) for a plain optimistix solve: no policy, so a failed linear solve gives NaN."""
    del tags

    def run(inputs):
        root, aux = primal_fn((*inputs, lax_loop))
        return Run(root, factor=jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, aux))

    # The auxiliary output rides along as the factor: it carries no gradient, and the optimality of optimistix may read it.
    residual = lambda root, pair: rewrite_fn(root, None, pair)
    problem = Problem(
        run=run,
        residual=residual,
        system=lambda unknown, inputs, factor: None,
        linear_solve=adjoint.linear_solve,
        check=False,
        fill="nan",
        title=None,
    )
    point = implicit_solution(inputs, jnp.zeros(health.PROBE_SIZE, jnp.float32), problem=problem)
    return point.unknown, point.factor


__all__ = [
    "AbstractAdjoint",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "OneStepAdjoint",
    "PhantomAdjoint",
    "PlainLoop",
    "QuasiNewtonAdjoint",
    "RESULTS",
    "UnrolledAdjoint",
    "bounded_loop",
    "default_linear_solver",
    "lax_loop",
    "modes",
    "refuse_unrolling",
]
