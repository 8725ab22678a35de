"""The tables of docs/measurements.md about the search, from its results: see `benchmarks.report`."""

from typing import Any

from benchmarks._results import markdown


def _bold_if(missed: bool, text: str) -> str:
    return f"**{text}**" if missed else text


def placement(content: dict[str, Any]) -> str:
    """Budgets that hold, speed of the program and of proposals, and the modes on a synthetic space."""
    milp = content["milp"][0]
    text = (
        f"100 layers × 8 options × 2 budgets: {milp['exact_median_cpu_s']:.2f} s of CPU (highest "
        f"{milp['exact_max_cpu_s']:.2f} s), rough {milp['rough_median_cpu_s']:.2f} s.\n\n"
    )
    gates = [
        [r["model"], r["proposals"], r["over_budget"], r["wild_refused"], r["traced"], f"{r['worst_error']:.2%}"]
        for r in content["gate"]
    ]
    headers = [
        "model",
        "proposals",
        "over budget",
        "thrown at the gate, refused",
        "traced whole",
        "worst error of the table",
    ]
    text += markdown(headers, gates) + "\n"
    if "samplers" in content:
        counts = [[r["sampler"], r["proposals"], r["over_budget"], r["repeated"]] for r in content["samplers"]]
        text += markdown(["sampler", "proposals", "trained over budget", "repeated"], counts) + "\n"
    times = [[r["mode"], f"{r['proposal_median_s']:.3f}", f"{r['proposal_max_s']:.3f}"] for r in content["overhead"]]
    text += markdown(["mode", "proposal, median s", "highest s"], times) + "\n"
    modes = [
        [f"{r['rank_correlation']:.2f}", r["mode"], f"{r['after_20']:.0f}", f"{r['after_all']:.0f}"]
        for r in content["modes"]
    ]
    return text + markdown(["gain table's rank correlation", "mode", "after 20 trials, %", "after all, %"], modes)


def tabulated(content: dict[str, Any]) -> str:
    """A row a case, mode and gain table; what does not reach 95 % is bold."""
    spaces = [
        [
            *(c["case"], c["placements"], f"{c['original_loss']:.3f}", f"{c['optimum_loss']:.3f}"),
            f"{c['better_than_original']:.0%}",
        ]
        for c in content["cases"]
    ]
    headers = ["case", "placements", "original's loss", "optimum's", "better than the original"]
    lines = [
        [
            *(r["case"], r["mode"], r["gains"], _bold_if(not r["met"], f"{r['found_median']:.0f} %")),
            *(f"{r['found_lowest']:.0f} %", f"{r['seeds_that_reach_95']} of {content['seeds']}"),
        ]
        for r in content["rows"]
    ]
    found = f"found in {content['trials']} trials, median"
    rows = markdown(["case", "mode", "gains", found, "lowest", "seeds that reach 95 %"], lines)
    return markdown(headers, spaces) + "\n" + rows


def gain_methods(content: dict[str, Any]) -> str:
    """A row a method, best first."""
    truth = content["truth"]
    agree = "-" if truth["agreement"] is None else f"{truth['agreement']:.2f}"
    lines = [
        [
            *(r["method"], r["seeds"], f"{r['rank']:.2f} ± {r['sd']:.2f}"),
            "-" if r["rank_placements"] is None else f"{r['rank_placements']:.2f}",
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in content["methods"]
    ]
    headers = ["method", "seeds", "rank correlation", "with whole placements", "CPU s"]
    told = f"{truth['entries']} gains, {truth['truth_seeds']} seeds; two halves of the truth agree at {agree}.\n\n"
    return told + markdown(headers, lines)


def search_cifar(content: dict[str, Any]) -> str:
    """A row an arm."""
    search = content["search"]
    lines = [
        [
            *(
                a["arm"],
                a["replaced"],
                f"{a['flops']:+.1%}",
                f"{a['memory']:+.1%}",
                _bold_if(not a["within"], _yes(a["within"])),
            ),
            *(a["seeds"], _spread(a["loss"], a["loss_sd"], 3), _spread(a["top1"], a["top1_sd"], 1)),
        ]
        for a in content["arms"]
    ]
    headers = ["arm", "replaced", "FLOPs", "memory", "within the budgets", "seeds", "loss", "top-1, %"]
    told = f"{search['trials']} trials in {search['seconds'] / 60:.1f} minutes, gains {search['gains']}, sampler {search['mode']}."
    compared = ["against", "loss difference", "loss verdict", "top1 difference", "top1 verdict"]
    gaps = [[gap[name] for name in compared] for gap in content.get("differences", [])]
    shown = f"\n\nThe found placement against each other arm:\n\n{markdown(['against', 'loss', '', 'top-1, points', ''], gaps)}"
    return f"{told}\n\n" + markdown(headers, lines) + (shown if gaps else "")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _spread(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")
