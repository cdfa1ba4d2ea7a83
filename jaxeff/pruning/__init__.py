"""Pruning: structured, by couplings; unstructured, while training or at once."""

from .masks import (
    keep_largest as keep_largest,
    prune_by_magnitude as prune_by_magnitude,
    PruneState as PruneState,
)
from .one_shot import (
    prunable as prunable,
    prune_magnitude as prune_magnitude,
    sparsegpt as sparsegpt,
    wanda as wanda,
)
from .schedules import (
    one_shot as one_shot,
    polynomial as polynomial,
    Schedule as Schedule,
)
from .scores import magnitude as magnitude, Score as Score
from .shrink import choose as choose, shrink as shrink
