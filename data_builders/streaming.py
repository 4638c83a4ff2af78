"""CT-RATE as a `datasets` builder: organ crops while the volumes stream, nothing stored.

    from data_builders import CTRateBuilder

    builder = CTRateBuilder(source="hf://datasets/ibrahimhamamci/CT-RATE", organs="chest_4")
    for row in builder.as_streaming_dataset(split="train"):    # a row: one organ of one scan
        volume, organ_mask = decode_volume(row)                # of modeling_fvlm.processed_split

(1) the release is listed and its reports are read; no volume is asked for yet
(2) every case is a shard of the stream, so that ranks and DataLoader workers share the cases out among them
(3) a case is fetched when its turn comes, prepared as `python -m data_builders ct_rate` would, and deleted
`download_and_prepare` fills a cache of `datasets` with the same rows; `write` runs the ordinary builder instead, whose
processed split can be continued after a crash, counts, warns and carries a card: take that one for large releases.

Written for datasets 5.2. Traps met there: it gives ranks whole shards only if their number is a multiple of the ranks,
and otherwise lets every rank fetch everything; it looks at no source and no code when it finds a cache; it forgets what
was done when `download_and_prepare` breaks.
"""

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import logging
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import datasets

from modeling_fvlm.defaults import DEFAULT_MARGIN_VOXELS, DEFAULT_SPACING

from . import ct_rate
from .build import settings_from_args
from .cases import SPLITS, Case, nearest, sort_cases, source_fingerprint
from .run_cases import MOST_VANISHED_IN_A_ROW, prepare_case
from .shards import schema_of
from .skips import Skips
from .sources import Source, SourceError

logger = logging.getLogger(__name__)

# The number of shards is filled up with empty ones to a multiple of this: it is one of 1 to 6, 8, 10, 12, 15, 16, 20,
# 24, 30, 32, 40, 48, 60 and 64 ranks.
SHARDS_MULTIPLE = 960


@dataclass
class CTRateConfig(datasets.BuilderConfig):
    """What to stream: "organ_crops" (a row is one organ of one scan) or "volumes" (one reconstruction).

    Attributes:
        source: Where the release is: a folder, hf://datasets/owner/name[@revision], or another address of fsspec.
        revision: Branch, tag or commit on the Hub; its newest commit without one.
        organs: Organ set: chest_4, body_24, body_36 or a YAML file.
        spacing: Voxel size in mm along (depth, height, width).
        margin: Voxels of that size kept around the organs.
        reconstructions: Of each scan "first", "all" or "best".
        splits: Of "train" and "validation".
        volumes: "fixed" (corrected headers) or "original" (geometry and rescale from the metadata).
        rescale: "auto", "apply" or "skip" a declared rescale.
        lexicon: Terms for report -> organ captions: english, or a YAML file.
        labels: Label findings by the words of the report where the release has no labels: ct_rate_18, or a YAML file.
        unmentioned: What such a finding is where the report does not speak of it: "unknown" or "absent".
    """

    source: str = "hf://datasets/ibrahimhamamci/CT-RATE"
    revision: str | None = None
    organs: str = "body_24"
    spacing: tuple[float, float, float] = DEFAULT_SPACING
    margin: tuple[int, int, int] = DEFAULT_MARGIN_VOXELS
    reconstructions: str = "first"
    splits: tuple[str, ...] = SPLITS
    volumes: str = "fixed"
    rescale: str = "auto"
    lexicon: str = "english"
    labels: str | None = None
    unmentioned: str = "unknown"


class CTRateBuilder(datasets.GeneratorBasedBuilder):
    """Reads a release in CT-RATE's layout, wherever it lies, as a stream or into the cache of `datasets`.

    Args:
        cache_dir: Folder for `download_and_prepare`; the cache of `datasets` without it.
        config_name: "organ_crops" (default) or "volumes".
        token: For the Hub; without it the one of `hf auth login` or HF_TOKEN.
        options: Fields of `CTRateConfig`, and what else `datasets.DatasetBuilder` takes.

    Raises:
        ValueError: If the source is not there or does not let us in, or an option is wrong; before any data is read.
    """

    BUILDER_CONFIG_CLASS = CTRateConfig
    BUILDER_CONFIGS = [CTRateConfig(name="organ_crops"), CTRateConfig(name="volumes")]
    DEFAULT_CONFIG_NAME = "organ_crops"
    DEFAULT_WRITER_BATCH_SIZE = 4  # rows that wait in memory for the disk; a whole volume each

    def __init__(
        self,
        cache_dir: str | None = None,
        config_name: str | None = None,
        token: str | bool | None = None,
        **options,
    ) -> None:
        if options.get("source") is not None:
            options["source"] = str(options["source"])
        known = {field.name for field in fields(CTRateConfig)}
        for name in options:
            if name not in known and name not in inspect.signature(datasets.DatasetBuilder.__init__).parameters:
                raise ValueError(f"CTRateBuilder has no option {name!r}; it has {sorted(known)}{nearest(name, known)}.")
        chosen = {name: value for name, value in options.items() if name in known and value is not None}
        config = replace(CTRateConfig(), **chosen)
        self._token = token
        self._arguments = ct_rate_arguments(config)
        rows = config_name or self.DEFAULT_CONFIG_NAME
        self.settings = settings_from_args(parsed([*self._arguments, "--configs", rows]), "ct_rate")
        self._source: Source | None = Source(config.source, token=token, revision=config.revision)
        self._where = self._source.label if self._source.revision else config.source  # pinned from here on
        self._cases: list[Case] | None = None
        self._skips = Skips()
        self._told: set[str] = set()  # splits and cases whose oddities this process has logged
        self._vanished_in_a_row = 0
        self._choice = {
            "splits": tuple(config.splits),
            "reconstructions": config.reconstructions,
            "volumes": config.volumes,
            "slice_mm": config.spacing[0],
        }
        options = {"dataset_name": "ct_rate", "hash": self._content_hash(), **options}
        super().__init__(cache_dir=cache_dir, config_name=config_name, token=token, **options)

    def __getstate__(self) -> dict:
        """What a worker process needs: its cases come to it with its shards, not with the builder."""
        return {**super().__getstate__(), "_cases": None, "_source": None}

    @property
    def cases(self) -> list[Case]:
        """The cases of the release in their order, also those that are known to be unusable; listed at first use."""
        if self._cases is None:
            source = self._source or Source(self._where, token=self._token)
            self._cases = sort_cases(ct_rate.find_cases(source, **self._choice))
            self._source = None  # its listings have done their service
            if not self._cases:
                raise ValueError(f"{source.label} holds no case: no row of its reports could be matched with a volume.")
        return self._cases

    @property
    def skipped(self) -> dict[str, str]:
        """Case -> why it was left out: those known from the tables, and those met by any worker so far."""
        known = {case.recon_id: case.skip_reason for case in self.cases if case.skip_reason is not None}
        return {**known, **self._skips.read()}

    def write(self, out: str, **options) -> int:
        """Write the processed split with the ordinary builder, as the command `ct_rate` does.

        Args:
            out: Folder of the split; a build that was killed is continued there.
            options: Further options of the command: `workers=4, previews=0, strict=True`.

        Returns:
            0, or 1 if not one row was written.
        """
        more = [word for name, value in options.items() for word in as_words(name, value)]
        args = parsed([*self._arguments, "--source", self._where, "--out", str(out), *more])
        return ct_rate.run(args, Source(self._where, token=self._token))

    def _content_hash(self) -> str:
        """Name of the cache folder: changes with the settings, the source and our code.

        `datasets` itself looks at the options alone, and would hand out the rows of an older state of the source.
        """
        is_pinned = self._source is not None and self._source.revision is not None
        content = {
            "settings": self.settings.as_json(),
            "choice": self._choice,
            "source": self._where if is_pinned else source_fingerprint(self.cases),
            "code": code_digest(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="CT volumes, organ masks and organ captions in CT-RATE's layout, prepared by fVLM.",
            features=datasets.Features.from_arrow_schema(schema_of(self.config.name)),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        generators = []
        for split in self._choice["splits"]:
            members = [case for case in self.cases if case.split == split]
            if split not in self._told:
                self._told.add(split)
                broken = [case.skip_reason for case in members if case.skip_reason and not case.is_excluded]
                for reason, count in Counter(broken).items():
                    logger.warning(f"{split}: {count} of {len(members)} cases are left out: {reason}")
            shards: list[Case | None] = [case for case in members if case.skip_reason is None]
            if dl_manager.is_streaming:
                shards += [None] * (-len(shards) % SHARDS_MULTIPLE)
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"cases": shards}))
        return generators

    def _generate_examples(self, cases: list[Case | None]) -> Iterator[tuple[str, dict]]:
        for case in cases:
            if case is None:
                continue
            built = prepare_case(case, self.settings)
            self._vanished_in_a_row = self._vanished_in_a_row + 1 if built.is_vanished else 0
            if self._vanished_in_a_row >= MOST_VANISHED_IN_A_ROW:
                raise SourceError(f"{self._vanished_in_a_row} cases in a row had a file that is gone: bring them back.")
            if built.stop_reason is not None:
                raise SourceError(built.stop_reason)
            if built.skip_reason is not None:
                self._skips.add(case.recon_id, built.skip_reason)
                continue
            for warning in built.warnings if case.recon_id not in self._told else ():
                logger.warning(f"{case.recon_id}: {warning}")
            self._told.add(case.recon_id)
            if self.config.name == "volumes":
                yield case.recon_id, built.row
            for row in built.organ_crops:
                yield f"{case.recon_id}/{row['organ']}", row


class Options(argparse.ArgumentParser):
    """A parser that raises: its caller is no command line."""

    def error(self, message: str) -> None:
        raise ValueError(message.replace("argument --", "").replace("--", ""))


def ct_rate_arguments(config: CTRateConfig) -> list[str]:
    """The options of the command `ct_rate` that say the same as a config, but for the source."""
    names = ("organs", "spacing", "margin", "reconstructions", "splits", "volumes", "rescale", "lexicon")
    names += ("labels", "unmentioned")
    return [word for name in names for word in as_words(name, getattr(config, name))]


def as_words(name: str, value) -> list[str]:
    """An option as words of a command line; True is the bare option, False and None are none."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{name}", *(str(item) for item in values)]


def parsed(words: list[str]) -> argparse.Namespace:
    """The arguments of the command `ct_rate`; source and out are filled in where they are not given.

    Raises:
        ValueError: If the command has no such option, or the option no such value.
    """
    parser = Options(prog="CTRateBuilder", add_help=False, allow_abbrev=False)
    ct_rate.add_arguments(parser)
    return parser.parse_args(["--source", "", "--out", "", *words])


@functools.cache
def code_digest() -> str:
    """Changes with any line of the code that prepares a scan; as it was when this process first asked."""
    digest = hashlib.sha256()
    for package in ("data_builders", "modeling_fvlm"):
        modules = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))
        for module in modules:
            digest.update(pkgutil.get_data(package, f"{module}.py"))
    return digest.hexdigest()
