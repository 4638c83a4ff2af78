"""The momentum teacher: its average written out, saved and restored to the bit, and that it disturbs nobody."""

import torch
from test_modeling import batch, make_model  # noqa: F401 - a fixture

from modeling_fvlm.modeling_fvlm import organ_occupancy
from training_fvlm.checkpoints import load_state, save_state
from training_fvlm.teacher import MomentumTeacher, Teachers


def texts_of(batch):  # noqa: F811
    return batch["input_ids"], batch["attention_mask"]


def images_of(batch):  # noqa: F811
    counts, is_cut = organ_occupancy(batch["organ_mask"], 3, (2, 4, 8))
    whole = (counts.sum(-1) > 0) & ~is_cut
    return {"volume": batch["volume"], "organ_token_mask": counts > 0, "organ_is_complete": whole}


def disturb(model, seed):
    """What an optimizer step does to weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_it_begins_as_the_model_and_follows_by_the_average(batch):  # noqa: F811
    model = make_model(dropout=0.3)
    teacher = MomentumTeacher(model, 0.9)
    torch.testing.assert_close(teacher.embed_texts(*texts_of(batch)), model.eval().get_text_features(*texts_of(batch)))
    expected = {name: weight.clone() for name, weight in teacher.text_side.state_dict().items()}
    assert len(expected) > 20 and not any(name.startswith("vision") for name in expected)
    for step in range(3):
        disturb(model, step)
        teacher.update(model)
        for name, weight in expected.items():
            weight.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)
    for name, weight in teacher.text_side.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    follower = MomentumTeacher(model, 0.0)
    disturb(model, 9)
    follower.update(model)
    assert all(
        torch.equal(weight, model.state_dict()[name]) for name, weight in follower.text_side.state_dict().items()
    )


def test_it_has_weights_of_its_own_and_no_gradient(batch):  # noqa: F811
    model = make_model(dropout=0.3).train()
    teacher = MomentumTeacher(model, 0.9)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in teacher.text_side.parameters()}
    before, state = list(model.state_dict()), torch.get_rng_state()
    one, other = teacher.embed_texts(*texts_of(batch)), teacher.embed_texts(*texts_of(batch))
    assert torch.equal(one, other), "no dropout"
    assert not one.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == before, "it is no part of the model"
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(len(one)))


def test_saved_and_restored_it_is_the_same_to_the_bit(batch, tmp_path):  # noqa: F811
    model = make_model()
    teacher = MomentumTeacher(model, 0.995)
    disturb(model, 0), teacher.update(model)
    save_state(tmp_path, "teacher", teacher.state_dict())
    restored = MomentumTeacher(make_model(), 0.995)
    assert not torch.equal(restored.embed_texts(*texts_of(batch)), teacher.embed_texts(*texts_of(batch)))
    restored.load_state_dict(load_state(tmp_path, "teacher"))
    for step in (1, 2):
        for name, weight in teacher.text_side.state_dict().items():
            assert torch.equal(weight, restored.text_side.state_dict()[name]), name
        disturb(model, step), teacher.update(model), restored.update(model)


def test_teachers_say_what_the_objective_reads(batch):  # noqa: F811
    model, peer = make_model(dropout=0.3).train(), make_model(dropout=0.3).train()
    disturb(peer, 5)
    momentum = MomentumTeacher(model, 0.9)
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    nobody = Teachers()
    assert nobody.teach_images(images_of(batch)) == {} and nobody.teach_texts(texts) is None

    state = torch.get_rng_state()
    said = Teachers(momentum, peer).teach_images({**images_of(batch), "row": torch.arange(3)})
    of_texts = Teachers(momentum, peer).teach_texts(texts)
    assert peer.training and all(module.training for module in peer.modules()), "it goes on training as it was"
    assert torch.equal(torch.get_rng_state(), state)
    expected = peer.eval()(**images_of(batch), **texts)
    assert torch.equal(said["teacher_image_embeds"], expected.image_embeds.detach())
    assert torch.equal(said["teacher_logit_scale"], expected.logit_scale.detach().expand(3))
    assert of_texts.shape == (5, 16) and not of_texts.requires_grad
    torch.testing.assert_close(of_texts[:, :8], momentum.embed_texts(*texts_of(batch)))
    torch.testing.assert_close(of_texts[:, 8:], expected.text_embeds.detach())
    alone = Teachers(peer=peer)
    assert torch.equal(alone.teach_texts(texts), of_texts[:, 8:]) and set(alone.teach_images(images_of(batch))) == set(
        said
    )
    assert Teachers(momentum).teach_images(images_of(batch)) == {}
