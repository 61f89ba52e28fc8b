"""Which visual tokens a budget keeps, and the masks and positions of what is left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.errors import CapaProbeError
from capa_probe.pruning.keep import check_keep, image_index, n_kept, select
from capa_probe.pruning.masks import entries_mask, take
from capa_probe.pruning.rotary import compacted

SHARES = st.floats(0, 1, exclude_min=True)


@st.composite
def batches(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image index, living tokens and scores with many ties: each (batch, position)."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    size = rows * length
    image = torch.tensor(draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))).view(rows, length)
    alive = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(rows, length)
    scores = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))).view(rows, length)
    return image, alive, scores.float()


class TestCounts:
    @given(SHARES, st.integers(1, 3000))
    def test_of_a_share(self, keep: float, total: int) -> None:
        assert n_kept(keep, total) == max(1, round(keep * total))

    @given(st.integers(2, 50), st.integers(1, 50))
    def test_of_a_number(self, keep: int, total: int) -> None:
        if keep <= total:
            assert n_kept(keep, total) == keep
        else:
            with pytest.raises(CapaProbeError, match=f"keep={keep} was given.*only {total} visual tokens"):
                n_kept(keep, total)

    @pytest.mark.parametrize(
        ("keep", "total", "n"), [(0.25, 576, 144), (1, 7, 7), (1.0, 7, 7), (0.001, 7, 1)]
    )
    def test_by_example(self, keep: float, total: int, n: int) -> None:
        assert n_kept(keep, total) == n

    @pytest.mark.parametrize("keep", [-0.1, 1.5, -3, math.nan, math.inf, True, "0.5", None])
    def test_what_is_no_budget(self, keep: Any) -> None:
        with pytest.raises(
            CapaProbeError, match=r"give a share in \(0, 1\] or a whole number of tokens above 1"
        ):
            check_keep(keep)

    def test_none_at_all_only_by_name(self) -> None:
        with pytest.raises(CapaProbeError, match="leaves no visual token; say allow_none=True"):
            check_keep(0)
        check_keep(0, allow_none=True)
        assert n_kept(0, 10) == 0


class TestSelection:
    @given(batches(), SHARES, st.sampled_from(["sample", "image"]))
    def test_keeps_the_best_and_all_text(self, batch: Any, keep: float, budget: Any) -> None:
        image, alive, scores = batch
        kept = select(scores, image, alive, keep, budget)
        assert torch.equal(kept[image < 0], alive[image < 0])
        assert not (kept & ~alive).any()
        for row in range(len(image)):
            own = image[row].tolist()
            for group in [{0, 1, 2}] if budget == "sample" else [{0}, {1}, {2}]:
                original = [i for i, index in enumerate(own) if index in group]
                there = [i for i in original if alive[row, i]]
                n = max(1, round(keep * len(original)))
                wanted = sorted(there, key=lambda i: (-scores[row, i].item(), i))[:n]
                assert [i for i in there if kept[row, i]] == sorted(wanted)

    @given(batches(), SHARES, st.integers(0, 2**14 - 1))
    def test_the_protected_stay_and_count(self, batch: Any, keep: float, bits: int) -> None:
        image, alive, scores = batch
        safe = torch.tensor([bool(bits >> i & 1) for i in range(image.shape[1])]).expand(image.shape)
        kept = select(scores, image, alive, keep, protected=safe)
        living = alive & (image >= 0)
        assert kept[living & safe].all()
        for row in range(len(image)):
            n = max(1, round(keep * int((image[row] >= 0).sum())))
            wanted = min(max(n, int((living & safe)[row].sum())), int(living[row].sum()))
            assert int((kept & living)[row].sum()) == wanted

    @given(batches(), SHARES, SHARES)
    def test_twice_is_nested_and_counts_the_original(self, batch: Any, one: float, two: float) -> None:
        image, alive, scores = batch
        alive = torch.ones_like(alive)
        first = select(scores, image, alive, max(one, two))
        second = select(-scores, image, first, min(one, two))
        assert not (second & ~first).any()
        for row in range(len(image)):
            total = int((image[row] >= 0).sum())
            n = max(1, round(min(one, two) * total)) if total else 0
            assert int((second & (image >= 0))[row].sum()) == n

    def test_a_count_above_what_is_left(self) -> None:
        image, alive = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[True, False, False, True]])
        with pytest.raises(CapaProbeError, match="keep=3 was given, but only 2 of 4 visual tokens are left"):
            select(torch.zeros(1, 4), image, alive, 3)

    def test_a_score_that_is_nan(self) -> None:
        image, alive = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)
        scores = torch.tensor([[0.0, 1.0], [math.nan, 1.0]])
        with pytest.raises(CapaProbeError, match="visual token of row 1 of the batch is NaN"):
            select(scores, image, alive, 0.5)
        alive[1, 0] = False  # nobody asks for it
        assert select(scores, image, alive, 0.5).tolist() == [[False, True], [False, True]]


class TestImages:
    def test_are_told_apart_by_what_is_between_them(self) -> None:
        visual = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()
        assert image_index(visual).tolist() == [[0, 0, -1, 1, -1, 2, 2], [-1, 0, 0, 0, -1, -1, -1]]

    def test_or_by_their_size(self) -> None:
        visual = torch.tensor([[1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]]).bool()
        assert image_index(visual, 2).tolist() == [[0, 0, 1, 1, -1, 2, 2], [-1, 0, 0, -1, -1, -1, -1]]


class TestMasks:
    @given(st.data())
    def test_a_part_of_a_mask_is_that_part(self, data: Any) -> None:
        seen, new = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
        allowed = torch.rand(2, 1, new, seen + new) > 0.4
        keys = (
            [sorted(data.draw(st.sets(st.integers(0, seen + new - 1), min_size=3, max_size=3))) for _ in "ab"]
            if seen + new >= 3
            else [[0], [0]]
        )
        key, query = torch.tensor(keys), torch.arange(seen, seen + new).expand(2, -1)
        visible = torch.rand(key.shape) > 0.3
        found = entries_mask(allowed, query, key, visible, seen)
        bias = entries_mask(torch.where(allowed, 0.0, torch.finfo().min), query, key, visible, seen)
        for row in range(2):
            for i in range(new):
                for j, k in enumerate(keys[row]):
                    assert found[row, 0, i, j] == (allowed[row, 0, i, k] & visible[row, j])
        assert torch.equal(bias == 0, found)
        assert (bias[~found] == torch.finfo().min).all()

    def test_without_one_it_is_causal_in_input_positions(self) -> None:
        key, visible = torch.tensor([[0, 2, 5]]), torch.tensor([[True, False, True]])
        found = entries_mask(None, key, key, visible, 0, hidden_queries=~visible)
        assert found[0, 0].tolist() == [[True, False, False], [True, True, False], [True, False, True]]

    def test_take_finds_the_batch_axis(self) -> None:
        index = torch.tensor([[0, 3], [1, 2]])
        x = torch.arange(3 * 2 * 4 * 5).view(3, 2, 4, 5)
        assert torch.equal(take(x, index, 1), torch.stack([x[:, 0][:, [0, 3]], x[:, 1][:, [1, 2]]], dim=1))
        assert torch.equal(take(x[0, :1], index), torch.stack([x[0, 0, [0, 3]], x[0, 0, [1, 2]]]))


class TestCompactedPositions:
    def test_close_up(self) -> None:
        alive = torch.tensor([[True, False, True, False, True], [False, True, True, True, True]])
        new, shift = compacted(torch.arange(5).view(1, 1, 5), alive)
        assert new[0][alive].tolist() == [0, 1, 2, 0, 1, 2, 3]
        assert shift.tolist() == [-2, -1]

    def test_of_m_rope_keep_text_on_one_number_and_the_grid_in_shape(self) -> None:
        # text, an image of 2 x 3, text; the middle column goes.
        ids = torch.tensor(
            [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]
        )
        alive = torch.tensor([[True, True, False, True, True, False, True, True, True]])
        new, shift = compacted(ids[:, None], alive)
        assert new[:, 0][:, alive[0]].tolist() == [
            [0, 1, 1, 1, 1, 4, 5],
            [0, 1, 1, 2, 2, 4, 5],
            [0, 1, 3, 1, 3, 4, 5],
        ]  # row 2 still uses the number 2
        assert shift.tolist() == [0]
        alive[0, 4:7] = False  # the second row too
        new, shift = compacted(ids[:, None], alive)
        assert new[:, 0][:, alive[0]].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
        assert shift.tolist() == [-1]
