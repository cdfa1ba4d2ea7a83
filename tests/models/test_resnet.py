import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.models import params_from_torch, ResNet
from jaxeff.models.resnet import Block
from tests.zoo import draw


def _torch_tensors(depth, width, classes, seed=0):
    """A random state dict of akamaster's ResNet, shapes written out."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def conv_and_norm(prefix, i, c_in, c_out):
        w = rng.normal(0, (9 * c_in) ** -0.5, (c_out, c_in, 3, 3))
        tensors[f"{prefix}conv{i}.weight"] = w
        tensors[f"{prefix}bn{i}.weight"] = rng.uniform(0.5, 1.5, c_out)
        tensors[f"{prefix}bn{i}.bias"] = rng.normal(0, 0.3, c_out)
        tensors[f"{prefix}bn{i}.running_mean"] = rng.normal(0, 0.3, c_out)
        tensors[f"{prefix}bn{i}.running_var"] = rng.uniform(0.5, 1.5, c_out)
        tensors[f"{prefix}bn{i}.num_batches_tracked"] = np.array(7)

    conv_and_norm("", 1, 3, width)
    c_in = width
    for stage in range(3):
        c_out = width * 2**stage
        for block in range((depth - 2) // 6):
            conv_and_norm(f"layer{stage + 1}.{block}.", 1, c_in, c_out)
            conv_and_norm(f"layer{stage + 1}.{block}.", 2, c_out, c_out)
            c_in = c_out
    tensors["linear.weight"] = rng.normal(0, 0.3, (classes, c_in))
    tensors["linear.bias"] = rng.normal(0, 0.3, classes)
    return {k: v.astype(np.float32) for k, v in tensors.items()}


def _torch_forward(t, x):
    """The network as PyTorch computes it: NCHW, OIHW, explicit padding."""

    def conv_and_norm(prefix, i, x, stride=1):
        w = jnp.asarray(t[f"{prefix}conv{i}.weight"])
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = jax.lax.conv_general_dilated(x, w, (stride, stride), "VALID")
        mean, var, scale, bias = (
            jnp.asarray(t[f"{prefix}bn{i}.{name}"])[None, :, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(conv_and_norm("", 1, x))
    for stage in (1, 2, 3):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in t:
            prefix = f"layer{stage}.{block}."
            down = stage > 1 and block == 0
            y = jax.nn.relu(conv_and_norm(prefix, 1, x, 2 if down else 1))
            y = conv_and_norm(prefix, 2, y)
            if down:
                x = x[:, :, ::2, ::2]
                quarter = y.shape[1] // 4
                x = jnp.pad(x, ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
            x = jax.nn.relu(x + y)
            block += 1
    return x.mean((2, 3)) @ t["linear.weight"].T + t["linear.bias"][None]


# Table 6 of the paper, in millions.
@pytest.mark.parametrize(
    "depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)]
)
def test_parameters_by_depth_are_the_papers(depth, millions):
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(ResNet(depth).init, jr.key(0), x)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert abs(count / 1e6 - millions) <= 0.0101


@pytest.mark.parametrize("depth", [2, 18, 21, 51])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* got {depth}"):
        ResNet(depth).init(jr.key(0), jnp.ones((1, 8, 8, 3)))


def test_with_its_branch_at_zero_a_block_is_its_shortcut(getkey):
    x = jr.uniform(getkey(), (2, 8, 8, 4))
    block = Block(channels=8, stride=2)
    variables = draw(getkey(), jax.eval_shape(block.init, getkey(), x))
    norm = jax.tree.map(jnp.zeros_like, variables["params"]["norm2"])
    variables["params"]["norm2"] = norm
    y = block.apply(variables, x)
    assert jnp.array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert jnp.all(y[..., :2] == 0) and jnp.all(y[..., 6:] == 0)


@pytest.mark.parametrize("depth", [8, 14])
def test_it_computes_what_the_torch_network_computes(depth, getkey):
    tensors = _torch_tensors(depth, width=4, classes=5)
    x = jr.normal(getkey(), (2, 3, 16, 16))
    variables = params_from_torch(tensors, depth=depth)
    model = ResNet(depth, width=4, classes=5)
    got = jax.jit(model.apply)(variables, x.transpose(0, 2, 3, 1))
    assert jnp.allclose(got, _torch_forward(tensors, x), rtol=1e-4, atol=1e-4)


def test_tensors_fill_exactly_the_models_variables():
    variables = params_from_torch(_torch_tensors(20, 16, 10))
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    expected = jax.eval_shape(ResNet(20).init, jr.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )


def _without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: _without(t, "linear.bias"), r"1 are missing .*linear\.bias"),
        (lambda t: {**t, "fc.weight": np.ones(3)}, r"1 unknown .*fc\.weight"),
        (lambda t: {}, "37 tensors; here 37 are missing"),
        (
            lambda t: {**t, "bn1.weight": np.ones(3)},
            r"bn1\.weight must give params/norm1/scale of shape \(4,\), got \(3,\)",
        ),
        (lambda t: {**t, "conv1.weight": np.ones(3)}, r"4 dims .* got shapes \(3,\)"),
    ],
)
def test_other_tensors_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        params_from_torch(change(_torch_tensors(8, 4, 5)), depth=8)
