r"""Semi-amortised variational inference: the variational parameters of one observation as the solution of a problem.

An encoder proposes $\lambda_0$; the generative model $\theta$ and the observation x fix $\ell(\lambda; \theta, x) = -\mathrm{ELBO}$.

**Problem.**     $\lambda^* = \arg\min_\lambda \ell(\lambda; \theta, x)\;[+\;\rho\,D(\lambda, \lambda_0)]$, locally, from $\lambda_0$      (P)
**Optimality.**  $F = \nabla_\lambda \ell(\lambda; \theta, x)\;[+\;\rho\,\nabla_\lambda D(\lambda, \lambda_0)]$                     (K1)
**Solver.**      That of `Argmin` (BFGS, then Newton), any optimistix minimiser, or a fixed number of gradient steps.
**Gradient.**    Without the bracket F does not contain $\lambda_0$: by the implicit function theorem $\mathrm d\lambda^*/\mathrm d\lambda_0 = 0$,
                 and the encoder learns nothing. Unrolled, $\mathrm d\lambda_K/\mathrm d\lambda_0 = \prod_k (I - \alpha H_k)$ only decays towards
                 that zero. With the bracket (`proximal`)

                 $\mathrm d\lambda^*/\mathrm d\lambda_0 = -\rho\,(H + \rho\,\partial^2_{\lambda\lambda} D)^{-1}\,\partial^2_{\lambda\lambda_0} D$,

                 and if the bracket counts in the loss as well (`moreau`), the loss is a Moreau envelope, whose gradient
                 $\rho\,\partial_{\lambda_0} D(\lambda^*, \lambda_0)$ needs no linear solve.

References: Kim et al. 2018, arXiv:1802.02550 (semi-amortised inference); Rajeswaran et al. 2019, arXiv:1909.04630 (a proximal inner problem);
Moreau 1965, *Proximite et dualite dans un espace hilbertien* (the envelope). That plain implicit differentiation gives the encoder no
gradient answers a question that Chiu 2021, section 5, leaves open.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._core.adjoint import AbstractAdjoint
from ..._core.arguments import integer, number
from ..._core.closure import close
from ..._core.implicit import Run, detach_tree
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.norms import largest
from ..._ode.trees import precision
from ..._reversible.optimiser import ReversibleSGD
from ..generic.argmin import Argmin
from .families import AbstractFamily, check_events, divergence, half_squared, log_prob, scalar

Mode = Literal["amortised", "svi", "unrolled", "reversible", "implicit", "proximal", "moreau", "kl"]
_MODES = ("amortised", "svi", "unrolled", "reversible", "implicit", "proximal", "moreau", "kl")
_OF_STEPS = ("unrolled", "reversible")
_PROXIMAL = ("proximal", "moreau")


class ELBO(eqx.Module):
    r"""The evidence lower bound $\mathbb E_q[\log p(x \mid z)] - \mathrm{KL}(q \,\|\, p(z))$ in nats, by `samples` draws that a key fixes.

    **Arguments:** `log_likelihood(z, x) -> scalar`, a function or an Equinox module; `family` of q; `prior`, a NumPyro distribution (None: the
    standard member of the family); `samples` of z.
    **Call:** `elbo(parameters, x, key)`. With one key it is a deterministic function of the parameters (common random numbers), as an
    inner problem must be. The divergence is exact where NumPyro has a closed form, else estimated by the same samples.
    """

    log_likelihood: Callable
    family: AbstractFamily
    prior: Any = None
    samples: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not callable(self.log_likelihood):
            raise ValueError(f"log_likelihood must be a function of (z, x), got {type(self.log_likelihood).__name__}.")
        if not isinstance(self.family, AbstractFamily):
            raise ValueError(f"family must be an AbstractFamily, got {type(self.family).__name__}.")
        if self.prior is not None and not hasattr(self.prior, "log_prob"):
            raise ValueError(f"prior must be a NumPyro distribution, got {self.prior!r}.")
        integer(self.samples, "samples")

    def __call__(self, parameters: PyTree, x: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        z = self.family.sample(parameters, key, self.samples)
        likelihood = jnp.mean(jax.vmap(lambda z: self._likelihood(z, x))(z))
        return likelihood - self._divergence(parameters, z)

    def _likelihood(self, z, x):
        value = self.log_likelihood(z, x)
        return scalar(value, "log_likelihood must return a scalar, the sum over all entries of x")

    def log_evidence(self, parameters: PyTree, x: PyTree, key: PRNGKeyArray, samples: int) -> Float[Array, ""]:
        r"""$\log \tfrac1S \sum_s p(x, z_s)/q(z_s)$: importance weighted, below $\log p(x)$ in expectation and rising to it with `samples`.

        **Reference:** Burda et al. 2016, arXiv:1509.00519.
        """
        integer(samples, "samples")
        z = self.family.sample(parameters, key, samples)
        joint = jax.vmap(lambda z: self._likelihood(z, x) + self._log_prior(parameters, z))(z)
        weights = joint - jax.vmap(lambda z: self.family.log_prob(parameters, z))(z)
        return jax.nn.logsumexp(weights) - jnp.log(jnp.asarray(samples, weights.dtype))

    def _log_prior(self, parameters, z):
        if self.prior is None:
            return self.family.log_prob(self.family.standard(parameters), z)
        check_events(self.family.distribution(parameters), self.prior)
        return log_prob(self.prior, z)

    def _divergence(self, parameters, z):
        q = self.family.distribution(parameters)
        prior = self.family.distribution(self.family.standard(parameters)) if self.prior is None else self.prior
        check_events(q, prior)
        try:
            return divergence(q, prior).astype(z.dtype)
        except NotImplementedError:
            estimate = lambda z: self.family.log_prob(parameters, z) - self._log_prior(parameters, z)
            return jnp.mean(jax.vmap(estimate)(z)).astype(z.dtype)


class GradientSteps(eqx.Module):
    """`steps` gradient steps with momentum, and no question whether that was enough: `v = momentum * v + gradient; y = y - learning_rate * v`.

    As the solver of a mode that differentiates a solution it makes the gradient that of the stated objective but for an error
    proportional to the residual that is left, which `solve` reports. A gradient longer than `max_norm` is shortened to it.
    """

    steps: int = eqx.field(static=True, default=20)
    learning_rate: float | Float[Array, ""] = 0.1
    momentum: float = eqx.field(static=True, default=0.5)
    max_norm: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        integer(self.steps, "steps")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum!r}.")
        number(self.learning_rate, "learning_rate")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm!r}.")

    def run(self, fn: Callable, y: PyTree, x: PyTree, *, checkpoint: bool) -> PyTree:
        """The last iterate; differentiable, from memory for the iterates alone with `checkpoint`."""

        def step(carry, _):
            y, v = carry
            gradient = jax.grad(fn)(y, x)
            if self.max_norm is not None:
                # Scaled, or the squares overflow. Twice `where`: the derivative of a norm at zero is NaN.
                top = jax.lax.stop_gradient(largest(gradient))
                top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
                square = sum(jnp.sum((leaf / top) ** 2) for leaf in jtu.tree_leaves(gradient))
                long = jnp.sqrt(square) > self.max_norm / top
                factor = jnp.where(long, self.max_norm / top / jnp.sqrt(jnp.where(long, square, 1)), 1)
                gradient = jtu.tree_map(lambda leaf: factor * leaf, gradient)
            v = jtu.tree_map(lambda v, g: self.momentum * v + g, v, gradient)
            return (jtu.tree_map(lambda y, v: y - jnp.asarray(self.learning_rate, y.dtype) * v, y, v), v), None

        step = jax.checkpoint(step) if checkpoint else step
        return jax.lax.scan(step, (y, jtu.tree_map(jnp.zeros_like, y)), None, self.steps)[0][0]


class Evidence(eqx.Module):
    """The data of an `ELBOOptimizer`: an observation, the parameters to start from, and the key that fixes the samples (or None)."""

    x: PyTree
    start: PyTree
    key: PRNGKeyArray | None = None


class Inference(eqx.Module):
    """What an `ELBOOptimizer` returns: variational `parameters`, their `elbo` (nats), and the `loss` to train with (nats; minimise it)."""

    parameters: PyTree
    elbo: Float[Array, ""]
    loss: Float[Array, ""]


class ELBOOptimizer(AbstractDeclarativeNode):
    r"""A layer that improves the variational parameters that an encoder proposes, for one observation; `jax.vmap` for batches.

    **Call:** `optimizer(x, start, key=key)` with `start` the encoder's parameters; the result has `parameters`, `elbo` and `loss`. Train on the mean
    `loss`. With $\lambda_0$ for `start`, $\lambda^*$ a local minimum of $\ell = -\mathrm{ELBO}$ and $\lambda_K$ the last of K steps:

    | `mode`       | parameters        | loss, whose exact gradient it has            | the encoder learns                 |
    |--------------|-------------------|----------------------------------------------|------------------------------------|
    | `amortised`  | $\lambda_0$       | $\ell(\lambda_0)$                            | as in the plain VAE                |
    | `svi`        | $\lambda^*$       | $\ell(\lambda^*)$                            | nothing: there is none             |
    | `unrolled`   | $\lambda_K$       | $\ell(\lambda_K)$                            | through K steps, in memory K       |
    | `reversible` | $\lambda_K$       | $\ell(\lambda_K)$                            | the same, run backwards bit by bit |
    | `implicit`   | $\lambda^*$       | $\ell(\lambda^*)$                            | nothing: the gradient is zero      |
    | `proximal`   | $\lambda_\rho$    | $\ell(\lambda_\rho)$                         | by a linear solve                  |
    | `moreau`     | $\lambda_\rho$    | $\ell(\lambda_\rho) + \rho D$, the minimum   | $\rho\,\partial_{\lambda_0} D$     |
    | `kl`         | $\lambda^*$       | $\ell(\lambda^*)$ + KL to a fixed $\lambda^*$ | to predict $\lambda^*$ (first order) |

    where $\lambda_\rho$ minimises $\ell + \rho D(\cdot, \lambda_0)$. Both modes that have a $\rho$ go from `svi` ($\rho \to 0$) to `amortised`
    ($\rho \to \infty$). `svi` and `implicit` are one computation, under the names that it has without and with an encoder. `reversible` rounds
    to the unit of `ReversibleSGD`. Where the ELBO is estimated by samples, all this holds for the estimate with the given key; over keys, at
    fixed parameters, its mean is the ELBO.

    **Arguments:**

    - `elbo`: `elbo(parameters, x, key) -> scalar`, or `elbo(parameters, x)` for calls without a key; twice differentiable. `ELBO(...)` is one.
      Arrays that it holds (the generative model) get their gradients.
    - `mode`: as above.
    - `rho`: weight of the proximal term, a positive number or an array of shape () (a schedule). Do not learn it: the optimal value never
      decreases in it, so learning drives it to zero, and the encoder's gradient with it. Its product with a difference of parameters is the
      encoder's gradient in `moreau`, whose relative error is about rho times the dtype's spacing.
    - `family`: gives the distance D and the divergence of `kl`; None: that of `elbo`, if it has one. Without a family D is Euclidean.
    - `solver`: an optimistix minimiser, or `GradientSteps`; None: that of `Argmin`, and `GradientSteps()` for the two modes of K steps.
    - `direction`: of `kl`: "reverse", KL(encoder | optimum), as above, or "forward", KL(optimum | encoder).
    - `checkpoint`: whether `unrolled` keeps only the iterates, and computes each step again backwards.
    - `adjoint`: how gradients flow through $\lambda^*$; None: `ImplicitAdjoint()`. With
      `ImplicitAdjoint(lineax.Normal(lineax.CG(...)))` no matrix is built.
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    **Smoothness:** the ELBO must be C2 in the parameters: a decoder with tanh, softplus or silu, not ReLU, whose kinks hold many minima, at which no
    gradient vanishes (the default solver then reports that it has no solution; `GradientSteps` does not ask).
    **Raises:** `ValueError` for an unknown mode and for solvers and adjoints that a mode has no use for; `SolveError` where no minimum is found.
    """

    fn: Callable
    mode: Mode = eqx.field(static=True)
    rho: float | Float[Array, ""]
    family: AbstractFamily | None
    solver: optx.AbstractMinimiser | GradientSteps | None
    direction: Literal["reverse", "forward"] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    def __init__(
        self,
        elbo: Callable[..., Float[Array, ""]],
        mode: Mode = "moreau",
        *,
        rho: float | Float[Array, ""] = 1.0,
        family: AbstractFamily | None = None,
        solver: optx.AbstractMinimiser | GradientSteps | None = None,
        direction: Literal["reverse", "forward"] = "reverse",
        checkpoint: bool = True,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        if not callable(elbo):
            raise ValueError(f"elbo must be a function of (parameters, x, key), got {type(elbo).__name__}.")
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}; got {mode!r}.")
        rho = number(rho, "rho", hint='; for no proximal term use mode="implicit"')
        if direction not in ("reverse", "forward"):
            raise ValueError(f'direction must be "reverse" or "forward", got {direction!r}.')
        family = getattr(elbo, "family", None) if family is None else family
        if not (family is None or isinstance(family, AbstractFamily)):
            raise ValueError(f"family must be an AbstractFamily, got {type(family).__name__}.")
        if mode == "kl" and family is None:
            raise ValueError('mode="kl" needs the divergence of a family: pass family=..., or a declarative.ELBO.')
        if not (solver is None or isinstance(solver, (optx.AbstractMinimiser, GradientSteps))):
            raise ValueError(f"solver must be an optimistix minimiser or GradientSteps, got {type(solver).__name__}.")
        if mode in _OF_STEPS:
            solver = GradientSteps() if solver is None else solver
            if not isinstance(solver, GradientSteps):
                raise ValueError(
                    f'mode="{mode}" differentiates steps: pass solver=GradientSteps(...), not {type(solver).__name__}.'
                )
            if mode == "reversible" and (solver.max_norm is not None or solver.momentum < 1 / 32):
                raise ValueError(
                    'mode="reversible" runs ReversibleSGD, which needs a momentum of at least 1/32 and shortens no gradients.'
                )
        if adjoint is not None and (
            mode in ("amortised", *_OF_STEPS) or (isinstance(adjoint, AbstractAdjoint) and adjoint.needs_step)
        ):
            raise ValueError(f'mode="{mode}" has no use for {type(adjoint).__name__}: leave adjoint=None.')
        self.fn, self.mode, self.rho, self.family, self.solver = elbo, mode, rho, family, solver
        self.direction, self.checkpoint, self.adjoint = direction, checkpoint, adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    # The friendlier form that the contract asks for.
    def __call__(self, x: PyTree, start: PyTree, *, key: PRNGKeyArray | None = None) -> Inference:  # pyright: ignore[reportIncompatibleMethodOverride]  (friendlier on purpose)
        return evaluate(self, Evidence(x, start, key))

    @property
    def closed_form(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  (it depends on the mode)
        """Whether the derivative of `run` is the rule."""
        return self.mode in ("amortised", *_OF_STEPS)

    @property
    def modes(self) -> frozenset[str]:
        if self.mode == "kl":  # its second derivatives hold the optimum fixed
            return super().modes - {"higher-order"}
        return frozenset({"reverse"}) if self.mode == "reversible" else super().modes

    def pack(self, x, start=None, key=None):
        if start is not None:
            return Evidence(x, start, key)
        if not isinstance(x, Evidence):
            raise ValueError(
                f"ELBOOptimizer takes (x, start, key=...), or an Evidence in `solve`; got a {type(x).__name__}."
            )
        return x

    def check(self, x: Evidence):
        leaves = jtu.tree_leaves(x.start)
        if not leaves or not all(eqx.is_inexact_array(leaf) for leaf in leaves):
            raise ValueError("start must be a pytree of floating arrays: the parameters that the encoder proposes.")
        dtypes = sorted({jnp.result_type(leaf).name for leaf in leaves})
        if len(dtypes) > 1:
            raise ValueError(f"start must have one dtype, got {' and '.join(dtypes)}.")
        if x.key is not None and not _is_key(x.key):
            raise ValueError(f"key must be one PRNG key, got {x.key!r}; a batch of keys goes through `jax.vmap`.")
        most = _largest_rho(dtypes[0])
        if self.mode == "moreau" and not isinstance(self.rho, jax.core.Tracer) and float(self.rho) > most:
            raise ValueError(
                f"rho = {float(self.rho):g} is above {most:.0e}, where rho times a difference of {dtypes[0]} numbers has no digits left; "
                'mode="amortised" is the limit.'
            )
        try:
            inspect.signature(self.fn).bind(*_arguments(x.start, x))
        except TypeError:
            asked = (
                "elbo(parameters, x, key), as there is a key"
                if x.key is not None
                else "elbo(parameters, x), as there is no key"
            )
            raise ValueError(
                f"ELBOOptimizer calls {asked}, which {type(self.fn).__name__} does not take: "
                + ("leave the key away." if x.key is not None else "pass key=jax.random.key(...).")
            ) from None

    def guess(self, x: Evidence, y0):
        if y0 is None:
            return detach_tree(x.start)
        like, given = (eqx.filter_eval_shape(lambda tree: tree, tree) for tree in (x.start, y0))
        if not eqx.tree_equal(like, given):
            raise ValueError(f"y0 must have the structure, shapes and dtype of start, {like}; got {given}.")
        return y0

    def bind(self, x: Evidence, y0):
        closed = close(self.fn, y0, x.x, x.key) if x.key is not None else close(self.fn, y0, x.x)
        shape = eqx.filter_eval_shape(closed, *_arguments(y0, x))
        if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"elbo must return a floating scalar, got {shape}.")
        return eqx.tree_at(lambda node: node.fn, self, closed)

    # Problem and optimality

    def _energy(self) -> "_Energy":
        if self.mode in _PROXIMAL:
            return _Energy(self.fn, self.family, self.rho)
        return _Energy(self.fn)

    def optimality(self, y: PyTree, x: Evidence) -> PyTree:
        if self.mode == "amortised":
            return jtu.tree_map(jnp.subtract, y, x.start)
        return jax.grad(self._energy())(y, x)

    def value(self, y: PyTree, x: Evidence) -> Inference:
        elbo = self.fn(*_arguments(y, x))
        if self.mode in ("amortised", "proximal", *_OF_STEPS):
            return Inference(y, elbo, -elbo)
        # Inner and outer objective agree: no linear solve.
        loss = envelope(_value, y, (self._energy(), x))
        if self.mode == "kl":
            assert self.family is not None
            pair = x.start, detach_tree(y)
            try:
                loss = loss + self.family.divergence(*(pair if self.direction == "reverse" else pair[::-1]))
            except NotImplementedError as error:
                raise ValueError(
                    f'mode="kl" needs the divergence between two members of {type(self.family).__name__}, of which NumPyro knows no '
                    "closed form: define `divergence(self, parameters, other)` in the family."
                ) from error
        return Inference(y, elbo, loss)

    def objective(self, y: PyTree, x: Evidence):
        """What was minimised, the proximal term included."""
        if self.closed_form:
            return self._energy()(y, x)  # not stationary: no envelope
        return envelope(_value, y, (self._energy(), x))

    # Solver

    def run(self, x: Evidence, y0: PyTree, loop) -> Run:
        run = self._run(x, y0, loop)
        if self.mode not in _PROXIMAL:
            return run
        # A rho that is traced was not checked at construction. Too large, its product with a difference of parameters has no digits.
        dtype = precision(x.start)
        rho = jnp.asarray(self.rho, dtype)
        good = (rho > 0) & (rho <= (_largest_rho(dtype) if self.mode == "moreau" else float(jnp.finfo(dtype).max)))
        said = RESULTS.successful if run.result is None else run.result
        result = choose(good, said, RESULTS.bad_rho)
        return eqx.tree_at(lambda run: run.result, run, result, is_leaf=lambda leaf: leaf is None)

    def _run(self, x: Evidence, y0: PyTree, loop) -> Run:
        energy, solver = self._energy(), self.solver
        if self.mode == "amortised":
            return self._ended(x.start, x, 0)
        if self.mode == "reversible":
            assert isinstance(solver, GradientSteps)
            objective = lambda y, bound, t: bound[0](y, bound[1])
            steps = ReversibleSGD(objective, solver.steps, min_momentum=solver.momentum, throw=False)
            # Its velocity is an average of gradients.
            rate = jnp.asarray(solver.learning_rate, precision(x.start)) / (1 - solver.momentum)
            y = steps.run(x.start, (energy, x), learning_rate=rate, momentum=solver.momentum)
            return self._ended(y, x, solver.steps)
        if isinstance(solver, GradientSteps):
            start = x.start if self.mode == "unrolled" else y0
            y = solver.run(energy, start, x, checkpoint=self.checkpoint)
            if self.mode == "unrolled":
                return self._ended(y, x, solver.steps)
            # Held to no tolerance: that is what the user asked for.
            return dataclasses.replace(self._ended(y, x, solver.steps), rtol=float("inf"))
        unit = None if self.family is None else self.family.unit
        return Argmin(energy, solver, policy=self.policy).run(x, y0, loop, unit)

    def _ended(self, y: PyTree, x: Evidence, steps: int) -> Run:
        """Not a solution of anything: all that can be asked is that its ELBO is a number."""
        finite = jnp.isfinite(self._energy()(y, x))
        failure = RESULTS.steps_diverged if steps else RESULTS.nonfinite
        result = choose(finite, RESULTS.successful, failure)
        return Run(y, result, jnp.asarray(steps, jnp.int32))


class _Energy(eqx.Module):
    """What is minimised: a function of (parameters, evidence)."""

    elbo: Callable
    family: AbstractFamily | None = None
    rho: float | Float[Array, ""] | None = None

    def __call__(self, y: PyTree, x: Evidence) -> Float[Array, ""]:
        energy = -self.elbo(*_arguments(y, x))
        if self.rho is None:
            return energy
        distance = half_squared if self.family is None else self.family.distance
        return energy + jnp.asarray(self.rho, energy.dtype) * distance(y, x.start)


def _largest_rho(dtype) -> float:
    return 1e-2 / float(jnp.finfo(dtype).eps)


def _arguments(y: PyTree, x: Evidence) -> tuple:
    return (y, x.x) if x.key is None else (y, x.x, x.key)


def _is_key(key) -> bool:
    if not eqx.is_array(key):
        return False
    return (
        key.shape == () if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.dtype == jnp.uint32 and key.ndim == 1
    )


def _value(y, bound):
    energy, x = bound
    return energy(y, x)
