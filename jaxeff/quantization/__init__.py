"""Weights in few bits, multiplied as they are stored."""

from .allocate import Sensitivity as Sensitivity, sensitivity as sensitivity
from .arrays import QArray as QArray, quantize_array as quantize_array
from .cache import CachedTokens as CachedTokens, quantize_cache as quantize_cache
from .calibrated import (
    adaround as adaround,
    awq as awq,
    gptq as gptq,
    unfitted as unfitted,
)
from .codebook import Codebook as Codebook
from .floating import floating as floating
from .formats import (
    bfloat16 as bfloat16,
    Format as Format,
    fp8 as fp8,
    int2 as int2,
    int3 as int3,
    int4 as int4,
    int8 as int8,
    log4 as log4,
    log4_sqrt2 as log4_sqrt2,
    mxfp4 as mxfp4,
    mxfp6 as mxfp6,
    mxfp8 as mxfp8,
    nf4 as nf4,
    nvfp4 as nvfp4,
    uint4 as uint4,
    uint8 as uint8,
    w4a8 as w4a8,
    w8a8 as w8a8,
    w8a8_fp8 as w8a8_fp8,
)
from .linear import Linear as Linear
from .log import Entry as Entry, Log as Log
from .logarithmic import Logarithmic as Logarithmic
from .low_precision import low_precision as low_precision
from .qat import (
    convert as convert,
    fake_quantize as fake_quantize,
    FakeQuantized as FakeQuantized,
)
from .quantize import quantize as quantize
from .report import Report as Report, report as report
from .rescale import equalize as equalize, smooth as smooth
from .rotate import rotate as rotate, Rotated as Rotated
from .states import compress_state as compress_state
from .vector import VectorArray as VectorArray
