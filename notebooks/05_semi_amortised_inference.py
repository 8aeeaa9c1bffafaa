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
# # Semi-amortised inference: which gradient does the encoder get?
#
# **Question.** A variational autoencoder's encoder guesses, for each observation, the parameters $\lambda_0$ of an approximate posterior. A
# few steps of
# optimisation make the guess better: $\lambda^*$. If we train on the ELBO at $\lambda^*$, what does the encoder learn? J. Chiu's report, *Implicit
# Differentiation* (2021, section 5), stops at this question: "the main difficulty lies in computing $\partial z^*/\partial z^0$".
#
# **Answer.** Computing it is easy: it is zero. A minimum does not depend on where one started to look for it. Backpropagation through the steps gives
# something else only as long as the steps have not arrived, and decays to the same zero. What helps is to write the guess into the problem: a
# proximal term. And if that term counts in the loss as well, the gradient needs no linear solve and no memory of the steps.
#
# You need to know what an ELBO is. Kim et al. 2018 introduced semi-amortised autoencoders. The notebook runs in about a minute on two CPU
# cores.

# %%
import io
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from PIL import Image as Picture

import declarative as dn

warnings.filterwarnings("ignore", message="IProgress not found")  # NumPyro asks for progress bars when it is imported
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
# ## 1. A model, an observation, a guess
#
# Two latent variables, three numbers observed, a small network between them with random weights. `dn.ELBO` estimates the bound with samples that a
# key fixes: with one key it is an ordinary function of $\lambda = (\mu, \log\sigma)$, with minima that one can find.


# %%
class Decoder(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, z, x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, self.mlp(z), 0.5))


decoder = Decoder(eqx.nn.MLP(2, 3, 16, 1, jnp.tanh, key=jr.key(5)))
elbo = dn.ELBO(decoder, dn.DiagonalGaussian(), samples=32)
x, key = jnp.array([0.9, -0.4, 0.3]), jr.key(0)
guess = dn.GaussianParameters(mean=jnp.array([-1.0, 1.5]), log_scale=jnp.array([0.2, -0.2]))

optimum = dn.ELBOOptimizer(elbo, "implicit")(x, guess, key=key)
print(f"ELBO at the guess    {elbo(guess, x, key):8.4f} nats")
print(f"ELBO at the optimum  {optimum.elbo:8.4f} nats")
print("mean at the optimum ", optimum.parameters.mean.round(4))

# %% [markdown]
# ## 2. The implicit function theorem says zero
#
# At the optimum $F(\lambda^*; \theta, x) = \nabla_\lambda\ell = 0$ with $\ell = -\text{ELBO}$. Differentiate: $\partial_\lambda F\,\mathrm
# d\lambda^* = -\partial_\theta F\,\mathrm d\theta$. There is no
# $\lambda_0$ on the right, since there is none in F.


# %%
def size(tree):
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jtu.tree_leaves(tree))))


def encoder_gradient(mode, **options):
    """The gradient of the loss with respect to the encoder's guess."""
    return jax.grad(lambda guess: dn.ELBOOptimizer(elbo, mode, **options)(x, guess, key=key).loss)(guess)


print("implicit :", size(encoder_gradient("implicit")))
print("amortised:", size(encoder_gradient("amortised")), " (the plain VAE: no inner step)")
assert size(encoder_gradient("implicit")) == 0.0

# %% [markdown]
# It is not the theorem that fails. From any guess in this basin one arrives at the same optimum, so the loss after the optimisation is flat
# in the guess.
#
# ## 3. Unrolling only delays it
#
# Semi-amortised autoencoders as published backpropagate through K steps of gradient descent. Each step multiplies by $I - \alpha H$:
#
# $$ \frac{\mathrm d\lambda_K}{\mathrm d\lambda_0} = \prod_{k<K}\bigl(I - \alpha H(\lambda_k)\bigr), \qquad
# \frac{\mathrm d\ell(\lambda_K)}{\mathrm d\lambda_0} = \frac{\mathrm d\lambda_K}{\mathrm d\lambda_0}^{\!\top}\nabla\ell(\lambda_K). $$
#
# Both factors go to zero: the product, and the gradient that is left at $\lambda_K$. Near the optimum each shrinks by $1 - \alpha h_{\min}$ a
# step, with $h_{\min}$ the smallest
# curvature, so the signal should fall like $(1 - \alpha h_{\min})^{2K}$.

# %%
rate = 0.03
steps = [1, 2, 5, 10, 20, 50, 100, 200, 400]
unrolled = [size(encoder_gradient("unrolled", solver=dn.GradientSteps(k, rate, momentum=0.0))) for k in steps]
moreau = [size(encoder_gradient("moreau", solver=dn.GradientSteps(k, rate, momentum=0.0))) for k in steps]

flat, unravel = jax.flatten_util.ravel_pytree(optimum.parameters)
hessian = jax.hessian(lambda v: -elbo(unravel(v), x, key))(flat)
smallest = float(jnp.linalg.eigvalsh(hessian)[0])
predicted = unrolled[-2] * (1 - rate * smallest) ** (2 * (np.array(steps) - steps[-2]))

figure, axis = plt.subplots(figsize=(6.5, 4))
axis.semilogy(steps, unrolled, "o-", color=RED, label="unrolled")
axis.semilogy(steps[4:], predicted[4:], "--", color=GREY, label=r"predicted slope $(1 - \alpha h_{\min})^{2K}$")
axis.semilogy(steps, moreau, "o-", color=BLUE, label=r"moreau, $\rho = 1$")
axis.axhline(size(encoder_gradient("amortised")), color=GREEN, lw=1, label="amortised")
axis.set(xlabel="inner steps K", ylabel="size of the encoder's gradient", xscale="log", ylim=(1e-9, 30))
axis.legend()
show()
print(
    f"smallest curvature {smallest:.3f}; unrolled at K = {steps[-1]}: {unrolled[-1]:.1e}, predicted {predicted[-1]:.1e}"
)
assert abs(np.log(unrolled[-1] / predicted[-1])) < 0.2

# %% [markdown]
# The better the inner optimisation, the less the encoder learns from it. What it learns at K = 20 is an effect of not having converged.
#
# ## 4. Put the guess into the problem
#
# $$ \lambda_\rho = \arg\min_\lambda\; \ell(\lambda) + \rho\,D(\lambda, \lambda_0) $$
#
# with half the squared distance D in the Fisher metric of the guess: one standard deviation of the mean counts one half. Small $\rho$ goes to
# the optimum, large
# $\rho$ stays at the guess. Two losses:
#
# - **`moreau`**: the whole minimum, $\ell(\lambda_\rho) + \rho D$. It is a *Moreau envelope* of $\ell$: the same minima, smoothed. At a minimum
#   the gradient through
#   $\lambda_\rho$ vanishes (the envelope theorem), and what is left is $\rho\,\partial_{\lambda_0}D$: no linear solve.
# - **`proximal`**: $\ell(\lambda_\rho)$ only. Then one has to differentiate $\lambda_\rho$, by the implicit function theorem: one linear solve.
#
# A picture in one dimension: the losses as functions of the guess's first mean, the rest of the guess fixed.

# %%
line = jnp.linspace(-3.0, 3.0, 61)
at = lambda mean: dn.GaussianParameters(guess.mean.at[0].set(mean), guess.log_scale)


def along(mode, rho=1.0):
    node = dn.ELBOOptimizer(elbo, mode, rho=rho, throw=False)
    return jax.jit(jax.vmap(lambda mean: node(x, at(mean), key=key).loss))(line)


figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for axis, mode in zip(axes, ("moreau", "proximal"), strict=True):
    axis.plot(line, along("amortised"), color=GREEN, label="amortised: loss at the guess")
    for rho, alpha in ((3.0, 0.9), (0.3, 0.6), (0.03, 0.35)):
        axis.plot(line, along(mode, rho), color=BLUE, alpha=alpha, label=rf"{mode}, $\rho$ = {rho}")
    axis.plot(line, along("implicit"), "--", color=RED, label="implicit: loss at the optimum")
    axis.set(xlabel="the guess's first mean", title=mode, ylim=(float(-optimum.elbo) - 0.5, float(-optimum.elbo) + 8))
    axis.legend(fontsize=9)
axes[0].set_ylabel("loss, nats")
show()

# %% [markdown]
# The dashed line is flat: the encoder gets nothing. The envelope lies between it and the plain VAE's loss, and slopes towards the better guess
# everywhere.
#
# The two formulas, checked against finite differences of the stated objective:

# %%
for mode in ("moreau", "proximal"):
    node = dn.ELBOOptimizer(elbo, mode)
    loss = lambda mean, node=node: node(x, at(mean), key=key).loss
    exact, difference = jax.grad(loss)(-1.0), (loss(-1.0 + 1e-5) - loss(-1.0 - 1e-5)) / 2e-5
    print(f"{mode:9} {exact:.9f}   finite differences {difference:.9f}")
    assert abs(exact - difference) < 1e-6

# %% [markdown]
# ## 5. Do not learn $\rho$
#
# The minimum of $\ell + \rho D$ never decreases when $\rho$ grows: its slope is $D \ge 0$. Gradient descent on $\rho$ would take it to zero,
# and the encoder's gradient with it.

# %%
rhos = np.logspace(-4, 3, 15)
value = jax.jit(jax.value_and_grad(lambda rho: dn.ELBOOptimizer(elbo, "moreau", rho=rho)(x, guess, key=key).loss))
losses, slopes = zip(*(value(jnp.asarray(rho)) for rho in rhos), strict=True)
signals = [size(encoder_gradient("moreau", rho=float(rho))) for rho in rhos]
assert min(slopes) >= 0

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.semilogx(rhos, losses, "o-", color=BLUE)
left.set(xlabel=r"$\rho$", ylabel="loss, nats", title="the loss only grows with $\\rho$ ...")
right.loglog(rhos, signals, "o-", color=BLUE)
right.set(xlabel=r"$\rho$", ylabel="size of the encoder's gradient", title="... and so does the encoder's gradient")
show()

# %% [markdown]
# ## 6. What it costs in memory
#
# Unrolled, the backward pass needs every iterate (only the iterates, if each step is computed again). `reversible` runs the steps backwards,
# bit for bit, from
# the last one, and keeps the few bits that momentum would lose. The envelope needs the last iterate, whatever K is.

# %%
counts = [10, 100, 1000]


def kib(mode, steps):
    node = dn.ELBOOptimizer(elbo, mode, solver=dn.GradientSteps(steps, rate, momentum=0.5))
    gradient = jax.jit(jax.grad(lambda guess: node(x, guess, key=key).loss))
    return gradient.lower(guess).compile().memory_analysis().temp_size_in_bytes / 1024


print("KiB, at K =      " + "".join(f"{k:9}" for k in counts))
memory = {mode: [kib(mode, k) for k in counts] for mode in ("unrolled", "reversible", "proximal", "moreau")}
for mode, sizes in memory.items():
    print(f"{mode:16} " + "".join(f"{size:9.1f}" for size in sizes))
assert memory["moreau"][-1] < 1.05 * memory["moreau"][0]

# %% [markdown]
# ## What to use
#
# | you want | mode |
# |---|---|
# | an encoder that proposes where the optimiser should start, and a decoder trained at the optimum | `moreau` |
# | the same, but the loss must be the ELBO itself | `proximal` |
# | what the published semi-amortised autoencoders do, exactly | `unrolled`, or `reversible` for many steps |
# | an encoder that imitates the optimum | `kl` |
# | no encoder | `svi` |
# | to see the encoder learn nothing | `implicit` |
#
# `python -m train.savi_oracle` and `python -m benchmarks.savi` do this at full size, on a model whose log p(x) is known; `python -m
# train.vae` on digits.
