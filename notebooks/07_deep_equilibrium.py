# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A layer of infinite depth
#
# **Question.** Apply one and the same layer again and again, and the state often settles: $z^* = f(z^*, x)$. A *deep equilibrium model* (Bai, Kolter
# & Koltun 2019) takes $z^*$ for its output, however it was found. How does one find it quickly, what is its gradient, and what can go wrong?
#
# **Answer.** The gradient needs $z^*$ and one linear system, not the path: memory does not grow with the number of steps. The solver is yours to
# choose, and the cheap substitutes for the linear system are good exactly where the layer contracts strongly. What can go wrong shows: a layer that
# does not settle, or settles on no isolated point, ends with a status, not with a wrong gradient.
#
# You need derivatives of vector functions. The notebook runs in about a minute on two CPU cores.

# %%
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, display
from PIL import Image as Picture

import declarative as dn
from models.deq import EquilibriumConfig, EquilibriumNetwork
from train.loop.data import shuffled_batches, sklearn_digits

# Double precision, to compare digits. The library itself never touches this switch.
jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
BLUE, RED, GREEN, ORANGE, GREY = "#1f4e9c", "#c0392b", "#3a9d5d", "#d9822b", "0.55"


def show():
    """`plt.show()` with a palette, which makes a notebook's file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    plt.gcf().tight_layout()
    plt.gcf().savefig(whole)
    plt.close()
    Picture.open(whole).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


# %% [markdown]
# ## 1. One cell, applied for ever
#
# $$ f(z, x) = \tanh(Wz + h), \qquad x = (W, h), \quad z \in \mathbb R^{64} $$
#
# with a random W whose eigenvalues are scaled to a largest modulus $\rho$. Where the Jacobian $J = \partial f/\partial z$ has eigenvalues inside of
# the unit circle, plain iteration (Picard's) converges near $z^*$, by a factor of J's *spectral radius* a step.

# %%
n = 64


def cell(z, x):
    W, h = x
    return jnp.tanh(W @ z + h)


def data(rho, key=0):
    W = np.asarray(jr.normal(jr.key(key), (n, n)))
    return jnp.asarray(rho * W / np.abs(np.linalg.eigvals(W)).max()), 0.01 * jr.normal(jr.key(key + 1), (n,))


x = data(0.95)
layer = dn.FixedPoint(cell)
z = layer(x, y0=jnp.zeros(n))
print("distance to the next state  ", float(jnp.max(jnp.abs(cell(z, x) - z))))
print("spectral radius of J there  ", float(dn.spectral_radius(cell, z, x, key=jr.key(2))))
assert jnp.max(jnp.abs(cell(z, x) - z)) < 1e-8

# %% [markdown]
# The declaration does not say how the point is found. `Anderson` combines the last few states so that their combined residual is least; `Broyden`
# learns the inverse of $I - J$ from the steps it takes. Both ask for the same evaluations of the cell, and need fewer the harder the problem is:

# %%
solvers = {"Picard": None, "Anderson": dn.Anderson(1e-9, 1e-12), "Broyden": dn.Broyden(1e-9, 1e-12)}
radii = [0.5, 0.8, 0.9, 0.95, 0.99]


def steps(solver):
    node = dn.FixedPoint(cell, solver, throw=False, max_steps=5000)
    solve = jax.jit(lambda x: node.solve(x, y0=jnp.zeros(n)))
    found = [solve(data(rho)) for rho in radii]
    assert all(bool(solution.result == dn.RESULTS.successful) for solution in found)
    return [int(solution.stats["steps"]) for solution in found]


counts = {name: steps(solver) for name, solver in solvers.items()}
figure, axis = plt.subplots(figsize=(6.5, 4))
for (name, values), color in zip(counts.items(), (GREY, BLUE, ORANGE), strict=True):
    axis.semilogy(radii, values, "o-", color=color, label=name)
    print(f"{name:9}", dict(zip(radii, values, strict=True)))
axis.set(xlabel="spectral radius of W", ylabel="evaluations of the cell")
axis.legend()
show()
assert counts["Broyden"][-1] < counts["Anderson"][-1] < counts["Picard"][-1] / 2

# %% [markdown]
# ## 2. The gradient
#
# Differentiate the declaration $z^* = f(z^*, x)$:
#
# $$ \mathrm dz^* = J\,\mathrm dz^* + \partial_x f\,\mathrm dx \;\Rightarrow\; \mathrm dz^* = (I - J)^{-1}\,\partial_x f\,\mathrm dx. \tag{1} $$
#
# For a loss $\ell(z^*)$ reverse mode needs one vector, $u^\top = \nabla\ell^\top (I - J)^{-1}$, and then one vector-Jacobian product of a single
# application of f. Nothing here depends on how many steps it took to find $z^*$.

# %%
c = jnp.cos(jnp.arange(n, dtype=float))
loss = lambda h, node=layer: c @ node((x[0], h), y0=jnp.zeros(n))
gradient = jax.jit(jax.grad(loss))(x[1])

J = jax.jacobian(cell)(z, x)
by_hand = jnp.linalg.solve(jnp.eye(n) - J.T, c) * (1 - z**2)  # d tanh = 1 - tanh^2
direction, step = jr.normal(jr.key(3), (n,)), 1e-5
difference = (loss(x[1] + step * direction) - loss(x[1] - step * direction)) / (2 * step)
print("against (1) written out      ", float(jnp.max(jnp.abs(gradient - by_hand))))
print("against finite differences   ", float(abs(gradient @ direction - difference)))
assert jnp.max(jnp.abs(gradient - by_hand)) < 1e-8
assert abs(gradient @ direction - difference) < 1e-6

# %% [markdown]
# Backpropagation through a network of L such layers stores all L states. The compiler says how much:

# %%
small = data(0.95)[0].astype(jnp.float32)
batch = jnp.zeros((512, n), jnp.float32)


def memory(run):
    value = lambda W, hs: jnp.sum(jax.vmap(lambda h: run((W, h)))(hs))
    return jax.jit(jax.grad(value)).lower(small, batch).compile().memory_analysis().temp_size_in_bytes / 2**20


def unrolled(depth):
    def run(x):
        return jax.lax.scan(lambda z, _: (cell(z, x), None), jnp.zeros_like(x[1]), None, length=depth)[0]

    return run


depths = [10, 40, 160]
stored = [memory(unrolled(depth)) for depth in depths]
implicit = memory(lambda x: dn.FixedPoint(cell, throw=False)(x, y0=jnp.zeros_like(x[1])))
for depth, mebibytes in zip(depths, stored, strict=True):
    print(f"{depth:4} layers    {mebibytes:6.2f} MiB")
print(f"equilibrium    {implicit:6.2f} MiB")
assert implicit < stored[1] < stored[2] / 3

# %% [markdown]
# ## 3. Cheaper gradients, and where they are good
#
# The Neumann series $(I - J)^{-1} = I + J + J^2 + \dots$ suggests to stop early. With one term, this is *one-step* or Jacobian-free backpropagation
# (Fung et al. 2021): differentiate the last application of f, and call the state before it a constant. The *phantom* gradient (Geng et al. 2021)
# differentiates a few damped steps. All are adjoints of the same layer:

# %%
adjoints = {
    "one step": dn.OneStepAdjoint(),
    "Neumann, 3 terms": dn.NeumannAdjoint(3),
    "phantom, 5 steps": dn.PhantomAdjoint(5),
}


@jax.jit
def cosines(x):
    gradient = lambda adjoint: jax.grad(
        lambda h: c @ dn.FixedPoint(cell, solvers["Anderson"], adjoint)((x[0], h), y0=0 * h)
    )(x[1])
    exact = gradient(None)
    cosine = lambda g: g @ exact / jnp.sqrt((g @ g) * (exact @ exact))
    point = dn.FixedPoint(cell, solvers["Anderson"])(x, y0=0 * x[1])
    return dn.spectral_radius(cell, point, x, key=jr.key(4)), [cosine(gradient(a)) for a in adjoints.values()]


measured = [cosines(data(rho)) for rho in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)]
figure, axis = plt.subplots(figsize=(6.5, 4))
for number, (name, color) in enumerate(zip(adjoints, (RED, BLUE, GREEN), strict=True)):
    axis.plot([m[0] for m in measured], [m[1][number] for m in measured], "o-", color=color, label=name)
axis.set(xlabel="spectral radius of J at the solution", ylabel="cosine with the exact gradient", ylim=(0, 1.05))
axis.legend()
show()
assert all(m > 0.99 for m in measured[0][1])
assert measured[-1][1][0] < 0.9

# %% [markdown]
# They are nearly exact for a layer that contracts strongly, and say nothing when it does not: no status, no warning. That is the price. (Their
# residual is measured all the same: `value_and_grad_with_health` returns it as `backward_residual`.) The exact gradient is not that expensive
# either: behind it are some products with J (stabilised biconjugate gradients), not an elimination of the matrix $I - J$.
#
# ## 4. Where it breaks
#
# *No contraction.* With $\rho = 1.6$ Picard's iteration does not settle; a fixed point exists (Brouwer), and Broyden finds one. Its gradient is as
# exact as any, since (1) asks only that $I - J$ be nonsingular:

# %%
wild = data(1.6)
picard = dn.FixedPoint(cell, throw=False, max_steps=2000).solve(wild, y0=jnp.zeros(n))
# More memory than the default of 40 pairs: the inverse of I - J is far from the identity.
root = dn.FixedPoint(cell, dn.Broyden(1e-10, 1e-12, history=200), throw=False, max_steps=2000)
broyden = root.solve(wild, y0=jnp.zeros(n))
print("Picard  :", picard.report())
print("Broyden :", broyden.report())
assert bool(picard.result != dn.RESULTS.successful)
assert bool(broyden.result == dn.RESULTS.successful)
assert jnp.max(jnp.abs(cell(broyden.value, wild) - broyden.value)) < 1e-7

exact = jax.grad(lambda h: c @ root((wild[0], h), y0=broyden.value))(wild[1])
K = jax.jacobian(cell)(broyden.value, wild)
by_hand = jnp.linalg.solve(jnp.eye(n) - K.T, c) * (1 - broyden.value**2)
print("gradient against (1)         ", float(jnp.max(jnp.abs(exact - by_hand)) / jnp.max(jnp.abs(by_hand))))
assert jnp.allclose(exact, by_hand, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(by_hand))))

# %% [markdown]
# *A line of fixed points.* Let J have the eigenvalue one. Then every point of a line is a fixed point, which of them one finds depends on the start,
# and $(I - J)^{-1}$ does not exist. Such a gradient would be an arbitrary vector; here it is NaN in the batch's failing elements (or an error that
# names them, with the default `throw=True`):

# %%
flat = dn.FixedPoint(lambda z, x: jnp.diag(jnp.linspace(0.1, 1.0, 8)) @ z + x, throw=False)
value = lambda x: jnp.sum(flat(x, y0=jnp.zeros(8)))
_, broken, health = dn.value_and_grad_with_health(value, per_element=False)(jnp.zeros(8))
print("failed linear solves:", int(health.backward_failures), "  gradient:", broken)
assert int(health.backward_failures) == 1
assert jnp.all(jnp.isnan(broken))

# %% [markdown]
# *Training.* Nothing keeps a trained W contractive. Either bound it by construction (the network below shortens the rows of W, so that
# $\|W\|_\infty \le \gamma < 1$), or add `dn.jacobian_penalty`, an unbiased estimate of $\|J\|_F^2/n$ with one random vector (Bai et al. 2021), to the
# loss, and watch `dn.spectral_radius`:

# %%
penalty = jax.jit(jax.vmap(lambda key: dn.jacobian_penalty(cell, z, x, key=key)))
estimates = penalty(jr.split(jr.key(5), 2000))
print(
    f"mean of the estimates {jnp.mean(estimates):.4f}, exact {jnp.sum(J**2) / n:.4f}, one estimate ± {jnp.std(estimates):.4f}"
)
assert abs(jnp.mean(estimates) - jnp.sum(J**2) / n) < 4 * jnp.std(estimates) / 2000**0.5

# %% [markdown]
# ## 5. Digits
#
# `models/deq.py` is a whole network: an injection of the image, the cell, a linear head. Beside it the same parameters in 30 layers, trained alike
# on scikit-learn's digits.

# %%
train_set, test = sklearn_digits()
STEPS = 400
batches = shuffled_batches(train_set, 128, seed=0)


def train(depth=None, adjoint="implicit"):
    model = EquilibriumNetwork(EquilibriumConfig(depth=depth, adjoint=adjoint), key=jr.key(0))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.2)

    @eqx.filter_jit
    def update(model, state, images, labels):
        def loss(model):
            logits = jax.vmap(model)(images)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state, losses = optimizer.init(eqx.filter(model, eqx.is_inexact_array)), []
    for step in range(STEPS):
        model, state, value = update(model, state, *batches(step))
        losses.append(float(value))
    logits = jax.vmap(model)(test[0])
    return model, losses, float(jnp.mean(jnp.argmax(logits, axis=-1) == test[1]))


runs = {
    "equilibrium": train(),
    "30 layers": train(depth=30),
    "equilibrium, one step": train(adjoint="one-step"),
}
figure, axis = plt.subplots(figsize=(6.5, 4))
for (name, (_, losses, accuracy)), color, style in zip(
    runs.items(), (BLUE, ORANGE, RED), ("-", "--", ":"), strict=True
):
    axis.semilogy(losses, style, color=color, label=f"{name}: {accuracy:.1%} of the test images")
    print(f"{name:22} test accuracy {accuracy:.2%}, last loss {losses[-1]:.4f}")
axis.set(xlabel="step", ylabel="training loss")
axis.legend()
show()
assert abs(runs["equilibrium"][2] - runs["30 layers"][2]) <= 0.01

# %% [markdown]
# Thirty layers of a contraction *are* the equilibrium, to the digits that count here; so is the training run. The equilibrium stores one state
# instead of thirty. One-step gradients train this small network as well: it contracts strongly.

# %%
trained = runs["equilibrium"][0]
images = jnp.asarray(test[0][:100])


def measure(image):
    x = trained.weight, trained.inject(image.ravel())
    state, used = trained.state(image)
    again = trained.state(image, state + 0.01)[1]
    return dn.spectral_radius(trained.layer.fn, state, x, key=jr.key(6)), used, again


radius, used, again = jax.jit(jax.vmap(measure))(images)
print(f"spectral radius of J: {jnp.min(radius):.2f} to {jnp.max(radius):.2f} (bound on the cell: 0.9)")
print(f"steps from zero: {int(jnp.max(used))};  from a state that is off by 0.01: {int(jnp.max(again))}")
assert jnp.max(radius) < 0.9
assert jnp.max(again) < jnp.max(used)

# %% [markdown]
# Near solutions are worth keeping: `python -m train.deq --warm-start` starts every image's solve from where it ended when the image was last seen.
#
# ## 6. What to take along
#
# | you have | you want | use |
# |---|---|---|
# | a cell that contracts | the exact gradient at flat memory | `FixedPoint(fn)` |
# | the same, slowly | fewer evaluations | `solver=dn.Anderson(rtol, atol)` |
# | no contraction | a fixed point all the same | `solver=dn.Broyden(rtol, atol)`, or `dn.Root` with Newton's method |
# | a strong contraction and no time | a cheap direction of descent | `adjoint=dn.OneStepAdjoint()`, `NeumannAdjoint(k)`, `PhantomAdjoint(k)` |
# | a cell that training may spoil | to keep it solvable | a bound by construction, or `dn.jacobian_penalty`; `dn.spectral_radius` in the log |
#
# **Exercises.** 1. Draw the residual of Picard's iteration over the steps for $\rho = 0.95$ and read the spectral radius off its slope. 2. Give the
# cell two fixed points ($W = 2I$, $h = 0$): which one does each solver find, and what is the gradient of the result with respect to `y0`? 3. Train
# with `contraction=0.99` and look at the steps, the radius and the one-step gradient again.
#
# **References.** Bai, Kolter & Koltun 2019 (arXiv:1909.01377); Bai, Koltun & Kolter 2021 (arXiv:2106.14342), the penalty; Fung et al. 2021
# (arXiv:2103.12803), one step; Geng et al. 2021 (arXiv:2111.05177), phantom gradients; Walker & Ni 2011, Anderson acceleration.
