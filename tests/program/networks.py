"""Random small networks, built from every kind of operation a coupling can meet.

A network is a list of steps `(operation, i, j)`; hypothesis draws the list and
makes it smaller when a law fails. An operation takes the newest array, which is
(b, s, d), and may look at the older ones; it returns the next array, or None
where it does not apply. `i` and `j` choose sizes, axes and partners.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = tuple[str, int, int]
OPERATIONS: dict[str, Callable] = {}
SIZES = (2, 3, 4, 6, 8)


def operation(fn: Callable) -> Callable:
    """Enters an operation by its name."""
    OPERATIONS[fn.__name__] = fn
    return fn


@dataclasses.dataclass
class Net:
    """One run of a network: the arrays made so far, and where weights come from."""

    weight_of: Callable[[tuple[int, ...]], Any]
    tokens: Any
    arrays: list

    def weight(self, *shape: int, scale: float | None = None) -> Any:
        fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        return self.weight_of(shape) * (fan_in**-0.5 if scale is None else scale)

    def older(self, i: int, shape: Sequence[int] | None = None) -> Any:
        """An array made before; of a certain shape, if one is asked for."""
        found = [y for y in self.arrays if shape is None or y.shape == tuple(shape)]
        return found[i % len(found)] if found else None


def network(steps: Sequence[Step], shapes: dict | None = None) -> Callable:
    """`fn(params, x, tokens)`; the shapes of its weights are written to `shapes`."""

    def fn(params, x, tokens):
        count = 0

        def weight_of(shape):
            nonlocal count
            name = f"w{count}"
            # Now and then the same weight again.
            same = [
                n for n in params if params[n].shape == shape and int(n[1:]) < count
            ]
            if same and count % 5 == 4:
                return params[same[0]]
            count += 1
            if shapes is not None:
                shapes[name] = shape
                params.setdefault(name, jnp.zeros(shape, x.dtype))
            return params[name]

        net = Net(weight_of, tokens, [x])
        # The dims of the input are fixed: start on dims that are free.
        net.arrays.append(x @ net.weight(x.shape[-1], 6))
        for name, i, j in steps:
            y = OPERATIONS[name](net, net.arrays[-1], i, j)
            # Whatever the batch, or it is another network at another batch size.
            if y is not None and 0 < y.size < 2000 * x.shape[0] and y.shape[-1] > 0:
                assert y.ndim == 3, (name, y.shape)
                net.arrays.append(y)
        out = 0.0
        for y in net.arrays[-2:]:
            out = out + (y @ net.weight(y.shape[-1], 3)).mean(1)
        return out

    return fn


# Dense layers and convolutions.


@operation
def dense(net, x, i, j):
    y = x @ net.weight(x.shape[-1], SIZES[i % 5])
    return y + net.weight(SIZES[i % 5], scale=1.0)[None, None] if j % 2 else y


@operation
def dense_transposed(net, x, i, j):
    return jnp.einsum("bsd,ed->bse", x, net.weight(SIZES[i % 5], x.shape[-1]))


@operation
def dense_many_dims(net, x, i, j):
    heads, d = (2, 3)[i % 2], SIZES[j % 5]
    y = jnp.einsum("bsd,hdk->bhsk", x, net.weight(heads, x.shape[-1], d))
    if i % 3 == 0:
        return jnp.einsum("bhsk,khe->bse", jnp.tanh(y), net.weight(d, heads, 4))
    return y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], heads * d)


@operation
def convolution(net, x, i, j):
    d = x.shape[-1]
    groups = [g for g in range(1, d + 1) if d % g == 0][
        i % 4 % sum(d % g == 0 for g in range(1, d + 1))
    ]
    out = groups * (1, 2, 3)[j % 3]
    kernel = net.weight((1, 3)[j % 2], d // groups, out)
    if i % 7 == 0:
        kernel = jnp.exp(kernel)
    if i % 7 == 1:
        kernel = jnp.cos(kernel)
    return lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


@operation
def shuffled_groups(net, x, i, j):
    b, s, d = x.shape
    if d % 2:
        return None
    y = convolution(net, x, 1, j)
    if y.shape[-1] % 2:
        return None
    y = y.reshape(b, s, 2, -1).swapaxes(2, 3).reshape(y.shape)
    return convolution(net, y, i, j)


@operation
def made_kernel(net, x, i, j):
    """A weight that is computed before it is used."""
    d, n = x.shape[-1], SIZES[j % 5]
    w = net.weight(d, n)
    kinds = [
        lambda: jnp.tanh(w),
        lambda: jnp.exp(w),
        lambda: jax.nn.softmax(w, axis=i // 12 % 2),
        lambda: w / jnp.sqrt(jnp.sum(w * w, i // 12 % 2, keepdims=True) + 1e-3),
        lambda: w + 1,
        lambda: net.weight(d, 4) @ net.weight(4, n),
        lambda: jnp.cos(net.weight(d, 4)) @ net.weight(4, n),
        lambda: w * jnp.linspace(0, 1, n)[None],
        lambda: jnp.concatenate([w[:1], net.weight(d, n)[1:]], 0),
        lambda: jnp.round(w / jnp.max(jnp.abs(w)) * 7),
        lambda: w - w.mean(0, keepdims=True),
        lambda: net.weight(n, d).T,
    ]
    return x @ kinds[i % 12]()


@operation
def weight_transposed(net, x, i, j):
    """A weight that is used on both sides."""
    w = net.weight(x.shape[-1], SIZES[j % 5])
    return jnp.tanh(x @ w) @ w.T


@operation
def two_kernels_side_by_side(net, x, i, j):
    d, n = x.shape[-1], SIZES[j % 5]
    return x @ jnp.concatenate([net.weight(d, n), net.weight(d, 2)], axis=1)


# Elementwise functions.


@operation
def activation(net, x, i, j):
    kinds = [
        jax.nn.relu,
        jax.nn.gelu,
        jnp.tanh,
        jax.nn.silu,
        jnp.cos,
        lambda x: jnp.exp(jnp.tanh(x)),
        jax.nn.sigmoid,
        jax.nn.softplus,
        jnp.abs,
        lambda x: jnp.tanh(x) ** 3,
        jax.nn.leaky_relu,
        jax.nn.elu,
        lambda x: jnp.clip(x, -1, 1),
        lambda x: jnp.clip(x, 0.1, 1),
        lambda x: jnp.maximum(x, -0.5),
        lambda x: jnp.minimum(x, -0.5),
        lambda x: x / (1 + x * x),
        lambda x: 1 / (1 + x * x),
        lambda x: jnp.expm1(jnp.tanh(x)),
        lambda x: jnp.log1p(jnp.abs(x)),
        lambda x: jnp.where(x > 0, x, 0.0),
        lambda x: jnp.where(x > 0, x, -0.3),
        lambda x: jnp.where(x > 0, 1.0, 0.0),
        lambda x: x * (x > 0),
        lambda x: jax.nn.hard_swish(x),
        lambda x: jnp.power(jnp.abs(x), 1.5),
        lambda x: jnp.power(1.5, jnp.tanh(x)),
        lambda x: x - 0.1,
        lambda x: -2.0 * x,
        jnp.floor,
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    ]
    return kinds[i % len(kinds)](x)


@operation
def with_older(net, x, i, j):
    """Residual additions, gates and their like."""
    y = net.older(j, x.shape)
    if y is None:
        return None
    kinds = [
        lambda: x + y,
        lambda: x - y,
        lambda: x * y,
        lambda: jax.nn.sigmoid(y) * x,
        lambda: jnp.maximum(x, y),
        lambda: jnp.where(y > 0, x, y),
        lambda: jnp.where(y > 0, x, 0.5),
        lambda: x / (1 + jnp.abs(y)),
        lambda: jax.lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
        lambda: x + jnp.flip(y, 1),
        lambda: x + y[..., ::-1],
        lambda: jnp.arctan2(x, 1 + y * y),
    ]
    return kinds[i % len(kinds)]()


@operation
def constant(net, x, i, j):
    d = x.shape[-1]
    row = jnp.linspace(0.1, 1, d)[None, None]
    kinds = [
        lambda: x + row,
        lambda: x * row,
        lambda: x + np.arange(d)[None, None] * 0.1,
        lambda: x * jnp.sin(jnp.arange(x.shape[1]))[None, :, None],
        lambda: jnp.where(np.arange(d)[None, None] % 2 == 0, x, 0),
        lambda: x + jnp.full((1, 1, d), 0.3),
        lambda: x + jnp.zeros((1, 1, d)),
        lambda: jnp.maximum(jnp.full_like(x, -1.0), -2.0) * x.sum(-1, keepdims=True),
    ]
    return kinds[i % len(kinds)]()


@operation
def scale_and_bias(net, x, i, j):
    d = x.shape[-1]
    x = x * (1 + net.weight(d))[None, None] if i % 2 else x * net.weight(d)[None, None]
    return x + net.weight(1, 1, d) if j % 2 else x


# Norms and reductions.


@operation
def norm(net, x, i, j):
    d = x.shape[-1]
    groups = 2 if d % 2 == 0 else 1

    def two_pass(x, axes):
        return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(
            x.var(axes, keepdims=True) + 1e-2
        )

    def one_pass(x, axes):
        mean = x.mean(axes, keepdims=True)
        var = (x * x).mean(axes, keepdims=True) - mean * mean
        return (x - mean) * lax.rsqrt(jnp.maximum(var, 0) + 1e-2)

    grouped = x.reshape(*x.shape[:2], groups, d // groups)
    kinds = [
        lambda: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-2),
        lambda: two_pass(x, (-1,)),
        lambda: one_pass(x, (-1,)),
        lambda: two_pass(grouped, (1, 3)).reshape(x.shape),
        lambda: one_pass(grouped, (1, 3)).reshape(x.shape),
        lambda: one_pass(grouped, (1, 2)).reshape(x.shape),
        lambda: two_pass(x, (0, 1)),
        lambda: jax.nn.standardize(x),
        lambda: x / jnp.sqrt(1e-2 + jnp.sum(x**2, -1, keepdims=True)),
    ]
    y = kinds[i % len(kinds)]()
    if j % 2:
        y = y * net.weight(d, scale=1.0)[None, None]
    return y + net.weight(d, scale=1.0)[None, None] if j % 3 == 0 else y


@operation
def reduction(net, x, i, j):
    """The channels seen as a whole, and back."""
    kinds = [
        lambda: x.sum(-1, keepdims=True),
        lambda: x.mean(-1, keepdims=True),
        lambda: jax.nn.relu(x).max(-1, keepdims=True),
        lambda: x.min(-1, keepdims=True),
        lambda: jnp.tanh(x).prod(-1, keepdims=True),
        lambda: jnp.argmax(x, -1, keepdims=True).astype(x.dtype),
        lambda: jax.nn.logsumexp(x, -1, keepdims=True),
        lambda: (x > 0).sum(-1, keepdims=True).astype(x.dtype),
        lambda: jnp.any(x > 0.5, -1, keepdims=True).astype(x.dtype),
        lambda: x.std(-1, keepdims=True),
        lambda: jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)),
        lambda: jnp.cos(x).sum(-1, keepdims=True),
    ]
    y = kinds[i % len(kinds)]()
    return (x * y, x + y, y)[j % 3]


@operation
def softmax(net, x, i, j):
    return jax.nn.softmax(x, axis=(-1, 1)[i % 2])


@operation
def along(net, x, i, j):
    """What mixes positions along an axis."""
    axis = (2, 1)[j % 2]
    kinds = [
        lambda: jnp.cumsum(x, axis),
        lambda: jnp.sort(x, axis),
        lambda: jnp.flip(x, axis),
        lambda: jnp.roll(x, 1, axis),
        lambda: lax.cummax(x, axis),
        lambda: jnp.abs(jnp.fft.fft(x, axis=axis)).astype(x.dtype),
        lambda: jnp.moveaxis(lax.top_k(jnp.moveaxis(x, axis, -1), 2)[0], -1, axis),
        lambda: jnp.argsort(x, axis).astype(x.dtype),
        lambda: lax.associative_scan(jnp.add, x, axis=axis),
        lambda: jnp.diff(x, axis=axis),
        lambda: lax.top_k(x, 1, axis=axis)[0],
    ]
    return kinds[i % len(kinds)]()


@operation
def pool(net, x, i, j):
    window = (1, 2, 1) if i % 3 else (1, 1, 2)
    if window[2] > x.shape[2] or window[1] > x.shape[1]:
        return None
    kinds = [
        lambda: lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 1), "SAME"),
        lambda: lax.reduce_window(x, 0.0, lax.add, window, window, "VALID"),
        lambda: lax.reduce_window(
            x, -jnp.inf, lax.max, window, (1, 1, 1), ((0, 0), (2, 0), (0, 0))
        ).clip(-3),
    ]
    return kinds[j % 3]()


# Shapes.


@operation
def concatenated(net, x, i, j):
    y = net.older(i)
    if y.shape[:2] != x.shape[:2]:
        return None
    return jnp.concatenate([(x, y), (y, x), (x, x)][j % 3], axis=-1)


@operation
def split(net, x, i, j):
    d = x.shape[-1]
    if d < 2:
        return None
    at = 1 + i % (d - 1)
    if j % 3 == 0 and d % 2 == 0:
        gate, y = jnp.split(x, 2, axis=-1)
        return jax.nn.silu(gate) * y
    if j % 3 == 1:
        a, b = jnp.split(x, [at], axis=-1)
        net.arrays.append(a)
        return b
    return x[..., at:] if j % 2 else x[..., :at]


@operation
def sliced(net, x, i, j):
    d = x.shape[-1]
    kinds = [
        lambda: x[..., ::2],
        lambda: x[..., i % d : i % d + 1],
        lambda: x[:, 1:],
        lambda: x[..., -1:] * x,
        lambda: x[:, :1] + x,
        lambda: lax.dynamic_slice_in_dim(x, i % 2, 1, axis=1),
        lambda: lax.dynamic_slice_in_dim(x, 0, d, axis=2),
        lambda: lax.dynamic_slice_in_dim(x, 0, max(d - 1, 1), axis=2),
        lambda: lax.dynamic_update_slice(x, x[:, :1] * 2, (0, 1, 0)),
        lambda: x.at[:, 0].set(0.5),
        lambda: x.at[..., 0].add(0.5),
    ]
    return kinds[j % len(kinds)]()


@operation
def padded(net, x, i, j):
    low, high = i % 3, j % 3
    value = (0.0, 0.0, 1.0, -jnp.inf)[(i + j) % 4]
    y = jnp.pad(x, ((0, 0), (0, 0), (low, high)), constant_values=value)
    y = jnp.maximum(y, -5)
    other = net.older(i, y.shape)
    return y if other is None else y + other


@operation
def regrouped(net, x, i, j):
    """Split the channels in two dims, do something there, and merge them."""
    b, s, d = x.shape
    k = [k for k in (2, 3, 4) if d % k == 0]
    if not k:
        return None
    y = x.reshape(b, s, d // k[i % len(k)], k[i % len(k)])
    kinds = [
        lambda: y.swapaxes(2, 3).reshape(b, s, d),
        lambda: (y * net.weight(y.shape[2])[None, None, :, None]).reshape(b, s, d),
        lambda: (y @ net.weight(y.shape[3], 3)).reshape(b, s, -1),
        lambda: y.sum(2),
        lambda: y.mean(3),
        lambda: jax.nn.softmax(y, 2).reshape(b, s, d),
        lambda: (y - y.mean(3, keepdims=True)).reshape(b, s, d),
        lambda: jnp.einsum("bsgk,gkh->bsgh", y, net.weight(*y.shape[2:], 2)).reshape(
            b, s, -1
        ),
        lambda: y[:, :, 0],
        lambda: y[..., 1],
        lambda: jnp.tanh(y).max(2),
        lambda: x.reshape(b, s * d)[:, None, :d],
        lambda: jnp.concatenate([-y[..., 1:], y[..., :1]], -1).reshape(b, s, d),
    ]
    return kinds[j % len(kinds)]()


@operation
def repeated(net, x, i, j):
    b, s, d = x.shape
    kinds = [
        lambda: jnp.repeat(x, 2, axis=-1),
        lambda: jnp.tile(x, (1, 1, 2)),
        lambda: (x[..., None] * net.weight(1, 3, scale=1.0)[None, None]).reshape(
            b, s, -1
        ),
        lambda: jnp.broadcast_to(x[..., :1], x.shape) + x,
        lambda: jnp.stack([x, jnp.tanh(x)], -1).reshape(b, s, -1),
        lambda: jnp.stack([x, jnp.tanh(x)], -2).reshape(b, s, -1),
        lambda: x * net.weight(1, 1, 1, scale=1.0),
        lambda: x.sum(-1, keepdims=True) * net.weight(d)[None, None],
        lambda: jnp.broadcast_to(net.weight(1, 1, d), x.shape) * x,
    ]
    return kinds[j % len(kinds)]()


@operation
def outer(net, x, i, j):
    """Products of channels with channels."""
    b, s, d = x.shape
    y = net.older(i)
    if y.shape[:2] != (b, s) or y.shape[2] * d > 40:
        return None
    pairs = x[..., :, None] * y[..., None, :]
    kinds = [
        lambda: pairs.reshape(b, s, -1),
        lambda: pairs.sum(-1),
        lambda: jnp.tanh(pairs).sum(-2),
        lambda: jnp.cos(pairs).sum(-1),
        lambda: (pairs + pairs.swapaxes(2, 3)).mean(-1) if y.shape == x.shape else None,
        lambda: jnp.einsum("bsd,bse->bde", x, y).reshape(b, 1, -1) / s,
        lambda: x @ (jnp.einsum("bsd,bse->bde", x, y) / s),
        lambda: x @ jax.nn.softmax(jnp.einsum("bsd,bse->bde", x, y), j // 9 % 2 + 1),
        lambda: jnp.einsum("bsd,btd->bst", x, y) if y.shape == x.shape else None,
    ]
    return kinds[j % len(kinds)]()


# Blocks.


@operation
def attention(net, x, i, j):
    b, s, d = x.shape
    kv, groups, k = (1, 2)[i % 2], (1, 2)[i // 2 % 2], (2, 3)[j % 2]
    if j % 3 == 0:
        kv, groups = 2, 1
        qkv = x @ net.weight(d, 3 * kv * k)
        q, key, v = (y.reshape(b, s, kv, k) for y in jnp.split(qkv, 3, axis=-1))
    else:
        q = (x @ net.weight(d, kv * groups * k)).reshape(b, s, kv * groups, k)
        key = (x @ net.weight(d, kv * k)).reshape(b, s, kv, k)
        v = (x @ net.weight(d, kv * k)).reshape(b, s, kv, k)
    if j % 4 == 0:  # rotary
        angle = jnp.arange(s)[:, None] * 0.5 ** jnp.arange(k)[None]
        q = q * jnp.cos(angle)[None, :, None]
        key = key * jnp.cos(angle)[None, :, None]
    if j % 5 == 0:  # normalised queries
        q = q * lax.rsqrt((q * q).mean(-1, keepdims=True) + 1e-2)
    q = q.reshape(b, s, kv, groups, k)
    scores = jnp.einsum("bqhgk,bthk->bhgqt", q, key)
    if i % 3 == 0:
        scores = jnp.where(
            jnp.tril(jnp.ones((s, s), bool))[None, None, None], scores, -9
        )
    y = jnp.einsum("bhgqt,bthk->bqhgk", jax.nn.softmax(scores, -1), v)
    return x + y.reshape(b, s, -1) @ net.weight(kv * groups * k, d)


@operation
def repeated_heads(net, x, i, j):
    b, s, d = x.shape
    q = (x @ net.weight(d, 4 * 3)).reshape(b, s, 4, 3)
    v = jnp.repeat((x @ net.weight(d, 2 * 3)).reshape(b, s, 2, 3), 2, axis=2)
    y = jnp.tanh(q) * v if j % 2 else jax.nn.softmax(q, axis=2) * v
    return y.reshape(b, s, 12)


@operation
def learned_queries(net, x, i, j):
    d, n = x.shape[-1], SIZES[i % 5]
    scores = jnp.einsum("nd,bsd->bns", net.weight(n, d), x)
    y = jnp.einsum("bns,bsd->bnd", jax.nn.softmax(scores, (2, 1)[j % 2]), x)
    kinds = [
        lambda: y.mean(1, keepdims=True),
        lambda: jnp.einsum("bnd,ne->bed", y, net.weight(n, 3)),
        lambda: jnp.tanh(y).sum(1, keepdims=True),
        lambda: y.max(1, keepdims=True),
        lambda: y,
    ]
    return kinds[j % len(kinds)]()


@operation
def squeeze_excite(net, x, i, j):
    d = x.shape[-1]
    gate = jax.nn.relu(x.mean(1) @ net.weight(d, 3)) @ net.weight(3, d)
    return x * jax.nn.sigmoid(gate)[:, None]


@operation
def embedded(net, x, i, j):
    table = net.weight(7, x.shape[-1], scale=1.0)
    y = (
        table[net.tokens]
        if i % 3
        else jnp.take(
            table, net.tokens * 2, axis=0, mode="fill", fill_value=(0.0, 1.0)[j % 2]
        )
    )
    return x + y if y.shape == x.shape else y


@operation
def looked_up(net, x, i, j):
    b, s, d = x.shape
    order = jnp.argsort(x, axis=1)
    kinds = [
        lambda: x[:, jnp.array([0, s - 1])],
        lambda: x[..., jnp.array([0, d - 1])],
        lambda: jnp.take_along_axis(x, order, axis=1),
        lambda: jnp.take_along_axis(x, order[:, :, :1], axis=1),
        lambda: jnp.take_along_axis(x, jnp.argsort(x, axis=2), axis=2),
        lambda: x[:, jnp.argmax(x.sum((0, 2)))][:, None] + x,
        lambda: jnp.take(x, jnp.argmax(x, -1)[0, 0], axis=1)[:, None],
        lambda: jax.vmap(lambda x, t: x[t % s])(x, net.tokens),
    ]
    return kinds[j % len(kinds)]()


# Programs in programs.


@operation
def scan_layers(net, x, i, j):
    d, n = x.shape[-1], SIZES[j % 5]
    weights = net.weight(2, d, n, scale=0.5), net.weight(2, n, d, scale=0.5)
    functions = (
        jnp.tanh,
        jnp.cos,
        jax.nn.relu,
        lambda y: y - y.mean(-1, keepdims=True),
    )
    f = functions[i % 4]

    def layer(x, w):
        x = x + f(x @ w[0]) @ w[1]
        return x, x.sum(-1) if i % 2 else x

    layer = jax.checkpoint(layer) if j % 2 else layer
    x, xs = lax.scan(layer, x, weights, reverse=i % 3 == 0)
    return x if i % 2 else x + xs[0]


@operation
def scan_time(net, x, i, j):
    b, s, d = x.shape
    n = SIZES[j % 5]
    w, u = net.weight(d, n), net.weight(n, n)
    start = (0.0, 0.5)[i % 2]

    def step(h, x):
        h = (jnp.tanh, jnp.cos, jnp.sin)[i % 3](x @ w + h @ u)
        return h, (h, h.sum(-1, keepdims=True))

    _, (hs, sums) = lax.scan(step, jnp.full((b, n), start, x.dtype), x.swapaxes(0, 1))
    return (hs, hs * sums)[i // 2 % 2].swapaxes(0, 1)


@operation
def lstm(net, x, i, j):
    b, s, d = x.shape
    w, u = net.weight(d, 4 * 3), net.weight(3, 4 * 3)

    def step(state, x):
        h, c = state
        a, f, g, o = jnp.split(x @ w + h @ u, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(a) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((b, 3), x.dtype)
    return lax.scan(step, (zero, zero), x.swapaxes(0, 1))[1].swapaxes(0, 1)


@operation
def branches(net, x, i, j):
    d = x.shape[-1]
    w, v = net.weight(d, 4), net.weight(d, 4)
    test = (x.sum() > 0, jnp.cos(x).sum() > 0, x[0, 0, 0] > 0)[i % 3]
    functions = [
        (lambda x: jnp.tanh(x @ w), lambda x: x @ v),
        (lambda x: jnp.tanh(x @ w), lambda x: jnp.cos(x @ v)),
        (lambda x: x * 2, lambda x: x.max(-1, keepdims=True) * x),
    ]
    return lax.cond(test, *functions[j % 3], x)


@operation
def loop(net, x, i, j):
    w = net.weight(x.shape[-1], x.shape[-1])
    f = (jnp.tanh, jnp.cos, lambda y: y / (1 + jnp.abs(y.sum(-1, keepdims=True))))[
        j % 3
    ]

    def go_on(state):
        k, y = state
        return (k < 2) & (jnp.max(y) < 50 if i % 2 else True)

    return lax.while_loop(go_on, lambda s: (s[0] + 1, f(s[1] @ w)), (0, x))[1]


@jax.custom_vjp
def _rounded(x):
    return jnp.round(x * 4) / 4


_rounded.defvjp(lambda x: (_rounded(x), x), lambda x, g: (g * (jnp.abs(x) < 2),))


@jax.custom_jvp
def _grouped(x):
    return jnp.tanh(x.reshape(*x.shape[:-1], -1, 2)).sum(-1)


@_grouped.defjvp
def _grouped_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return _grouped(x), t.reshape(*x.shape[:-1], -1, 2).sum(-1)


@operation
def wrapped(net, x, i, j):
    kinds = [
        lambda: _rounded(x),
        lambda: _grouped(x) if x.shape[-1] % 2 == 0 else None,
        lambda: jax.jit(lambda x: x * 2 + jnp.tanh(x))(x),
        lambda: jax.checkpoint(lambda x: jnp.cos(x).sum(-1, keepdims=True) * x)(x),
        lambda: jax.vmap(lambda x: x @ x.T, 0)(x),
        lambda: lax.optimization_barrier(x),
        lambda: jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2))(x),
        lambda: lax.map(lambda x: x * 2, x),
    ]
    return kinds[j % len(kinds)]()
