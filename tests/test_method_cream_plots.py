"""Pictures of a Cream search."""

import pytest
from matplotlib.figure import Figure

from method.cream.plots import plot_board, plot_network
from model.search.reading import parse_arch_list
from model.search.space import PUBLISHED

ARCH = "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: (figures.append(self), save(self, path, **kw)))
    return figures


def row(score, macs):
    return {"score": score, "macs": macs, "flops": 2 * macs, "arch": [[0], [1], [0]]}


def test_board_has_one_point_per_entry_coloured_by_its_arrival(drawn):
    first, second, third = row(20.0, 300.0), row(25.0, 310.0), row(30.0, 320.0)
    history = [{"epoch": 4, "entries": [second, first]}, {"epoch": 6, "entries": [third, second]}]
    picture = plot_board({"board": [third, second], "history": history})
    assert picture[:4] == b"\x89PNG"
    seen, now, best = drawn[0].axes[0].collections
    assert dict(zip(map(tuple, seen.get_offsets().tolist()), seen.get_array().tolist(), strict=True)) == {
        (300.0, 20.0): 5,
        (310.0, 25.0): 5,
        (320.0, 30.0): 7,
    }
    assert now.get_offsets().tolist() == [[320.0, 30.0], [310.0, 25.0]]
    assert best.get_offsets().tolist() == [[320.0, 30.0]]


def test_an_empty_board_is_a_picture_too():
    assert plot_board({"board": [], "history": []})[:4] == b"\x89PNG"


def test_network_shows_every_block(drawn):
    plan = PUBLISHED.plan(parse_arch_list(ARCH), 1000)
    assert plot_network(plan.stages, title="cream_287")[:4] == b"\x89PNG"
    axes = drawn[0].axes[0]
    texts = [text.get_text() for text in axes.texts]
    blocks = [
        f"{b.kernel}x{b.kernel}\ne{b.expansion}" + ("\ns2" if b.stride == 2 else "") for s in plan.stages for b in s
    ]
    assert [text for text in texts if "\ne" in text] == blocks
    assert [text for text in texts if "channels" in text] == [
        f"stage {i}\n{channels} channels" for i, channels in enumerate((24, 40, 80, 96, 192), start=1)
    ]
    assert len(axes.patches) >= len(blocks) + 2
    assert axes.get_title() == "cream_287"
