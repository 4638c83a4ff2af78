"""Pictures: which way is up and which side is left, on the arrays and on the page."""

import numpy as np
import pytest
from PIL import Image
from tiny_release import ct_rate_release

from data_builders import previews
from data_builders.__main__ import main
from data_builders.previews import draw_case, fullest_voxel, organ_colors, organs_to_show, plane_of
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import encode_array

ORGANS = ("lung", "heart", "liver")


def test_planes_lie_on_the_page_as_a_radiologist_expects():
    """One voxel at the head, in front and on the patient's left: each plane must show it in its own corner."""
    array = np.zeros((5, 6, 7), dtype=np.uint8)  # depth to the head, height to the back, width to the left
    array[4, 0, 6] = 1
    assert plane_of(array, "axial", (4, 0, 6))[0, 6], "front is up, the patient's left on the viewer's right"
    assert plane_of(array, "coronal", (4, 0, 6))[0, 6], "the head is up, the patient's left on the viewer's right"
    assert plane_of(array, "sagittal", (4, 0, 6))[0, 0], "the head is up, the face to the viewer's left"
    assert [plane_of(array, plane, (0, 0, 0)).shape for plane in ("axial", "coronal", "sagittal")] == [
        (6, 7),
        (5, 7),
        (5, 6),
    ]


def test_the_plane_drawn_cuts_most_of_the_organ():
    labels = np.zeros((5, 6, 7), dtype=np.uint8)
    labels[3, 1:5, 2] = 3
    labels[1, 2, 5] = 3
    assert fullest_voxel(labels) == [3, 2, 2]


def case(**changes) -> dict:
    """A heart on the patient's left (large width), a liver on the right and low; the lung is absent."""
    volume = np.full((20, 24, 28), 40, dtype=np.int16)
    mask = np.zeros_like(volume, dtype=np.uint8)
    mask[12:18, 4:12, 18:26] = 2
    mask[2:9, 4:16, 2:12] = 3
    captions = [
        {
            "organ": organ,
            "caption": f"{organ} costs 5 $ and x_1^2",
            "is_abnormal": organ == "heart",
            "is_mentioned": True,
        }
        for organ in ORGANS
    ]
    row = {
        "recon_id": "train_1_a_1",
        "volume": encode_array(volume),
        "mask": encode_array(mask),
        "shape": list(volume.shape),
        "spacing": [10.0, 5.0, 5.0],
        "captions": captions,
        "findings": "A report.",
        "impression": "",
        "labels": [],
    }
    return row | changes


def where(picture: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Pixels whose hue is the organ's, whatever grey lies under the colour."""
    strength = picture.astype(float).max(axis=2) - picture.astype(float).min(axis=2)
    direction = (picture - picture.mean(axis=2, keepdims=True)) @ (color[:3] - color[:3].mean())
    norm = np.linalg.norm(picture - picture.mean(axis=2, keepdims=True), axis=2) * np.linalg.norm(
        color[:3] - color[:3].mean()
    )
    return (strength > 60) & (direction > 0.97 * norm)


def test_on_the_page_the_heart_is_right_of_the_liver_and_above_it(tmp_path):
    draw_case(case(), tmp_path / "case.png")
    picture = np.asarray(Image.open(tmp_path / "case.png").convert("RGB")).astype(float)
    height, width, _ = picture.shape
    # The coronal plane of the overview: the second of three pictures in the first of three lines.
    columns = slice(int(0.215 * width), int(0.425 * width))
    overview = picture[: int(0.36 * height), columns]
    colors = organ_colors(ORGANS)
    heart, liver = (np.argwhere(where(overview, colors[index])) for index in (1, 2))
    assert len(heart) > 50 and len(liver) > 50, "both organs are drawn"
    assert not where(picture, colors[0]).any(), "an absent organ is not"
    assert heart[:, 1].min() > liver[:, 1].max(), "the patient's left is on the viewer's right"
    assert heart[:, 0].max() < liver[:, 0].min(), "head up"
    # 6 planes of 10 mm by 8 columns of 5 mm: the picture is true to millimetres, not to voxels.
    tall, wide = np.ptp(heart[:, 0]) + 1, np.ptp(heart[:, 1]) + 1
    assert tall / wide == pytest.approx(60 / 40, rel=0.1)


# Organs that lie on one another, or look alike, in some plane.
NEIGHBOURS = (
    "lung heart, lung liver, lung rib, lung spleen, heart aorta, heart pulmonary_artery, heart esophagus, "
    "trachea esophagus, aorta esophagus, aorta thoracic_vertebrae, aorta inferior_vena_cava, aorta lumbar_vertebrae, "
    "liver gallbladder, liver stomach, liver kidney, liver inferior_vena_cava, liver portal_and_splenic_vein, "
    "liver colon, liver duodenum, stomach spleen, stomach pancreas, spleen kidney, spleen colon, pancreas duodenum, "
    "pancreas portal_and_splenic_vein, kidney adrenal_gland, kidney iliopsoas, kidney autochthon, colon small_bowel, "
    "colon urinary_bladder, duodenum small_bowel, iliac_artery iliac_vein, iliopsoas lumbar_vertebrae, hip sacrum, "
    "hip femur, hip gluteus, femur gluteus, gluteus sacrum, face brain, scapula humerus, clavicula scapula, "
    "scapula rib, lumbar_vertebrae sacrum, cervical_vertebrae thoracic_vertebrae, thoracic_vertebrae lumbar_vertebrae"
)


def oklab(colors: np.ndarray) -> np.ndarray:
    """sRGB -> lightness and two colour axes, in which distances are as the eye sees them (B. Ottosson, 2020)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    to_cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_lab)


@pytest.mark.parametrize("name", ["chest_4", "body_24", "body_36"])
def test_no_two_organs_have_one_colour_and_neighbours_are_least_alike(name):
    organs = load_organ_set(name).organs
    colors = oklab(organ_colors(organs)[:, :3])
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    assert distance[~np.eye(len(organs), dtype=bool)].min() > 0.09, "0.02 is just to be told apart, side by side"
    pairs = [pair.split() for pair in NEIGHBOURS.split(", ")]
    pairs = [(organs.index(a), organs.index(b)) for a, b in pairs if a in organs and b in organs]
    assert min(distance[pair] for pair in pairs) > 0.18 and len(pairs) >= 3
    assert np.hypot(colors[:, 1], colors[:, 2]).min() > 0.1, "a grey would pass for the CT"


def test_an_organ_has_its_colour_in_every_set_and_unknown_ones_have_others():
    body = load_organ_set("body_36").organs
    of_body = dict(zip(body, organ_colors(body).tolist()))
    mine = ("tumour", "liver", "stent", "heart")
    colors = dict(zip(mine, organ_colors(mine).tolist()))
    assert [colors[organ] for organ in ("liver", "heart")] == [of_body[organ] for organ in ("liver", "heart")]
    assert len({tuple(color) for color in colors.values()}) == 4
    many = tuple(f"organ_{number}" for number in range(100))
    assert len({tuple(color) for color in organ_colors((*many, "liver")).tolist()}) == 101


def test_the_legend_holds_the_organs_that_are_there(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(previews, "draw_legend", lambda axes, organs, present, colors: drawn.append((organs, present)))
    draw_case(case(), tmp_path / "case.png")
    ((organs, present),) = drawn
    assert [organs[index] for index in present] == ["heart", "liver"]


def test_the_same_row_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_case(case(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_abnormal_organs_are_shown_before_large_ones():
    mask = np.zeros((4, 4, 8), dtype=np.uint8)
    mask[..., 0], mask[..., 1:4], mask[..., 4:] = 1, 2, 3
    captions = [
        {"organ": organ, "caption": "", "is_abnormal": organ == "lung", "is_mentioned": organ != "liver"}
        for organ in ORGANS
    ]
    assert organs_to_show(captions, [0, 1, 2], mask) == [0, 1, 2]
    assert organs_to_show([c | {"is_abnormal": False, "is_mentioned": False} for c in captions], [0, 1, 2], mask) == [
        2,
        1,
        0,
    ]


def test_the_build_draws_the_first_cases_and_inspect_draws_others(tmp_path, capsys):
    source = ct_rate_release(tmp_path / "release", ("train_1_a_1", "train_2_a_1", "train_3_a_1"))
    out = tmp_path / "split"
    options = ["--spacing", "3", "4", "4", "--splits", "train", "--workers", "1", "--previews", "1"]
    assert main(["ct_rate", "--source", str(source), "--out", str(out), *options]) == 0
    assert [path.name for path in (out / "previews").iterdir()] == ["train-000-train_1_a_1.png"]
    capsys.readouterr()
    assert main(["inspect", "--data", str(out), "--cases", "2", "--out", str(tmp_path / "pictures")]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "train-000-train_1_a_1.png",
        "train-001-train_2_a_1.png",
        "train-002-train_3_a_1.png",  # no body has organs of this size: it is drawn as a case that looks wrong
    ]
    told = capsys.readouterr().out
    assert "patients" in told and "3 / 3 / 3" in told  # lung: in the mask, mentioned, abnormal
    assert main(["inspect", "--data", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_a_killed_build_leaves_no_half_picture(tmp_path, monkeypatch):
    def half(figure, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(KeyboardInterrupt):
        draw_case(case(), tmp_path / "case.png")
    assert not (tmp_path / "case.png").exists()
