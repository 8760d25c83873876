"""The type checker of the tests: beartype, which checks as before but is not asked to compile the same check again.

A function that is defined inside another one, such as a hook of a layer, is decorated each time that the outer one
runs: for every layer of every forward, and what beartype does for it costs more than the forward itself.
"""

from beartype import beartype

_KEPT = {}


def kept_beartype(stub):
    """Check a signature, by the check of an earlier stub that is equal.

    jaxtyping hands over no function of the package but a stub without a body, made of its signature alone; stubs of
    equal code, annotations and names, without defaults, are interchangeable.
    """
    if stub.__code__.co_filename != "<string>" or stub.__defaults__ or stub.__kwdefaults__:
        return beartype(stub)
    key = stub.__module__, stub.__qualname__, stub.__code__, tuple(stub.__annotations__.items())
    try:
        if key not in _KEPT:
            _KEPT[key] = beartype(stub)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(stub)
    return _KEPT[key]
