"""How many weights are pruned at each step: the fraction to drop, from 0 to 1.

A schedule maps a step, which may be traced, to a sparsity. It rises in stairs: a
weight can only recover from a loss of its neighbours between two rises.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
Schedules = Schedule | Mapping[str, Schedule]


def one_shot(sparsity: float | int, at_step: int = 0) -> Schedule:
    """Nothing until `at_step`, `sparsity` from there on.

    Raises:
        ValueError: `sparsity` is outside [0, 1) or `at_step` is negative.
    """
    check_sparsity("sparsity", sparsity)
    check_steps("at_step", at_step, least=0)
    return lambda step: jnp.where(step < at_step, 0.0, sparsity).astype(jnp.float32)


def polynomial(
    start: float | int,
    end: float | int,
    *,
    begin: int,
    steps: int,
    every: int = 1,
    power: float | int = 3,
) -> Schedule:
    """From `start` to `end`, fast first and slow last, in stairs of `every` steps.

    At step t = begin + k * every, for k up to n = steps / every, the sparsity is
    end + (start - end) * (1 - k / n) ** power; before `begin` it is 0.

    Args:
        start: the sparsity at `begin`.
        end: the sparsity from `begin + steps` on.
        begin: the first step that prunes.
        steps: how many steps the rise takes.
        every: how many steps lie between two rises; it divides `steps`.
        power: 3 in the paper; 1 is a straight line.

    Raises:
        ValueError: a sparsity is outside [0, 1), `end` is below `start`, a number of
            steps is out of range, `every` does not divide `steps`, or `power` is
            not positive.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1.
    """
    check_sparsity("start", start)
    check_sparsity("end", end)
    if end < start:
        raise ValueError(
            f"sparsity rises, but start is {start} and end is {end}. Exchange them; "
            "a weight that was pruned does not come back."
        )
    check_steps("begin", begin, least=0)
    check_steps("steps", steps, least=1)
    check_steps("every", every, least=1)
    if steps % every:
        raise ValueError(
            f"every must divide steps, got every={every} and steps={steps}. The last "
            f"rise would miss the end; steps={steps // every * every or every} fits."
        )
    if power <= 0:
        raise ValueError(f"power must be > 0, got {power}. 1 is a straight line.")
    rises = steps // every

    def sparsity(step: Int[Array, ""] | int) -> Float[Array, ""]:
        k = jnp.clip((step - begin) // every, 0, rises)
        # Both ends exactly: `end` as its term vanishes, `start` by name.
        left = (rises - k) / rises
        now = jnp.where(k == 0, start, end + (start - end) * left**power)
        return jnp.where(step < begin, 0.0, now).astype(jnp.float32)

    return sparsity


def periodic(fraction: float | int, *, begin: int, every: int, times: int) -> Schedule:
    """Every `every` steps from `begin` on, `times` times, a fraction of what is left.

    The sparsity after the k-th time is 1 - (1 - fraction) ** k.

    Args:
        fraction: of the weights that are left, in [0, 1).
        begin: the first step that prunes.
        every: how many steps lie between two rises.
        times: how many rises there are.

    Raises:
        ValueError: `fraction` is outside [0, 1), or a number is out of range.

    Source: Han et al. 2015, arXiv:1506.02626, section 3; with training from the
        start in between, Frankle & Carbin 2019, arXiv:1803.03635, section 2.
    """
    check_sparsity("fraction", fraction)
    check_steps("begin", begin, least=0)
    check_steps("every", every, least=1)
    check_steps("times", times, least=1)

    def sparsity(step: Int[Array, ""] | int) -> Float[Array, ""]:
        k = jnp.minimum((step - begin) // every + 1, times)
        k = jnp.where(step < begin, 0, k)
        return (1 - (1 - fraction) ** k.astype(jnp.float32)).astype(jnp.float32)

    return sparsity


def final_sparsity(schedule: Schedule) -> float:
    """What a schedule ends at, known while tracing: its value at step 2**30."""
    with jax.ensure_compile_time_eval():
        return float(schedule(jnp.int32(2**30)))


def check_schedules(schedules: Any) -> None:
    """Refuses what is neither a schedule nor several by pattern."""
    given = schedules.values() if isinstance(schedules, Mapping) else [schedules]
    for schedule in given:
        if not callable(schedule):
            raise ValueError(
                "a schedule is a function from the step to a sparsity, got "
                f"{schedule!r}. `one_shot({schedule!r})` is that fraction at once, "
                "`polynomial` and `periodic` get there little by little."
            )


def check_sparsity(name: str, sparsity: float | int) -> None:
    """Refuses what is not a fraction of weights to drop."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{name} is the fraction of weights to drop, in [0, 1), got {sparsity}. "
            "For 80 percent write 0.8."
        )


def check_steps(name: str, steps: int, *, least: int) -> None:
    """Refuses a number of steps that is too small."""
    if steps < least:
        raise ValueError(f"{name} counts steps and is at least {least}, got {steps}.")
