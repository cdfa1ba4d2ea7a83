import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import audit, hlo, make_mesh

LAYERS, BATCH, WIDTH, HIDDEN = 3, 16, 64, 256


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, tensor=4)


def compiled_blocks(mesh, dtype=jnp.float32):
    """Gradients of stacked MLP blocks, split as Megatron splits them."""

    def loss(w, x):
        block = lambda h, w: (jax.nn.relu(h @ w[0]) @ w[1], None)
        return (jax.lax.scan(block, x, w)[0] ** 2).mean()

    shape = lambda s, *spec: jax.ShapeDtypeStruct(
        s, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    w = (
        shape((LAYERS, WIDTH, HIDDEN), None, None, "tensor"),
        shape((LAYERS, HIDDEN, WIDTH), None, "tensor"),
    )
    x = shape((BATCH, WIDTH), "data")
    return jax.jit(jax.value_and_grad(loss)).lower(w, x).compile()


@pytest.fixture(scope="module")
def blocks(mesh):
    return audit(compiled_blocks(mesh), mesh)


def test_a_block_split_in_two_products_reduces_once_each_way(blocks):
    found = blocks.of("all-reduce", "tensor")
    assert found.count == 2 * LAYERS
    # An activation of the examples that a device of the data axis has.
    assert found.bytes == 2 * LAYERS * BATCH // 2 * WIDTH * 4
    assert found.sent == found.bytes * 2 * 3 / 4


def test_loops_count_as_often_as_they_run(blocks):
    gradients = 2 * LAYERS * WIDTH * HIDDEN * 4 // 4
    found = blocks.of("all-reduce", "data")
    assert found.bytes == gradients + 4  # and the loss
    assert all(c.certain for c in found.collectives)


def test_it_prints_a_row_for_each_and_their_sum(blocks):
    lines = str(blocks).splitlines()
    assert len(lines) == 2 + len(blocks.collectives) + 1
    assert lines[0].split()[:3] == ["collective", "axes", "devices"]
    assert lines[-1].split() == ["all", f"{blocks.count:,}", f"{blocks.sent:,.0f}"]


KINDS = {
    "all-reduce": (lambda x: jax.lax.psum(x, "tensor"), 8 * 4, 2 * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor"), 4 * 8 * 4, 3 / 4),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
        8 * 4,
        3 / 4,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
        8 * 4,
        3 / 4,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
        8 * 4,
        1,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_with_its_axis_and_bytes(mesh, kind):
    run, size, share = KINDS[kind]
    fn = jax.shard_map(
        run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    compiled = jax.jit(fn).lower(jnp.zeros(16)).compile()
    (only,) = audit(compiled, mesh).collectives
    assert (only.kind, only.axes, only.count) == (kind, ("tensor",), 1)
    assert only.bytes == size and only.sent == pytest.approx(size * share)


def test_a_reduction_over_two_axes_names_both(mesh):
    fn = jax.shard_map(
        lambda x: jax.lax.psum(x, ("data", "tensor")),
        mesh=mesh,
        in_specs=P(("data", "tensor")),
        out_specs=P(),
    )
    compiled = jax.jit(fn).lower(jnp.zeros(16)).compile()
    (only,) = audit(compiled, mesh).collectives
    assert only.axes == ("data", "tensor") and only.group == 8


def test_one_device_sends_nothing():
    mesh = make_mesh(devices=jax.devices()[:1])
    found = audit(jax.jit(lambda x: x.sum()).lower(jnp.zeros(4)).compile(), mesh)
    assert found.count == 0 and "sends anything" in str(found)


def test_what_the_condition_of_a_loop_sends_is_found(mesh):
    def local(x):
        far = lambda c: jax.lax.psum(c.sum(), "tensor") < 10
        return jax.lax.while_loop(far, lambda c: c + 1, x)

    fn = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    found = audit(jax.jit(fn).lower(jnp.zeros(16)).compile(), mesh)
    assert [(c.kind, c.certain) for c in found.collectives] == [("all-reduce", False)]


def test_what_a_device_sends_to_itself_is_not_sent():
    mesh = make_mesh(devices=jax.devices()[:1])
    fn = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "data", [(0, 0)]),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    assert audit(jax.jit(fn).lower(jnp.zeros(16)).compile(), mesh).count == 0


def test_what_may_not_run_is_marked(mesh):
    def local(x):
        bumped = lambda x: jax.lax.psum(x, "tensor") + x
        return jax.lax.cond(x.sum() > 0, bumped, lambda x: x, x)

    fn = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    found = audit(jax.jit(fn).lower(jnp.zeros(16)).compile(), mesh)
    assert [c.certain for c in found.collectives] == [False]
    assert "? in a branch" in str(found)


def test_kinds_and_axes_that_are_none_are_errors(mesh):
    found = audit(jax.jit(jnp.sin).lower(jnp.ones(2)).compile(), mesh)
    with pytest.raises(ValueError, match="no collective 'allreduce'. Choose of: all-r"):
        found.of("allreduce")
    with pytest.raises(ValueError, match="no axis 'dta'. Choose of: "):
        found.of("all-reduce", "dta")
    with pytest.raises(ValueError, match="is a PjitFunction. Give `jax.jit"):
        audit(jax.jit(jnp.sin), mesh)


def test_a_mesh_of_fewer_devices_is_an_error(mesh):
    fn = jax.shard_map(
        lambda x: jax.lax.psum(x, "tensor"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    compiled = jax.jit(fn).lower(jnp.zeros(16)).compile()
    with pytest.raises(ValueError, match="the mesh has 4 devices"):
        audit(compiled, make_mesh(devices=jax.devices()[:4]))


@pytest.mark.parametrize(
    "written, groups",
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%a", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%a", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1",
            [[0, 1], [2, 3]],
        ),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, to_apply=%a", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, to_apply=%a", [[0, 1], [2, 3]]),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(written, groups):
    np.testing.assert_array_equal(hlo.groups(written, 4), groups)


def test_groups_written_in_a_new_way_are_an_error():
    with pytest.raises(ValueError, match="not known"):
        hlo.groups("replica_groups=<new>", 4)


ASYNC = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[8,128], y: bf16[8,128]) -> (bf16[8,128], f32[8]) {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[8]{0} parameter(1)
  %s = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce-start(%x), replica_groups={}
  %t = f32[8]{0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%add
  %u = f32[8]{0} all-reduce-done(%t)
  %w = f32[8]{0} fusion(%y), kind=kLoop, calls=%add
  %d = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce-done(%s)
  ROOT %out = (bf16[8,128], /*index=1*/f32[8]) tuple(%d, %w)
}
"""


class Compiled:
    def as_text(self):
        return ASYNC


def test_what_is_computed_between_start_and_end_hides_it():
    mesh = make_mesh(devices=jax.devices()[:2])
    long, short = audit(Compiled(), mesh).collectives
    assert (long.bytes, long.overlaps) == (8 * 128 * 2, True)
    assert (short.bytes, short.overlaps) == (8 * 4, False)


def test_a_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="has an ENTRY"):
        hlo.read("jaxpr")


LOOP = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %kept = s32[]{:T(128)} copy(%next)
  ROOT %out = (s32[], f32[8]) tuple(%kept, %y)
}

%test (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)} constant(END)
  ROOT %lt = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%zero)
  %first = (s32[], f32[8]) tuple(%start, %z)
  %loop = (s32[], f32[8]) while(%first), condition=%test, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("end", "count", "certain"),
    [("7", 3, True), ("8", 4, True), ("1", 0, True), ("unknown", 1, False)],
)
def test_the_length_of_a_loop_is_found_where_it_is_not_noted(end, count, certain):
    class Loop:
        def as_text(self):
            return LOOP.replace("END", end)

    (only,) = audit(Loop(), make_mesh(devices=jax.devices()[:2])).collectives
    assert (only.count, only.certain) == (count, certain)


CHAIN = """HloModule m

%start (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %g1 = f32[16]{0} all-gather(%a), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}

%meanwhile (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %g2 = f32[16]{0} all-gather(%b), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}

%done (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %g3 = f32[16]{0} all-gather(%c), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}

ENTRY %main (z: f32[8]) -> f32[16] {
  %z = f32[8]{0} parameter(0)
  %f1 = f32[16]{0} fusion(%z), kind=kCustom, calls=%start
  %f2 = f32[16]{0} fusion(%z), kind=kCustom, calls=%meanwhile
  ROOT %f3 = f32[16]{0} fusion(%z), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_what_stands_in_several_fusions_is_sent_once():
    class Chain:
        def as_text(self):
            return CHAIN

    (only,) = audit(Chain(), make_mesh(devices=jax.devices()[:2])).collectives
    assert (only.kind, only.bytes, only.overlaps) == ("all-gather", 16 * 4, True)


def test_a_program_for_tpus_is_read_as_one_for_cpus(tpus):
    mesh = make_mesh(data=2, tensor=4, devices=tpus("v5e:2x4"))
    found = audit(compiled_blocks(mesh, jnp.bfloat16), mesh)
    blocks = found.of("all-reduce", "tensor")
    assert blocks.count == 2 * LAYERS
    assert blocks.bytes == 2 * LAYERS * BATCH // 2 * WIDTH * 2
    gradients = 2 * LAYERS * WIDTH * HIDDEN * 2 // 4
    assert found.of("all-reduce", "data").bytes == gradients + 4
    assert all(c.certain for c in found.collectives)
