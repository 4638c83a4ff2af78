"""Bring published weights into a folder that AutoModel, AutoProcessor and pipeline load, or take them back out.

The released chest model, with the vocabulary of CXR-BERT (its folder, its Hub id, or its vocab.txt):
    python -m training_fvlm.convert --weights fvlm_ct_rate.pth --vocab vocab.txt --out models/fvlm
    python -m training_fvlm.convert --weights fvlm_ct_rate.pth \\
        --tokenizer microsoft/BiomedVLP-CXR-BERT-specialized --out models/fvlm
To train on with the recipe published_chest_4, or for scans prepared as its own were, faults included, add
`--preprocessing published`.

Weights of a fork with 24 organs that counts an organ from 100 voxels on:
    python -m training_fvlm.convert --weights fork.pth --vocab vocab.txt --organs body_24 \\
        --completeness min_voxels --min_organ_voxels 100 --out models/fvlm_24

The published start of a training: MAE weights in the image tower, any text encoder of transformers beside it
(microsoft/BiomedVLP-CXR-BERT-specialized, microsoft/BiomedVLP-BioViL-T, bert-base-uncased, or a folder):
    python -m training_fvlm.convert --mae mae_pretrain_vit_base.pth \\
        --text_encoder microsoft/BiomedVLP-CXR-BERT-specialized --organs body_24 --out models/start
    python train_fvlm.py --init_from models/start ...
The published run itself: the same with `--organs chest_4 --preprocessing published` and the recipe published_chest_4.

Back to the published names, bit by bit (`{"model": load_file("fvlm.safetensors")}` is what the published code reads):
    python -m training_fvlm.convert --back models/fvlm --out fvlm.safetensors

Sizes are read from the tensors. What tensors cannot tell has an option, the published value by default. Every tensor is
used or is one of the known leftovers, which are printed; anything else stops the conversion. --out appears whole or not
at all. Research only, not for diagnosis.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from modeling_fvlm import FVLMConfig, FVLMModel, FVLMProcessor, load_organ_set
from modeling_fvlm.configuration_fvlm import DEFAULT_WINDOW, FVLMVisionConfig
from modeling_fvlm.pipeline_fvlm import save_for_hub

from .arguments import SettingsError, read_folder_config
from .checkpoint_file import CheckpointError, listed, read_state_dict, sha256
from .mae import inflate_mae, mae_left_behind, mae_vision_fields
from .model_card import Source, render_converted_card
from .published_weights import (
    PATCH_POSITIONS,
    TOKEN_TYPES,
    WORDS,
    check_against_model,
    convert_published_state_dict,
    infer_sizes,
    left_behind,
    to_published_state_dict,
)
from .text import PretrainedText, check_vocabulary, put_text_encoder, read_text_encoder

# The config's defaults are the published architecture.
PUBLISHED_PATCH_SIZE = FVLMVisionConfig.patch_size
PUBLISHED_FEATURE_LEVELS = FVLMVisionConfig.feature_levels
PUBLISHED_NUM_BLOCKS = FVLMVisionConfig.num_hidden_layers
PUBLISHED_PROJECTION_DIM = FVLMConfig.projection_dim
PUBLISHED_HEADS = {"vision": 12, "text": 12, "pooling": 4}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training_fvlm.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_argument_group("what is converted (one of these)").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="Published checkpoint: .safetensors, or a .pth with the state dict in its entry `model` or bare, with or "
        "without `module.` before the names. A pickle that holds code is refused.",
    )
    source.add_argument(
        "--mae", type=Path, metavar="FILE", help="MAE ViT to start the image tower from; needs --text_encoder."
    )
    source.add_argument(
        "--back", type=Path, metavar="DIR", help="Folder of an fVLM model to write under the published names."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Folder to write, new or empty; with --back the .safetensors file, which must not exist.",
    )
    text = parser.add_argument_group("text side")
    text.add_argument(
        "--text_encoder", metavar="DIR|NAME", help="With --mae: pretrained encoder, a folder or a Hub id."
    )
    text.add_argument("--revision", help="Commit, tag or branch of --text_encoder or --tokenizer on the Hub.")
    text.add_argument("--tokenizer", metavar="DIR|NAME", help="With --weights: tokenizer, a folder or a Hub id.")
    text.add_argument(
        "--vocab", type=Path, metavar="FILE", help="With --weights, instead: BERT's vocab.txt, lower case."
    )
    text.add_argument(
        "--max_text_length",
        type=count,
        default=FVLMConfig.max_text_length,
        help="Longest caption in tokens (%(default)s).",
    )
    text.add_argument(
        "--text_token_types",
        action="store_true",
        help="With --mae: add row 0 of BERT's token-type table to every token, as BERT itself does. The published "
        "text encoder adds none, and that is the default.",
    )
    model = parser.add_argument_group("what tensors cannot tell (published values by default)")
    model.add_argument(
        "--organs",
        default="chest_4",
        metavar="SET",
        help="Organs in the order of the weights: chest_4 (default), body_24, ..., or a YAML file of your own.",
    )
    for part, what in (
        ("vision", "Attention heads of the ViT"),
        ("text", "Of the text encoder, with --weights"),
        ("pooling", "Of the organ pooling"),
    ):
        model.add_argument(f"--{part}_heads", type=count, default=PUBLISHED_HEADS[part], help=f"{what} (%(default)s).")
    model.add_argument(
        "--feature_levels",
        type=int,
        nargs="+",
        metavar="BLOCK",
        help="Blocks, from 0, whose raw output the organs read beside the last (3 6 9 for 12 blocks).",
    )
    model.add_argument(
        "--volume_size",
        type=int,
        nargs=3,
        default=FVLMVisionConfig.volume_size,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Crop in voxels that the position embeddings belong to (112 256 352).",
    )
    model.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=FVLMConfig.spacing,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="mm between voxel centres of the crop (3 1 1).",
    )
    model.add_argument(
        "--margin_voxels",
        type=int,
        nargs=3,
        default=FVLMConfig.margin_voxels,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxels around the box of all organs (5 20 20).",
    )
    model.add_argument(
        "--hu_window",
        type=float,
        nargs=2,
        default=(DEFAULT_WINDOW["hu_min"], DEFAULT_WINDOW["hu_max"]),
        metavar=("HU_MIN", "HU_MAX"),
        help="HU that become 0 and 1 (-1150 350).",
    )
    model.add_argument(
        "--completeness",
        choices=("border", "min_voxels"),
        default="border",
        help="When an organ of a crop is whole: no voxel on a face (%(default)s), or the voxel count alone.",
    )
    model.add_argument(
        "--min_organ_voxels", type=count, default=1, help="Fewest voxels of a whole organ (%(default)s)."
    )
    model.add_argument(
        "--preprocessing",
        choices=("standard", "published"),
        default="standard",
        help="How scans are prepared: by their own geometry (standard), or with the faults of the published scripts, "
        "which show where in-plane spacings differ or HU are rescaled (published).",
    )
    model.add_argument("--seed", type=int, default=0, help="With --mae: of the weights that start fresh (%(default)s).")
    args = parser.parse_args(argv)
    if args.mae is not None and args.text_encoder is None:
        parser.error("--mae needs --text_encoder: the model has two sides.")
    for name, needs in (
        ("text_encoder", "mae"),
        ("text_token_types", "mae"),
        ("tokenizer", "weights"),
        ("vocab", "weights"),
    ):
        if getattr(args, name) and getattr(args, needs) is None:
            parser.error(f"--{name} goes with --{needs} only.")
    if args.weights is not None and (args.tokenizer is None) == (args.vocab is None):
        parser.error("--weights needs exactly one of --tokenizer and --vocab: the checkpoint holds no vocabulary.")
    return args


def count(word: str) -> int:
    """A whole number from 1 on, of the command line."""
    if not word.strip().lstrip("+").isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 1 on")
    return int(word)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    args = parse_arguments(argv)
    # A job that is told to end takes its unfinished folder with it, as one that is interrupted does.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if args.back is not None:
            write_back(args.back, args.out)
        else:
            refuse_used_folder(args.out)
            model, processor, sources = start_model(args) if args.weights is None else published_model(args)
            with whole_or_nothing(args.out) as folder:
                save_for_hub(model, processor, folder)
                card = render_converted_card(model.config, sources, is_trained=args.weights is not None)
                (folder / "README.md").write_text(card, encoding="utf-8")
            report(model, sources, args.out)
    except (CheckpointError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def published_model(args: argparse.Namespace) -> tuple[FVLMModel, FVLMProcessor, list[Source]]:
    """The model of a published checkpoint, its processor, and what it was made from.

    The model is for saving only: buffers that no checkpoint holds have no data.
    """
    with naming(args.weights):
        state_dict = read_state_dict(args.weights)
        sizes = infer_sizes(state_dict)
        tokenizer = load_tokenizer(args)
        if len(tokenizer) != sizes.text["vocab_size"]:
            raise CheckpointError(
                f"{WORDS} has {sizes.text['vocab_size']} rows, the vocabulary of {args.tokenizer or args.vocab} has "
                f"{len(tokenizer)} tokens. Give the vocabulary the weights were trained with."
            )
        if (width := sizes.text["hidden_size"]) % args.text_heads:
            raise SettingsError(f"--text_heads {args.text_heads} does not divide {width}, the width of {WORDS}.")
        config = make_config(
            args,
            vision_config=sizes.vision,
            text_config={
                **sizes.text,
                "num_attention_heads": args.text_heads,
                "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=sizes.projection_dim,
        )
        if len(config.organs) != sizes.num_organs:
            raise CheckpointError(
                f"query_tokens has {sizes.num_organs} rows, one per organ, but --organs {args.organs} names "
                f"{len(config.organs)}: {', '.join(config.organs)}. Give the organs of the weights, in their order."
            )
        grid = config.vision_config.position_grid
        if grid[0] * grid[1] * grid[2] != sizes.num_positions:
            raise CheckpointError(
                f"{PATCH_POSITIONS} holds {sizes.num_positions} patches, but --volume_size "
                f"{' '.join(map(str, args.volume_size))} in patches of {tuple(sizes.vision['patch_size'])} makes "
                f"{' x '.join(map(str, grid))} = {grid[0] * grid[1] * grid[2]}. Give the crop the weights were "
                "trained on."
            )
        # No memory for weights that are replaced at once: the tensors stay those mapped from the file.
        with torch.device("meta"):
            model = FVLMModel(config)
        converted = convert_published_state_dict(state_dict, config)
        check_against_model(converted, model.state_dict())
        model.load_state_dict(separate(converted), strict=True, assign=True)
    leftovers = left_behind(state_dict)
    source = Source("published fVLM checkpoint", args.weights.name, sha256(args.weights), len(state_dict), leftovers)
    return model, FVLMProcessor.from_config(config, tokenizer), [source]


def start_model(args: argparse.Namespace) -> tuple[FVLMModel, FVLMProcessor, list[Source]]:
    """A model at the published start, MAE and text encoder in place and all else fresh; as `published_model`."""
    with naming(args.mae):
        mae = read_state_dict(args.mae)
        vision = mae_vision_fields(mae)
    text = read_text_encoder(args.text_encoder, args.revision)
    config = make_config(
        args,
        vision_config={**vision, "patch_size": PUBLISHED_PATCH_SIZE},
        text_config=public_config(text.model.config),
        projection_dim=PUBLISHED_PROJECTION_DIM,
    )
    set_seed(args.seed)
    model = FVLMModel(config)
    with naming(args.mae):
        inflated = inflate_mae(mae, config.vision_config)
        fresh = {"embeddings.projection.weight", "embeddings.projection.bias"}
        expected = model.vision_model.state_dict()
        if faults := sorted(
            {name for name in expected.keys() ^ inflated.keys() if name not in fresh}
            | {name for name in expected.keys() & inflated.keys() if expected[name].shape != inflated[name].shape}
        ):
            raise CheckpointError(f"its blocks are not those of the ViT: {listed(faults)} differ or are missing.")
        model.vision_model.load_state_dict(inflated, strict=False)
    put_text_encoder(model.text_model, text.model)
    unread_text = list(text.left_behind)
    if not args.text_token_types:
        unread_text += [name for name in text.model.state_dict() if name.endswith("token_type_embeddings.weight")]
    sources = [
        Source("MAE ViT", args.mae.name, sha256(args.mae), len(mae), mae_left_behind(mae)),
        text_source(args, text, unread_text),
    ]
    return model, FVLMProcessor.from_config(config, text.tokenizer), sources


def write_back(folder: Path, out: Path) -> None:
    """Write the weights of a model's folder under the published names, bit by bit."""
    if out.exists():
        raise SettingsError(f"--out {out} exists already: give a new file.")
    if out.suffix != ".safetensors":
        raise SettingsError(f"--out {out} must end in .safetensors.")
    refuse_place_below_a_file(out)
    config = read_folder_config(folder, "--back")
    refuse_what_published_code_lacks(config, folder)
    state_dict = {name: tensor for file in weight_files(folder) for name, tensor in read_state_dict(file).items()}
    with naming(folder):
        with torch.device("meta"):
            model = FVLMModel(config)
        check_against_model(state_dict, model.state_dict())
        if TOKEN_TYPES in state_dict and state_dict[TOKEN_TYPES][0].any():
            raise CheckpointError(
                f"{TOKEN_TYPES}: row 0 is not zero and belongs to every token, but the published code adds no token "
                "types: its captions would change. Train with `text_token_types: false` to go back."
            )
        published = to_published_state_dict(state_dict)
    with whole_or_nothing(out) as unfinished:
        save_file(published, unfinished)
    print(f"{len(published)} tensors under the published names: {out}")
    heads = {
        "vision": config.vision_config.num_attention_heads,
        "text": config.text_config.num_attention_heads,
        "pooling": config.pooling_num_heads,
    }
    print(f"  attention heads of the published code, which no tensor tells: {described(PUBLISHED_HEADS)}")
    if heads != PUBLISHED_HEADS:
        print(
            f"warning: this model has {described(heads)}. The published code gives other embeddings until its own "
            "numbers are set to these.",
            file=sys.stderr,
        )


def described(heads: Mapping[str, int]) -> str:
    """Numbers of heads in words."""
    return ", ".join(f"{part} {number}" for part, number in heads.items())


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights of a model's folder, chosen as transformers does: the whole file before shards."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise SettingsError(f"--back {folder} is no folder of a model: it needs model.safetensors beside config.json.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SettingsError(f"--back {folder}: {index.name} is damaged ({error!r}).") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SettingsError(f"--back {folder}: {listed(missing)} of {index.name} is not there. Get the whole folder.")
    return [folder / name for name in names]


def separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own: a file of safetensors holds no two names for one."""
    seen: set[int] = set()
    separated = {}
    for name, tensor in state_dict.items():
        storage = tensor.untyped_storage()
        is_alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes
        separated[name] = tensor if is_alone else tensor.clone()
        seen.add(storage.data_ptr())
    return separated


def refuse_what_published_code_lacks(config: FVLMConfig, folder: Path) -> None:
    """Refuse a model that the published code would run as another one, since names and shapes fit."""
    differing = [
        f"{name} {ours!r} (published: {published!r})"
        for name, ours, published in (
            ("text_config.model_type", config.text_config.model_type, "bert"),
            ("text_config.hidden_act", getattr(config.text_config, "hidden_act", None), "gelu"),
            ("text_config.layer_norm_eps", getattr(config.text_config, "layer_norm_eps", None), 1e-12),
            ("text_pooling", config.text_pooling, "cls"),
            ("vision_config.token_selection", config.vision_config.token_selection, "all"),
            ("vision_config.feature_levels", list(config.vision_config.feature_levels), list(PUBLISHED_FEATURE_LEVELS)),
            ("vision_config.num_hidden_layers", config.vision_config.num_hidden_layers, PUBLISHED_NUM_BLOCKS),
            ("vision_config.hidden_act", config.vision_config.hidden_act, "gelu"),
            ("vision_config.layer_norm_eps", config.vision_config.layer_norm_eps, 1e-5),
        )
        if ours != published
    ]
    if differing:
        raise SettingsError(f"--back {folder}: the published code has no {', '.join(differing)}.")


def make_config(args: argparse.Namespace, *, vision_config: dict, text_config: dict, projection_dim: int) -> FVLMConfig:
    """The config, from sizes of the tensors and options of the command line."""
    num_blocks, levels = vision_config["num_hidden_layers"], args.feature_levels
    if levels is None:
        if num_blocks != PUBLISHED_NUM_BLOCKS:
            raise SettingsError(
                f"the ViT has {num_blocks} blocks, the published one {PUBLISHED_NUM_BLOCKS}: say with --feature_levels "
                "which of them the organs read."
            )
        levels = PUBLISHED_FEATURE_LEVELS
    try:
        organ_set = load_organ_set(args.organs)
    except (ValueError, OSError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"--organs {args.organs}: {error}") from error
    if args.max_text_length > text_config.get("max_position_embeddings", args.max_text_length):
        raise SettingsError(
            f"--max_text_length {args.max_text_length} is more than the text encoder's "
            f"{text_config['max_position_embeddings']} positions."
        )
    try:
        return FVLMConfig(
            organ_set=organ_set.name,
            organs=list(organ_set.organs),
            organ_classes=organ_set.classes,
            vision_config={
                **vision_config,
                "volume_size": list(args.volume_size),
                "patch_size": list(vision_config["patch_size"]),
                "num_attention_heads": args.vision_heads,
                "feature_levels": list(levels),
            },
            text_config=text_config,
            spacing=list(args.spacing),
            margin_voxels=list(args.margin_voxels),
            windows=[{"hu_min": args.hu_window[0], "hu_max": args.hu_window[1], "mean": 0.0, "std": 1.0}],
            text_token_types=args.text_token_types,
            projection_dim=projection_dim,
            pooling_num_heads=args.pooling_heads,
            max_text_length=args.max_text_length,
            completeness=args.completeness,
            min_organ_voxels=args.min_organ_voxels,
            preprocessing=args.preprocessing,
        )
    except Exception as error:  # strict dataclasses raise errors of their own that are no ValueError
        raise SettingsError(f"sizes and options do not make a model: {error}") from error


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer of --vocab or --tokenizer."""
    if args.vocab is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, revision=args.revision, trust_remote_code=False)
        # An unknown model type beside it, as CXR-BERT's; tokenizers raises errors of its own.
        except Exception:
            try:
                tokenizer = BertTokenizerFast.from_pretrained(args.tokenizer, revision=args.revision)
            except Exception as error:
                raise SettingsError(f"--tokenizer {args.tokenizer} cannot be loaded: {error}") from error
        check_vocabulary(tokenizer, f"--tokenizer {args.tokenizer}")
        return tokenizer
    try:
        # Not splitlines: a vocabulary may hold characters that it takes for the end of a line.
        words = args.vocab.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--vocab {args.vocab} cannot be read as text, one token a line: {error}") from error
    vocabulary = {word: index for index, word in enumerate(words)}
    if missing := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in vocabulary]:
        raise SettingsError(f"--vocab {args.vocab} is no vocabulary of a BERT: it lacks {', '.join(missing)}.")
    if len(vocabulary) != len(words):
        raise SettingsError(f"--vocab {args.vocab} holds {len(words) - len(vocabulary)} tokens twice.")
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=args.max_text_length)


def public_config(config: PreTrainedConfig) -> dict:
    """A text encoder's config as a dict, without a place on this machine and code of its own."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "auto_map")}


def text_source(args: argparse.Namespace, text: PretrainedText, unread: list[str]) -> Source:
    """The card's row of a text encoder: a folder by its last name and the digest of its weights, a Hub id as it is."""
    num_tensors = len(text.model.state_dict()) + len(text.left_behind)
    folder = Path(args.text_encoder)
    if not folder.is_dir():
        digest = f"revision {args.revision or getattr(text.model.config, '_commit_hash', None) or 'main'}"
        return Source("text encoder", args.text_encoder, digest, num_tensors, unread)
    files = sorted([*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")])
    digests = ", ".join(sha256(file) for file in files)
    return Source("text encoder", folder.resolve().name, digests, num_tensors, unread)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with its tensors."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def refuse_used_folder(out: Path) -> None:
    """Refuse an --out that holds something already, before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"--out {out} is in use: give a new or an empty folder.")
    refuse_place_below_a_file(out)


def refuse_place_below_a_file(out: Path) -> None:
    """Refuse an --out that no folder can be made for."""
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise SettingsError(f"--out {out}: {nearest} is a file, and nothing can be written below it.")


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a name beside `out` to write a file or folder under; it gets its own name when everything is written."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    unfinished = out.absolute().with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, out)  # an empty folder of that name gives way
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished, ignore_errors=True) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):  # a full disk is the one or the other
            raise SettingsError(f"--out {out} cannot be written: {error}") from error
        raise


def report(model: FVLMModel, sources: Sequence[Source], out: Path) -> None:
    """Print what came of it."""
    config = model.config
    for source in sources:
        used = source.num_tensors - len(source.left_behind)
        print(f"{source.role} {source.name}: {source.num_tensors} tensors, {used} used")
        print(f"  left behind, known: {', '.join(source.left_behind) or 'none'}")
    vision, text = config.vision_config, config.text_config
    print(
        f"model: {sum(parameter.numel() for parameter in model.parameters()):,} parameters; ViT "
        f"{vision.num_hidden_layers} x {vision.hidden_size} on {' x '.join(map(str, vision.volume_size))} voxels, "
        f"{text.model_type} {text.num_hidden_layers} x {text.hidden_size}, {len(config.organs)} organs"
    )
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(main())
