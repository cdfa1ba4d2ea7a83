"""Pruning: structured, by couplings, and unstructured, as an optax transform."""

from .scores import magnitude as magnitude, Score as Score
from .shrink import choose as choose, shrink as shrink
