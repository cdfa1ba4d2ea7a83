"""Small models for tests that compare several devices with one."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.models import build, UNet

WORDS = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}
GROUPED = {**WORDS, "n_heads": 8, "n_kv_heads": 4, "hidden": 64}
MODELS = ("gpt", "bert", "llama", "llama scanned", "vit", "resnet20", "mobilenet")


def tokens(examples=4):
    """A batch of text."""
    return jnp.arange(16 * examples).reshape(examples, 16) % WORDS["vocab_size"]


def model_and_data(name, layers=2, examples=4):
    """A model that was not initialised, and a batch for it."""
    words, grouped = ({**sizes, "n_layers": layers} for sizes in (WORDS, GROUPED))
    model = {
        "gpt": lambda: build("gpt", **words),
        "bert": lambda: build("bert", **words),
        "llama": lambda: build("llama", **grouped),
        "llama scanned": lambda: build("llama", **grouped, scan=True),
        "vit": lambda: build("vit", d_model=32, n_heads=4, n_layers=layers),
        "resnet20": lambda: build("resnet20"),
        "mobilenet": lambda: build("mobilenet"),
        "unet": UNet,
    }[name]()
    if name in ("gpt", "bert", "llama", "llama scanned"):
        return model, tokens(examples)
    return model, jr.normal(jr.key(1), (examples, 32, 32, 3))


def problem(name, layers=2, examples=4):
    """A function, its weights, and a batch."""
    model, x = model_and_data(name, layers, examples)
    return model.apply, jax.jit(model.init)(jr.key(0), x), x


def loss_problem(name, layers=2, examples=4):
    """The same with a number for a result."""
    fn, params, x = problem(name, layers, examples)
    return (lambda params, x: (fn(params, x) ** 2).mean()), params, x


def near(got, want, rel=1e-5):
    """Relative to the largest number of all: some gradients are rounding alone."""
    most = max(np.abs(a).max() for a in jax.tree.leaves(want))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rel, atol=rel * most)


def ten_steps(loss, params, x):
    """Value and gradient before any step, and the weights after ten."""
    tx = optax.sgd(1e-2, momentum=0.9)

    @jax.jit
    def step(params, state, x):  # not as a constant: other processes have parts of it
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads

    state, first = tx.init(params), None
    for _ in range(10):
        params, state, value, grads = jax.block_until_ready(step(params, state, x))
        first = first or (value, grads)
    return *first, params
