"""A probe card to read: as text for the terminal, as one HTML page that needs no other file and no network, and beside
other cards.
"""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from hlrp.card import BOTH, OBSERVATION, Z
from hlrp.card_verdict import best_of, r2
from hlrp.runs import text_table

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
    for count, figures in card.get("few_shots", {}).items():
        beside = ", ".join(f"{name} {figures[name]['r2']:z.2f}" for name in figures if name != Z)
        words = "one demonstration" if int(count) == 1 else f"{count} demonstrations"
        yield Row(
            "Few demonstrations", f"R2 of the actions from {words} of each task", f"{figures[Z]['r2']:z.2f}", beside
        )
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
    for name in figures["gains"]:
        if name in probes:
            gain = f"z reads {r2(figures['gains'][name])} more"
            yield Row(section, f"R2 of the actions, {name}", f"{best_of(figures, name):z.2f}", gain)
    yield Row(
        section,
        "R2 that z adds to the observation",
        r2(figures["gains"]["increment"]),
        f"from {best_of(figures, OBSERVATION):z.2f} to {best_of(figures, BOTH):z.2f}",
    )
    if share := figures.get("share"):
        yield Row(section, "share of what the observation misses", r2(share), "true action 1, nothing new 0")
    if top := figures.get("ceiling"):
        yield Row(section, "R2 of the actions, ceiling", f"{top['r2']:z.2f}", top["name"])


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


CSS = """
body { margin: 0; background: #f4f6f8; color: #1f2933; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 21px; margin: 40px 0 10px; } h3 { font-size: 17px; margin: 0 0 4px; }
header, section, .verdict { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 18px 22px; }
section, .verdict { margin-top: 16px; }
header { display: flex; justify-content: space-between; align-items: flex-start; gap: 20px; }
header p { margin: 4px 0 0; color: #52606d; overflow-wrap: anywhere; }
.badge { padding: 6px 16px; border-radius: 6px; color: #fff; font-weight: 700; font-size: 18px; white-space: nowrap; }
.good.badge { background: #15803d; } .fail.badge { background: #b91c1c; }
ul { list-style: none; margin: 0; padding: 0; } li { display: flex; gap: 12px; padding: 5px 0; }
.mark { flex: 0 0 64px; height: 1.6em; text-align: center; font-size: 12.5px; font-weight: 700; border-radius: 4px; }
.good .mark { background: #dcfce7; color: #166534; } .fail .mark { background: #fee2e2; color: #991b1b; }
.alarm .mark { background: #fef3c7; color: #92400e; } .note .mark { background: #e4e7eb; color: #52606d; }
.why { color: #52606d; margin: 0 0 12px; max-width: 75ch; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 30px; align-items: start; }
figure { margin: 0; } figure.grid { grid-column: 1 / -1; }
img { max-width: 100%; max-height: 420px; display: block; } figure.grid img { width: 100%; max-height: none; }
figcaption { color: #52606d; font-size: 13.5px; margin: 2px 0 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #edf0f3; vertical-align: top; }
td:nth-child(3) { color: #52606d; } th { color: #52606d; font-weight: 600; overflow-wrap: anywhere; }
details { margin-top: 10px; } summary { cursor: pointer; color: #2563eb; }
"""

SECTIONS = {  # of the table's rows: why, and the pictures with what they show
    "Information": (
        (
            "Do latent actions tell the actions that were taken? Probes read the mean action between the two frames, "
            "fitted on some episodes and scored on others. A control has as many dimensions as the latent action, an "
            "observation at least 32. Lines are 95 % intervals over episodes."
        ),
        {
            "information": "What probes read. Grey: what a latent action has to beat. Orange: whether it tells more "
            "than the frame alone.",
            "predicted": "The scored pairs. On the line: read without error.",
            "map": "Latent actions by their first two principal components, one dot a pair. Colour: direction of the "
            "true action in its first two dimensions (pale: slow; grey: the source has none). Colours apart: the "
            "latent actions tell directions apart.",
        },
    ),
    "Few demonstrations": (
        (
            "How many labels does it take to read the actions? Networks are fitted on pairs of a few demonstrations "
            "of each task; each input stands beside the first frame. This is how hlrp.inverse labels video."
        ),
        {},
    ),
    "Leakage": (
        (
            "Do they also store what is not an action: what moves by itself, the camera, how an episode looks? As much "
            "as goes together with the true action, or as the change of pixels tells in as many numbers, is no leak."
        ),
        {"leakage": "What a probe reads about things that no action moves. Marks: what it reads from other inputs."},
    ),
    "Use by the decoder": (
        (
            "A decoder that gets along without the code leaves it free to mean nothing. Its error has to grow where it "
            "is given another pair's code, also one of the same episode, whose appearance is the same."
        ),
        {
            "use": "Errors of the decoder, by the code that it is given.",
            "reconstructions": "Held-out pairs, what is decoded from the first one and the code, and another's code.",
            "one-code": "One code on many frames, one row for each code: the motion should be the same along a row.",
            "many-codes": "Many codes on one frame: the changes should differ, and look like actions.",
        },
    ),
    "Invariance and algebra": (
        (
            "Actions obey rules: where nothing happens there is none, the reverse undoes it, two in a row add up, and "
            "a frame that is decoded from one shows it again. The motion of a camera is not an action."
        ),
        {
            "invariance": "Changes that are not actions should hardly change the latent action.",
            "algebra": "Blue: the error of the rule. Grey: the error with the latent actions of other pairs.",
        },
    ),
    "Code health": (
        "Are the codes in use? This says nothing about what they mean; it warns where they have collapsed.",
        {"usage": "How often each code is used at each token position."},
    ),
    "Transfer": (
        "Does a latent action mean the same for another embodiment? A probe fitted on one is scored on another.",
        {"transfer_matrix": "R2 of the actions. On the diagonal, the probe is scored on its own embodiment."},
    ),
}
GRIDS = ("reconstructions", "one-code", "many-codes", "usage", "neighbours")  # as wide as the page
NEIGHBOURS = (
    "Left: a pair. Right: the nearest latent actions of other episodes. Is it the same motion in another scene?"
)


def document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def page(card: dict, pictures: dict[str, dict[str, bytes]]) -> str:
    """card: as card.json has it; pictures: PNG by source and name."""
    parts = [header(card)]
    for name, source in card["sources"].items():
        counts = (
            f"{source['pairs']} pairs of frames of {source['episodes']} episodes; probes are fitted on some and scored "
            f"on {source['scored_pairs']} pairs of {source['scored_episodes']} other episodes"
        )
        parts.append(f"<h2>{escape(name)}</h2><p class=why>{escape(source['uri'])}. {counts}.</p>{verdict(source)}")
        parts += sections(source, pictures[name])
    return document(f"Probe card of {card['latents']}", "".join(parts))


def header(card: dict) -> str:
    kind, word = ("good", "passed") if card["passed"] else ("fail", "failed")
    about = f"{card['about']}, delta {card['delta']:g} s, hlrp {card['hlrp_version']}, {card['fingerprint']}"
    return (
        f"<header><div><h1>What are these latent actions worth?</h1><p>{escape(card['latents'])}</p>"
        f"<p>{escape(about)}</p></div><span class='badge {kind}'>{word}</span></header>"
    )


def verdict(source: dict) -> str:
    items = "".join(
        f"<li class={line['level']}><span class=mark>{line['level']}</span><span>{escape(line['text'])}</span></li>"
        for line in source["verdict"]
    )
    return f"<div class=verdict><ul>{items}</ul></div>"


def sections(source: dict, pictures: dict[str, bytes]) -> Iterator[str]:
    for name, group in groupby(rows(source), key=lambda row: row.section):
        why, shown = SECTIONS[name]
        figures = "".join(picture(key, pictures[key], text) for key, text in shown.items() if key in pictures)
        body = f"<div class=pictures>{figures}</div>{table(list(group))}"
        yield f"<section><h3>{name}</h3><p class=why>{why}</p>{body}</section>"
    if "neighbours" in pictures:
        yield f"<section><h3>Alike</h3>{picture('neighbours', pictures['neighbours'], NEIGHBOURS)}</section>"


def picture(name: str, content: bytes, caption: str) -> str:
    kind = "grid" if name in GRIDS else "plot"
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    return f"<figure class={kind}><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def table(group: Sequence[Row]) -> str:
    cells = "".join(
        f"<tr><td>{escape(row.figure)}</td><td>{escape(row.value)}</td><td>{escape(row.beside)}</td></tr>"
        for row in group
    )
    return f"<details><summary>{len(group)} figures</summary><table>{cells}</table></details>"


def compare_page(documents: dict[str, dict]) -> str:
    """Cards side by side."""
    head, *body = side_by_side(documents)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return document("Probe cards", f"<h1>Probe cards</h1><section><table>{''.join(lines)}</table></section>")
