"""The normal form as a person would write it down."""

from __future__ import annotations

from collections.abc import Sequence

from .axes import Access, Axis, Index, Shifted, resolved
from .form import Factor, IndexerForm, Part
from .terms import AnyOf, Clamped, Compare, FloorDiv, Not, Plus, Position, Product, Scalar, Symbol, Term, Where
from .visibility import Condition, Vectors, positions


def in_index_notation(form: IndexerForm, vectors: Vectors) -> str:
    """The score and its visibility, one line each, with the names of the graph's nodes:

    score[b,s,t] = 0.5 * sum_h weights[b,s,h] * relu(sum_d q[b,s,h,d] * k[b,t,d])
    visible where t <= position[s]
    """
    names = _Names()
    for letter, role in (("b", form.batch), ("s", form.queries), ("t", form.keys)):
        names.add(letter, role)
    names.add("h", [axis for part in form.parts for axis in part.heads])
    for part in form.parts:
        # The parts have one key, and so the same features.
        names.add("d", part.features)
    names.queries = form.queries
    score = f"score{names.index(tuple(axis for role in (form.batch, form.queries, form.keys) for axis in role))}"
    shared = [names.factor(factor) for factor in form.key_weights]
    parts = [names.part(part) for part in form.parts]
    body = parts[0] if len(parts) == 1 else "(" + " + ".join(parts) + ")"
    lines = [f"{score} = {' * '.join([*shared, body])}"]
    visible = names.visibility(vectors)
    if visible:
        lines.append("visible where " + " and ".join(visible))
    return "\n".join(lines)


class _Names:
    def __init__(self) -> None:
        self.names: dict[Axis, str] = {}
        self.queries: Index = ()

    def add(self, letter: str, axes: Sequence[Axis]) -> None:
        for number, axis in enumerate(axes):
            self.names[axis] = letter if len(axes) == 1 else f"{letter}{number}"

    def index(self, index: Index) -> str:
        return "[" + ",".join(self.axis(axis) for axis in resolved(index)) + "]"

    def axis(self, axis: Axis) -> str:
        if isinstance(axis, Shifted):
            return "+".join(
                [*(self.axis(a) for a in resolved(axis.of)), *([str(axis.start)] if axis.start != 0 else [])]
            )
        return self.names.get(axis, axis.name or "?")

    def access(self, access: Access) -> str:
        dims = ["".join(self.axis(axis) for axis in resolved(dim)) or "0" for dim in access.index]
        return f"{access.node.name}[{','.join(dims)}]" if dims else access.node.name

    def factor(self, factor: Factor) -> str:
        return ("1/" if factor.inverse else "") + self.access(factor.access)

    def part(self, part: Part) -> str:
        assert part.key is not None
        inside = [self.access(query) for query in part.query] + [self.access(part.key)]
        factors = [f"{part.inner_scale:g}"] if part.inner_scale != 1 else []
        factors += [self.factor(factor) for factor in part.row_factors + part.key_factors]
        argument = " * ".join([*factors, f"sum_{self.sum(part.features)} " + " * ".join(inside)])
        outside = [f"{part.scale:g}"] if part.scale != 1 else []
        if part.heads:
            outside.append(f"sum_{self.sum(part.heads)} " + " * ".join(map(self.factor, part.weights)))
        else:
            outside += map(self.factor, part.weights)
        outside = [factor.strip() for factor in outside]
        relu = f"relu({argument})"
        if part.heads and not part.weights:
            return " * ".join([*outside[:-1], f"{outside[-1]} {relu}"])
        return " * ".join([*outside, relu])

    def sum(self, axes: Index) -> str:
        return "".join(self.axis(axis) for axis in axes)

    def visibility(self, vectors: Vectors) -> list[str]:
        token = next((name for name in self.names.values() if name.startswith("t")), "t")
        found = [f"{token} >= {self.term(term)}" for term in vectors.first]
        found += [self.bound(token, term) for term in vectors.last]
        found += [f"{self.term(query)} == {self.term(key)}" for query, key in vectors.segments]
        return found + [self.condition(condition) for condition in (*vectors.valid, *vectors.masks)]

    def bound(self, token: str, term: Term) -> str:
        # All tokens or none, by a condition on the query.
        match term:
            case Where(condition, Scalar(then), Scalar()):
                return self.condition(Condition(condition, then > 0))
            case Clamped(Plus((*rest, Scalar(-1))), _) | Plus((*rest, Scalar(-1))):
                return f"{token} < {self.term(Plus(tuple(rest)))}"
        return f"{token} <= {self.term(term)}"

    def condition(self, condition: Condition) -> str:
        return ("" if condition.visible_when else "not ") + self.term(condition.term)

    def term(self, term: Term) -> str:
        match term:
            case Access():
                found = positions(term, self.queries)
                return self.access(term) if found is None else self.term(found)
            case Scalar(value):
                return f"{value:g}"
            case Symbol(node):
                return node.name
            case Position(index):
                return "".join(self.axis(axis) for axis in resolved(index)) or "0"
            case Clamped(body, _):
                return self.term(body)
            case Plus(parts):
                shown = [self.term(part) for part in parts if part != Scalar(0)]
                if len(shown) == 2 and isinstance(parts[-1], Scalar) and parts[-1].value < 0:
                    return f"({shown[0]} - {-parts[-1].value:g})"
                return shown[0] if len(shown) == 1 else "(" + " + ".join(shown) + ")" if shown else "0"
            case Product(parts):
                return " * ".join(map(self.term, parts))
            case AnyOf(parts):
                return "(" + " or ".join(map(self.term, parts)) + ")"
            case FloorDiv(body, divisor):
                return f"{self.term(body)} // {divisor}"
            case Not(body):
                return f"not {self.term(body)}"
            case Compare(kind, left, right):
                return f"{self.term(left)} {kind} {self.term(right)}"
            case Where(condition, then, otherwise):
                return f"({self.term(then)} if {self.term(condition)} else {self.term(otherwise)})"
        return type(term).__name__.lower()
