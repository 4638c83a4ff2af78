"""A causal language model of transformers in this process, asked as a server is (`llm_client`)."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from .llm_client import MOST_CHARACTERS, Answer, CallFailedError, Messages, told, without_system


@dataclass
class TransformersClient:
    """A causal language model of transformers, in this process: one call after the other.

    Nothing holds it to the schema, so a model that does not follow instructions well is refused often.

    Args:
        model: A folder, or a name on the Hub.
        device: "cpu", "cuda" and so on; None: a GPU where there is one.
        timeout_s: After which an answer is cut.

    Raises:
        ValueError: If there is no such model, or it is no causal language model.
    """

    model: str
    device: str | None = None
    timeout_s: float = 600.0
    is_serial: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
            self._network = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            where = "the folder holds" if Path(self.model).is_dir() else "there is no such folder, and the Hub gives"
            raise ValueError(f"--llm_local {self.model}: {where} no causal language model. {told(error)}") from None
        self._network.to(self.device).eval()

    def ask(self, messages: Messages, schema: dict, max_tokens: int) -> Answer:
        """One answer, the likeliest word by word.

        Raises:
            CallFailedError: If the question is longer than the model reads, or memory ran out.
        """
        import torch

        def is_stopped(input_ids, scores):
            return torch.full((len(input_ids),), self._closed.is_set(), device=input_ids.device)

        with self._lock, torch.inference_mode():
            tokens = self._tokens(messages)
            count = tokens["input_ids"].shape[1]
            longest = getattr(self._network.config.get_text_config(), "max_position_embeddings", None)
            if longest is not None and count + max_tokens > longest:
                raise CallFailedError(
                    "the report is too long for the model", "report", f"{count} + {max_tokens} tokens"
                )
            end = self._tokenizer.eos_token_id
            pad = self._tokenizer.pad_token_id
            try:
                made = self._network.generate(
                    **tokens.to(self.device),
                    max_new_tokens=max_tokens,
                    max_time=self.timeout_s,
                    do_sample=False,
                    stopping_criteria=[is_stopped],
                    pad_token_id=end if pad is None else pad,
                )[0, count:]
            except torch.OutOfMemoryError as error:
                raise CallFailedError("memory ran out", "report", told(error)) from None
            except RuntimeError as error:  # of the CPU's memory, too
                raise CallFailedError("the model broke off", "report", told(error)) from None
        text = self._tokenizer.decode(made, skip_special_tokens=True).rpartition("</think>")[2]
        ends = self._network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [end if ends is None else ends]
        is_cut = not len(made) or int(made[-1]) not in ends
        return Answer(text[:MOST_CHARACTERS], count, len(made), is_cut)

    def _tokens(self, messages: Messages):
        if self._tokenizer.chat_template is not None:
            for asked in (messages, without_system(messages)):  # some templates refuse the system role
                try:
                    return self._tokenizer.apply_chat_template(
                        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
                    )
                except jinja2.TemplateError as error:
                    refused = told(error)
            raise CallFailedError("the model's chat template does not take the question", "fatal", refused)
        text = "\n\n".join(message["content"] for message in messages)
        return self._tokenizer(f"{text}\n\n", return_tensors="pt", return_token_type_ids=False)

    def close(self) -> None:
        """End the call that is under way, from another thread."""
        self._closed.set()
