import jax
import jax.numpy as jnp
import jax.random as jr

from jaxeff.precision import autocast, autocast_report
from jaxeff.precision.rules import PRODUCTS
from jaxeff.program import equations
from tests.zoo import ZOO

CASE = next(c for c in ZOO if c.name == "plain_transformer")


def test_it_counts_every_product_in_the_dtype_it_runs_in():
    fn, params, args = CASE.build(jr.key(0))
    before, after = (autocast_report(f, params, *args) for f in (fn, autocast(fn)))
    jaxpr = jax.make_jaxpr(fn)(params, *args)
    products = sum(e.primitive.name in PRODUCTS for _, e, _ in equations(jaxpr))
    assert before.counts["dot_general"] == {"float32": products}
    assert after.counts["dot_general"] == {"bfloat16": products}
    assert before.casts == {}
    assert set(after.casts) == {"float32 -> bfloat16", "bfloat16 -> float32"}


def test_shapes_are_enough():
    fn, params, args = CASE.build(jr.key(0))
    shapes = jax.eval_shape(lambda *xs: xs, params, *args)
    low = autocast(fn, jnp.float16)
    assert autocast_report(low, *shapes) == autocast_report(low, params, *args)


def test_it_reads_as_a_table_with_products_first():
    fn, params, args = CASE.build(jr.key(0))
    lines = str(autocast_report(autocast(fn), params, *args)).splitlines()
    assert lines[0].split() == ["operation", "bfloat16", "float32"]
    assert lines[1].split()[0] == "dot_general"
    assert lines[-1].endswith("casts float32 -> bfloat16")
