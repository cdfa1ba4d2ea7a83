"""Pruning: structured, by couplings; unstructured, while training or at once."""

from .block_sparse import block_array as block_array, BlockArray as BlockArray
from .budgets import (
    Budget as Budget,
    flops as flops,
    parameters as parameters,
)
from .calibrated import (
    prunable as prunable,
    prune_magnitude as prune_magnitude,
    sparsegpt as sparsegpt,
    wanda as wanda,
)
from .compact import (
    compact as compact,
    compact_report as compact_report,
    CompactReport as CompactReport,
)
from .criteria import (
    by_gradient as by_gradient,
    by_magnitude as by_magnitude,
    by_movement as by_movement,
    by_random as by_random,
    by_saliency as by_saliency,
    Criterion as Criterion,
)
from .depth import Branch as Branch, branches as branches, select_depth as select_depth
from .dims import weight_dims as weight_dims, WeightDims as WeightDims
from .distributions import (
    Distribution as Distribution,
    erdos_renyi as erdos_renyi,
    erk as erk,
    global_ranking as global_ranking,
    layer_sparsities as layer_sparsities,
    uniform as uniform,
)
from .gradients import fisher as fisher, taylor as taylor
from .lottery import lottery_tickets as lottery_tickets, Ticket as Ticket
from .masks import (
    apply_masks as apply_masks,
    keep_largest as keep_largest,
    make_masks as make_masks,
    masked as masked,
    PruneState as PruneState,
)
from .outputs import activation as activation, output_error as output_error
from .patterns import (
    Blocks as Blocks,
    NofM as NofM,
    Pattern as Pattern,
    Unstructured as Unstructured,
)
from .rewire import (
    rewire as rewire,
    rigl as rigl,
    sparse_evolution as sparse_evolution,
)
from .schedules import (
    one_shot as one_shot,
    periodic as periodic,
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
from .sparse import (
    bitmask_array as bitmask_array,
    BitmaskArray as BitmaskArray,
    nm_array as nm_array,
    NMArray as NMArray,
)
from .sparse_training import group_lasso as group_lasso, l1 as l1
from .transforms import (
    fix_masks as fix_masks,
    prune as prune,
    prune_by_magnitude as prune_by_magnitude,
    straight_through as straight_through,
)
