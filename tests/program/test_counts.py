"""What a uniform half costs, against the figures of Torch-Pruning."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from jaxeff import models, trace
from jaxeff.program import bodies, equations, keep_indices, make_plan, resize

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def torch_pruning_macs(program) -> int:
    """Multiply-adds of one image by Torch-Pruning's convention.

    Its `count_ops_and_params` counts products and convolutions, padding included;
    1 for each element that a bias is added to and 2 for each of a norm, which is 1
    for each product and each sum of the data with what the weights alone make; the
    outputs of ReLU; and the inputs of pools.

    Our own count (`program.costs`) differs: a multiply-add is 2 FLOPs, what falls on
    padding is not counted, a norm costs every operation that it does (the
    subtraction of the mean too, and `rsqrt` apart), and so does each residual
    addition.
    """
    weights = {
        v
        for v, path in zip(program.jaxpr.jaxpr.invars, program.weights, strict=True)
        if path is not None
    }
    total = 0
    for where, eqn, _ in equations(program.jaxpr):
        constant = [isinstance(v, Literal) or v in weights for v in eqn.invars]
        if all(constant):
            weights.update(eqn.outvars)
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if bodies(eqn, where) or all(constant):
            continue
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            total += out.size * kernel.size // kernel.shape[features]
        elif name == "dot_general":
            ((contract, _), _) = eqn.params["dimension_numbers"]
            total += out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contract)
        elif name in ("add", "mul") and sum(constant) == 1 or name == "max":
            total += out.size
        elif name in ("reduce_window_max", "reduce_sum"):
            total += eqn.invars[0].aval.size
    return total


def parameters(variables) -> int:
    """Kernels, biases, and scales and biases of norms; no running statistics."""
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


# Torch-Pruning's examples on torchvision's models, every layer at 50 %: millions of
# multiply-adds before and after, and millions of parameters.
FIGURES = {
    18: ("1822.18", "487.20", "11.690", "3.056"),
    50: ("4121.9", "1068.7", "25.557", "6.918"),
}


@pytest.mark.parametrize("depth", FIGURES)
def test_a_uniform_half_of_a_resnet_counts_as_torch_pruning_counts_it(depth):
    model = models.ImageNetResNet(depth)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    before = trace(model.apply, variables, IMAGE)
    keep = {c.name: np.arange(c.size) < c.size / 2 for c in before.couplings.free}
    small = keep_indices(variables, before.couplings, keep)
    fn = resize(model.apply, make_plan(before.couplings, keep))
    after = trace(fn, small, IMAGE)
    # Neither the three colours nor the thousand classes.
    assert small["params"]["stem"]["conv"]["kernel"].shape == (7, 7, 3, 32)
    assert small["params"]["head"]["kernel"].shape[1] == 1000
    macs, half_macs, size, half_size = FIGURES[depth]
    digits = len(macs.partition(".")[2])
    millions = lambda n, digits: f"{n / 1e6:.{digits}f}"
    assert millions(torch_pruning_macs(before), digits) == macs
    assert millions(torch_pruning_macs(after), digits) == half_macs
    assert millions(parameters(variables), 3) == size
    assert millions(parameters(small), 3) == half_size
