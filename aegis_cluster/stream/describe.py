"""A topology as text, and as a Mermaid diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import ConfigError
from aegis_cluster.stream.topology import (
    Branch,
    Peek,
    Repartition,
    RunningAggregate,
    Sink,
    Source,
    StreamJoin,
    WindowAggregate,
)

if TYPE_CHECKING:
    from aegis_cluster.stream.topology import Node, Port, Topology


def described(topology: Topology, style: str) -> str:
    """style: `"text"` or `"mermaid"`. Raises `ConfigError`."""
    if style == "text":
        return _text(topology)
    if style == "mermaid":
        return _mermaid(topology)
    raise ConfigError(f"style = {style!r}; allowed: 'text', 'mermaid'.", key="style")


def _text(topology: Topology) -> str:
    lines = [f"Application {topology.application_id}"]
    for topic in topology.task_topics:
        lines.append(f"  One task for each partition of {topic}:")
        roots = topology.roots(topic)
        lines += [f"    {_line(topology, node, node in roots)}" for node in topology.steps(topic)]
        if topology.stateful(topic):
            lines.append(f"    state: {topology.changelog_topic(topic)}")
    return "\n".join(lines)


def _line(topology: Topology, node: Node, is_root: bool) -> str:
    what = _what(topology, node)
    if is_root:
        return f"{node.name} {what}".rstrip()
    inputs = ", ".join(_from(topology, port) for port in node.inputs)
    return f"{node.name} <- {inputs} {what}".rstrip()


def _from(topology: Topology, port: Port) -> str:
    node = topology.nodes[port.node]
    return f"{node.name}{_output(node, port.output)}"


def _output(node: Node, output: int) -> str:
    """What an output other than the only one is called."""
    if isinstance(node.spec, WindowAggregate | StreamJoin):
        return ("", " (late)", " (early)")[output]
    if isinstance(node.spec, Branch) or (isinstance(node.spec, Repartition) and output):
        return f" ({output})"
    return ""


def _what(topology: Topology, node: Node) -> str:
    spec = node.spec
    if isinstance(spec, Source):
        return f"[{', '.join(spec.topics)}]"
    if isinstance(spec, Sink):
        return f"[{spec.topic}]"
    if isinstance(spec, Repartition):
        return f"[{topology.repartition_topic(node)}]"
    if isinstance(spec, WindowAggregate | StreamJoin | RunningAggregate):
        return f"({node.shape})"
    if isinstance(spec, Peek) and spec.is_sink:
        return f"({getattr(spec.function, '__name__', 'function')})"
    return ""


def _mermaid(topology: Topology) -> str:
    lines = ["flowchart LR"]
    for node in topology.nodes:
        label = f"{node.name} {_what(topology, node)}".rstrip().replace('"', "'")
        left, right = _brackets(node)
        lines.append(f'    n{node.number}{left}"{label}"{right}')
    for node in topology.nodes:
        for port in node.inputs:
            text = _output(topology.nodes[port.node], port.output).strip(" ()")
            arrow = f"-->|{text}|" if text else "-->"
            lines.append(f"    n{port.node} {arrow} n{node.number}")
    return "\n".join(lines)


def _brackets(node: Node) -> tuple[str, str]:
    """Topics are drawn as cylinders, state as double boxes."""
    if isinstance(node.spec, Source | Sink | Repartition):
        return "[(", ")]"
    return ("[[", "]]") if node.is_stateful else ("[", "]")
