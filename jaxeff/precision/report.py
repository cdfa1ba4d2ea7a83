"""What ran in which dtype: the proof that autocast did what it says."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Var

from jaxeff.program import bodies, Call, equations

from .rules import PRODUCTS


@dataclasses.dataclass(frozen=True)
class AutocastReport:
    """How many equations of a program run in which dtype.

    Attributes:
        counts: for each primitive the number of its equations by dtype. Casts are
            counted apart.
        casts: the number of casts between floating-point dtypes, as
            `float32 -> bfloat16`. One inside a loop is counted once.
    """

    counts: dict[str, dict[str, int]]
    casts: dict[str, int]

    def __str__(self) -> str:
        rows = [(name, by) for name, by in self.counts.items()]
        # What costs most comes first.
        rows.sort(key=lambda row: (row[0] not in PRODUCTS, row[0]))
        dtypes = sorted({t for _, by in rows for t in by})
        width = max([len(name) for name, _ in rows] + [len("operation")])
        lines = [f"{'operation':{width}}  " + "  ".join(dtypes)]
        for name, by in rows:
            cells = (f"{by.get(t, ''):>{len(t)}}" for t in dtypes)
            lines.append(f"{name:{width}}  " + "  ".join(cells))
        lines += [f"{n} casts {name}" for name, n in sorted(self.casts.items())]
        return "\n".join(line.rstrip() for line in lines)


def autocast_report(
    fn: Callable, params: Any, *args: Any, **kwargs: Any
) -> AutocastReport:
    """What each operation of a function runs in; nothing is computed.

    Args:
        fn: what `autocast` returned, or any other function to compare it with.
        params: its weights; shapes will do.
        *args: its other operands; shapes will do.
        **kwargs: more of them.
    """
    counts: dict[str, Counter] = {}
    casts: Counter = Counter()
    call = Call(fn, params, args, kwargs, open_leaves=True)
    for _, eqn, _ in equations(call.jaxpr):
        floats = [v.aval.dtype for v in eqn.invars if _is_float(v)]
        results = [v.aval.dtype for v in eqn.outvars if _is_float(v)]
        if bodies(eqn) or not floats + results:
            continue
        if eqn.primitive.name == "convert_element_type":
            if floats and results and floats != results:
                casts[f"{floats[0]} -> {results[0]}"] += 1
            continue
        dtype = str(jnp.result_type(*floats) if floats else results[0])
        counts.setdefault(eqn.primitive.name, Counter())[dtype] += 1
    return AutocastReport({k: dict(c) for k, c in counts.items()}, dict(casts))


def _is_float(v: Var | Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
