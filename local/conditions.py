"""What a template's conditions leave of it under given parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
_NO_VALUE = {"Ref": "AWS::NoValue"}


class ConditionError(Exception):
    """A condition asks for what only a deployment knows."""


def under_conditions(template: Json, pseudo_parameters: Mapping[str, str]) -> Json:
    """Return a template without what its conditions leave out, and without the conditions.

    Parameters have the values that stand in the template as their defaults. Raises `ConditionError`.
    """
    parameters = {name: as_text(p.get("Default", "")) for name, p in template.get("Parameters", {}).items()}
    conditions = _Conditions(template.get("Conditions", {}), {**parameters, **pseudo_parameters})
    result = {key: value for key, value in template.items() if key != "Conditions"}
    for section in ("Resources", "Outputs"):
        result[section] = {
            name: conditions.chosen({key: value for key, value in entry.items() if key != "Condition"})
            for name, entry in template.get(section, {}).items()
            if "Condition" not in entry or conditions.holds(entry)
        }
    return result


def as_text(value: Any) -> str:
    """Return a value as CloudFormation writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Conditions:
    def __init__(self, named: Json, known: Mapping[str, str]) -> None:
        self._named = named
        self._known = known

    def holds(self, condition: Any) -> bool:
        match condition:
            case {"Condition": str(name)} if name in self._named:
                return self.holds(self._named[name])
            case {"Fn::Equals": [one, other]}:
                return self._text(one) == self._text(other)
            case {"Fn::Not": [part]}:
                return not self.holds(part)
            case {"Fn::And": list(parts)}:
                return all(map(self.holds, parts))
            case {"Fn::Or": list(parts)}:
                return any(map(self.holds, parts))
            case _:
                raise ConditionError(f"cannot tell whether {condition} holds")

    def _text(self, value: Any) -> str:
        match value:
            case {"Ref": str(name)} if name in self._known:
                return self._known[name]
            case dict() | list():
                raise ConditionError(f"a condition here may ask for parameters only, not for {value}")
            case _:
                return as_text(value)

    def chosen(self, value: Any) -> Any:
        """Return a value with the branch taken of each `Fn::If` in it."""
        match value:
            case {"Fn::If": [name, yes, no]}:
                return self.chosen(yes if self.holds({"Condition": name}) else no)
            case dict():
                items = {key: self.chosen(item) for key, item in value.items()}
                return {key: item for key, item in items.items() if item != _NO_VALUE}
            case list():
                return [item for item in map(self.chosen, value) if item != _NO_VALUE]
            case _:
                return value
