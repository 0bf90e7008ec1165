"""PEFT knows its methods by the members of an enum; ours are added to it."""

from __future__ import annotations

from peft import PeftType


def extend_peft_type(name: str) -> PeftType:
    """The member of that name, made if PEFT does not ship it.

    A plain string would not do: PEFT calls ``.value`` on it and looks it up in ``list(PeftType)``.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    setattr(PeftType, name, member)  # before the map knows the name: the metaclass refuses to rebind a member
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
