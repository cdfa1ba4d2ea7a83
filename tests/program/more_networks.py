"""More operations for `networks.py`: positions, windows, cells and whole blocks."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from tests.program.networks import operation, OPERATIONS as OPERATIONS, SIZES


@operation
def scattered(net, x, i, j):
    """Written at positions, or combined with what is there."""
    b, s, d = x.shape
    rows = jnp.array([0, s - 1, 0])
    kinds = [
        lambda: x.at[:, 0].set(jnp.tanh(x[:, -1])),
        lambda: x.at[:, rows].add(x[:, rows] * 0.5),
        lambda: x.at[:, rows].multiply(2.0),
        lambda: x.at[:, 0].min(0.1),
        lambda: x.at[:, 0].max(-x[:, 0]),
        lambda: x.at[:, 1:].set(0.0),
        lambda: x.at[..., d // 2 :].add(0.5),
        lambda: x.at[..., 0].set(x.sum(-1)),
        lambda: x.at[:, :, jnp.array([0, d - 1])].multiply(0.5),
        lambda: jnp.zeros((b, 7, d), x.dtype).at[:, net.tokens[0, :s] % 7].add(x),
        lambda: jax.vmap(lambda x, t: jnp.zeros((7, d), x.dtype).at[t % 7].add(x))(
            x, net.tokens[:, :s]
        ),
        lambda: jax.vmap(lambda x, at: x.at[:, at].set(0.5), (2, 0), 2)(
            x, jnp.argmax(x.sum(0), 0)
        ),
        lambda: jnp.put_along_axis(
            x, jnp.argmax(x, 1, keepdims=True), 0.0, 1, inplace=False
        ),
        lambda: jax.ops.segment_sum(x.swapaxes(0, 1), net.tokens[0, :s], 7).swapaxes(
            0, 1
        ),
        lambda: x.at[:, 0].apply(jnp.cos),
    ]
    if s > net.tokens.shape[1] and j % len(kinds) in (9, 10, 13):
        return None
    y = kinds[j % len(kinds)]()
    return y * jnp.cos(y).mean(1, keepdims=True) if i % 2 else y


@operation
def reduced_after(net, x, i, j):
    """What a scatter, a look-up or a window made, seen by a sum over the channels."""
    kinds = [
        lambda: x.at[:, 0].set(0.5),
        lambda: x.at[:, 0].set(0.0),
        lambda: x.at[:, 0].add(x[:, -1]),
        lambda: x.at[:, 0].add(1.0),
        lambda: x.at[:, 0].multiply(jnp.exp(x[:, -1])),
        lambda: jnp.cumsum(x, 1),
        lambda: lax.cumlogsumexp(x, 1),
        lambda: jnp.sort(x, 1),
        lambda: lax.top_k(x.swapaxes(1, 2), 1)[0].swapaxes(1, 2),
        lambda: jnp.abs(jnp.fft.rfft(x, axis=1)).astype(x.dtype),
        lambda: jnp.prod(x, 1, keepdims=True),
        lambda: jnp.roll(x, 1, 1),
        lambda: jax.image.resize(x, (*x.shape[:1], 6, x.shape[2]), "bilinear"),
        lambda: jnp.argsort(x, 1).astype(x.dtype),
    ]
    y = kinds[j % len(kinds)]()
    total = y.sum((1, 2))[:, None, None]
    return x * (total if i % 2 else jnp.tanh(y).sum(2).mean(1)[:, None, None])


@operation
def fourier(net, x, i, j):
    kinds = [
        lambda: jnp.fft.fft(x, axis=1).real,
        lambda: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * 0.5, n=x.shape[1], axis=1),
        lambda: jnp.fft.fft2(x, axes=(1, 2)).real,
        lambda: jnp.abs(jnp.fft.fft(jnp.cos(x), axis=0)),
    ]
    return kinds[j % len(kinds)]().astype(x.dtype)


@operation
def window(net, x, i, j):
    if x.shape[1] < 2:
        return None

    def largest(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")

    steps = (1, 1 + i % 2, 1)
    kinds = [
        lambda: jax.grad(lambda x: (largest(x) ** 2).sum())(x),
        lambda: jax.jvp(largest, (x,), (jnp.tanh(x),))[1],
        lambda: x + lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,))[:, None],
        lambda: x * lax.reduce(x, 0.0, lambda a, b: a + b * b, (2,))[..., None],
        lambda: lax.reduce_window(
            x, 0.0, lax.add, (1, 2, 1), steps, "SAME", window_dilation=(1, 2, 1)
        ),
        lambda: lax.reduce_window(
            x, 0.0, lax.add, (1, 2, 1), steps, "SAME", base_dilation=(1, 2, 1)
        ),
        lambda: lax.reduce_precision(x, 8, 10),
    ]
    return kinds[j % len(kinds)]()


@operation
def own_window(net, x, i, j):
    """A window of a user's own sum, which JAX cannot differentiate."""
    if x.shape[1] < 2:
        return None
    steps = (1, 1 + i % 2, 1)
    own = lambda a, b: a + 2 * b
    return lax.reduce_window(x, 0.0, own, (1, 2, 1), steps, "SAME")


@operation
def strided(net, x, i, j):
    b, s, d = x.shape
    step = 2 + i % 2
    kinds = [
        lambda: jax.nn.silu(x[..., ::2]) * x[..., 1::2] if d % 2 == 0 else None,
        lambda: x[..., step - 1 :: step],
        lambda: x[..., ::step] * (x[..., 1::step] + 1) if d % step == 0 else None,
        lambda: x[:, ::2],
        lambda: jnp.concatenate([x[:, ::2], x[:, 1::2]], -1) if s % 2 == 0 else None,
        lambda: (
            jnp.stack([x[..., ::2], x[..., 1::2]], -2).reshape(x.shape)
            if d % 2 == 0
            else None
        ),
        lambda: (
            jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
            if d % 2 == 0
            else None
        ),
        lambda: x[..., : d // 2 * 2 : 2],
    ]
    return kinds[j % len(kinds)]()


@operation
def rolled(net, x, i, j):
    shift, axis = 1 + i % 2, (1, 2)[j % 2]
    y = jnp.roll(x, -shift, axis)
    y = jnp.tanh(y) if j % 3 else y @ net.weight(x.shape[-1], x.shape[-1])
    return jnp.roll(y, shift, axis) if j % 4 else y


@operation
def other_convolutions(net, x, i, j):
    """Transposed, dilated, depthwise with a multiplier, of the batch."""
    b, s, d = x.shape
    n = SIZES[i % 5]
    numbers = ("NWC", "WIO", "NWC")
    conv = lambda x, w, **options: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, **options
    )
    kinds = [
        lambda: lax.conv_transpose(x, net.weight(2, d, n), (2,), "SAME"),
        lambda: lax.conv_transpose(
            x, net.weight(3, n, d), (2,), "SAME", transpose_kernel=True
        ),
        lambda: conv(x, net.weight(3, d, n), rhs_dilation=(2,)),
        lambda: lax.conv_general_dilated(
            x,
            net.weight(3, d, n),
            (1,),
            ((1, 2),),
            lhs_dilation=(2,),
            dimension_numbers=numbers,
        ),
        lambda: conv(x, net.weight(3, 1, 2 * d), feature_group_count=d),
        lambda: (
            jax.nn.relu(conv(x, net.weight(3, 1, d), feature_group_count=d))
            @ net.weight(d, n)
        ),
        lambda: lax.conv_general_dilated_patches(
            x, (2,), (1,), "SAME", dimension_numbers=numbers
        ),
        lambda: (
            lax.conv_general_dilated(
                x.transpose(0, 2, 1), net.weight(n, d, 2), (2,), "VALID"
            ).transpose(0, 2, 1)
            if s > 1
            else None
        ),
    ]
    y = kinds[j % len(kinds)]()
    return y if y is None or y.shape[1] < 12 else None


@operation
def side_by_side(net, x, i, j):
    """Stacked, taken apart, tiled."""
    b, s, d = x.shape
    y = net.older(i, x.shape)
    y = jnp.tanh(x) if y is None else y
    axis = 1 + i % 3
    kinds = [
        lambda: jnp.stack([x, y], axis).sum(axis),
        lambda: jnp.stack([x, y], 3).reshape(b, s, 2 * d),
        lambda: jnp.stack([x, y], 2).reshape(b, s, 2 * d),
        lambda: sum(jnp.unstack(jnp.cos(jnp.stack([x, y], axis)), axis=axis)),
        lambda: jnp.multiply(
            *jnp.unstack(jnp.einsum("bsd,dck->bsck", x, net.weight(d, 2, 3)), axis=2)
        ),
        lambda: jnp.stack(jnp.unstack(x, axis=1)[::-1], 1),
        lambda: jnp.tile(x, (1, 1, 2)),
        lambda: jnp.tile(x, (1, 2, 1)) if s < 6 else None,
        lambda: jnp.tile(x[..., :1], (1, 1, d)) + x,
        lambda: x * jnp.tile(y, (1, 2, 1)).sum((1, 2))[:, None, None],
        lambda: jnp.stack(jnp.unstack(x, axis=2)[::-1], 2),
    ]
    return kinds[j % len(kinds)]()


@operation
def resized(net, x, i, j):
    b, s, d = x.shape
    method = ("nearest", "bilinear", "cubic")[i % 3]
    kinds = [
        lambda: jax.image.resize(x, (b, s + 1, d), method),
        lambda: jax.image.resize(x, (b, max(1, s - 1), d), method),
        lambda: jnp.repeat(x, 2, 1) if s < 6 else None,
        lambda: jax.image.resize(x, (b, s, d + 1), method),
    ]
    return kinds[j % len(kinds)]()


@operation
def pixel_shuffle(net, x, i, j):
    b, s, d = x.shape
    if j % 2 and s % 2 == 0:  # space to depth
        return x.reshape(b, s // 2, 2, d).reshape(b, s // 2, 2 * d)
    if d % 2 or s > 6:
        return None
    return x.reshape(b, s, d // 2, 2).swapaxes(2, 3).reshape(b, 2 * s, d // 2)


@operation
def gru(net, x, i, j):
    b, s, d = x.shape
    n = SIZES[i % 5]
    w, u, v = net.weight(d, 3 * n), net.weight(n, 2 * n), net.weight(n, n)

    def step(h, x):
        reset, update, new = jnp.split(x @ w, 3, -1)
        more = h @ u
        reset = jax.nn.sigmoid(reset + more[:, :n])
        update = jax.nn.sigmoid(update + more[:, n:])
        inner = (reset * h) @ v if j % 2 else reset * (h @ v)
        h = (1 - update) * jnp.tanh(new + inner) + update * h
        return h, h

    start = net.weight(1, n, scale=1.0) if j % 3 == 0 else jnp.zeros((1, n), x.dtype)
    run = lambda xs, reverse: lax.scan(
        step, jnp.broadcast_to(start, (b, n)), xs, reverse=reverse
    )[1].swapaxes(0, 1)
    xs = x.swapaxes(0, 1)
    y = run(xs, False)
    return jnp.concatenate([y, run(xs, True)], -1) if j % 4 == 0 else y


@operation
def layers_by_index(net, x, i, j):
    """Stacked weights, of which each turn of a loop takes its own."""
    d, n = x.shape[-1], SIZES[j % 5]
    up, down = net.weight(3, d, n, scale=0.5), net.weight(3, n, d, scale=0.5)

    def layer(k, x):
        take = lambda w: lax.dynamic_index_in_dim(w, k, keepdims=False)
        return x + jnp.tanh(x @ take(up)) @ take(down)

    if i % 2:
        return lax.fori_loop(0, 3, layer, x)
    return lax.scan(lambda x, k: (layer(k, x), None), x, jnp.arange(3))[0]


@operation
def experts(net, x, i, j):
    d, n, e = x.shape[-1], SIZES[i % 5], 3
    gates = jax.nn.softmax(x @ net.weight(d, e), -1)
    if j % 2:
        best, which = lax.top_k(gates, 1)
        gates = jax.nn.one_hot(which[..., 0], e, dtype=x.dtype) * best
    hidden = jax.nn.relu(jnp.einsum("bsd,edn->bsen", x, net.weight(e, d, n)))
    y = jnp.einsum("bsen,end->bsed", hidden, net.weight(e, n, d))
    if j % 3 == 0:
        return jnp.einsum("bsed,bse->bsd", y, gates)
    return x + (y * gates[..., None]).sum(2)


@operation
def linear_attention(net, x, i, j):
    b, s, d = x.shape
    h, k = 2, (2, 3)[i % 2]
    q, key, v = ((x @ net.weight(d, h * k)).reshape(b, s, h, k) for _ in range(3))
    act = (jax.nn.relu, jnp.tanh, jax.nn.elu, lambda x: jax.nn.elu(x) + 1)[j % 4]
    q, key = act(q), act(key)
    pairs = key[..., :, None] * v[..., None, :]
    state = jnp.cumsum(pairs, 1) if j % 2 else pairs.sum(1, keepdims=True)
    y = jnp.einsum("bshk,bshkv->bshv", q, jnp.broadcast_to(state, (b, s, h, k, k)))
    if j % 3 == 0:
        total = jnp.einsum("bshk,bshk->bsh", q, jnp.cumsum(key, 1))
        y = y / (1 + jnp.abs(total))[..., None]
    return y.reshape(b, s, -1) @ net.weight(h * k, d)


@operation
def biased_attention(net, x, i, j):
    """Windows, a learned bias for each distance and head, a class token, masks."""
    b, s, d = x.shape
    h, k = (2, 4)[i % 2], (2, 3)[j % 2]
    if j % 3 == 0:
        token = jnp.broadcast_to(net.weight(1, 1, d, scale=1.0), (b, 1, d))
        x = jnp.concatenate([token, x], 1)
        s += 1
    qkv = (x @ net.weight(d, 3 * h * k)).reshape(b, s, 3, h, k)
    qkv = qkv.transpose(2, 0, 3, 1, 4) if i % 3 else qkv.reshape(b, s, h, 3, k)
    qkv = qkv if i % 3 else qkv.transpose(3, 0, 2, 1, 4)
    q, key, v = qkv[0], qkv[1], qkv[2]
    scores = q @ key.swapaxes(-1, -2) * k**-0.5
    table = net.weight(2 * s - 1, h, scale=1.0)
    apart = jnp.arange(s)[None] - jnp.arange(s)[:, None] + s - 1
    scores = scores + table[apart].transpose(2, 0, 1)[None]
    if j % 4 == 0:
        hidden = jnp.zeros((s, s), bool).at[0, 1:].set(True)
        scores = jnp.where(hidden[None, None], -1e9, scores)
    if j % 5 == 0:  # a temperature for each head
        scores = scores * jnp.exp(net.weight(h, scale=1.0))[None, :, None, None]
    y = jax.nn.softmax(scores, -1) @ v
    y = y.swapaxes(1, 2).reshape(b, s, h * k) @ net.weight(h * k, d)
    return (x + y)[:, :1] if j % 7 == 0 else x + y


@operation
def random_numbers(net, x, i, j):
    key = jr.fold_in(jr.key(0), i)
    kinds = [
        lambda: x * jr.bernoulli(key, 0.5, x.shape),
        lambda: x * jr.bernoulli(key, 0.5, (x.shape[1],))[None, :, None],
        lambda: x + jr.gamma(key, 1 + x[..., :1] ** 2),
        lambda: x + jr.gamma(key, 1 + x**2),
        lambda: x * jr.uniform(key, (1, 1, 1), x.dtype),
        lambda: x[:, jr.permutation(key, x.shape[1])],
    ]
    return kinds[j % len(kinds)]()


@operation
def special_functions(net, x, i, j):
    y = jnp.tanh(x)
    kinds = [
        lambda: jax.scipy.special.gammainc(1 + y * y, 1 + jnp.abs(y)),
        lambda: jax.scipy.special.i0e(y),
        lambda: jax.scipy.special.i1e(y),
        lambda: jax.scipy.special.gammaln(2 + y),
        lambda: jax.scipy.special.digamma(2 + y),
        lambda: jax.scipy.special.erfinv(y * 0.9),
        lambda: lax.erfc(y),
        lambda: jnp.mod(x, 1.0),
        lambda: jnp.sinh(y) + jnp.cosh(y),
        lambda: jnp.nextafter(x, x + 1),
        lambda: jnp.hypot(x, y),
        lambda: jnp.sinc(y),
    ]
    z = kinds[j % len(kinds)]()
    return z * z.sum(-1, keepdims=True) if i % 2 else z


@operation
def similarity(net, x, i, j):
    unit = lambda x: x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-3)
    table = net.weight(SIZES[i % 5], x.shape[-1])
    kinds = [
        lambda: unit(x) @ unit(table).T,
        lambda: -((x[:, :, None] - table[None, None]) ** 2).sum(-1),
        lambda: table[
            jnp.argmin(((x[:, :, None] - table[None, None]) ** 2).sum(-1), 2)
        ],
        lambda: (
            jax.nn.one_hot(net.tokens % table.shape[0], table.shape[0]).astype(x.dtype)
            @ table
        ),
    ]
    return kinds[j % len(kinds)]()
