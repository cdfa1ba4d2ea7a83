import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff import lowrank, quantization, tree
from jaxeff.models import build
from jaxeff.parallelism import (
    audit,
    batch_sharding,
    fully_shard,
    make_mesh,
    shard,
)
from jaxeff.program import lift
from tests.parallelism.models import loss_problem, MODELS, near, ten_steps

SLOW = {
    f"test_value_gradient_and_ten_steps_are_those_of_one_device[{name}]"
    for name in ("bert", "llama", "llama scanned", "vit", "resnet20", "mobilenet")
} | {
    "test_weights_and_gradients_take_a_part_of_the_memory",
    "test_over_tensor_and_fsdp_a_weight_is_split_twice",
    "test_compressed_weights_are_gathered_compressed[quantized]",
    "test_weights_are_gathered_twice_and_gradients_summed_once[llama scanned]",
    "test_an_axis_of_one_device_splits_nothing",
}


def problem(name):
    return loss_problem(name, examples=8)


@pytest.mark.parametrize("name", MODELS)
def test_value_gradient_and_ten_steps_are_those_of_one_device(name):
    loss, params, x = problem(name)
    mesh = make_mesh(fsdp=4, data=2)
    fn, placed = fully_shard(loss, params, x, mesh=mesh, least=0)
    shared = jax.device_put(x, batch_sharding(mesh, len(x)))
    *got, new = ten_steps(fn, placed, shared)
    *want, expected = ten_steps(loss, params, x)
    near(got, want)
    near(new, expected)
    for w, start in zip(*map(jax.tree.leaves, (new, placed)), strict=True):
        assert w.sharding.is_equivalent_to(start.sharding, w.ndim)


@pytest.mark.parametrize("name", ["llama", "llama scanned"])
def test_weights_are_gathered_twice_and_gradients_summed_once(name):
    loss, params, x = problem(name)
    mesh = make_mesh(fsdp=8)
    fn, placed = fully_shard(loss, params, x, mesh=mesh, least=64)
    x = jax.device_put(x, batch_sharding(mesh, 8))
    split = sum(w.nbytes for w in jax.tree.leaves(placed) if any(w.sharding.spec))
    every = sum(w.nbytes for w in jax.tree.leaves(params))
    embedding = 64 * 32 * 4  # looked up: its backward needs no weight

    ahead = audit(jax.jit(fn).lower(placed, x).compile(), mesh)
    assert ahead.of("all-gather", "fsdp").bytes == split
    both = audit(jax.jit(jax.grad(fn)).lower(placed, x).compile(), mesh)
    assert both.of("all-gather", "fsdp").bytes == 2 * split - embedding
    # What a TPU scatters as it sums, a CPU sums whole.
    assert both.of("all-reduce", "fsdp").bytes == every
    assert both.bytes == 2 * split - embedding + every


@pytest.mark.parametrize("turns", [2, 5])
def test_a_weight_that_all_turns_share_is_gathered_in_each_of_the_backward(turns):
    def rnn(params, x):
        step = lambda h, x: (jnp.tanh(x + h @ params["again"]), None)
        h, _ = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
        return ((h @ params["once"]) ** 2).mean()

    keys = jr.split(jr.key(0), 3)
    params = {
        n: jr.normal(k, (32, 32))
        for n, k in zip(("again", "once"), keys[:2], strict=True)
    }
    x, size = jr.normal(keys[2], (8, turns, 32)), 4 * 32 * 32
    mesh = make_mesh(fsdp=8)
    spread = jax.device_put(x, batch_sharding(mesh, 8))
    for whole, again in (((), 1 + turns), ("again", 0)):
        fn, placed = fully_shard(rnn, params, x, mesh=mesh, least=64, whole=whole)
        compiled = jax.jit(jax.grad(fn)).lower(placed, spread).compile()
        found = audit(compiled, mesh).of("all-gather", "fsdp")
        assert found.bytes == (2 + again) * size
        near(compiled(placed, spread), jax.grad(rnn)(params, x))


def test_on_tpus_gradients_are_scattered_as_they_are_summed(tpus):
    # Smaller ones TPUs sum whole, many in one message.
    sizes = {"d_model": 128, "n_heads": 8, "n_kv_heads": 8, "hidden": 256}
    model = build("llama", vocab_size=64, n_layers=2, **sizes)
    x = jnp.zeros((8, 16), jnp.int32)
    params = jax.eval_shape(model.init, jr.key(0), x)
    loss = lambda params, x: (model.apply(params, x) ** 2).mean()
    mesh = make_mesh(fsdp=8, devices=tpus("v5e:2x4"))
    fn, placed = fully_shard(loss, params, x, mesh=mesh, least=1024)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, 8))
    out = jax.tree.map(lambda s: s.sharding, placed)
    compiled = jax.jit(jax.grad(fn), out_shardings=out).lower(placed, x).compile()
    found = audit(compiled, mesh)
    arrays = jax.tree.leaves(placed)
    split = sum(4 * s.size for s in arrays if any(s.sharding.spec))
    every = sum(4 * s.size for s in arrays)
    embedding = 4 * 64 * 128  # whose gradient is no product, and summed whole
    assert found.of("reduce-scatter", "fsdp").bytes == split - embedding
    assert found.of("all-reduce", "fsdp").bytes == every - split + embedding
    # Each weight twice, for products in bfloat16: half of its bytes each time.
    assert found.of("all-gather", "fsdp").bytes <= 2 * split


def test_weights_and_gradients_take_a_part_of_the_memory():
    loss, params, x = problem("llama scanned")
    mesh = make_mesh(fsdp=8)
    fn, placed = fully_shard(loss, params, x, mesh=mesh, least=64)
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    x = jax.device_put(x, batch_sharding(mesh, 8))
    sizes = [
        jax.jit(jax.grad(f)).lower(p, x).compile().memory_analysis()
        for f, p in ((fn, placed), (loss, whole))
    ]
    inputs = [s.argument_size_in_bytes for s in sizes]
    assert inputs[0] < inputs[1] / 5
    assert sizes[0].output_size_in_bytes < sizes[1].output_size_in_bytes / 5


def test_over_tensor_and_fsdp_a_weight_is_split_twice():
    loss, params, x = problem("gpt")
    mesh = make_mesh(fsdp=2, tensor=2, data=2)
    fn, placed = shard(loss, params, x, mesh=mesh)
    fn, placed = fully_shard(fn, placed, x, mesh=mesh, least=64)
    twice = [
        w for w in jax.tree.leaves(placed) if {"fsdp", "tensor"} <= {*w.sharding.spec}
    ]
    assert len(twice) >= 2 * 2
    shared = jax.device_put(x, batch_sharding(mesh, 8))
    got = jax.jit(jax.value_and_grad(fn))(placed, shared)
    near(got, jax.jit(jax.value_and_grad(loss))(params, x))


@pytest.mark.parametrize("how", ["quantized", "low rank"])
def test_compressed_weights_are_gathered_compressed(how):
    loss, params, x = problem("gpt")
    if how == "quantized":
        fn, small = quantization.quantize(loss, params, x, formats=quantization.int8)
    else:
        fn, small = lowrank.factorize(loss, params, x, ranks=8)
    mesh = make_mesh(fsdp=4, data=2)
    sharded, placed = fully_shard(fn, small, x, mesh=mesh, least=64)
    shared = jax.device_put(x, batch_sharding(mesh, 8))
    near(jax.jit(sharded)(placed, shared), jax.jit(lift(fn))(small, x))
    found = audit(jax.jit(sharded).lower(placed, shared).compile(), mesh)
    arrays = tree.paths(placed).items()
    split = {path: w.nbytes for path, w in arrays if any(w.sharding.spec)}
    # The embedding is looked up, and multiplied at the end.
    again = sum(n for path, n in split.items() if path.startswith("params/embed/"))
    assert found.of("all-gather", "fsdp").bytes == sum(split.values()) + again


def test_small_weights_and_chosen_ones_stay_whole():
    loss, params, x = problem("gpt")
    mesh = make_mesh(fsdp=8)
    whole = "**/position/**"
    _, placed = fully_shard(loss, params, x, mesh=mesh, least=64, whole=whole)
    specs = {p: any(w.sharding.spec) for p, w in tree.paths(placed).items()}
    assert not specs["params/position/embedding"] and not specs["params/norm/scale"]
    assert specs["params/embed/embedding"]
    with pytest.raises(ValueError, match="no weight can be split among 8 devices"):
        fully_shard(loss, params, x, mesh=mesh, least=10**9)
    with pytest.raises(ValueError, match="the axes data, and none is called fsdp"):
        fully_shard(loss, params, x, mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(ValueError, match="matches none"):
        fully_shard(loss, params, x, mesh=mesh, whole="nothing")


def test_an_axis_of_one_device_splits_nothing():
    loss, params, x = problem("gpt")
    fn, placed = fully_shard(loss, params, x, mesh=make_mesh())
    assert not any(any(w.sharding.spec) for w in jax.tree.leaves(placed))
    near(fn(placed, x), loss(params, x))
