"""The plain dict `preprocessing`: there and back, and what cannot be followed is refused in one line."""

import pytest

from recipe.preprocessing import Preprocessing, eval_resize
from utils.errors import UserError

STEPS = Preprocessing(
    resize=257, interpolation="bicubic", crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def test_there_and_back_as_plain_data():
    values = STEPS.as_dict()
    assert values == {
        "resize": 257,
        "interpolation": "bicubic",
        "crop": 224,
        "color_order": "RGB",
        "value_range": [0.0, 1.0],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert Preprocessing.from_dict(values, "--resume x") == STEPS


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", [0.5, 0.5], "damaged"),
        ("crop", "wide", "damaged"),
        ("std", None, "damaged"),
        ("std", [0.2, 0.0, 0.2], "none that can be followed"),
        ("crop", 300, "none that can be followed"),
        ("interpolation", "nearest", "none that can be followed"),
        ("color_order", "BGR", "none that can be followed"),
        ("value_range", [-1.0, 1.0], "none that can be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(name, value, message):
    with pytest.raises(UserError, match=f"--resume x: .*{message}") as error:
        Preprocessing.from_dict({**STEPS.as_dict(), name: value}, "--resume x")
    assert "\n" not in str(error.value)
    missing = {key: one for key, one in STEPS.as_dict().items() if key != name}
    with pytest.raises(UserError, match="damaged"):
        Preprocessing.from_dict(missing, "--resume x")


def test_a_crop_over_a_resize_gives_that_resize():
    for crop in (160, 224, 288):
        for resize in range(crop, 2 * crop):
            assert eval_resize(crop, crop / resize) == resize
