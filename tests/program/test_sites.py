import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from flax import linen as nn, nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxeff import functional, models, trace
from tests.program.built import build, zoo

X = jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)


def sites(fn, params, *args):
    return trace(fn, params, *args).sites


def roles(site):
    return site.contract, site.output, site.batch


def only(fn, params, *args):
    """The one site of a function, by the dims of its weight."""
    (site,) = sites(fn, params, *args)
    return roles(site)


def weight(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# One weight, seen in every way.


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("dhk")])
@pytest.mark.parametrize("left", [True, False], ids=["weight first", "weight second"])
def test_an_einsum_in_any_order(order, left):
    sizes = {"d": 6, "h": 2, "k": 3}
    w, x = order, "bsd"
    pattern = f"{w},{x}->bshk" if left else f"{x},{w}->bshk"
    fn = lambda w, x: jnp.einsum(pattern, *((w, x) if left else (x, w)))
    contract, output, batch = only(fn, weight(*(sizes[c] for c in order)), X)
    assert contract == (w.index("d"),)
    assert output == tuple(i for i, c in enumerate(w) if c != "d")
    assert batch == ()


EINSUMS = {
    # pattern: shape, (contract, output, batch)
    "bsd,de->bse": ((6, 5), ((0,), (1,), ())),
    "bsd,ed->bse": ((5, 6), ((1,), (0,), ())),
    "bsd,sde->bse": ((4, 6, 5), ((1,), (2,), (0,))),
    "bsd,esd->be": ((5, 4, 6), ((1, 2), (0,), ())),
    "bsd,sd->bs": ((4, 6), ((1,), (), (0,))),
    "bsd,d->bs": ((6,), ((0,), (), ())),
    "bsd,te->bsdte": ((4, 6), ((), (0, 1), ())),
}


@pytest.mark.parametrize("pattern", EINSUMS)
def test_dims_that_are_contracted_kept_and_batched(pattern):
    shape, want = EINSUMS[pattern]
    assert only(lambda w, x: jnp.einsum(pattern, x, w), weight(*shape), X) == want


VIEWS = {
    "transposed": lambda w, x: x @ w.T,
    "split and merged": lambda w, x: x @ w.reshape(5, 2, 3).reshape(5, 6).T,
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T,
    "sliced": lambda w, x: x @ w[:3].T,
    "reversed": lambda w, x: x @ w[::-1].T,
    "behind a barrier": lambda w, x: _behind_a_barrier(w, x),
    "split": lambda w, x: x @ jnp.split(w, [2])[1].T,
    "in a jit": lambda w, x: jax.jit(lambda w: x @ w.T)(w),
    "in a remat": lambda w, x: jax.checkpoint(lambda w, x: x @ w.T)(w, x),
    "in a custom_vjp": lambda w, x: _own(w, x),
    "as a constant of a scan": lambda w, x: lax.map(lambda x: x @ w.T, x),
    "in both branches": lambda w, x: lax.cond(True, lambda: x @ w.T, lambda: x @ w.T),
}


def _behind_a_barrier(w, x):
    x, w = lax.optimization_barrier((x, w))
    return x @ w.T


@jax.custom_vjp
def _own(w, x):
    return x @ w.T


_own.defvjp(lambda w, x: (_own(w, x), None), lambda r, g: (None, None))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_weight_is_that_weight(name):
    found = sites(VIEWS[name], weight(5, 6), X)
    assert {roles(site) for site in found} == {((1,), (0,), ())}
    assert len(found) == (2 if name == "in both branches" else 1)


NO_SITE = {
    "computed": lambda w, x: x @ jnp.tanh(w).T,
    "added": lambda w, x: x[..., :5] + w[:4, :5][None],
    "carried by a scan": lambda w, x: lax.scan(lambda w, x: (-w, x @ w.T), w, x)[1],
    "in a shard_map": lambda w, x: jax.shard_map(
        lambda w, x: x @ w.T,
        mesh=jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("a")),
        out_specs=P("a"),
    )(w, x),
    "convolved": lambda w, x: (
        lax.conv(w[None, None], x[:1], (1, 1), "SAME") if x.ndim == 4 else w
    ),
}


@pytest.mark.parametrize("name", NO_SITE)
def test_what_is_not_the_weight_itself_is_no_site(name):
    assert sites(NO_SITE[name], weight(5, 6), X) == []


def test_a_scan_takes_slices_along_a_batch_dim():
    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    (site,) = sites(fn, weight(3, 6, 6), X)
    assert roles(site) == ((1,), (2,), (0,))
    assert site.times == 3 and site.flops == 3 * 2 * 8 * 6 * 6

    def twice(w, x):
        return lax.scan(lambda x, w: (fn(w, x), None), x, w.reshape(2, 3, 6, 6))[0]

    (site,) = sites(twice, weight(6, 6, 6), X)
    assert roles(site) == ((1,), (2,), (0,)) and site.times == 6


def test_a_loop_of_unknown_length_has_sites_of_unknown_times():
    def fn(w, x):
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    (site,) = sites(fn, weight(6, 6), X)
    assert site.times is None and site.flops == 2 * 8 * 6 * 6


def test_both_operands_may_be_weights():
    found = sites(lambda p: p["a"] @ p["b"].T, {"a": weight(2, 3), "b": weight(4, 3)})
    assert [(s.path, s.weight, *roles(s)) for s in found] == [
        ("a", 0, (1,), (0,), ()),
        ("b", 1, (1,), (0,), ()),
    ]
    assert len({s.name for s in found}) == 2


def test_a_tied_weight_is_looked_up_and_multiplied():
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    look, product = sites(lambda e, t: jnp.tanh(e[t]) @ e.T, weight(7, 5), tokens)
    assert (look.primitive, roles(look)) == ("gather", ((), (1,), (0,)))
    assert (product.primitive, roles(product)) == ("dot_general", ((1,), (0,), ()))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_look_up_along_any_dim(axis):
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    fn = lambda w, t: jnp.take(w, t, axis=axis)
    rest = tuple(d for d in range(3) if d != axis)
    assert only(fn, weight(4, 5, 6), tokens) == ((), rest, (axis,))


CONVOLUTIONS = {
    # layout: shape of x and w, (contract, output)
    ("NHWC", "HWIO"): ((2, 5, 6, 3), (3, 2, 3, 4), ((0, 1, 2), (3,))),
    ("NCHW", "OIHW"): ((2, 3, 5, 6), (4, 3, 3, 2), ((1, 2, 3), (0,))),
    ("NHWC", "OHWI"): ((2, 5, 6, 3), (4, 3, 2, 3), ((1, 2, 3), (0,))),
    ("HWNC", "IOWH"): ((5, 6, 2, 3), (3, 4, 2, 3), ((0, 2, 3), (1,))),
}


@pytest.mark.parametrize("layout", CONVOLUTIONS, ids="-".join)
def test_a_convolution_in_any_layout(layout):
    x, w, (contract, output) = CONVOLUTIONS[layout]

    def fn(w, x):
        numbers = (*layout, layout[0])
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    (site,) = sites(fn, weight(*w), weight(*x))
    assert roles(site) == (contract, output, ())
    assert site.primitive == "conv_general_dilated" and site.weight == 1


# The same layers in every library.


def linen(layer, x):
    return layer.apply, jax.eval_shape(layer.init, jr.key(0), x), x


def test_linen_layers():
    found = {
        "dense": only(*linen(nn.Dense(5), X)),
        "two dims in, two out": only(
            *linen(nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False), X)
        ),
        "einsum": only(*linen(nn.Einsum((6, 5), "bsd,de->bse", use_bias=False), X)),
        "convolution": only(*linen(nn.Conv(5, (3,)), X)),
        "depthwise": only(*linen(nn.Conv(6, (3,), feature_group_count=6), X)),
        "transposed": only(*linen(nn.ConvTranspose(5, (3,)), X)),
    }
    assert found == {
        "dense": ((0,), (1,), ()),
        # Flax flattens the kernel, multiplies and reshapes back.
        "two dims in, two out": ((0, 1), (2, 3), ()),
        "einsum": ((0,), (1,), ()),
        "convolution": ((0, 1), (2,), ()),
        "depthwise": ((0, 1), (2,), ()),
        "transposed": ((0, 1), (2,), ()),
    }


def test_attention_is_the_same_in_linen_nnx_and_plain_jax():
    def plain(p, x):
        q, k, v = (jnp.einsum("bsd,dhk->bshk", x, p[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
        y = jnp.einsum("bhqt,bthk->bqhk", a, v)
        return jnp.einsum("bqhk,hkd->bqd", y, p["out"])

    shapes = {n: weight(6, 2, 3) for n in "qkv"} | {"out": weight(2, 3, 6)}
    layer = nn.MultiHeadDotProductAttention(num_heads=2)
    module = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    )
    found = [
        [roles(s) for s in sites(plain, shapes, X)],
        [roles(s) for s in sites(*linen(layer, X))],
        [roles(s) for s in sites(*functional(module), X)],
    ]
    into, out = ((0,), (1, 2), ()), ((0, 1), (2,), ())
    assert found[0] == found[1] == found[2] == [into, into, into, out]


def test_a_scanned_model_has_the_sites_of_the_looped_one_with_a_batch_dim():
    config = models.LlamaConfig(17, d_model=16, hidden=24, n_layers=2, n_heads=4)
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    loop, scan = (
        sites(*linen(models.Llama(config, scan=s), tokens)) for s in (False, True)
    )

    def by_layer(found):
        out = {}
        for s in found:
            out.setdefault(s.path.replace("layer_0", "layers"), []).append(s)
        return {k: v for k, v in out.items() if "layer_1" not in k}

    loop, scan = by_layer(loop), by_layer(scan)
    assert loop.keys() == scan.keys()
    for path, (s, *_) in scan.items():
        shift = int("layers" in path)
        moved = lambda dims, shift=shift: tuple(d + shift for d in dims)
        (other, *_) = loop[path]
        assert s.contract == moved(other.contract) and s.output == moved(other.output)
        assert s.batch == ((0,) if shift else ()) + moved(other.batch)
        assert s.flops == other.flops * (2 if shift else 1)


@zoo
def test_the_dims_of_a_site_are_all_dims_of_its_weight(case):
    program = build(case).program
    names = [site.name for site in program.sites]
    assert names and len(set(names)) == len(names)
    for site in program.sites:
        dims = [*site.contract, *site.output, *site.batch]
        assert sorted(dims) == list(range(program.shapes[site.path].ndim))
        assert site.source.count(":") == 1


def test_every_kernel_and_table_of_the_zoo_has_a_site():
    from tests.zoo import ZOO

    for case in ZOO:
        program = build(case).program
        found = {site.path for site in program.sites}
        for path, aval in program.shapes.items():
            is_kernel = path.split("/")[-1] in ("kernel", "embedding")
            if is_kernel:
                assert path in found, (case.name, path, aval)


def test_the_source_is_the_line_of_the_model():
    def fn(w, x):
        return x @ w  # here

    (site,) = sites(fn, weight(6, 5), X)
    line = fn.__code__.co_firstlineno + 1
    assert site.source == f"test_sites.py:{line} (fn)"
