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
# # Differentiating a training run without storing it
#
# **Question.** A network's weights depend on how it was trained: on the weight decay, on the learning rate of every step, on the momentum. How
# does the final validation loss change with each of these numbers? Backpropagation through the run answers that, and stores the run: memory
# grows with every step. Can the run be computed backwards instead?
#
# **Answer.** Not in floating point: momentum forgets a little of the past in every step, and running backwards amplifies what was forgotten until
# nothing is right. In integers, with a small buffer that keeps exactly the bits that momentum drops (0.15 bits for each weight and step at momentum
# 0.9, where storing takes 64), every step can be undone to the last bit. The gradient is then that of the run, at any number of steps. If the
# run has converged and only its limit matters, implicit differentiation is better still: it needs no run at all.
#
# You need to know what a gradient is, and gradient descent. The method is that of Maclaurin, Duvenaud & Adams 2015, *Gradient-based Hyperparameter
# Optimization through Reversible Learning*. The notebook runs in under a minute on two CPU cores; with the environment variable
# `DECLARATIVE_SMALL=1`, with fewer steps.

# %%
import io
import math
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from PIL import Image as Picture
from sklearn.datasets import load_digits

import declarative as dn

# Double precision, to compare digits. The library itself never touches this switch.
jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("DECLARATIVE_SMALL") == "1"
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
BLUE, RED, GREEN, ORANGE, GREY = "#1f4e9c", "#c0392b", "#3a9d5d", "#d9822b", "0.55"


def show():
    """`plt.show()` with a palette, which makes a notebook's file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    plt.gcf().savefig(whole)
    plt.close()
    Picture.open(whole).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


# %% [markdown]
# ## 1. A run, its gradient, and its memory
#
# Logistic regression on scikit-learn's digits, shrunk to 4 x 4 pixels: 100 images to train on, 400 to validate, 160 weights $w$. The training
# loss has a weight decay, of which we take the logarithm, so that its steps are factors. A step of gradient descent with momentum $\gamma$ and
# learning rate $\alpha$ is
#
# $$ v \leftarrow \gamma v - (1 - \gamma)\,\nabla L(w), \qquad w \leftarrow w + \alpha v. $$

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))[:500]
images = images[order].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
images, labels = jnp.asarray(images / 16), jnp.asarray(labels[order])


def cross_entropy(w, images, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(images @ w), labels[:, None], axis=1))


def training_loss(w, log_decay, t):
    return cross_entropy(w, images[:100], labels[:100]) + jnp.exp(log_decay) / 2 * jnp.sum(w**2)


def validation_loss(w):
    return cross_entropy(w, images[100:], labels[100:])


w0 = jnp.zeros((16, 10))
gradient_of = jax.grad(training_loss)


def unrolled(log_decay, rates, momentum):
    """The weights after as many steps as there are rates."""

    def step(carry, rate):
        w, v = carry
        v = momentum * v - (1 - momentum) * gradient_of(w, log_decay, 0)
        return (w + rate * v, v), None

    return jax.lax.scan(step, (w0, jnp.zeros_like(w0)), rates)[0][0]


def compiled(run, steps, momentum=0.875):
    """The gradient of the validation loss by (log decay, rates, momentum), and the kilobytes that it takes."""
    point = jnp.asarray(-4.5), jnp.full(steps, 2.0), jnp.asarray(momentum)
    gradient = jax.jit(jax.grad(lambda *hyper: validation_loss(run(*hyper)), argnums=(0, 1, 2)))
    program = gradient.lower(*point).compile()
    return program(*point), program.memory_analysis().temp_size_in_bytes / 1e3


STEPS = (20, 60) if SMALL else (30, 100, 300, 1000)
stored = {steps: compiled(unrolled, steps) for steps in STEPS}
print("steps     memory    d/d(log decay)    d/d(first rate)    d/d(last rate)    d/d(momentum)")
for steps, ((of_decay, of_rates, of_momentum), kilobytes) in stored.items():
    print(
        f"{steps:5} {kilobytes:8.0f} kB {of_decay:16.6f} {of_rates[0]:18.1e} {of_rates[-1]:17.1e} {of_momentum:16.1e}"
    )

# %% [markdown]
# That is what we want to know: how the validation loss answers to each of the numbers that one usually turns by hand. And memory is proportional
# to the steps: 22 kilobytes for each, of a model whose weights take 1.3.
#
# ## 2. Backwards, in floating point
#
# The step has an inverse. If we know $w$ and $v$ after it, then before it they were
#
# $$ w \leftarrow w - \alpha v, \qquad v \leftarrow \bigl(v + (1 - \gamma)\,\nabla L(w)\bigr) / \gamma. $$
#
# So run to the end, keep nothing, come back. How far are we from the weights that were there?

# %%
BACK = 60 if SMALL else 500


@jax.jit
def there_and_back(w0, momentum):
    rate = jnp.asarray(2.0, w0.dtype)
    gradient = lambda w: gradient_of(w, jnp.asarray(-6.0, w.dtype), 0).astype(w.dtype)

    def forth(carry, _):
        w, v = carry
        v = momentum * v - (1 - momentum) * gradient(w)
        return (w + rate * v, v), w

    def back(carry, w_then):
        w, v = carry
        w = w - rate * v
        v = (v + (1 - momentum) * gradient(w)) / momentum
        return (w, v), jnp.max(jnp.abs(w - w_then))

    end, path = jax.lax.scan(forth, (w0, jnp.zeros_like(w0)), None, length=BACK)
    return jax.lax.scan(back, end, path, reverse=True)[1][::-1]


away = np.arange(1, BACK + 1)
for dtype, colour in ((jnp.float64, BLUE), (jnp.float32, ORANGE)):
    error = np.asarray(there_and_back(w0.astype(dtype), jnp.asarray(0.9, dtype)), np.float64)
    plt.semilogy(away, error, color=colour, label=jnp.dtype(dtype).name)
    plt.semilogy(away, 0.05 * error[-1] * 0.9 ** (BACK - away), ":", color=colour, linewidth=1.3)
plt.axhline(1, color=GREY, linewidth=0.8)
plt.ylim(1e-17, 1e6)
plt.gcf().set_size_inches(8, 4)
plt.xlabel("steps back")
plt.ylabel("error of the weights")
plt.title("Run backwards in floating point (dotted: growth by 1/0.9 a step)", loc="left")
plt.legend(frameon=False, loc="upper left")
plt.tight_layout()
show()

# %% [markdown]
# *What to see.* On this logarithmic axis the errors are straight lines as steep as the dotted ones: they grow by $1/\gamma$ in every step back.
# Float64 has about 400 steps, float32 half as many, and then the weights are wrong altogether (the grey line: an error of 1).
#
# Why? A float has a fixed number of digits. Multiplying $v$ by 0.9 makes it smaller, and pushes its last digits out. Not many of them:
# $\log_2(1/0.9) = 0.15$ of a bit. But over the run they add up, and the run *must* forget: it forgets where it started from, or it would not
# converge. Dividing by 0.9 cannot bring back what is gone; it makes the gap larger.
#
# ## 3. Keep what is dropped
#
# It is easier to see with integers. Multiply the numbers from 0 to 19 by 9/10, and round down:

# %%
numbers = np.arange(20)
print("c            ", *(f"{c:2}" for c in numbers))
print("c * 9 // 10  ", *(f"{c:2}" for c in numbers * 9 // 10))

# %% [markdown]
# Of any ten neighbours two collide (here 0 and 1, 10 and 11): twenty numbers go to eighteen. So the product alone cannot be undone, but the
# product and a note can. Write $c = 10h + r$. The ten numbers with the same $h$ have nine places to go to, $9h, \dots, 9h + 8$. Now let $b$ be
# one more integer, the *buffer*, which holds what was dropped so far. Put $r$ into it, $i = 10 b + r$, and take out of it which of the nine
# places to use: the remainder of $i$ by 9. The quotient is the new buffer. Each line has an inverse, because together $r$ and $b$ are $i$, and
# together the place and the new $b$ are $i$ again. Division must round down for negative numbers too; in Python and NumPy it does.


# %%
def shrink(c, b):
    """c times 9/10, and the buffer that remembers the rest."""
    h, r = c // 10, c % 10
    i = 10 * b + r
    return 9 * h + i % 9, i // 9


def grow(c, b):
    """The inverse."""
    h, place = c // 9, c % 9
    i = 9 * b + place
    return 10 * h + i % 10, i // 10


c, b = -123_456_789_012_345_678_901, 0
path = [(c, b)]
for step in range(1, 301):
    c, b = shrink(c, b)
    path.append((c, b))
    if step % 60 == 0:
        dropped = step * math.log2(10 / 9)
        print(
            f"after {step:3} steps: c = {c:20}, buffer = {b:15}: {math.log2(1 + b):4.1f} bits, of {dropped:4.1f} dropped"
        )
for before in reversed(path[:-1]):
    c, b = grow(c, b)
    assert (c, b) == before
print(f"and back again: c = {c}, buffer = {b}")

# %% [markdown]
# The buffer holds about as many bits as were dropped, and no more. (That it is empty again at the start is a test that everything went right.)
# The rest of a training step is addition: of $\alpha v$, of $(1-\gamma)\nabla L$. If $w$ and $v$ are integers, times a fixed tiny unit, then
# adding a *rounded* number is exact, and subtracting the same rounded number undoes it. The gradient is computed in floats from the same $w$ both
# times, so it is the same both times.
#
# That is the whole algorithm. Here it is on our problem, in NumPy and unbounded Python integers:

# %%
UNIT = 2.0**-52
pixels, answers = np.asarray(images[:100]), np.eye(10)[np.asarray(labels[:100])]


def gradient(w):
    z = pixels @ w
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return pixels.T @ (p / p.sum(axis=1, keepdims=True) - answers) / len(pixels) + np.exp(-4.5) * w


rounded = lambda x: np.array([int(entry) for entry in np.rint(x / UNIT).ravel()], object).reshape(x.shape)
real = lambda c: c.astype(float) * UNIT

w, v, b = (np.zeros((16, 10), object) for _ in range(3))
for _ in range(BACK):
    pull = rounded(0.1 * gradient(real(w)))
    v, b = shrink(v, b)
    v = v - pull
    w = w + rounded(2.0 * real(v))
bits = np.mean([math.log2(1 + entry) for entry in b.ravel()])
print(
    f"after {BACK} steps: largest weight {real(w).max():.4f}, buffers of {bits / BACK:.4f} bits for each weight and step"
)

for _ in range(BACK):
    w = w - rounded(2.0 * real(v))
    v = v + rounded(0.1 * gradient(real(w)))
    v, b = grow(v, b)
print(
    "back at the start:",
    "w = 0," if not w.any() else "w is wrong,",
    "v = 0," if not v.any() else "v is wrong,",
    "buffers empty",
)
assert not w.any()
assert not v.any()
assert not b.any()

# %% [markdown]
# ## 4. `ReversibleSGD`
#
# The library has it for compiled JAX, where an integer cannot grow at will. A buffer there has 64 bits. How many steps fit in one follows from
# the smallest momentum that may occur (`min_momentum`), before anything runs: 296 steps at 0.9; then the next buffer begins. Momenta need not be
# 9/10, and may change from step to step. On the way back the derivatives are collected: those of the weight decay, of each rate, of each
# momentum.


# %%
def reversible(log_decay, rates, momentum):
    sgd = dn.ReversibleSGD(training_loss, rates.size, min_momentum=0.875)
    return sgd.run(w0, log_decay, learning_rate=rates, momentum=momentum)


reversed_ = {steps: compiled(reversible, steps) for steps in STEPS}
join = lambda gradient: np.concatenate([np.ravel(part) for part in gradient])
print("steps    unrolled   reversible   relative difference of the gradients")
for steps in STEPS:
    (ours, kilobytes), (theirs, many) = reversed_[steps], stored[steps]
    difference = np.linalg.norm(join(ours) - join(theirs)) / np.linalg.norm(join(theirs))
    print(f"{steps:5} {many:8.0f} kB {kilobytes:9.0f} kB {difference:16.1e}")
    assert difference < 1e-9

sgd = dn.ReversibleSGD(training_loss, STEPS[-1], min_momentum=0.875)
held = sgd.information(w0, jnp.asarray(-4.5), learning_rate=2.0, momentum=0.875)
print(f"\nbits for each weight and step: dropped by momentum {math.log2(1 / 0.875):.3f},", end=" ")
print(f"in the buffers {held:.3f}, buffers {sgd.stored_bits():.3f}, storing weights 64")

# %% [markdown]
# The same gradient, and the column of memory hardly grows. (That of the buffers holds a little less than the theory, since in a run that converges
# $v$ goes to zero, and there is little to drop.)
#
# What is it good for? The gradient says how to change the learning rates. Here are a few steps of gradient descent on the logarithms of *all* of
# them, and on the weight decay: one run of training each, backwards and forwards.

# %%
RUN = 20 if SMALL else 60
META = 3 if SMALL else 40


@jax.jit
def improve(log_decay, log_rates):
    def loss(log_decay, log_rates):
        sgd = dn.ReversibleSGD(training_loss, RUN, min_momentum=0.9)
        return validation_loss(sgd.run(w0, log_decay, learning_rate=jnp.exp(log_rates), momentum=0.9))

    value, (of_decay, of_rates) = jax.value_and_grad(loss, argnums=(0, 1))(log_decay, log_rates)
    return value, log_decay - 5 * of_decay, log_rates - 5 * of_rates


log_decay, log_rates = jnp.asarray(-4.5), jnp.log(jnp.full(RUN, 1.0))
losses = []
for _ in range(META):
    loss, log_decay, log_rates = improve(log_decay, log_rates)
    losses.append(float(loss))
print(
    f"validation loss {losses[0]:.4f} -> {losses[-1]:.4f}, weight decay {np.exp(-4.5):.4f} -> {np.exp(log_decay):.4f}"
)
assert losses[-1] < losses[0]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
left.plot(losses, color=BLUE)
left.set(xlabel="runs of training", ylabel="validation loss", title="Learning how to learn")
right.axhline(1, color=GREY, linestyle=":")
right.plot(np.exp(log_rates), color=BLUE)
right.set(xlabel="step of the run", ylabel="learning rate", title="The learnt rates (dotted: where they began)")
show()

# %% [markdown]
# *What to see.* Left, the loss after each whole run of training falls. Right, the rates went up, and not all alike: a careful start, large steps in
# the middle, smaller ones to settle. These are numbers tuned to the validation images, so a third set would have to judge them.
#
# A warning from the paper: where a run is chaotic, at high learning rates, the gradient is still exact, and useless: it is the slope of a wall of
# needles. Begin with small rates.
#
# ## 5. When implicit differentiation is better
#
# If the run has converged, its end is the minimiser of the training loss, wherever it began and whatever the rates were. Then the optimality
# condition $\nabla L(w^*) = 0$ gives the derivative, as in notebook 01: `Argmin`. Nothing of the path is needed.


# %%
@jax.jit
def by_optimality(log_decay):
    objective = lambda w, log_decay: training_loss(w, log_decay, 0)
    return jax.grad(lambda log_decay: validation_loss(dn.Argmin(objective)(log_decay, y0=w0)))(log_decay)


implicit = by_optimality(jnp.asarray(-4.5))
print("steps    d/d(log decay), of the run    of the minimiser    d/d(last rate), of the run")
for steps, ((of_decay, of_rates, _), _) in reversed_.items():
    print(f"{steps:5} {of_decay:28.9f} {implicit:19.9f} {of_rates[-1]:29.1e}")

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for results, colour, label in ((stored, RED, "unrolled"), (reversed_, BLUE, "reversible")):
    sizes = [kilobytes / 1e3 for _, kilobytes in results.values()]
    axes.loglog(STEPS, sizes, "o-", color=colour)
    axes.annotate(label, (STEPS[-1], sizes[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
axes.set(xlabel="steps of the run", ylabel="memory of one gradient (MB)", xlim=(STEPS[0] * 0.8, STEPS[-1] * 3))
axes.set_title("The same gradient", loc="left")
show()

# %% [markdown]
# *What to see.* In the table, the derivative of the run approaches that of the minimiser, and is another number before. Both are right: they
# answer different questions. The derivatives by the learning rates vanish as the run converges: the minimiser does not depend on them, and an
# implicit gradient cannot know them. The figure is the point of this notebook: the red line is the price of storing.
#
# | you want | and | take |
# |---|---|---|
# | the derivative by what the objective depends on | the run converges | implicit: `Argmin`; no run to store or repeat |
# | the same, or by rates, momenta, the start | the run is stopped when it is | `ReversibleSGD` |
# | the same | momentum is small, or the optimiser is another one | checkpoints (`jax.checkpoint`): store some steps, repeat the others |
# | the same | the run is short | backpropagation through it; nothing is faster |
#
# `benchmarks/memory.py` measures all of them, on larger problems and up to 3000 steps.
#
# ## 6. The assertion
#
# The paper's code ends in an assertion, and so does this notebook: at the end of the way back, the start has been found again, bit for bit. In
# the library it is part of every gradient. If a single bit is off, it raises (or gives NaN, with `throw=False`), so a gradient that you get is
# one of a run that was undone exactly. Here is what happens if we tamper with one step on the way back, with an objective that is not the same
# function on every call:

# %%
calls = iter(range(10**9))


def fickle(w, args, t):
    noise = jax.pure_callback(
        lambda *_: np.float64(1e-9 * next(calls)), jax.ShapeDtypeStruct((), float), t, jax.lax.stop_gradient(w)
    )
    return jnp.sum(jnp.cosh(w)) + noise * jnp.sum(w)


undone = {}
for name, objective in (("the same on every call", lambda w, args, t: jnp.sum(jnp.cosh(w))), ("fickle", fickle)):
    sgd = dn.ReversibleSGD(objective, 20, throw=False)
    run = lambda w0, sgd=sgd: jnp.sum(sgd.run(w0, learning_rate=0.1, momentum=0.9))
    undone[name] = jax.grad(run)(jnp.asarray([0.5, -1.5]))
    print(f"{name}: gradient {undone[name]}")

assert np.all(np.isfinite(undone["the same on every call"]))
assert np.all(np.isnan(undone["fickle"]))
assert not w.any()  # the start of section 3, found again bit for bit
