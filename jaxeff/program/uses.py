"""Where a run can pause to see what flows into a weight, and why not elsewhere."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, PyTree

from jaxeff import tree

from .call import Call
from .leaf import is_leaf
from .lift import unlift
from .matrices import Numbering, weight_matrix
from .sites import find_sites, Site
from .source import source_line
from .straight import run_step, Straight


@dataclasses.dataclass(frozen=True)
class Part:
    """A weight as its data meets it, or a part of it: one layer of a stack.

    Attributes:
        path: of the weight.
        index: counts the parts of that weight, in the order they are first used.
        groups, rows, cols: how many matrices, outputs and inputs; a convolution's
            inputs are those of a patch.
        elements: for each entry of the matrices its index in the flattened weight,
            of shape (groups, rows, cols); only for the time of an update.
    """

    path: str
    index: int
    groups: int
    rows: int
    cols: int
    elements: Array | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a part by one step of a straight program."""

    part: Part
    step: int
    eqn: JaxprEqn
    operand: int  # which operand of the equation is the weight
    weight: int  # number of that operand
    data: int  # number of the other one
    last: bool  # whether it is the part's last use

    @property
    def source(self) -> str:
        """Line of code."""
        return source_line(self.eqn)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What calibration can do with one weight.

    Attributes:
        path: of the weight.
        number: of its value in the straight program.
        reason: why it cannot be calibrated; empty if it can.
        looked_up: whether rows of it are looked up too, of which no statistic tells.
        parts: as its data meets it.
    """

    path: str
    number: int
    reason: str = ""
    looked_up: bool = False
    parts: tuple[Part, ...] = ()


class Uses:
    """A straight program, and the uses of some weights in it.

    Attributes:
        program: with calls and scans opened that hold a use.
        weights: the value of each weight by number.
        data: the numbers of what is not a weight.
        fixed: the numbers of what does not depend on data.
        candidates: by path.
        uses: in the order they run, of the candidates without a reason against it.
    """

    def __init__(self, fn: Callable, params: PyTree, args: tuple, only: Any):
        call = Call(unlift(fn), params, args, {})
        sites = find_sites(call.jaxpr, call.weights)
        sites = [s for s in sites if only is None or s.path in only]
        within = {s.where[:n] for s in sites for n in range(len(s.where))}
        self.program = Straight(call.jaxpr, lambda where: where in within)
        numbers = list(zip(self.program.inputs, call.weights, call.inputs, strict=True))
        self.weights = {n: x for n, path, x in numbers if path is not None}
        self.data = [n for n, path, _ in numbers if path is None]
        self.fixed = self.program.fixed(self.data)
        shapes = {n: tuple(x.shape) for n, x in self.weights.items()}
        self._made = {o: s for s in self.program.steps for o in s.outs}
        self._numbering = Numbering(self.program, shapes, self._constant)
        self._first: dict[Part, Use] = {}
        by_path = {path: n for n, path, _ in numbers if path is not None}
        self.candidates: dict[str, Candidate] = {}
        self.uses: list[Use] = []
        steps: dict[tuple, list[int]] = {}
        for i, step in enumerate(self.program.steps):
            steps.setdefault(step.where, []).append(i)
        for path, number in by_path.items():
            if only is None or path in only:
                mine = [s for s in sites if s.path == path]
                self._add(path, number, mine, steps)
        self.uses.sort(key=lambda use: use.step)

    def _add(
        self, path: str, number: int, sites: list[Site], steps: dict[tuple, list[int]]
    ) -> None:
        looked_up = any(s.primitive == "gather" for s in sites)
        sites = [s for s in sites if s.primitive != "gather"]
        found = _why_not(self.weights[number], sites, looked_up, steps)
        if not found:
            found = self._find(path, number, sites, steps)
        if isinstance(found, str):
            self.candidates[path] = Candidate(path, number, found, looked_up)
            return
        parts = tuple(dict.fromkeys(use.part for use in found))
        self.candidates[path] = Candidate(path, number, "", looked_up, parts)
        self.uses += found

    def _find(
        self, path: str, number: int, sites: list[Site], steps: dict[tuple, list[int]]
    ) -> list[Use] | str:
        """The uses of one weight, or why they cannot be calibrated."""
        at = sorted({(i, s.weight) for s in sites for i in steps[s.where]})
        taken = np.zeros(math.prod(self.weights[number].shape), bool)
        parts: dict[bytes, Part] = {}
        uses: list[Use] = []
        for i, operand in at:
            step = self.program.steps[i]
            weight, data = step.ins[operand], step.ins[1 - operand]
            if data is None:
                return "it is multiplied with a constant"
            assert weight is not None and step.eqn is not None
            if step.eqn.params.get("batch_group_count", 1) != 1:
                return "it is the kernel of a convolution with groups of examples"
            elements = self._elements(weight, step.eqn, operand)
            if isinstance(elements, str):
                return elements
            order = canonical(elements)[0]
            digest = hashlib.sha256(repr(order.shape).encode() + order.tobytes())
            part = parts.get(digest.digest())
            if part is None:
                flat = order.ravel()
                if taken[flat].any() or len(np.unique(flat)) < flat.size:
                    return "its uses sum over different dims of it, or share a part"
                taken[flat] = True
                part = parts[digest.digest()] = Part(path, len(parts), *order.shape)
            uses.append(Use(part, i, step.eqn, operand, weight, data, last=False))
            self._first.setdefault(part, uses[-1])
        # The first turn of a recurrent net may see a constant, if others see data.
        moving = {use.part for use in uses if use.data not in self.fixed}
        if any(use.part not in moving for use in uses):
            return "what it is multiplied with is made of weights, not of data"
        last = {use.part: n for n, use in enumerate(uses)}
        return [
            dataclasses.replace(use, last=last[use.part] == n)
            for n, use in enumerate(uses)
        ]

    def _elements(self, weight: int, eqn: JaxprEqn, operand: int) -> Any:
        found = self._numbering(weight)
        if isinstance(found, str):
            return found
        return np.asarray(weight_matrix(eqn, operand, found[1]))

    def elements(self, use: Use) -> Array:
        """For each element of a part, its index in the flattened weight.

        In the order of the part's first use, as `alignment` is.
        """
        first = self._first[use.part]
        return jnp.asarray(self._elements(first.weight, first.eqn, first.operand))

    def alignment(self, use: Use) -> tuple[Array, Array] | None:
        """How to order the data of a use as that of its part's first use.

        Returns:
            The groups to take, and of each its columns; None if the order is that.
        """
        first = self._first[use.part]
        if (use.weight, use.eqn, use.operand) == (
            first.weight,
            first.eqn,
            first.operand,
        ):
            return None
        here = self._elements(use.weight, use.eqn, use.operand)
        there = self._elements(first.weight, first.eqn, first.operand)
        if np.array_equal(here, there):
            return None
        _, groups, cols = canonical(here)
        _, groups_there, cols_there = canonical(there)
        back, inverse = np.argsort(groups_there), np.argsort(cols_there, axis=1)
        cols = np.take_along_axis(cols, inverse, axis=1)
        return jnp.asarray(groups[back]), jnp.asarray(cols[back])

    def _constant(self, number: int) -> Any:
        """A value that follows from constants alone; None if there is none."""
        if number in self.program.constants:
            return self.program.constants[number]
        if number not in self._made:
            return None
        step = self._made[number]
        args = [None if i is None else self._constant(i) for i in step.ins]
        pairs = zip(args, step.ins, strict=True)
        if any(x is None and i is not None for x, i in pairs):
            return None
        return run_step(step, args)[step.outs.index(number)]


def canonical(elements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted groups, rows and columns: equal for two views of the same matrices.

    Returns:
        The sorted elements; which group came to each place; and for each of these
        groups which column.
    """
    groups = np.argsort(elements.min((1, 2)), kind="stable")
    x = elements[groups]
    rows = np.argsort(x.min(2), axis=1, kind="stable")
    x = np.take_along_axis(x, rows[:, :, None], axis=1)
    cols = np.argsort(x.min(1), axis=1, kind="stable")
    return np.take_along_axis(x, cols[:, None, :], axis=2), groups, cols


def _why_not(
    x: Any, sites: list[Site], looked_up: bool, steps: dict[tuple, list[int]]
) -> str:
    if is_leaf(x):
        return "it is compressed already"
    if not tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return "it is no floating-point array"
    if not sites:
        what = "rows of it are looked up, but " if looked_up else ""
        return f"{what}no product or convolution uses it"
    if any(s.where not in steps for s in sites):
        return "it is used inside a `while`, `cond` or `shard_map`, where no run pauses"
    if any(not s.contract for s in sites):
        return "a product with it sums over nothing"
    return ""


def find_uses(
    fn: Callable, params: PyTree, args: tuple, only: Collection[str] | None = None
) -> Uses:
    """The uses of weights, as calibration sees them.

    Args:
        fn: `fn(params, *args)`.
        params: its weights, or their shapes.
        args: example inputs, or their shapes.
        only: paths of weights; None: all of them.
    """
    return Uses(fn, params, args, only)
