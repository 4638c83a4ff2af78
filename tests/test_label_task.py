"""Findings and their organs for targets by labels: read from prompt sets, checked against the split."""

import pytest
import torch

from training_fvlm.arguments import SettingsError
from training_fvlm.label_task import check_labels, read_label_task

ITEMS = """items:
  - {finding: lung Nodule, organ: lung}
  - {finding: heart Enlarged, organ: heart}
  - {finding: liver Cyst, organ: liver}
  - {finding: lung Effusion, organ: lung, positive: "Effusion.", negative: "No effusion."}
"""


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(ITEMS)
    return path


def test_findings_of_the_models_organs_are_kept(task_file):
    task = read_label_task(str(task_file), ["heart", "lung", "aorta"])
    assert task.findings == ("lung Nodule", "heart Enlarged", "lung Effusion")
    expected = [[False, True, False], [True, False, True], [False, False, False]]
    assert torch.equal(task.finding_of_organ, torch.tensor(expected))
    labels = [{"finding": "lung Effusion", "value": 1}, {"finding": "heart Enlarged", "value": 0}]
    assert task.encode([*labels, {"finding": "liver Cyst", "value": 1}]) == [-1, 0, 1]
    assert task.encode(None) == task.encode([]) == [-1, -1, -1]


def test_a_set_that_ships_is_named():
    task = read_label_task("synthetic", ["face", "brain"])
    assert {"Sinusitis", "Ventriculomegaly"} <= set(task.findings) and task.finding_of_organ.any(1).all()
    with pytest.raises(SettingsError, match="neither a YAML file nor one of .*ct_rate_16, .*nearest: 'synthetic'"):
        read_label_task("syntetic", ["face"])


def test_what_is_no_task_is_refused(tmp_path, task_file):
    with pytest.raises(
        SettingsError, match=r"none of its organs \['heart', 'liver', 'lung'\] is the model's \['rib'\]"
    ):
        read_label_task(str(task_file), ["rib"])
    for content in ("items: [{finding: x}]", "- a\n- b", "items: {", "name: x"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(SettingsError, match="it must hold `items`, each with `finding` and `organ`"):
            read_label_task(str(tmp_path / "bad.yaml"), ["lung"])


def test_a_split_without_labels_is_refused(task_file):
    task = read_label_task(str(task_file), ["lung"])
    unknown = [{"finding": "lung Nodule", "value": -1}]
    check_labels(task, [None, unknown, [{"finding": "lung Nodule", "value": 0}]], "out/split, split train")
    with pytest.raises(SettingsError, match="out/split, split train has no label .* it has no labels at all"):
        check_labels(task, [None, [], unknown], "out/split, split train")
    with pytest.raises(SettingsError, match=r"it has \['Nodule'\] ...: spell them alike"):
        check_labels(task, [[{"finding": "Nodule", "value": 1}]], "out/split, split train")
