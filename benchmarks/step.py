"""A whole training step at the published size, batch 2: bookkeeping, forward, backward, AdamW.

    python -m benchmarks.step
    python -m benchmarks.step --organs 24 --json step.json
    python -m benchmarks.step --organs 4 --variants published_dropout no_attention_dropout --repeats 1

The baseline is the published manner (benchmarks/published.py): attention materialised with dropout 0.1, every caption
padded to 384 tokens and encoded organ by organ, masks compared and pooled organ by organ, AdamW in a loop over
parameters. Above --baseline_organs the captions of so many organs are part of its step, and their time is multiplied.
Ours, each against the same baseline:

    step/N/published_dropout     the same dropout
    step/N/no_attention_dropout  none on attention probabilities of either tower: fused kernels; elsewhere the same
    step/N/best_fp32             that, by the GEMM backend that the self-check chose (modeling_fvlm/gemm.py)
    step/N/bf16                  that in bfloat16 autocast (timed once where the processor has no bfloat16 of its own)

Before each timed step a way takes two untimed ones: only then does it run in memory that it has already.
Loss, embeddings and gradients are compared without dropout, the GEMM backends included. The bound is that of the
products of no_attention_dropout.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import PATCH_SIZE, Batch, make_batch, make_model
from benchmarks.measure import (
    Peak,
    Result,
    Times,
    add_arguments,
    console,
    count_flop,
    in_turns,
    measure_peak,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.pooling import our_flags
from benchmarks.published import (
    embed_captions,
    in_published_manner,
    organ_flags,
    organ_losses,
    pool_organs,
    pooling_attention,
)
from benchmarks.text import padded_captions, unique_captions
from modeling_fvlm import FVLMModel
from modeling_fvlm.gemm import BLAS, choose_gemm_backend, gemm_backend

VARIANTS = ("published_dropout", "no_attention_dropout", "best_fp32", "bf16")
LEARNING_RATE = 1e-6  # small: all ways run on, and none may wander off


class PublishedStep:
    """The baseline on a model of ours.

    Args:
        model: The step runs on its parameters, with attention and dropout in the published form.
        batch: A batch.
        text_organs: The captions of so many organs are encoded; the others' embeddings are random and fixed.
    """

    def __init__(self, model: FVLMModel, batch: Batch, text_organs: int):
        self.model, self.batch, self.text_organs = in_published_manner(model), batch, text_organs
        num_organs = len(batch.token_ids)
        others = torch.randn(len(batch.volume), num_organs - text_organs, model.config.projection_dim)
        self.other_text = F.normalize(others, dim=-1)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
        self.captions = [[str(caption) for caption in rows] for rows in batch.token_ids]

    def embed_text(self, first: int, stop: int) -> Tensor:
        """Captions of some organs, `(batch, organs, dim)`."""
        ids, mask = padded_captions(self.batch, stop)
        return embed_captions(self.model, ids[first:], mask[first:])

    def embed_organs(self) -> tuple[Tensor, Tensor]:
        """Image embeddings `(batch, organs, dim)` and completeness."""
        model, batch = self.model, self.batch
        num_organs = len(batch.token_ids)
        organ_tokens, is_complete = organ_flags(batch.mask, num_organs, PATCH_SIZE)
        window = model.config.windows[0]
        hu = batch.volume.float().clamp(window["hu_min"], window["hu_max"])
        pixel_values = ((hu - window["hu_min"]) / (window["hu_max"] - window["hu_min"]))[:, None]
        levels = model.vision_model(pixel_values).feature_levels
        pooled = pool_organs(model, pooling_attention(model), levels, organ_tokens)
        projections = model.organ_projection.organ_parameters()
        embeds = [F.linear(pooled[:, organ], *projection) for organ, projection in enumerate(projections)]
        return F.normalize(torch.stack(embeds, dim=1), dim=-1), is_complete

    def losses(self, image_embeds: Tensor, is_complete: Tensor, text_embeds: Tensor) -> Tensor:
        """Loss of every organ."""
        temperature = self.model.temperature.value
        return organ_losses(image_embeds, text_embeds, self.captions, self.batch.is_abnormal, is_complete, temperature)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        text_embeds = torch.cat([self.embed_text(0, self.text_organs), self.other_text], dim=1)
        self.losses(*self.embed_organs(), text_embeds).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def text_step(self) -> None:
        """Forward and backward of the captions that are encoded."""
        self.embed_text(0, self.text_organs).sum().backward()
        self.model.zero_grad(set_to_none=True)


class OurStep:
    """The step of `FVLMTrainer` on one process."""

    def __init__(self, model: FVLMModel, batch: Batch):
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward(self):
        """The model's output."""
        num_organs = len(self.batch.token_ids)
        organ_token_mask, organ_is_complete = our_flags(self.batch.mask, num_organs, PATCH_SIZE)
        input_ids, attention_mask, caption_index = unique_captions(self.batch, num_organs)
        return self.model(
            volume=self.batch.volume,
            organ_token_mask=organ_token_mask,
            organ_is_complete=organ_is_complete,
            input_ids=input_ids,
            attention_mask=attention_mask,
            caption_index=caption_index,
            organ_is_abnormal=self.batch.is_abnormal,
        )

    def step(self, attention_dropout: bool, gemm: str = BLAS, bf16: bool = False) -> None:
        """Forward, backward, AdamW."""
        set_attention_dropout(self.model, 0.1 if attention_dropout else 0.0)
        with gemm_backend(gemm):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = self.forward().loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def set_attention_dropout(model: FVLMModel, rate: float) -> None:
    """Dropout on the attention probabilities of both towers."""
    for module in model.vision_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate
    for name, module in model.text_model.named_modules():
        if name.endswith("attention.self.dropout"):
            module.p = rate


def published_gradients(step: PublishedStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss of every organ, embeddings and gradients of the baseline, one organ's captions in memory at a time."""
    model, num_organs = step.model, len(step.batch.token_ids)
    with torch.no_grad():
        text_embeds = torch.cat([step.embed_text(organ, organ + 1) for organ in range(num_organs)], dim=1)
    text_embeds.requires_grad_()
    image_embeds, is_complete = step.embed_organs()
    losses = step.losses(image_embeds, is_complete, text_embeds)
    losses.sum().backward()
    for organ in range(num_organs):
        step.embed_text(organ, organ + 1).backward(text_embeds.grad[:, organ : organ + 1])
    return {"losses": losses, "image": image_embeds, "text": text_embeds}, _take_gradients(model)


def our_gradients(step: OurStep, gemm: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of ours."""
    with gemm_backend(gemm):
        output = step.forward()
        output.loss.backward()
    index = unique_captions(step.batch, len(step.batch.token_ids))[2]
    text_embeds = F.embedding(index, output.text_embeds)
    outputs = {"losses": output.organ_losses, "image": output.image_embeds, "text": text_embeds}
    return outputs, _take_gradients(step.model)


def _take_gradients(model: FVLMModel) -> dict[str, Tensor]:
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def compare_results(num_organs: int, batch: Batch, gemms: list[str], with_float64: bool) -> dict[str, float]:
    """Largest relative difference of embeddings and gradients to the baseline's, without dropout.

    Returns:
        By GEMM backend; `with_float64` also "ours to float64" and "baseline to float64": how far both are from our
        way computed in float64.
    """
    model = make_model(num_organs, published_dropout=False)
    baseline = _compared(published_gradients(PublishedStep(model, batch, num_organs)))
    ours = {gemm: _compared(our_gradients(OurStep(model, batch), gemm)) for gemm in gemms}
    differences = {gemm: relative_difference(tensors, baseline) for gemm, tensors in ours.items()}
    if with_float64:
        exact = _compared(our_gradients(OurStep(model.double(), batch), BLAS))
        differences["ours to float64"] = relative_difference(ours[BLAS], exact)
        differences["baseline to float64"] = relative_difference(baseline, exact)
    return differences


def _compared(results: tuple[dict[str, Tensor], dict[str, Tensor]]) -> list[Tensor]:
    """Losses, embeddings and gradients in one order, each a tensor of its own.

    The bias of BERT's keys has no influence on a softmax, its gradient is noise: left out. The organs' projections are
    one tensor: where an organ's loss stands at chance its gradient cancels, and what is left of it is rounding in both.
    """
    outputs, gradients = results
    compared = {name: tensor.detach() for name, tensor in outputs.items()}
    stacked: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        if name.startswith("organ_projection."):
            stacked.setdefault(name.rsplit("_", 1)[0], []).append(gradient)
        elif not name.endswith("attention.self.key.bias"):
            compared[name] = gradient
    compared |= {name: torch.stack(parts) for name, parts in stacked.items()}
    return [compared[name] for name in sorted(compared)]


def compare(
    num_organs: int,
    variants: list[str],
    baseline_organs: int,
    repeats: int,
    best_gemm: str,
    peak: Peak,
    with_float64: bool = False,
) -> list[Result]:
    """Time and compare one number of organs."""
    batch = make_batch(num_organs)
    differences = compare_results(num_organs, batch, sorted({BLAS, best_gemm}), with_float64)
    part = min(num_organs, baseline_organs)
    model = make_model(num_organs)
    theirs, ours = PublishedStep(model, batch, part), OurStep(model, batch)
    ways: dict[str, Callable[[], None]] = {
        "published_dropout": lambda: ours.step(attention_dropout=True),
        "no_attention_dropout": lambda: ours.step(attention_dropout=False),
        "best_fp32": lambda: ours.step(attention_dropout=False, gemm=best_gemm),
        "bf16": lambda: ours.step(attention_dropout=False, bf16=True),
    }
    bound_s = peak.seconds(count_flop(ways["no_attention_dropout"]))
    ways = {name: ways[name] for name in variants}
    slow = {name: ways.pop(name) for name in list(ways) if name == "bf16" and not has_bfloat16()}
    if ways.get("best_fp32") and best_gemm == BLAS and "no_attention_dropout" in ways:
        ways.pop("best_fp32")  # the same code: not timed twice
    baseline_ways: dict[str, Callable[[], None]] = {"baseline": theirs.step}
    if part < num_organs:
        baseline_ways["baseline text"] = theirs.text_step
    times = in_turns({**baseline_ways, **ways}, repeats, warm_ups=2)
    if slow:
        times |= in_turns(slow, repeats=1, warm_ups=0)
    baseline = times["baseline"]
    note = ""
    if part < num_organs:
        baseline = baseline + times["baseline text"] * ((num_organs - part) / part)
        note = f"baseline with the captions of {part} organs, their time multiplied to {num_organs}. "
    if with_float64:
        note += "Largest relative difference to ours in float64: "
        note += f"ours {differences['ours to float64']:.1e}, baseline {differences['baseline to float64']:.1e}. "
    results = []
    for name in variants:
        own: Times | None = times.get(name)
        remark = note
        if name == "best_fp32":
            own = own or times["no_attention_dropout"]
            remark += f"GEMM backend: {best_gemm}. "
        if name in slow:
            remark += "This processor computes bfloat16 in software: timed once. "
        difference = differences[best_gemm if name == "best_fp32" else BLAS]
        if name == "bf16":
            difference = None
        # The bound is counted at the rate of float32.
        bound = None if name == "bf16" else bound_s
        results.append(Result(f"step/{num_organs}/{name}", baseline, own, difference, remark.strip(), bound))
    return results


def has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 here."""
    in_bfloat16 = measure_peak(512, [lambda one, other: one.bfloat16() @ other.bfloat16()])
    return in_bfloat16.flop_per_cpu_s > measure_peak(512).flop_per_cpu_s


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, nargs="+", default=[4, 24], help="Numbers of organs (default: 4 24).")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Default: all.")
    parser.add_argument(
        "--baseline_organs", type=int, default=4, help="Organs whose captions the baseline encodes (default: 4)."
    )
    parser.add_argument(
        "--float64",
        action="store_true",
        help="Say how far both ways are from ours computed in float64 (a minute more).",
    )
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    choice = choose_gemm_backend()
    console.print(choice.describe())
    peak = measure_peak()
    results = []
    for number in options.organs:
        results += compare(
            number, options.variants, options.baseline_organs, options.repeats, choice.name, peak, options.float64
        )
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
