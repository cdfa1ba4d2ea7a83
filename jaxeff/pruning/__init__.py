"""Pruning: structured, by couplings, and unstructured, as optax transforms."""

from .criteria import (
    by_gradient as by_gradient,
    by_magnitude as by_magnitude,
    by_movement as by_movement,
    by_random as by_random,
    by_saliency as by_saliency,
    Criterion as Criterion,
)
from .dims import weight_dims as weight_dims, WeightDims as WeightDims
from .distributions import (
    Distribution as Distribution,
    erdos_renyi as erdos_renyi,
    erk as erk,
    global_ranking as global_ranking,
    layer_sparsities as layer_sparsities,
    uniform as uniform,
)
from .lottery import lottery_tickets as lottery_tickets, Ticket as Ticket
from .masks import (
    apply_masks as apply_masks,
    keep_largest as keep_largest,
    make_masks as make_masks,
    masked as masked,
    PruneState as PruneState,
)
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
from .scores import magnitude as magnitude, Score as Score
from .shrink import choose as choose, shrink as shrink
from .transforms import (
    fix_masks as fix_masks,
    prune as prune,
    prune_by_magnitude as prune_by_magnitude,
    straight_through as straight_through,
)
