import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.models import GPT
from jaxeff.models.gpt import Block
from jaxeff.parallelism import (
    audit,
    gpipe,
    key_of,
    make_mesh,
    one_f_one_b,
    pipeline,
    Pipelined,
    Stages,
    zero_bubble,
)

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_value_and_gradient_are_those_of_one_device",
}

WIDTH, VOCAB, LENGTH, EXAMPLES, LAYERS = 16, 32, 8, 32, 10


def embed(ends, tokens, key):
    return ends["embed"][tokens[:, :-1]]


def block(w, x, key):
    h = jax.nn.gelu(x @ w["up"])
    if key is not None:
        h = jnp.where(jr.bernoulli(key, 0.9, h.shape), h / 0.9, 0)
    return x + h @ w["down"]


def head(ends, x, tokens):
    logits = x @ ends["embed"].T + ends["bias"][None, None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def problem(layers=LAYERS):
    keys = jr.split(jr.key(0), 4)
    ends = {"embed": jr.normal(keys[0], (VOCAB, WIDTH)) / 4, "bias": jnp.zeros(VOCAB)}
    blocks = {
        "up": jr.normal(keys[1], (layers, WIDTH, 4 * WIDTH)) / 4,
        "down": jr.normal(keys[2], (layers, 4 * WIDTH, WIDTH)) / 8,
    }
    return ends, blocks, jr.randint(keys[3], (EXAMPLES, LENGTH + 1), 0, VOCAB)


def whole(params, tokens, microbatches, key=None):
    """The loss on one device, microbatch by microbatch."""
    ends, blocks = params
    total = 0.0
    for n in range(microbatches):
        part = tokens[n::microbatches]
        x = embed(ends, part, None)
        for i in range(len(blocks["up"])):
            of = None if key is None else key_of(key, n, i)
            x = block(jax.tree.map(lambda a, i=i: a[i], blocks), x, of)
        total += head(ends, x, part) / microbatches
    return total


def near(got, want):
    # Some weights have no gradient, as the bias of a key, but for rounding.
    most = max(np.abs(a).max() for a in jax.tree.leaves(want))

    def check(a, b):
        atol = max(1e-5 * np.abs(b).max(), 1e-7 * most)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)

    jax.tree.map(check, got, want)


def check(
    schedule, *, devices=8, layers=LAYERS, sizes=None, key=None, remat=None, **axes
):
    ends, blocks, tokens = problem(layers)
    mesh = make_mesh(pipe=schedule.devices, **axes, devices=jax.devices()[:devices])
    cut = Stages(schedule, layers if sizes is None else sizes)
    run = jax.jit(pipeline(embed, block, head, cut, mesh, remat=remat))
    params = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    loss, grads = run(params, tokens, key)
    of = jax.jit(jax.value_and_grad(whole), static_argnums=2)
    want, of_whole = of((ends, blocks), tokens, schedule.microbatches, key)
    near(loss, want)
    near((grads.ends, cut.join(grads.stages)), of_whole)


def test_value_and_gradient_are_those_of_one_device():
    check(one_f_one_b(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("remat", [None, False])
@pytest.mark.parametrize(
    "schedule",
    [gpipe(4, 8), one_f_one_b(2, 8, 2), one_f_one_b(1, 4), zero_bubble(4, 8)],
    ids=lambda s: s.name,
)
def test_every_schedule_computes_the_same(schedule, remat):
    check(schedule, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "fsdp"])
def test_a_stage_may_be_sharded_over_another_axis(axis):
    ends, blocks, tokens = problem(4)
    mesh = make_mesh(pipe=2, data=2, **{axis: 2})
    cut = Stages(one_f_one_b(2, 4), 4)
    params = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    on = lambda *dims: NamedSharding(mesh, P("pipe", None, None, *dims))
    put = {"up": on(None, axis), "down": on(axis, None)}
    stages = {name: jax.device_put(params.stages[name], put[name]) for name in put}
    run = pipeline(embed, block, head, cut, mesh)
    loss, grads = run(Pipelined(params.ends, stages), tokens)
    want, of_whole = jax.value_and_grad(whole)((ends, blocks), tokens, 4)
    near((loss, grads.ends, cut.join(grads.stages)), (want, *of_whole))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [one_f_one_b(4, 4), zero_bubble(4, 4)])
def test_stages_may_differ_in_length(schedule):
    check(schedule, layers=7, sizes=(3, 1, 2, 1))


@pytest.mark.parametrize("remat", [True, False])
def test_what_fills_up_a_short_stage_is_finite_where_the_model_is(remat):
    # The first layer overflows on what later ones are given.
    def steep(w, x, key):
        most = jnp.abs(x).max(-1, keepdims=True)
        return 3 * x + 1e-3 * jnp.exp(w["rate"] * most)

    mean = lambda ends, x, tokens: (x**2).mean()
    ends, _, tokens = problem()
    ends = jax.tree.map(lambda a: 0.2 * a, ends)
    blocks = {"rate": jnp.zeros(3).at[0].set(40.0)}
    mesh = make_mesh(pipe=2, devices=jax.devices()[:2])
    cut = Stages(one_f_one_b(2, 2), (2, 1))
    split = cut.split(blocks)
    # Nor is it seen what became of the copy since.
    split = {"rate": split["rate"].at[1, 0, 1].set(jnp.nan)}
    run = pipeline(embed, steep, mean, cut, mesh, remat=remat)
    loss, grads = run(cut.place(Pipelined(ends, split), mesh), tokens)

    def one(ends, blocks):
        x = embed(ends, tokens, None)
        for rate in blocks["rate"]:
            x = steep({"rate": rate}, x, None)
        return mean(ends, x, tokens)

    want, of_whole = jax.value_and_grad(one, argnums=(0, 1))(ends, blocks)
    assert jnp.isfinite(want) and grads.stages["rate"][1, 0, 1] == 0
    near((loss, grads.ends, cut.join(grads.stages)), (want, *of_whole))


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_dropout_is_the_same_in_the_backward(remat):
    check(one_f_one_b(4, 8), devices=4, key=jr.key(5), remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 4},
        {"tensor": 4, "data": 1},
        {"tensor": 2, "data": 2},
        {"fsdp": 2, "data": 2},
    ],
    ids=str,
)
def test_other_axes_change_nothing(axes):
    check(one_f_one_b(2, 4), **axes)


@pytest.mark.slow
def test_each_place_on_the_data_axis_draws_its_own_numbers():
    ends, blocks, tokens = problem(2)
    mesh = make_mesh(pipe=2, devices=jax.devices()[:4])
    cut = Stages(one_f_one_b(2, 1), 2)
    # The same examples on both places: without dropout, the same gradient.
    tokens = jnp.concatenate([tokens[:4], tokens[:4]])
    run = jax.jit(pipeline(embed, block, head, cut, mesh))
    params = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    loss = run(params, tokens, jr.key(1))[0]
    parts = []
    for shard in range(2):
        x = embed(ends, tokens[:4], None)
        for i in range(2):
            w = jax.tree.map(lambda a, i=i: a[i], blocks)
            x = block(w, x, key_of(jr.key(1), 0, i, shard))
        parts.append(head(ends, x, tokens[:4]))
    assert abs(parts[0] - parts[1]) > 1e-4
    np.testing.assert_allclose(loss, (parts[0] + parts[1]) / 2, rtol=1e-5)


@pytest.mark.slow
def test_ten_steps_of_a_gpt_are_those_of_one_device():
    model = GPT(VOCAB, LENGTH, WIDTH, n_layers=4, n_heads=2)
    _, _, tokens = problem()
    params = model.init(jr.key(0), tokens[:, :-1])["params"]
    layer = Block(2, 4 * WIDTH)

    def to(params):
        names = [f"layer_{i}" for i in range(4)]
        blocks = jax.tree.map(lambda *a: jnp.stack(a), *(params[n] for n in names))
        return {k: v for k, v in params.items() if k not in names}, blocks

    def first(ends, tokens, key):
        x = ends["embed"]["embedding"][tokens[:, :-1]]
        return x + ends["position"]["embedding"][None, : x.shape[1]]

    def last(ends, x, tokens):
        from flax import linen as nn

        x = nn.LayerNorm().apply({"params": ends["norm"]}, x)
        return head(
            {"embed": ends["embed"]["embedding"], "bias": jnp.zeros(VOCAB)}, x, tokens
        )

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    mesh = make_mesh(pipe=2, data=2, tensor=2)
    cut = Stages(one_f_one_b(2, 4), 4)
    run = pipeline(
        first, lambda w, x, key: layer.apply({"params": w}, x), last, cut, mesh
    )
    tx = optax.sgd(0.3, momentum=0.9)

    def trained(value_and_grad, params):
        @jax.jit
        def step(params, state):
            value, grads = value_and_grad(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        state = tx.init(params)
        for _ in range(10):
            params, state, value = step(params, state)
        return params, value

    ends, blocks = to(params)
    split = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    many, value = trained(run, split)
    one, want = trained(jax.value_and_grad(loss), params)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    near((many.ends, cut.join(many.stages)), to(one))


def compiled(schedule, examples, *, data=1):
    ends, blocks, _ = problem(8)
    mesh = make_mesh(
        pipe=schedule.devices, data=data, devices=jax.devices()[: 4 * data]
    )
    cut = Stages(schedule, 8)
    run = jax.jit(pipeline(embed, block, head, cut, mesh))
    params = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    tokens = jax.ShapeDtypeStruct((examples, LENGTH + 1), jnp.int32)
    return run.lower(params, tokens).compile(), mesh, params


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_microbatches_but_for_gpipe():
    temp = lambda make, m: (
        compiled(make(4, m), 16 * m)[0].memory_analysis().temp_size_in_bytes
    )
    few, many = (temp(one_f_one_b, m) for m in (8, 32))
    # The tokens themselves are there for each microbatch.
    assert many - few <= 24 * 16 * (LENGTH + 1) * 4 * 4
    activation = 16 * LENGTH * WIDTH * 4
    assert temp(gpipe, 32) - temp(gpipe, 8) >= 24 * activation


@pytest.mark.slow
def test_between_stages_only_activations_are_sent_and_gradients_summed_once():
    p, m, examples = 4, 8, 32
    program, mesh, params = compiled(one_f_one_b(p, m), examples, data=2)
    found = audit(program, mesh)
    activation = examples // m // 2 * LENGTH * WIDTH * 4
    assert found.of("collective-permute").bytes == 2 * (m + p - 2) * activation
    size = lambda tree: sum(a.size * 4 for a in jax.tree.leaves(tree))
    ends, stages = size(params.ends), size(params.stages) // p
    loss = 4
    assert found.of("all-reduce", "pipe").bytes == ends + loss
    assert found.of("all-reduce", "data").bytes == ends + stages + loss
    assert {c.kind for c in found.collectives} == {"all-reduce", "collective-permute"}


def test_layers_come_back_as_they_were():
    blocks = {"w": jnp.arange(14.0).reshape(7, 2)}
    for cut in (
        Stages(one_f_one_b(2, 4), 7),
        Stages(one_f_one_b(2, 4, 3), 7),
        Stages(one_f_one_b(2, 4), [5, 2]),
    ):
        assert (cut.join(cut.split(blocks))["w"] == blocks["w"]).all()
    assert Stages(one_f_one_b(2, 4), np.array([5, 2])).sizes == (5, 2)
    assert Stages(one_f_one_b(2, 4, 3), 7).sizes == (2, 1, 1, 1, 1, 1)
    # Device 0 has the stages 0, 2 and 4.
    held = Stages(one_f_one_b(2, 4, 3), 7).split(blocks)["w"][0, :, 0, 0]
    assert held.tolist() == [0.0, 6.0, 10.0]


@pytest.mark.parametrize("layers", [3, (1, 2, 0, 4), (2, 2)])
def test_a_stage_without_a_layer_is_an_error(layers):
    with pytest.raises(ValueError, match="each of the 4 stages has 1 layer or more"):
        Stages(one_f_one_b(4, 4), layers)


@pytest.mark.parametrize("vocabulary", [8, VOCAB, 512])
def test_no_other_lengths_of_stages_are_better_balanced(vocabulary):
    _, blocks, tokens = problem()
    ends = {"embed": jnp.ones((vocabulary, WIDTH)), "bias": jnp.zeros(vocabulary)}
    found = Stages.balanced(
        one_f_one_b(4, 8), embed, block, head, ends, blocks, tokens
    ).sizes
    layer = 2 * 2 * WIDTH * 4 * WIDTH * EXAMPLES * LENGTH
    after = 2 * vocabulary * WIDTH * EXAMPLES * LENGTH

    def heaviest(sizes):
        return max(*(n * layer for n in sizes), sizes[-1] * layer + after)

    ends_of = itertools.combinations(range(1, LAYERS), 3)
    others = [np.diff([0, *e, LAYERS]).tolist() for e in ends_of]
    assert sum(found) == LAYERS
    # Only products are counted here.
    assert heaviest(found) <= 1.05 * min(map(heaviest, others))


def test_sizes_that_do_not_fit_are_an_error():
    ends, blocks, tokens = problem(4)
    mesh = make_mesh(pipe=2, devices=jax.devices()[:4])
    cut = Stages(one_f_one_b(2, 4), 4)
    with pytest.raises(ValueError, match="stages have 4 layers in all, .* has 3"):
        cut.split(jax.tree.map(lambda a: a[:3], blocks))
    with pytest.raises(ValueError, match="for 4 devices, but the axis pipe .* has 2"):
        pipeline(embed, block, head, Stages(one_f_one_b(4, 4), 4), mesh)
    params = Pipelined(ends, cut.split(blocks))
    run = pipeline(embed, block, head, cut, mesh)
    with pytest.raises(ValueError, match="multiple of 8"):
        run(params, tokens[:12])
    with pytest.raises(ValueError, match="the same first dim, of 1 example or more"):
        run(params, tokens[:0])
    with pytest.raises(ValueError, match="the same first dim"):
        run(params, {"x": tokens, "y": tokens[:16]})
    with pytest.raises(ValueError, match="ZB-H1 cuts a backward in two"):
        pipeline(embed, block, head, Stages(zero_bubble(2, 4), 4), mesh, remat=True)
    wider = lambda w, x, key: jnp.concatenate([x, x], -1)
    with pytest.raises(ValueError, match="a layer of a pipeline gives what"):
        pipeline(embed, wider, head, cut, mesh)(params, tokens)
    with pytest.raises(ValueError, match=r"Pipelined\(ends, stages\), but .* a tuple"):
        run((ends, params.stages), tokens)
    other = Stages(one_f_one_b(2, 4), (3, 1)).split(blocks)
    for stages in (other, blocks):
        with pytest.raises(ValueError, match=r"most layers\) = \(2, 1, 2\), but "):
            run(Pipelined(ends, stages), tokens)
    two = lambda *of: (embed(*of), 0)
    with pytest.raises(ValueError, match="one array, but embed gives a tuple"):
        pipeline(two, block, head, cut, mesh)(params, tokens)
    row = lambda ends, x, tokens: x.mean((0, 1))
    with pytest.raises(ValueError, match=r"a number, but this has the shape \(16,\)"):
        pipeline(embed, block, row, cut, mesh)(params, tokens)
    counted = Pipelined(ends | {"count": jnp.int32(3)}, params.stages)
    with pytest.raises(ValueError, match="every weight, but ends/count is int32"):
        run(counted, tokens)
