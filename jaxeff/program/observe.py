"""Statistics of what flows into each weight, handed out beside the outputs.

Calibration of every kind (activation ranges, Wanda's norms, GPTQ's Hessians)
is a reduction of the inputs of sites. `observe` computes it inside the
function itself, so it is compiled, batched and sharded like the function.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn
from jaxtyping import Array, PyTree

from jaxeff import tree

from .call import Call
from .lift import Lifting, unlift
from .sites import find_sites, Site
from .walk import Where

Statistic = Callable[[Site, Array], PyTree[Array]]


@tree.pytree
class Observed:
    """What `observe` returns beside the outputs; a pytree, so it crosses `jit`.

    Attributes:
        values: the statistic at each site, by `site.name`. Inside a scan there
            is a new dim 0 with one entry per turn; nested scans add theirs in
            front.
        sites: the observed sites.
    """

    values: dict[str, PyTree[Array]]
    sites: tuple[Site, ...] = tree.static()

    def by_weight(self) -> dict[str, list[PyTree[Array]]]:
        """The values at the sites of each weight, by its path."""
        out: dict[str, list[PyTree[Array]]] = {}
        for site in self.sites:
            out.setdefault(site.path, []).append(self.values[site.name])
        return out


def observe(
    fn: Callable, statistic: Statistic, *, weights: tree.Patterns = "**"
) -> Callable:
    """Makes `fn` also return a statistic of what flows into each site.

    Args:
        fn: any function of `(params, *args)`; a lifted one stays lifted.
        statistic: maps a site and the array that meets the weight there (the
            other operand of the product or convolution, or the indices of a
            look-up) to a pytree of arrays.
        weights: only sites of weights whose path matches.

    Returns:
        A function that returns `(fn(params, *args), Observed)`.

    Raises:
        ValueError: when called, if a pattern matches no weight that has a site,
            or a chosen site lies inside a `while` or a `shard_map`, whose
            turns or devices have no array to be stacked in.
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Observed]:
        call = Call(unlift(fn), params, args, kwargs)
        sites = find_sites(call.jaxpr, call.weights)
        paths = list(dict.fromkeys(s.path for s in sites))
        chosen = set(tree.match(weights, paths, what="observable weight"))
        observed = {s.name: s for s in sites if s.path in chosen}
        rule = _Observe(list(observed.values()), statistic)
        outs, values = rule.collect(call.jaxpr, call.inputs)
        missing = [s for n, s in observed.items() if n not in values]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(observed)} sites cannot be observed, the "
                f"first of {missing[0].path} at {missing[0].source}: inside a `while` "
                "or `shard_map` there is no array to stack them in. Name other "
                "weights, or write the loop as a `scan`."
            )
        outs = call.unflatten([rule.plain(y) for y in outs])
        return outs, Observed(values, tuple(observed.values()))

    return run


class _Observe(Lifting):
    """Emits the statistic at each chosen site, then runs it as it is."""

    def __init__(self, sites: Sequence[Site], statistic: Statistic):
        super().__init__()
        self.statistic = statistic
        self.at: dict[Where, list[Site]] = {}
        for site in sites:
            self.at.setdefault(site.where, []).append(site)

    def opens(self, eqn: JaxprEqn, args: list[Any]) -> bool:
        return True

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        for site in self.at.get(where, ()):
            x = self.plain(args[1 - site.weight])
            self.emit(site.name, self.statistic(site, x))
        if eqn.primitive.name.startswith("custom_") and self._sees_inside(where):
            return self.inline(eqn, args, where)
        return super().equation(eqn, args, where)

    def _sees_inside(self, where: Where) -> bool:
        return any(w[: len(where)] == where for w in self.at)
