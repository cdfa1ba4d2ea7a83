"""The models of the zoo, built, traced and compiled once for all tests of a process."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.random as jr
import numpy as np
import pytest

from jaxeff.program import Program, trace
from tests.zoo import Case, ZOO


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A model of the zoo."""

    fn: Callable
    params: Any
    args: tuple

    @functools.cached_property
    def program(self) -> Program:
        return trace(self.fn, self.params, *self.args)

    @functools.cached_property
    def jitted(self) -> Callable:
        return jax.jit(self.fn)


@functools.cache
def build(case: Case) -> Built:
    # NumPy: eager JAX would compile a program for each shape that a test cuts.
    fn, params, args = case.build(jr.key(0))
    return Built(fn, *jax.tree.map(np.asarray, (params, args)))


zoo = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


def some(*names: str):
    """Only these cases of the zoo."""
    cases = [case for case in ZOO if case.name in names]
    assert len(cases) == len(names)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
