"""A report in some sixty lines, the verdicts last: whoever sees only the end of an output sees them."""

from collections.abc import Iterator, Mapping
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """Return the lines."""
    parts = report["parts"]
    lines = [*_facts(parts.get("facts", {}))]
    for name, part in parts.items():
        if show := _SHOWN.get(name.split()[0]):
            shown = [f"  {line}" for line in show(part.get("found", {}))]
            lines += [f"{name}:{shown[0][1:]}"] if len(shown) == 1 else [f"{name}:", *shown]
    lines += ["", "goals:"]
    lines += [f"  {_goal(goal)}" for goal in report["goals"]]
    lines += ["", "parts:"]
    lines += [f"  {name}: {part['seconds']:.0f} s, {part['error'] or 'done'}" for name, part in parts.items()]
    return "\n".join(lines)


def wrong_figures(report: Mapping[str, Any]) -> list[str]:
    """Return what was compared and differs, or could not be compared."""
    wrong = []
    for name, part in report["parts"].items():
        found = part.get("found", {})
        tried = found.get("with", {}).values()
        wrong += [name] * any("error" in each or each.get("wrong", 0) for each in tried)
        for case, errors in found.get("errors", {}).items():
            are_right = (isinstance(each, Mapping) and each["is right"] for each in errors.values())
            wrong += [case] * (not all(are_right))
        wrong += [f"{name}, writes"] * any(each is not True for each in found.get("writes", {}).values())
        tools = found.items() if name == "sanitizer" else ()
        wrong += [tool for tool, each in tools if isinstance(each, Mapping) and each.get("errors")]
    return wrong


def _facts(part: Mapping[str, Any]) -> Iterator[str]:
    found = part.get("found", {})
    gpu, machine = found.get("gpu") or {}, found.get("machine", {})
    versions = {name: machine.get(name) for name in ("torch", "transformers")} | found.get("versions", {})
    yield f"{gpu.get('name', 'no GPU')}, driver {gpu.get('driver')}, {gpu.get('memory_gib')} GiB"
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if hardware := found.get("hardware"):
        bandwidth, throughput = hardware["bandwidth"] / 1e12, hardware["throughput"] / 1e12
        yield f"{bandwidth:.2f} TB/s, {throughput:.0f} TFLOP/s in bf16"


def _exactness(found: Mapping[str, Any]) -> Iterator[str]:
    if "with" in found:
        wrong = {
            variant: each.get("wrong", _reason(each))
            for variant, each in found["with"].items()
            if each.get("wrong") != 0
        }
        told = ", ".join(f"{variant}: {what} wrong" for variant, what in wrong.items())
        tried = f"{found['requests']} requests in {len(found['with'])} engines"
        yield f"{tried}: {told or 'all equal'}"
    yield from _notes(found)


def _kernels(found: Mapping[str, Any]) -> Iterator[str]:
    errors = found.get("errors", {})
    for dtype in ("float32", "bfloat16"):
        known = {name: each[dtype] for name, each in errors.items() if dtype in each}
        if known:
            worst = max(known, key=lambda name: known[name]["kernels"])
            wrong = [name for name, each in known.items() if not each["is right"]]
            yield (
                f"{dtype}: {len(known)} cases, {len(wrong)} wrong; the largest error is "
                f"{known[worst]['kernels']:.1e}, torch's there {known[worst]['torch']:.1e}"
            )
            yield from (f"  wrong: {name}" for name in wrong[:5])
    yield from (f"{name}: {each['error']}" for name, each in errors.items() if "error" in each)
    writes = found.get("writes", {})
    if not all(each is True for each in writes.values()):
        yield f"writes of keys and values differ: {writes}"
    yield from _notes(found)


def _times(found: Mapping[str, Any]) -> Iterator[str]:
    for name, each in found.get("times", {}).items():
        yield (
            f"{name}: {each['seconds'] * 1e6:.0f} us, {each['of bandwidth']:.2f} of the bandwidth, "
            f"torch {each['torch seconds'] / each['seconds']:.1f} times as long"
        )
        if "seconds alone" in each:
            gain = each["seconds alone"] / each["seconds together"]
            yield f"  the prefix read together: {gain:.2f} times as fast as by each row"
    yield from _notes(found)


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}: {found[name]}" for name in ("left out", "not tried") if name in found)


def _sanitizer(found: Mapping[str, Any]) -> Iterator[str]:
    for name, each in found.items():
        yield f"{name}: {each if isinstance(each, str) else _reason(each) or str(each['errors']) + ' errors'}"


def _throughput(found: Mapping[str, Any]) -> Iterator[str]:
    for name, each in found.get("measured", {}).items():
        if reason := _reason(each):
            yield f"{name}: {reason}"
        elif name.startswith("B "):
            yield f"{name}: {_cell(each)}"
        elif name.startswith("switches"):
            yield from (f"{name}: {part} gain {_ratio(of['gain'])}" for part, of in each.items())
        elif name.startswith("peers"):
            yield from (f"{name}: {_ratio(of['ratio'])} times {peer}" for peer, of in each.items())
        else:
            yield f"{name}: {_ratio(each['ratio'])}"


def _cell(figures: Mapping[str, Any]) -> str:
    parts = [f"{figures['tokens_per_second']['median']:.0f} tokens/s"]
    if step := figures.get("decode_step_seconds"):
        parts.append(f"step {step['median'] * 1e3:.2f} ms, {figures['of_limit']:.2f} of t*")
    if first := figures.get("first_token_seconds"):
        parts.append(f"first token {first['median'] * 1e3:.1f} ms")
    return ", ".join(parts)


def _ratio(spread: Mapping[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{spread['median']:.3g} [{low:.3g}, {high:.3g}]"


def _reason(figures: Mapping[str, Any]) -> str | None:
    return next((f"{key}: {figures[key]}" for key in ("error", "left out") if key in figures), None)


def _goal(goal: Mapping[str, Any]) -> str:
    value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
    verdict = {True: "met", False: "NOT MET", None: "-"}[goal["is met"]]
    return f"{verdict}: {goal['goal']}: {value} (bound {goal['bound']:g})"


_SHOWN = {
    "exactness": _exactness,
    "kernels": _kernels,
    "times": _times,
    "sanitizer": _sanitizer,
    "throughput": _throughput,
}
