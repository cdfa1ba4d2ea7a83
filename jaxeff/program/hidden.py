"""Rewritten functions that a plain one calls, where nothing can be done about them.

`lambda p, x: f(p, x)` runs like `f`, but what was done to `f` is out of sight. Python
keeps the names a function uses: its closure, its defaults and its globals.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from .call import inner, Rewritten
from .lift import Lifted


def hidden_rewrite(fn: Callable) -> Rewritten | None:
    """A rewritten function that `fn` refers to and may call; None if none is found.

    Followed are Python functions of the same module, and those in closures. A lifted
    function does not count: whether one is needed shows in the weights.
    """
    seen: set[int] = set()
    todo: list[Any] = list(_used(fn))
    while todo:
        value = todo.pop()
        if id(value) in seen or not callable(value):
            continue
        seen.add(id(value))
        part = value
        while part is not None:
            if isinstance(part, Rewritten) and not isinstance(part, Lifted):
                return part
            part, own = inner(part), part
            if part is None:
                todo += _used(own)
    return None


def _used(fn: Any) -> Iterator[Any]:
    """What a function finds by name when it runs; nothing for a class or a method."""
    if isinstance(fn, functools.partial):
        yield from (fn.func, *fn.args, *fn.keywords.values())
    if not isinstance(fn, types.FunctionType):
        return
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            pass
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    names = {
        i.argval
        for i in dis.get_instructions(fn.__code__)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for name in names:
        value = fn.__globals__.get(name)
        if getattr(value, "__module__", None) == fn.__module__ or isinstance(
            value, Rewritten
        ):
            yield value
        elif isinstance(getattr(value, "__wrapped__", None), Rewritten):
            yield value
