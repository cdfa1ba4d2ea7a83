"""Models rounded with data, weight after weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.program import dense, is_leaf
from jaxeff.quantization import (
    adaround,
    awq,
    Codebook,
    fitting,
    gptq,
    int4,
    int8,
    log4_sqrt2,
    nvfp4,
    QArray,
    quantize,
    uint4,
    unfitted,
    w4a8,
)
from tests.quantization.problems import problem

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_model_is_nearer_than_by_rounding_to_the_nearest"
    "[groups on the way-int4 groups of 8]",
    "test_convolutions_are_rounded_too[int4 per tensor-gptq]",
    "test_convolutions_are_rounded_too[codebook5x3-gptq]",
    "test_convolutions_are_rounded_too[int4-gptq]",
    "test_the_model_is_nearer_than_by_rounding_to_the_nearest[gptq-codebook5x2]",
    "test_codes_that_no_data_tells_of_are_an_error",
    "test_the_model_is_nearer_than_by_rounding_to_the_nearest[gptq-int4]",
    "test_a_scan_is_rounded_as_the_loop_it_stands_for[int4 groups of 8]",
    "test_the_model_is_nearer_than_by_rounding_to_the_nearest[adaround-uint4 groups of 8]",  # noqa: E501
    "test_parts_of_a_fused_weight_keep_the_scales_of_their_own",
    "test_some_weights_only_and_others_in_other_formats",
}

DOTS = {"a": (40, 24), "b": (24, 40)}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        k: jnp.asarray(rng.normal(size=s) / 5, jnp.float32) for k, s in DOTS.items()
    }
    return params, problem(seed=seed)[1]


def off(fn, params, q_fn, q, x):
    y = fn(params, x)
    return float(jnp.linalg.norm(q_fn(q, x) - y) / jnp.linalg.norm(y))


METHODS = {
    "gptq": gptq,
    "adaround": lambda *a, **k: adaround(*a, **k, steps=1000),
    "groups on the way": lambda *a, **k: gptq(*a, **k, static_groups=False),
}
CODEBOOKS = [Codebook(4), Codebook(5, dim=2), Codebook(4, dim=4, stages=2)]
FORMATS = [int4, int4.grouped(8), uint4.grouped(8), log4_sqrt2, nvfp4.grouped(8), w4a8]
FORMATS += CODEBOOKS


FAST = {
    ("gptq", int4),
    ("gptq", CODEBOOKS[1]),
    ("adaround", uint4.grouped(8)),
    ("groups on the way", FORMATS[1]),
}
CASES = [
    pytest.param(m, f, marks=[] if (m, f) in FAST else pytest.mark.slow)
    for m in METHODS
    for f in FORMATS
    if m == "gptq" or f not in CODEBOOKS
    if m != "groups on the way" or (f.scale == "float32" and f.group)
]


@pytest.mark.parametrize("method, fmt", CASES, ids=lambda x: getattr(x, "name", x))
def test_the_model_is_nearer_than_by_rounding_to_the_nearest(method, fmt):
    params, x = make()
    given = {"formats": {"*": fmt}, "batches": [(x[:150],), (x[150:],)]}
    plain = quantize(mlp, params, x, formats={"*": fmt}, fit="mse")
    fitted = METHODS[method](mlp, params, x, **given)
    assert off(mlp, params, *fitted, x) < 0.9 * off(mlp, params, *plain, x)
    # What is stored has the form that rounding to the nearest gives it.
    assert jax.tree.structure(fitted[1]) == jax.tree.structure(plain[1])
    for ours, theirs in zip(*map(jax.tree.leaves, (fitted[1], plain[1])), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def layers(params, x):
    return jax.lax.scan(lambda x, p: (mlp(p, x), None), x, params)[0]


def looped(params, x):
    for p in params:
        x = mlp(p, x)
    return x


STACKS = [
    int4.grouped(8),
    pytest.param(uint4, marks=pytest.mark.slow),
    pytest.param(nvfp4.grouped(8), marks=pytest.mark.slow),
    pytest.param(Codebook(4, dim=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fmt", STACKS, ids=lambda f: f.name)
def test_a_scan_is_rounded_as_the_loop_it_stands_for(fmt):
    loop = [make(seed)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    x = make()[1]
    one = gptq(looped, loop, x, batches=[(x,)], formats={"**": fmt})[1]
    all = gptq(layers, stacked, x, batches=[(x,)], formats={"**": fmt})[1]
    for name in DOTS:
        expected = np.stack([p[name].dense() for p in one])
        np.testing.assert_allclose(all[name].dense(), expected, atol=1e-6)


def fused(params, x):
    q, k = jnp.split(x @ params["w"], 2, axis=1)
    return q * jnp.tanh(k)


def parted(params, x):
    return (x @ params["w"][:, :16]) * jnp.tanh(x @ params["w"][:, 16:])


def test_parts_of_a_fused_weight_keep_the_scales_of_their_own():
    w, x = problem(rows=32)
    params = {"w": w.T}
    whole = gptq(fused, params, x, batches=[(x,)], formats=int4.grouped(8))[1]
    parts = gptq(parted, params, x, batches=[(x,)], formats=int4.grouped(8))[1]
    np.testing.assert_array_equal(whole["w"].dense(), parts["w"].dense())


def halves(params, x):
    """One kernel, cut along its inputs or its outputs: the parts share scales."""
    n = len(params["rows"]) // 2
    h = jnp.tanh(x @ params["rows"][:n] + (3 * x**3) @ params["rows"][n:])
    a, b = jnp.split(params["columns"], 2, axis=1)
    return h @ a + (h**3) @ b


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("fmt", [int4, int4.per_tensor(), nvfp4], ids=lambda f: f.name)
def test_what_is_stored_is_what_was_fitted_where_parts_share_scales(
    fmt, drift, monkeypatch
):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    # The parts that come later have smaller weights, or larger ones.
    sizes = jnp.where(jnp.arange(32) < 16, 1.0, 0.2)[:, None]
    x = draw(64, 16)
    params = {"rows": draw(32, 16) * sizes, "columns": (draw(32, 16) / sizes).T}
    fitted, update = [], fitting.Fitting.update

    def seen(self, part, w, h):
        new = update(self, part, w, h)
        fitted.append((part, new[0]))
        return new

    monkeypatch.setattr(fitting.Fitting, "update", seen)
    _, q = gptq(halves, params, x, batches=[(x,)], formats=fmt, drift=drift)
    assert len(fitted) == 4
    for part, new in fitted:
        stored = q[part.path].dense().reshape(-1)[part.elements]
        np.testing.assert_allclose(stored, new, rtol=1e-5, atol=1e-6)


def conv(params, x):
    y = jax.nn.relu(jax.lax.conv(x, params["a"], (1, 1), "SAME"))
    return jax.lax.conv(y, params["b"], (2, 2), "SAME")


SLOWER = pytest.param("adaround", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", ["gptq", SLOWER])
@pytest.mark.parametrize(
    "fmt", [int4, int4.per_tensor(), Codebook(5, dim=3)], ids=lambda f: f.name
)
def test_convolutions_are_rounded_too(method, fmt):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    params = {"a": draw(8, 3, 3, 3), "b": draw(4, 8, 3, 3)}
    x = jnp.cumsum(draw(8, 3, 9, 9), axis=2) / 3
    if method == "adaround" and isinstance(fmt, Codebook):
        pytest.skip("codes are learned, not rounded to")
    plain = quantize(conv, params, x, formats=fmt, fit="mse")
    fitted = METHODS[method](conv, params, x, formats=fmt, batches=[(x,)])
    # Codes of three weights have little left to make up with.
    least = 0.95 if isinstance(fmt, Codebook) else 0.85
    assert off(conv, params, *fitted, x) < least * off(conv, params, *plain, x)
    assert fitted[1]["a"].scale.shape == plain[1]["a"].scale.shape


def test_codes_that_no_data_tells_of_are_an_error():
    """Two of the three weights of a code are multiplied with one input, one not."""
    params, x = make()
    cut = lambda p, x: x[:, :20] @ p["a"][:20] + jnp.tanh(x[:, 20:]) @ p["a"][20:]
    params = {"a": jnp.pad(params["a"], ((0, 2), (0, 0)))}
    x = jnp.pad(x, ((0, 0), (0, 2)))
    with pytest.raises(ValueError, match="a code of a stands for 3 .* Take dim=1"):
        gptq(cut, params, x, batches=[(x,)], formats=Codebook(4, dim=3))
    whole = gptq(cut, params, x, batches=[(x,)], formats=Codebook(4, dim=2))
    assert whole[1]["a"].format == "codebook4x2"


def test_what_is_looked_up_is_rounded_to_the_nearest_and_told():
    params, x = make()
    tied = lambda p, i: jnp.tanh(p["a"][i] @ p["b"]) @ p["a"]
    params = {"a": params["b"].T[:, :24], "b": params["b"][:, :40]}
    tied = lambda p, i: (p["a"][i] @ p["b"]) @ p["a"]
    ids = jnp.arange(30) % 40
    why = unfitted(tied, params, ids, formats=int4)
    assert list(why) == ["a"] and "looked up too" in why["a"]
    _, q = gptq(tied, params, ids, batches=[(ids,)], formats=int4)
    _, plain = quantize(tied, params, ids, formats=int4, fit="mse")
    np.testing.assert_array_equal(q["a"].dense(), plain["a"].dense())
    assert not np.array_equal(q["b"].dense(), plain["b"].dense())


def test_some_weights_only_and_others_in_other_formats():
    params, x = make()
    formats = {"a": int4, "b": None}
    _, q = gptq(mlp, params, x, batches=[(x,)], formats=formats)
    assert isinstance(q["a"], QArray) and q["b"] is params["b"]
    _, q = gptq(mlp, params, x, batches=[(x,)], formats={"a": Codebook(4), "b": int8})
    assert tree.paths(q, is_leaf)["a"].format == "codebook4"


def test_each_weight_sees_what_the_rounded_ones_before_it_compute():
    params, x = make()
    _, both = gptq(mlp, params, x, batches=[(x,)], formats=int4)
    second = lambda p, h: h @ p["b"]
    h = jnp.tanh(x @ dense(both)["a"])
    _, alone = gptq(second, {"b": params["b"]}, h, batches=[(h,)], formats=int4)
    np.testing.assert_allclose(both["b"].dense(), alone["b"].dense(), atol=1e-6)


BAD = {
    "no data": (gptq, {"batches": []}, "calibration needs data, got no batch"),
    "block": (gptq, {"block": 0}, "block >= 1 and damping > 0, got 0"),
    "fit": (gptq, {"fit": "hqq"}, "by 'absmax' or 'mse', got 'hqq'"),
    "fit of codes": (
        gptq,
        {"fit": "mist", "formats": Codebook(2)},
        "by 'absmax' or 'mse', got 'mist'",
    ),
    "damping": (gptq, {"damping": 0.0}, "got 128 and 0.0: the paper takes"),
    "steps": (adaround, {"steps": 0}, "1 step or more, got 0"),
    "groups": (
        gptq,
        {"formats": nvfp4.grouped(8), "static_groups": False},
        "those of e2m1 groups of 8, e4m3 scales are not here",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    method, options, message = BAD[name]
    params, x = make()
    given = {"batches": [(x,)], "formats": int4, **options}
    with pytest.raises(ValueError, match=message) as e:
        method(mlp, params, x, **given)
    assert "\n" not in str(e.value)


def test_weights_that_are_not_finite_are_told_before_anything_is_fitted(monkeypatch):
    params, x = make()
    params["b"] = params["b"].at[3, 4].set(np.nan)
    monkeypatch.setattr(fitting.Fitting, "update", None)
    with pytest.raises(ValueError, match="^1 of the 960 numbers of b are NaN"):
        gptq(mlp, params, x, batches=[(x,)], formats=int4)


def test_too_few_data_and_too_little_damping_are_told_as_that():
    params, x = make()
    with pytest.raises(ValueError, match="x.T x of its 40 inputs has no inverse"):
        gptq(mlp, params, x, batches=[(x[:4],)], formats=int4, damping=1e-12)


@pytest.mark.parametrize("method", [gptq, adaround, awq])
def test_shapes_and_bare_arrays_are_one_clear_line(method, tmp_path):
    params, x = make()
    shapes = jax.eval_shape(lambda: params)
    message = f"{method.__name__} needs the values of the weights, but a is only"
    with pytest.raises(ValueError, match=message):
        method(mlp, shapes, x, batches=[(x,)], formats=int4)
    more = {} if method is awq else {"resume": tmp_path}
    for batches in ([x], [x[:1]]):  # would be taken for several arguments, or one
        with pytest.raises(ValueError, match="a batch is a tuple of arguments"):
            method(mlp, params, x, batches=iter(batches), formats=int4, **more)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_an_error_that_says_where(bad):
    params, x = make()
    with pytest.raises(ValueError, match="what flows into a at .* is not finite"):
        gptq(mlp, params, x, batches=[(x.at[3, 4].set(bad),)], formats=int4)
