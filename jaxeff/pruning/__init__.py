"""Pruning: structured, by couplings, and unstructured, as an optax transform."""

from .masks import (
    keep_largest as keep_largest,
    prune_by_magnitude as prune_by_magnitude,
    PruneState as PruneState,
)
from .schedules import (
    one_shot as one_shot,
    polynomial as polynomial,
    Schedule as Schedule,
)
from .scores import magnitude as magnitude, Score as Score
from .shrink import choose as choose, shrink as shrink
