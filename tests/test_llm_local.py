"""A language model of transformers in this process, asked as a server is."""

import json
import threading

import pytest
import torch
from llm_reports import ORGANS, right_answer, rules, settings, small_reports, truth
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_builders.llm_answers import numbered
from data_builders.llm_client import CallFailedError
from data_builders.llm_decompose import Tally, decompose_with_llm
from data_builders.llm_ledger import Ledger
from data_builders.llm_local import TransformersClient

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights that reads and writes bytes."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=CHAT)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=8192, bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


MESSAGES = [{"role": "system", "content": "Split."}, {"role": "user", "content": "FINDINGS\n1: The liver."}]


def test_rubbish_falls_back_to_the_rules_and_is_counted(folder, tmp_path):
    reports, tally = small_reports(3), Tally()
    with Ledger(tmp_path / "cache.jsonl") as ledger:
        client = TransformersClient(str(folder))
        results = list(decompose_with_llm(reports, ORGANS, client, rules, ledger, settings(max_tokens=12), tally))
        assert [result.organs for result in results] == [rules(report).organs for report in reports]
        assert ledger.calls == 6 and tally.refused.total() == 6 and tally.fallen_back.total() == 3
        assert ledger.tokens_out == 6 * 12


@pytest.mark.parametrize("has_template", [True, False])
def test_what_the_model_says_is_read_and_counted(folder, tmp_path, monkeypatch, has_template):
    """The weights are random; what they would say is put into their mouth."""
    client = TransformersClient(str(folder))
    if not has_template:
        client._tokenizer.chat_template = None
    heard = []

    def generate(input_ids, **options):
        heard.append(client._tokenizer.decode(input_ids[0]))
        question = heard[-1].split("<user>")[1].split("<assistant>")[0] if has_template else heard[-1]
        text = right_answer(question[question.index("FINDINGS\n") :].strip(), "numbers")
        said = client._tokenizer(text, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, said, torch.tensor([[0]])], dim=1)

    monkeypatch.setattr(client._network, "generate", generate)
    reports, tally = small_reports(4), Tally()
    with Ledger(tmp_path / "cache.jsonl") as ledger:
        results = list(decompose_with_llm(reports, ORGANS, client, rules, ledger, settings(), tally))
        assert ledger.tokens_in == sum(len(text.encode()) for text in heard), "a byte is a token of this model"
    assert [result.organs for result in results] == [truth(report) for report in reports] and tally.asked == 4
    assert numbered(reports[0]).text() in heard[0]
    assert heard[0].startswith("<system>You split CT reports") == has_template


def test_a_template_that_refuses_the_system_role(folder):
    client = TransformersClient(str(folder))
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    client._tokenizer.chat_template = refuses + CHAT
    asked = client._tokenizer.decode(client._tokens(MESSAGES)["input_ids"][0])
    assert asked == "<user>Split.\n\nFINDINGS\n1: The liver.<assistant>"
    client._tokenizer.chat_template = "{{ raise_exception('no question is right') }}"
    with pytest.raises(CallFailedError, match="template does not take the question.*no question is right") as failed:
        client.ask(MESSAGES, {}, 5)
    assert failed.value.kind == "fatal"


def test_an_answer_without_its_end_is_cut(folder):
    answer = TransformersClient(str(folder)).ask(MESSAGES, {}, 5)
    assert (answer.tokens_out, answer.is_cut) == (5, True)
    same = TransformersClient(str(folder)).ask(MESSAGES, {}, 5)
    assert same == answer, "the likeliest word each time: nothing is left to chance"


def test_a_question_longer_than_the_model_reads(folder):
    with pytest.raises(CallFailedError, match="too long for the model") as failed:
        TransformersClient(str(folder)).ask([{"role": "user", "content": "x" * 9000}], {}, 5)
    assert failed.value.kind == "report"


@pytest.mark.parametrize("ending", ["limit", "close"])
def test_a_long_answer_ends_by_the_time_limit_and_by_closing(folder, ending):
    client = TransformersClient(str(folder), timeout_s=0.3 if ending == "limit" else 600.0)
    if ending == "close":
        threading.Timer(0.3, client.close).start()
    answer = client.ask(MESSAGES, {}, 8000)
    assert answer.is_cut and answer.tokens_out < 8000


def test_what_is_no_language_model(tmp_path):
    with pytest.raises(ValueError, match="--llm_local .*: the folder holds no causal language model"):
        TransformersClient(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="--llm_local .*: the folder holds no causal language model"):
        TransformersClient(str(tmp_path))
