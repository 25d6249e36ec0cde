"""Pairs of left and right by the names of classes."""

import pytest

from autocontext_jax.data.augmentation_ranges import AugmentationConfig
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.jobs.train import warn_of_sides
from autocontext_jax.planning.laterality import find_laterality

PAIRS = [
    ("right_kidney", "left_kidney"),
    ("Kidney R", "Kidney L"),
    ("Kidney (R)", "Kidney (L)"),
    ("RightParotid", "LeftParotid"),
    ("ParotidR", "ParotidL"),
    ("RKidney", "LKidney"),
    ("kidney-right", "kidney-left"),
    ("Rt Lung", "Lt Lung"),
    ("Lung_Rt", "lung left"),
    ("lung_upper_lobe_right", "lung_upper_lobe_left"),
    ("rib_right_1", "rib_left_1"),
    ("rib_right1", "rib_left1"),
    ("rib_R5", "rib_L5"),
    ("rib R 5", "rib L 5"),
    ("rightkidney", "leftkidney"),
    ("kidneyright", "kidneyleft"),
    ("rkidney", "lkidney"),
    ("RIGHT-KIDNEY", "left.kidney"),
    ("Right-Cerebral-White-Matter", "Left-Cerebral-White-Matter"),
    ("right_brachiocephalic_vein", "brachiocephalic_vein_left"),
    ("right", "left"),
    ("R", "L"),
    ("drüse rechts right", "drüse rechts left"),
    ("почка R", "почка L"),
    ("left wall of the right ventricle", "right wall of the left ventricle"),
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_pairs_are_found_in_either_order_among_others(one, two):
    left_first = "left wall" in one
    pair = f"{two}={one}" if left_first else f"{one}={two}"
    for classes in ((one, two), ("background", two, "liver", one, "spleen")):
        found = find_laterality(classes)
        assert (found.pairs, found.unpaired) == ((pair,), ())


def test_several_pairs_are_those_that_flip_pairs_takes():
    classes = ("background", "left_kidney", "liver", "rib_left_1", "rib_left_10", "right_kidney", "rib_right_10")
    classes += ("rib_right_1", "vertebrae_L1", "adrenal_gland_right", "adrenal_gland_left")
    found = find_laterality(classes)
    assert found.unpaired == ()
    table = AugmentationConfig(flip="x", flip_pairs=found.pairs).flip_classes(LabelSpec.plain(classes))
    assert table == (0, 5, 2, 7, 6, 1, 4, 3, 8, 10, 9)


NO_SIDES = [
    ("cleft",), ("cleft", "cright_of_way"), ("leftover",), ("bright spot",), ("liver", "heart", "stomach"),
    ("L5", "L4", "S1", "T12"), ("vertebrae_L1", "vertebrae_L2"), ("vertebra L 5", "vertebra T 5"), ("T12-L1",),
    ("lung", "rib", "rectum", "lens", "LV", "RV", "Myo"), ("LAD", "LVOT"), ("kidney", "tumor"), ("",), ("lähmung",),
    (),
]  # fmt: skip


@pytest.mark.parametrize("classes", NO_SIDES)
def test_names_without_sides(classes):
    found = find_laterality(classes)
    assert (found.pairs, found.unpaired) == ((), ())


UNPAIRED = [
    (("left_atrium", "aorta"), ("left_atrium",)),
    (("left_atrium", "right_ventricle"), ("left_atrium", "right_ventricle")),
    (("Kidney L", "kidney"), ("Kidney L",)),
    (("leftkidney",), ("leftkidney",)),
    (("rib_left_1", "rib_right_2"), ("rib_left_1", "rib_right_2")),
    (("почка R", "лёгкое L"), ("почка R", "лёгкое L")),
    (("drüse L", "drose R"), ("drüse L", "drose R")),
    (("left wall of the left ventricle", "right wall of the left ventricle"),) * 2,
    (("left_kidney", "kidney_left", "right_kidney"), ("left_kidney", "kidney_left", "right_kidney")),
    (("left and right kidney", "liver"), ("left and right kidney",)),
    (("left=kidney", "right=kidney"), ("left=kidney", "right=kidney")),  # flip_pairs could not say it
]


@pytest.mark.parametrize(("classes", "unpaired"), UNPAIRED)
def test_a_side_without_its_one_partner_is_named(classes, unpaired):
    found = find_laterality(classes)
    assert (found.pairs, found.unpaired) == ((), unpaired)


def test_pairs_beside_names_without_a_partner():
    lobes = ("lung_upper_lobe_left", "lung_lower_lobe_left")
    lobes += ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right")
    found = find_laterality(lobes)
    assert found.pairs == (
        "lung_upper_lobe_right=lung_upper_lobe_left",
        "lung_lower_lobe_right=lung_lower_lobe_left",
    )
    assert found.unpaired == ("lung_middle_lobe_right",)


@pytest.mark.parametrize(
    ("flip", "pairs", "named"),
    [
        ("x", (), "right_kidney, left_kidney, left_atrium"),
        ("zyx", ("left_kidney=right_kidney",), "left_atrium"),
        ("zy", (), ""),
        ("", (), ""),
    ],
)
def test_training_warns_of_sides_that_do_not_change(flip, pairs, named, caplog):
    classes = ("liver", "left_kidney", "right_kidney", "left_atrium")
    warn_of_sides(AugmentationConfig(flip=flip, flip_pairs=pairs), classes)
    found = [record.message for record in caplog.records]
    assert len(found) == bool(named)
    assert all(f"change with it: {named}: pair them in augmentation.flip_pairs" in message for message in found)


def test_pairs_that_are_all_named_are_no_reason_to_warn(caplog):
    warn_of_sides(
        AugmentationConfig(flip="x", flip_pairs=("RightParotid=LeftParotid",)), ("RightParotid", "LeftParotid")
    )
    assert not caplog.records
