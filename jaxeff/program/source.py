"""Where in the user's code an equation came from."""

import os

import jax
from jax.extend.core import JaxprEqn

# Frames of these say how a line was traced, not which line it was.
_OURS = (os.path.dirname(jax.__file__), os.path.dirname(__file__))


def source_line(eqn: JaxprEqn) -> str:
    """`file.py:12 (function)` of the innermost frame that is not a library's.

    Where every frame is a library's, the innermost outside JAX: a Flax layer
    called at the top of a trace.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return "unknown"
    frames = [f for f in traceback.frames if not f.file_name.startswith(_OURS)]
    users = [f for f in frames if f"{os.sep}site-packages{os.sep}" not in f.file_name]
    for frame in [*users[:1], *frames[:1]]:
        name = os.path.basename(frame.file_name)
        return f"{name}:{frame.line_num} ({frame.function_name.split('.')[-1]})"
    return "unknown"
