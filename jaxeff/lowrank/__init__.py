"""Low rank: weights as products of thin factors."""

from .factored import Factored as Factored
from .factorize import energy as energy, factorize as factorize, Rank as Rank
