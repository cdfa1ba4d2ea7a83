"""Low rank: weights as products of thin factors."""

from .factored import Factored as Factored
from .factorize import factorize as factorize
from .lora import adapt as adapt, Adapted as Adapted, merge as merge
from .report import Report as Report, report as report
from .svd import (
    Energy as Energy,
    energy as energy,
    factor_array as factor_array,
    Rank as Rank,
)
