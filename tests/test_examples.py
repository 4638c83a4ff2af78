"""Cases to look at: drawn from the rows that were scored, in the windows in which they were."""

import json

import numpy as np
import pytest
import yaml
from datasets import Dataset
from evaluation_samples import TASK, tiny_model, tiny_rows, tiny_tokenizer
from PIL import Image

from evaluation_fvlm.attention import attention_maps
from evaluation_fvlm.chosen_cases import surest_hits, worst_errors
from evaluation_fvlm.examples import collect_examples
from evaluation_fvlm.tasks import load_task
from evaluation_fvlm.windows import WindowRule
from evaluation_fvlm.zero_shot import evaluate_split
from modeling_fvlm.processed_split import decode_volume

RULE = WindowRule((4, 12, 32), (2, 4, 8), published=True)


def captions_of(number: int) -> list[dict]:
    return [{"organ": organ, "caption": f"{organ} of scan {number}."} for organ in ("lung", "heart", "aorta")]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Model, rows with captions, and their scores by a task that asks for what is labelled."""
    rows = [row | {"captions": captions_of(number)} for number, row in enumerate(tiny_rows())]
    dataset, model = Dataset.from_list(rows), tiny_model()
    path = tmp_path_factory.mktemp("task") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TASK))
    frame = evaluate_split(model, tiny_tokenizer(), dataset, [load_task(path)], rule=RULE).frame
    return model, dataset, frame


def test_pictures_and_figures_are_those_of_the_chosen_cases(scored, tmp_path):
    model, dataset, frame = scored
    examples = collect_examples(model, dataset, frame, tmp_path, rule=RULE, num_errors=4, num_hits=1)
    chosen = [*worst_errors(frame, 4).itertuples(), *surest_hits(frame, 1).itertuples()]
    assert [(e["recon_id"], e["finding"], e["kind"]) for e in examples] == [
        (case.recon_id, case.finding, case.kind) for case in chosen
    ]
    assert {example["kind"] for example in examples} == {"missed", "false alarm", "found"} and len(examples) > 3
    rows = {row["recon_id"]: row for row in tiny_rows()}
    pictures = set()
    for example, case in zip(examples, chosen):
        assert example["score"] == pytest.approx(case.score) and example["label"] == case.label
        volume, mask = decode_volume(rows[example["recon_id"]])
        organ_map = attention_maps(model, volume, mask, [example["organ"]], RULE)[example["organ"]]
        assert example["peak_weight"] == pytest.approx(organ_map.weights.max())
        assert example["patches"] == organ_map.is_organ.sum() >= example["effective_patches"] - 1e-6
        with Image.open(tmp_path / example["picture"]) as picture:
            assert np.ptp(np.asarray(picture.convert("RGB")), axis=2).max() > 60, "neither heat nor outline"
            pictures.add(picture.convert("RGB").tobytes())
        assert "text" not in example
    assert len(pictures) == len(examples)
    assert json.loads((tmp_path / "examples" / "examples.json").read_text()) == examples


def test_sentences_are_kept_only_when_asked_for(scored, tmp_path):
    model, dataset, frame = scored
    examples = collect_examples(model, dataset, frame, tmp_path, num_errors=2, num_hits=0, with_text=True)
    places = {row["recon_id"]: number for number, row in enumerate(tiny_rows())}
    assert examples and all(e["text"] == f"{e['organ']} of scan {places[e['recon_id']]}." for e in examples)
    collect_examples(model, dataset, frame, tmp_path, num_errors=2, num_hits=0)
    assert "of scan" not in (tmp_path / "examples" / "examples.json").read_text()


def test_pictures_of_an_earlier_run_go_and_other_files_stay(scored, tmp_path):
    model, dataset, frame = scored
    collect_examples(model, dataset, frame, tmp_path, num_errors=4, num_hits=1)
    mine = tmp_path / "examples" / "mine.png"
    mine.write_bytes(b"kept")
    examples = collect_examples(model, dataset, frame, tmp_path, num_errors=2, num_hits=0)
    names = {path.name for path in (tmp_path / "examples").iterdir()}
    assert names == {"mine.png", "examples.json", *(e["picture"].split("/")[1] for e in examples)}


def test_a_hostile_name_is_no_path(scored, tmp_path):
    model, dataset, frame = scored
    evil = "../../" + "x" * 300
    renamed = Dataset.from_list([row | {"recon_id": f"{evil}{number}"} for number, row in enumerate(dataset)])
    names = dict(zip(dataset["recon_id"], renamed["recon_id"]))
    examples = collect_examples(
        model, renamed, frame.assign(recon_id=frame["recon_id"].map(names)), tmp_path, num_errors=2, num_hits=0
    )
    for example in examples:
        path = (tmp_path / example["picture"]).resolve()
        assert path.parent == (tmp_path / "examples").resolve() and path.is_file()
