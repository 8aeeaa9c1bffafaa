r"""Solvers whose step has an inverse, so that `ReversibleAdjoint` can walk a trajectory backwards instead of storing it.

Classes of diffrax: pass one to `diffrax.diffeqsolve` as its solver. Three families:

| solver                    | order        | stable on the real axis      | evaluations a step (forwards, backwards) |
|---------------------------|--------------|------------------------------|------------------------------------------|
| `Reversible(solver)`      | the solver's | about $(-(1-\lambda), 0)$    | 2s, 2s (s stages)                        |
| `AsynchronousLeapfrog`    | 2            | nowhere at $\eta = 1$        | 1, 1                                     |
| `Leapfrog`                | 2            | nowhere (oscillations only)  | 3, 6                                     |

and diffrax's own `ReversibleHeun` (2; nowhere; 1, 1) and `SemiImplicitEuler` (1; nowhere; 2, 4), which the adjoint knows as well.

**Coupling** (McCallum & Foster 2024). Let $\Psi_h(t, y)$ be what one step of an explicit Runge-Kutta method adds to y. The state is a
pair of solutions; with $d = y - z$ their difference, zero at the start,

$$ y_1 = z_0 + \lambda d_0 + \Psi_h(t_0, z_0), \qquad z_1 = z_0 - \Psi_{-h}(t_1, y_1), $$                                       (C)

and backwards $z_0 = z_1 + \Psi_{-h}(t_1, y_1)$, $d_0 = (d_1 - \Psi_h(t_0, z_0) - \Psi_{-h}(t_1, y_1)) / \lambda$. The division by
$\lambda$ amplifies rounding, $\lambda^{-N}$ in N steps; contraction needs $1 - \lambda \gtrsim h L$, L the contraction rate. Both together
are the limit of the method: **reversal bears $LT \lesssim \ln(\mathrm{tol}/\epsilon)$** between two states that are kept, some 20 in float64
and 9 in float32. The pair is kept as (z, d), not (y, z): d is small, so its rounding is, and a round trip is $1/(hL)$ times closer.

References: McCallum & Foster 2024, arXiv:2410.11648 (its published stability plot has a wrong sign, ALGORITHMS of this project, 12.4);
Zhuang et al. 2021, arXiv:2102.04668 (asynchronous leapfrog); Kidger et al. 2021, arXiv:2105.13493 (reversible Heun).
"""

# diffrax declares as class variables what its own subclasses have as fields and properties.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._core.arguments import integer
from .hoist import hoist, hoist_pair
from .trees import add, precision, subtract, times

ANCHORS = 8  # that `ReversibleAdjoint` keeps unless told otherwise
# ln of the growth of rounding that "auto" allows between two states that are kept, by the bits of the dtype.
BUDGET = {32: 6.0, 64: 13.0}
# and the most that it asks of one step: nearly all of 1 - lambda, beyond which there is no stability to be had.
LARGEST = 2.0
RUNGE_KUTTA = (dfx.AbstractERK, dfx.Euler)


class Interval(NamedTuple):
    """One step, with the start of the one before it (its own start, if it is the first)."""

    before: Array
    start: Array
    end: Array


class AbstractReversibleSolver(dfx.AbstractSolver):
    """A diffrax solver whose step can be inverted. A solver of your own adds `inverse` to what diffrax asks for; the gradient follows.

    `reverse` may be overridden where an evaluation that inverts can also be the one that is differentiated, and `begin` where the
    evaluation at the end of a step is the one at the start of the next.
    """

    linear_but_for_field: ClassVar[bool] = False
    """Whether a step is linear in (y, state) but for evaluations of the field, and what is `compared` is a tuple of trees like y: leaves
    that no field reads are then not compared."""

    @abc.abstractmethod
    def inverse(self, terms, t0, t1, y1, args, state1) -> tuple[PyTree, PyTree]:
        """`(y0, state0)`, such that `step(terms, t0, t1, y0, args, state0, made_jump=False)` gives `y1` and `state1`."""

    def hoist(self, terms, t, y, args):
        """The terms with what they close over as leaves. For one term that acts on all of y."""
        return hoist(terms, t, y, args)

    def compared(self, y, state) -> PyTree:
        """What of a reconstructed (y, state) is compared with what was kept, leaf by leaf: all that fields are evaluated at."""
        return y, state

    def begin(self, field: Callable, interval: Interval, y1, state1, of_y1, of_state1, saves_between: bool):
        """`(of_state1, of_parameters)` before the last step is reversed; `of_parameters` may be None."""
        return of_state1, None

    def reverse(self, field: Callable, interval: Interval, y1, state1, saves_between: bool):
        """One step back, and the pullback of that step.

        `field(fn, *x)` evaluates `fn(terms, args, *x)` and returns it with its pullback `cotangent -> (of_parameters, *of_x)`, where
        `of_parameters` are cotangents of whatever terms and args hold; they add up.

        **Returns:** `(y0, state0, dense_info, pullback)`, where `pullback(of_y1, of_state1, of_dense_info)` is
        `(of_y0, of_state0, of_parameters)`. Without `saves_between` nothing was saved after t0 and before t1: both of dense_info are None.
        """
        t0, t1 = interval.start, interval.end
        (y0, state0), _ = field(lambda terms, args: self.inverse(terms, t0, t1, y1, args, state1))

        def step(terms, args, y0, state0):
            y1, _, dense_info, state1, _ = self.step(terms, t0, t1, y0, args, state0, made_jump=False)
            return y1, state1, dense_info if saves_between else None

        (_, _, dense_info), back = field(step, y0, state0)

        def pullback(of_y1, of_state1, of_dense):
            of_parameters, of_y0, of_state0 = back((of_y1, of_state1, of_dense))
            return of_y0, of_state0, of_parameters

        return y0, state0, dense_info, pullback


class RungeKutta4(dfx.AbstractERK):
    """The classical fourth-order Runge-Kutta method, as a diffrax solver (diffrax has none). Its embedded error is the midpoint rule's."""

    tableau: ClassVar[dfx.ButcherTableau] = dfx.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.array([1, -4, 2, 1]) / 6,
    )
    interpolation_cls: ClassVar = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4

    def error_order(self, terms):
        return 3


class _Euler(NamedTuple):
    """Euler's method, for which `dfx.ButcherTableau` has no room."""

    c: tuple = ()
    a_lower: tuple = ()
    b_sol: tuple = (1.0,)
    b_error: tuple = (0.0,)


class Pair(eqx.Module):
    """The state of `Reversible`: the second solution z, and d = y - z."""

    z: PyTree[Array]
    d: PyTree[Array]
    stretch: Any  # the time between two kept states; None unless the coupling is "auto" and someone has told it

    def told(self, stretch: Any) -> "Pair":
        return Pair(self.z, self.d, stretch)


def _unless_lost(y1, exact, y0):
    """y1, or NaN where it is no longer what the step computed.

    The step back from y1 may be enormous where the solution runs off within the step. The halves of the state then are large and opposite, and
    their sum is rounding: zero, say, in place of a number that is about to overflow.
    """
    if not jtu.tree_leaves(y1):
        return y1
    top = lambda leaf: jnp.max(jnp.abs(leaf), initial=0).astype(float)
    size = lambda *trees: jnp.max(jnp.stack([top(leaf) for leaf in jtu.tree_leaves(trees)]))
    eps = float(jnp.finfo(precision(y1)).eps)
    lost = size(subtract(y1, exact)) > eps**0.5 * size(exact, y0)
    return jtu.tree_map(lambda leaf: jnp.where(lost, jnp.nan, leaf), y1)


class Reversible(AbstractReversibleSolver, dfx.AbstractWrappedSolver):
    r"""Any explicit Runge-Kutta method of diffrax made reversible, at its own order, by the coupling (C) of this module.

    **Arguments:**

    - `solver`: a `diffrax.AbstractERK` (Heun, Midpoint, Bosh3, Tsit5, Dopri5, Dopri8, ...; ours: `RungeKutta4`) or `diffrax.Euler`.
    - `coupling`: $\lambda \in (0, 1]$ of every step, or `"auto"`: $\ln(1/\lambda) = \min(B h/(\tau + h), 2)$, with $\tau$ the time between two
      states that `ReversibleAdjoint` keeps. Rounding then grows by at most $e^{B + 2}$ from one to the next, B = 6 in float32 and 13 in
      float64, however many or few the steps are, and however unequal; that is as stable as reversal allows. Only `ReversibleAdjoint`
      knows the horizon, so any other adjoint needs a number: `coupling_for(steps)` is the same one, for equal steps.

    Adaptive steps use the embedded error of `solver`, saved values its interpolation. SDEs need a solver that converges to the
    Stratonovich solution.

    **Reference:** McCallum & Foster 2024, arXiv:2410.11648.
    """

    solver: dfx.AbstractSolver
    coupling: float | str = eqx.field(static=True)

    def __init__(self, solver: dfx.AbstractSolver, coupling: float | str = "auto"):
        # By its class: diffrax lets a wrapper (`HalfSolver`) pass for what it wraps.
        if not issubclass(type(solver), RUNGE_KUTTA):
            raise ValueError(
                "Reversible wraps an explicit Runge-Kutta solver (diffrax.AbstractERK or diffrax.Euler), whose step depends on "
                f"nothing but the state; got {type(solver).__name__}."
            )
        if coupling != "auto" and not (isinstance(coupling, float | int) and 0 < coupling <= 1):
            raise ValueError(
                f'coupling must be "auto" or a number in (0, 1], got {coupling!r}: at 0 a step forgets y and has no inverse.'
            )
        self.solver = solver
        self.coupling = coupling if coupling == "auto" else float(coupling)

    term_structure: ClassVar = dfx.AbstractTerm
    linear_but_for_field: ClassVar = True
    scan_kind: ClassVar = "unrolled"  # diffrax asks whatever passes for a Runge-Kutta solver, as wrappers of one do

    @property
    def interpolation_cls(self):
        return _Coupled(self.solver.interpolation_cls)

    @property
    def tableau(self) -> dfx.ButcherTableau | _Euler:
        if isinstance(self.solver, dfx.Euler):
            return _Euler()
        tableau = self.solver.tableau  # pyright: ignore[reportAttributeAccessIssue]  (an AbstractERK: checked above)
        assert isinstance(tableau, dfx.ButcherTableau)
        return tableau

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        if _has_noise(terms) and not isinstance(self.solver, dfx.AbstractStratonovichSolver):
            raise ValueError(
                f"Reversible({type(self.solver).__name__}) does not converge to a solution of an SDE: the two halves of its step see "
                "the noise from both ends. Wrap a Stratonovich solver, diffrax.Heun() for instance, or use diffrax.ReversibleHeun()."
            )
        return Pair(y0, jtu.tree_map(jnp.zeros_like, y0), None)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        # y0 is z + d to the last bit, unless the caller moved it between two solves.
        d = solver_state.d
        z = add(solver_state.z, subtract(y0, add(solver_state.z, d)))
        control = terms.contr(t0, t1)
        up, stages = self._increment(terms, t0, t1, control, z, args)
        kept = self._damp(solver_state, t0, t1, d)
        exact = add(z, add(kept, up))
        down = self._decrement(terms, t0, t1, control, exact, args)
        state = Pair(add(z, down), subtract(add(kept, up), down), solver_state.stretch)
        y1 = _unless_lost(add(state.z, state.d), exact, y0)
        error = None if isinstance(self.solver, dfx.Euler) else _combine(self.tableau.b_error, stages)
        return y1, error, self._dense(z, up, stages, d, kept), state, dfx.RESULTS.successful

    def compared(self, y, state):
        return y, state.z

    def inverse(self, terms, t0, t1, y1, args, state1):
        control = terms.contr(t0, t1)
        down = self._decrement(terms, t0, t1, control, add(state1.z, state1.d), args)
        z = subtract(state1.z, down)
        up, _ = self._increment(terms, t0, t1, control, z, args)
        d = self._undamp(state1, t0, t1, add(subtract(state1.d, up), down))
        return add(z, d), Pair(z, d, state1.stretch)

    def reverse(self, field, interval, y1, state1, saves_between):
        # The evaluations that invert are the ones that are differentiated.
        t0, t1 = interval.start, interval.end

        def decrement(terms, args, y1):
            return self._decrement(terms, t0, t1, terms.contr(t0, t1), y1, args)

        def increment(terms, args, z):
            up, stages = self._increment(terms, t0, t1, terms.contr(t0, t1), z, args)
            return up, stages if saves_between else None

        down, back_down = field(decrement, add(state1.z, state1.d))
        z = subtract(state1.z, down)
        (up, stages), back_up = field(increment, z)
        d = self._undamp(state1, t0, t1, add(subtract(state1.d, up), down))
        state = Pair(z, d, state1.stretch)

        def saved(z, up, stages, d):
            return self._dense(z, up, stages, d, self._damp(state1, t0, t1, d))

        def pullback(of_y1, of_state1, of_dense):
            of_z1, of_d1 = of_state1.z, of_state1.d
            first, more = back_down(subtract(of_z1, of_d1))
            of_y1 = add(of_y1, more)
            of_up = add(of_y1, of_d1)
            of_z, of_d, of_stages = add(of_z1, of_y1), self._damp(state1, t0, t1, of_up), None
            if saves_between:
                parts = jax.vjp(saved, z, up, stages, d)[1](of_dense)
                of_z, of_up, of_stages, of_d = (
                    add(of_z, parts[0]),
                    add(of_up, parts[1]),
                    parts[2],
                    add(of_d, parts[3]),
                )
            second, more = back_up((of_up, of_stages))
            of_z = add(of_z, more)
            return jtu.tree_map(jnp.zeros_like, of_z), Pair(of_z, of_d, of_state1.stretch), add(first, second)

        return add(z, d), state, saved(z, up, stages, d) if saves_between else None, pullback

    def _increment(self, terms, t0, t1, control, y, args):
        """(what a step of the solver adds, its stages times h). Unrolled: what is not used (error, last stage) is not computed."""
        c = [0.0, *self.tableau.c]
        stages = []
        for i, c_i in enumerate(c):
            y_i = y if i == 0 else add(y, _combine(self.tableau.a_lower[i - 1], stages))
            t = t0 + float(c_i) * (t1 - t0)
            stages.append(terms.vf_prod(t, y_i, args, control))
        return _combine(self.tableau.b_sol, stages), stages

    def _decrement(self, terms, t0, t1, control, y1, args):
        """$-\\Psi_{-h}(t_1, y_1)$: what takes z forwards."""
        back = jtu.tree_map(jnp.negative, control)
        return jtu.tree_map(jnp.negative, self._increment(terms, t1, t0, back, y1, args)[0])

    def _dense(self, z, up, stages, d, kept):
        info = dict(z0=z, z1=add(z, up), d0=d, d1=kept)
        if isinstance(self.solver, dfx.Euler):
            return info
        return info | dict(k=jtu.tree_map(lambda *k: jnp.stack(k), *stages))

    def _damp(self, state, t0, t1, d):
        if self.coupling != "auto":
            return times(float(self.coupling), d)
        if state.stretch is None:
            raise ValueError(
                'Reversible(coupling="auto") takes its coupling from the horizon, which only declarative.ReversibleAdjoint knows. '
                "With another adjoint (or with events, or dense output) give a number: "
                "Reversible(solver, coupling=declarative.coupling_for(steps))."
            )
        factor = jnp.exp(-_exponent(state.stretch, t1 - t0, d))
        return jtu.tree_map(lambda d: factor.astype(d.dtype) * d, d)

    def _undamp(self, state, t0, t1, d):
        if self.coupling != "auto":
            return jtu.tree_map(lambda d: d / self.coupling, d)
        factor = jnp.exp(_exponent(state.stretch, t1 - t0, d))
        return jtu.tree_map(lambda d: factor.astype(d.dtype) * d, d)


def coupling_for(steps: int, dtype=None, *, anchors: int = ANCHORS) -> float:
    """The coupling that `"auto"` amounts to with equal steps and `ReversibleAdjoint(anchors)`.

    **Arguments:** `steps`: how many steps the solve takes. `dtype` of the state; the default float if None. `anchors`: of the adjoint.
    """
    integer(steps, "steps")
    like = jnp.zeros((), dtype)
    if like.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"dtype must be float32 or float64, got {like.dtype}.")
    return float(np.exp(-_exponent(1 / (anchors + 1), 1 / steps, like, min)))


def _exponent(stretch, step, like, minimum: Callable = jnp.minimum):
    """$-\\ln \\lambda$. Those of the steps of a stretch sum up to the budget at most, and that of one more, which reaches past its end."""
    return minimum(BUDGET[jnp.finfo(precision(like)).bits] * step / (stretch + step), LARGEST)


@dataclasses.dataclass(frozen=True)
class _Coupled:
    """Dense output of (C): the solver's own, which starts at z, shifted by the part of d that is left."""

    base: Callable

    def __call__(self, *, t0, t1, z0, z1, d0, d1, **k):
        return _Shifted(
            self.base(t0=t0, t1=t1, y0=z0, y1=z1, **k), dfx.LocalLinearInterpolation(t0=t0, t1=t1, y0=d0, y1=d1), t0, t1
        )


class _Shifted(dfx.AbstractLocalInterpolation):
    base: dfx.AbstractLocalInterpolation
    shift: dfx.LocalLinearInterpolation
    t0: Any
    t1: Any

    def evaluate(self, t0, t1=None, left=True):
        return add(self.base.evaluate(t0, t1, left), self.shift.evaluate(t0, t1, left))


class AsynchronousLeapfrog(AbstractReversibleSolver, dfx.AbstractAdaptiveSolver):
    r"""The asynchronous leapfrog method (the solver of MALI): a position z and a velocity v that follows the field.

    $$ z_{1/2} = z + \tfrac h2 v,\quad u = f(t + \tfrac h2, z_{1/2}),\quad v' = v + 2\eta(u - v),\quad z' = z_{1/2} + \tfrac h2 v' $$

    from $v = f(t_0, z_0)$. One evaluation a step, order 2 at $\eta = 1$ (order 1 below). Backwards $v = (2\eta u - v')/(2\eta - 1)$:
    rounding grows by $1/(2\eta - 1)$ a step.

    **Arguments:** `damping`: $\eta$, in (1/2, 1]. ODEs only.
    **Reference:** Zhuang et al. 2021, *MALI*, arXiv:2102.04668.
    """

    damping: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if not 0.5 < self.damping <= 1:
            raise ValueError(
                f"damping must lie in (1/2, 1], got {self.damping!r}: at 1/2 a step forgets v and has no inverse."
            )

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation
    linear_but_for_field: ClassVar = True

    def order(self, terms):
        return 2 if self.damping == 1 else 1

    def init(self, terms, t0, t1, y0, args):
        if _has_noise(terms):
            raise ValueError(
                "AsynchronousLeapfrog solves ODEs; for an SDE use diffrax.ReversibleHeun() or Reversible(diffrax.Heun())."
            )
        return terms.vf(t0, y0, args)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        control, half = self._control(terms, t0, t1)
        middle = add(y0, terms.prod(solver_state, half))
        u = terms.vf(t0 + 0.5 * (t1 - t0), middle, args)
        return *self._finish(terms, y0, middle, solver_state, u, control, half), dfx.RESULTS.successful

    def _finish(self, terms, y0, middle, v, u, control, half):
        v1 = add(v, times(2 * self.damping, subtract(u, v)))
        y1 = add(middle, terms.prod(v1, half))
        return y1, terms.prod(subtract(u, v), control), dict(y0=y0, y1=y1), v1

    @staticmethod
    def _control(terms, t0, t1):
        control = terms.contr(t0, t1)
        return control, times(0.5, control)

    def _before(self, u, v1):
        eta = 2 * self.damping
        return jtu.tree_map(lambda u, v1: (eta * u - v1) / (eta - 1), u, v1)

    def inverse(self, terms, t0, t1, y1, args, state1):
        _, half = self._control(terms, t0, t1)
        middle = subtract(y1, terms.prod(state1, half))
        v = self._before(terms.vf(t0 + 0.5 * (t1 - t0), middle, args), state1)
        return subtract(middle, terms.prod(v, half)), v

    def reverse(self, field, interval, y1, state1, saves_between):
        t0, t1 = interval.start, interval.end
        # Everything but the field is linear with coefficients of its own, so the step is differentiated around it: one evaluation.
        prod = lambda terms, args, v: terms.prod(v, self._control(terms, t0, t1)[1])
        shift, _ = field(prod, state1)
        middle = subtract(y1, shift)
        u, back_field = field(lambda terms, args, middle: terms.vf(t0 + 0.5 * (t1 - t0), middle, args), middle)
        v = self._before(u, state1)
        shift, _ = field(prod, v)
        y0 = subtract(middle, shift)

        def drift(terms, args, y0, v):
            return add(y0, prod(terms, args, v))

        def finish(terms, args, y0, middle, v, u):
            y1, _, info, v1 = self._finish(terms, y0, middle, v, u, *self._control(terms, t0, t1))
            return y1, v1, info if saves_between else None

        _, back_drift = field(drift, y0, v)
        (_, _, info), back_finish = field(finish, y0, middle, v, u)

        def pullback(of_y1, of_v1, of_dense):
            first, of_y0, of_middle, of_v, of_u = back_finish((of_y1, of_v1, of_dense))
            second, more = back_field(of_u)
            third, y, v = back_drift(add(of_middle, more))
            return add(of_y0, y), add(of_v, v), add(first, add(second, third))

        return y0, v, info, pullback


class Leapfrog(AbstractReversibleSolver):
    r"""The leapfrog (position Verlet) method for separable systems $\dot p = f(t, q)$, $\dot q = g(t, p)$: symplectic, order 2.

    $$ q_{1/2} = q + \tfrac h2 g(t, p),\quad p' = p + h f(t + \tfrac h2, q_{1/2}),\quad q' = q_{1/2} + \tfrac h2 g(t + h, p') $$

    Terms and state as for `diffrax.SemiImplicitEuler`: `terms = (ODETerm(f), ODETerm(g))` with f a function of `(t, q, args)` and g of
    `(t, p, args)`, `y0 = (p, q)`.

    **Reference:** Hairer, Lubich & Wanner 2003, *Geometric numerical integration illustrated by the Stoermer-Verlet method*.
    """

    term_structure: ClassVar = (dfx.AbstractTerm, dfx.AbstractTerm)
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        f, g = terms
        return f.vf(t0, y0[1], args), g.vf(t0, y0[0], args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        p, q = y0
        f, g = terms
        middle = t0 + 0.5 * (t1 - t0)
        q = add(q, times(0.5, g.vf_prod(t0, p, args, g.contr(t0, t1))))
        p = add(p, f.vf_prod(middle, q, args, f.contr(t0, t1)))
        q = add(q, times(0.5, g.vf_prod(t1, p, args, g.contr(t0, t1))))
        return (p, q), None, dict(y0=y0, y1=(p, q)), None, dfx.RESULTS.successful

    def hoist(self, terms, t, y, args):
        return hoist_pair(terms, t, y, args)

    def inverse(self, terms, t0, t1, y1, args, state1):
        p, q = y1
        f, g = terms
        middle = t0 + 0.5 * (t1 - t0)
        q = subtract(q, times(0.5, g.vf_prod(t1, p, args, g.contr(t0, t1))))
        p = subtract(p, f.vf_prod(middle, q, args, f.contr(t0, t1)))
        q = subtract(q, times(0.5, g.vf_prod(t0, p, args, g.contr(t0, t1))))
        return (p, q), None


def _has_noise(terms) -> bool:
    is_path = lambda leaf: isinstance(leaf, dfx.AbstractBrownianPath)
    return any(is_path(leaf) for leaf in jtu.tree_leaves(terms, is_leaf=is_path))


def _combine(weights, stages):
    used = [(float(w), k) for w, k in zip(weights, stages, strict=True) if w != 0]
    if not used:
        return jtu.tree_map(jnp.zeros_like, stages[0])
    return jtu.tree_map(
        lambda *k: sum((w * k for (w, _), k in zip(used[1:], k[1:], strict=True)), used[0][0] * k[0]),
        *(k for _, k in used),
    )
