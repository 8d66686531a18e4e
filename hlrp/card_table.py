"""The figures of probe cards as rows of a table, for the terminal, the page, and side by side."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from hlrp.card import BOTH, OBSERVATION, Z
from hlrp.verdict import best_of, r2

MARKS = {"good": "ok   ", "alarm": "ALARM", "fail": "FAIL ", "note": "     "}


class Row(NamedTuple):
    section: str
    figure: str
    value: str
    beside: str = ""  # the control, or what is healthy


def rows(card: dict) -> Iterator[Row]:
    """Every figure of one source's card."""
    if "information" in card:
        yield from of_information(card["information"])
    if "dependence" in card:
        yield from of_dependence(card["dependence"])
    for name, figures in card.get("leakage", {}).items():
        beside = [f"{other} {figures[other]['r2']:z.2f}" for other in figures if other != Z]
        yield Row("Leakage", f"R2 of the {name}", r2(figures[Z]), ", ".join(beside))
    if identity := card.get("episode_identity"):
        true = f", true action {identity['true action']:.0%}" if "true action" in identity else ""
        figure = f"which of {identity['episodes']} episodes"
        yield Row("Leakage", figure, f"{identity[Z]:.0%}", f"chance {identity['chance']:.0%}{true}")
    if "use" in card:
        yield from of_use(card["use"])
    if "algebra" in card:
        yield from of_algebra(card["algebra"])
    yield from of_health(card["health"])
    for cell in card.get("transfer", {}).get("cells", ()):
        yield Row("Transfer", f"R2, fitted on {cell['fitted']}, scored on {cell['scored']}", r2(cell))


def of_information(figures: dict) -> Iterator[Row]:
    section, probes = "Information", figures["probes"]
    mean = f"mean of the actions {figures['mean']:z.2f}"
    yield Row(section, "R2 of the actions, ridge", r2(probes[Z]["ridge"]), mean)
    yield Row(section, "R2 of the actions, MLP", r2(probes[Z]["mlp"]), mean)
    better = max(probes[Z].values(), key=lambda probe: probe["r2"])
    yield Row(section, "normalised MSE", f"{better['error']:z.2f}", "mean of the actions 1")
    for group, part in better["groups"].items():
        yield Row(section, f"R2 of {group}", r2(part), f"normalised MSE {part['error']:z.2f}")
    for i, (value, error) in enumerate(zip(better["r2_per_dim"], better["error_per_dim"], strict=True)):
        shown = ("constant", "") if value is None else (f"{value:z.2f}", f"normalised MSE {error:z.2f}")
        yield Row(section, f"R2 of dimension {i}", *shown)
    for name in probes:
        if name not in (Z, BOTH):
            gain = f"z reads {r2(figures['gains'][name])} more"
            yield Row(section, f"R2 of the actions, {name}", f"{best_of(figures, name):z.2f}", gain)
    yield Row(
        section,
        "R2 that z adds to the observation",
        r2(figures["gains"]["increment"]),
        f"from {best_of(figures, OBSERVATION):z.2f} to {best_of(figures, BOTH):z.2f}",
    )


def of_dependence(figures: dict) -> Iterator[Row]:
    positions = figures["positions"]
    for figure, parts in (("mean over token positions", positions), ("whole sequences", [figures["sequence"]])):
        nmi, mi, null, high = (fmean(part[name] for part in parts) for name in ("nmi", "mi", "null", "null_95"))
        yield Row(
            "Information",
            f"NMI of codes and actions, {figure}",
            f"{nmi:.3f} ({mi:z.2f} nat)",
            f"codes shifted in time {null:.3f}, 95 % below {high:.3f}",
        )


def of_use(figures: dict) -> Iterator[Row]:
    for target, true in figures["true_over_copy"].items():
        yield Row(
            "Use by the decoder", f"{target} error / copy-frame error", f"{true:z.2f}", "copy of the first frame 1"
        )
        for name, words in (
            ("zero_over_true", "code of zeros"),
            ("shuffled_over_true", "code of another pair"),
            ("shuffled_in_episode_over_true", "code of another pair of the episode"),
        ):
            if figures[name] is not None:
                value = f"{figures[name][target] * true:z.2f}"
                yield Row("Use by the decoder", f"{target}, {words}", value, f"{figures[name][target]:z.2f} times")


def of_algebra(figures: dict) -> Iterator[Row]:
    section = "Invariance and algebra"
    for name in ("zero_transition", "camera_shift", "crop", "brightness"):
        limit = {"zero_transition": "healthy: 0.1 or less", "camera_shift": "healthy: 0.3 or less"}.get(name, "")
        value = "-" if figures[name] is None else f"{figures[name]:z.2f}"
        yield Row(section, f"response to {name.replace('_', ' ')} / median |z|", value, limit)
    for name in ("reversal", "additivity", "cycle"):
        if figures[name] is not None:
            other = f"others' latent actions {figures[name]['shuffled']:z.2f}"
            yield Row(section, f"relative error of {name}", f"{figures[name]['true']:z.2f}", other)
        if figures[name] is not None and "linear" in figures[name]:
            other = f"others' latent actions {figures[name]['linear_shuffled']:z.2f}"
            yield Row(
                section, f"relative error of {name}, by a linear map of z", f"{figures[name]['linear']:z.2f}", other
            )
    if figures["cycle_tokens"] is not None:
        other = f"others' {figures['cycle_tokens']['shuffled']:.0%}"
        yield Row(section, "tokens found again by the cycle", f"{figures['cycle_tokens']['true']:.0%}", other)


def of_health(figures: dict) -> Iterator[Row]:
    section = "Code health"
    if "usage" not in figures:
        yield Row(section, "dimensions in use", f"{figures['effective_dims']:.1f}", f"of {figures['dims']}")
        return
    yield Row(section, "codes used", f"{figures['usage']:.0%}", f"perplexity {figures['perplexity']:.1f}")
    yield Row(
        section, "different sequences", f"{figures['unique_sequences']}", f"of {figures['possible_sequences']} possible"
    )
    entropies = ", ".join(f"{x:z.2f}" for x in figures["entropy"])
    yield Row(section, "entropy of each token [nat]", entropies)


def text_table(columns: Sequence[Sequence[str]]) -> str:
    """Rows of cells, aligned."""
    widths = [max(len(row[i]) for row in columns) for i in range(len(columns[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in columns
    )


def text(document: dict) -> str:
    """A card for the terminal."""
    parts = []
    for name, card in document["sources"].items():
        table, section = [], None
        for row in rows(card):
            table.append((row.section if row.section != section else "", row.figure, row.value, row.beside))
            section = row.section
        head = f"{name}: {card['pairs']} pairs of {card['episodes']} episodes, {card['scored_pairs']} of them scored"
        lines = [f"{MARKS[line['level']]} {line['text']}" for line in card["verdict"]]
        parts.append("\n".join([head, "", text_table(table), "", *lines]))
    outcome = "passed" if document["passed"] else "FAILED"
    return "\n\n".join([*parts, f"{document['latents']}: {outcome}"])


def side_by_side(documents: dict[str, dict]) -> list[list[str]]:
    """Cards by name -> the rows of one table, a column a card, a header first; a figure that one lacks is "-"."""
    values: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, document in documents.items():
        for source, card in document["sources"].items():
            for row in rows(card):
                values.setdefault((source, row.section, row.figure), {})[name] = row.value
    table = [["source", "section", "figure", *documents]]
    outcomes = ["passed" if document["passed"] else "FAILED" for document in documents.values()]
    table.append(["", "Verdict", "", *outcomes])
    for key, found in values.items():
        table.append([*key, *(found.get(name, "-") for name in documents)])
    return table
