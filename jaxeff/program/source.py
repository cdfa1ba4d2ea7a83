"""Where in the user's code an equation came from."""

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence

import jax
from jax.extend.core import JaxprEqn

# Frames of these say how a line was traced, not which line it was.
_OURS = (os.path.dirname(jax.__file__), os.path.dirname(__file__))

_CALLERS: contextvars.ContextVar[tuple[JaxprEqn, ...]] = contextvars.ContextVar(
    "callers", default=()
)


@contextlib.contextmanager
def inside(eqn: JaxprEqn) -> Iterator[None]:
    """While the body of an equation is gone through.

    JAX traces the body of `softmax` or `take` once for all its calls, so only the
    call knows the line.
    """
    token = _CALLERS.set((eqn, *_CALLERS.get()))
    try:
        yield
    finally:
        _CALLERS.reset(token)


def callers() -> tuple[JaxprEqn, ...]:
    """The equations whose bodies are being gone through, the innermost first."""
    return _CALLERS.get()


def source_line(eqn: JaxprEqn, around: Sequence[JaxprEqn] | None = None) -> str:
    """`file.py:12 (function)` of the innermost frame that is not a library's.

    Where every frame is a library's, the innermost outside JAX: a Flax layer
    called at the top of a trace.

    Args:
        eqn: the equation.
        around: those whose bodies it is in, the innermost first; by default
            `callers()`.
    """
    frames = [
        f
        for e in (eqn, *(callers() if around is None else around))
        if e.source_info.traceback is not None
        for f in e.source_info.traceback.frames
        if not f.file_name.startswith(_OURS)
    ]
    users = [f for f in frames if f"{os.sep}site-packages{os.sep}" not in f.file_name]
    for frame in [*users[:1], *frames[:1]]:
        name = os.path.basename(frame.file_name)
        return f"{name}:{frame.line_num} ({frame.function_name.split('.')[-1]})"
    return "unknown"
