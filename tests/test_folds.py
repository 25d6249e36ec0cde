"""The folds of a cross-validation: drawn as nnU-Net draws them, read and written as its file, chosen by keys."""

import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from autocontext_jax.data.folds import Fold, as_text, draw_folds, read_fold, read_folds, validated_twice
from autocontext_jax.data.layouts import Case
from autocontext_jax.files import write_json
from autocontext_jax.jobs import config_files
from autocontext_jax.jobs.config_files import default_config, from_config_dict, read_config
from autocontext_jax.jobs.run_config import RunConfig


def names_of(count: int) -> list[str]:
    return [f"c{index:02d}" for index in range(count)]


def cases_of(count):
    return [Case(name, (Path(f"{name}.nii"),), None) for name in names_of(count)]


# ---- drawing and reading

# What nnU-Net 2.8.1 writes for 7 cases and 5 folds, and the validation cases of 10 and of 3 cases.
OF_SEVEN = """[
    {
        "train": [
            "c00",
            "c01",
            "c02",
            "c04",
            "c05"
        ],
        "val": [
            "c03",
            "c06"
        ]
    },"""
VALIDATED = {
    (7, 5): (("c03", "c06"), ("c00", "c04"), ("c01",), ("c05",), ("c02",)),
    (10, 5): (("c00", "c07"), ("c03", "c09"), ("c04", "c06"), ("c01", "c08"), ("c02", "c05")),
    (3, 2): (("c00", "c01"), ("c02",)),
}


@pytest.mark.parametrize(("count", "folds"), VALIDATED)
def test_folds_are_those_that_nnunet_draws(count, folds):
    drawn = draw_folds(names_of(count)[::-1], folds, "D")
    assert tuple(fold.validation for fold in drawn) == VALIDATED[count, folds]
    for fold in drawn:
        assert sorted(fold.training + fold.validation) == names_of(count)
        assert fold.training == tuple(sorted(fold.training))
    if count == 7:
        assert as_text(drawn).startswith(OF_SEVEN)


def test_folds_are_nnunets_own():
    """Compared with nnU-Net where it is installed: the same file, to the byte."""
    module = pytest.importorskip("nnunetv2.utilities.crossval_split")
    for count in (2, 3, 5, 9, 10, 11, 64, 257):
        for number in {2, 3, 5, 10} & set(range(2, count + 1)):
            names = [f"case é {index}" for index in range(count)]  # sorted as texts, "10" before "2"
            theirs = module.generate_crossval_split(list(np.sort(names)), n_splits=number)
            text = json.dumps(theirs, sort_keys=True, indent=4)  # as batchgenerators' save_json does
            assert as_text(draw_folds(names, number, "D")) == text


@pytest.mark.parametrize(
    ("count", "number", "part"),
    [
        (3, 5, "data.folds is 5, and data set D has 3 training cases; expected as many cases as folds or more: choose"),
        (1, 5, "data set D has 1 training case; expected as many cases as folds or more: a single case cannot be"),
        (9, 1, "data.folds is 1; expected 2 or more"),
    ],
)
def test_too_few_cases_are_refused(count, number, part):
    refused(lambda: draw_folds(names_of(count), number, "D"), part)


def test_folds_are_read_as_they_were_written(tmp_path):
    path, drawn = tmp_path / "splits_final.json", draw_folds(names_of(7), 5, "D")
    path.write_text(as_text(drawn), encoding="utf-8")
    assert read_folds(names_of(7), path) == drawn
    training, validation = read_fold(cases_of(7), path, 4)
    assert Fold(tuple(case.name for case in training), tuple(case.name for case in validation)) == drawn[4]


def test_a_case_that_two_folds_validate():
    assert validated_twice(draw_folds(names_of(7), 5, "D")) is None
    assert validated_twice([Fold(("a",), ("b",)), Fold(("b",), ("c",)), Fold(("a",), ("c",))]) == ("c", 1, 2)


def test_split_from_file(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": [], "val": []}, {"train": ["c02", "c00"], "val": ["c01"]}]), encoding="utf-8")
    cases = cases_of(4)
    assert read_fold(cases, path, 1) == ((cases[0], cases[2]), (cases[1],))
    refused(lambda: read_fold(cases, path, 0), "fold 0", "no case")
    for fold in (2, -1):
        refused(lambda fold=fold: read_fold(cases, path, fold), f"no fold {fold}", "its 2")
    refused(lambda: read_fold(cases[1:], path, 1), "'c00'", "fold 1")
    refused(lambda: read_fold(cases, tmp_path / "gone.json", 0), "gone.json does not exist")
    path.write_text("[]", encoding="utf-8")
    refused(lambda: read_fold(cases, path, 0), path, "has no fold: expected")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('[{"train": ["c00"],\n"val" []}]', "line 2"),
        ('{"train": ["c00"], "val": []}', "not a list of folds"),
        ('[{"train": ["c00"]}]', 'lacks the key "val"'),
        ('[{"train": "c00", "val": []}]', '"train" is not a list'),
        ('[{"train": ["c00", "c01"], "val": ["c01"]}]', "c01 is in both"),
        ('[{"train": [["c00"]], "val": []}]', "1 name of no training case of the data set"),
    ],
)
def test_bad_split_files(tmp_path, content, part):
    path = tmp_path / "splits_final.json"
    path.write_text(content, encoding="utf-8")
    refused(lambda: read_fold(cases_of(3), path, 0), path, part)


def test_a_pickled_split_is_not_opened(tmp_path):
    path = tmp_path / "splits_final.pkl"
    path.write_bytes(b"\x80\x04\x95cos\nsystem\n")
    refused(lambda: read_fold(cases_of(3), path, 0), path, "not text")


# ---- the configuration


def configured(**data) -> RunConfig:
    config = default_config()
    config.data.update(data)
    return from_config_dict(config)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"folds": -1}, "data.folds is -1; expected 0 or more"),
        ({"folds": 5, "fold": 5}, "data.fold is 5; expected one of 0 to 4, or -1 for every fold"),
        ({"fold": 2}, "data.fold is 2; expected -1, or folds to choose from: data.folds or data.splits"),
        ({"splits": "F", "fold": -2}, "data.fold is -2; expected the number of a fold, from 0, or -1 for every fold"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, part):
    refused(lambda: configured(**keys), part)


def test_an_experiment_takes_one_fold_of_a_file():
    for keys in ({"folds": 5}, {"folds": 5, "fold": 0}, {"splits": "F"}):
        config = default_config()
        config.experiment = ("first_level",)
        config.data.update(keys)
        refused(
            lambda config=config: from_config_dict(config), "experiment is ('first_level',); expected () with folds"
        )
    config = default_config()
    config.experiment, config.data.splits, config.data.fold = ("first_level",), "F", 1
    assert from_config_dict(config).data.fold == 1


@pytest.mark.parametrize(("splits", "fold"), [("", -1), ("F", 0)])
def test_a_configuration_from_before_there_were_folds(tmp_path, splits, fold):
    """Its fold was always 0 or more, and had a meaning with a file alone."""
    config = configured(splits=splits, fold=fold)
    content = {"format": config_files.FORMAT, "config": config_files.as_dict(config)}
    content["config"]["data"]["fold"] = 0
    del content["config"]["data"]["folds"]
    write_json(tmp_path / "config.json", content)
    assert read_config(tmp_path) == config
    config_files.check_same_run(config, read_config(tmp_path), tmp_path)
