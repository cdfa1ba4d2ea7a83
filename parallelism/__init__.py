"""Meshes, and the ways to spread one model over many devices."""

from .audit import Audit as Audit, audit as audit, Collective as Collective
from .balance import balance as balance
from .compression import (
    average as average,
    Compression as Compression,
    float8 as float8,
    powersgd as powersgd,
    random_k as random_k,
    rounded as rounded,
    top_k as top_k,
)
from .data_parallel import (
    batch_sharding as batch_sharding,
    batch_share as batch_share,
    replicate as replicate,
    replicate_rest as replicate_rest,
    shard_batch as shard_batch,
)
from .experts import Mixed as Mixed, mixture_of_experts as mixture_of_experts
from .fully_sharded import fully_shard as fully_shard
from .layers import (
    layer_parallel as layer_parallel,
    Layered as Layered,
    LayerParallel as LayerParallel,
    LayerPlan as LayerPlan,
    plan_layers as plan_layers,
)
from .local_steps import (
    diloco as diloco,
    drifts as drifts,
    local_weights as local_weights,
)
from .mesh import make_mesh as make_mesh, tpu_devices as tpu_devices
from .per_device import (
    apart as apart,
    averages as averages,
    check_state as check_state,
    PerDevice as PerDevice,
    place_state as place_state,
    state_specs as state_specs,
)
from .pieces import Pieces as Pieces
from .pipeline import (
    key_of as key_of,
    pipeline as pipeline,
    Pipelined as Pipelined,
    Stages as Stages,
)
from .ring import (
    int8_wire as int8_wire,
    PLAIN as PLAIN,
    ring_all_reduce as ring_all_reduce,
    Wire as Wire,
)
from .schedules import (
    gpipe as gpipe,
    one_f_one_b as one_f_one_b,
    Op as Op,
    Schedule as Schedule,
    zero_bubble as zero_bubble,
)
from .sequence import (
    all_to_all_attention as all_to_all_attention,
    ring_attention as ring_attention,
)
from .tensor import (
    place as place,
    plan_tensor as plan_tensor,
    shard as shard,
    Split as Split,
    TensorPlan as TensorPlan,
)
from .zero import zero as zero
