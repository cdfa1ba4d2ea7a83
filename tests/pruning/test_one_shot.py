"""One-shot pruning of whole functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxeff.pruning import prunable, prune_magnitude, sparsegpt, wanda
from tests.program.leaves import compress, Scaled

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
MIX = jnp.eye(16) + draw(16, 16) / 4  # each input resembles others
BATCHES = [(draw(32, 16) @ MIX,) for _ in range(2)]
X = jax.ShapeDtypeStruct((1, 16), jnp.float32)
PARAMS = {"a": draw(16, 24), "bias": draw(24), "b": draw(24, 16)}
DATA = {
    "magnitude": lambda *a, batches, **k: prune_magnitude(*a, **k),
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}
methods = pytest.mark.parametrize("method", DATA.values(), ids=list(DATA))


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]


def numpy_wanda(w, x, sparsity):
    """The paper's listing; `w` is (outputs, inputs)."""
    metric = np.abs(w) * np.sqrt((x * x).sum(0))
    order = np.argsort(metric, axis=1, kind="stable")
    pruned = order[:, : int(w.shape[1] * sparsity)]
    out = w.copy()
    np.put_along_axis(out, pruned, 0, axis=1)
    return out


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_wanda_agrees_with_numpy(sparsity):
    fn, new = wanda(mlp, PARAMS, X, batches=BATCHES, sparsity=sparsity)
    x = np.concatenate([np.asarray(x) for (x,) in BATCHES])
    a = numpy_wanda(np.asarray(PARAMS["a"]).T, x, sparsity).T
    hidden = np.maximum(x @ a + np.asarray(PARAMS["bias"]), 0)
    b = numpy_wanda(np.asarray(PARAMS["b"]).T, hidden, sparsity).T
    assert fn is mlp
    assert np.array_equal(new["a"], a) and np.array_equal(new["b"], b)
    assert new["bias"] is PARAMS["bias"]


@methods
def test_each_weight_loses_its_exact_share(method):
    _, new = method(mlp, PARAMS, X, batches=BATCHES, sparsity=0.5)
    for name in "ab":
        assert int((new[name] == 0).sum()) == 16 * 24 // 2


@methods
def test_n_of_each_m_inputs_stay(method):
    _, new = method(mlp, PARAMS, X, batches=BATCHES, sparsity="2:4")
    for name in "ab":
        groups = np.asarray(new[name]).T.reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()


@methods
def test_sparsity_0_changes_nothing(method):
    _, new = method(mlp, PARAMS, X, batches=BATCHES, sparsity=0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, new, PARAMS)))


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_on_the_calibration_data_sparsegpt_errs_least(sparsity):
    def error(method):
        _, new = method(mlp, PARAMS, X, batches=BATCHES, sparsity=sparsity, only="a")
        change = new["a"] - PARAMS["a"]
        return sum(float(jnp.sum((x @ change) ** 2)) for (x,) in BATCHES)

    errors = {name: error(method) for name, method in DATA.items()}
    assert errors["sparsegpt"] < 0.9 * min(errors["magnitude"], errors["wanda"])


def test_wanda_by_layer_prunes_int_of_the_whole():
    squares = sum((x**2).sum(0) for (x,) in BATCHES)
    score = np.abs(PARAMS["a"]) * np.sqrt(squares)[:, None]
    _, new = wanda(mlp, PARAMS, X, batches=BATCHES, only="a", compare="layer")
    zero = np.asarray(new["a"] == 0)
    assert zero.sum() == 16 * 24 // 2
    assert score[zero].max() <= score[~zero].min()
    with pytest.raises(ValueError, match="'output' or of a whole 'layer'"):
        wanda(mlp, PARAMS, X, batches=BATCHES, compare="row")


@methods
def test_a_scan_is_pruned_as_a_loop(method):
    def looped(p, x):
        for layer in p:
            x = x + mlp(layer, x)
        return x

    def scanned(p, x):
        return lax.scan(lambda x, layer: (x + mlp(layer, x), None), x, p)[0]

    layers = [{"a": draw(16, 24), "bias": draw(24), "b": draw(24, 16)} for _ in "12"]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    _, loop = method(looped, layers, X, batches=BATCHES, only="*/{a,b}")
    _, scan = method(scanned, stacked, X, batches=BATCHES, only=["a", "b"])
    want = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    for name in "ab":
        assert np.array_equal(scan[name] == 0, want[name] == 0)
        assert np.abs(np.asarray(scan[name]) - want[name]).max() < 1e-4


@methods
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_pruned_as_a_product_with_patches(method, groups):
    images = draw(6, 7, 5, 4)
    kernel = draw(3, 2, 4 // groups, 6)
    convolve = lambda p, x: lax.conv_general_dilated(
        x,
        p["w"],
        (2, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    rows = []
    for i in range(0, 5, 2):
        for j in range(4):
            rows.append(np.asarray(images[:, i : i + 3, j : j + 2]))
    patches = np.stack(rows).reshape(-1, 6, groups, 4 // groups)
    patches = patches.transpose(2, 0, 1, 3).reshape(groups, len(patches), -1)
    dense = np.asarray(kernel).reshape(-1, groups, 6 // groups).transpose(1, 0, 2)
    product = lambda p, x: jnp.einsum("gni,gio->gno", x, p["w"])
    _, conv = method(convolve, {"w": kernel}, images, batches=[(images,)])
    data = (jnp.asarray(patches),)
    _, flat = method(product, {"w": jnp.asarray(dense)}, *data, batches=[data])
    want = np.asarray(flat["w"]).transpose(1, 0, 2).reshape(kernel.shape)
    assert np.array_equal(conv["w"] == 0, want == 0)
    assert np.abs(np.asarray(conv["w"]) - want).max() < 1e-4


def tied(p, tokens):
    x = p["embed"][tokens]
    return jnp.tanh(x @ p["w"]) @ p["embed"].T


TIED = {"embed": draw(7, 4), "w": draw(4, 4), "scale": draw(4)}
TOKENS = jnp.asarray(RNG.integers(0, 7, (3, 5)))


def test_what_is_looked_up_stays_unless_it_is_named():
    reasons = prunable(tied, TIED, TOKENS)
    assert reasons["w"] == "" and "looked up too" in reasons["embed"]
    assert "no product" in reasons["scale"]
    batches = [(TOKENS,)]
    _, new = wanda(tied, TIED, TOKENS, batches=batches)
    assert new["embed"] is TIED["embed"]
    _, new = wanda(tied, TIED, TOKENS, batches=batches, only="embed")
    assert ((new["embed"] == 0).sum(1) == 2).all() and new["w"] is TIED["w"]


@methods
def test_half_precision_stays_half_precision(method):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batches = [(x.astype(jnp.bfloat16),) for (x,) in BATCHES]
    _, new = method(mlp, params, *batches[0], batches=batches)
    assert new["a"].dtype == jnp.bfloat16
    assert int((new["a"] == 0).sum()) == 16 * 24 // 2


@methods
@pytest.mark.parametrize(
    "params, options, message",
    [
        (PARAMS, {"only": "c"}, "matches none of the 3 weights"),
        (PARAMS, {"only": "bias"}, "prunes none of the 1 .*no product"),
        (PARAMS, {"sparsity": 1.0}, "in \\[0, 1\\), got 1.0"),
        (PARAMS, {"sparsity": "2:5"}, "16 inputs are no multiple of 5"),
        (compress(PARAMS, Scaled), {}, "compressed already"),
    ],
    ids=["nothing", "bias", "all", "2:5", "leaves"],
)
def test_what_would_do_nothing_is_an_error(method, params, options, message):
    with pytest.raises(ValueError, match=message):
        method(mlp, params, X, batches=BATCHES, **options)


@pytest.mark.parametrize("method", [wanda, sparsegpt])
def test_shapes_and_bare_arrays_are_one_clear_line(method, tmp_path):
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="needs the values of the weights, but a is"):
        method(mlp, shapes, X, batches=BATCHES)
    with pytest.raises(ValueError, match="a batch is a tuple of arguments"):
        method(mlp, PARAMS, X, batches=iter([BATCHES[0][0]]), resume=tmp_path)


@pytest.mark.parametrize("options", [{"block": 0}, {"damping": 0.0}], ids=str)
def test_sparsegpt_refuses_what_has_no_meaning(options):
    with pytest.raises(ValueError, match="block >= 1 and damping > 0"):
        sparsegpt(mlp, PARAMS, X, batches=BATCHES, **options)
