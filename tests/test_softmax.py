"""The report's worked example: closed form, generic route and published Jacobian agree, and its errata are errata."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import declarative as dn
from declarative.testing.check import replace

THETA = jnp.array([0.31, -1.2, 0.93, 0.12])


@pytest.mark.parametrize(
    "temperature",
    [1.0, pytest.param(0.4, marks=pytest.mark.full), pytest.param(jnp.array(2.5), marks=pytest.mark.full)],
    ids=str,
)
def test_three_routes_agree(temperature):
    routes = [
        dn.Softmax(temperature),
        dn.Softmax(temperature, adjoint=dn.ImplicitAdjoint()),
        dn.Softmax(temperature, adjoint=dn.ImplicitAdjoint(lx.LU())),
        dn.Softmax(temperature, adjoint=dn.UnrolledAdjoint(), max_steps=60),
    ]
    x = np.asarray(jax.nn.softmax(THETA / temperature))
    want = (np.diag(x) - np.outer(x, x)) / float(temperature)
    for node in routes:
        np.testing.assert_allclose(np.asarray(node(THETA)), x, atol=1e-13)
        for jacobian in (jax.jacfwd(node), jax.jacrev(node)):
            np.testing.assert_allclose(np.asarray(jacobian(THETA)), want, atol=1e-12)
    hessians = [np.asarray(jax.hessian(lambda z, node=node: node(z) @ jnp.arange(4.0))(THETA)) for node in routes]
    for hessian in hessians[1:]:
        np.testing.assert_allclose(hessian, hessians[0], atol=1e-12)


def test_dual_satisfies_the_stationarity_condition_in_its_logarithmic_form():
    solution = dn.Softmax(0.7).solve(THETA)
    x, u = solution.value, solution.dual
    np.testing.assert_allclose(np.asarray(THETA - 0.7 * (jnp.log(x) + 1) + u), 0, atol=1e-13)
    np.testing.assert_allclose(
        float(jnp.asarray(solution.objective)), 0.7 * float(jax.nn.logsumexp(THETA / 0.7)), rtol=1e-13
    )
    np.testing.assert_allclose(
        np.asarray(jax.grad(lambda t: dn.Softmax(0.7).solve(t).objective)(THETA)), np.asarray(x), atol=1e-13
    )


def test_erratum_one_the_published_feasibility_row_is_singular():
    """At logsumexp(theta) = 1 the multiplier vanishes and so does the determinant of the report's Jacobian; ours is -1."""
    theta = THETA - jax.nn.logsumexp(THETA) + 1
    solution = dn.Softmax().solve(theta)
    x, u = np.asarray(solution.value), float(solution.dual)
    assert abs(u) < 1e-14
    published = np.block([[np.diag(1 / x), -np.ones((4, 1))], [u * np.ones((1, 4)), np.array([[x.sum() - 1]])]])
    corrected = np.block([[np.diag(1 / x), -np.ones((4, 1))], [np.ones((1, 4)), np.zeros((1, 1))]])
    assert abs(np.linalg.det(published)) < 1e-10
    assert abs(np.linalg.det(corrected)) > 1
    node = dn.Softmax(adjoint=dn.ImplicitAdjoint())
    np.testing.assert_allclose(np.asarray(jax.jacrev(node)(theta)), np.diag(x) - np.outer(x, x), atol=1e-13)
    assert dn.conditions(node, node.solve(theta), theta).holds() == (True, True, True)


def test_erratum_two_the_multiplier_can_be_negative():
    assert float(dn.Softmax().solve(THETA + 5).dual) < 0 < float(dn.Softmax().solve(THETA - 5).dual)


def test_learnable_temperature():
    def loss(temperature):
        return dn.Softmax(temperature)(THETA) @ jnp.arange(4.0)

    h, t = 1e-6, jnp.array(0.8)
    np.testing.assert_allclose(float(jax.grad(loss)(t)), float(loss(t + h) - loss(t - h)) / (2 * h), rtol=1e-8)
    with pytest.raises(dn.SolveError, match="outside the node's domain"):
        dn.Softmax(jnp.array(-1.0))(THETA)
    with pytest.raises(ValueError, match="temperature"):
        dn.Softmax(0.0)


NODES: list[Any] = [dn.Softmax(), dn.Sparsemax(), dn.Entmax(1.5), dn.Entmax(jnp.array(1.7)), dn.Entmax(3.0)]
NAMES = ["softmax", "sparsemax", "entmax15", "entmax-array", "entmax3"]


# The implicit rule of every one of them, at every point of the conventions, compiles for a minute: two here.
RULES = [
    pytest.param(
        node, implicit, id=f"{name}-{rule}", marks=[pytest.mark.full] * (implicit and name.startswith("entmax"))
    )
    for node, name in zip(NODES, NAMES, strict=True)
    for implicit, rule in ((False, "closed-form"), (True, "implicit"))
]


@pytest.mark.parametrize(("node", "implicit"), RULES)
def test_conventions_of_masks_and_infinities(node: Any, implicit: bool):
    if implicit:
        node = replace(node, adjoint=dn.ImplicitAdjoint())
    mask = jnp.array([True, False, True, True])
    kept = node(THETA[np.array([0, 2, 3])])
    out, jacobian = node(THETA, mask=mask), jax.jacrev(lambda z: node(z, mask=mask))(THETA)
    np.testing.assert_allclose(np.asarray(out)[[0, 2, 3]], np.asarray(kept), atol=1e-14)
    assert out[1] == 0
    assert np.all(np.asarray(jacobian)[1] == 0)
    assert np.all(np.asarray(jacobian)[:, 1] == 0)
    np.testing.assert_allclose(np.asarray(node(jnp.where(mask, THETA, -jnp.inf))), np.asarray(out), atol=1e-15)
    # What is masked out may be anything.
    padded = jnp.where(mask, THETA, jnp.nan)
    np.testing.assert_array_equal(np.asarray(node(padded, mask=mask)), np.asarray(out))
    np.testing.assert_array_equal(np.asarray(jax.jacrev(lambda z: node(z, mask=mask))(padded)), np.asarray(jacobian))
    empty = lambda z: node(z, mask=jnp.zeros(4, bool))
    two = lambda z: node(z.at[np.array([1, 3])].set(jnp.inf))
    derivatives = lambda call: (
        lambda z: (
            call(z),
            jax.jacrev(call)(z),
            jax.jacfwd(call)(z),
            jax.hessian(lambda z: call(z) @ jnp.arange(4.0))(z),
        )
    )
    for call, want in ((empty, np.zeros(4)), (two, np.array([0, 0.5, 0, 0.5]))):
        got, *slopes = jax.jit(derivatives(call))(THETA)
        np.testing.assert_allclose(np.asarray(got), want, atol=1e-15)
        for slope in slopes:
            assert np.all(np.asarray(slope) == 0)
    assert node(jnp.array([3.0])) == 1
    tied = node(jnp.array([0.2, 0.2, 0.2]))
    np.testing.assert_allclose(np.asarray(tied), 1 / 3, atol=1e-15)
    for scale in (1e-8, 1e8, 1e30):
        assert abs(float(jnp.sum(node(THETA * scale))) - 1) < 1e-12


@pytest.mark.parametrize("node", NODES, ids=NAMES)
def test_half_precision_has_no_nan(node):
    z = jnp.array([[1e4, -1e4, 0.0, 3e4], [0.1, 0.2, -0.3, jnp.inf], [0.0, 0.0, 0.0, 0.0]], jnp.bfloat16)
    value, gradient = jax.vmap(jax.value_and_grad(lambda z: jnp.sum(node(z) * jnp.arange(4).astype(jnp.bfloat16))))(z)
    assert value.dtype == gradient.dtype == jnp.bfloat16
    for out in (value, gradient):
        assert np.all(np.isfinite(np.asarray(out, np.float32)))


def test_misuse_is_named():
    for node in NODES:
        with pytest.raises(ValueError, match="use `jax.vmap`"):
            node.solve(THETA[None])
        with pytest.raises((ValueError, TypeCheckError), match="mask"):
            node(THETA, mask=jnp.ones(4))
        with pytest.raises(ValueError, match="floating"):
            node.solve(jnp.arange(3))
    for alpha in (1.0, 0.5, 4.5, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            dn.Entmax(alpha)
    with pytest.raises(dn.SolveError, match="outside the node's domain"):
        dn.Entmax(jnp.array(0.5))(THETA)
    with pytest.raises(ValueError, match="alpha <= 2"):
        dn.Entmax(3.0, adjoint=dn.UnrolledAdjoint())(THETA)


def test_on_a_kink_the_convention_holds():
    """A score on the threshold has no part in the support: s_i = 0."""
    z = jnp.array([1.0, 0.0, -3.0])
    for node in (dn.Sparsemax(), dn.Sparsemax(adjoint=dn.ImplicitAdjoint())):
        np.testing.assert_allclose(np.asarray(jax.jacrev(node)(z)), 0, atol=1e-15)
