"""Whether voxel values are Hounsfield units (HU): decided from the voxels, not from what a header says.

Releases exist whose headers still declare a rescale that was applied long ago, and files in which it never was. Both
pass every check of type and shape, and a model trained on them learns nothing. What tells them apart is anatomy: fat,
water, muscle and organs lie within 200 HU of water, air is at -1000, and little of a body is denser than 500.

(1) a sample of the voxels is taken, and padding outside the field of view is set aside
(2) stored values that look like HU, and would not any more once rescaled, keep their values: the rescale is refused
(3) values that look like HU shifted by a usual intercept, or taken twice, are named
Where anatomy does not tell (a phantom, a few voxels), the declared rescale is followed and a note says so.
"""

from collections.abc import Sequence

import numpy as np

RESCALE_MODES = ("auto", "apply", "skip")
AS_STORED = (1.0, 0.0)

# At most so many voxels are looked at along each axis: 110,000 in all, whatever the size of the scan.
SAMPLES_PER_AXIS = 48
# Of a human body in a CT, in shares of the voxels that are no padding. Wide on purpose: a small child in a large field
# of view is 15 % body, a scan with contrast and metal 10 % denser than 500 HU, sharp kernels spread air by 100 HU, and
# padding that was interpolated smears from -3024 up to air.
WATER_HU, MIN_WATER = 200, 0.08
DENSE_HU, MAX_DENSE = 500, 0.2
BELOW_AIR_HU, MAX_BELOW_AIR = -1300, 0.1
GAS_HU, MIN_GAS = -500, 0.02
# Soft tissue is a peak at water: hardly anything of a body lies as far below fat as the second range does. In a scan
# that was rescaled twice both ranges hold bone, and the second one more of it (3 to 6 times, in real scans).
TISSUE_HU, BELOW_FAT_HU = (-150, 150), (-450, -150)
MIN_TISSUE, MIN_PEAK = 0.001, 2
AIR_SPREAD, MIN_AIR = 150, 0.3  # where a body is too small to be known by MIN_WATER, there is air
# Where HU lie after a wrong rescale: never applied (1024, 8192), applied twice, of the other scanner, three times.
SHIFTS = (1024, -1024, 8192, -8192, 7168, -2048)
USUAL_PADDING = -2000  # GE scanners; so near to twice rescaled air (-2024) that only the exact value tells them apart


def sample_voxels(array: np.ndarray) -> np.ndarray:
    """(1) An even sample of an array's finite voxels, as flat float64."""
    steps = [max(1, -(-size // SAMPLES_PER_AXIS)) for size in array.shape]
    values = array[tuple(slice(None, None, step) for step in steps)].astype(np.float64).ravel()
    return values[np.isfinite(values)]


def choose_rescale(
    array: np.ndarray, declared: Sequence[float], mode: str = "auto"
) -> tuple[tuple[float, float], str | None]:
    """(2) The rescale that turns stored values into HU.

    Args:
        array: Stored values, any shape and orientation.
        declared: (slope, intercept) as header or metadata say.
        mode: "auto" refuses a rescale that was applied already; "apply" applies it always, "skip" never.

    Returns:
        (slope, intercept) to apply, and a note for the user if it is not the declared one or is only believed.

    Raises:
        ValueError: If the mode is unknown.
    """
    check_rescale_mode(mode)
    slope, intercept = (float(value) for value in declared)
    words = f"rescale (slope {slope:g}, intercept {intercept:g})"
    if (slope, intercept) == AS_STORED or mode == "apply":
        return (slope, intercept), None
    if mode == "skip":
        return AS_STORED, f"the declared {words} was not applied, as was asked."
    stored = sample_voxels(array)
    rescaled = stored * slope + intercept
    was_small, becomes_small = _is_small_body(stored), _is_small_body(rescaled)
    if looks_like_hu(rescaled) or (becomes_small and not was_small):
        return (slope, intercept), None
    is_hu = looks_like_hu(stored) and not _may_be_air_alone(stored, rescaled)
    if is_hu or (was_small and not becomes_small):
        return AS_STORED, (
            f"the stored values are HU already, so the declared {words} was refused: "
            f"{_share_near_water(stored):.0%} of the voxels lie within {WATER_HU} HU of water, and only "
            f"{_share_near_water(rescaled):.0%} would after it."
        )
    return (
        slope,
        intercept,
    ), f"the voxels do not tell whether the declared {words} is still due; it was applied."


def _may_be_air_alone(stored: np.ndarray, rescaled: np.ndarray) -> bool:
    """Whether stored values that pass for a body could be the air of a small body in a large field of view.

    Then nothing is darker, but for padding, and something would lie near water once rescaled.
    """
    darker = np.mean((stored < -WATER_HU) & (stored != stored.min()))
    return bool(darker <= 0.005 and np.mean(np.abs(rescaled) <= WATER_HU) >= 0.02)


def check_rescale_mode(mode: str) -> None:
    if mode not in RESCALE_MODES:
        raise ValueError(f"rescale mode {mode!r} is none of {list(RESCALE_MODES)}.")


def looks_like_hu(values: np.ndarray, shift: float = 0.0) -> bool:
    """Whether a sample of values is that of a CT whose HU are all `shift` too high."""
    values = _without_padding(values, shift) - shift
    if not values.size:
        return False
    is_body = np.mean(np.abs(values) <= WATER_HU) >= MIN_WATER and np.mean(values > DENSE_HU) <= MAX_DENSE
    # Air of a true scan, alone in a large field of view, can pass for a body that was rescaled twice; but then nothing
    # is darker than that body.
    has_gas = shift >= 0 or np.mean(values < GAS_HU) >= MIN_GAS
    return bool(is_body and has_gas and np.mean(values < BELOW_AIR_HU) <= MAX_BELOW_AIR)


def wrong_hu(values: np.ndarray) -> str | None:
    """(3) What is wrong with a sample of values that should be HU, and how to mend it; None where nothing is seen."""
    inside = _without_padding(values, 0)
    if not inside.size:
        return None
    # Much air that was never rescaled lies at 24, near water. Then nothing is darker, and the body lies 1024 too high.
    has_dark = np.mean(inside < -WATER_HU) > 0.001
    if looks_like_hu(values) and (has_dark or not looks_like_hu(values, SHIFTS[0])):
        return None
    for shift in SHIFTS:
        if not looks_like_hu(values, shift):
            continue
        if shift > 0:
            return (
                f"the values lie about {shift} above HU (soft tissue near {shift + 40}, air near {shift - 1000}): the "
                f"rescale was never applied. {how_to_rescale(1, -shift)}"
            )
        # Much air around a small body, and padding darker than it, pass for a body and its air that lie too low.
        if not _has_tissue_at_water(inside):
            return (
                f"the values lie about {-shift} below HU (soft tissue near {shift + 40}, air near {shift - 1000}): "
                f"they were rescaled twice. {how_to_rescale(1, -shift)}"
            )
    is_twice = np.mean(inside < BELOW_AIR_HU) > max(MAX_BELOW_AIR, np.mean(np.abs(inside + 1000) <= AIR_SPREAD))
    if is_twice and looks_like_hu(inside / 2):
        return (
            f"the values are about twice the HU (air near -2000): the slope was applied twice. {how_to_rescale(0.5, 0)}"
        )
    return None


def how_to_rescale(slope: float | str, intercept: float | str) -> str:
    """How a user gives the rescale of one scan, as the last sentence of a message."""
    return (
        f"Give rescale_slope {slope} and rescale_intercept {intercept} (columns in the table of `python -m "
        f"data_builders folder`; in Python rescale=({slope}, {intercept}); not for DICOM), or export the series again "
        "as HU."
    )


def _is_small_body(values: np.ndarray) -> bool:
    """Whether a sample of values is that of a CT with much air around little soft tissue, both where they belong."""
    inside = _without_padding(values, 0)
    if not inside.size or np.mean(np.abs(inside + 1000) <= AIR_SPREAD) < MIN_AIR:
        return False
    return _has_tissue_at_water(inside)


def _has_tissue_at_water(inside: np.ndarray) -> bool:
    """Whether the soft tissue of a body, however small, is seen where it belongs."""
    tissue, below_fat = (np.mean((low < inside) & (inside <= high)) for low, high in (TISSUE_HU, BELOW_FAT_HU))
    return bool(tissue >= max(MIN_TISSUE, MIN_PEAK * below_fat))


def padding(values: np.ndarray) -> tuple[float, float] | None:
    """Value and share of the padding below air, or None: the lowest value, if many voxels hold it and few come near."""
    if not values.size:
        return None
    lowest = values.min()
    share = np.mean(values == lowest)
    near = np.mean((values > lowest) & (values <= lowest + 50))
    return (float(lowest), float(share)) if share >= 0.005 and near <= share / 10 else None


def _without_padding(values: np.ndarray, shift: float) -> np.ndarray:
    found = padding(values)
    if found is None:
        return values
    # Air that a scanner clipped, or that a phantom paints with one value, stands alone as well; it is no padding.
    is_air = abs(found[0] - shift + 1000) <= 60 and found[0] != USUAL_PADDING
    return values if is_air else values[values != found[0]]


def _share_near_water(values: np.ndarray) -> float:
    return float(np.mean(np.abs(_without_padding(values, 0)) <= WATER_HU))
