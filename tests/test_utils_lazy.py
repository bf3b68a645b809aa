"""Names of a package that are imported when they are asked for."""

import sys
from pathlib import Path

import pytest


def test_a_name_is_imported_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    face = tmp_path / "lazy_face"
    face.mkdir()
    (face / "__init__.py").write_text(
        "from utils.lazy import lazily\n__getattr__ = lazily(__name__, 'first', 'second')\n"
    )
    (face / "first.py").write_text("one = 1\n")
    (face / "second.py").write_text("one, two = 11, 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_face

    assert "lazy_face.first" not in sys.modules
    from lazy_face import one

    assert one == 1
    assert "lazy_face.second" not in sys.modules
    assert lazy_face.two == 2
    with pytest.raises(AttributeError, match=r"'lazy_face' has no attribute 'three'"):
        lazy_face.three  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'three'"):
        from lazy_face import three  # noqa: F401
