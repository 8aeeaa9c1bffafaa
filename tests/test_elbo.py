"""Semi-amortised inference: what each mode is the gradient of, against closed forms and finite differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree
from jaxtyping import TypeCheckError

import declarative as dn

from .helpers import exhaustive, tree_close
from .rows.core import EVIDENCE, linear_elbo

FAMILY = dn.DiagonalGaussian()
KEY = jr.key(3)


class Decoder(eqx.Module):
    """Gaussian observations around an MLP of z, unit variance."""

    mlp: eqx.nn.MLP

    def __call__(self, z, x):
        return -jnp.sum((x - self.mlp(z)) ** 2) / 2


DECODER = Decoder(eqx.nn.MLP(2, 3, 8, 1, jnp.tanh, key=jr.key(0)))
X = jnp.array([0.9, -0.4, 0.3])
START = dn.GaussianParameters(jnp.array([0.5, -1.0]), jnp.array([-0.3, 0.2]))


def losses(mode, decoder=DECODER, start=START, x=X, **options):
    elbo = dn.ELBO(decoder, FAMILY, samples=4)
    return dn.ELBOOptimizer(elbo, mode, **options)(x, start, key=KEY)


def gradients(mode, **options):
    """Of the loss, with respect to (decoder, start), each as a vector."""
    arrays, static = eqx.partition(DECODER, eqx.is_array)
    loss = lambda pair: losses(mode, eqx.combine(pair[0], static), pair[1], **options).loss
    return [ravel_pytree(part)[0] for part in jax.jit(jax.grad(loss))((arrays, START))]


def energy(parameters, decoder=DECODER):
    return -dn.ELBO(decoder, FAMILY, samples=4)(parameters, X, KEY)


def test_plain_implicit_differentiation_teaches_the_encoder_nothing():
    of_decoder, of_start = gradients("implicit")
    assert jnp.all(of_start == 0)
    assert jnp.linalg.norm(of_decoder) > 0.1
    # Not for want of a gradient through the solution, either.
    through = jax.grad(lambda start: -losses("implicit", start=start).elbo)(START)
    assert all(jnp.all(leaf == 0) for leaf in jtu.tree_leaves(through))


def test_unrolling_decays_towards_it_as_predicted():
    # In the linear model the mean's Hessian is constant: the Jacobian of K plain steps is (I - a H)^K.
    W, rate = EVIDENCE.x["W"], 0.05
    hessian = 2 * W.T @ W + jnp.eye(2)

    def mean(start_mean, steps):
        node = dn.ELBOOptimizer(linear_elbo, "unrolled", solver=dn.GradientSteps(steps, rate, momentum=0.0))
        return node(EVIDENCE.x, dn.GaussianParameters(start_mean, START.log_scale)).parameters.mean

    norms = []
    for steps in (1, 5, 20, 80):
        jacobian = jax.jacobian(mean)(START.mean, steps)
        tree_close(jacobian, jnp.linalg.matrix_power(jnp.eye(2) - rate * hessian, steps), 1e-12)
        norms.append(float(jnp.linalg.norm(jacobian, 2)))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-2


@pytest.mark.parametrize("checkpoint", [True, False])
def test_unrolled_is_the_derivative_of_the_steps(checkpoint):
    solver = dn.GradientSteps(7, 0.1, momentum=0.4, max_norm=0.6)
    arrays, static = eqx.partition(DECODER, eqx.is_array)

    def by_hand(pair):
        decoder, y = eqx.combine(pair[0], static), pair[1]
        v = jtu.tree_map(jnp.zeros_like, y)
        for _ in range(7):
            g = jax.grad(energy)(y, decoder)
            size = jnp.linalg.norm(ravel_pytree(g)[0])
            g = jtu.tree_map(lambda g, size=size: g * jnp.minimum(1, 0.6 / size), g)
            v = jtu.tree_map(lambda v, g: 0.4 * v + g, v, g)
            y = jtu.tree_map(lambda y, v: y - 0.1 * v, y, v)
        return energy(y, decoder)

    expected = [ravel_pytree(part)[0] for part in jax.jit(jax.grad(by_hand))((arrays, START))]
    tree_close(gradients("unrolled", solver=solver, checkpoint=checkpoint), expected, 1e-12)


def test_a_gradient_whose_square_overflows_is_shortened():
    steep = lambda y, x: 1e25 * jnp.sum(y)
    y = dn.GradientSteps(1, 0.5, momentum=0.0, max_norm=2.0).run(
        steep, jnp.zeros(4, jnp.float32), None, checkpoint=True
    )
    tree_close(y, jnp.full(4, -0.5), 1e-6)


def test_reversible_is_unrolled():
    solver = dn.GradientSteps(20, 0.1, momentum=0.5)
    a, b = losses("unrolled", solver=solver), losses("reversible", solver=solver)
    tree_close(a, b, 1e-12)
    tree_close(gradients("unrolled", solver=solver), gradients("reversible", solver=solver), 1e-11)


@pytest.mark.parametrize("mode", ["moreau", "proximal", *exhaustive("svi")])
@pytest.mark.parametrize("family", [FAMILY, pytest.param(None, marks=pytest.mark.full)], ids=["fisher", "euclidean"])
def test_gradients_are_those_of_the_stated_objective(mode, family):
    # Against central differences of a minimum that SciPy's BFGS finds.
    import scipy.optimize

    arrays, static = eqx.partition(DECODER, eqx.is_array)
    vector, unravel = ravel_pytree((arrays, START))
    rho = 0.8
    distance = FAMILY.distance if family else lambda a, b: jnp.sum((ravel_pytree(a)[0] - ravel_pytree(b)[0]) ** 2) / 2
    to_parameters = ravel_pytree(START)[1]

    def total(y, pair, rho):
        decoder, start = pair
        return energy(to_parameters(y), eqx.combine(decoder, static)) + rho * distance(to_parameters(y), start)

    value_and_grad, hessian = jax.jit(jax.value_and_grad(total)), jax.jit(jax.hessian(total))

    def stated(vector):
        pair, weight = unravel(vector), 0.0 if mode == "svi" else rho
        found = scipy.optimize.minimize(
            lambda y: tuple(map(np.asarray, value_and_grad(y, pair, weight))), ravel_pytree(pair[1])[0], jac=True,
            hess=lambda y: np.asarray(hessian(y, pair, weight)), method="trust-exact", options={"gtol": 1e-11},
        )  # fmt: skip
        return found.fun if mode != "proximal" else float(total(found.x, pair, 0.0))

    # `elbo` without a family, so that the distance is Euclidean.
    elbo = lambda decoder: lambda p, x, key: dn.ELBO(decoder, FAMILY, samples=4)(p, x, key)
    node = lambda decoder: dn.ELBOOptimizer(elbo(eqx.combine(decoder, static)), mode, rho=rho, family=family)
    loss = lambda pair: node(pair[0])(X, pair[1], key=KEY).loss
    ours = ravel_pytree(jax.jit(jax.grad(loss))(unravel(vector)))[0]
    for seed in range(4):
        direction = jr.normal(jr.key(seed), vector.shape)
        up, down = (stated(vector + sign * 1e-4 * direction) for sign in (1, -1))
        np.testing.assert_allclose(ours @ direction, (up - down) / 2e-4, rtol=1e-6, atol=1e-6)


def test_envelope_and_implicit_paths_agree():
    arrays, static = eqx.partition(DECODER, eqx.is_array)
    out = lambda arrays: losses("implicit", eqx.combine(arrays, static))
    envelope, implicit = (jax.grad(f)(arrays) for f in (lambda a: out(a).loss, lambda a: -out(a).elbo))
    tree_close(envelope, implicit, 1e-9)
    # And for the proximal problem, whose inner objective contains the distance.
    node = dn.ELBOOptimizer(linear_elbo, "moreau", rho=0.7)

    def total(start):
        found = node(EVIDENCE.x, start)
        squares = jtu.tree_map(lambda a, b: jnp.sum((a - b) ** 2) / 2, found.parameters, start)
        return -found.elbo + 0.7 * sum(jtu.tree_leaves(squares))

    tree_close(jax.grad(total)(START), jax.grad(lambda start: node(EVIDENCE.x, start).loss)(START), 1e-9)


def test_moreau_needs_no_linear_solve():
    node = dn.ELBOOptimizer(linear_elbo, "moreau", rho=0.7)

    def operations(part):
        cost = jax.jit(jax.grad(lambda s: part(node(EVIDENCE.x, s)))).lower(EVIDENCE.start).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert operations(lambda out: out.loss) < operations(lambda out: out.elbo)


@pytest.mark.slow
def test_learning_rho_kills_the_encoder():
    # The optimal value never decreases in rho, so gradient descent drives it to zero: its slope is the distance.
    def moreau(rho):
        return losses("moreau", rho=rho)

    for rho in (0.01, 0.3, 5.0):
        slope = jax.grad(lambda rho: moreau(rho).loss)(jnp.asarray(rho))
        np.testing.assert_allclose(slope, FAMILY.distance(moreau(rho).parameters, START), rtol=1e-8)
        assert slope > 0
    sizes = [float(jnp.linalg.norm(gradients("moreau", rho=rho)[1])) for rho in (1e-6, 1e-3, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1e-4


@pytest.mark.full
def test_both_ends_of_rho():
    near, far = losses("moreau", rho=1e6), losses("moreau", rho=1e-8)
    tree_close(near.parameters, START, 1e-5)
    tree_close(far.parameters, losses("svi").parameters, 1e-6)
    tree_close(gradients("moreau", rho=1e6), gradients("amortised"), 1e-4)
    tree_close(gradients("moreau", rho=1e-8), gradients("svi"), 1e-6)


@pytest.mark.parametrize("direction", ["forward", *exhaustive("reverse")])
def test_the_encoder_learns_from_the_divergence_alone(direction):
    found = losses("svi").parameters
    pair = (lambda a, b: (a, b)) if direction == "reverse" else (lambda a, b: (b, a))
    expected = jax.grad(lambda start: FAMILY.divergence(*pair(start, found)))(START)
    of_decoder, of_start = gradients("kl", direction=direction)
    tree_close(of_start, ravel_pytree(expected)[0], 1e-9)
    tree_close(of_decoder, gradients("svi")[0], 1e-12)
    out = losses("kl", direction=direction)
    tree_close(out.loss, -out.elbo + FAMILY.divergence(*pair(START, found)), 1e-9)


def test_a_full_covariance_is_exact_in_the_linear_model():
    W, family = EVIDENCE.x["W"], dn.FullGaussian()

    def log_likelihood(z, x):
        return -jnp.sum((x - W @ z) ** 2) - 1.5 * jnp.log(jnp.pi)

    def exact_elbo(parameters, x):
        factor = family.factor(parameters)
        misfit = jnp.sum((x - W @ parameters.mean) ** 2) + jnp.sum((W @ factor) ** 2)
        return -misfit - 1.5 * jnp.log(jnp.pi) - family.divergence(parameters, family.standard(parameters))

    start = dn.CholeskyParameters(jnp.zeros(2), jnp.zeros(3))
    out = dn.ELBOOptimizer(exact_elbo, "svi")(X, start)
    covariance = W @ W.T + jnp.eye(3) / 2
    evidence = jax.scipy.stats.multivariate_normal.logpdf(X, jnp.zeros(3), covariance)
    np.testing.assert_allclose(out.elbo, evidence, rtol=1e-10)
    posterior = jnp.linalg.inv(2 * W.T @ W + jnp.eye(2))
    factor = family.factor(out.parameters)
    tree_close(factor @ factor.T, posterior, 1e-8)
    # At the exact posterior every importance weight is p(x).
    weighed = dn.ELBO(log_likelihood, family).log_evidence(out.parameters, X, KEY, 5)
    np.testing.assert_allclose(weighed, evidence, rtol=1e-8)


def test_another_prior_with_and_without_a_closed_form():
    import numpyro.distributions as dist

    priors = dist.Normal(jnp.ones(2), 2.0).to_event(1), dist.Laplace(jnp.zeros(2), 1.0).to_event(1)
    for prior in priors:
        many = dn.ELBO(lambda z, x: jnp.zeros(()), FAMILY, prior, samples=100_000)
        value = -many(START, X, KEY)
        z = FAMILY.sample(START, jr.key(9), 100_000)
        with jax.numpy_rank_promotion("allow"):
            estimate = jnp.mean(jax.vmap(lambda z: FAMILY.log_prob(START, z))(z) - prior.log_prob(z))
        assert abs(value - estimate) < 0.02


@pytest.mark.parametrize(
    "mode", ["proximal", "moreau", *exhaustive("amortised", "svi", "unrolled", "reversible", "implicit", "kl")]
)
def test_batches_in_float32(mode):
    cast = lambda tree: jtu.tree_map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, tree
    )
    elbo = dn.ELBO(cast(DECODER), FAMILY, samples=4)
    node = dn.ELBOOptimizer(elbo, mode, throw=False)
    x = cast(jr.normal(jr.key(1), (5, 3))).at[2].set(jnp.nan)
    starts = cast(jtu.tree_map(lambda leaf: jnp.stack([leaf] * 5), START))
    keys = jr.split(KEY, 5)

    def loss(elbo, starts):
        node = dn.ELBOOptimizer(elbo, mode, throw=False)
        out = jax.vmap(lambda x, s, k: node(x, s, key=k))(x, starts, keys)
        return jnp.sum(jnp.where(jnp.arange(5) == 2, 0, out.loss)), out

    (total, out), of_starts = jax.jit(jax.value_and_grad(lambda s: loss(elbo, s), has_aux=True))(starts)
    assert total.dtype == out.loss.dtype == out.parameters.mean.dtype == jnp.float32
    good = jnp.array([0, 1, 3, 4])
    assert jnp.all(jnp.isnan(out.loss) == (jnp.arange(5) == 2))
    assert jnp.all(jnp.isfinite(of_starts.mean[good]))
    alone = node(x[3], jtu.tree_map(lambda leaf: leaf[3], starts), key=keys[3])
    tree_close(out.loss[3], alone.loss, 1e-5)


@pytest.mark.slow
def test_memory_of_the_gradient_in_inner_steps():
    def temporary(mode, steps):
        node = lambda decoder: dn.ELBOOptimizer(
            dn.ELBO(decoder, FAMILY, samples=4), mode, solver=dn.GradientSteps(steps, 0.01)
        )
        arrays, static = eqx.partition(DECODER, eqx.is_array)
        loss = lambda pair: node(eqx.combine(pair[0], static))(X, pair[1], key=KEY).loss
        analysis = jax.jit(jax.grad(loss)).lower((arrays, START)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    for mode, grows in (("moreau", False), ("proximal", False), ("unrolled", True)):
        few, many = temporary(mode, 10), temporary(mode, 1000)
        assert (many > 3 * few) if grows else (many <= 1.05 * few), mode


def test_an_answer_that_is_not_one_raises():
    with pytest.raises(dn.SolveError, match="ELBOOptimizer failed"):
        losses("moreau", solver=optx.NonlinearCG(1e-9, 1e-9), max_steps=2)
    with pytest.raises(dn.SolveError):
        losses("amortised", x=X.at[0].set(jnp.nan))
    unbounded = dn.ELBOOptimizer(lambda p, x: jnp.sum(p.mean**2), "svi", max_steps=50)
    with pytest.raises(dn.SolveError):
        unbounded(X, START)
    with pytest.raises(dn.SolveError):  # log of a negative number
        dn.ELBOOptimizer(lambda p, x: jnp.log(-1 - jnp.sum(p.mean**2)), "amortised")(X, START)
    # Diverging steps end in NaN, not in a number.
    with pytest.raises(dn.SolveError):
        losses("unrolled", solver=dn.GradientSteps(500, 1e3))


@pytest.mark.parametrize("mode", ["amortised", "moreau", *exhaustive("unrolled")])
def test_a_failed_lane_leaves_shared_weights_alone(mode):
    x = jnp.stack([X, X.at[0].set(jnp.inf), -X])
    starts = jtu.tree_map(lambda leaf: jnp.stack([leaf] * 3), START)
    arrays, static = eqx.partition(DECODER, eqx.is_array)

    def losses(arrays):
        elbo = dn.ELBO(eqx.combine(arrays, static), FAMILY, samples=4)
        node = dn.ELBOOptimizer(elbo, mode, throw=False, on_failure="zero")
        called = jax.vmap(lambda x, s: node(x, s, key=KEY).loss)(x, starts)
        solved = jax.vmap(lambda x, s: node.solve(dn.Evidence(x, s, KEY)))(x, starts)
        good = solved.result == dn.RESULTS.successful
        assert solved.objective is not None
        return called, jnp.where(good, solved.value.loss, 0), jnp.where(good, solved.objective, 0), good

    called, solved, _, good = jax.jit(losses)(arrays)
    assert jnp.all(good == jnp.array([True, False, True]))
    assert called[1] == 0
    tree_close(called, solved, 1e-12)
    for part in range(3):
        gradient = jax.jit(jax.grad(lambda arrays, part=part: jnp.sum(losses(arrays)[part])))(arrays)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(gradient))


@pytest.mark.parametrize("mode", ["implicit", "moreau", *exhaustive("amortised", "unrolled")])
def test_the_objective_of_a_solution_has_its_gradient(mode):
    solver = dn.GradientSteps(2, 0.05) if mode == "unrolled" else None
    node = dn.ELBOOptimizer(dn.ELBO(DECODER, FAMILY, samples=4), mode, solver=solver)
    objective = jax.grad(lambda start: node.solve(dn.Evidence(X, start, KEY)).objective)(START)
    tree_close(objective, jax.grad(lambda start: node(X, start, key=KEY).loss)(START), 1e-9)


def test_events_must_be_whole():
    # The mean over dimensions of what should be a sum is a number, and a wrong one.
    import numpyro.distributions as dist

    silent = lambda z, x: jnp.zeros(())
    for prior in (dist.Normal(jnp.zeros(2), 2.0), dist.Normal(0.0, 2.0)):
        with pytest.raises(ValueError, match=r"to_event"):
            dn.ELBO(silent, FAMILY, prior, samples=4)(START, X, KEY)
    with pytest.raises(ValueError, match="log_likelihood must return a scalar"):
        dn.ELBO(lambda z, x: -((x - z.sum()) ** 2), FAMILY)(START, X, KEY)


def test_solvers_of_every_kind_agree():
    found = losses("moreau").parameters
    for solver in (optx.BFGS(1e-9, 1e-9), optx.NonlinearCG(1e-9, 1e-9), dn.GradientSteps(3000, 0.05, momentum=0.9)):
        tree_close(losses("moreau", solver=solver, max_steps=5000).parameters, found, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "elbo"}, "mode must be one of"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"direction": "up"}, "direction must be"),
        ({"rho": np.float32(-1)}, "rho must be positive"),
        ({"rho": np.ones(2)}, "floating scalar array"),
        ({"mode": "kl"}, "needs the divergence of a family"),
        ({"mode": "unrolled", "solver": optx.BFGS(1e-6, 1e-6)}, "pass solver=GradientSteps"),
        ({"mode": "reversible", "solver": dn.GradientSteps(5, momentum=0.0)}, "momentum of at least 1/32"),
        ({"mode": "unrolled", "adjoint": dn.ImplicitAdjoint()}, "no use for ImplicitAdjoint"),
        ({"adjoint": dn.OneStepAdjoint()}, "no use for OneStepAdjoint"),
        ({"solver": optx.Newton(1e-6, 1e-6)}, "optimistix minimiser or GradientSteps"),
    ],
)
def test_misuse_is_named(options, message):
    # The suite checks annotations as well, and may be first.
    with pytest.raises((ValueError, TypeCheckError), match=f"{message}|parameter '{[*options][-1]}'"):
        dn.ELBOOptimizer(linear_elbo, **options)


def test_misuse_at_the_call_is_named():
    node = dn.ELBOOptimizer(linear_elbo)
    with pytest.raises(ValueError, match="start must be a pytree of floating arrays"):
        node(EVIDENCE.x, None)
    with pytest.raises(ValueError, match="Evidence"):
        node.solve(EVIDENCE.x)
    with pytest.raises(ValueError, match="must return a floating scalar"):
        dn.ELBOOptimizer(lambda p, x: p.mean)(X, START)
    for start, options, message in (
        (START, {}, "pass key="),
        (START, {"key": 0}, "key must be one PRNG key"),
        (START, {"key": jr.split(KEY)}, "key must be one PRNG key"),
        (
            eqx.tree_at(lambda s: s.mean, START, START.mean.astype(jnp.float32)),
            {"key": KEY},
            "start must have one dtype",
        ),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=f"{message}|parameter 'key'"):
            dn.ELBOOptimizer(dn.ELBO(DECODER, FAMILY))(X, start, **options)  # pyright: ignore[reportArgumentType]  (wrong on purpose)
    with pytest.raises(ValueError, match="leave the key away"):
        node(EVIDENCE.x, EVIDENCE.start, key=KEY)
    with pytest.raises(ValueError, match="no digits left"):
        dn.ELBOOptimizer(linear_elbo, rho=1e6)(*jax.tree.map(jnp.float32, (EVIDENCE.x, EVIDENCE.start)))
    with pytest.raises((ValueError, TypeCheckError), match="one shape|parameter 'log_scale'"):
        dn.GaussianParameters(jnp.zeros(2), jnp.zeros(()))
    for name, value in (("steps", 0), ("learning_rate", -1.0), ("momentum", 1.0), ("max_norm", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must"):
            dn.GradientSteps(**{name: value})  # pyright: ignore[reportArgumentType]  (wrong on purpose)
    for name, value in (("samples", 0), ("family", None), ("log_likelihood", 3)):
        with pytest.raises((ValueError, TypeCheckError), match=f"{name} must|parameter '{name}'"):
            dn.ELBO(**{"log_likelihood": DECODER, "family": FAMILY, name: value})
    with pytest.raises(ValueError, match="triangle must have"):
        dn.FullGaussian().factor(dn.CholeskyParameters(jnp.zeros(2), jnp.zeros(4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_collapsed_posterior_is_found(dtype):
    # All parameters of the optimum vanish: to many digits, which the rounding inside of the divergence forbids.
    start = dn.GaussianParameters(jnp.zeros(2, dtype), jnp.zeros(2, dtype))
    far = jtu.tree_map(lambda leaf: leaf + jnp.asarray(1e-3, dtype), start)
    x = jnp.array([0.3, -1.0, 0.7], dtype)

    @jax.jit
    @jax.vmap
    def solve(weight):
        decoder = weight * jnp.array([[1, 0.5], [-1, 1], [0.3, 0]], dtype)
        elbo = dn.ELBO(lambda z, x: -jnp.sum((x - decoder @ z) ** 2) / 2, dn.DiagonalGaussian(), samples=8)
        node = dn.ELBOOptimizer(elbo, "svi", throw=False)
        return [node.solve(dn.Evidence(x, start, jr.key(0))) for start in (start, far)]

    for solution in solve(jnp.array([0, 1e-20, 1e-14, 1e-9, 1e-6, 1e-4], dtype)):
        assert jnp.all(solution.result == dn.RESULTS.successful)
        np.testing.assert_allclose(solution.unknown.mean[:4], 0, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_many_latent_variables(dtype):
    # Too many for Newton steps with a dense Hessian after BFGS, which alone gives half the digits.
    d = 70
    W = jr.normal(jr.key(0), (2 * d, d), dtype) / jnp.sqrt(jnp.asarray(d, dtype))
    elbo = dn.ELBO(lambda z, x: -jnp.sum((x - W @ z) ** 2) / 2, dn.DiagonalGaussian(), samples=4)
    start = dn.GaussianParameters(jnp.zeros(d, dtype), jnp.zeros(d, dtype))
    node = dn.ELBOOptimizer(elbo, throw=False)
    x = jr.normal(jr.key(1), (4, 2 * d), dtype)
    solution = jax.jit(jax.vmap(lambda x: node.solve(dn.Evidence(x, start, jr.key(2)))))(x)
    assert jnp.all(solution.result == dn.RESULTS.successful)
    assert jnp.max(solution.stats["residual"]) < 100 * jnp.finfo(dtype).eps


def curved(parameters, x):
    spread = jnp.exp(2 * parameters.log_scale) / 2 * (1 + x) - parameters.log_scale
    return -jnp.sum(x * (parameters.mean - 2) ** 2 / 2 + spread)


def test_a_traced_rho_is_checked():
    start, x = (
        dn.GaussianParameters(jnp.array([0.5], jnp.float32), jnp.zeros(1, jnp.float32)),
        jnp.array([3.0], jnp.float32),
    )

    @jax.jit
    @jax.vmap
    def solve(rho):
        nodes = [
            dn.ELBOOptimizer(curved, mode, rho=rho, family=dn.DiagonalGaussian(), throw=False)
            for mode in ("moreau", "proximal")
        ]
        gradient = jax.grad(lambda start: nodes[0](x, start).loss)(start).mean
        return gradient[0], [node.solve(dn.Evidence(x, start)).result for node in nodes]

    rho = jnp.array([1e-3, 1.0, 1e4, 1e6, 1e10, 0.0, -1.0, jnp.nan], jnp.float32)
    gradient, (moreau, proximal) = solve(rho)
    np.testing.assert_allclose(gradient[:3], -4.5 * rho[:3] / (3 + rho[:3]), rtol=2e-3)
    assert jnp.all(jnp.isnan(gradient[3:]))
    bad = lambda result: np.asarray(result == dn.RESULTS.bad_rho)
    np.testing.assert_array_equal(bad(moreau)[3:7], True)
    np.testing.assert_array_equal(bad(proximal)[[0, 1, 2, 3, 5, 6]], [False, False, False, False, True, True])
    with pytest.raises(ValueError, match="rho"):
        dn.ELBOOptimizer(curved, rho=jnp.float32(1e6))(x, start)
    with pytest.raises((ValueError, TypeCheckError), match="rho"):
        dn.ELBOOptimizer(curved, rho=None)  # pyright: ignore[reportArgumentType]  (wrong on purpose)


def test_guesses_priors_and_families_that_do_not_fit_are_named():
    dist = pytest.importorskip("numpyro.distributions")
    x = jnp.array([1.0, 2.0, 3.0])
    start = dn.GaussianParameters(x, jnp.zeros(3))
    for y0 in (dn.GaussianParameters(jnp.zeros(1), jnp.zeros(1)), {"mean": x}):
        with pytest.raises(ValueError, match="y0 must have"):
            dn.ELBOOptimizer(curved, "svi").solve(dn.Evidence(x, start), y0=y0)
    likelihood = lambda z, x: -jnp.sum((x - z) ** 2)
    for prior in (dist.Normal(jnp.zeros(1), 1.0).to_event(1), dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2)):
        elbo = dn.ELBO(likelihood, dn.DiagonalGaussian(), prior)
        with pytest.raises(ValueError, match="events of shape"):
            elbo(start, x, jr.key(0))
        with pytest.raises(ValueError, match="events of shape"):
            elbo.log_evidence(start, x, jr.key(0), 5)
    with pytest.raises(ValueError, match="samples"):
        dn.ELBO(likelihood, dn.DiagonalGaussian()).log_evidence(start, x, jr.key(0), 0)
    with pytest.raises((ValueError, TypeCheckError), match="CholeskyParameters"):
        dn.ELBO(likelihood, dn.FullGaussian())(start, x, jr.key(0))
    with pytest.raises((ValueError, TypeCheckError), match="family"):
        dn.ELBOOptimizer(curved, family=3)  # pyright: ignore[reportArgumentType]  (wrong on purpose)

    class Laplace(dn.AbstractFamily):
        def distribution(self, parameters):
            return dist.Laplace(parameters.mean, jnp.exp(parameters.log_scale)).to_event(1)

        def standard(self, parameters):
            return jtu.tree_map(jnp.zeros_like, parameters)

    with pytest.raises(ValueError, match="define `divergence"):
        dn.ELBOOptimizer(dn.ELBO(likelihood, Laplace()), "kl")(x, start, key=jr.key(0))


def test_a_foreign_adjoint_knows_the_unit():
    decoder = jnp.full((3, 2), 1e-9)
    elbo = dn.ELBO(lambda z, x: -jnp.sum((x - decoder @ z) ** 2) / 2, dn.DiagonalGaussian(), samples=8)
    node = dn.ELBOOptimizer(elbo, "svi", adjoint=optx.ImplicitAdjoint(), throw=False)
    start = dn.GaussianParameters(jnp.zeros(2), jnp.zeros(2))
    assert node.solve(dn.Evidence(jnp.array([0.3, -1.0, 0.7]), start, jr.key(0))).result == dn.RESULTS.successful


@pytest.mark.parametrize("mode", ["moreau", "proximal", "unrolled", "reversible"])
def test_steps_that_diverge_say_so(mode):
    # An objective of the fourth degree, so that too long a step runs off within a few.
    elbo = lambda parameters, x: -jnp.sum((parameters.mean - x) ** 4 + parameters.log_scale**2)
    node = dn.ELBOOptimizer(elbo, mode, solver=dn.GradientSteps(30, 10.0, 0.5), throw=False)
    start = dn.GaussianParameters(jnp.ones(1), jnp.zeros(1))
    solution = node.solve(dn.Evidence(jnp.zeros(1), start))
    assert solution.result == dn.RESULTS.steps_diverged
    assert "learning_rate" in solution.report()
