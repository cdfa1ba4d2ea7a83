"""Pruning: structured, by couplings; unstructured, while training or at once."""

from .block_sparse import block_array as block_array, BlockArray as BlockArray
from .compact import (
    compact as compact,
    compact_report as compact_report,
    CompactReport as CompactReport,
)
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
from .sparse import (
    bitmask_array as bitmask_array,
    BitmaskArray as BitmaskArray,
    nm_array as nm_array,
    NMArray as NMArray,
)
