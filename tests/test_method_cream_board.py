"""The board of paths and the draw of paths against the published code's logs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from method.cream.board import BoardEntry, PathBoard, PathSampler

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cream.json").read_text())
PRE_PROB = (0.05, 0.2, 0.05, 0.5, 0.05, 0.15)
DEPTHS = (4, 4, 4, 4, 4)


def entry(score, flops, arch=((0,), (1,), (0,))):
    return BoardEntry(score, flops, arch, torch.full((2, 1, 1, 1), score), torch.full((2, 3), flops))


def offer(board, new, epoch=99):
    admitted = board.admits(new.score, new.flops, epoch)
    if admitted:
        board.add(new)
    return admitted


def test_published_log_step_by_step():
    golden = GOLDEN["board_updates"]
    board = PathBoard(golden["pool_size"], golden["acc_gap"], golden["meta_sta_epoch"])
    for step in golden["steps"]:
        new = entry(step["prec1"], step["flops"], [[0], [ord(step["path"])], [0]])
        assert offer(board, new, step["epoch"]) == step["admitted"], step
        shown = [[chr(row["arch"][1][0]), row["score"], row["flops"]] for row in board.rows()]
        assert shown == step["board_after"]


def test_equal_entries_are_kept_in_order_of_arrival():
    board = PathBoard(3, 5.0, 0)
    twins = [entry(50.0, 300.0) for _ in range(3)]
    assert all(offer(board, twin) for twin in twins)
    assert [id(e) for e in board.entries] == [id(t) for t in twins]
    assert not offer(board, entry(50.0, 100.0))


@pytest.mark.parametrize(
    ("score", "flops", "admitted"),
    [(55.0, 400.0, False), (55.01, 400.0, True), (50.1, 299.9, True), (50.1, 300.0, False), (50.0, 10.0, False)],
)
def test_all_comparisons_are_strict(score, flops, admitted):
    board = PathBoard(1, 5.0, 0)
    board.add(entry(50.0, 300.0))
    assert board.admits(score, flops, 1) is admitted
    assert not board.admits(score, flops, 0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=40), st.integers(1, 5), st.integers(0, 6))
def test_board_stays_sorted_and_within_its_size(offers, pool_size, gap):
    board = PathBoard(pool_size, gap, 0)
    for score, flops in offers:
        before = board.rows()
        admitted = offer(board, entry(float(score), float(flops)))
        keys = [(e.score, e.flops) for e in board.entries]
        assert keys == sorted(keys, reverse=True)
        assert len(board) == min(pool_size, len(before) + admitted)
        if len(before) < pool_size:
            assert admitted
        elif admitted:
            assert score > before[-1]["score"]
        else:
            assert board.rows() == before


def test_result_prefers_the_interval():
    board = PathBoard(4, 5.0, 0)
    assert board.result(0, 600) is None
    for score, flops in ((60.0, 500.0), (50.0, 300.0), (40.0, 200.0)):
        board.add(entry(score, flops))
    assert board.result(0, 600)[0].score == 60.0
    assert [(e.score, inside) for e, inside in [board.result(200, 300)]] == [(50.0, True)]
    assert [(e.score, inside) for e, inside in [board.result(200, 299)]] == [(40.0, True)]
    assert [(e.score, inside) for e, inside in [board.result(700, 800)]] == [(60.0, False)]


def test_board_state_round_trip(tmp_path):
    board = PathBoard(4, 5.0, 0)
    for score, flops in ((60.0, 500.0), (50.0, 300.0)):
        board.add(entry(score, flops, [[0], [2, 1], [0]]))
    torch.save(board.state_dict(), tmp_path / "board.pt")
    other = PathBoard(4, 5.0, 0)
    other.load_state_dict(torch.load(tmp_path / "board.pt", weights_only=True))
    assert other.rows() == board.rows()
    assert json.loads(json.dumps(board.rows())) == board.rows()
    for ours, theirs in zip(board.entries, other.entries, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.probs, theirs.probs)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "probs"), [("uniform_seed42", None), ("pre_prob_seed42", PRE_PROB)])
def test_published_draws(key, probs):
    sampler = PathSampler(DEPTHS, 6, 42, probs)
    assert [sampler.draw() for _ in range(3)] == GOLDEN["sampling"][key]


def test_probabilities_are_honoured():
    """Chi-square with 5 degrees of freedom: 99.9 % lie below 20.5, and uniform draws at about 3,500."""
    sampler = PathSampler(DEPTHS, 6, 7, PRE_PROB)
    counts = np.bincount([i for _ in range(300) for stage in sampler.draw()[1:-1] for i in stage], minlength=6)
    expected = counts.sum() * np.array(PRE_PROB)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_probabilities_may_be_rounded():
    third = (0.3333333,) * 3
    assert PathSampler((4,), 3, 1, third).draw() == PathSampler((4,), 3, 1, (1 / 3,) * 3).draw()


def test_histogram_leaves_out_the_fixed_stages():
    sampler = PathSampler((2, 1), 4, 0)
    assert sampler.histogram([]) is None
    assert sampler.histogram([[[0], [1, 1], [3], [0]]]) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    draws = [sampler.draw([0.0, 1.0, 0.0, 0.0]) for _ in range(5)]
    assert draws == [[[0], [1, 1], [1], [0]]] * 5


def test_draws_leave_the_global_generators_alone_and_resume(tmp_path):
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    sampler = PathSampler((3, 2), 6, 5, PRE_PROB)
    for _ in range(700):
        sampler.draw()
    torch.save(sampler.state_dict(), tmp_path / "sampler.pt")
    expected = [sampler.draw() for _ in range(20)]
    other = PathSampler((3, 2), 6, 1, PRE_PROB)
    other.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    assert [other.draw() for _ in range(20)] == expected
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_large_seeds_are_accepted():
    assert PathSampler((2,), 3, 2**63 - 1).draw() == PathSampler((2,), 3, 2**32 - 1).draw()
