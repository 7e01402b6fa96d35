"""The dataset card: a generated README.md that also renders on the Hugging Face hub."""

import json
import re
from collections.abc import Sequence

from .episodes import QUALITIES
from .quality import QualityRule
from .records import CollectionHeader
from .tasks import TaskEntry

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(header: CollectionHeader, tasks: Sequence[TaskEntry]) -> str:
    """Return the card's Markdown. Tasks that lack a level or whose expert failed its test are listed by index."""
    steps = sum(entry.counts["mixed"].steps for entry in tasks)
    size = next((text for limit, text in _SIZES if steps < limit), "n>10M")
    tested = [entry for entry in tasks if entry.record.references.known]
    failed = [entry for entry in tested if not entry.record.references.reached_expert]
    lines = [
        "---",
        f"license: {json.dumps(header.licence.lower())}",
        f"pretty_name: {json.dumps(header.name)}",
        f"size_categories: [{json.dumps(size)}]",
        f"tags: {json.dumps(['offline-meta-reinforcement-learning', 'reinforcement-learning', 'zarr', header.family])}",
        "---",
        "",
        f"# {header.name} {header.version}",
        "",
        f"Offline meta-reinforcement learning data of the task family `{header.family}`: {len(tasks)} tasks "
        f"({len(header.train)} to train on, {len(header.test)} to test on), {steps:,} steps. "
        f"Licence {header.licence}; authors: {', '.join(map(_text, header.authors)) or 'not named'}.",
        "",
        "| quality | tasks that have it | episodes | steps |",
        "|---|---|---|---|",
    ]
    for quality in QUALITIES:
        counts = [entry.counts[quality] for entry in tasks]
        have = sum(count.episodes > 0 for count in counts)
        episodes, total = sum(count.episodes for count in counts), sum(count.steps for count in counts)
        lines.append(f"| {quality} | {have} of {len(tasks)} | {episodes:,} | {total:,} |")
    lines += [
        "",
        " ".join(["`mixed` is every episode.", *_levels(tasks)]),
        "",
        _failed(failed, len(tested)),
        "",
        *(["## Notes", "", *(f"- {_text(note)}" for note in header.notes), ""] if header.notes else []),
        "## Reading it",
        "",
        "Each task is one Zarr v3 group that any Zarr reader opens:",
        "",
        "    import zarr",
        f"    zarr.open_group('{tasks[0].folder}', mode='r')['observations'][:]",
        "",
        "Step t of episode e is row `offset[e] + e + t` of the observations, offset being the sum of the lengths "
        "before it; the next observation is the next row. With this project's software:",
        "",
        "    focal-cli data show PATH          # levels, returns, settings",
        "    focal-cli data verify PATH        # every checksum, every count",
        f"    focal-cli train --collection PATH --data {_suggestion(tasks)}",
        "",
        "`dataset.json` holds the settings, software versions, checksums and the content hash.",
        "",
    ]
    return "\n".join(lines)


def _text(text: str) -> str:
    """A stranger's words on one line of Markdown, as words: no HTML, links, code, emphasis, headings or lists."""
    words = re.sub(r"[\\<>&\[\]!`|*_~#+=-]", r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", words)


def _rule(rule: QualityRule) -> str:
    return (
        "A checkpoint's score is (return - random) / (expert - random) of stochastic episodes: `random` is every "
        f"checkpoint before the first score above {rule.random_below:g} (above "
        f"{max(rule.random_below, rule.first_random_below):g} for the first, untrained one), `medium` the one nearest "
        f"{rule.medium_target:g} within [{rule.medium_low:g}, {rule.medium_high:g}], `expert` all from "
        f"{rule.expert_from:g}. {rule.heldout_fraction:.0%} of every checkpoint's episodes are held out from training."
    )


def _levels(tasks: Sequence[TaskEntry]) -> list[str]:
    """Say where the levels come from."""
    scored = [entry for entry in tasks if entry.labels == "scores"]
    lines = [_rule(scored[0].rule)] if scored else []
    if given := len(tasks) - len(scored):
        lines.append(f"The levels of {given} of {len(tasks)} tasks came with the data and follow from no scores.")
    return lines


def _failed(failed: Sequence[TaskEntry], tested: int) -> str:
    if not tested:
        return "No reference returns are known, so there are no normalised scores and no expert was tested."
    if not failed:
        return "The expert of every task passed its family's absolute test."
    lines = ["These tasks' experts failed their family's absolute test; they have no `expert` episodes:", ""]
    lines += [f"- task {entry.index}: {_text(entry.record.references.expert_test)}" for entry in failed]
    return "\n".join(lines)


def _suggestion(tasks: Sequence[TaskEntry]) -> str:
    return "expert" if all(entry.counts["expert"].episodes for entry in tasks) else "mixed"
