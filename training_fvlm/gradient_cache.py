"""The gradient of a contrast that does not fit into memory, exactly: the gradient cache.

The loss of a contrast reads nothing of a patient but its embeddings. So its gradient is found in two passes over chunks
of a few patients (Gao et al., 2021, https://aclanthology.org/2021.repl4nlp-1.31):

(1) every chunk is embedded without a graph;
(2) every different text of all chunks is encoded once, without a graph, in as many shares as there are chunks;
(3) the embeddings of all ranks are contrasted, and the gradient of the loss is taken with respect to this rank's
    embeddings and the loss's own parameters (the temperature): the cache;
(4) every chunk is embedded again together with its share of the texts, now with a graph, and backward is called on the
    product of the embeddings with their cached gradients. By the chain rule the weights get the gradient of the whole.

Dropout must fall as it did in the first pass, or the cached gradients belong to other embeddings. So each chunk starts
from a seed made of the run's seed, the number of the contrast and the place of its first patient in it, and each share
of texts from the state in which its chunk left the generators. No state needs to be kept for a resumed run.

Memory is that of one chunk, plus the embeddings. Every rank runs the same number of chunks through all weights, whether
or not its patients have anything to contribute, and calls the same collectives in the same order.
"""

import contextlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .embed import Embedded, fixed_inputs, image_embeddings, loss_parameters, text_embeddings

# What the image side of the model reads of a collator's batch.
IMAGE_INPUTS = ("volume", "organ_token_mask", "organ_is_complete")


class Host(Protocol):
    """What the cache needs of the trainer."""

    def to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the model's device."""

    def contrast(self, embedded: Embedded) -> Tensor:
        """The loss of the contrast, a scalar: embeddings of all ranks are gathered in it."""

    def backward(self, scalar: Tensor) -> None:
        """Its backward pass, scaled as mixed precision wants it."""

    def without_sync(self) -> contextlib.AbstractContextManager:
        """A context in which ranks do not exchange gradients."""

    def teach_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a teacher says of a chunk, for `fixed`; empty without one."""

    def teach_texts(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """A teacher's embeddings of texts; None without one."""


class GradientCache:
    """One contrast after the other, chunk by chunk, on one rank.

    Args:
        host: The trainer.
        num_chunks: Chunks of a contrast on this rank; the same on every rank.
        num_held: Chunks whose volumes are held between the passes; the others are given a second time.
        first_patient: Place of this rank's first patient in the global contrast.
        seed: Seed of the run's dropout.
    """

    def __init__(self, host: Host, *, num_chunks: int, num_held: int, first_patient: int, seed: int):
        self.host, self.num_chunks, self.num_held = host, num_chunks, num_held
        self.first_patient, self.seed = first_patient, seed
        self.clear()

    @property
    def loads(self) -> int:
        """Batches a contrast takes: its chunks, and those that are read a second time."""
        return 2 * self.num_chunks - self.num_held

    def clear(self) -> None:
        """Forget a contrast that was begun."""
        self.position = 0  # batches of the contrast that were given
        self.num_patients = 0
        self.rows: list[Tensor | None] = []
        self.held: list[dict[str, Tensor]] = []
        self.image_sides: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
        self.states: list[tuple[int, tuple[Tensor, Tensor | None]]] = []  # seed, and the state after the images
        self.texts = _Texts()
        self.gradients: dict[str, Tensor] = {}

    def take(self, model: torch.nn.Module, inputs: dict[str, Tensor], contrast_number: int) -> Tensor:
        """Do what is due with the next batch of the contrast.

        Args:
            model: The wrapped model, in training mode.
            inputs: A batch of the collator, on the CPU: of the first pass, or of the second for chunks not held.
            contrast_number: Contrasts before this one in the run; dropout hangs on it.

        Returns:
            The loss with the batch that ends the first pass, else 0; a scalar without a graph.
        """
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            loss = torch.zeros((), device=device)
            if self.position < self.num_chunks:
                self._embed(model, inputs, contrast_number)
                if self.position == self.num_chunks - 1:
                    loss = self._contrast(model)
                    for chunk, held in enumerate(self.held):
                        self._backward(model, held, chunk)
            else:
                chunk = self.num_held + self.position - self.num_chunks
                if not _equal(inputs.get("row"), self.rows[chunk]):
                    raise RuntimeError(f"chunk {chunk} holds other rows in the second pass than in the first.")
                self._backward(model, inputs, chunk)
        self.position += 1
        if self.position == self.loads:
            self.clear()
        return loss

    @torch.no_grad()
    def _embed(self, model: torch.nn.Module, inputs: dict[str, Tensor], contrast_number: int) -> None:
        """(1) One chunk."""
        chunk_seed = seed_of(self.seed, contrast_number, self.first_patient + self.num_patients)
        images = {name: inputs[name] for name in IMAGE_INPUTS}
        if len(self.held) < self.num_held:
            self.held.append(images)
        on_device = self.host.to_device(images)
        torch.manual_seed(chunk_seed)
        outputs = model(**on_device, return_loss=False)
        self.states.append((chunk_seed, _generator_states(outputs.image_embeds.device)))
        index = self.texts.add(inputs)
        rest = self.host.to_device({name: value for name, value in inputs.items() if name not in IMAGE_INPUTS})
        fixed = fixed_inputs(outputs, rest) | self.host.teach_images(on_device)
        self.image_sides.append((image_embeddings(outputs), fixed, self.host.to_device(index)))
        self.parameters = loss_parameters(outputs)
        self.rows.append(inputs.get("row"))
        self.num_patients += len(inputs["volume"])

    def _contrast(self, model: torch.nn.Module) -> Tensor:
        """(2) and (3): the loss, and the cached gradients."""
        device = next(iter(self.parameters.values())).device
        shares = self.texts.cut(self.num_chunks)
        table = taught = None
        with torch.no_grad():
            for chunk, (places, share) in enumerate(shares):
                share = self.host.to_device(share)
                _set_generator_states(self.states[chunk][1], device)
                text_embeds = model(**share, return_loss=False).text_embeds.float()
                table = _put(table, text_embeds, places, len(self.texts.hashes))
                if (of_teacher := self.host.teach_texts(share)) is not None:
                    taught = _put(taught, of_teacher.float(), places, len(self.texts.hashes))
        images, fixed, index = ({name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                                for parts in zip(*self.image_sides))  # fmt: skip
        leaves = images | {"texts": table} | self.parameters
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        live = {name: leaves[name] for name in images} | text_embeddings(leaves["texts"], index)
        if taught is not None:
            fixed |= {f"teacher_{name}": embeds for name, embeds in text_embeddings(taught, index).items()}
        loss = self.host.contrast(Embedded(live, fixed, {name: leaves[name] for name in self.parameters}))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        self.gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients)
        }
        self.shares = shares
        return loss.detach()

    def _backward(self, model: torch.nn.Module, inputs: dict[str, Tensor], chunk: int) -> None:
        """(4) One chunk with its share of the texts."""
        places, share = self.shares[chunk]
        is_last = chunk == self.num_chunks - 1
        batch = self.host.to_device({name: inputs[name] for name in IMAGE_INPUTS} | share)
        start = sum(len(next(iter(images.values()))) for images, _, _ in self.image_sides[:chunk])
        patients = slice(start, start + len(inputs["volume"]))
        with contextlib.nullcontext() if is_last else self.host.without_sync():
            torch.manual_seed(self.states[chunk][0])
            outputs = model(**batch, return_loss=False)
            product = sum(
                (embeds * self.gradients[name][patients]).sum() for name, embeds in image_embeddings(outputs).items()
            )
            text_embeds = outputs.text_embeds.float()
            if places is None:  # fewer texts than chunks: a text of another share, so that every weight is used
                product = product + 0 * text_embeds.sum()
            else:
                product = product + (text_embeds * self.gradients["texts"][places.to(text_embeds.device)]).sum()
            for name, parameter in loss_parameters(outputs).items():  # once a contrast, but in every graph
                product = product + (parameter * (self.gradients[name] if is_last else 0)).sum()
            self.host.backward(product)


class _Texts:
    """The different texts of a contrast on this rank, each once, in the order in which they came."""

    def __init__(self):
        self.hashes: dict[int, int] = {}  # hash -> place
        self.input_ids: list[Tensor] = []
        self.attention_mask: list[Tensor] = []

    def add(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the texts of a chunk; its indices into all texts in place of those into its own."""
        ends = (inputs["attention_mask"] != 0).long() * torch.arange(1, inputs["attention_mask"].shape[1] + 1)
        places = []
        for number, (text_hash, end) in enumerate(zip(inputs["text_hash"].tolist(), ends.amax(1).tolist())):
            if text_hash not in self.hashes:
                self.hashes[text_hash] = len(self.hashes)
                self.input_ids.append(inputs["input_ids"][number, :end])
                self.attention_mask.append(inputs["attention_mask"][number, :end])
            places.append(self.hashes[text_hash])
        places = torch.tensor(places)
        index = {"caption_index": inputs["caption_index"]}
        index |= {"report_index": inputs["report_index"]} if "report_index" in inputs else {}
        return {name: torch.where(of >= 0, places[of.clamp(min=0)], of) for name, of in index.items()}

    def cut(self, num_shares: int) -> list[tuple[Tensor | None, dict[str, Tensor]]]:
        """Shares of about equal size and length: the places of their texts, None for one that has none of its own."""
        by_length = sorted(range(len(self.input_ids)), key=lambda place: len(self.input_ids[place]))
        shares = []
        for number in range(num_shares):
            members = sorted(by_length[number::num_shares])
            places = torch.tensor(members) if members else None
            shares.append((places, self._padded(members or by_length[:1])))
        return shares

    def _padded(self, members: list[int]) -> dict[str, Tensor]:
        # What fills up is masked: its token number is never read.
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([self.input_ids[place] for place in members], batch_first=True),
            "attention_mask": pad([self.attention_mask[place] for place in members], batch_first=True),
        }


def seed_of(seed: int, contrast_number: int, place: int) -> int:
    """Seed of the dropout of a chunk: the run's, the number of the contrast, the place of its first patient in it."""
    words = np.random.SeedSequence((seed, contrast_number, place)).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def _put(table: Tensor | None, rows: Tensor, places: Tensor | None, length: int) -> Tensor:
    """Rows of a share into the table of all texts."""
    if table is None:
        table = rows.new_zeros((length, rows.shape[1]))
    if places is not None:
        table[places.to(rows.device)] = rows
    return table


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
