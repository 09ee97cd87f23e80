"""Names in the ONNX model: inputs and outputs as onnxruntime-genai calls them, values and nodes as the program does.

past_key_values_0_key  ⟷  past_key_values.0.key          present_0_value_scale  ⟷  present.0.value_scale
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import fx

from qcompile.backends.onnx_qcdq.rewriting import base_key
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr, named

_CACHE = re.compile(r"(past_key_values|present)_(\d+)_((?:key|value)(?:_scale|_zero_point)?)")
_PUBLIC_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.((?:key|value)(?:_scale|_zero_point)?)")
PROGRAM_NAME = "qcompile.name"
"""Metadata of a value: the name of the program's node that it is."""
MAX_POSITIONS = "qcompile.max_positions"
"""Metadata of a model: how many tokens it has positions for."""


def public_name(name: str) -> str:
    """The name of an input or output outside.

    >>> public_name("past_key_values_3_key"), public_name("present_3_key_scale"), public_name("input_ids")
    ('past_key_values.3.key', 'present.3.key_scale', 'input_ids')
    """
    match = _CACHE.fullmatch(name)
    return ".".join(match.groups()) if match else name


def program_name(name: str) -> str:
    """The inverse of `public_name`."""
    match = _PUBLIC_CACHE.fullmatch(name)
    return "_".join(match.groups()) if match else name


def rename(model: ir.Model, program: Program, original: Mapping[str, str]) -> None:
    """Name everything in `model`, which `program` was converted to; `original` as in `Prelowered`."""
    _rename_values(model, original)
    _rename_interface(model, program)
    _rename_initializers(model)
    _rename_nodes(model)
    common.NameFixPass()(model)
    _rename_sizes(model, program)


def _rename_values(model: ir.Model, original: Mapping[str, str]) -> None:
    """Values that a program's node computes get that node's name."""
    wanted: dict[str, list[ir.Value]] = {}
    for node in model.graph:
        source = node.meta.get("node")
        if not isinstance(source, fx.Node) or len(node.outputs) != 1 or node.outputs[0].name != source.name:
            continue
        origins = [o for s in source.meta.get("from_node", []) for o in s.from_node]
        if origins:
            name = original.get(origins[0].name, origins[0].name)
            wanted.setdefault(name, []).append(node.outputs[0])
    for values in wanted.values():
        for value in values:
            value.name = f"{value.name}.unnamed"
    for name, values in wanted.items():
        values[-1].name = name  # of several, the last is the whole of what the node computes
        values[-1].metadata_props[PROGRAM_NAME] = name
        for number, value in enumerate(values[:-1], start=1):
            value.name = f"{name}.{number}"


def _rename_interface(model: ir.Model, program: Program) -> None:
    for value, node in zip(model.graph.inputs, program.inputs, strict=True):
        value.name = public_name(node.name)
    for value, name in zip(model.graph.outputs, program.output_names, strict=True):
        value.name = public_name(name)


def _rename_initializers(model: ir.Model) -> None:
    """Drop the ends that keys got on the way, where the plain key is free."""
    keys = list(model.graph.initializers)
    taken = {value.name for value in model.graph.inputs} | {key for key in keys if "@" not in key}
    for key in keys:
        name = base_key(key)
        if name == key or name in taken:
            name = key.replace("@", ".")
        taken.add(name)
        if name != key:
            value = model.graph.initializers.pop(key)
            value.name = name
            model.graph.initializers[name] = value


def _rename_nodes(model: ir.Model) -> None:
    """``<module>/<operator>``, numbered where a module has several."""
    count: dict[str, int] = {}
    for node in model.graph:
        scope = _module(node)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        count[name] = count.get(name, 0) + 1
        node.name = name if count[name] == 1 else f"{name}.{count[name]}"
        for key in [k for k in node.metadata_props if k.startswith("pkg.torch")]:
            del node.metadata_props[key]
        node.metadata_props.pop("namespace", None)


def _module(node: ir.Node) -> str:
    source = node.meta.get("node")
    stack = source.meta.get("nn_module_stack") if isinstance(source, fx.Node) else None
    return str(list(stack.values())[-1][0]) if stack else ""


def _rename_sizes(model: ir.Model, program: Program) -> None:
    """Symbolic sizes of inputs and outputs by their public names: batch, sequence, past."""
    nodes = [*program.inputs, *program.outputs.values()]
    for value, node in zip([*model.graph.inputs, *model.graph.outputs], nodes, strict=True):
        if isinstance(node, fx.Node):
            sizes = [dim_expr(size) for size in node.meta["val"].shape]
            value.shape = ir.Shape([size if isinstance(size, int) else named(size, program.symbols) for size in sizes])
    for node_ir in model.graph:
        for output in node_ir.outputs:
            if not output.is_graph_output():
                output.shape = None
