"""Laws that hold elsewhere hold on a GPU too: its products, its dtypes, its memory.

Run by `pytest -m gpu` and by `scripts/bench/gpu.py`; else skipped.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff import lift
from jaxeff.cost import device_memory, measure_energy
from jaxeff.data import batches, digits
from jaxeff.lowrank import factorize
from jaxeff.models import CNN, Llama, LlamaConfig, MLP
from jaxeff.precision import autocast, DynamicLossScale
from jaxeff.program import dense
from jaxeff.pruning import shrink
from jaxeff.quantization import int4, int8, quantize, w8a8
from jaxeff.training import (
    accuracy,
    Checkpoints,
    classification_loss,
    fit,
    forms,
    init_state,
    make_train_step,
)
from scripts.bench.gpu_parts import relative, zero_half
from tests.training.small import small_run

pytestmark = pytest.mark.gpu

LLAMA = LlamaConfig(
    vocab_size=64, d_model=64, hidden=128, n_layers=2, n_heads=4, n_kv_heads=2
)


@pytest.fixture(autouse=True)
def full_float32():
    """Else float32 products round to TF32, three digits."""
    with jax.default_matmul_precision("highest"):
        yield


def network(name):
    """A model's function, its weights and some inputs."""
    if name == "llama":
        model, x = Llama(LLAMA, scan=True), jr.randint(jr.key(1), (2, 16), 0, 64)
    else:
        model = {"mlp": MLP((64, 64)), "cnn": CNN(((16, 16), (32, 32)))}[name]
        x = jr.normal(jr.key(1), (4, 16, 16, 4))
    return model.apply, jax.jit(model.init)(jr.key(0), x), x


NETWORKS = pytest.mark.parametrize("name", ["mlp", "cnn", "llama"])


@pytest.mark.parametrize("shape", [(64, 128, 32), (8, 64, 24), (33, 70, 5), (1, 9, 1)])
def test_products_of_bytes_are_exact(shape):
    m, k, n = shape
    a = jr.randint(jr.key(0), (m, k), -127, 128, jnp.int8)
    b = jr.randint(jr.key(1), (k, n), -127, 128, jnp.int8)
    y = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32))(a, b)
    want = np.asarray(a).astype(np.int64) @ np.asarray(b).astype(np.int64)
    assert y.dtype == jnp.int32 and np.array_equal(y, want)


@NETWORKS
def test_lift_without_leaves_changes_no_bit(name):
    fn, params, x = network(name)
    assert np.array_equal(jax.jit(lift(fn))(params, x), jax.jit(fn)(params, x))


@NETWORKS
@pytest.mark.parametrize("fmt", [int8, int4], ids=lambda f: f.name)
def test_weights_in_few_bits_multiply_as_what_they_stand_for(name, fmt):
    fn, params, x = network(name)
    small_fn, small = quantize(fn, params, x, formats={"**": fmt})
    want = jax.jit(fn)(dense(small), x)
    assert relative(np.asarray(jax.jit(small_fn)(small, x)), want) < 1e-4


@NETWORKS
def test_products_of_integers_stay_near_those_of_the_dense_weights(name):
    fn, params, x = network(name)
    small_fn, small = quantize(fn, params, x, formats={"**": w8a8})
    y, want = jax.jit(small_fn)(small, x), jax.jit(fn)(dense(small), x)
    assert 1e-5 < relative(np.asarray(y), want) < 0.05


@NETWORKS
def test_integer_products_on_the_gpu_equal_those_on_the_cpu(name):
    fn, params, x = network(name)
    small_fn, small = quantize(fn, params, x, formats={"**": w8a8})
    on_gpu = jax.jit(small_fn)(small, x)
    cpu = jax.local_devices(backend="cpu")[0]
    on_cpu = jax.jit(small_fn)(*jax.device_put((small, x), cpu))
    # Where a value lies between two integers, rounding may go either way.
    assert relative(np.asarray(on_gpu), np.asarray(on_cpu)) < 0.02


@NETWORKS
def test_shrunk_equals_masked(name):
    fn, params, x = network(name)
    halved = zero_half(fn, params, x)
    small_fn, small = shrink(fn, halved, x, keep=0.5)
    sizes = [sum(w.size for w in jax.tree.leaves(p)) for p in (small, params)]
    assert sizes[0] < 0.6 * sizes[1]
    y, want = jax.jit(small_fn)(small, x), jax.jit(fn)(halved, x)
    assert relative(np.asarray(y), want) < 1e-4


@NETWORKS
def test_factors_multiply_as_what_they_stand_for(name):
    fn, params, x = network(name)
    small_fn, small = factorize(fn, params, x, ranks={"**/kernel": 0.25})
    want = jax.jit(fn)(dense(small), x)
    assert relative(np.asarray(jax.jit(small_fn)(small, x)), want) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mixed_precision_learns_digits(dtype):
    train, test = digits()
    model = MLP((64,))
    variables = jax.jit(model.init)(jr.key(0), train.images[:1])
    eval_fn, train_fn = (autocast(f, dtype) for f in forms(model, variables))
    scaler = DynamicLossScale() if dtype == jnp.float16 else None
    tx = optax.adamw(1e-2)
    state = init_state(variables, tx, jr.key(1), scaler=scaler)
    step = make_train_step(classification_loss(train_fn), tx)
    state = fit(step, state, batches(train, 128), steps=60, progress=False)
    assert state.params["params"]["head"]["kernel"].dtype == jnp.float32
    assert accuracy(eval_fn, state.params, test) > 0.85


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    step, state, data = small_run()
    like = jax.eval_shape(lambda: state)
    with Checkpoints(tmp_path) as checkpoints:
        options = {"progress": False, "checkpoint": checkpoints}
        fit(step, state, data(0), steps=10, checkpoint_every=5, **options)
        straight = checkpoints.restore(like, 10)
        # The same compiled step: another compilation may choose other kernels.
        resumed = fit(
            step, checkpoints.restore(like, 5), data(5), steps=10, progress=False
        )
    same = jax.tree.map(np.array_equal, resumed.params, straight.params)
    assert all(jax.tree.leaves(same))


def test_memory_and_energy_are_told_with_their_method():
    x = jr.normal(jr.key(0), (1024, 1024))
    memory = device_memory()
    assert memory.bytes is not None and memory.bytes >= x.nbytes
    product = jax.jit(jnp.matmul)
    energy = measure_energy(lambda: product(x, x), seconds=0.3, rounds=1)
    assert 0 <= energy.low <= energy.joules <= energy.high and energy.method
