"""Pruning: structured, by couplings, and unstructured, as an optax transform."""

from .budgets import Budget as Budget, flops as flops, parameters as parameters
from .gradients import fisher as fisher, taylor as taylor
from .masks import (
    keep_largest as keep_largest,
    prune_by_magnitude as prune_by_magnitude,
    PruneState as PruneState,
)
from .outputs import output_error as output_error
from .schedules import (
    one_shot as one_shot,
    polynomial as polynomial,
    Schedule as Schedule,
)
from .scores import (
    geometric_median as geometric_median,
    lamp as lamp,
    magnitude as magnitude,
    norm_scale as norm_scale,
    random as random,
    Score as Score,
)
from .select import select as select
from .selection import Selection as Selection, Trial as Trial
from .shrink import shrink as shrink, shrink_in_rounds as shrink_in_rounds
