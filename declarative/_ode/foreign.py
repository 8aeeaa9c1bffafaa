"""The reversible solvers that diffrax has, with the inverses that it has not."""

# diffrax declares as class variables what its own subclasses have as fields and properties.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from typing import Any, ClassVar

import diffrax as dfx

from .hoist import hoist_pair
from .reversible import RUNGE_KUTTA, AbstractReversibleSolver
from .trees import add, subtract, times


def reversible(solver: dfx.AbstractSolver) -> AbstractReversibleSolver:
    """`solver` with its inverse, or an error that says what to use."""
    # By its class: diffrax lets a wrapper (`HalfSolver`) pass for what it wraps, whose inverse is not the wrapper's.
    kind = type(solver)
    if issubclass(kind, AbstractReversibleSolver):
        return solver  # pyright: ignore[reportReturnType]  (by its class)
    if kind in _INVERTED:
        return _INVERTED[kind](solver)
    name = kind.__name__
    wrap = f" Use declarative.Reversible(diffrax.{name}())." if issubclass(kind, RUNGE_KUTTA) else ""
    raise ValueError(
        f"ReversibleAdjoint needs a solver whose step has an inverse, which {name} has not.{wrap} Reversible: "
        "declarative.Reversible(solver), AsynchronousLeapfrog, Leapfrog, diffrax.ReversibleHeun, diffrax.SemiImplicitEuler, and "
        "subclasses of declarative.AbstractReversibleSolver."
    )


def has_inverse(solver: dfx.AbstractSolver) -> bool:
    """Whether `reversible` takes it."""
    return issubclass(type(solver), AbstractReversibleSolver) or type(solver) in _INVERTED


class _Foreign(AbstractReversibleSolver):
    """What diffrax's solver does, it does here."""

    solver: Any
    term_structure: ClassVar = dfx.AbstractTerm

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)


class _ReversibleHeun(_Foreign):
    r"""State $(\hat z, f)$ with $f = f(t, \hat z)$: $\hat z_1 = 2y_0 - \hat z_0 + hf_0$, $y_1 = y_0 + \tfrac h2(f_0 + f_1)$ (Kidger et al. 2021).

    Each f belongs to two steps. Where nothing is saved between, both of its cotangents are at hand when the earlier end of a step is
    reached ($\bar y$ there needs no field), so one evaluation and one pullback a step suffice, as forwards; `of_state` is then the
    whole cotangent of $\hat z$, and none is left for f. Otherwise the general way takes two.
    """

    linear_but_for_field: ClassVar = True

    def inverse(self, terms, t0, t1, y1, args, state1):
        control = terms.contr(t0, t1)
        z1, f1 = state1
        z0 = subtract(subtract(times(2.0, y1), z1), terms.prod(f1, control))
        f0 = terms.vf(t0, z0, args)
        return subtract(y1, times(0.5, terms.prod(add(f0, f1), control))), (z0, f0)

    def compared(self, y, state):
        return y, state[0]

    def begin(self, field, interval, y1, state1, of_y1, of_state1, saves_between):
        if saves_between:
            return of_state1, None
        z1, f1 = state1
        _, back_product = field(lambda terms, args, f: terms.prod(f, terms.contr(interval.start, interval.end)), f1)
        _, back = field(lambda terms, args, z: terms.vf(interval.end, z, args), z1)
        first, of_f = back_product(times(0.5, of_y1))
        second, of_z = back(of_f)
        return (of_z, of_state1[1]), add(first, second)

    def reverse(self, field, interval, y1, state1, saves_between):
        if saves_between:
            return AbstractReversibleSolver.reverse(self, field, interval, y1, state1, saves_between)
        z1, f1 = state1
        before, t0, t1 = interval
        product, _ = field(lambda terms, args, f: terms.prod(f, terms.contr(t0, t1)), f1)
        z0 = subtract(subtract(times(2.0, y1), z1), product)
        f0, back = field(lambda terms, args, z: terms.vf(t0, z, args), z0)

        def products(terms, args, f):
            return terms.prod(f, terms.contr(t0, t1)), terms.prod(f, terms.contr(before, t0))

        (other, _), back_products = field(products, f0)
        y0 = subtract(y1, times(0.5, add(product, other)))

        def pullback(of_y1, of_state1, of_dense):
            of_z1, of_f1 = of_state1
            of_y0 = add(of_y1, times(2.0, of_z1))
            first, of_f0 = back_products((add(of_z1, times(0.5, of_y1)), times(0.5, of_y0)))
            second, of_z0 = back(of_f0)
            return of_y0, (subtract(of_z0, of_z1), of_f1), add(first, second)

        return y0, (z0, f0), None, pullback


class _SemiImplicitEuler(_Foreign):
    term_structure: ClassVar = (dfx.AbstractTerm, dfx.AbstractTerm)

    def hoist(self, terms, t, y, args):
        return hoist_pair(terms, t, y, args)

    def inverse(self, terms, t0, t1, y1, args, state1):
        f, g = terms
        p, q = y1
        q = subtract(q, g.vf_prod(t0, p, args, g.contr(t0, t1)))
        return (subtract(p, f.vf_prod(t0, q, args, f.contr(t0, t1))), q), None


_INVERTED = {dfx.ReversibleHeun: _ReversibleHeun, dfx.SemiImplicitEuler: _SemiImplicitEuler}
