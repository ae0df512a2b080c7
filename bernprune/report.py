"""A run's report as a short table for people."""

import math
from typing import Any

ROWS = {"dense": "dense", "uniform": "metric, uniform", "initial": "initial metric"}


def table(report: dict[str, Any]) -> str:
    """Dense, initial metric, learned, repaired: perplexity, parameters, latency; and the protocol of these figures."""
    lines = [f"{'':<16}{'perplexity':>12}{'parameters':>16}{'latency':>12}"]
    same_start = report["perplexity"]["uniform"] == report["perplexity"]["initial"]
    for name, title in titles(report).items():
        if name == "uniform" and same_start:
            continue
        figure = report["latency"].get(name)
        time = "-" if figure is None else f"{figure['median_ms']:.1f} ms"
        count = report["parameters"].get(name)
        size = "-" if count is None else f"{count:,}"
        lines.append(f"{title:<16}{shown(report['perplexity'][name]):>12}{size:>16}{time:>12}")
    return "\n".join([*lines, *_plans(report), "", *_notes(report)])


def titles(report: dict[str, Any]) -> dict[str, str]:
    """What each model is called: the kept one learned only if it was, and repaired only if that changed it."""
    learned = report["diagnostics"] and report["search"]["kept"] in ("learned", "widths")
    kept = "learned" if learned else "kept"
    if report["repair"].get("chosen", "none") == "none":
        return ROWS | {"pruned": kept}
    return ROWS | {"unrepaired": kept, "pruned": "repaired"}


def shown(perplexity: float | None, digits: int = 3) -> str:
    """A perplexity in few characters, however large; or that it is not finite."""
    if perplexity is None:
        return "not finite"
    return f"{perplexity:.{digits}f}" if perplexity < 1e7 else f"{perplexity:.3g}"


def _plans(report: dict[str, Any]) -> list[str]:
    """Plans for other sparsities; they are not repaired."""
    note = "" if report["repair"].get("chosen", "none") == "none" else "   before a repair"
    return [
        f"{'plan ' + format(plan['sparsity'], 'g'):<16}{shown(plan['perplexity']):>12}{note}"
        for plan in report["plans"]
    ]


def _choice(report: dict[str, Any]) -> list[str]:
    search, lines = report["search"], list[str]()
    finals = search["finals"]
    judged = "on text not learned from"
    beaten = "not clearly better"
    if "finalists" in report["repair"]:
        judged = "as they are" if report["repair"]["method"] == "none" else "after a repair of each"
        beaten = "not better"
    if finals["sequences"]:
        rounds, won = len(finals["heats"]), sum(heat["winner"] > 0 for heat in finals["heats"])
        tried = f"changes tried in {rounds} round{'s' * (rounds > 1)}, kept in {won}" if rounds else "no changes tried"
        lines.append(f"choice       {finals['sequences']:,} of these sequences: {tried}; {_stopped(finals['ended'])}")
    if search["kept"] == "widths":
        lines.append(
            f"kept         in each layer as many channels as were learned, but the best by the metric: {judged}, the "
            f"learned ones were {beaten}"
        )
    elif search["kept"] != "learned" and search["steps"]:
        row = ROWS[search["kept"]]
        lines.append(f"kept         comes from the row '{row}': {judged}, it was better than what was learned")
    elif search["kept"] == "uniform":
        lines.append(f"kept         comes from the row '{ROWS['uniform']}': {judged}, it was the best")
    return lines


def _weights(report: dict[str, Any]) -> list[str]:
    """What was searched on, if it was not what is reported on."""
    own, search = report["model"]["dtype"].removeprefix("torch."), report["search"]
    if search["dtype"] == own:
        return []
    return [
        f"weights      searched in {search['dtype']}, where the dense perplexity is "
        f"{shown(math.exp(search['dense_loss']))}; what is reported and saved is in {own}"
    ]


def recovered(report: dict[str, Any]) -> str:
    """Before and after a recovery; and the protocol."""
    figures, steps = report["perplexity"], f"{report['best_step']:,} of {report['steps']:,}"
    lines = [f"{'':<16}{'perplexity':>12}"]
    lines += [f"{name:<16}{shown(figures[key]):>12}" for name, key in (("pruned", "before"), ("recovered", "after"))]
    best = f"the state after {steps} steps was the best on held-out text"
    if report["kept"] == "pruned":
        best = "on held-out text no state was better than what the run kept, which is what is saved"
    ranks, before = report["ranks"], report["parameters_before"]
    size = f"{report['parameters']:,} parameters as before"
    if before != report["parameters"]:
        size = f"{report['parameters']:,} parameters, {before:,} before, with biases of the repair"
    return "\n".join(
        [
            *lines,
            "",
            f"trained      {report['tokens']:,} tokens in {report['seconds']:.0f} s: {report['ended']}; {best}",
            f"adapters     of rank {min(ranks)} to {max(ranks)}, merged: {size}",
            _protocol(report["protocol"]),
            _verified(report["verified"]),
        ]
    )


def repaired(repair: dict[str, Any]) -> list[str]:
    """What was repaired, and which finalists were tried so, if that was asked for."""
    windows = f"{repair.get('judging_windows', 0):,} windows"
    if repair["method"] == "none":
        return _finalists(repair, f"of each, on {windows}")
    judged = f"on {windows} that it was not fitted on"
    lines = _finalists(repair, f"after a repair of each, {judged}")
    losses, chosen = repair["losses"], repair["chosen"]
    if chosen == "none":
        tried = " and ".join(name for name in losses if name != "none")
        why = f"{tried} did not lower the loss {judged}" if tried else "none could be tried, as said in warnings"
        return [*lines, f"repair       none: {why}"]
    before, after = (shown(losses[name], 4) for name in ("none", chosen))
    return [
        *lines,
        f"repair       {chosen}, from {repair['windows']:,} windows in {repair['seconds']:.0f} s: loss {before} before "
        f"and {after} after, {judged}",
    ]


def _finalists(repair: dict[str, Any], how: str) -> list[str]:
    if "finalists" not in repair:
        return []
    tried = ", ".join(f"{name} {shown(loss, 4)}" for name, loss in repair["finalists"].items())
    return [f"finalists    {tried}: loss {how}"]


def _stopped(ended: str) -> str:
    """Why something stopped, in words, from a word and a clause."""
    return f"stopped because {ended.partition(': ')[2]}"


def _scored(notes: dict[str, dict[str, float]]) -> list[str]:
    """What initial metrics noted of their scores, if any did."""
    figures = {score: ", ".join(f"{name} {value:.4g}" for name, value in of.items()) for score, of in notes.items()}
    return [f"scores       {score}: {found}" for score, found in figures.items() if found]


def _searched(search: dict[str, Any]) -> list[str]:
    if not search["steps"]:
        return ["search       none, as search.sequences is 0"]
    of = "" if search["given"] in (None, search["sequences"]) else f" of {search['given']:,}"
    return [
        f"search       {search['sequences']:,}{of} sequences run forward, {search['forward_tokens']:,} tokens, in "
        f"{search['seconds']:.0f} s; {_stopped(search['ended'])}"
    ]


def _in_all(report: dict[str, Any]) -> list[str]:
    """All that was run forward, of which the search is a part."""
    counted = report["windows_run"]
    parts = ", ".join(f"{name} {count:,}" for name, count in counted.items())
    window = report["protocol"]["window"]
    return [f"in all       {sum(counted.values()):,} sequences of {window} tokens run forward: {parts}"]


def _known(found: dict[str, Any]) -> list[str]:
    """What the search knew of itself after its last round; nothing where that was too short to tell."""
    if not {"agreement", "signal_to_noise"} <= found.keys():
        return []
    agreed, told = (
        ", ".join(f"{kind} {value:.2f}" for kind, value in found[name].items())
        for name in ("agreement", "signal_to_noise")
    )
    regret = f"; knowing every unit would gain about {found['regret']:.3f} nats" if "regret" in found else ""
    gap = found.get("gap")
    lost = ""
    if gap is not None:
        than = "more" if gap >= 0 else "less"
        lost = f"; sampled masks lost {abs(gap):.3f} nats {than} than what would be selected"
    return [
        f"known        in the last round two halves of its text agreed to {agreed}, signal over noise was {told}"
        f"{regret}{lost}"
    ]


def _notes(report: dict[str, Any]) -> list[str]:
    search, sparsity = report["search"], report["sparsity"]
    figure = report["latency"]["dense"]
    also = {sparsity["measure"]: sparsity["achieved"]}
    also |= {name: cap["achieved"] for name, cap in sparsity["also"].items()}
    return [
        f"removed      {sparsity['block_parameters']:.2%} of the prunable block parameters, "
        f"{sparsity['total_parameters']:.2%} of all parameters{_also_removed(also)}",
        _protocol(report["protocol"]),
        f"latency      forward pass over {figure['rows']} x {figure['window']} tokens, median of {figure['repeats']}, "
        f"{figure['machine']}",
        *_scored(report["scores"]),
        *_searched(search),
        *_in_all(report),
        *_known(report["diagnostics"]),
        *_weights(report),
        *_choice(report),
        *repaired(report["repair"]),
        *_before_repair(report),
        _verified(report["verified"]),
    ]


def _before_repair(report: dict[str, Any]) -> list[str]:
    """What was learned counts on a repair; without one it may be worse than what it is better than in the end."""
    perplexity, names = report["perplexity"], titles(report)
    unrepaired, initial = perplexity.get("unrepaired"), perplexity["initial"]
    if (
        names.get("unrepaired") != "learned"
        or "finalists" not in report["repair"]
        or unrepaired is None
        or initial is None
    ):
        return []
    if unrepaired <= initial:
        return []
    return ["             (what is learned counts on its repair: compare it with the metric among the finalists)"]


def applied(done: dict[str, Any]) -> str:
    """What was made of a model by a plan."""
    before, after = done["dense_parameters"], done["pruned_parameters"]
    return "\n".join([f"parameters   {before:,} before, {after:,} after", *repaired(done["repair"]), _verified(done)])


def exported(done: dict[str, Any]) -> str:
    """What was written as a GGUF file, and what llama.cpp makes of it."""
    checked = done["checked"]
    told = "not: llama-cpp-python is not installed"
    if checked:
        told = (
            f"by llama.cpp: largest logit difference {checked['max_logit_difference']:.1e}, the same choice at "
            f"{checked['same_choice']:.0%} of the positions, the same tokens of a text"
        )
    return (
        f"gguf         architecture {done['architecture']}, {done['parameters']:,} parameters, "
        f"{done['bytes'] / 2**20:,.1f} MiB\nverified     {told}"
    )


def selected(kept: dict[str, Any]) -> str:
    """What a plan keeps, layer by layer."""
    lines = [f"{'layer':<8}{'kv groups':>14}{'FFN channels':>18}"]
    for layer, counts in enumerate(kept["layers"]):
        groups, channels = (f"{counts[what]:,} of {counts['of_' + what]:,}" for what in ("kv_groups", "channels"))
        lines.append(f"{layer:<8}{groups:>14}{channels:>18}")
    also = _also_removed({kept["measure"]: kept["achieved"]})
    return "\n".join([*lines, "", f"removed      {kept['removed']:.2%} of the prunable block parameters{also}"])


def compared(found: dict[str, Any]) -> str:
    """Groups of runs side by side, a line each, and what they differ in."""
    groups, protocol = found["groups"], found["protocol"]
    first, *others = groups
    wide = max(len(_group_name(group)) for group in groups)
    head = f"{'removed':>9}{'loss':>18}{'perplexity':>12}{'searched':>10}{'in all':>10}"
    head += "  against the first" if others else ""
    lines = [f"{'':<{wide}}{head}"]
    for group in groups:
        figures = (
            f"{group['removed']:>9.2%}{_with_spread(group['loss'], group['deviation']):>18}"
            f"{shown(group['perplexity']):>12}{group['sequences']:>10,}{group['in_all']:>10,}"
        )
        against = "" if group is first else f"  {_against(group['against'])}"
        lines.append(f"{_group_name(group):<{wide}}{figures}{against}")
    notes = [f"settings     {_group_name(group)}: {_named(group['settings'])}" for group in others]
    if others:
        notes.append("against      mean difference of the losses of runs with the same seed, with its standard error")
    return "\n".join(
        [
            *lines,
            "",
            *(f"runs         {_members(group)}" for group in groups),
            *notes,
            "removed      of the prunable block parameters",
            f"loss         nats per token, with its standard deviation over seeds; dense {shown(found['dense'], 4)}; "
            f"{protocol['text']}: {protocol['windows']:,} windows of {protocol['window']} tokens",
            *(f"unlike       {name}: {', '.join(values)}" for name, values in found["unlike"].items()),
        ]
    )


def _group_name(group: dict[str, Any]) -> str:
    others = len(group["runs"]) - 1
    return group["runs"][0] + (f" and {others} other{'s' * (others > 1)}" if others else "")


def _members(group: dict[str, Any]) -> str:
    return ", ".join(f"{run} (seed {seed})" for run, seed in zip(group["runs"], group["seeds"], strict=True))


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _against(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no seed in common"
    spread, seeds = "" if found["error"] is None else f" ± {found['error']:.4f}", len(found["seeds"])
    equal = f", equal in {found['equal']}" if found["equal"] else ""
    return f"{found['difference']:+.4f}{spread}, better in {found['better']} of {seeds} seed{'s' * (seeds > 1)}{equal}"


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _also_removed(shares: dict[str, float]) -> str:
    """What went of other measures than parameters."""
    return "".join(f", {share:.2%} of the prunable {name}" for name, share in shares.items() if name != "parameters")


def evaluated(result: dict[str, Any]) -> str:
    """A perplexity with its protocol."""
    protocol = result["protocol"]
    return (
        f"perplexity   {result['perplexity']:.4f} ({result['loss']:.4f} nats per token)\n"
        f"protocol     {protocol['text']}: {protocol['windows']:,} windows of {protocol['window']} tokens, "
        f"{protocol['tokens']:,} predictions, text {protocol['text_sha256']}\n"
        f"parameters   {result['parameters']:,}"
    )


def _verified(found: dict[str, float]) -> str:
    """A line on how the saved model compares with the one in memory."""
    return f"verified     reloaded in a clean process, largest logit difference {found['max_logit_difference']:.1e}"


def _protocol(protocol: dict[str, Any]) -> str:
    return (
        f"perplexity   {protocol['text']}: {protocol['windows']:,} windows of {protocol['window']} tokens, "
        f"{protocol['tokens']:,} predictions"
    )
