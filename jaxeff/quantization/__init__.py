"""Weights in few bits, multiplied as they are stored."""

from .arrays import QArray as QArray, quantize_array as quantize_array
from .formats import int4 as int4, int8 as int8, Linear as Linear, w8a8 as w8a8
from .quantize import quantize as quantize
from .report import Report as Report, report as report
