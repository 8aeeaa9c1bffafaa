"""Terms whose closed-over arrays are leaves, so that a custom backward pass can reach them."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .._core.closure import Closed, close


class Hoisted(dfx.AbstractTerm):
    """A term that was traced once; what its field, control and product captured are leaves."""

    field: Closed
    control: Closed
    product: Closed

    def vf(self, t, y, args):
        return self.field(t, y, args)

    def contr(self, t0, t1, **kwargs):
        return self.control(t0, t1)

    def prod(self, vf, control):
        return self.product(vf, control)


def hoist(term: dfx.AbstractTerm, t, y, args) -> Hoisted:
    """`term` at states like y. Vector fields, controls and their products keep the shapes that they have at the first call."""
    t = jnp.asarray(t)
    field, control = close(term.vf, t, y, args), close(term.contr, t, t)
    shapes = (eqx.filter_eval_shape(field, t, y, args), eqx.filter_eval_shape(control, t, t))
    return Hoisted(field, control, close(term.prod, *shapes))


def hoist_pair(terms, t, y, args) -> tuple[Hoisted, Hoisted]:
    """The terms of a separable system, each of which acts on the other's half of y."""
    f, g = terms
    p, q = y
    return hoist(f, t, q, args), hoist(g, t, p, args)
