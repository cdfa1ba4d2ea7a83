"""The algebra of dims, tested against what it stands for: sets of kept indices."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from jaxeff.program.dims import (
    atoms,
    concat,
    Conflict,
    cut,
    Dim,
    expression,
    factor,
    find,
    fix,
    from_expression,
    kept,
    new_size,
    occurrences,
    product,
    unite,
)

WHY = lambda: "a reason"


@st.composite
def expressions(draw, count):
    """Several dims of one size, made of concatenations and products of atoms.

    As plain data: atoms are (name, size); some occur more than once.
    """
    size = draw(st.sampled_from([2, 4, 6, 8, 12, 24]))
    pool = []

    def make(n, depth):
        same = [e for m, e in pool if m == n]
        if same and draw(st.booleans()):
            return draw(st.sampled_from(same))
        kind = draw(st.sampled_from(["atom", "cat", "prod"])) if depth and n > 1 else ""
        if kind == "cat":
            at = draw(st.integers(1, n - 1))
            e = {"cat": [make(at, depth - 1), make(n - at, depth - 1)]}
        elif kind == "prod":
            k = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
            e = {"prod": [make(n // k, depth - 1), make(k, depth - 1)]}
        else:
            e = (len(pool), n)
        pool.append((n, e))
        return e

    return [make(size, 2) for _ in range(count)]


def build(data):
    """The dims that are described, sharing atoms of one name."""
    shared = {}
    make = lambda e: shared.setdefault(e[0], Dim(e[1]))
    return [from_expression(e, make) for e in data]


def random_masks(all_dims, seed):
    """A mask for each atom; one that is fixed, or a single index, keeps all."""
    rng = np.random.default_rng(seed)
    found = {a for d in all_dims for a in atoms(d)}
    masks = {}
    for a in sorted(found, key=id):
        free = a.reason is None and a.size > 1
        masks[a] = rng.random(a.size) < 0.6 if free else np.ones(a.size, bool)
    return masks


seeds = st.integers(0, 10**6)


@given(expressions(4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))), seeds)
def test_united_dims_keep_the_same_indices(data, pairs, seed):
    some = build(data)
    for i, j in pairs:
        unite(some[i], some[j], WHY)
    masks = random_masks(some, seed)
    for i, j in pairs:
        assert np.array_equal(kept(some[i], masks), kept(some[j], masks))


@given(expressions(3), st.integers(0, 24), seeds)
def test_a_cut_dim_keeps_what_its_parts_keep(data, at, seed):
    d, other, third = build(data)
    unite(d, other, WHY)
    assume(at <= d.size)
    halves = cut(d, at)
    unite(other, third, WHY)
    masks = random_masks([d, other, third], seed)
    if halves is not None:
        assert (halves[0].size, halves[1].size) == (at, d.size - at)
        both = np.concatenate([kept(half, masks) for half in halves])
        assert np.array_equal(both, kept(d, masks))


@given(expressions(3), st.integers(1, 24), seeds)
def test_a_factored_dim_keeps_what_its_factors_keep(data, minor, seed):
    d, other, third = build(data)
    unite(d, other, WHY)
    parts = factor(d, minor)
    unite(other, third, WHY)
    masks = random_masks([d, other, third], seed)
    if parts is None:
        return
    assert (parts[0].size, parts[1].size) == (d.size // minor, minor)
    both = np.logical_and.outer(*(kept(part, masks) for part in parts)).reshape(-1)
    assert np.array_equal(both, kept(d, masks))


@given(expressions(3), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))), seeds)
def test_the_new_size_is_the_number_of_indices_kept(data, pairs, seed):
    some = build(data)
    for i, j in pairs:
        unite(some[i], some[j], WHY)
    masks = random_masks(some, seed)
    for atom, mask in masks.items():
        atom.new = None if mask.all() else int(mask.sum())
    for d in some:
        assert new_size(d) == kept(d, masks).sum()


@given(expressions(1), seeds)
def test_occurrences_say_where_each_index_of_an_atom_is(data, seed):
    (d,) = build(data)
    found = list(occurrences(d))
    assert [a for a, _ in found] == list(atoms(d))
    for a in set(atoms(d)):
        for i in range(a.size):
            removed = ~kept(d, {a: np.arange(a.size) != i})
            at = np.any([index == i for b, index in found if b is a], axis=0)
            np.testing.assert_array_equal(removed, at)


def test_what_can_not_shrink_at_all_outweighs_what_can_not_exactly():
    hard, soft = lambda: "hard", lambda: "soft"
    for first, second in ((hard, soft), (soft, hard)):
        d = Dim(4)
        fix(d, first, first is soft)
        fix(d, second, second is soft)
        assert d.reason is hard and not d.inexact
    a, b = Dim(4), Dim(4)
    fix(a, soft, inexact=True)
    fix(b, hard)
    united = unite(a, b, WHY)
    assert united.reason is hard and not united.inexact
    whole = fix(Dim(6), soft, inexact=True)
    left, right = cut(whole, 2)
    assert left.inexact and right.inexact and left.reason is soft


@given(expressions(2), seeds)
def test_plain_data_says_all_about_a_dim(data, seed):
    some = build(data)
    unite(*some, WHY)
    masks = random_masks(some, seed)
    names, copies = {}, {}
    for d in some:
        plain = expression(d, lambda a: names.setdefault(a, f"c{len(names)}"))
        back = {name: atom for atom, name in names.items()}
        made = lambda name, back=back: copies.setdefault(name, Dim(back[name].size))
        again = from_expression(plain, made)
        moved = {copies[n]: masks[a] for a, n in names.items() if n in copies}
        assert np.array_equal(kept(again, moved), kept(d, masks))


def test_a_reshape_agrees_about_heads():
    """(heads * head_dim) is united with (heads, head_dim)."""
    flat, heads, head_dim = Dim(12), Dim(3), Dim(4)
    unite(flat, product([heads, head_dim]), WHY)
    assert list(atoms(flat)) == [find(heads), find(head_dim)]
    kept_heads = {find(heads): np.array([True, False, True])}
    assert kept(flat, kept_heads).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_both_sides_are_cut_as_finely_as_the_other_demands():
    """(2 * 6) with (4 * 3): 6 becomes (2 * 3) and 4 becomes (2 * 2)."""
    a, b, c, d = Dim(2), Dim(6), Dim(4), Dim(3)
    unite(product([a, b]), product([c, d]), WHY)
    assert [x.size for x in atoms(c)] == [2, 2] and [x.size for x in atoms(b)] == [2, 3]
    assert list(atoms(product([a, b]))) == list(atoms(product([c, d])))
    """(5 + 7) with (4 + 8): three parts."""
    a, b, c, d = Dim(5), Dim(7), Dim(4), Dim(8)
    unite(concat([a, b]), concat([c, d]), WHY)
    assert [x.size for x in atoms(concat([a, b]))] == [4, 1, 7]
    assert list(atoms(concat([c, d]))) == list(atoms(concat([a, b])))


def test_a_concatenation_that_a_reshape_splits_shares_the_minor_part():
    a, b, rows, columns = Dim(4), Dim(4), Dim(2), Dim(4)
    unite(concat([a, b]), product([rows, columns]), WHY)
    assert find(a) is find(b) is find(columns)


def test_the_minor_part_may_be_a_concatenation_itself():
    """(x + y + x + y) with (2, x + y): whoever cut 8 in x + y first or last."""
    x, y, rows, columns = Dim(3), Dim(5), Dim(2), Dim(8)
    unite(concat([x, y, x, y]), product([rows, columns]), WHY)
    assert list(atoms(columns)) == [find(x), find(y)]
    assert all(atom.reason is None for atom in (x, y))


@pytest.mark.parametrize(
    "a, b",
    [
        (product([Dim(2), Dim(3)]), product([Dim(3), Dim(2)])),
        (concat([Dim(3), Dim(5)]), product([Dim(4), Dim(2)])),
        (concat([Dim(6), Dim(2)]), product([Dim(2), Dim(4)])),
    ],
)
def test_what_cannot_be_cut_to_fit_is_fixed_with_its_reason(a, b):
    unite(a, b, WHY)
    reasons = {atom.reason for d in (a, b) for atom in atoms(d) if atom.size > 1}
    assert reasons == {WHY}


def test_a_reason_reaches_every_part_that_is_cut_later():
    d = fix(Dim(12), WHY)
    factor(cut(d, 6)[1], 2)
    assert all(atom.reason is WHY for atom in atoms(d))
    other = Dim(12)
    unite(other, d, lambda: "another reason")
    assert all(atom.reason is WHY for atom in atoms(other))


def test_the_first_reason_stays():
    d = fix(Dim(3), WHY)
    fix(d, lambda: "later")
    assert find(d).reason is WHY


def test_dims_of_one_index_and_of_none_leave_no_trace():
    d = Dim(5)
    assert product([Dim(1), d, Dim(1)]) is d and concat([Dim(0), d]) is d
    assert product([Dim(1), Dim(1)]).size == 1 and concat([]).size == 0
    assert cut(d, 0)[1] is d and cut(d, 5)[0] is d
    assert factor(d, 1)[0] is d and factor(d, 5)[1] is d


def shrunk(size, new):
    return Dim(size, new=new)


CONFLICTS = {
    "fixed after it shrank": lambda: fix(shrunk(4, 2), WHY),
    "shrunk after it was fixed": lambda: unite(shrunk(4, 2), fix(Dim(4), WHY), WHY),
    "fixed by its partner": lambda: unite(fix(Dim(4), WHY), shrunk(4, 2), WHY),
    "cut where nothing says what left": lambda: cut(shrunk(4, 2), 1),
    "factored so": lambda: factor(shrunk(4, 2), 2),
    "united with parts that stay": lambda: unite(
        shrunk(4, 2), product([Dim(2), Dim(2)]), WHY
    ),
    "of two sizes": lambda: unite(shrunk(4, 2), shrunk(4, 3), WHY),
    # Two weights that lost two indices each: not the same two.
    "of one size, shrunk apart": lambda: unite(shrunk(4, 2), shrunk(4, 2), WHY),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_size_that_cannot_be_is_a_conflict(name):
    with pytest.raises(Conflict, match="4"):
        CONFLICTS[name]()


def test_a_size_reaches_all_that_is_united_with_it():
    a, b, c = shrunk(4, 2), Dim(4), Dim(4)
    unite(b, c, WHY)
    unite(c, a, WHY)
    assert new_size(b) == new_size(product([Dim(3), b])) // 3 == 2
    assert math.prod(map(new_size, (a, b, c))) == 8


@pytest.mark.parametrize("size", [40, 5000])
def test_a_dim_that_is_one_with_itself_shifted_stays_whole(size):
    whole = Dim(size)
    unite(cut(whole, size - 1)[0], cut(whole, 1)[1], WHY)
    assert all(a.reason is not None for a in atoms(whole))
    # Each of its indices is not looked at.
    assert len(list(atoms(whole))) < 100
    assert sum(a.size for a in atoms(whole)) == size
