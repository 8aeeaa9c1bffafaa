"""Reversible networks: gradients of what is reconstructed against gradients of what is stored, memory, rounding, misuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import declarative as dn

from .helpers import exhaustive

WIDTH = 6


class Branch(eqx.Module):
    """A residual branch with dropout, so that a key matters."""

    net: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key, dtype=jnp.float64):
        self.net = eqx.nn.MLP(WIDTH, WIDTH, 8, 1, jnp.tanh, key=key, dtype=dtype)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, key=None):
        return self.dropout(self.net(x), key=key, inference=key is None)


def revnet(key, dtype=jnp.float64):
    return dn.ReversibleBlock(*(Branch(key, dtype) for key in jr.split(key)))


def momentum(key, dtype=jnp.float64):
    return dn.MomentumBlock(Branch(key, dtype), gamma=0.8)


def pair(key, dtype=jnp.float64):
    return tuple(jr.normal(key, (WIDTH,), dtype) for key in jr.split(key))


def both(make, depth, dtype=jnp.float64):
    build = lambda backward: dn.ReversibleSequence(
        lambda key: make(key, dtype), depth, key=jr.key(0), backward=backward
    )
    return build("reconstruct"), build("store")


def loss(model_and_x, key):
    model, x = model_and_x
    y1, y2 = model(x, key=key)
    return jnp.sum(jnp.sin(y1) * jnp.arange(1.0, WIDTH + 1, dtype=y1.dtype)) + jnp.sum(y2**2)


def furthest(a, b):
    """The largest difference over the largest entry (a bias before a normalisation has a gradient of rounding only)."""
    a, b = ([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)] for tree in (a, b))
    return float(np.max(np.abs(np.concatenate(a) - np.concatenate(b))) / np.max(np.abs(np.concatenate(b))))


class Affine(dn.AbstractReversibleBlock):
    """A block of a user's own, with an inverse and no rule for its gradient: y1 = exp(f(x2)) x1, y2 = x2 + g(y1)."""

    f: Branch
    g: Branch

    def forward(self, x, state, key):
        x1, x2 = x
        y1 = jnp.exp(self.f(x2, key)) * x1
        return (y1, x2 + self.g(y1, key)), state

    def inverse(self, y, state, key):
        y1, y2 = y
        x2 = y2 - self.g(y1, key)
        return jnp.exp(-self.f(x2, key)) * y1, x2


def affine(key, dtype=jnp.float64):
    return Affine(*(Branch(key, dtype) for key in jr.split(key)))


@pytest.mark.parametrize("make", [revnet, momentum, affine])
@pytest.mark.parametrize("keyed", [True, *exhaustive(False)])
def test_gradients_are_those_of_stored_activations(make, keyed, getkey):
    x, key = pair(getkey()), getkey() if keyed else None
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    for dtype, tol in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        x = jtu.tree_map(lambda leaf, dtype=dtype: leaf.astype(dtype), x)
        ours, stored = both(make, 5, dtype)
        assert furthest(gradient((ours, x), key), gradient((stored, x), key)) < tol
        assert ours.round_trip(x, key=key) < 20 * jnp.finfo(dtype).eps
        assert furthest(ours.inverse(ours(x, key=key), key=key), x) < 1e2 * float(jnp.finfo(dtype).eps)


def test_transforms(getkey):
    ours, stored = both(revnet, 3)
    x = pair(getkey())
    batch = jtu.tree_map(lambda leaf: jnp.stack([leaf, -leaf]), x)
    of_batch = lambda model: eqx.filter_grad(lambda model: jnp.sum(jax.vmap(lambda x: loss((model, x), None))(batch)))(
        model
    )
    assert furthest(of_batch(ours), of_batch(stored)) < 1e-12
    second = lambda model: jax.jacrev(jax.grad(lambda x1: loss((model, (x1, x[1])), None)))(x[0])
    assert furthest(second(ours), second(stored)) < 1e-12
    # Of one output only: the other's cotangent is absent, not garbage.
    half = lambda model: eqx.filter_grad(lambda model: jnp.sum(model(x)[1]))(model)
    assert furthest(half(ours), half(stored)) < 1e-12
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x1: ours((x1, x[1]))[0], (x[0],), (x[0],))


def test_memory_does_not_grow_with_depth():
    def bytes_of(backward, depth):
        model = dn.ReversibleSequence(revnet, depth, key=jr.key(0), backward=backward)
        batch = tuple(jnp.ones((64, WIDTH)) for _ in range(2))
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        total = lambda arrays, x: jnp.sum(jax.vmap(lambda x: eqx.combine(arrays, static)(x)[0])(x))
        # With respect to the input alone: the parameters' own gradients do grow.
        compiled = jax.jit(jax.grad(total, argnums=1)).lower(arrays, batch).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert bytes_of("reconstruct", 40) < 1.1 * bytes_of("reconstruct", 10)
    assert bytes_of("store", 40) > 2 * bytes_of("store", 10)


def test_batch_statistics_are_updated_once(getkey):
    class Normed(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key, dtype=jnp.float64)
            self.norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch", dtype=jnp.float64)

        def __call__(self, batch, state):
            one = lambda x, state: self.norm(self.linear(x), state)
            batch, state = jax.vmap(one, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(batch, state)
            return jnp.tanh(batch), state

    def build(backward):
        make = lambda key: dn.ReversibleBlock(*(Normed(key) for key in jr.split(key)))
        return eqx.nn.make_with_state(lambda key: dn.ReversibleSequence(make, 3, key=key, backward=backward))(jr.key(0))

    batch = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *(pair(getkey()) for _ in range(8)))

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def total(model, state):
        y, state = model(batch, state)
        return jnp.sum(y[0] ** 3), state

    results = []
    for backward in ("reconstruct", "store"):
        model, state = build(backward)
        before = jtu.tree_leaves(state)
        (_, after), gradient = total(model, state)
        assert any(np.any(a != b) for a, b in zip(jtu.tree_leaves(after), before, strict=True))
        results.append((after, gradient))
    (after, gradient), (wanted, stored) = results
    assert furthest(after, wanted) < 1e-14
    assert furthest(gradient, stored) < 1e-10


def test_a_state_may_be_threaded_through_two_calls(getkey):
    class Counted(eqx.Module):
        linear: eqx.nn.Linear
        index: eqx.nn.StateIndex

        def __init__(self, key):
            self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key, dtype=jnp.float64)
            self.index = eqx.nn.StateIndex(jnp.ones(()))

        def __call__(self, x, state):
            scale = state.get(self.index)
            out = scale * jnp.tanh(self.linear(x))
            return out, state.set(self.index, scale + jnp.mean(out))

    def build(backward):
        make = lambda key: dn.ReversibleBlock(*(Counted(key) for key in jr.split(key)))
        return eqx.nn.make_with_state(lambda key: dn.ReversibleSequence(make, 3, key=key, backward=backward))(jr.key(0))

    x = pair(getkey())

    @eqx.filter_grad
    def total(model, state):
        y, new = model(x, state)
        z, new = model(y, new)
        return jnp.sum(z[0] ** 2) + jnp.sum(jnp.stack(jtu.tree_leaves(new)))

    gradients = [total(*build(backward)) for backward in ("reconstruct", "store")]
    assert furthest(*gradients) < 1e-12
    model, state = build("reconstruct")
    y, _ = model(x, state)
    assert furthest(model.inverse(y, state), x) < 1e-12  # the state that went in is still there
    for backward in ("reconstruct", "store"):
        model, state = build(backward)
        of_state = eqx.filter_grad(lambda state, model=model: jnp.sum(model(x, state)[0][0]))(state)
        assert all(np.all(leaf == 0) for leaf in jtu.tree_leaves(of_state))


@pytest.mark.parametrize("make", [dn.MomentumBlock, lambda f: dn.ReversibleBlock(f, f)])
def test_a_branch_of_lower_precision(make, getkey):
    class Half(eqx.Module):
        net: eqx.nn.MLP

        def __call__(self, x):
            return self.net(x.astype(jnp.float32))

    build = lambda backward: dn.ReversibleSequence(
        lambda key: make(Half(Branch(key, jnp.float32).net)), 3, key=jr.key(0), backward=backward
    )
    x = pair(getkey())
    with jax.numpy_dtype_promotion("standard"):
        ours, stored = (eqx.filter_grad(loss)((build(backward), x), None) for backward in ("reconstruct", "store"))
    assert furthest(ours, stored) < 1e-5


def test_misuse_is_named(getkey):
    with pytest.raises(ValueError, match="depth"):
        dn.ReversibleSequence(revnet, 0, key=getkey())
    with pytest.raises(ValueError, match="backward"):
        dn.ReversibleSequence(revnet, 2, key=getkey(), backward="recompute")
    with pytest.raises(ValueError, match="reversible block"):
        dn.ReversibleSequence(lambda key: eqx.nn.Linear(2, 2, key=key), 2, key=getkey())
    with pytest.raises(ValueError, match="gamma"):
        dn.MomentumBlock(jnp.tanh, gamma=0.0)
    ours, _ = both(revnet, 2)
    with pytest.raises(ValueError, match="jnp.split"):
        ours(jnp.ones(2 * WIDTH))
    for block in (dn.ReversibleBlock(lambda x: x[:1], jnp.tanh), dn.MomentumBlock(lambda x: x[:1])):
        short = dn.ReversibleSequence(lambda key, block=block: block, 2, key=getkey())
        with pytest.raises(ValueError, match="must return the shape"):
            short((jnp.ones(3), jnp.ones(3)))
    wide = dn.ReversibleBlock(lambda x: x.astype(jnp.float32), jnp.tanh)
    with pytest.raises(ValueError, match="cast the input to float32, or the module to bfloat16"):
        dn.ReversibleSequence(lambda key: wide, 2, key=getkey())((jnp.ones(3, jnp.bfloat16),) * 2)
    zero = jtu.tree_map(jnp.zeros_like, pair(getkey()))
    assert jnp.isfinite(ours.round_trip(zero))


@pytest.mark.slow
def test_a_few_steps_learn_and_draw(tmp_path, monkeypatch):
    import train.revnet

    monkeypatch.setattr(train.revnet, "DEPTHS", (2, 6))
    config = train.revnet.Config(
        depth=3, steps=40, batch_size=64, out=tmp_path, eval_every=40, save_every=40, tensorboard=False, devices=1
    )
    _, result = train.revnet.train(config)
    assert result["test/accuracy"] > 0.5
    assert (tmp_path / "costs.png").stat().st_size > 10_000


@pytest.mark.parametrize(("fields", "message"), [({"depth": 0}, "depth"), ({"gamma": 0.0}, "gamma")])
def test_wrong_arguments_are_named(fields, message):
    from train.revnet import Config

    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize("model", ["revnet", "momentum", "resnet"])
def test_the_models_map_images_to_logits_and_are_of_one_size(model, getkey):
    from models.revnet import RevNetConfig, make

    count = lambda name: sum(
        leaf.size
        for leaf in jtu.tree_leaves(eqx.filter(make(RevNetConfig(model=name, depth=2), key=jr.key(0)), eqx.is_array))
    )
    network = make(RevNetConfig(model=model, depth=2), key=getkey())
    assert network(jnp.ones((8, 8), jnp.float32)).shape == (10,)
    assert abs(count(model) - count("resnet")) < 0.05 * count("resnet")
