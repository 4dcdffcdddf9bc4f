"""Digests follow content."""

from hypothesis import given
from hypothesis import strategies as st

from app.versions import ModelVersion, TableVersion, as_json, code_version, digest

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_versions_read_as_the_last_line_shows_them() -> None:
    assert as_json(TableVersion("support.conversations", 42)) == {"table": "support.conversations", "snapshot_id": 42}
    assert as_json(ModelVersion("support", "3", "/m")) == {"model": "support", "version": "3", "uri": "/m"}


@given(st.dictionaries(st.text(), JSON_VALUES))
def test_a_digest_does_not_depend_on_key_order(value: dict[str, object]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


def test_code_versions_differ_by_package() -> None:
    assert len({code_version(), code_version("ingestion"), code_version("training"), code_version("serving")}) == 4
    assert code_version("ingestion") == code_version("ingestion")
