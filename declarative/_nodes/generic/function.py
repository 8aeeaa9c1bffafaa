"""`declarative.implicit`: the implicit function theorem for a plain function."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import optimistix as optx
from jaxtyping import PyTree

from ..._core.closure import close
from ..._core.implicit import Run
from ..._core.node import AbstractDeclarativeNode, Policy, Solution, evaluate, make_policy
from .root import check_function


class ImplicitFunction(AbstractDeclarativeNode):
    """What `declarative.implicit` returns: `function(*args)` for the value, `function.solve(*args)` for the `Solution`."""

    condition: Callable
    algorithm: Callable
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    def __call__(self, *args: PyTree) -> PyTree:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Overrides the base class's call to spread the data, as a plain function takes them.
        return evaluate(self, args)

    def solve(self, *args: PyTree) -> Solution:  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        """The `Solution`; takes the arguments of a call. Does not raise when the solve fails: read `result`."""
        return super().solve(args)

    def pack(self, x, *more):
        """The tuple of the arguments; from there, or from the arguments themselves where there are several."""
        if more:
            return (x, *more)
        if not isinstance(x, tuple):
            raise ValueError(
                f"the data of an implicit function are the tuple of its arguments; got {type(x).__name__}."
            )
        return x

    def bind(self, x, y0):
        del y0
        algorithm = close(self.algorithm, *x)
        unknown = jax.eval_shape(algorithm, *x)
        condition = close(self.condition, unknown, *x)
        return eqx.tree_at(lambda node: (node.condition, node.algorithm), self, (condition, algorithm))

    def optimality(self, y, x):
        return self.condition(y, *x)

    def run(self, x, y0, loop):
        del y0, loop
        return Run(self.algorithm(*x))


def implicit(
    optimality: Callable[..., PyTree],
    *,
    adjoint: optx.AbstractAdjoint | None = None,
    policy: Policy | None = None,
    throw: bool | None = None,
    on_failure: Literal["nan", "zero"] | None = None,
) -> Callable[[Callable], ImplicitFunction]:
    """Gives a plain solver the derivative of the problem that it solves, and a check of its answer.

        @declarative.implicit(lambda w, A, b: A.T @ (A @ w - b) + w)
        def ridge(A, b):
            return jnp.linalg.solve(A.T @ A + jnp.eye(A.shape[1]), A.T @ b)

    **Arguments:**

    - `optimality`: `optimality(y, *args)`, zero at the solution, shaped like `y`, forward-differentiable.
    - `adjoint`: None: `ImplicitAdjoint()`. An adjoint that differentiates iterations (unrolled, checkpointed) or needs a
      contraction has nothing to work on here and raises.
    - `policy`, `throw`, `on_failure`: what to do when `optimality` is not small at the answer, or the gradient's linear solve fails:
      see `Policy`.

    **Returns:** a decorator for `solve(*args) -> y`: any JAX code, never differentiated; positional arguments. Arrays that
    `optimality` closes over get their gradients, those that only `solve` closes over get none. The result is a node whose data is
    the tuple of arguments: `ridge(A, b)` is the value, `ridge.solve(A, b)` the `Solution`, and
    `conditions(ridge, ridge.solve(A, b), (A, b))` the report.
    """
    check_function(optimality, "optimality")
    if isinstance(adjoint, optx.RecursiveCheckpointAdjoint) or getattr(adjoint, "unrolls", False):
        raise ValueError(
            f"{type(adjoint).__name__} differentiates a node's own iterations; a plain function is differentiated by JAX already. "
            "Use ImplicitAdjoint(), or drop the decorator."
        )

    chosen = make_policy(policy, throw=throw, on_failure=on_failure)

    def decorator(solve: Callable[..., PyTree]) -> ImplicitFunction:
        algorithm = check_function(solve, "solve")
        return ImplicitFunction(condition=optimality, algorithm=algorithm, adjoint=adjoint, policy=chosen)

    return decorator
