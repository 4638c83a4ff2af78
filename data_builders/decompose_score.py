"""Score a split of reports by organ against gold: which sentences went to which organ, and what is abnormal.

The rules on gold reports, and a page that shows every misplaced sentence:
    python -m data_builders decompose-score --gold tests/data/reports_gold/tuning --json out/s.json --page out/s.html

The split of another method, as `decompose` or anything else wrote it:
    python -m data_builders decompose-score --gold gold.json --predicted split.json --json out/score.json

Gold and split are files or folders of {id, findings, impression, organs: {organ: {findings, impression, abnormal}}}.
What is counted is the pair (sentence, organ), in each section of each report by itself:

(1) Sentences are compared by content. White space, case, quotation marks around, list marks in front ("1.", "-") and
    the last punctuation do not count. Equal ones are paired first, one to one, so a sentence given twice is wrong once.
(2) Where the two sides cut the text differently, what is left is looked up in the text, word by word, without a
    heading in front ("LIVER:"). A predicted sentence is right if at least half of its words stand where gold sentences
    of the organ stand; a gold sentence is found if at least half of its words stand where right sentences do. So
    "Cardiomegaly;" and "pericardial effusion, decreased." find together what gold has in one piece, and a whole report
    given to an organ finds nothing. What is not in the text is neither.
(3) precision = right / predicted, recall = found / gold, F1 = their harmonic mean. `micro_f1`: over all pairs. The F1
    of an organ: over its pairs in all reports. `macro_f1`: its mean over the organs that gold or the split speaks of.
    `exact`: the same by step (1) alone.
(4) `abnormal_accuracy`: over the pairs (report, organ) of which both sides have a sentence, the share where `abnormal`
    is the same. `abnormal_accuracy_of_gold`: over all such pairs of gold; an organ without predicted sentence is wrong.
(5) `coverage`: the share of gold sentences, each once whatever its organs, that went to any organ, right or wrong
    (half of their words, as in step 2). `text_coverage`: the share of the words of all texts that stand in a
    sentence of gold / of the split.
(6) `invented`: sentences of the split that do not stand verbatim (but for white space) in their report.
    `in_other_section`: those that stand in its other section alone.
(7) `kappa`: Cohen's, of gold and split, as `decompose-agree` computes it.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .cases import counted
from .decompose import decompose, load_lexicon
from .decomposition_files import SECTIONS, organs_of, read_decompositions, sentences_of
from .shards import write_text
from .summary import console

LIST_MARK = re.compile(r"^(?:\(?(?:\d{1,2}|[a-z])[.)]\s*(?=[^\d\s])|[-*•–‣·]\s*)+")
HEADING = re.compile(r"^[a-z][a-z ,/&()-]{0,60}:\s+(?=\S)")
MOST_WORDS_OF_A_HEADING = 6
WORD = re.compile(r"\w+")
ENDS = " \t.;:,\"'“”‘’"


@lru_cache(maxsize=1 << 16)
def content_of(sentence: str) -> str:
    """A sentence as it is compared (step 1)."""
    text = " ".join(unicodedata.normalize("NFKC", sentence).casefold().split())
    return LIST_MARK.sub("", text).strip(ENDS)


@lru_cache(maxsize=1 << 16)
def words_of(sentence: str) -> tuple[str, ...]:
    """The words of a sentence, without a heading in front (step 2)."""
    content = content_of(sentence)
    heading = HEADING.match(content)
    if heading and len(heading[0].split()) <= MOST_WORDS_OF_A_HEADING:
        content = content[heading.end() :]
    return tuple(WORD.findall(content))


@lru_cache(maxsize=256)
def indexed_words(text: str) -> tuple[tuple[str, ...], Mapping[str, list[int]]]:
    """The words of a text, and the places of each."""
    words = tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    return words, places


def places_in(text: str, words: Sequence[str]) -> list[range]:
    """Where words stand in a text, one after the other: every time."""
    whole, places = indexed_words(text)
    size = len(words)
    starts = places.get(words[0], ()) if words else ()
    return [range(start, start + size) for start in starts if whole[start : start + size] == tuple(words)]


def stands_in(places: Sequence[range], words: set[int]) -> bool:
    """Whether half of a sentence that stands at `places` is among `words`, the places of others."""
    return any(2 * sum(place in words for place in one) >= len(one) for one in places)


@dataclass(frozen=True)
class Match:
    """Which gold sentences are found and which predicted ones are right; `num_equal` are so by step (1)."""

    is_found: list[bool]
    is_right: list[bool]
    num_equal: int


def match_sentences(gold: Sequence[str], predicted: Sequence[str], text: str) -> Match:
    """Compare what gold and split say of one organ in one section, whose text is `text` (steps 1 and 2)."""
    left = Counter(map(content_of, gold)) & Counter(map(content_of, predicted))
    num_equal = left.total()
    is_found, is_right = take_equal(gold, left), take_equal(predicted, left)
    gold_left, predicted_left = (
        {place: places_in(text, words_of(sentences[place])) for place, is_done in enumerate(done) if not is_done}
        for sentences, done in ((gold, is_found), (predicted, is_right))
    )
    gold_words = {word for places in gold_left.values() for one in places for word in one}
    for place, places in predicted_left.items():
        is_right[place] = stands_in(places, gold_words)
    right_words = {
        word for place, places in predicted_left.items() if is_right[place] for one in places for word in one
    }
    for place, places in gold_left.items():
        is_found[place] = stands_in(places, right_words)
    return Match(is_found, is_right, num_equal)


def take_equal(sentences: Sequence[str], counts: Counter) -> list[bool]:
    """Whether each sentence is one of those counted, no more often than they are."""
    left = Counter(counts)
    taken = []
    for content in map(content_of, sentences):
        taken.append(left[content] > 0)
        left[content] -= taken[-1]
    return taken


@dataclass
class Counts:
    """Pairs of (sentence, organ), of one organ or of all."""

    gold: int = 0
    predicted: int = 0
    found: int = 0
    right: int = 0
    equal: int = 0
    both_speak: int = 0
    gold_speaks: int = 0
    same_flag: int = 0

    def add(self, other: "Counts") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def precision(self) -> float | None:
        return share(self.right, self.predicted)

    def recall(self) -> float | None:
        return share(self.found, self.gold)

    def f1(self) -> float:
        precision, recall = self.precision() or 0.0, self.recall() or 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def exact_f1(self) -> float:
        return 2 * self.equal / (self.gold + self.predicted) if self.gold + self.predicted else 0.0


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass
class Misplaced:
    """A sentence that gold and split give to different organs."""

    id: str
    section: str
    sentence: str
    gold: list[str] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # organs that should have it
    extra: list[str] = field(default_factory=list)  # organs that should not


def score(gold: Sequence[Mapping], predicted: Sequence[Mapping], organs: Sequence[str]) -> dict:
    """Score a split against gold, both as `read_decompositions` gives them.

    Args:
        gold, predicted: Entries, matched by their id. A report without prediction counts as one that says nothing;
            entries that gold does not know are named and not counted.
        organs: The organ set. Sentences of other organs are not counted on either side.

    Returns:
        The figures of the module's docstring, `per_organ`, and every misplaced sentence and wrong flag.
    """
    from .decompose_agreement import agreement

    entry_of = {entry["id"]: entry for entry in predicted}
    nothing = {"organs": {}}
    per_organ = {organ: Counts() for organ in organs}
    misplaced: list[Misplaced] = []
    flags = []
    outside = {"invented": [], "in_other_section": []}
    covered = Counter()
    for report in gold:
        entry = entry_of.get(report["id"], nothing)
        for section in SECTIONS:
            found_here = compare_section(report, entry, section, per_organ)
            misplaced += found_here
            for name, count in coverage_of(report, entry, section, organs).items():
                covered[name] += count
        for organ, counts in per_organ.items():
            sides = [any(sentences_of(side, section, organ) for section in SECTIONS) for side in (report, entry)]
            counts.gold_speaks += sides[0]
            if all(sides):
                wanted, got = (side["organs"][organ]["abnormal"] for side in (report, entry))
                counts.both_speak += 1
                counts.same_flag += wanted == got
                if wanted != got:
                    flags.append({"id": report["id"], "organ": organ, "gold": wanted, "predicted": got,
                                  "sentences": [sentence for section in SECTIONS
                                                for sentence in sentences_of(entry, section, organ)]})  # fmt: skip
        for kind, sentence, section in not_in_text(report, entry, organs):
            outside[kind].append({"id": report["id"], "section": section, "sentence": sentence})
    total = Counts()
    for counts in per_organ.values():
        total.add(counts)
    spoken = [counts for counts in per_organ.values() if counts.gold or counts.predicted]
    paired = [(report, entry_of.get(report["id"], {"id": report["id"], **nothing})) for report in gold]
    kappas = agreement([report for report, _ in paired], [entry for _, entry in paired], organs)
    return rounded(
        {
            "micro_f1": total.f1(),
            "macro_f1": share(sum(counts.f1() for counts in spoken), len(spoken)),
            "abnormal_accuracy": share(total.same_flag, total.both_speak),
            "micro_precision": total.precision(),
            "micro_recall": total.recall(),
            "exact": {
                "micro_f1": total.exact_f1(),
                "macro_f1": share(sum(counts.exact_f1() for counts in spoken), len(spoken)),
            },
            "abnormal_accuracy_of_gold": share(total.same_flag, total.gold_speaks),
            "coverage": share(covered["sentences"], covered["gold_sentences"]),
            "text_coverage": {side: share(covered[f"{side}_words"], covered["words"]) for side in ("gold", "split")},
            "invented": len(outside["invented"]),
            "in_other_section": len(outside["in_other_section"]),
            "kappa": kappas["kappa"],
            "num_reports": len(gold),
            "num_pairs": {"gold": total.gold, "predicted": total.predicted},
            "num_flags": total.both_speak,
            "missing_reports": [report["id"] for report in gold if report["id"] not in entry_of],
            "unknown_reports": sorted(entry_of.keys() - {report["id"] for report in gold}),
            "per_organ": {
                organ: {
                    "precision": counts.precision(),
                    "recall": counts.recall(),
                    "f1": counts.f1() if counts.gold or counts.predicted else None,
                    "support": counts.gold,
                    "predicted": counts.predicted,
                    "abnormal_accuracy": share(counts.same_flag, counts.both_speak),
                    "num_flags": counts.both_speak,
                    "kappa": kappas["per_organ"][organ]["kappa"],
                }
                for organ, counts in per_organ.items()
            },
            "misplaced": [vars(one) for one in misplaced],
            "wrong_flags": flags,
            "invented_sentences": outside["invented"],
            "sentences_in_other_section": outside["in_other_section"],
        }
    )


def compare_section(report: Mapping, entry: Mapping, section: str, per_organ: dict[str, Counts]) -> list[Misplaced]:
    """Count the pairs of one section of one report, and return its misplaced sentences in the order of the text."""
    found: dict[str, Misplaced] = {}
    for organ, counts in per_organ.items():
        gold, predicted = sentences_of(report, section, organ), sentences_of(entry, section, organ)
        match = match_sentences(gold, predicted, report.get(section, ""))
        counts.gold += len(gold)
        counts.predicted += len(predicted)
        counts.found += sum(match.is_found)
        counts.right += sum(match.is_right)
        counts.equal += match.num_equal
        for side, sentences, is_good, fault in (
            ("gold", gold, match.is_found, "missing"),
            ("predicted", predicted, match.is_right, "extra"),
        ):
            for sentence, good in zip(sentences, is_good):
                one = found.setdefault(content_of(sentence), Misplaced(report["id"], section, sentence))
                getattr(one, side).append(organ)
                if not good:
                    getattr(one, fault).append(organ)
    text = " ".join(report.get(section, "").split())
    faulty = [one for one in found.values() if one.missing or one.extra]
    return sorted(faulty, key=lambda one: text.find(" ".join(one.sentence.split())))


def coverage_of(report: Mapping, entry: Mapping, section: str, organs: Sequence[str]) -> dict[str, int]:
    """Counts of step (5) of one section."""
    text = report.get(section, "")
    gold, split = (
        list(dict.fromkeys(sentence for organ in organs for sentence in sentences_of(side, section, organ)))
        for side in (report, entry)
    )
    marked = [
        {
            word
            for sentence in sentences
            for one in places_in(text, WORD.findall(unicodedata.normalize("NFKC", sentence).casefold()))
            for word in one
        }
        for sentences in (gold, split)
    ]
    equal = set(map(content_of, split))
    is_covered = [
        content_of(sentence) in equal or stands_in(places_in(text, words_of(sentence)), marked[1]) for sentence in gold
    ]
    return {
        "gold_sentences": len(gold),
        "sentences": sum(is_covered),
        "words": len(indexed_words(text)[0]),
        "gold_words": len(marked[0]),
        "split_words": len(marked[1]),
    }


def not_in_text(report: Mapping, entry: Mapping, organs: Sequence[str]) -> list[tuple[str, str, str]]:
    """Sentences of a split that do not stand in their section: (kind, sentence, section), each once (step 6)."""
    texts = {section: " ".join(report.get(section, "").split()) for section in SECTIONS}
    found = []
    for section in SECTIONS:
        for sentence in dict.fromkeys(s for organ in organs for s in sentences_of(entry, section, organ)):
            looked_for = " ".join(sentence.split())
            if looked_for not in texts[section]:
                is_elsewhere = any(looked_for in text for text in texts.values())
                found.append(("in_other_section" if is_elsewhere else "invented", sentence, section))
    return found


def rounded(value):
    """Floats to six places, through dicts and lists."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def split_by_rules(entries: Sequence[Mapping], organs: Sequence[str], lexicon_name: str) -> list[dict]:
    """What the rules make of the texts of entries."""
    lexicon = load_lexicon(lexicon_name)
    lexicon.check_covers(organs)
    split = []
    for entry in entries:
        texts = decompose(entry.get("findings", ""), entry.get("impression", ""), organs, lexicon)
        said = {
            organ: {"findings": list(text.findings), "impression": list(text.impression), "abnormal": text.is_abnormal}
            for organ, text in texts.items()
        }
        split.append({"id": entry["id"], "organs": said})
    return split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gold", type=Path, required=True, metavar="FILE", help="gold: a JSON, or a folder of JSON")
    add("--json", type=Path, required=True, metavar="OUT", help="where the scores are written")
    help_text = "the split to score: JSON, JSON lines, a folder of them, or a folder with desc_info.json and "
    help_text += "conc_info.json; default: what --method makes of the texts of --gold"
    add("--predicted", type=Path, metavar="FILE", help=help_text)
    help_text = (
        "what makes the split without --predicted; default: %(default)s. Others are written by `decompose` first"
    )
    add("--method", choices=["rules"], default="rules", help=help_text)
    add("--lexicon", default="english", metavar="NAME|FILE", help="of the rules; default: %(default)s")
    help_text = "organ set of both sides; default: the smallest of ours that holds all organs of the gold"
    add("--organs", metavar="SET|FILE", help=help_text)
    add("--page", type=Path, metavar="HTML", help="write a page of the misplaced sentences as well")


def run(args: argparse.Namespace) -> int:
    gold = read_decompositions(args.gold)
    set_name, organs = organs_of(gold, args.organs)
    if args.predicted is None:
        predicted, method = split_by_rules(gold, organs, args.lexicon), f"rules, lexicon {args.lexicon}"
    else:
        predicted, method = read_decompositions(args.predicted), args.predicted.name
        known = {report["id"] for report in gold}
        if not known & {entry["id"] for entry in predicted}:
            raise ValueError(
                f"{args.predicted} and {args.gold} have no id in common (gold: {sorted(known)[:3]}; predicted: "
                f"{[entry['id'] for entry in predicted[:3]]}). Give the split of the gold reports."
            )
    result = {"gold": str(args.gold), "method": method, "organ_set": set_name, **score(gold, predicted, organs)}
    write_text(args.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if args.page is not None:
        from .score_page import score_page

        write_text(args.page, score_page(gold, result))
    print_score(result)
    return 0


def print_score(result: Mapping) -> None:
    def told(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [
        f"{counted(result['num_reports'], 'report')}, organ set {result['organ_set']}, {result['method']}",
        f"micro F1 {told(result['micro_f1'])} (precision {told(result['micro_precision'])}, recall "
        f"{told(result['micro_recall'])}), macro F1 {told(result['macro_f1'])}; of equal sentences alone "
        f"{told(result['exact']['micro_f1'])}, {told(result['exact']['macro_f1'])}",
        f"abnormal accuracy {told(result['abnormal_accuracy'])} over {counted(result['num_flags'], 'organ')} of which "
        f"both speak; kappa {told(result['kappa'])}",
        f"coverage {told(result['coverage'])}; invented {result['invented']}, in the other section "
        f"{result['in_other_section']}; {counted(len(result['misplaced']), 'misplaced sentence')}",
    ]
    for told_as, names in (("without a prediction", "missing_reports"), ("not in the gold", "unknown_reports")):
        if result[names]:
            some = ", ".join(result[names][:12]) + (", ..." if len(result[names]) > 12 else "")
            lines.append(f"{told_as}: {counted(len(result[names]), 'report')} ({some})")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
