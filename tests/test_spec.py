import dataclasses

import pytest
from test_store import SPEC

from influence.errors import SpecMismatchError
from influence.spec import FeatureSpec, check_equal


def test_a_spec_survives_json():
    assert FeatureSpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(FeatureSpec)])
def test_every_field_is_in_the_fingerprint(field):
    value = getattr(SPEC, field)
    other = {str: "x", int: 99, bool: not value, tuple: (1, 1, 1), type(None): "x"}[type(value)]
    changed = dataclasses.replace(SPEC, **{field: other})
    assert changed.fingerprint != SPEC.fingerprint
    with pytest.raises(SpecMismatchError, match=f"this does not fit: {field} is "):
        check_equal(changed.to_json(), SPEC.to_json(), what="this", where="store s", advice="")


def test_a_record_of_another_version_is_refused():
    fields = SPEC.to_json()
    with pytest.raises(SpecMismatchError, match="unknown or missing fields: extra, seed; made by another version"):
        FeatureSpec.from_json({**{k: v for k, v in fields.items() if k != "seed"}, "extra": 1})
