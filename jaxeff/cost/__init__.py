"""What a model costs: time, memory, energy, carbon and money, measured and named.

FLOPs and bytes of a program are counted by `jaxeff.program`; this package measures
what a machine does with them and converts it.
"""

from .carbon import (
    grams_co2 as grams_co2,
    INTENSITIES as INTENSITIES,
    Intensity as Intensity,
    intensity as intensity,
    load_intensities as load_intensities,
)
from .counters import Energy as Energy
from .energy import (
    EnergyMeter as EnergyMeter,
    estimate_energy as estimate_energy,
    measure_energies as measure_energies,
    measure_energy as measure_energy,
)
from .hardware import (
    Chip as Chip,
    chip as chip,
    CHIPS as CHIPS,
    Mfu as Mfu,
    mfu as mfu,
    transformer_training_flops as transformer_training_flops,
)
from .layers import layer_costs as layer_costs
from .memory import (
    count_parameters as count_parameters,
    device_memory as device_memory,
    Memory as Memory,
    peak_memory as peak_memory,
)
from .money import (
    electricity_usd as electricity_usd,
    run_usd as run_usd,
    usd_per_million as usd_per_million,
)
from .processors import Processor as Processor, processor as processor
from .products import (
    FastProducts as FastProducts,
    TimedProduct as TimedProduct,
    tune_products as tune_products,
)
from .profiles import (
    compare as compare,
    comparison_table as comparison_table,
    Profile as Profile,
    profile as profile,
    quantity as quantity,
)
from .timing import (
    Latency as Latency,
    latency as latency,
    measure_latency as measure_latency,
)
from .tuning import (
    Timed as Timed,
    tune_convolutions as tune_convolutions,
    Tuned as Tuned,
)
