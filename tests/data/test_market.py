import numpy as np
import pytest
from samples import png

from imu_ray.config import ForgetSetConfig
from imu_ray.data import open_source, persons_of
from imu_ray.data.market import sighting_of
from imu_ray.errors import ForgetSetError

CONFIG = ForgetSetConfig(classes=("0002", "0010"))
GOOD = ("0002_c1s1_000451_03.jpg", "0010_c6s3_000001_00.jpg.jpg")


def folder(root, *names):
    root.mkdir()
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("name", "sighting"),
    [
        (GOOD[0], ("0002", 1)),
        ("query/-1_c3s2_000001_00.jpg", ("-1", 3)),
        ("0000_c12s1_000151_01.jpg#4", ("0000", 12)),
        ("0005_c2_f0046985.jpg", ("0005", 2)),
        ("-2_c1s1_000451_03.jpg", None),
        ("0002_s1_000451_03.jpg", None),
        ("row 7", None),
    ],
)
def test_a_name_tells_person_and_camera(name, sighting):
    assert sighting_of(name) == sighting


def test_labels_are_places_among_the_listed_persons(tmp_path):
    source = open_source(folder(tmp_path / "train", *GOOD, "Thumbs.db"), CONFIG)
    rows = source.read(0, 2)
    assert (source.num_rows, rows.ids, rows.labels.tolist()) == (2, list(GOOD), [0, 1])
    assert rows.inputs == [name.encode() for name in GOOD]


def test_query_and_gallery_have_no_labels_and_hold_anyone(tmp_path):
    names = ["-1_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg", "1501_c1s1_000001_00.jpg"]
    root = folder(tmp_path / "gallery", *names)
    assert open_source(root, ForgetSetConfig(), fields={"image": "image"}).read(0, 3).labels.tolist() == [0, 0, 0]
    assert persons_of(root) == ("1501",)


def test_class_folders_with_such_names_in_them_stay_class_folders(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / GOOD[0]).write_bytes(png(np.zeros((2, 2), np.uint8)))
    assert open_source(tmp_path, ForgetSetConfig()).read(0, 1).labels.tolist() == [7]


BAD = {
    "a name of another kind": ((*GOOD, "person7.jpg"), CONFIG, r"1 of 3 images in .*train .*\(person7.jpg\).*rename"),
    "a folder in the folder": ((*GOOD, "more/" + GOOD[0]), CONFIG, r"1 of 3 .*\(more/0002_c1s1_000451_03.jpg\)"),
    "no list of persons": (GOOD, ForgetSetConfig(), "not known; .*forget_set.classes; imu_ray.data.persons_of"),
    "an unlisted person": ((*GOOD, "0011_c1s1_000451_03.jpg"), CONFIG, "shows person 0011, who is not among the 2"),
    "junk to forget": ((*GOOD, "-1_c1s1_000451_03.jpg"), CONFIG, "shows person -1, who"),
    "a text": ((*GOOD, "readme.txt"), CONFIG, "readme.txt is no image that is read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_by_name(case, tmp_path):
    names, config, message = BAD[case]
    with pytest.raises(ForgetSetError, match=message):
        open_source(folder(tmp_path / "train", *names), config)
