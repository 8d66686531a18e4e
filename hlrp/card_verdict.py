"""What a probe card's figures say: what is good, what is alarming, what fails, each against its control."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hlrp.card import BOTH, CHANGE, LABELS, OBSERVATION, RANDOM, SHUFFLED, Z
from hlrp.checkpoints import load_config
from hlrp.laq_validation import HEALTHY_FROM, alarms

CARD = "probe.json"  # in a checkpoint's folder, beside config.json

MIN_INCREMENT = 0.05  # of R2 that z adds to the observation
MAX_ZERO_TRANSITION, MAX_CAMERA_SHIFT = 0.1, 0.3
MAX_LEAKAGE = 0.2  # of R2, beyond what the true action tells
MAX_OF_SHUFFLED = 0.95  # error of a rule of algebra, over that with others' latent actions
MIN_TRANSFER = 0.5  # of R2 within an embodiment
WORTHLESS = {  # controls that z must beat
    OBSERVATION: "an observation alone",
    RANDOM: "an encoder that has learned nothing",
    SHUFFLED: "a model trained on shuffled futures",
}


class Line(NamedTuple):
    level: str  # "good", "alarm", "fail", or "note"
    text: str


def r2(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['r2']:z.2f} ({low:z.2f} to {high:z.2f})"


def verdict(name: str, card: dict) -> list[Line]:
    """One line a finding, failures first. A card passes without any of these."""
    lines = [*of_information(card.get("information")), *of_use(name, card), *of_algebra(card.get("algebra"))]
    lines += [*of_leakage(card), *of_transfer(card)]
    order = ("fail", "alarm", "good", "note")
    return sorted(lines, key=lambda line: order.index(line.level))


def passed(lines: list[Line]) -> bool:
    return not any(line.level == "fail" for line in lines)


def of_information(figures: dict | None) -> Iterator[Line]:
    if figures is None:
        yield Line("note", "The source has no actions: whether the latent actions tell them is not known here.")
        return
    gains, found = figures["gains"], f"R2 {r2(figures)}"
    worthless = [words for name, words in WORTHLESS.items() if name in gains and gains[name]["interval"][0] <= 0]
    if figures["interval"][0] <= MIN_INCREMENT:
        yield Line("fail", f"The latent actions are useless: they tell the actions with {found}, their mean with 0.")
    elif worthless:
        yield Line(
            "fail",
            f"The latent actions are useless: they tell the actions with {found}, no better than {worthless[0]}.",
        )
    else:
        beaten = ", ".join(
            f"{words} {best_of(figures, name):z.2f}" for name, words in WORTHLESS.items() if name in gains
        )
        yield Line("good", f"The latent actions tell the actions with {found}; {beaten}.")
    increment = gains["increment"]
    if increment["interval"][0] <= MIN_INCREMENT:
        yield Line(
            "fail",
            f"The latent actions add nothing to the observation: R2 grows by {r2(increment)} where a probe reads both.",
        )
    else:
        yield Line(
            "good",
            f"They tell what the observation does not: from both, R2 is {best_of(figures, BOTH):z.2f}, from the "
            f"observation alone, at {figures['matched_dims']} dimensions, {best_of(figures, OBSERVATION):z.2f}.",
        )
    if LABELS in gains and gains[LABELS]["interval"][0] <= 0:
        yield Line(
            "alarm",
            f"A model of the labels alone, without other video, tells the actions as well: R2 "
            f"{best_of(figures, LABELS):z.2f}.",
        )
    if gains[CHANGE]["interval"][0] <= 0 and best_of(figures, CHANGE) > MIN_INCREMENT:
        yield Line(
            "alarm",
            f"The principal components of the change of pixels, without any training, tell the actions as well: R2 "
            f"{best_of(figures, CHANGE):z.2f} at {figures['matched_dims']} dimensions.",
        )
    linear, mlp = (figures["probes"][Z][probe]["r2"] for probe in ("ridge", "mlp"))
    if mlp - linear > 0.1:
        yield Line("note", f"A linear probe reads only {linear:z.2f} of it, a small network {mlp:z.2f}.")


def best_of(figures: dict, name: str) -> float:
    return max(probe["r2"] for probe in figures["probes"][name].values())


def of_use(name: str, card: dict) -> Iterator[Line]:
    report = {"pairs": card["pairs"], "shuffled_over_true": None} | card.get("use", {}) | card.get("health", {})
    failures = alarms({name: report})
    for sentence in failures:
        sentence = sentence.removeprefix(f"{name}: ")
        yield Line("fail", sentence[0].upper() + sentence[1:])
    for target, true in (card["use"]["true_over_copy"] if "use" in card else {}).items():
        if true >= 1:
            yield Line(
                "fail",
                f"The decoder predicts no better than the first frame shown again: with the true code its {target} "
                f"error is {true:z.2f} times as large.",
            )
    if failures or "use" not in card or not card["use"]["shuffled_over_true"]:
        return
    for target, shuffled in card["use"]["shuffled_over_true"].items():
        true = card["use"]["true_over_copy"][target]
        text = f"{target} error {shuffled:z.2f} times as large with the code of another pair"
        if shuffled < HEALTHY_FROM:
            yield Line("alarm", f"The decoder makes little use of the code: {text} (healthy: {HEALTHY_FROM} or more).")
        elif true < 1:
            yield Line("good", f"The decoder uses the code: {text}, and {true:z.2f} of copying the frame with its own.")


def of_algebra(figures: dict | None) -> Iterator[Line]:
    if figures is None:
        return
    if figures["zero_transition"] is None:
        yield Line("alarm", "Half of all latent actions are that of no change.")
    for name, most, words in (
        ("zero_transition", MAX_ZERO_TRANSITION, "where nothing happens"),
        ("camera_shift", MAX_CAMERA_SHIFT, "where only the camera moves"),
    ):
        if figures[name] is None:
            continue
        text = f"{words}, a latent action is {figures[name]:z.2f} as long as a median one (healthy: {most} or less)"
        yield Line("good" if figures[name] <= most else "alarm", text[0].upper() + text[1:] + ".")
    for name, rule in (("reversal", "undo the action of the reversed pair"), ("additivity", "add up, two in a row")):
        if figures[name] is not None:
            found, others = figures[name]["linear"], figures[name]["linear_shuffled"]
            text = f"a linear map leaves a relative error of {found:z.2f}, {others:z.2f} with others' latent actions"
            if found < MAX_OF_SHUFFLED * others:
                yield Line("good", f"Latent actions {rule}: {text}.")
            else:
                yield Line("alarm", f"Latent actions do not {rule}: {text}.")
    if figures["cycle"] is not None:
        found, others = figures["cycle"]["true"], figures["cycle"]["shuffled"]
        text = f"relative error {found:z.2f}, {others:z.2f} with others'"
        if found < min(1.0, others):
            yield Line("good", f"What is decoded shows the latent action that it was decoded from: {text}.")
        else:
            yield Line("alarm", f"What is decoded does not show the latent action that it was decoded from: {text}.")


def of_leakage(card: dict) -> Iterator[Line]:
    for name, figures in card.get("leakage", {}).items():
        excuse = max(0.0, figures["true action"]["r2"]) if "true action" in figures else 0.0
        if figures[Z]["interval"][0] > excuse + MAX_LEAKAGE:
            yield Line(
                "alarm",
                f"The latent actions also tell the {name}, which is no action: R2 {r2(figures[Z])}; "
                f"the true action tells it with {excuse:z.2f}.",
            )


def of_transfer(card: dict) -> Iterator[Line]:
    ratio = card.get("transfer", {}).get("ratio")
    if ratio is not None:
        level = "good" if ratio >= MIN_TRANSFER else "alarm"
        yield Line(
            level, f"What one embodiment's latent actions mean holds for another: {ratio:.0%} of R2 within each."
        )


def faults(folder: Path) -> list[str]:
    """The failures that the last probe card of a checkpoint found; none where it has no card."""
    path = folder / CARD
    if not path.is_file():
        return []
    sources = json.loads(path.read_text())["sources"]
    return [
        f"{name}: {line['text']}"
        for name, card in sources.items()
        for line in card["verdict"]
        if line["level"] == "fail"
    ]


def refuse_failed(laq: Path, accept: bool) -> dict:
    """The config of a LAQ's checkpoint. Raises ValueError where its validation or its probe card failed, unless
    `accept` is set."""
    config = load_config(laq, "laq")
    found = alarms(config["report"] or {}) + faults(laq)
    if found and not accept:
        raise ValueError(f"laq={laq} has failed: {' '.join(found)} --accept-failed-laq trains on it all the same")
    return config
