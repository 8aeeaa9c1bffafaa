"""The implicit function theorem as wired in the core: orders, modes, inputs of every kind."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import TypeCheckError

import declarative as dn
from declarative._core.arguments import integer, number
from declarative._nodes.generic.root import check_solver

from .helpers import tree_close
from .rows.core import BIAS, WEIGHT, contraction

Y0 = jnp.zeros(4)


def unrolled(weight, bias):
    return jax.lax.scan(lambda y, _: (jnp.tanh(weight @ y + bias), None), Y0, None, length=150)[0]


def loss_of(solve):
    return lambda weight, bias: jnp.sum(jnp.sin(solve(weight, bias)) * jnp.arange(1.0, 5.0))


def node_solve(node):
    return lambda weight, bias: node((weight, bias), y0=Y0)


@pytest.fixture(scope="module")
def exact():
    f = loss_of(unrolled)
    return {
        "grad": jax.jit(jax.grad(f, (0, 1)))(WEIGHT, BIAS),
        "hessian": jax.jit(jax.hessian(f, 1))(WEIGHT, BIAS),
        "third": jax.jit(jax.jacfwd(jax.hessian(f, 1), 1))(WEIGHT, BIAS),
    }


@pytest.mark.parametrize(
    "adjoint",
    [
        None,
        pytest.param(dn.ImplicitAdjoint(lx.GMRES(rtol=1e-12, atol=1e-12)), marks=pytest.mark.full),
        dn.NeumannAdjoint(80),
        dn.UnrolledAdjoint(),
        pytest.param(optx.ImplicitAdjoint(), marks=pytest.mark.full),
    ],
    ids=lambda a: type(a).__name__,
)
def test_every_mode_and_order_against_unrolling(adjoint, exact):
    f = loss_of(node_solve(dn.FixedPoint(contraction, adjoint=adjoint, max_steps=300)))
    tree_close(jax.jit(jax.grad(f, (0, 1)))(WEIGHT, BIAS), exact["grad"], 1e-9)
    tree_close(jax.jit(jax.jacfwd(f, (0, 1)))(WEIGHT, BIAS), exact["grad"], 1e-9)
    # The derivatives of the iterates converge behind the iterates, by a factor of about the number of steps each order.
    loose = 1e-7 if isinstance(adjoint, dn.UnrolledAdjoint) else 1e-9
    tree_close(jax.jit(jax.hessian(f, 1))(WEIGHT, BIAS), exact["hessian"], loose)
    if not isinstance(adjoint, optx.ImplicitAdjoint):
        tree_close(jax.jit(jax.jacrev(jax.jacrev(f, 1), 1))(WEIGHT, BIAS), exact["hessian"], loose)


def test_third_order(exact):
    f = loss_of(node_solve(dn.FixedPoint(contraction)))
    got = jax.jit(jax.jacfwd(jax.jacrev(jax.jacrev(f, 1), 1), 1))(WEIGHT, BIAS)
    tree_close(got, exact["third"], 1e-8)


def test_biased_adjoints_are_their_series():
    """One-step is the zeroth Neumann term; k terms leave an error of the contraction factor to the k + 1."""
    gradient = lambda adjoint: jax.grad(loss_of(node_solve(dn.FixedPoint(contraction, adjoint=adjoint))), 1)(
        WEIGHT, BIAS
    )
    y = unrolled(WEIGHT, BIAS)
    weights = jnp.cos(y) * jnp.arange(1.0, 5.0)
    slope = 1 - jnp.tanh(WEIGHT @ y + BIAS) ** 2
    tree_close(gradient(dn.OneStepAdjoint()), slope * weights, 1e-10)
    tree_close(gradient(dn.NeumannAdjoint(0)), gradient(dn.OneStepAdjoint()), 1e-14)
    jacobian = slope[:, None] * WEIGHT
    term, total = weights, weights
    for _ in range(3):
        term = jacobian.T @ term
        total = total + term
    tree_close(gradient(dn.NeumannAdjoint(3)), slope * total, 1e-10)


def test_checkpointed_is_reverse_mode_and_says_so():
    adjoint = optx.RecursiveCheckpointAdjoint()
    assert dn.modes(adjoint) == {"reverse"}
    f = loss_of(node_solve(dn.FixedPoint(contraction, adjoint=adjoint, max_steps=200)))
    tree_close(jax.grad(f, 1)(WEIGHT, BIAS), jax.grad(loss_of(unrolled), 1)(WEIGHT, BIAS), 1e-9)
    with pytest.raises(Exception, match="(?i)forward-mode"):
        jax.jvp(lambda b: f(WEIGHT, b), (BIAS,), (BIAS,))


def test_adjoints_that_need_a_contraction_raise_at_construction():
    for adjoint in (dn.OneStepAdjoint(), dn.NeumannAdjoint(2)):
        with pytest.raises(ValueError, match="needs a contraction"):
            dn.Root(lambda y, x: y - x, adjoint=adjoint)
        with pytest.raises(ValueError, match="step_size"):
            dn.Argmin(lambda y, x: (y - x) ** 2, adjoint=adjoint)
    with pytest.raises(ValueError, match="terms"):
        dn.NeumannAdjoint(-1)
    with pytest.raises(ValueError, match="damping"):
        dn.ImplicitAdjoint(damping=-1.0)


def test_argmin_with_a_step_size_takes_the_neumann_adjoint():
    objective = lambda y, x: jnp.sum((y - x) ** 2) + 0.1 * jnp.sum(y**4)
    make = lambda adjoint: jax.jacrev(
        lambda x: dn.Argmin(objective, adjoint=adjoint, step_size=0.3)(x, y0=jnp.zeros(3))
    )(jnp.array([0.3, -1.0, 2.0]))
    tree_close(make(dn.NeumannAdjoint(80)), make(None), 1e-9)


def test_adjoints_in_a_plain_optimistix_solve():
    fn = lambda y, x: jnp.tanh(WEIGHT @ y + x)

    def solve(adjoint):
        def loss(bias):
            out = optx.fixed_point(fn, optx.FixedPointIteration(1e-13, 1e-13), Y0, bias, max_steps=200, adjoint=adjoint)
            return jnp.sum(jnp.sin(out.value))

        return jax.grad(loss)(BIAS), jax.hessian(loss)(BIAS)

    want = solve(optx.ImplicitAdjoint())
    for adjoint in (dn.ImplicitAdjoint(), dn.NeumannAdjoint(90), dn.UnrolledAdjoint()):
        tree_close(solve(adjoint), want, 1e-9)
    root = lambda x: (
        optx.root_find(
            lambda y, x: y**3 - x, optx.Newton(1e-12, 1e-12), jnp.ones(()), x, adjoint=dn.ImplicitAdjoint()
        ).value
    )
    tree_close(jax.grad(root)(jnp.array(8.0)), jnp.array(1 / 12), 1e-9)


def test_closed_over_arrays_and_modules_get_their_gradients():
    def by_argument(weight):
        return jnp.sum(dn.FixedPoint(contraction)((weight, BIAS), y0=Y0) ** 2)

    def by_closure(weight):
        return jnp.sum(dn.FixedPoint(lambda y, x: jnp.tanh(weight @ y + x))(BIAS, y0=Y0) ** 2)

    class Layer(eqx.Module):
        weight: jax.Array

        def __call__(self, y, x):
            return jnp.tanh(self.weight @ y + x)

    def by_module(weight):
        return jnp.sum(dn.FixedPoint(Layer(weight))(BIAS, y0=Y0) ** 2)

    want = jax.grad(by_argument)(WEIGHT), jax.jacfwd(jax.grad(by_argument))(WEIGHT)
    for f in (by_closure, by_module):
        tree_close((jax.grad(f)(WEIGHT), jax.jacfwd(jax.grad(f))(WEIGHT)), want, 1e-10)
    weights = jnp.stack([WEIGHT, 0.5 * WEIGHT])
    tree_close(jax.vmap(jax.grad(by_closure))(weights)[1], jax.grad(by_argument)(0.5 * WEIGHT), 1e-10)


def test_a_module_inside_a_model_trains():
    """A node as a field: its own leaves are parameters like any others."""
    node = dn.FixedPoint(_Cell(jr.key(3)))
    model, x = (node,), jr.normal(jr.key(4), (5, 4))
    loss = lambda model: jnp.mean(jax.vmap(lambda x: model[0](x, y0=Y0))(x) ** 2)
    first = loss(model)
    for _ in range(2):
        grads = eqx.filter_grad(loss)(model)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
    assert loss(model) < first


class _Cell(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.linear = eqx.nn.Linear(8, 4, key=key)

    def __call__(self, y, x):
        return 0.5 * jnp.tanh(self.linear(jnp.concatenate([y, x])))


def test_user_functions_are_traced_once_and_never_again():
    count = 0

    def fn(y, x):
        nonlocal count
        count += 1
        return jnp.tanh(WEIGHT @ y + x)

    node = dn.FixedPoint(fn)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(node(x, y0=Y0))))
    gradient(BIAS)
    assert count == 1
    gradient(2 * BIAS)
    assert count == 1


def test_a_changed_python_number_in_a_closure_is_seen():
    scale = 1.0
    node = dn.Root(lambda y, x: y - scale * x)
    assert node(jnp.array(3.0), y0=0.0) == 3
    scale = 2.0
    assert node(jnp.array(3.0), y0=0.0) == 6


def test_the_guess_gets_no_gradient_unless_unrolled():
    fn = lambda y, x: 0.5 * y + x
    gradient = lambda adjoint: jax.grad(lambda y0: dn.FixedPoint(fn, adjoint=adjoint, max_steps=60)(1.0, y0=y0))(5.0)
    assert gradient(None) == 0
    assert 0 < gradient(dn.UnrolledAdjoint()) < 1e-10


def test_mixed_pytree_with_integers_keys_and_none():
    x = {"a": jnp.array([1.0, 2.0]), "n": jnp.array(3), "key": jr.key(0), "none": None}

    def fn(y, x):
        noise = jr.normal(x["key"], (2,))
        return y**3 + y - x["a"] * x["n"].astype(y.dtype) - noise

    node = dn.Root(fn)
    f = lambda a: jnp.sum(node({**x, "a": a}, y0=jnp.zeros(2)))
    y = node(x, y0=jnp.zeros(2))
    tree_close(jax.grad(f)(x["a"]), 3 / (3 * y**2 + 1), 1e-10)


def test_unperturbed_leaves_under_reverse_over_reverse():
    """A pytree right-hand side of `custom_linear_solve` dies when one leaf is unperturbed: unknowns are raveled for it."""
    fn = lambda y, x: {"u": y["u"] - x["a"] ** 2, "v": y["v"] - x["b"]}
    node = dn.Root(fn)
    f = lambda a: node({"a": a, "b": 1.0}, y0={"u": 0.0, "v": 0.0})["u"]
    assert jnp.allclose(jax.grad(jax.grad(f))(3.0), 2.0)


def test_bisection_of_a_bracket():
    bracket = {"lower": 0, "upper": 2.0}
    node = dn.Root(lambda y, x: y**3 - x, optx.Bisection(1e-12, 1e-12), options=bracket)
    value, slope = jax.value_and_grad(lambda x: node(x, y0=0.5))(1.2)
    np.testing.assert_allclose((value, slope), (1.2 ** (1 / 3), 1.2 ** (-2 / 3) / 3), rtol=1e-10)
    with pytest.raises(ValueError, match="needs its bracket"):
        dn.Root(lambda y, x: y**3 - x, optx.Bisection(1e-5, 1e-5))


def test_implicit_decorator():
    offset = jnp.array(0.3)

    def build(offset):
        @dn.implicit(lambda w, a, b: a.T @ (a @ w - b) + offset * w)
        def ridge(a, b):
            gram = a.T @ a + offset * jnp.eye(a.shape[1])
            return jax.lax.stop_gradient(jnp.linalg.solve(gram, a.T @ b))

        return ridge

    direct = lambda a, b, offset: jnp.linalg.solve(a.T @ a + offset * jnp.eye(3), a.T @ b)
    a, b = jr.normal(jr.key(0), (5, 3)), jr.normal(jr.key(1), (5,))
    tree_close(jax.jacrev(build(offset), (0, 1))(a, b), jax.jacrev(direct, (0, 1))(a, b, offset), 1e-11)
    tree_close(jax.jacfwd(lambda o: build(o)(a, b))(offset), jax.jacfwd(direct, 2)(a, b, offset), 1e-11)
    assert "successful" in build(offset).solve(a, b).report()
    double = dn.implicit(lambda y, x: y - 2 * x, throw=False)(lambda x: 2 * x)
    assert double.solve(jnp.ones(1)).value.shape == (1,)
    for data in ((a, b), ((a, b),)):
        assert "applies" in dn.conditions(build(offset), build(offset).solve(a, b), *data).verdict()
    with pytest.raises(ValueError, match="the tuple of its arguments"):
        dn.conditions(double, double.solve(jnp.ones(1)), jnp.ones(1))
    with pytest.raises(ValueError, match="differentiates a node's own iterations"):
        dn.implicit(lambda y, x: y - x, adjoint=dn.UnrolledAdjoint())


def test_a_wrong_solver_is_caught():
    """The core believes the optimality function, not the algorithm."""
    wrong = dn.implicit(lambda y, x: y**2 - x)(lambda x: jnp.sqrt(x) + 1e-3)
    with pytest.raises(dn.SolveError, match="residual is too large"):
        wrong(4.0)


class Spd(dn.AbstractDeclarativeNode):
    """Solves a positive definite system by Cholesky, and leaves the factor for the gradient."""

    adjoint: optx.AbstractAdjoint | None = None
    policy: dn.Policy = dn.Policy(throw=False)
    reuse: bool = eqx.field(static=True, default=True)

    def optimality(self, y, x):
        matrix, b = x
        return matrix @ y - b

    def run(self, x, y0, loop):
        matrix, b = x
        operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
        state = lx.Cholesky().init(operator, {})
        return dn.Run(lx.linear_solve(operator, b, lx.Cholesky(), state=state).value, factor=state)

    def linear_system(self, y, x, factor):
        operator = lx.MatrixLinearOperator(x[0], lx.positive_semidefinite_tag)
        return dn.LinearSystem(operator, lx.Cholesky(), factor if self.reuse else None)


def test_the_factor_of_the_forward_solve_is_reused():
    root = jr.normal(jr.key(0), (5, 5))
    x = (root @ root.T + jnp.eye(5), jr.normal(jr.key(1), (5,)))
    f = lambda node: lambda x: jnp.sum(node(x) ** 2)
    want = jax.grad(lambda x: jnp.sum(jnp.linalg.solve(*x) ** 2))(x)
    text = {}
    for reuse in (True, False):
        gradient = jax.jit(jax.grad(f(Spd(reuse=reuse))))
        tree_close(gradient(x), want, 1e-10)
        # Before XLA, which would merge the two on CPU: what is asked for is what matters where it cannot.
        text[reuse] = str(jax.make_jaxpr(gradient)(x)).count("cholesky")
    assert 0 < text[True] < text[False]
    hessian = jax.hessian(lambda b: f(Spd())((x[0], b)))(x[1])
    tree_close(hessian, jax.hessian(lambda b: jnp.sum(jnp.linalg.solve(x[0], b) ** 2))(x[1]), 1e-10)


def test_many_right_hand_sides_factor_once():
    """jacfwd pushes every tangent through one factorisation: the matrix is not batched with the right-hand sides."""
    x = (jnp.eye(6) * 2 + 0.1, jnp.arange(6.0))
    node = dn.implicit(lambda y, a, b: a @ y - b)(jnp.linalg.solve)
    text = str(jax.make_jaxpr(jax.jacfwd(lambda b: node(x[0], b)))(x[1]))
    assert "f64[6,6,6]" not in text


def test_damping_solves_the_regularised_system():
    a = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    node = dn.implicit(lambda y, b: a @ y - a @ b, adjoint=dn.ImplicitAdjoint(damping=1e-3))(lambda b: b)
    minimum_norm = jnp.linalg.pinv(a) @ a
    tree_close(jax.jacrev(node)(jnp.array([1.0, 2.0])), minimum_norm, 1e-5)
    tree_close(jax.jacfwd(node)(jnp.array([1.0, 2.0])), minimum_norm, 1e-5)


def test_envelope_gradient_needs_no_linear_solve_and_differentiates_again():
    node = dn.Argmin(lambda y, x: jnp.sum((y - x) ** 2) + jnp.sum(jnp.cosh(y)))
    optimum = lambda x: node.solve(x, y0=jnp.zeros(3)).objective
    x = jnp.array([0.3, -1.0, 2.0])
    y = node(x, y0=jnp.zeros(3))
    tree_close(jax.grad(optimum)(x), 2 * (x - y), 1e-10)
    tree_close(jax.hessian(optimum)(x), jnp.diag(2 - 4 / (2 + jnp.cosh(y))), 1e-9)
    _, _, health = dn.value_and_grad_with_health(optimum, per_element=False)(x)
    assert health.solves == 0


def test_argmin_flags_a_maximum():
    node = dn.Argmin(lambda y, x: -(y**2) * x, throw=False)
    assert node.solve(jnp.array(1.0), y0=jnp.array(0.0)).result == dn.RESULTS.indefinite


def test_solve_takes_the_arguments_of_a_call():
    z, keep = jnp.array([0.3, -0.2, 1.0, 0.4]), jnp.array([True, False, True, True])
    weights, X = jnp.array([1.0, 2.0, 0.5, 1.0]), jnp.eye(4)
    calls: list[Any] = [
        (dn.Softmax(), (z,), {"mask": keep}),
        (dn.Sparsemax(), (z,), {"mask": keep}),
        (dn.Entmax(1.5), (z,), {"mask": keep}),
        (dn.Projection(dn.Simplex()), (z, keep), {}),
        (dn.Lasso(), (X, z, 0.1), {}),
        (dn.TotalVariation(), (z, 0.2), {}),
        (dn.Isotonic(), (z, weights), {}),
        (dn.RobustPool("huber", 0.5), (z, weights), {"mask": keep}),
        (dn.NeuralODE(lambda t, y, k: -k * y, steps=3), (z, jnp.array(2.0)), {"ts": jnp.array([0.5, 1.0])}),
    ]
    for node, args, named in calls:
        np.testing.assert_array_equal(node.solve(*args, **named).value, node(*args, **named), err_msg=repr(node))
    with pytest.raises(TypeError, match="musk"):
        dn.Softmax().solve(z, musk=keep)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="y0"):
        dn.Root(lambda y, x: y - x)(jnp.array(1.0))
    with pytest.raises(ValueError, match="complex"):
        dn.Root(lambda y, x: y - x)(jnp.array(1.0 + 1j), y0=1.0)
    with pytest.raises(ValueError, match="below the spacing of float64"):
        dn.FixedPoint(contraction, optx.FixedPointIteration(1e-17, 1e-17))((WEIGHT, BIAS), y0=Y0)
    with pytest.raises(ValueError, match="shape of the unknown"):
        dn.Root(lambda y, x: jnp.sum(y) - x, solver=optx.LevenbergMarquardt(1e-8, 1e-8))(1.0, y0=jnp.zeros(2))
    with pytest.raises((ValueError, TypeCheckError), match="solver"):
        dn.FixedPoint(lambda y, x: y, dn.Anderson)  # pyright: ignore[reportArgumentType]  (what is tested)
    with pytest.raises((ValueError, TypeCheckError), match="on_failure"):
        dn.Policy(on_failure="ignore")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="for throw=False"):
        dn.Root(lambda y, x: y - x, on_failure="zero")
    with pytest.raises(ValueError, match="max_steps"):
        dn.Policy(max_steps=0)
    with pytest.raises(ValueError, match="scalar"):
        dn.Argmin(lambda y, x: y - x)(jnp.zeros(2), y0=jnp.zeros(2))


@pytest.mark.parametrize("exponent", [-8, 0, 8])
def test_scale_of_the_unknown_does_not_matter(exponent):
    scale = 10.0**exponent
    cubic = dn.Root(lambda y, x: (y / scale) ** 3 + y / scale - x / scale)
    x = jnp.array(2.5) * scale
    y = cubic(x, y0=0.0)
    np.testing.assert_allclose(float((y / scale) ** 3 + y / scale), 2.5, rtol=1e-12)
    np.testing.assert_allclose(
        float(jax.grad(lambda x: cubic(x, y0=0.0))(x)), float(1 / (3 * (y / scale) ** 2 + 1)), rtol=1e-9
    )
    fixed = dn.FixedPoint(lambda y, x: 0.5 * jnp.sin(y / scale) * scale + x)
    y = fixed(x, y0=0.0)
    np.testing.assert_allclose(float(y / scale), float(0.5 * jnp.sin(y / scale) + 2.5), rtol=1e-10)


def test_one_unknown_and_float32_under_x64():
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.array([2.0], dtype)
        for node in (dn.Root(lambda y, x: y**2 - x), dn.FixedPoint(lambda y, x: (y + x / y) / 2)):
            out, slope = jax.value_and_grad(lambda x, node=node, one=jnp.ones(1, dtype): node(x, y0=one)[0])(x)
            assert out.dtype == slope.dtype == dtype
            np.testing.assert_allclose(float(slope[0]), 0.5 / 2**0.5, rtol=1e-4 if dtype == jnp.float32 else 1e-10)


def test_composition_in_scan_and_in_each_other():
    inner = dn.Root(lambda y, x: y**3 + y - x)
    outer = dn.FixedPoint(lambda y, x: 0.3 * inner(y + x, y0=0.0))

    def chained(x):
        step = lambda carry, _: (outer(carry, y0=0.0), None)
        return jax.lax.scan(step, x, None, length=3)[0]

    x, h = 0.7, 1e-6
    difference = (chained(x + h) - chained(x - h)) / (2 * h)
    np.testing.assert_allclose(float(jax.jit(jax.grad(chained))(x)), float(difference), rtol=1e-7)


@pytest.mark.parametrize("chosen", [None, "tensorfloat32"])
def test_products_have_the_precision_of_their_dtype(chosen):
    # Of which a CPU shows nothing: a GPU would round the factors of float32 products to ten bits. The program is read as it is compiled
    # for one: the products of a linear solver are traced as late as that.
    ones = jnp.ones(40, jnp.float32)
    w = jnp.full((40, 40), 0.01, jnp.float32)
    three = ones[:3]
    solves = (
        lambda w: jnp.sum(dn.Root(lambda y, x: y - jnp.tanh(w @ y + x), throw=False)(ones, y0=ones)),
        lambda w: jnp.sum(dn.FixedPoint(lambda y, x: jnp.tanh(w @ y + x), throw=False)(ones, y0=ones)),
        lambda w: jnp.sum(dn.QuadraticProgram(throw=False)(jnp.eye(3, dtype=jnp.float32), three, G=w[:3, :3], h=three)),
        lambda w: jnp.sum(dn.NeuralODE(lambda t, y, args: jnp.tanh(w @ y), steps=2, throw=False)(ones)),
    )
    for solve in solves:
        with jax.default_matmul_precision(chosen) if chosen else contextlib.nullcontext():
            program = jax.export.export(jax.jit(jax.grad(jax.jit(solve))), platforms=["cuda"])(w).mlir_module()
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        own = [line for line in products if "HIGHEST" not in line]
        assert len(products) > 3
        assert bool(own) == (chosen is not None), own
        assert all("HIGH" in line for line in own)  # how JAX calls TF32


SCALARS = {
    "temperature": dn.Softmax,
    "alpha": dn.Entmax,
    "smoothing": lambda value: dn.QuadraticProgram(smoothing=value),
    "strength": dn.SoftRank,
    "epsilon": dn.EntropicTransport,
    "rho": lambda value: dn.EntropicTransport(1.0, rho=value),
    "ridge": dn.WeightedLeastSquares,
    "radius": dn.SphereLeastSquares,
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_of_constructors(name):
    """A learnable array, or a number of Python or NumPy in range: anything else is named."""
    make = SCALARS[name]
    for wrong in ("2", True, 1j, [2.0], np.array(-1.0), np.float32(np.nan), -1.0, np.array([2.0, 2.0]), jnp.array(2)):
        # The suite checks annotations as well, and may be first.
        with pytest.raises((ValueError, TypeCheckError), match=f"{name} must|parameter '{name}'"):
            make(wrong)
    assert getattr(make(2.0), name) == 2
    learnable = getattr(make(jnp.array(2.0)), name)
    assert eqx.is_array(learnable)
    assert (
        not learnable.weak_type
    )  # or the first step of an optimiser would change its type, and compile everything again


def test_counts_and_numpy_numbers():
    for wrong in (0, True, 2.5, "3", np.float64(3)):
        with pytest.raises(ValueError, match="k must be a positive integer or None, got"):
            integer(wrong, "k", hint=" or None")
    assert integer(np.int64(3), "k") == 3
    for right in (np.float32(2), np.array(2.0)):
        assert isinstance(number(right, "alpha"), float)


@pytest.mark.parametrize("kind", [dn.Anderson, dn.Broyden, dn.ProximalGradient, dn.MirrorDescent])
def test_tolerances_of_solvers(kind):
    for wrong in ((jnp.sum, 0.0), ("a", 0.0), (-1.0, 0.0), (1e-3, np.nan)):
        with pytest.raises(ValueError, match="[ra]tol must be"):
            kind(*wrong)


def test_the_right_solver_is_named():
    for make, words in (
        (lambda: check_solver(dn.Anderson(), (optx.AbstractRootFinder,), "Root", "root finder"), "for `FixedPoint`"),
        (lambda: check_solver(optx.Newton(1e-4, 1e-4), (optx.AbstractMinimiser,), "Argmin", "minimiser"), "for `Root`"),
        (lambda: check_solver(dn.Anderson, (optx.AbstractMinimiser,), "Argmin", "minimiser"), "make an instance"),
        (lambda: dn.Argmin(lambda y, x: y, step_size=-1.0), "step_size must be positive"),
        (lambda: dn.Anderson(1e-3), "give rtol and atol, or neither"),
        (lambda: optx.fixed_point(lambda y, _: y / 2, dn.Anderson(), jnp.ones(2)), "needs rtol and atol"),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=f"{words}|parameter 'solver'"):
            make()
    # That of the dtype, in a node.
    node = dn.FixedPoint(lambda y, x: jnp.cos(y) * x, dn.Anderson())
    np.testing.assert_allclose(node(jnp.array(0.5), y0=0.0), 0.45018361129487355, rtol=np.finfo(float).eps ** 0.75)
