"""Checks of parameters, and what difficulty means."""

import numbers
import operator
from dataclasses import dataclass


def integer(name: str, value, least: int) -> int:
    """The value as an int.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below `least`.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"deformed_shapes: {name} is {value!r}, expected an integer") from None
    if value < least:
        raise ValueError(f"deformed_shapes: {name} is {value}, expected at least {least}")
    return value


def fraction(name: str, value) -> float:
    """The value as a float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not in [0, 1].
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"deformed_shapes: {name} is {value!r}, expected a number from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"deformed_shapes: {name} is {value}, expected a number from 0 to 1")
    return float(value)


DEFAULT_DIFFICULTY = 0.25  # a small detector learns it within minutes and is far from perfect


@dataclass(frozen=True)
class Difficulty:
    """What makes a picture easy or hard. Colours are in grey levels of 0 to 255, lengths in object sizes.

    The first four are about surfaces and hold for both tasks; the others are for detection alone.
    """

    contrast: float  # distance in colour space between the mean of an object and that of the background
    clutter_contrast: float  # the same for the strokes and spots on all surfaces
    clutter: float  # mean number of strokes and spots on a surface as large as the image
    texture: float  # standard deviation of the texture
    occluders: float  # mean number of unlabelled occluders
    visible: float  # share of an object that stays visible at least
    stretch: float  # largest ratio of the stretch along one axis to that along the other
    shear: float  # largest shear
    warp: float  # root mean square of the displacement that bends an outline

    @classmethod
    def at(cls, difficulty: float) -> "Difficulty":
        """What a difficulty in [0, 1] means: each value moves geometrically, so smoothly and in one direction.

        Raises:
            TypeError, ValueError: As for `fraction`.
        """
        difficulty = fraction("difficulty", difficulty)
        ends = {
            "contrast": (110, 14),
            "clutter_contrast": (28, 14),  # at difficulty 1 that of the objects
            "clutter": (10, 40),
            "texture": (6, 20),
            "occluders": (0.4, 2.5),
            "visible": (0.9, 0.5),
            "stretch": (1.1, 1.7),
            "shear": (0.1, 0.5),
            "warp": (0.03, 0.12),
        }
        return cls(**{name: easy ** (1 - difficulty) * hard**difficulty for name, (easy, hard) in ends.items()})
