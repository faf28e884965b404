"""The graph of an exported program, read from its JSON into a new one that holds only what is known.

Names become identifiers of generated Python code, texts are evaluated, operators are looked up by name: each
has a grammar or a list, and what is not in it is refused. Nothing is passed on unread.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from normsearch.admission.expressions import is_guard, is_size
from normsearch.admission.program_operators import OPERATORS, WITH_GRAPH

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,400}", re.ASCII)
_FULL_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}(\.[A-Za-z0-9_-]{1,200}){0,40}", re.ASCII)
_SYMBOL = re.compile(r"[a-z_]{1,20}[0-9]{1,9}", re.ASCII)
_STACK = re.compile(r"[A-Za-z0-9_.@<>-]{0,400}(,[A-Za-z0-9_.@<>-]{0,400}){2}", re.ASCII)
_LARGEST = 2**63 - 1
_DEEPEST = 8
#: Numbers of torch's types in the schema: whole numbers, floats, booleans, bfloat16.
TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 12: 1, 13: 2}
_STRIDED = 7
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
#: Where ``closing`` writes its record.
_RECORD = "normsearch"


class MalformedError(Exception):
    """What is refused, and why."""


def _refuse(what: str) -> NoReturn:
    raise MalformedError(what)


def program(value: Any) -> dict[str, Any]:
    """Return a program's JSON, rebuilt from what is known.

    Raises:
        MalformedError: it holds anything else.

    """
    read = _fields(
        value,
        graph_module=_graph_module,
        opset_version=_mapping(_one_of("aten"), _integer),
        range_constraints=_mapping(_symbol, _range),
        schema_version=_schema_version,
        verifiers=_each(_one_of("TRAINING", "ATEN")),
        torch_version=_text(50),
        guards_code=_each(_guard),
    )
    return {"verifiers": [], "guards_code": [], "torch_version": "<=2.4", **read}


def payloads(value: Any, prefix: str) -> dict[str, Any]:
    """Return the JSON that says which file holds which tensor, likewise."""

    def payload(value: Any) -> dict[str, Any]:
        found = _needed(
            value,
            path_name=_matching(re.compile(rf"{prefix}_[0-9]{{1,7}}", re.ASCII), "a file's name"),
            is_param=_boolean,
            use_pickle=_exactly(False, "a pickle, which runs code when it is read"),
            tensor_meta=_tensor,
        )
        sizes = found["tensor_meta"]
        if not all(
            "as_int" in size for size in (*sizes["sizes"], *sizes["strides"], sizes["storage_offset"])
        ):
            _refuse("a stored tensor whose size is open")
        return found

    return _needed(value, config=_mapping(_full_name, payload))


# Plain values.

Read = Callable[[Any], Any]


def _fields(value: Any, /, **known: Read) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{_shown(value)} where an object is expected")
    unknown = set(value) - set(known)
    if unknown:
        _refuse(f"the unknown field {_shown(min(unknown))}")
    return {name: known[name](part) for name, part in value.items()}


def _needed(value: Any, /, **known: Read) -> dict[str, Any]:
    read = _fields(value, **known)
    missing = set(known) - set(read)
    if missing:
        _refuse(f"no {min(missing)} where one is expected")
    return read


def _union(**known: Read) -> Read:
    def read(value: Any) -> dict[str, Any]:
        found = _fields(value, **known)
        if len(found) != 1:
            _refuse(f"{len(found)} values where there is one")
        return found

    return read


def _each(read: Read) -> Read:
    def read_all(value: Any) -> list[Any]:
        if not isinstance(value, list):
            _refuse(f"{_shown(value)} where a list is expected")
        return [read(part) for part in value]

    return read_all


def _mapping(key: Read, read: Read) -> Read:
    def read_all(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(f"{_shown(value)} where an object is expected")
        return {key(name): read(part) for name, part in value.items()}

    return read_all


def _optional(read: Read) -> Read:
    return lambda value: None if value is None else read(value)


def _matching(pattern: re.Pattern[str], what: str) -> Read:
    def read(value: Any) -> str:
        if not isinstance(value, str) or pattern.fullmatch(value) is None:
            _refuse(f"{_shown(value)}, which is not {what}")
        return value

    return read


def _one_of(*values: str) -> Read:
    def read(value: Any) -> str:
        if value not in values:
            _refuse(f"{_shown(value)}, where one of {', '.join(values)} is expected")
        return str(value)

    return read


def _exactly(expected: Any, what: str) -> Read:
    def read(value: Any) -> Any:
        if value != expected or type(value) is not type(expected):
            _refuse(what)
        return expected

    return read


def _text(most: int) -> Read:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            _refuse(f"{_shown(value)} where a short text is expected")
        return value

    return read


def _identifier(value: Any) -> str:
    if not isinstance(value, str) or _IDENTIFIER.fullmatch(value) is None or keyword.iskeyword(value):
        _refuse(f"the name {_shown(value)}, which is no identifier")
    return value


_full_name = _matching(_FULL_NAME, "the name of a parameter or module")
_symbol = _matching(_SYMBOL, "the name of a size")


def _path(value: Any) -> str:
    return "" if value == "" else str(_full_name(value))


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(f"{_shown(value)} where true or false is expected")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) > _LARGEST:
        _refuse(f"{_shown(value)} where a whole number is expected")
    return value


def _natural(value: Any) -> int:
    if _integer(value) < 0:
        _refuse(f"{_shown(value)} where a size is expected")
    return int(value)


def _number(value: Any) -> Any:
    if type(value) is int and abs(value) <= _LARGEST:
        return value
    # torch writes what is not finite as text.
    if type(value) is not float and value not in ("Infinity", "-Infinity", "NaN"):
        _refuse(f"{_shown(value)} where a number is expected")
    return value


def _type(value: Any) -> int:
    if type(value) is not int or value not in TYPES:
        _refuse(f"{_shown(value)}, which is no type of plain tensors")
    return value


def _enumerated(most: int) -> Read:
    def read(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= most:
            _refuse(f"{_shown(value)} where a small number is expected")
        return value

    return read


def _expression(value: Any) -> str:
    if not is_size(value):
        _refuse(f"the expression {_shown(value)}, which is no arithmetic of sizes")
    return str(value)


def _guard(value: Any) -> str:
    if not is_guard(value):
        _refuse(f"the condition {_shown(value)}, which is no comparison of sizes")
    return str(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]


# Tensors and sizes.

_HINT = _optional(_union(as_int=_integer, as_bool=_boolean, as_float=_number))


def _symbolic(value: Any) -> dict[str, Any]:
    return {"hint": None, **_fields(value, expr_str=_expression, hint=_HINT)}


_SIZE = _union(as_expr=_symbolic, as_int=_natural)
_SYM_INT = _union(as_expr=_symbolic, as_int=_integer)
_SYM_FLOAT = _union(as_expr=_symbolic, as_float=_number)
_SYM_BOOL = _union(as_expr=_symbolic, as_bool=_boolean)


def _device(value: Any) -> dict[str, Any]:
    return _fields(value, type=_one_of("cpu"), index=_optional(_exactly(0, "a device other than the CPU")))


def _tensor(value: Any) -> dict[str, Any]:
    return _needed(
        value,
        dtype=_type,
        sizes=_each(_SIZE),
        requires_grad=_boolean,
        device=_device,
        strides=_each(_SIZE),
        storage_offset=_SIZE,
        layout=_exactly(_STRIDED, "a tensor that is not strided"),
    )


def _range(value: Any) -> dict[str, Any]:
    return _fields(value, min_val=_optional(_integer), max_val=_optional(_integer))


def _schema_version(value: Any) -> dict[str, Any]:
    return _needed(value, major=_enumerated(100), minor=_enumerated(1000))


# Arguments.


def _named(value: Any) -> dict[str, Any]:
    return _needed(value, name=_identifier)


_TENSOR_OR_NONE = _union(as_tensor=_named, as_none=_boolean)


def _argument(depth: int) -> Read:
    def graph(value: Any) -> dict[str, Any]:
        if depth >= _DEEPEST:
            _refuse("graphs inside graphs inside graphs")
        return _needed(value, name=_identifier, graph=lambda part: _graph(part, depth + 1))

    return _union(
        as_none=_boolean,
        as_tensor=_named,
        as_tensors=_each(_named),
        as_int=_integer,
        as_ints=_each(_integer),
        as_float=_number,
        as_floats=_each(_number),
        as_string=_text(200),
        as_strings=_each(_text(200)),
        as_sym_int=_union(as_name=_identifier, as_int=_integer),
        as_sym_ints=_each(_union(as_name=_identifier, as_int=_integer)),
        as_scalar_type=_type,
        as_memory_format=_enumerated(4),
        as_layout=_exactly(_STRIDED, "a layout that is not strided"),
        as_device=_device,
        as_bool=_boolean,
        as_bools=_each(_boolean),
        as_sym_bool=_union(as_name=_identifier, as_bool=_boolean),
        as_sym_bools=_each(_union(as_name=_identifier, as_bool=_boolean)),
        as_graph=graph,
        as_optional_tensors=_each(_TENSOR_OR_NONE),
        as_sym_float=_union(as_name=_identifier, as_float=_number),
        as_sym_floats=_each(_union(as_name=_identifier, as_float=_number)),
        as_optional_tensor=_TENSOR_OR_NONE,
        as_nested_tensors=_each(_each(_named)),
        as_int_lists=_each(_each(_integer)),
        as_float_lists=_each(_each(_number)),
    )


def _node(depth: int) -> Read:
    argument = _argument(depth)

    def given(value: Any) -> dict[str, Any]:
        return {
            "kind": None,
            **_fields(value, name=_name_or_none, arg=argument, kind=_optional(_enumerated(2))),
        }

    def read(value: Any) -> dict[str, Any]:
        found = _fields(
            value,
            target=_operator,
            inputs=_each(given),
            outputs=_each(argument),
            metadata=_metadata,
            is_hop_single_tensor_return=_optional(_boolean),
            name=_optional(_identifier),
        )
        graphs = any("as_graph" in part["arg"] for part in found["inputs"])
        if graphs and found["target"] not in WITH_GRAPH:
            _refuse(f"a graph given to {found['target']}")
        return found

    return read


def _name_or_none(value: Any) -> str:
    return "" if value == "" else _identifier(value)


def _operator(value: Any) -> str:
    if not isinstance(value, str) or value not in OPERATORS:
        _refuse(f"the operator {_shown(value)}, which is not on the list of those that networks need")
    return value


def _metadata(value: Any) -> dict[str, str]:
    """Keep where an operator comes from; what torch would look up by name is left out."""
    if not isinstance(value, dict):
        _refuse(f"{_shown(value)} where an object is expected")
    kept = {}
    stack, function, trace = (value.get(name) for name in ("nn_module_stack", "torch_fn", "stack_trace"))
    if isinstance(stack, str) and len(stack) < 20_000 and all(map(_STACK.fullmatch, stack.split(";"))):
        kept["nn_module_stack"] = stack
    if isinstance(function, str) and re.fullmatch(r"[A-Za-z0-9_.;<>]{1,400}", function, re.ASCII):
        kept["torch_fn"] = function
    # Printed in comments: lines end with a line feed alone.
    if isinstance(trace, str) and len(trace) < 100_000 and trace.replace("\n", "").isprintable():
        kept["stack_trace"] = trace
    return kept


# Graphs.


def _graph(value: Any, depth: int = 0) -> dict[str, Any]:
    argument = _argument(depth)
    return _fields(
        value,
        inputs=_each(argument),
        outputs=_each(argument),
        nodes=_each(_node(depth)),
        tensor_values=_mapping(_identifier, _tensor),
        sym_int_values=_mapping(_identifier, _SYM_INT),
        sym_bool_values=_mapping(_identifier, _SYM_BOOL),
        sym_float_values=_mapping(_identifier, _SYM_FLOAT),
        is_single_tensor_return=_boolean,
        custom_obj_values=_exactly({}, "objects other than tensors"),
    )


def _graph_module(value: Any) -> dict[str, Any]:
    return _fields(
        value,
        graph=_graph,
        signature=_signature,
        module_call_graph=_each(_call),
        metadata=_record,
        treespec_namedtuple_fields=_exactly({}, "named tuples of classes that are not known"),
    )


def _signature(value: Any) -> dict[str, Any]:
    argument = _argument(0)
    constant = _union(
        as_none=_boolean, as_int=_integer, as_float=_number, as_string=_text(200), as_bool=_boolean
    )
    inputs = _union(
        user_input=lambda v: _needed(v, arg=argument),
        parameter=lambda v: _needed(v, arg=_named, parameter_name=_full_name),
        buffer=lambda v: _needed(v, arg=_named, buffer_name=_full_name, persistent=_boolean),
        tensor_constant=lambda v: _needed(v, arg=_named, tensor_constant_name=_full_name),
        constant_input=lambda v: _needed(v, name=_identifier, value=constant),
    )
    outputs = _union(
        user_output=lambda v: _needed(v, arg=argument),
        buffer_mutation=lambda v: _needed(v, arg=_named, buffer_name=_full_name),
        parameter_mutation=lambda v: _needed(v, arg=_named, parameter_name=_full_name),
        user_input_mutation=lambda v: _needed(v, arg=_named, user_input_name=_identifier),
    )
    return _needed(value, input_specs=_each(inputs), output_specs=_each(outputs))


def _call(value: Any) -> dict[str, Any]:
    argument = _argument(0)

    def signature(value: Any) -> dict[str, Any]:
        return {
            "forward_arg_names": None,
            **_fields(
                value,
                inputs=_each(argument),
                outputs=_each(argument),
                in_spec=_tree,
                out_spec=_tree,
                forward_arg_names=_optional(_each(_identifier)),
            ),
        }

    return {"signature": None, **_fields(value, fqn=_call_path, signature=_optional(signature))}


def _call_path(value: Any) -> str:
    # A second call of a module has a number behind an @.
    bare = value.partition("@")[0] if isinstance(value, str) else value
    _path(bare)
    if value != bare and not re.fullmatch(r"[^@]*@[0-9]{1,6}", value, re.ASCII):
        _refuse(f"{_shown(value)}, which is no module's call")
    return str(value)


def _tree(value: Any) -> str:
    """Read how arguments are nested, a JSON text that torch would import classes for."""
    if not isinstance(value, str) or len(value) > 1_000_000:
        _refuse(f"{_shown(value)} where a text is expected")
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        _refuse("a nesting of arguments that is no JSON")
    if not isinstance(read, list) or len(read) != 2 or read[0] != 1:
        _refuse("a nesting of arguments in a version that is not known")
    return json.dumps([1, _spec(read[1], 0)])


def _spec(value: Any, depth: int) -> dict[str, Any]:
    if depth > 50:
        _refuse("arguments that are nested too deeply")
    read = _fields(
        value, type=lambda t: t, context=lambda c: c, children_spec=_each(lambda part: _spec(part, depth + 1))
    )
    kind, context = read.get("type"), read.get("context")
    if kind is not None and (not isinstance(kind, str) or kind not in _CONTAINERS):
        _refuse(f"arguments in a {_shown(kind)}, which is no tuple, list or dictionary")
    if kind is None:
        # A leaf.
        _exactly(None, "a context of a single argument")(context)
        return {"type": None, "context": None, "children_spec": []}
    if not isinstance(context, str) or len(context) > 100_000:
        _refuse("a nesting of arguments that is not known")
    try:
        keys = json.loads(context)
    except (ValueError, RecursionError):
        _refuse("a nesting of arguments that is no JSON")
    named = isinstance(keys, list) and all(isinstance(key, str) and _is_key(key) for key in keys)
    if keys is not None and not (named and kind in ("builtins.dict", "collections.OrderedDict")):
        _refuse(f"arguments named {_shown(keys)}")
    return {"type": kind, "context": json.dumps(keys), "children_spec": read.get("children_spec", [])}


def _is_key(key: str) -> bool:
    return _IDENTIFIER.fullmatch(key) is not None and not keyword.iskeyword(key)


def _record(value: Any) -> dict[str, str]:
    """Keep what this package wrote, which whoever uses it checks again."""
    if not isinstance(value, dict):
        _refuse(f"{_shown(value)} where an object is expected")
    text = value.get("custom")
    if not isinstance(text, str) or len(text) > 100_000_000:
        return {}
    try:
        custom = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found = custom.get(_RECORD) if isinstance(custom, dict) else None
    if not isinstance(found, dict) or not all(isinstance(part, str) for part in found.values()):
        return {}
    return {"custom": json.dumps({_RECORD: found})}


def extent(meta: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of a tensor, and those of a storage that reaches to its last number."""
    sizes, strides = ([part["as_int"] for part in meta[name]] for name in ("sizes", "strides"))
    if len(sizes) != len(strides):
        _refuse("a tensor with other strides than sizes")
    item = TYPES[meta["dtype"]]
    count = math.prod(sizes)
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if count else -1
    return count * item, (meta["storage_offset"]["as_int"] + last + 1) * item if count else 0
