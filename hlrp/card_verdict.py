"""What a probe card's figures say: what is good, what is alarming, what fails, each against its control."""

import json
from collections.abc import Iterable, Iterator
from math import log
from pathlib import Path
from typing import NamedTuple

from hlrp.card import BOTH, CHANGE, LABELS, OBSERVATION, RANDOM, SHUFFLED, STATES, Z
from hlrp.checkpoints import load_config
from hlrp.laq_validation import HEALTHY_FROM, alarms

CARD = "probe.json"  # in a checkpoint's folder, beside config.json

MIN_R2 = 0.05  # of the actions, which latent actions alone must tell
MIN_SHARE, GOOD_SHARE = 0.02, 0.5  # of the R2 that an observation misses, which latent actions must add to it
MIN_GAP = 0.05  # of R2, from which on the card names what is missing
MAX_ZERO_TRANSITION, MAX_CAMERA_SHIFT = 0.1, 0.3
MAX_LEAKAGE = 0.2  # of R2, beyond what the true action or the change of pixels tells
MAX_OF_SHUFFLED = 0.95  # error of a rule of algebra, over the error with others' latent actions
MIN_TRANSFER = 0.5  # of R2 within an embodiment
CONTROLS = {
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
    lines = [*of_information(card), *of_few_shots(card), *of_use(name, card), *of_algebra(card.get("algebra"))]
    lines += [*of_leakage(card), *of_transfer(card)]
    order = ("fail", "alarm", "good", "note")
    return sorted(lines, key=lambda line: order.index(line.level))


def passed(lines: list[Line]) -> bool:
    return not any(line.level == "fail" for line in lines)


def worth(figures: dict) -> str:
    """One word for what latent actions tell of the actions. The first rule that holds decides:

    useless    they add nothing to the observation, and alone they tell no more than the mean action or a control does
    unknown    the observation foretells the actions: nothing can be added to it
    good       they add `GOOD_SHARE` of what the observation misses, and alone beat the models that learned nothing
    weak       they add less, or are no better than such a model

    In data of one expert an observation alone foretells most of the action, so that it alone condemns nobody.
    """
    share = figures["share"]
    if figures["interval"][0] <= MIN_R2 and (share is None or share["interval"][0] <= MIN_SHARE):
        return "useless"
    if share is None:
        return "unknown"
    if share["interval"][0] <= MIN_SHARE and unbeaten(figures, CONTROLS):
        return "useless"
    return "good" if share["r2"] >= GOOD_SHARE and not unbeaten(figures, (RANDOM, SHUFFLED)) else "weak"


def unbeaten(figures: dict, controls: Iterable[str]) -> list[str]:
    """The controls that tell the actions as well as the latent actions alone."""
    gains = figures["gains"]
    return [name for name in controls if name in gains and gains[name]["interval"][0] <= 0]


def of_information(card: dict) -> Iterator[Line]:
    figures = card.get("information")
    if figures is None:
        yield Line("note", "The source has no actions: whether the latent actions tell them is not known here.")
        return
    word, gains, alone = worth(figures), figures["gains"], f"they tell the actions with R2 {r2(figures)}"
    observation, both = best_of(figures, OBSERVATION), best_of(figures, BOTH)
    increase = f"to the observation's R2 {observation:z.2f} they add {r2(gains['increment'])}"
    if word == "useless":
        names = [] if figures["interval"][0] <= MIN_R2 else unbeaten(figures, CONTROLS)
        rival = f"no better than {CONTROLS[names[0]]}" if names else "their mean with 0"
        yield Line("fail", f"The latent actions are useless: {alone}, {rival}, and add nothing: {increase}.")
    elif word == "unknown":
        yield Line(
            "alarm",
            f"The observation alone foretells the actions with R2 {observation:z.2f}: what latent actions add to it, "
            f"only data with noise on the actions, or of play, can show. Alone {alone}.",
        )
    else:
        rivals = ", ".join(
            f"{words} {best_of(figures, name):z.2f}" for name, words in CONTROLS.items() if name in gains
        )
        yield Line(
            "good" if word == "good" else "alarm",
            f"The latent actions are {word}: {increase}, {figures['share']['r2']:.0%} of what it misses. "
            f"Alone {alone}; {rivals}.",
        )
    if word == "weak" and (names := unbeaten(figures, (RANDOM, SHUFFLED))):
        yield Line("alarm", f"Alone they tell the actions no better than {CONTROLS[names[0]]}.")
    if LABELS in gains and gains[LABELS]["interval"][0] <= 0:
        yield Line(
            "alarm",
            f"A model of the labels alone, without other video, tells the actions as well: R2 "
            f"{best_of(figures, LABELS):z.2f}.",
        )
    if gains[CHANGE]["interval"][0] <= 0 and best_of(figures, CHANGE) > MIN_R2:
        yield Line(
            "alarm",
            f"The principal components of the change of pixels, without any training, tell the actions as well: R2 "
            f"{best_of(figures, CHANGE):z.2f} at {figures['matched_dims']} dimensions.",
        )
    top, missing = figures["ceiling"], missing_of(figures, card.get("health", {}))
    yield Line(
        "note",
        f"The ceiling here is R2 {top['r2']:z.2f} ({top['name']}); the observation and the latent actions reach "
        f"{both:z.2f}." + (f" Missing: {'; '.join(missing)}." if missing else ""),
    )


def of_few_shots(card: dict) -> Iterator[Line]:
    """Of the fewest demonstrations, where a good latent action helps most."""
    if not card.get("few_shots"):
        return
    count, figures = next(iter(card["few_shots"].items()))
    found, rival = figures[Z]["r2"], figures[CHANGE]["r2"]
    words = "one demonstration" if int(count) == 1 else f"{count} demonstrations"
    ceiling = f", the true state {figures[STATES]['r2']:z.2f}" if STATES in figures else ""
    text = (
        f"From {words} of each task, the first frame given, they tell the actions with R2 {found:z.2f}; the principal "
        f"components of the change tell {rival:z.2f}, the first frame alone {figures[OBSERVATION]['r2']:z.2f}{ceiling}."
    )
    if found <= rival:
        yield Line("alarm", f"What needs no learning does as well with few labels. {text}")
    else:
        yield Line("good" if found - rival >= MIN_GAP else "note", text)


def missing_of(figures: dict, health: dict) -> list[str]:
    """What lies between latent actions and the ceiling, each in words."""
    alone, both, missing = figures["r2"], best_of(figures, BOTH), []
    linear, mlp = (figures["probes"][Z][probe]["r2"] for probe in ("ridge", "mlp"))
    if figures["ceiling"]["r2"] - both > MIN_GAP:
        bits = f"bits (the codes of a pair carry {sum(health['entropy']) / log(2):.1f})" if "entropy" in health else ""
        missing.append(bits or "part of the motion")
    if both - alone > MIN_GAP:
        missing.append(f"the first frame (who decodes the latent actions without it reads {alone:z.2f})")
    if mlp - linear > 2 * MIN_GAP:
        missing.append(f"labels (a linear probe reads only {linear:z.2f} of them, a small network {mlp:z.2f})")
    return missing


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
        excuses = {source: figures[source]["r2"] for source in ("true action", CHANGE) if source in figures}
        source, excuse = max(excuses.items(), key=lambda item: item[1], default=("mean", 0.0))
        if figures[Z]["interval"][0] > max(0.0, excuse) + MAX_LEAKAGE:
            yield Line(
                "alarm",
                f"The latent actions also tell the {name}, which is no action: R2 {r2(figures[Z])}; the {source}, at "
                f"no more dimensions, tells it with {excuse:z.2f}.",
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
