"""What somebody who means harm, or a broken program, puts where values are expected."""

from hypothesis import strategies as st

from locft_easyedit.errors import LocFTError

# Lone surrogates, NUL, huge numbers and names that mean something here.
TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Lo"]), max_size=4),
    st.sampled_from(
        ["", " ", "???", "${oc.env:HOME}", "a\0b", "\ud800", "../../x", "1e999", "null", "{}"]
    ),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64, 1e308]),
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS


class Deep:
    """Lists in lists, too many for anybody to print: `real` makes them."""

    def __init__(self, depth, leaf=1):
        self.depth, self.leaf = depth, leaf

    def __repr__(self):
        return f"Deep({self.depth}, {self.leaf!r})"


def real(value):
    """Returns a copy with real lists in place of `Deep`."""
    if isinstance(value, Deep):
        made = value.leaf
        for _ in range(value.depth):
            made = [made]
        return made
    if isinstance(value, dict):
        return {key: real(entry) for key, entry in value.items()}
    return [real(entry) for entry in value] if isinstance(value, list) else value


def attempt(kind, function, *args, **kwargs):
    """Returns what a function returns, and whether it refused instead, as it should."""
    try:
        return function(*args, **kwargs), False
    except LocFTError as error:
        refused = error
    assert isinstance(refused, kind)
    str(refused).encode("utf-8", "backslashreplace")  # it can be printed, and read
    assert 0 < len(str(refused)) < 20_000
    return None, True


def values(keys=TEXTS, max_leaves=12):
    """Any value that JSON can hold, its mappings with these keys; sometimes far too deep."""
    return st.one_of(
        st.recursive(
            LEAVES,
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(keys | TEXTS, inner, max_size=4)
            ),
            max_leaves=max_leaves,
        ),
        st.sampled_from([Deep(5000), Deep(900), {"a": Deep(2000)}]),
    )
