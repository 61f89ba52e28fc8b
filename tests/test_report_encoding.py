"""Numbers and words in the page: read back, they are what they were, as far as is promised."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.errors import CapaProbeError
from capa_probe.report.encoding import float24, plain, script_json, uint16
from tests.report_pages import decoded

_FLOATS = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


class TestFloats:
    @given(st.lists(_FLOATS, max_size=20))
    def test_four_digits_are_right(self, values: list[float]) -> None:
        given_ = np.array(values, np.float32)
        normal = (given_ >= np.finfo(np.float32).tiny) & (given_ < 1e38)
        found = decoded(float24(given_))
        np.testing.assert_allclose(found[normal], given_[normal], rtol=2.0**-17)

    def test_special_values(self) -> None:
        found = decoded(float24([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1e-7]))
        np.testing.assert_array_equal(found, [0, 0, np.nan, np.inf, 0, 1, 0])
        # A NaN with all bits set must not become another number when it is rounded.
        odd = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
        assert np.isnan(decoded(float24(odd))).all()

    def test_rounds_to_nearest(self) -> None:
        step = 2.0**-16  # of the numbers written, from 1 to 2
        values = [1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, 1 + 1.5 * step]
        np.testing.assert_array_equal(decoded(float24(values)), [1, 1 + step, 1, 1 + 2 * step])

    def test_four_characters_a_value(self) -> None:
        assert len(float24(np.ones((3, 4)))) == 4 * 12
        assert float24([]) == ""


class TestIndices:
    def test_none_is_the_largest(self) -> None:
        found = np.frombuffer(base64.b64decode(uint16([0, 258, -1, 65534])), "<u2")
        np.testing.assert_array_equal(found, [0, 258, 65535, 65534])

    def test_too_large(self) -> None:
        with pytest.raises(CapaProbeError, match="index 65535 was given"):
            uint16([65535])


class TestJSON:
    @given(st.text())
    def test_no_markup_and_the_same_text(self, text: str) -> None:
        written = script_json({"a": text + "</script><!--&\u2028"})
        assert not set("<>&\u2028\n") & set(written)
        assert json.loads(written) == {"a": text + "</script><!--&\u2028"}

    def test_numbers(self) -> None:
        found = plain(
            {"a": (np.float32(0.5), np.int64(3), np.nan, np.inf), "b": np.array([1.0, np.nan]), 3: True}
        )
        assert found == {"a": [0.5, 3, None, None], "b": [1.0, None], "3": True}
