"""Weights changed one after another, each by what those before it make flow in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxeff import lift
from jaxeff.program import calibrate, change_parts, find_uses, gram, squares
from tests.program.built import build, some
from tests.program.leaves import compress, Scaled
from tests.program.shrinking import distance

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_weight_that_is_given_back_stays_bit_for_bit[nnx_transformer]",
    "test_a_weight_that_is_given_back_stays_bit_for_bit[linen_llama_scan_remat]",
}

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X = draw(4, 6)
PARAMS = {"a": draw(6, 5), "b": draw(5, 6)}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def see(fn, params, *batches, weights, statistic=gram, change=lambda w: w):
    """What each part's update was given, and the new weights."""
    seen = []

    def update(part, w, total):
        seen.append((part, np.asarray(w), jax.tree.map(np.asarray, total)))
        return change(w)

    new = calibrate(
        fn, params, batches, weights=weights, statistic=statistic, update=update
    )
    return seen, new


@some("linen_llama_scan_remat", "nnx_transformer", "equinox_cnn", "plain_lstm")
def test_a_weight_that_is_given_back_stays_bit_for_bit(case):
    model = build(case)
    candidates = find_uses(model.fn, model.params, model.args).candidates.values()
    able = [c.path for c in candidates if not c.reason]
    seen, new = see(model.fn, model.params, model.args, weights=able)
    assert {part.path for part, _, _ in seen} == set(able) and able
    for part, w, total in seen:
        assert w.shape == (part.groups, part.rows, part.cols)
        assert total.shape == (part.groups, part.cols, part.cols)
        eigenvalues = np.linalg.eigvalsh(total)
        assert eigenvalues.min() >= -1e-4 * max(1, eigenvalues.max())
    same = jax.tree.map(np.array_equal, new, model.params)
    assert all(jax.tree.leaves(same))


def test_each_weight_sees_what_the_changed_ones_before_it_make():
    batches = [(X,), (2 * X,)]
    seen, new = see(mlp, PARAMS, *batches, weights=["a", "b"], change=lambda w: w / 2)
    (a, w_a, h_a), (b, w_b, h_b) = seen
    assert (a.path, b.path) == ("a", "b")
    assert np.array_equal(w_a[0], PARAMS["a"].T) and np.array_equal(
        w_b[0], PARAMS["b"].T
    )
    hidden = [np.tanh(x @ PARAMS["a"] / 2) for (x,) in batches]
    assert distance(h_a[0], 5 * X.T @ X) < 1e-5
    assert distance(h_b[0], sum(h.T @ h for h in hidden)) < 1e-5
    assert np.array_equal(new["b"], PARAMS["b"] / 2)


def test_the_squares_are_the_diagonal_of_the_gram():
    (_, _, norms), (_, _, h) = (
        see(mlp, PARAMS, (X,), weights=["a"], statistic=s)[0][0]
        for s in (squares, gram)
    )
    assert distance(norms[0], np.diagonal(h[0])) < 1e-6


STACKED = {name: np.stack([w, w * 2, w * 3]) for name, w in PARAMS.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "remat"])
def test_a_scan_is_changed_as_the_loop_it_stands_for(wrap, reverse):
    def scanned(params, x):
        body = wrap(lambda x, p: (mlp(p, x), jnp.sum(x)))
        y, sums = lax.scan(body, x, params, reverse=reverse)
        return y, sums

    def looped(params, x):
        for i in range(3)[::-1] if reverse else range(3):
            x = mlp(params[i], x)
        return x

    loop = [{n: w[i] for n, w in STACKED.items()} for i in range(3)]
    paths = [f"{i}/{n}" for i in range(3) for n in "ab"]
    change = lambda w: jnp.where(jnp.abs(w) < 0.5, 0, w)
    _, want = see(looped, loop, (X,), weights=paths, change=change)
    seen, got = see(scanned, STACKED, (X,), weights=["a", "b"], change=change)
    assert [part.index for part, _, _ in seen] == [0, 0, 1, 1, 2, 2]
    for name in "ab":
        assert np.array_equal(got[name], np.stack([layer[name] for layer in want]))


def test_the_turns_of_a_scan_are_compiled_once(monkeypatch):
    from jaxeff.program import straight

    compiled = []
    runner = straight._runner
    monkeypatch.setattr(
        straight, "_runner", lambda *a: compiled.append(a) or runner(*a)
    )
    fn = lambda p, x: lax.scan(lambda x, p: (mlp(p, x), None), x, p)[0]
    many = {n: np.concatenate([w] * 4) for n, w in STACKED.items()}
    counts = []
    for params in (STACKED, many):
        compiled.clear()
        see(fn, params, (X,), weights=["a", "b"])
        counts.append(len(compiled))
    assert counts[0] == counts[1]


def test_uses_of_one_weight_are_added_however_they_see_it():
    def fn(p, x):
        y = jnp.tanh(x @ p["w"])
        y = jnp.tanh(y @ p["w"].T.reshape(6, 2, 3).reshape(6, 6).T)
        split = p["w"].T.reshape(6, 2, 3)
        y = jnp.tanh(jnp.einsum("hds,bds->bh", split, y.reshape(4, 2, 3)))
        # The inputs in another order: the sums are in that of the first use.
        w = p["w"].reshape(2, 3, 6).transpose(1, 0, 2).reshape(6, 6)
        return y.reshape(4, 2, 3).transpose(0, 2, 1).reshape(4, 6) @ w

    w = draw(6, 6) / 2
    ((part, _, total),) = see(fn, {"w": w}, (X,), weights=["w"])[0]
    inputs = [X]
    for _ in range(3):
        inputs.append(np.tanh(inputs[-1] @ w))
    assert part.cols == 6
    assert distance(total[0], sum(x.T @ x for x in inputs)) < 1e-5


def test_a_fused_weight_is_changed_part_by_part():
    def fn(p, x):
        q, k = jnp.split(x @ p["qk"], 2, axis=-1)  # a cut of the output: one part
        u, v = jnp.split(p["uv"], 2, axis=-1)  # a cut of the weight: two
        return (q * k) @ u, jnp.sin(q) @ v

    params = {"qk": draw(6, 10), "uv": draw(5, 8)}
    seen, new = see(fn, params, (X,), weights=["qk", "uv"], change=lambda w: 2 * w)
    assert [part.path for part, _, _ in seen] == ["qk", "uv", "uv"]
    q, k = np.split(X @ params["qk"] * 2, 2, axis=-1)
    assert distance(seen[1][2][0], (q * k).T @ (q * k)) < 1e-5
    assert distance(seen[2][2][0], np.sin(q).T @ np.sin(q)) < 1e-5
    assert np.array_equal(new["uv"], 2 * params["uv"])


def test_batched_products_are_a_matrix_for_each_index():
    fn = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["experts"])
    x, w = draw(3, 5, 4), draw(3, 4, 2)
    ((part, got, total),) = see(fn, {"experts": w}, (x,), weights=["experts"])[0]
    assert (part.groups, part.rows, part.cols) == (3, 2, 4)
    assert np.array_equal(got, w.transpose(0, 2, 1))
    assert distance(total, np.einsum("eci,ecj->eij", x, x)) < 1e-5


def convolve(x, w, groups=1, **options):
    return lax.conv_general_dilated(
        x,
        w,
        options.pop("strides", (1, 1)),
        options.pop("padding", "SAME"),
        dimension_numbers=options.pop("numbers", ("NHWC", "HWIO", "NHWC")),
        feature_group_count=groups,
        **options,
    )


@pytest.mark.parametrize(
    "shape, groups, options",
    [
        ((3, 3, 4, 6), 1, {}),
        ((3, 2, 4, 6), 1, {"strides": (2, 1), "padding": ((1, 1), (0, 1))}),
        ((3, 3, 2, 6), 2, {}),
        ((3, 3, 1, 8), 4, {"strides": (2, 2)}),  # depthwise, twice the channels
        ((2, 3, 4, 6), 1, {"rhs_dilation": (2, 1)}),
        ((2, 2, 4, 6), 1, {"lhs_dilation": (1, 2), "padding": ((1, 0), (0, 2))}),
        ((6, 4, 3, 2), 1, {"numbers": ("NHWC", "OIHW", "NHWC")}),
        ((6, 4, 3, 2), 1, {"numbers": ("NHWC", "OIWH", "NHWC")}),
        ((4, 3, 2, 6), 1, {"numbers": ("NHWC", "IWHO", "NWHC")}),
    ],
    ids=[
        "plain",
        "strides",
        "groups",
        "depthwise",
        "dilated",
        "upsampled",
        "oihw",
        "oiwh",
        "iwho",
    ],
)
def test_a_convolution_is_a_product_with_patches(shape, groups, options):
    x, w = draw(2, 6, 5, 4), draw(*shape)
    fn = lambda p, x: convolve(x, p["w"], groups, **dict(options))
    ((part, matrix, patches),) = see(
        fn, {"w": w}, (x,), weights=["w"], statistic=lambda x: x
    )[0]
    y = np.einsum("gnc,grc->ngr", patches, matrix).reshape(patches.shape[1], -1)
    want = np.asarray(fn({"w": w}, x))
    # Places of the output are in the order of the kernel's dims of space.
    _, kernel, out = options.get("numbers", ("NHWC", "HWIO", "NHWC"))
    order = ["N", *(c for c in kernel if c in "HW"), "C"]
    want = want.transpose([out.index(c) for c in order])
    assert distance(y, want.reshape(-1, want.shape[-1])) < 1e-5
    assert part.groups == groups


def test_a_weight_cut_at_a_number_that_a_loop_counts_is_found():
    def fn(p, x):
        layer = lambda i: lax.dynamic_index_in_dim(p["w"], i, 0, False)
        turn = lambda x, i: (jnp.tanh(x @ layer(i)), i)
        return lax.scan(turn, x, jnp.arange(3))[0]

    w = draw(3, 6, 6)
    seen, new = see(fn, {"w": w}, (X,), weights=["w"], change=lambda w: w + 1)
    x = X
    for i, (part, got, total) in enumerate(seen):
        assert part.index == i and np.array_equal(got[0], w[i].T)
        assert distance(total[0], x.T @ x) < 1e-5
        x = np.tanh(x @ (w[i] + 1))
    assert np.array_equal(new["w"], w + 1)


def test_compressed_weights_elsewhere_are_multiplied_as_they_are():
    params = compress(PARAMS, Scaled, only=lambda path: path == "a")
    ((_, _, total),) = see(lift(mlp), params, (X,), weights=["b"])[0]
    hidden = np.tanh(X @ PARAMS["a"] * 0.5)
    assert distance(total[0], hidden.T @ hidden) < 1e-5


def test_without_data_the_same_parts_are_changed():
    got = change_parts(
        mlp, PARAMS, X, weights=["a"], update=lambda part, w: w * part.cols
    )
    assert np.array_equal(got["a"], 6 * PARAMS["a"])
    assert np.array_equal(got["b"], PARAMS["b"])


REFUSED = {
    "compressed already": (
        lift(mlp),
        compress(PARAMS, Scaled, only=lambda path: path == "a"),
    ),
    "no product or convolution": (lambda p, x: x @ p["b"].T + p["a"].sum(), PARAMS),
    "no floating-point": (lambda p, x: x @ p["a"], {"a": np.ones((6, 5), np.int32)}),
    "where no run pauses": (
        lambda p, x: lax.while_loop(
            lambda x: x.sum() < 0, lambda x: x @ p["a"] @ p["b"], x
        ),
        PARAMS,
    ),
    "made of weights": (lambda p, x: x @ (p["a"] @ p["b"]), PARAMS),
    "sum over different dims": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"].T, PARAMS),
    "sums over nothing": (lambda p, x: jnp.einsum("bi,jk->bijk", x, p["a"]), PARAMS),
    "groups of examples": (
        lambda p, x: lax.conv_general_dilated(
            x[:, :, None],
            p["a"].reshape(1, 6, 5)[:, :, :4],
            (1,),
            "VALID",
            dimension_numbers=("NCW", "WIO", "NCW"),
            batch_group_count=4,
        ),
        PARAMS,
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_calibrated_is_refused_with_the_reason(reason):
    fn, params = REFUSED[reason]
    assert reason in find_uses(fn, params, (X,)).candidates["a"].reason
    with pytest.raises(ValueError, match=f"a cannot be calibrated: .*{reason}"):
        see(fn, params, (X,), weights=["a"])


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "got no batch"),
        ([(X,), (X[:2],)], "batch 1 has .*(2, 6).*smaller one"),
        ([(X * np.nan,)], "not finite"),
    ],
    ids=["none", "shapes", "nan"],
)
def test_batches_that_cannot_be_used_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        see(mlp, PARAMS, *batches, weights=["a"])


def test_an_update_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="keeps the shape"):
        see(mlp, PARAMS, (X,), weights=["a"], change=lambda w: w[:, :2])
